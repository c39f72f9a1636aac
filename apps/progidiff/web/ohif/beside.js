// What was drawn in segments beside the prompted ones, and what a person said it is: asked about once, and again when it has changed.

import { findLabel } from './masks.js';

/** @typedef {import('./masks.js').Shape} Shape */
/** @typedef {{as: number, slices: Map<number, Uint32Array>}} Decision `as`: the label that it counts as; 0 for a structure of its own. With its pixels as they were on each slice */

export class Beside {
  /** @type {Map<number, Decision>} segment -> what was said of it */
  #decisions = new Map();

  /**
   * What a segment counts as, if it is as it was when somebody said so; 0 for a structure of its own.
   * @param {Shape} shape
   * @param {Uint8Array} voxels of the whole series
   * @param {number} index of the segment
   * @returns {number|null} null if nobody said so yet, or it was drawn on since
   */
  find(shape, voxels, index) {
    const decision = this.#decisions.get(index);
    if (!decision) return null;
    const isSame = findLabel(shape, voxels, index).slices.every((z) => {
      const [before, now] = [decision.slices.get(z), findPixels(shape, voxels, index, z)];
      return before?.length === now.length && before.every((pixel, i) => pixel === now[i]);
    });
    return isSame ? decision.as : null;
  }

  /**
   * Somebody said what a segment is, and it was saved as that.
   * @param {Shape} shape
   * @param {Uint8Array} voxels of the whole series
   * @param {number} index of the segment
   * @param {number} as
   */
  decide(shape, voxels, index, as) {
    const former = this.#decisions.get(index);
    const slices = former?.as === as ? former.slices : new Map();
    for (const z of findLabel(shape, voxels, index).slices) slices.set(z, findPixels(shape, voxels, index, z));
    this.#decisions.set(index, { as, slices });
  }

  /** Other proposals are shown, on which nothing is drawn yet. */
  clear() {
    this.#decisions.clear();
  }
}

/**
 * @param {Shape} shape
 * @param {Uint8Array} voxels
 * @param {number} index
 * @param {number} z
 */
function findPixels([, rows, columns], voxels, index, z) {
  const slice = voxels.subarray(z * rows * columns, (z + 1) * rows * columns);
  const pixels = [];
  for (let i = 0; i < slice.length; i += 1) if (slice[i] === index) pixels.push(i);
  return Uint32Array.from(pixels);
}
