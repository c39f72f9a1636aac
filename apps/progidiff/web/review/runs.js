// A mask as the lengths of its runs: short to keep and to send, and read by the server (`labels/paintings.py`).

/** @typedef {import("./masks.js").Box} Box */
/** @typedef {{box: Box|null, runs: number[]}} Packed a mask that is 0 outside of its box; null if it is 0 everywhere */

/**
 * The smallest box around what is drawn; null if nothing is.
 * @param {ArrayLike<number>} mask of a whole slice
 * @param {number} height
 * @param {number} width
 * @returns {Box|null}
 */
export function findBox(mask, height, width) {
  let [y0, y1, x0, x1] = [height, 0, width, 0];
  for (let y = 0; y < height; y += 1) {
    const row = y * width;
    let first = 0;
    while (first < width && !mask[row + first]) first += 1;
    if (first === width) continue;
    let last = width - 1;
    while (!mask[row + last]) last -= 1;
    y0 = Math.min(y0, y);
    y1 = y + 1;
    x0 = Math.min(x0, first);
    x1 = Math.max(x1, last + 1);
  }
  return y1 ? { y0, y1, x0, x1 } : null;
}

/**
 * How many pixels of 0, then of 1, then of 0 again … follow each other in the box, row by row. The first number may be 0.
 * @param {ArrayLike<number>} mask of a whole slice
 * @param {number} height
 * @param {number} width
 * @returns {Packed}
 */
export function packMask(mask, height, width) {
  const box = findBox(mask, height, width);
  if (!box) return { box, runs: [] };
  const runs = [];
  let value = 0;
  let length = 0;
  for (let y = box.y0; y < box.y1; y += 1) {
    for (let i = y * width + box.x0, end = y * width + box.x1; i < end; i += 1) {
      if (Boolean(mask[i]) !== Boolean(value)) {
        runs.push(length);
        value = 1 - value;
        length = 0;
      }
      length += 1;
    }
  }
  runs.push(length);
  return { box, runs };
}

/**
 * The inverse of `packMask`.
 * @param {Packed} packed
 * @param {number} height
 * @param {number} width
 * @returns {Uint8Array} of the whole slice
 */
export function unpackMask({ box, runs }, height, width) {
  const mask = new Uint8Array(height * width);
  if (!box) return mask;
  const across = box.x1 - box.x0;
  let place = 0;
  runs.forEach((length, index) => {
    for (let end = place + (index % 2 ? length : 0); place < end; ) {
      const column = place % across;
      const count = Math.min(end - place, across - column);
      const start = (box.y0 + (place - column) / across) * width + box.x0 + column;
      mask.fill(1, start, start + count);
      place += count;
    }
    if (index % 2 === 0) place += length;
  });
  return mask;
}
