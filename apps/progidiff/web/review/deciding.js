// Picking, merging, accepting, and taking back.

import { toast } from "./dom.js";
import { goTo, goToDisputed, toggleMode } from "./moving.js";
import * as picks from "./picks.js";
import { areMasksShown, chosenStructures, countProposals, currentPick, look, state, store } from "./state.js";
import { startWaiting } from "./timing.js";

/** @typedef {import("./picks.js").Pick} Pick */

/**
 * Pick for the structure, on this slice or everywhere.
 * @param {Pick} chosen
 */
export function pick(chosen) {
  const { work, session } = state;
  if (!work || !session?.result || state.isReadOnly) return;
  startWaiting("proposal-switch");
  const found = look(state.structure);
  if (state.mode === "difference" && found) store.set({ compared: found.pick });
  else store.set({ mode: "pick" });
  work.setPick(state.structure, chosen, state.scope === "slice" ? state.z : null);
  store.touch("picks");
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
  if (!session || !work || !session.result?.key) return null;
  if (state.isReadOnly) toast("This image is open in another tab. Choose “Use it here” first.", "bad");
  return state.isReadOnly ? null : { session, work };
}

export function acceptSlice() {
  const found = findDecidable();
  if (!found || !areMasksShown()) return;
  const { z } = state;
  found.work.acceptSlice(z, chosenStructures());
  store.touch("decisions");
  toast(`Slice ${z} accepted`, "good", 2);
  if (!goToDisputed(z)) toast("No undecided slice with disagreement is left. Accept the volume, or submit.", "", 4);
}

export function acceptVolume() {
  const found = findDecidable();
  if (!found) return;
  found.work.acceptVolume(chosenStructures());
  store.touch("decisions");
  toast(`Volume accepted: ${chosenStructures().join(", ")}`, "good", 3);
}

export function undo() {
  const { work, session } = state;
  if (!work || state.isReadOnly) return;
  const undone = work.undo();
  if (undone) {
    toast(`Undone: ${undone.what}`, "", 2);
    if (undone.z !== null) goTo(undone.z);
    store.touch("picks", "decisions");
  } else if (session?.info.label) {
    toast("Nothing unsent to undo. “Undo last save” goes back further.");
  }
}
