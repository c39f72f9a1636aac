// A structure on a slice where something was drawn by hand: what was drawn wins over what was picked, and what was drawn last over what was
// drawn before, as the server saves it (`labels/paintings.py`).

import { makePick } from "./picks.js";
import { findBox } from "./runs.js";
import { joinBoxes } from "./shapes.js";

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./state.js").Look} Look */
/** @typedef {import("./masks.js").Box} Box */

/** The last results, for they are asked for several times in a row. @type {{key: string, masks: unknown, look: Look|null}[]} */
let known = [];
const KNOWN = 16;

/**
 * @param {Drawing} drawing
 * @param {string} structure
 * @param {number} z
 * @param {Look|null} proposed
 * @returns {Look|null}
 */
export function combineLook(drawing, structure, z, proposed) {
  const drawn = drawing.get(structure, z);
  const above = drawing.listOn(z).filter((entry) => entry.structure !== structure && (!drawn || entry.drawn.order > drawn.order));
  if (!drawn && (!above.length || !proposed?.box)) return proposed;
  const key = JSON.stringify([drawing.image, structure, z, drawing.version, proposed?.pick]);
  const masks = proposed?.masks[0] ?? null;
  const found = known.find((entry) => entry.key === key && entry.masks === masks);
  if (found) return found.look;
  const look = combine(drawing, drawn, above, proposed);
  known = [{ key, masks, look }, ...known].slice(0, KNOWN);
  return look;
}

/**
 * @param {Drawing} drawing
 * @param {import("./drawing.js").Drawn|null} drawn
 * @param {{drawn: import("./drawing.js").Drawn}[]} above
 * @param {Look|null} proposed
 * @returns {Look}
 */
function combine(drawing, drawn, above, proposed) {
  const { height, width } = drawing;
  const whole = { y0: 0, y1: height, x0: 0, x1: width };
  const mask = drawn ? drawing.decode(drawn).slice() : reframe(proposed?.mask ?? new Uint8Array(0), proposed?.box ?? null, whole);
  for (const entry of above) {
    const other = drawing.decode(entry.drawn);
    for (let i = 0; i < mask.length; i += 1) mask[i] &= 1 - other[i];
  }
  const box = joinBoxes(proposed?.box ?? null, findBox(mask, height, width));
  const shared = { best: proposed?.best ?? 0, pick: proposed?.pick ?? makePick("consensus"), drawn };
  if (!box) return { box, masks: proposed?.masks ?? [], mask: new Uint8Array(0), ...shared };
  return { box, masks: (proposed?.masks ?? []).map((one) => reframe(one, proposed?.box ?? null, box)), mask: reframe(mask, whole, box), ...shared };
}

/**
 * A mask of one box in another box.
 * @param {Uint8Array} mask
 * @param {Box|null} from
 * @param {Box} to
 * @returns {Uint8Array}
 */
export function reframe(mask, from, to) {
  const width = to.x1 - to.x0;
  const result = new Uint8Array((to.y1 - to.y0) * width);
  if (!from) return result;
  const across = from.x1 - from.x0;
  const [x0, x1] = [Math.max(from.x0, to.x0), Math.min(from.x1, to.x1)];
  for (let y = Math.max(from.y0, to.y0); y < Math.min(from.y1, to.y1) && x0 < x1; y += 1) {
    const start = (y - from.y0) * across - from.x0;
    result.set(mask.subarray(start + x0, start + x1), (y - to.y0) * width + x0 - to.x0);
  }
  return result;
}
