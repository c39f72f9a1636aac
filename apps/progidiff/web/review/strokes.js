// A stroke while it is drawn: from where the pointer went down to where it is lifted. It works on a copy; what it changed is known as a box.

import { drawLine, fillPolygon, joinBoxes } from "./shapes.js";

/** @typedef {import("./geometry.js").Plane} Plane */
/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {import("./masks.js").Box} Box */
/** @typedef {{mask: Uint8Array, move: (point: Point) => Box|null, finish: () => Box|null, line: readonly Point[]}} Stroke `move` and `finish` give what they changed; `line` is to be shown with it */

/**
 * A brush or an eraser.
 * @param {Uint8Array} mask is changed
 * @param {Plane} plane
 * @param {number} size mm across
 * @param {0|1} value
 * @param {(index: number) => boolean} [isAllowed]
 * @returns {Stroke}
 */
export function startBrush(mask, plane, size, value, isAllowed) {
  /** @type {Point|null} */
  let last = null;
  return {
    mask,
    line: [],
    finish: () => null,
    move: (point) => {
      const changed = drawLine(mask, plane, last ?? point, point, size / 2, value, isAllowed);
      last = point;
      return changed;
    },
  };
}

/**
 * A line around what is to be added or taken away.
 * @param {Uint8Array} mask is changed at the end
 * @param {Plane} plane
 * @param {0|1} value
 * @returns {Stroke}
 */
export function startLasso(mask, plane, value) {
  /** @type {Point[]} */
  const line = [];
  return {
    mask,
    line,
    move: (point) => {
      line.push(point);
      return null;
    },
    finish: () => {
      fillPolygon(mask, plane, line, value);
      return line.reduce((/** @type {Box|null} */ box, [y, x]) => joinBoxes(box, clipBox(plane, y, x)), null);
    },
  };
}

/** @param {Plane} plane @param {number} y @param {number} x @returns {Box} the pixel of a point and those around */
function clipBox({ height, width }, y, x) {
  /** @type {(value: number, most: number) => number} */
  const clip = (value, most) => Math.min(most, Math.max(0, value));
  return { y0: clip(Math.floor(y) - 1, height), y1: clip(Math.ceil(y) + 1, height), x0: clip(Math.floor(x) - 1, width), x1: clip(Math.ceil(x) + 1, width) };
}
