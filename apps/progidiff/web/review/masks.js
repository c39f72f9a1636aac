// Arithmetic on the masks of one slice. A mask is a Uint8Array of 0 and 1, one per pixel of its box, row by row.

/** @typedef {{y0: number, y1: number, x0: number, x1: number}} Box half-open, in pixels of the slice */
/** @typedef {{box: Box|null, masks: Uint8Array[]}} StructureMasks all proposals of a structure; box is null if nothing is drawn */

/**
 * How many structures the server packed.
 * @param {ArrayBuffer} buffer
 */
export const countStructures = (buffer) => new DataView(buffer).getUint16(0, true);

/**
 * What the server packed (`pack_masks` in routes/review.py): masks of every structure, in the order asked.
 * @param {ArrayBuffer} buffer
 * @returns {StructureMasks[]}
 */
export function unpackMasks(buffer) {
  const view = new DataView(buffer);
  const structures = view.getUint16(0, true);
  const proposals = view.getUint16(2, true);
  let offset = 4;
  const result = [];
  for (let p = 0; p < structures; p += 1) {
    const [y0, y1, x0, x1] = [0, 2, 4, 6].map((step) => view.getUint16(offset + step, true));
    offset += 8;
    const size = (y1 - y0) * (x1 - x0);
    if (size === 0) {
      result.push({ box: null, masks: Array.from({ length: proposals }, () => new Uint8Array(0)) });
      continue;
    }
    const masks = [];
    const bytes = Math.ceil(size / 8);
    for (let k = 0; k < proposals; k += 1) {
      const packed = new Uint8Array(buffer, offset, bytes);
      const mask = new Uint8Array(size);
      for (let i = 0; i < size; i += 1) mask[i] = (packed[i >> 3] >> (i & 7)) & 1;
      masks.push(mask);
      offset += bytes;
    }
    result.push({ box: { y0, y1, x0, x1 }, masks });
  }
  return result;
}

/**
 * How many of the masks draw each pixel.
 * @param {readonly Uint8Array[]} masks of one box
 * @returns {Uint8Array}
 */
export function countDrawn(masks) {
  const count = new Uint8Array(masks.length ? masks[0].length : 0);
  for (const mask of masks) for (let i = 0; i < count.length; i += 1) count[i] += mask[i];
  return count;
}

/** @param {ArrayLike<number>} mask */
export function countPixels(mask) {
  let total = 0;
  for (let i = 0; i < mask.length; i += 1) total += mask[i];
  return total;
}

/**
 * Dice of two masks in one box; 1 if both are empty.
 * @param {Uint8Array} first
 * @param {Uint8Array} second
 */
export function computeDice(first, second) {
  let overlap = 0;
  for (let i = 0; i < first.length; i += 1) overlap += first[i] & second[i];
  const total = countPixels(first) + countPixels(second);
  return total ? (2 * overlap) / total : 1;
}

/** @typedef {[x0: number, y0: number, x1: number, y1: number]} Line in pixels of the slice */

/**
 * The border of a mask along the edges of its pixels. Runs of edges become one line each: fewer pieces to stroke, and no dots where they meet.
 * @param {Uint8Array} mask
 * @param {Box} box
 * @returns {Line[]} first the horizontal ones, from the top; then the vertical ones, from the left
 */
export function traceEdges(mask, box) {
  /** @type {Line[]} */
  const lines = [];
  const width = box.x1 - box.x0;
  const height = box.y1 - box.y0;
  /** @type {(y: number, x: number) => number} */
  const at = (y, x) => (y >= 0 && x >= 0 && y < height && x < width ? mask[y * width + x] : 0);
  for (let y = 0; y <= height; y += 1) {
    for (let x = 0, start = -1; x <= width; x += 1) {
      const isEdge = x < width && at(y - 1, x) !== at(y, x);
      if (isEdge && start < 0) start = x;
      if (!isEdge && start >= 0) {
        lines.push([box.x0 + start, box.y0 + y, box.x0 + x, box.y0 + y]);
        start = -1;
      }
    }
  }
  for (let x = 0; x <= width; x += 1) {
    for (let y = 0, start = -1; y <= height; y += 1) {
      const isEdge = y < height && at(y, x - 1) !== at(y, x);
      if (isEdge && start < 0) start = y;
      if (!isEdge && start >= 0) {
        lines.push([box.x0 + x, box.y0 + start, box.x0 + x, box.y0 + y]);
        start = -1;
      }
    }
  }
  return lines;
}
