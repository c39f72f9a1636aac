// The proposals of the shown slice side by side: consensus, every proposal, agreement, difference, absent.

import { element, find } from "./dom.js";
import * as draw from "./draw.js";
import { countPixels, describePick, drawPick } from "./masks.js";
import { colorOf, comparedPick, currentPick, look, shown, state } from "./state.js";

const MAX_KEY = 9;

let choose = () => {};
/** Call back with "consensus", a number, "agreement", "difference" or "nothing" when one is clicked. */
export function onChoose(callback) {
  choose = callback;
}

/** Thumbnails: consensus, every proposal, agreement, difference, absent. */
export function renderStrip() {
  const { session } = state;
  const strip = find("strip");
  const result = session.result;
  if (!result || !state.work) {
    strip.replaceChildren(element("p", { className: "muted" }, session ? "Proposals appear here, side by side." : ""));
    delete strip.dataset.of;
    return;
  }
  const wanted = ["consensus", ...Array.from({ length: result.numProposals }, (_, k) => k + 1), "agreement", "difference", "nothing"];
  if (strip.dataset.of !== wanted.join()) {
    strip.dataset.of = wanted.join();
    strip.replaceChildren(...wanted.map(buildThumb));
  }
  const found = look(state.structure);
  for (const thumb of strip.children) paintThumb(thumb, found);
}

function buildThumb(kind) {
  const isProposal = typeof kind === "number";
  const names = { consensus: "Consensus", agreement: "Agreement", difference: "Difference", nothing: "Absent" };
  const keys = { consensus: "C", agreement: "H", difference: "D", nothing: "0" };
  const key = isProposal ? (kind <= MAX_KEY ? String(kind) : "") : keys[kind];
  const thumb = element(
    "button",
    { className: "thumb", role: "option", "aria-selected": "false", on: { click: () => choose(kind) } },
    element("canvas"),
    element("span", { className: "thumb-name" }, isProposal ? `Prop. ${kind}` : names[kind], key && element("kbd", {}, key)),
    element("span", { className: "thumb-note" }, "\u00a0"),
  );
  thumb.dataset.kind = kind;
  return thumb;
}

function paintThumb(thumb, found) {
  const { session } = state;
  const { kind } = thumb.dataset;
  const number = Number(kind);
  const isMode = kind === "agreement" || kind === "difference";
  const current = currentPick();
  const isPicked = number ? current.rule === "proposal" && current.members[0] === number : current.rule === kind;
  thumb.setAttribute("aria-selected", String(isMode ? state.mode === kind : isPicked && state.mode === "pick"));
  const canvas = thumb.querySelector("canvas");
  const frame = found?.box
    ? draw.frameAround(found.box, session.height, session.width, session.spacing, 84 / 72)
    : draw.wholeSlice(session.height, session.width);
  draw.drawSlice(canvas, shown.grey, frame, session.spacing, found?.box ? thumbLayers(kind, found) : []);
  thumb.querySelector(".thumb-note").textContent = thumbNote(kind, found);
  thumb.title = number && found?.best === number - 1 ? "The most typical proposal: the others agree with it most" : "";
}

function thumbLayers(kind, found) {
  const color = colorOf(state.structure);
  if (kind === "agreement") return [draw.agreementLayer(found.masks, found.box)];
  if (kind === "difference") return [draw.differenceLayer(found.mask, drawPick(found.masks, comparedPick(found), found.best), found.box)];
  if (kind === "nothing") return [];
  const rule = Number(kind) ? { rule: "proposal", members: [Number(kind)] } : { rule: "consensus", members: [] };
  return [draw.maskLayer(drawPick(found.masks, rule, found.best), found.box, color, 0.18, 1.5)];
}

function thumbNote(kind, found) {
  const { session } = state;
  if (!found) return "…";
  const numbers = session.result.summary?.structures[state.structure];
  const number = Number(kind);
  const [dy, dx] = session.spacing;
  const area = (mask) => `${((countPixels(mask) * dy * dx) / 100).toFixed(1)} cm²`;
  if (number) return `${area(found.box ? found.masks[number - 1] : [])}${numbers?.best === number ? " ★" : ""}`;
  if (kind === "consensus") return found.box ? area(drawPick(found.masks, { rule: "consensus", members: [] }, found.best)) : "0.0 cm²";
  if (kind === "agreement") return "share";
  if (kind === "difference") return `to ${describePick(comparedPick(found), session.result.numProposals)}`;
  return "not here";
}
