// What is still open, structure by structure, in words and numbers. Nothing here draws or asks the server.

import { countSlices } from "./slices.js";

/** @typedef {import("./picks.js").Pick} Pick */
/** @typedef {{volume: Pick|null, slices: readonly number[]}} Accepted what is accepted and not sent: for the volume, and on single slices */
/** @typedef {"open"|"accepted"|"saved"|"absent"} Mark */

/**
 * How far a structure is: the word that stands in its row, and the mark that gives it a colour.
 * @param {Accepted} accepted
 * @param {readonly number[]|null|undefined} saved axial slices; null for the whole volume, undefined for nothing
 * @param {boolean} isPresent whether any proposal draws it
 * @param {boolean} isPicture whether there is one slice only, which nobody counts
 * @returns {{mark: Mark, words: string}}
 */
export function describeProgressOf({ volume, slices }, saved, isPresent, isPicture = false) {
  if (volume?.rule === "nothing" && !slices.length) return { mark: "absent", words: "absent, not sent" };
  if (isPicture && (volume || slices.length)) return { mark: "accepted", words: "accepted" };
  if (isPicture && (saved === null || saved?.length)) return { mark: "saved", words: "saved" };
  if (volume) return { mark: "accepted", words: "accepted: volume" };
  if (slices.length) return { mark: "accepted", words: `accepted: ${countSlices(slices.length)}` };
  if (saved === null) return { mark: "saved", words: "saved: volume" };
  if (saved?.length) return { mark: "saved", words: `saved: ${countSlices(saved.length)}` };
  return { mark: "open", words: isPresent ? "open" : "open, not found" };
}

/**
 * How far a structure is that no model knows yet.
 * @param {{slices: number|null, missing: number}} labelled
 */
export function describeTeaching({ slices, missing }) {
  const labelled = slices ? `${countSlices(slices)} labelled` : "no slice labelled yet";
  return missing ? `${labelled}, ${missing} ${slices ? "more " : ""}until proposals can be expected` : `${labelled}; train, and proposals can be expected`;
}

/**
 * The volume that a pick draws, in ml; null where only the server could count it.
 * @param {Pick} pick
 * @param {{consensus_ml: number, proposals_ml: number[], best: number}|undefined} numbers
 */
export function measurePick(pick, numbers) {
  if (pick.rule === "nothing") return 0;
  if (!numbers) return null;
  if (pick.rule === "consensus") return numbers.consensus_ml;
  if (pick.rule === "best") return numbers.proposals_ml[numbers.best - 1];
  return pick.rule === "proposal" ? numbers.proposals_ml[pick.members[0] - 1] : null;
}

/** @param {number|null} ml */
export const formatMl = (ml) => (ml === null ? "" : `${ml.toFixed(ml < 10 ? 1 : 0)} ml`);
