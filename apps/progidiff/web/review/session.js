// One image and one result of it: what the server said, and the slices and masks that were looked at.

import * as api from "./api.js";
import { ByteCache } from "./cache.js";
import { unpackMasks } from "./masks.js";

const SLICE_BYTES = 160e6;
const MASK_BYTES = 120e6;
const AHEAD = 3;
const LEAST_KEPT = 2 * AHEAD + 1;

/** @typedef {import("../answers.d.ts").ImageInfo} ImageInfo */
/** @typedef {import("./masks.js").StructureMasks} StructureMasks */
/**
 * What is shown of an image: a kept result by its key, or what a job has so far.
 * @typedef {{key: string, job: string, structures: string[], numProposals: number, summary: import("../answers.d.ts").Summary|null}} Result
 */

export class ImageSession {
  /** @type {ByteCache<Int16Array>} */
  #slices = new ByteCache(SLICE_BYTES, LEAST_KEPT);
  /** @type {ByteCache<StructureMasks[]>} */
  #masks = new ByteCache(MASK_BYTES, LEAST_KEPT);
  /** @type {ByteCache<Uint8Array>} */
  #labels = new ByteCache(SLICE_BYTES / 4, LEAST_KEPT);
  #ahead = 0;

  /** @param {ImageInfo} info */
  constructor(info) {
    this.info = info;
    const [depth, height, width] = info.shape;
    const [, dy, dx] = info.spacing;
    this.depth = depth;
    this.height = height;
    this.width = width;
    /** @type {import("./geometry.js").Spacing} */
    this.spacing = [dy, dx];
    /** @type {Result|null} */
    this.result = null;
  }

  /** @param {string} image */
  static async open(image) {
    return new ImageSession(await api.describeImage(image));
  }

  get image() {
    return this.info.image;
  }

  /** Ask again what is saved and kept. */
  async refresh() {
    this.info = await api.describeImage(this.image);
    this.#labels.clear();
  }

  /** @param {string} key */
  async useProposals(key) {
    const { summary } = await api.describeProposals(this.image, key);
    this.#masks.clear();
    const structures = Object.keys(summary.structures);
    /** @type {Result & {summary: import("../answers.d.ts").Summary}} */
    const result = { key, job: "", structures, numProposals: summary.num_proposals, summary };
    this.result = result;
    return result;
  }

  /**
   * Show what a running job has so far.
   * @param {string} job
   * @param {string[]} structures
   * @param {number} numProposals
   */
  useJob(job, structures, numProposals) {
    this.#masks.clear();
    this.result = { key: "", job, structures, numProposals, summary: null };
  }

  dropResult() {
    this.#masks.clear();
    this.result = null;
  }

  /** What the masks come from; "" if there are none. */
  get source() {
    return this.result ? `${this.result.job}${this.result.key}` : "";
  }

  /**
   * Pixels of a slice, see `scale` of the image.
   * @param {number} z
   */
  slice(z) {
    const load = async () => new Int16Array(await api.getSlice(this.image, z));
    return this.#slices.get(String(z), load, (pixels) => pixels.byteLength);
  }

  /**
   * Masks of every structure on a slice; rejects with kind "gone" while a job has not come to it.
   * @param {number} z
   */
  masks(z) {
    const { key, job } = this.result ?? { key: "", job: "" };
    const load = async () => {
      const packed = await api.getMasks(this.image, z, job ? { job } : { proposals: key });
      if (!packed.byteLength) throw new api.ApiError("The job has not come to this slice yet.", "gone");
      return unpackMasks(packed);
    };
    /** @type {(structures: StructureMasks[]) => number} */
    const measure = (structures) => structures.reduce((sum, { masks }) => sum + masks.reduce((part, mask) => part + mask.length, 0), 1000);
    return this.#masks.get(`${this.source}:${z}`, load, measure);
  }

  /**
   * Label ids of the saved label on a slice.
   * @param {number} z
   */
  label(z) {
    return this.#labels.get(String(z), async () => new Uint8Array(await api.getLabel(this.image, z)), (ids) => ids.byteLength);
  }

  /**
   * Fetch what is likely to be looked at next, one slice at a time: what is looked at now must not wait behind it.
   * @param {number} z
   */
  async prefetch(z) {
    const ticket = (this.#ahead += 1);
    for (let step = 1; step <= AHEAD; step += 1) {
      for (const near of [z + step, z - step]) {
        if (near < 0 || near >= this.depth || ticket !== this.#ahead) continue;
        // Failures do not matter yet: whoever goes there asks again and is told.
        await Promise.allSettled([this.slice(near), this.result?.key ? this.masks(near) : null]);
      }
    }
  }

  /**
   * Disagreement of every slice: of one structure, or the highest of several. Empty while it is not known.
   * @param {readonly string[]} structures
   * @returns {number[]}
   */
  disagreement(structures) {
    const perStructure = this.result?.summary?.structures;
    if (!perStructure) return [];
    return Array.from({ length: this.depth }, (_, z) => Math.max(0, ...structures.map((name) => perStructure[name]?.disagreement_per_slice[z] ?? 0)));
  }

  /** @param {number} z */
  isSaved(z) {
    const slices = this.info.annotated_slices;
    return slices === null || slices.includes(z);
  }
}
