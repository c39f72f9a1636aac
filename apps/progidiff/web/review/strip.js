// The proposals of the shown slice side by side: consensus, every proposal, agreement, difference, absent.

import { element, find } from "./dom.js";
import { agreementLayer, differenceLayer, drawSlice, maskLayer } from "./draw.js";
import { frameAround, wholeSlice } from "./geometry.js";
import { countPixels } from "./masks.js";
import { describePick, drawPick, makePick, pickProposal } from "./picks.js";
import { colorOf, comparedPick, countProposals, currentPick, look, shown, state } from "./state.js";

/** @typedef {"consensus"|"agreement"|"difference"|"nothing"|number} Thumb a number is a proposal, from 1 */
/** @typedef {import("./state.js").Look} Look */
/** @typedef {import("./session.js").ImageSession} ImageSession */

const MAX_KEY = 9;
/** Width by height of a thumbnail. */
const ASPECT = 84 / 72;
const NAMES = { consensus: "Consensus", agreement: "Agreement", difference: "Difference", nothing: "Absent" };
const SHORTCUTS = { consensus: "C", agreement: "H", difference: "D", nothing: "0" };

/** @type {(kind: Thumb) => void} */
let choose = () => {};
/**
 * Call back when one is clicked.
 * @param {(kind: Thumb) => void} callback
 */
export function onChoose(callback) {
  choose = callback;
}

/** @type {{kind: Thumb, node: HTMLButtonElement, canvas: HTMLCanvasElement, note: HTMLElement}[]} */
let thumbs = [];

export function renderStrip() {
  const { session } = state;
  const strip = find("strip");
  const result = session?.result;
  if (!result || !state.work) {
    strip.replaceChildren(element("p", { className: "muted" }, session ? "Proposals appear here, side by side." : ""));
    thumbs = [];
    return;
  }
  const numbers = Array.from({ length: countProposals() }, (_, k) => k + 1);
  /** @type {Thumb[]} */
  const wanted = ["consensus", ...numbers, "agreement", "difference", "nothing"];
  if (wanted.length !== thumbs.length) {
    thumbs = wanted.map(buildThumb);
    strip.replaceChildren(...thumbs.map(({ node }) => node));
  }
  const active = look(state.structure);
  const found = active?.masks.length ? active : null;
  for (const thumb of thumbs) paintThumb(thumb, session, found);
}

/** @param {Thumb} kind */
function buildThumb(kind) {
  const isProposal = typeof kind === "number";
  const key = isProposal ? (kind <= MAX_KEY ? String(kind) : "") : SHORTCUTS[kind];
  const canvas = element("canvas");
  const note = element("span", { className: "thumb-note" }, "\u00a0");
  const node = element(
    "button",
    { className: "thumb", role: "option", "aria-selected": "false", on: { click: () => choose(kind) } },
    canvas,
    element("span", { className: "thumb-name" }, isProposal ? `Prop. ${kind}` : NAMES[kind], key && element("kbd", {}, key)),
    note,
  );
  node.dataset.kind = String(kind);
  return { kind, node, canvas, note };
}

/**
 * @param {typeof thumbs[number]} thumb
 * @param {ImageSession} session
 * @param {Look|null} found
 */
function paintThumb({ kind, node, canvas, note }, session, found) {
  node.setAttribute("aria-selected", String(isSelected(kind)));
  const frame = found?.box ? frameAround(found.box, session.spacing, ASPECT) : wholeSlice(session);
  drawSlice(canvas, shown.grey, frame, session.spacing, found ? buildLayers(kind, found) : []);
  note.textContent = found ? describeThumb(kind, session, found) : "…";
  node.title = found && kind === found.best + 1 ? "The most typical proposal: the others agree with it most" : "";
}

/** @param {Thumb} kind */
function isSelected(kind) {
  if (kind === "agreement" || kind === "difference") return state.mode === kind;
  if (state.drawing?.get(state.structure, state.z)) return false;
  const { rule, members } = currentPick();
  const isPicked = typeof kind === "number" ? rule === "proposal" && members[0] === kind : rule === kind;
  return isPicked && state.mode === "pick";
}

/**
 * @param {Thumb} kind
 * @param {Look} found
 */
function buildLayers(kind, found) {
  const { box, masks, best } = found;
  if (!box || kind === "nothing") return [];
  if (kind === "agreement") return [agreementLayer(masks, box)];
  if (kind === "difference") return [differenceLayer(found.mask, drawPick(masks, comparedPick(found), best), box)];
  const drawn = drawPick(masks, kind === "consensus" ? makePick(kind) : pickProposal(kind), best);
  return [maskLayer(drawn, box, colorOf(state.structure), { fill: 0.18, width: 1.5 })];
}

/**
 * @param {Thumb} kind
 * @param {ImageSession} session
 * @param {Look} found
 */
function describeThumb(kind, session, found) {
  const [dy, dx] = session.spacing;
  /** @type {(mask: Uint8Array) => string} */
  const area = (mask) => session.picture ? `${countPixels(mask)} px` : `${((countPixels(mask) * dy * dx) / 100).toFixed(1)} cm²`;
  if (kind === "agreement") return "share";
  if (kind === "nothing") return "not here";
  if (kind === "difference") return `to ${describePick(comparedPick(found), countProposals())}`;
  if (kind === "consensus") return area(drawPick(found.masks, makePick(kind), found.best));
  const best = session.result?.summary?.structures[state.structure]?.best;
  return `${area(found.masks[kind - 1])}${best === kind ? " ★" : ""}`;
}
