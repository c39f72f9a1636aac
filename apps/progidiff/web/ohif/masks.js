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
