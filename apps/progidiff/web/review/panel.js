// The decision beside the picture: structures, how proposals are merged, what is accepted and what is saved.

import { element, find } from "./dom.js";
import { MERGE_RULES, describePick } from "./masks.js";
import { colorOf, currentPick, state } from "./state.js";

let act = { selectStructure: () => {}, toggleMember: () => {}, merge: () => {} };
/** What its buttons do. */
export function onDecide(actions) {
  act = actions;
}

export function render() {
  const { session } = state;
  find("where").replaceChildren(...(session ? [element("strong", {}, session.image), ` · ${session.info.modality} · ${session.depth} slices`] : ["Choose an image"]));
  for (const id of ["prompt-run", "skip"]) find(id).disabled = !session || Boolean(state.job) || state.isReadOnly;
  renderPanel();
}

export function renderPanel() {
  const { session, work } = state;
  const result = session?.result;
  const isReady = Boolean(result && work && !state.isReadOnly);
  find("structures").replaceChildren(...(result ? result.structures.map(renderChip) : []));
  find("scope-slice").setAttribute("aria-pressed", String(state.scope === "slice"));
  find("scope-volume").setAttribute("aria-pressed", String(state.scope === "volume"));
  renderMerging(isReady);
  for (const id of ["accept-slice", "accept-volume"]) find(id).disabled = !isReady || !result.key;
  find("undo").disabled = !work?.history.length || state.isReadOnly;
  renderDecided();
}

function renderChip(name) {
  const { session } = state;
  const isIncluded = state.included.has(name);
  const dot = element("i");
  dot.style.background = isIncluded ? colorOf(name) : "#46525e";
  const isAbsent = session.result.summary && !session.result.summary.structures[name].present;
  const words = `${name}${isAbsent ? " (not found)" : ""}${isIncluded ? "" : " (left out)"}`;
  return element("button", { "aria-pressed": String(name === state.structure), on: { click: () => act.selectStructure(name) } }, dot, words);
}

function renderMerging(isReady) {
  const current = currentPick();
  const count = state.session?.result?.numProposals ?? 0;
  const isMerged = MERGE_RULES.includes(current.rule);
  const members = isMerged && current.members.length ? current.members : Array.from({ length: count }, (_, k) => k + 1);
  find("members").replaceChildren(
    ...Array.from({ length: count }, (_, k) =>
      element("button", { "aria-pressed": String(isMerged && members.includes(k + 1)), disabled: !isReady, title: `Proposal ${k + 1} takes part`, on: { click: () => act.toggleMember(k + 1) } }, String(k + 1)),
    ),
  );
  const rules = [["union", "Union", "U"], ["intersection", "Intersection", "I"], ["majority", "Majority", "J"], ["threshold", "At least …", "T"]];
  find("rules").replaceChildren(
    ...rules.map(([rule, label, key]) =>
      element("button", { "aria-pressed": String(current.rule === rule), "aria-keyshortcuts": key, disabled: !isReady || count < 2, on: { click: () => act.merge(rule) } }, label, element("kbd", {}, key)),
    ),
  );
  const isThreshold = current.rule === "threshold";
  find("threshold-row").hidden = !isThreshold;
  if (isThreshold) {
    const needed = Math.max(1, Math.ceil(current.threshold * members.length - 1e-6));
    Object.assign(find("threshold"), { max: members.length, value: needed });
    find("threshold-text").textContent = `${needed} of ${members.length}`;
  }
  find("picked").textContent = count ? describePick(current, count) : "nothing yet";
}

function renderDecided() {
  const { session, work } = state;
  const slices = work?.decidedSlices ?? [];
  const parts = [];
  if (work?.isVolumeAccepted) parts.push(`the whole volume (${Object.keys(work.state.volume).join(", ")})`);
  if (slices.length) parts.push(`${slices.length === 1 ? "slice" : "slices"} ${formatSlices(slices)}`);
  find("decided").textContent = parts.length ? `Accepted, not sent: ${parts.join(", with picks of their own on ")}` : "Nothing accepted yet.";
  find("submit").disabled = !work?.hasDecisions || state.isReadOnly;
  const label = session?.info.label;
  const extent = session?.info.annotated_slices;
  find("saved").textContent = label
    ? `Saved: ${extent === null ? "whole volume" : `${extent.length} slices`} · save ${label.sequence}${label.user ? ` by ${label.user}` : ""}, ${new Date(label.time).toLocaleString()}`
    : session
      ? "No saved label yet."
      : "";
  find("undo-save").hidden = !label || Boolean(work?.hasDecisions) || state.isReadOnly;
}

/** 3, 4, 5, 9 as "3–5, 9". */
function formatSlices(slices) {
  const parts = [];
  for (const z of [...slices].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === z - 1) last[1] = z;
    else parts.push([z, z]);
  }
  return parts.map(([from, to]) => (from === to ? String(from) : `${from}–${to}`)).join(", ");
}
