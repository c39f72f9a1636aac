// Times that somebody waits for: from the key or click to the picture. Read by anybody with `performance.getEntriesByType`.

/** @typedef {"first-pixels"|"first-proposal"|"proposal-switch"|"slice-switch"} Wait */

/** @type {Map<Wait, number>} */
const waiting = new Map();

/** @param {Wait} name */
export const startWaiting = (name) => void waiting.set(name, performance.now());

/**
 * The picture is there.
 * @param {...Wait} names
 */
export function stopWaiting(...names) {
  for (const name of names) {
    const start = waiting.get(name);
    if (start !== undefined) performance.measure(name, { start, end: performance.now() });
    waiting.delete(name);
  }
}

/**
 * The picture will not come.
 * @param {Wait} name
 */
export const giveUpWaiting = (name) => void waiting.delete(name);
