// What a job does, in words.

/** @typedef {import("./state.js").Progress} Progress */

/**
 * What a job does, or what it waits for.
 * @param {Progress} progress
 * @param {string} unit what is counted
 */
export function describeProgress(progress, unit = "slices") {
  if (progress.problem) return progress.problem;
  if (progress.state === "queued") {
    if (progress.waiting_for) return `waiting for ${progress.waiting_for}`;
    return progress.position ? `waiting, position ${progress.position}` : "waiting";
  }
  if (progress.state === "running") return `${progress.slices_done ?? 0} of ${progress.slices_total || "?"} ${unit}`;
  return progress.state ?? "";
}
