// Colours that a number or a text stands for.

/** @typedef {[red: number, green: number, blue: number]} Color 0 to 255 */

/**
 * Agreement from a single proposal to all of them: dark violet over magenta to light yellow, readable without telling red from green.
 * @type {readonly Color[]}
 */
const HEAT = [
  [59, 15, 112],
  [114, 31, 129],
  [183, 55, 121],
  [241, 96, 93],
  [254, 159, 109],
  [252, 253, 191],
];
/** @type {Color} */
export const ONLY_FIRST = [255, 171, 64];
/** @type {Color} */
export const ONLY_SECOND = [64, 196, 255];

/**
 * Colour of an agreement between 0 and 1.
 * @param {number} share
 * @returns {Color}
 */
export function heatColor(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  const [from, to] = [HEAT[low], HEAT[low + 1]];
  /** @type {(channel: number) => number} */
  const mix = (channel) => Math.round(from[channel] + (place - low) * (to[channel] - from[channel]));
  return [mix(0), mix(1), mix(2)];
}

/**
 * @param {string} hex "#rrggbb"
 * @returns {Color}
 */
export function parseColor(hex) {
  /** @type {(start: number) => number} */
  const read = (start) => parseInt(hex.slice(start, start + 2), 16);
  return [read(1), read(3), read(5)];
}

/** @param {Color} color */
export const cssColor = (color) => `rgb(${color.join(" ")})`;
