// Masks of a whole series, and drawing them slice by slice. Slices ascend along their normal.

/** @typedef {[z0: number, z1: number, y0: number, y1: number, x0: number, x1: number]} Box half open */
/** @typedef {[depth: number, rows: number, columns: number]} Shape */
/**
 * Label ids of what is in the box, slice by slice and row by row; around it is nothing.
 * @typedef {{box: Box, shape: Shape, voxels: Uint8Array, base?: string}} Mask `base`: the proposal that was drawn on, of an edited one
 */

/** @param {Shape} shape @returns {Mask} nothing drawn */
export const emptyMask = (shape) => ({ box: [0, 0, 0, 0, 0, 0], shape, voxels: new Uint8Array() });

/** @param {Shape} shape @param {Uint8Array} voxels @param {string} base @returns {Mask} all voxels of a series */
export const wholeMask = (shape, voxels, base) => ({ box: [0, shape[0], 0, shape[1], 0, shape[2]], shape, voxels, base });

/**
 * Draw a slice of a mask.
 * @param {Mask} mask
 * @param {number} z
 * @param {Uint8Array} target rows by columns
 */
export function drawSlice({ box: [z0, z1, y0, y1, x0, x1], shape: [, , columns], voxels }, z, target) {
  const width = x1 - x0;
  target.fill(0);
  for (let y = y0; z >= z0 && z < z1 && y < y1; y += 1) {
    const from = ((z - z0) * (y1 - y0) + (y - y0)) * width;
    target.set(voxels.subarray(from, from + width), y * columns + x0);
  }
}

/**
 * One array of single slices.
 * @param {Shape} shape
 * @param {Iterable<readonly [z: number, voxels: Uint8Array]>} slices
 */
export function joinSlices([depth, rows, columns], slices) {
  const all = new Uint8Array(depth * rows * columns);
  for (const [z, voxels] of slices) all.set(voxels, z * rows * columns);
  return all;
}

/** @type {WeakMap<Uint8Array, number[]>} */
const found = new WeakMap();

/**
 * The label ids in voxels, ascending, without 0. Looked for once: a volume has millions of them.
 * @param {Uint8Array} voxels that nobody draws on
 */
export function listLabels(voxels) {
  let labels = found.get(voxels);
  if (!labels) {
    const seen = new Uint8Array(256);
    for (let i = 0; i < voxels.length; i += 1) seen[voxels[i]] = 1;
    labels = Array.from(seen.keys()).filter((label) => label && seen[label]);
    found.set(voxels, labels);
  }
  return labels;
}

/**
 * Where a label is drawn.
 * @param {Shape} shape
 * @param {Uint8Array} voxels of a whole series
 * @param {number} label
 * @returns {{count: number, slices: number[]}}
 */
export function findLabel([depth, rows, columns], voxels, label) {
  const size = rows * columns;
  const slices = [];
  let count = 0;
  for (let z = 0; z < depth; z += 1) {
    const before = count;
    for (let i = z * size, end = i + size; i < end; i += 1) if (voxels[i] === label) count += 1;
    if (count > before) slices.push(z);
  }
  return { count, slices };
}

/**
 * The same with labels instead of others.
 * @param {Uint8Array} voxels
 * @param {ReadonlyMap<number, number>} table label -> the one that takes its place
 * @returns {Uint8Array<ArrayBuffer>}
 */
export function relabel(voxels, table) {
  const all = Uint8Array.from({ length: 256 }, (_, label) => table.get(label) ?? label);
  const result = new Uint8Array(voxels.length);
  for (let i = 0; i < voxels.length; i += 1) result[i] = all[voxels[i]];
  return result;
}

/**
 * A mask with what a person drew on a picture of something else, for example of where proposals differ.
 * @param {Mask} mask to draw it on
 * @param {Mask} picture as it was before
 * @param {Uint8Array} voxels of the whole series as it is shown
 * @param {number} first label of the picture's own; what is drawn has lower ones
 * @returns {Uint8Array|null} all voxels of the series; null if nothing was drawn
 */
export function takeStrokes(mask, picture, voxels, first) {
  const [depth, rows, columns] = mask.shape;
  const size = rows * columns;
  const result = new Uint8Array(voxels.length);
  const before = new Uint8Array(size);
  let isDrawn = false;
  for (let z = 0; z < depth; z += 1) {
    drawSlice(picture, z, before);
    const slice = result.subarray(z * size, (z + 1) * size);
    drawSlice(mask, z, slice);
    for (let i = 0; i < size; i += 1) {
      const value = voxels[z * size + i];
      if (!value || value >= first || value === before[i]) continue;
      slice[i] = value;
      isDrawn = true;
    }
  }
  return isDrawn ? result : null;
}
