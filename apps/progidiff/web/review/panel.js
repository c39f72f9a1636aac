// The decision beside the picture: structures, how proposals are merged, what is accepted and what is saved.

import { describeProgressOf, describeTeaching, formatMl, measurePick } from "./checklist.js";
import { element, find, findButton, findInput } from "./dom.js";
import { icon } from "./icons.js";
import { isSentenceTyped } from "./picture.js";
import { countNeeded, describePick, isMerged, listMembers } from "./picks.js";
import { countSlices, formatSlices, nameSlice } from "./slices.js";
import { colorOf, countProposals, currentPick, findInFolder, listStructures, state } from "./state.js";

/** @typedef {import("./picks.js").MergeRule} MergeRule */
/** @typedef {{selectStructure: (name: string) => void, toggleIncluded: (name: string) => void, toggleMember: (number: number) => void, merge: (rule: MergeRule) => void}} Buttons */

/** @type {readonly [rule: MergeRule, label: string, key: string][]} */
const RULES = [
  ["union", "Union", "U"],
  ["intersection", "Intersection", "I"],
  ["majority", "Majority", "J"],
  ["threshold", "At least …", "T"],
];

/** @type {Buttons} */
let act = { selectStructure: () => {}, toggleIncluded: () => {}, toggleMember: () => {}, merge: () => {} };
/**
 * What its buttons do.
 * @param {Buttons} buttons
 */
export function onDecide(buttons) {
  act = buttons;
}

/** Which image it is, and what can be asked about it. */
export function renderHead() {
  const { session } = state;
  find("where").replaceChildren(
    ...(session ? [element("strong", {}, session.image), session.picture ? ` · picture · ${session.width} × ${session.height}` : ` · ${session.info.modality} · ${countSlices(session.depth)}`] : ["Choose an image"]),
  );
  const warnings = session?.info.geometry.warnings ?? [];
  find("header-warning").hidden = warnings.length === 0;
  find("header-warning").title = warnings.join(" ");
  for (const id of ["prompt-run", "skip"]) findButton(id).disabled = !session || Boolean(state.job) || state.isReadOnly;
}

export function renderPanel() {
  const { session, work } = state;
  const result = session?.result;
  const isReady = Boolean(result && work && !state.isReadOnly);
  find("structures").replaceChildren(...listStructures().map(renderRow));
  find("teach").hidden = !session || Boolean(session.picture);
  find("teach-change").hidden = !findInFolder(state.structure)?.is_own;
  find("scope-slice").setAttribute("aria-pressed", String(state.scope === "slice"));
  find("scope-volume").setAttribute("aria-pressed", String(state.scope === "volume"));
  renderMerging(isReady);
  for (const id of ["accept-slice", "accept-volume"]) findButton(id).disabled = !isReady || !session?.keyOf(state.structure);
  findButton("accept-shown").disabled = !isReady || !session?.keys.length;
  find("accept-slice").title = state.structure ? `Accept ${state.structure}${session?.picture ? "" : " on this slice"}` : "";
  find("accept-name").textContent = state.structure ? `Accept ${state.structure}` : session?.picture ? "Accept" : "Accept slice";
  findButton("undo").disabled = !(work?.canUndo || state.drawing?.lastAt || state.edits?.lastAt) || state.isReadOnly;
  renderDecided();
  renderSaved();
}

/**
 * A row of the checklist: eye, colour, name and pick, volume, and how far it is.
 * @param {string} name
 */
function renderRow(name) {
  const { session, work } = state;
  const numbers = session?.result?.summary?.structures[name];
  const owner = session?.result?.owners[name];
  const taught = findInFolder(name);
  const lack = taught && !taught.is_known ? describeTeaching(taught) : "no proposals";
  const pick = work && owner ? work.pickOn(name, state.z) : null;
  const { mark, words } = describeProgressOf(work?.acceptedOf(name) ?? { volume: null, slices: [] }, session?.savedOn(name), numbers?.present ?? !owner, Boolean(session?.picture));
  const isShown = state.included.has(name);
  const eye = element(
    "button",
    { className: "eye ghost", "aria-pressed": String(isShown), "aria-label": `Show ${name}`, title: isShown ? "Hide (E)" : "Show (E)", on: { click: () => act.toggleIncluded(name) } },
    icon(isShown ? "eye" : "eyeOff"),
  );
  const dot = element("i");
  dot.style.background = colorOf(name);
  const row = element(
    "button",
    { className: "structure", "aria-pressed": String(name === state.structure), on: { click: () => act.selectStructure(name) } },
    dot,
    element("span", { className: "structure-name" }, name, element("small", {}, pick && owner ? describePick(pick, owner.numProposals) : lack)),
    element("span", { className: "structure-ml" }, formatMl(pick && !session?.picture ? measurePick(pick, numbers) : null)),
    element("span", { className: `mark ${mark}` }, words),
  );
  return element("li", {}, eye, row);
}

/** @param {boolean} isReady */
function renderMerging(isReady) {
  const current = currentPick();
  const count = countProposals();
  const members = listMembers(current, count);
  find("members").replaceChildren(
    ...Array.from({ length: count }, (_, k) =>
      element(
        "button",
        {
          "aria-pressed": String(isMerged(current) && members.includes(k + 1)),
          disabled: !isReady,
          title: `Proposal ${k + 1} takes part`,
          on: { click: () => act.toggleMember(k + 1) },
        },
        String(k + 1),
      ),
    ),
  );
  find("rules").replaceChildren(
    ...RULES.map(([rule, label, key]) =>
      element(
        "button",
        {
          "aria-pressed": String(current.rule === rule),
          "aria-keyshortcuts": key,
          disabled: !isReady || count < 2,
          on: { click: () => act.merge(rule) },
        },
        label,
        element("kbd", {}, key),
      ),
    ),
  );
  renderThreshold(current, members.length);
  const drawn = state.drawing?.get(state.structure, state.z);
  find("picked").textContent = drawn ? "drawn by hand" : count ? describePick(current, count) : "nothing yet";
}

/**
 * @param {import("./picks.js").Pick} pick
 * @param {number} size of how many proposals
 */
function renderThreshold(pick, size) {
  const isThreshold = pick.rule === "threshold";
  find("threshold-row").hidden = !isThreshold;
  if (!isThreshold) return;
  const needed = countNeeded(pick.threshold, size);
  Object.assign(findInput("threshold"), { max: size, value: needed });
  find("threshold-text").textContent = `${needed} of ${size}`;
}

function renderDecided() {
  const { work } = state;
  const parts = work?.decided.map((name) => (state.session?.picture ? name : describeAccepted(name, work.acceptedOf(name)))) ?? [];
  if (isSentenceTyped()) parts.push("the sentence");
  find("decided").textContent = parts.length ? `Accepted, not sent: ${parts.join("; ")}` : "Nothing accepted yet.";
  findButton("submit").disabled = !(work?.hasDecisions || isSentenceTyped()) || state.isReadOnly || state.isSubmitting;
}

/**
 * @param {string} name
 * @param {import("./checklist.js").Accepted} accepted
 */
function describeAccepted(name, { volume, slices }) {
  const listed = `${slices.length === 1 ? "slice" : "slices"} ${formatSlices(slices.map(nameSlice))}`;
  if (!volume) return `${name} on ${listed}`;
  return `${name} in the whole volume${slices.length ? `, with picks of its own on ${listed}` : ""}`;
}

function renderSaved() {
  const info = state.session?.info;
  const label = info?.label;
  find("finish").hidden = !info;
  findButton("finish").disabled = state.isReadOnly || state.isSubmitting;
  find("finish-text").textContent = info?.is_done ? "Open it again" : state.work?.hasDecisions || isSentenceTyped() ? "Submit, image is done" : "Image is done";
  find("undo-save").hidden = !label || Boolean(state.work?.hasDecisions) || state.isReadOnly;
  if (!info || !label) {
    find("saved").textContent = info ? "No saved label yet." : "";
    return;
  }
  const extent = state.session?.picture
    ? Object.keys(info.annotated).join(", ") || "label"
    : info.annotated_slices === null ? "whole volume" : countSlices(info.annotated_slices.length);
  const who = label.user ? ` by ${label.user}` : "";
  find("saved").textContent = `Saved: ${extent} · save ${label.sequence}${who}, ${new Date(label.time).toLocaleString()}`;
}
