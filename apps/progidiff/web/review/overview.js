// The image with fewer voxels, and what is drawn of a structure on it: for the two other planes and the surface.

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Drawn} Drawn */
/** @typedef {{depth: number, height: number, width: number, steps: [z: number, y: number, x: number]}} Raster voxels of the overview, and the step between them in voxels of the image */
/** @typedef {Raster & {pixels: Int16Array}} Overview */

const HEADER = 12;

/**
 * @param {ArrayBuffer} buffer
 * @returns {Raster}
 */
function readHeader(buffer) {
  const [depth, height, width, z, y, x] = new Uint16Array(buffer, 0, 6);
  return { depth, height, width, steps: [z, y, x] };
}

/**
 * What the server sent (`routes/overview.py`).
 * @param {ArrayBuffer} buffer
 * @returns {Overview}
 */
export const readOverview = (buffer) => ({ ...readHeader(buffer), pixels: new Int16Array(buffer, HEADER) });

/**
 * A mask on the same voxels.
 * @param {ArrayBuffer} buffer
 * @returns {Uint8Array}
 */
export function readOverviewMask(buffer) {
  const { depth, height, width } = readHeader(buffer);
  const packed = new Uint8Array(buffer, HEADER);
  return Uint8Array.from({ length: depth * height * width }, (_, i) => (packed[i >> 3] >> (i & 7)) & 1);
}

/** A structure on an overview: the consensus, and on the slices that were drawn what was drawn. */
export class CoarseResult {
  /** What was put on each slice of the overview. @type {Map<number, Drawn|null>} */
  #put = new Map();

  /**
   * @param {Raster} raster
   * @param {Uint8Array|null} consensus null if there are no proposals of it
   */
  constructor(raster, consensus) {
    this.raster = raster;
    this.consensus = consensus;
    /** One per voxel of the overview. */
    this.mask = consensus?.slice() ?? new Uint8Array(raster.depth * raster.height * raster.width);
    /** Counts changes. */
    this.version = 0;
  }

  /**
   * Take over what has changed of the drawing.
   * @param {Drawing|null} drawing
   * @param {string} structure
   */
  update(drawing, structure) {
    const { depth, steps } = this.raster;
    for (let place = 0; place < depth; place += 1) {
      const drawn = drawing?.get(structure, place * steps[0] + (steps[0] >> 1)) ?? null;
      if ((this.#put.get(place) ?? null) === drawn) continue;
      this.#put.set(place, drawn);
      this.#putSlice(place, drawn && drawing ? drawing.decode(drawn) : null, drawing?.width ?? 0);
      this.version += 1;
    }
  }

  /**
   * @param {number} place
   * @param {Uint8Array|null} mask of the whole slice of the image
   * @param {number} across pixels of a row of it
   */
  #putSlice(place, mask, across) {
    const { height, width, steps } = this.raster;
    const size = height * width;
    for (let y = 0; y < height; y += 1) {
      const row = (y * steps[1] + (steps[1] >> 1)) * across + (steps[2] >> 1);
      for (let x = 0; x < width; x += 1) {
        const i = place * size + y * width + x;
        this.mask[i] = mask ? mask[row + x * steps[2]] : (this.consensus?.[i] ?? 0);
      }
    }
  }
}

/**
 * One coronal or sagittal plane, the head up.
 * @template {Int16Array|Uint8Array} A
 * @param {A} voxels of the overview
 * @param {Raster} raster
 * @param {"coronal"|"sagittal"} plane
 * @param {number} index row or column of the overview
 * @returns {{values: A, height: number, width: number}}
 */
export function cutPlane(voxels, { depth, height, width }, plane, index) {
  const across = plane === "coronal" ? width : height;
  const values = /** @type {A} */ (voxels.slice(0, depth * across));
  for (let z = 0; z < depth; z += 1) {
    for (let place = 0; place < across; place += 1) {
      const [y, x] = plane === "coronal" ? [index, place] : [place, index];
      values[(depth - 1 - z) * across + place] = voxels[(z * height + y) * width + x];
    }
  }
  return { values, height: depth, width: across };
}
