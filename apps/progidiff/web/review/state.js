// What the page shows, in one place, and what follows from it. Nothing here draws or asks the server.

import { drawPick } from "./masks.js";

const OTHER_COLORS = ["#e0aaff", "#80ed99", "#ff8fa3", "#a0c4ff", "#ffd6a5", "#caffbf"];

export const state = {
  /** @type {ImageSession|null} */
  session: null,
  /** @type {Work|null} */
  work: null,
  z: 0,
  structure: "",
  included: new Set(),
  mode: "pick",
  compared: null,
  scope: "slice",
  window: [0, 1],
  preset: "",
  zoom: 1,
  center: null,
  isHidden: false,
  isSavedShown: false,
  isReadOnly: false,
  opening: 0,
  job: null,
  lastActive: Date.now(),
};

/** What is drawn right now: pixels and masks of slice `z`, and the grey picture made of them. */
export const shown = { z: -1, pixels: null, masks: null, masksOf: null, label: null, grey: null, greyOf: "", place: null };

/** Times that somebody waits for: from the key or click to the picture. Read by anybody with `performance.getEntriesByType`. */
const waiting = new Map();
export const startWaiting = (name) => waiting.set(name, performance.now());

/** The picture is there; or, with `isDone` false, it will not come. */
export function stopWaiting(name, isDone = true) {
  if (!waiting.has(name)) return;
  if (isDone) performance.measure(name, { start: waiting.get(name), end: performance.now() });
  waiting.delete(name);
}

export const isSliceDone = (z) => Boolean(state.work?.isDecided(z) || state.session?.isSaved(z));

/** The undecided slice with the highest disagreement, other than this one; null if none is left. */
export function findDisputed(without = null) {
  const { session } = state;
  if (!session?.result?.summary) return null;
  const values = session.disagreement([...state.included]);
  let best = null;
  for (let z = 0; z < values.length; z += 1) {
    if (z !== without && values[z] > 0 && !isSliceDone(z) && (best === null || values[z] > values[best])) best = z;
  }
  return best;
}

/** The slices on which the shown proposals differ most, as the queue lists them. */
export function listDisputed() {
  const { session } = state;
  const values = session.disagreement([...state.included]);
  const order = [...values.keys()].filter((z) => values[z] > 0).sort((a, b) => values[b] - values[a]);
  return order.slice(0, 8).map((index) => ({ index, score: values[index], reason: `disagreement ${values[index].toFixed(2)}`, structures: [] }));
}

export function isDrawnHere() {
  const values = state.session.disagreement([...state.included]);
  return values[state.z] > 0;
}

/** The masks and the pick of a structure on the shown slice; null while they are not there. */
export function look(structure) {
  const { session, work } = state;
  if (!shown.masks || shown.z !== state.z || !work) return null;
  const index = session.result.structures.indexOf(structure);
  const entry = shown.masks[index];
  if (!entry) return null;
  const best = (session.result.summary?.structures[structure].best ?? 1) - 1;
  const pick = work.pickOn(structure, state.z);
  return { ...entry, best, pick, mask: entry.box ? drawPick(entry.masks, pick, best) : new Uint8Array(0) };
}

export function colorOf(structure) {
  const { session } = state;
  return session.info.colors[structure] ?? OTHER_COLORS[session.result.structures.indexOf(structure) % OTHER_COLORS.length];
}

export const currentPick = () => state.work?.pickOn(state.structure, state.z) ?? { rule: "consensus", members: [], threshold: 0.5 };

export const chosenStructures = () => state.session.result.structures.filter((name) => state.included.has(name));

/** What the shown pick is compared with: the proposal that was asked for, else the consensus, else the first other one. */
export function comparedPick(active) {
  if (state.compared) return state.compared;
  if (active.pick.rule !== "consensus") return { rule: "consensus", members: [], threshold: 0.5 };
  return { rule: "proposal", members: [1], threshold: 0.5 };
}
