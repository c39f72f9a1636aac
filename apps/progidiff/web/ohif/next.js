// What the server said of the next sample, kept while the viewer goes to it.

const KEY = 'progidiff.next';

/** @typedef {{series: string, slices: import('../answers.d.ts').QueueSlice[], reason: string}} Next */

/** @param {Next} next */
export const rememberNext = (next) => sessionStorage.setItem(KEY, JSON.stringify(next));

/**
 * What was said of a series; null if it is not the one that was gone to. Answers once.
 * @param {string} series
 * @returns {Next|null}
 */
export function takeNext(series) {
  /** @type {Next|null} */
  const next = JSON.parse(sessionStorage.getItem(KEY) ?? 'null');
  if (next?.series !== series) return null;
  sessionStorage.removeItem(KEY);
  return next;
}
