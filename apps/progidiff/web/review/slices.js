// Axial slices in order of dispute, and in words. The server counts slices from 0 at the feet; people count from 1, as viewers show them.

/** @typedef {import("../answers.d.ts").QueueSlice} QueueSlice */

const MOST_LISTED = 8;

/**
 * The slice with the highest value above 0, other than `without`, that is not done; null if none is left.
 * @param {readonly number[]} values per slice
 * @param {(z: number) => boolean} isDone
 * @param {number|null} without
 * @returns {number|null}
 */
export function findHighest(values, isDone, without = null) {
  /** @type {number|null} */
  let best = null;
  for (let z = 0; z < values.length; z += 1) {
    if (z !== without && values[z] > 0 && !isDone(z) && (best === null || values[z] > values[best])) best = z;
  }
  return best;
}

/**
 * The most disputed slices, as the queue lists them.
 * @param {readonly number[]} values disagreement per slice
 * @returns {QueueSlice[]}
 */
export function rankSlices(values) {
  const order = [...values.keys()].filter((z) => values[z] > 0).sort((a, b) => values[b] - values[a]);
  return order.slice(0, MOST_LISTED).map((index) => ({ index, score: values[index], reason: `disagreement ${values[index].toFixed(2)}`, structures: [] }));
}

/** @param {number} z @returns {number} as people count: 1 is the lowest slice */
export const nameSlice = (z) => z + 1;

/** @param {number} count */
export const countSlices = (count) => (count === 1 ? "1 slice" : `${count} slices`);

/**
 * 3, 4, 5, 9 as "3–5, 9".
 * @param {readonly number[]} slices
 */
export function formatSlices(slices) {
  /** @type {[from: number, to: number][]} */
  const parts = [];
  for (const z of [...slices].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === z - 1) last[1] = z;
    else parts.push([z, z]);
  }
  return parts.map(([from, to]) => (from === to ? String(from) : `${from}–${to}`)).join(", ");
}
