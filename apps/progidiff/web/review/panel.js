// The decision beside the picture: structures, how proposals are merged, what is accepted and what is saved.

import { element, find, findButton, findInput } from "./dom.js";
import { countNeeded, describePick, isMerged, listMembers } from "./picks.js";
import { countSlices, formatSlices } from "./slices.js";
import { colorOf, countProposals, currentPick, state } from "./state.js";

/** @typedef {import("./picks.js").MergeRule} MergeRule */
/** @typedef {{selectStructure: (name: string) => void, toggleMember: (number: number) => void, merge: (rule: MergeRule) => void}} Buttons */

/** @type {readonly [rule: MergeRule, label: string, key: string][]} */
const RULES = [
  ["union", "Union", "U"],
  ["intersection", "Intersection", "I"],
  ["majority", "Majority", "J"],
  ["threshold", "At least …", "T"],
];
const LEFT_OUT = "#46525e";

/** @type {Buttons} */
let act = { selectStructure: () => {}, toggleMember: () => {}, merge: () => {} };
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
    ...(session ? [element("strong", {}, session.image), ` · ${session.info.modality} · ${countSlices(session.depth)}`] : ["Choose an image"]),
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
  find("structures").replaceChildren(...(result ? result.structures.map((name) => renderChip(name, result)) : []));
  find("scope-slice").setAttribute("aria-pressed", String(state.scope === "slice"));
  find("scope-volume").setAttribute("aria-pressed", String(state.scope === "volume"));
  renderMerging(isReady);
  for (const id of ["accept-slice", "accept-volume"]) findButton(id).disabled = !isReady || !result?.key;
  findButton("undo").disabled = !work?.canUndo || state.isReadOnly;
  renderDecided();
  renderSaved();
}

/**
 * @param {string} name
 * @param {import("./session.js").Result} result
 */
function renderChip(name, result) {
  const isIncluded = state.included.has(name);
  const dot = element("i");
  dot.style.background = isIncluded ? colorOf(name) : LEFT_OUT;
  const isAbsent = result.summary && !result.summary.structures[name].present;
  const words = `${name}${isAbsent ? " (not found)" : ""}${isIncluded ? "" : " (left out)"}`;
  return element("button", { "aria-pressed": String(name === state.structure), on: { click: () => act.selectStructure(name) } }, dot, words);
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
  find("picked").textContent = count ? describePick(current, count) : "nothing yet";
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
  const slices = work?.decidedSlices ?? [];
  const parts = [];
  if (work?.isVolumeAccepted) parts.push(`the whole volume (${Object.keys(work.state.volume).join(", ")})`);
  if (slices.length) parts.push(`${slices.length === 1 ? "slice" : "slices"} ${formatSlices(slices)}`);
  find("decided").textContent = parts.length ? `Accepted, not sent: ${parts.join(", with picks of their own on ")}` : "Nothing accepted yet.";
  findButton("submit").disabled = !work?.hasDecisions || state.isReadOnly || state.isSubmitting;
}

function renderSaved() {
  const info = state.session?.info;
  const label = info?.label;
  find("undo-save").hidden = !label || Boolean(state.work?.hasDecisions) || state.isReadOnly;
  if (!info || !label) {
    find("saved").textContent = info ? "No saved label yet." : "";
    return;
  }
  const extent = info.annotated_slices === null ? "whole volume" : countSlices(info.annotated_slices.length);
  const who = label.user ? ` by ${label.user}` : "";
  find("saved").textContent = `Saved: ${extent} · save ${label.sequence}${who}, ${new Date(label.time).toLocaleString()}`;
}
