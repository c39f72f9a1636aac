// Distances on a slice in mm: exact, in two passes, whatever the shape of the pixels (Felzenszwalb and Huttenlocher, "Distance Transforms
// of Sampled Functions", 2012).

/** @typedef {import("./geometry.js").Spacing} Spacing */

/**
 * Replace values along a line by the lowest of value + squared distance.
 * @param {Float64Array} values
 * @param {number} start index of the first
 * @param {number} step from one to the next
 * @param {number} count
 * @param {number} edge mm between two
 * @param {{line: Float64Array, hull: Int32Array, bounds: Float64Array}} scratch at least `count` + 1 long
 */
function sweep(values, start, step, count, edge, { line, hull, bounds }) {
  let last = -1;
  for (let q = 0; q < count; q += 1) {
    const value = values[start + q * step];
    line[q] = value;
    if (value === Infinity) continue;
    const height = value + (q * edge) ** 2;
    while (last >= 0) {
      const p = hull[last];
      const meeting = (height - (line[p] + (p * edge) ** 2)) / (2 * edge * (q - p));
      if (meeting > bounds[last]) {
        bounds[last + 1] = meeting;
        break;
      }
      last -= 1;
    }
    last += 1;
    hull[last] = q;
    if (last === 0) bounds[0] = -Infinity;
  }
  if (last < 0) return; // Nothing on this line: it stays infinitely far.
  for (let q = 0, part = 0; q < count; q += 1) {
    while (part < last && bounds[part + 1] < q * edge) part += 1;
    values[start + q * step] = (edge * (q - hull[part])) ** 2 + line[hull[part]];
  }
}

/**
 * Squared distance of every pixel to the nearest one that counts, from centre to centre, in mm²; Infinity if none counts.
 * @param {ArrayLike<number>} mask
 * @param {number} height
 * @param {number} width
 * @param {Spacing} spacing
 * @param {boolean} isInverse whether the pixels of 0 count instead of those of 1
 * @returns {Float64Array}
 */
export function squaredDistances(mask, height, width, [dy, dx], isInverse = false) {
  const values = new Float64Array(height * width);
  for (let i = 0; i < values.length; i += 1) values[i] = Boolean(mask[i]) !== isInverse ? 0 : Infinity;
  const most = Math.max(height, width) + 1;
  const scratch = { line: new Float64Array(most), hull: new Int32Array(most), bounds: new Float64Array(most) };
  for (let x = 0; x < width; x += 1) sweep(values, x, width, height, dy, scratch);
  for (let y = 0; y < height; y += 1) sweep(values, y * width, 1, width, dx, scratch);
  return values;
}

/**
 * Distance to the border of a mask in mm, above 0 inside and below 0 outside; the border lies half way between two pixels.
 * @param {ArrayLike<number>} mask with pixels of both kinds
 * @param {number} height
 * @param {number} width
 * @param {Spacing} spacing
 * @returns {Float64Array}
 */
export function signedDistances(mask, height, width, spacing) {
  const outside = squaredDistances(mask, height, width, spacing);
  const inside = squaredDistances(mask, height, width, spacing, true);
  return inside.map((value, i) => (mask[i] ? Math.sqrt(value) : -Math.sqrt(outside[i])));
}
