// Picking, merging, accepting, and taking back.

import { nextTime } from "./clock.js";
import { toast } from "./dom.js";
import { goToNext, toggleMode } from "./moving.js";
import { clearSlice, dropDrawn, keep } from "./painting.js";
import * as picks from "./picks.js";
import { nameSlice } from "./slices.js";
import { areMasksShown, chosenStructures, countProposals, currentPick, look, state, store } from "./state.js";
import { undoLast } from "./timeline.js";
import { startWaiting } from "./timing.js";

/** @typedef {import("./picks.js").Pick} Pick */

/**
 * Pick for the structure, on this slice or everywhere.
 * @param {Pick} chosen
 */
export function pick(chosen) {
  const { work, session } = state;
  if (!session || state.isReadOnly) return;
  if (!session.result?.owners[state.structure]) {
    pickWithout(chosen);
    return;
  }
  if (!work) return;
  startWaiting("proposal-switch");
  const found = look(state.structure);
  if (state.mode === "difference" && found) store.set({ compared: found.pick });
  else store.set({ mode: "pick" });
  const [z, at] = [state.scope === "slice" ? state.z : null, nextTime()];
  dropDrawn(state.structure, z, at);
  work.setPick(state.structure, chosen, z, at);
  store.touch("picks");
}

/**
 * Of a structure without proposals only one thing can be picked: that it is not there.
 * @param {Pick} chosen
 */
function pickWithout({ rule }) {
  if (rule === "nothing") clearSlice();
  else toast(`There are no proposals of ${state.structure}. Find it, or draw it.`, "bad");
}

/** @param {number} number */
export function pickProposal(number) {
  if (number <= countProposals()) pick(picks.pickProposal(number));
}

/** @param {import("./strip.js").Thumb} kind */
export function chooseThumb(kind) {
  if (kind === "agreement" || kind === "difference") toggleMode(kind);
  else if (typeof kind === "number") pickProposal(kind);
  else pick(picks.makePick(kind));
}

/** @param {import("./picks.js").MergeRule} rule */
export const merge = (rule) => pick(picks.mergeBy(currentPick(), rule, countProposals()));

/** @param {number} number */
export const toggleMember = (number) => pick(picks.toggleMember(currentPick(), number, countProposals()));

/** @param {number} step */
export const shiftThreshold = (step) => pick(picks.shiftThreshold(currentPick(), step, countProposals()));

/** @param {number} needed of the members that are chosen */
export const requireProposals = (needed) => pick(picks.requireProposals(currentPick(), needed, countProposals()));

/** What can be decided now; null, and why on the screen, if nothing. */
export function findDecidable() {
  const { session, work } = state;
  if (!session || !work || !(session.keys.length || work.hasDecisions)) return null;
  if (state.isReadOnly) toast("This image is open in another tab. Choose “Use it here” first.", "bad");
  return state.isReadOnly ? null : { session, work };
}

/** The structures of these that have kept proposals: those of a job that still runs cannot be accepted yet. @param {readonly string[]} names */
const acceptable = (names) => names.filter((name) => state.session?.keyOf(name));

/**
 * Accept structures on this slice, as they are shown, and go to the next one; by itself, the active one alone.
 * @param {readonly string[]} names
 */
export function acceptSlice(names = [state.structure]) {
  const found = findDecidable();
  const structures = acceptable(names);
  if (!found || !structures.length || !areMasksShown()) return;
  const { z } = state;
  found.work.acceptSlice(z, structures);
  if (state.drawing) {
    state.drawing.markUnsent(z, structures);
    keep(state.drawing);
  }
  store.touch("decisions");
  toast(`${structures.join(", ")} accepted${found.session.picture ? "" : ` on slice ${nameSlice(z)}`}`, "good", 2);
  if (!goToNext(z)) tellDone();
}

/** Nothing is left of the active structure: which one is. */
function tellDone() {
  const open = listOpen().filter((name) => name !== state.structure);
  if (state.session?.picture) {
    if (open.length) toast(`X goes on to ${open[0]}.`);
    return;
  }
  const next = open.length ? ` X goes on to ${open[0]}.` : " Submit, or accept the volume.";
  toast(`No slice of ${state.structure} is left that the proposals dispute.${next}`, "", 4);
}

/** The structures with proposals of which nothing is accepted or saved. */
const listOpen = () => acceptable(chosenStructures()).filter((name) => !state.work?.isAccepted(name) && state.session?.savedOn(name) === undefined);

/**
 * Accept structures on every slice; by itself, the active one alone.
 * @param {readonly string[]} names
 */
export function acceptVolume(names = [state.structure]) {
  const found = findDecidable();
  const structures = acceptable(names);
  if (!found || !structures.length) return;
  found.work.acceptVolume(structures);
  store.touch("decisions");
  toast(`${structures.join(", ")} accepted${found.session.picture ? "" : " in the whole volume"}`, "good", 3);
}

/** Accept everything that is shown on this slice. */
export const acceptShown = () => acceptSlice(chosenStructures());

/** Accept everything that is shown on every slice. */
export const acceptShownVolume = () => acceptVolume(chosenStructures());

export function undo() {
  const { session } = state;
  if (!session || state.isReadOnly) return;
  if (!undoLast() && session.info.label) {
    toast("Nothing unsent to undo. “Undo last save” goes back further.");
  }
}
