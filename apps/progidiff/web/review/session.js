// One image and one result of it: what the server said, and the slices and masks that were looked at.

import * as api from "./api.js";
import { unpackMasks } from "./masks.js";

const SLICE_BYTES = 160e6;
const MASK_BYTES = 120e6;
const AHEAD = 3;

/** Promises by key; the ones that were not used for longest go when they hold too many bytes. */
class ByteCache {
  #entries = new Map();
  #bytes = 0;

  constructor(limit) {
    this.limit = limit;
  }

  /** The value of a key, from `load` if it is not there; what failed is forgotten, so that it can be tried again. */
  get(key, load, measure) {
    const known = this.#entries.get(key);
    if (known) {
      this.#entries.delete(key);
      this.#entries.set(key, known);
      return known.promise;
    }
    const entry = { bytes: 0, promise: null };
    entry.promise = load().then(
      (value) => {
        if (this.#entries.get(key) === entry) {
          entry.bytes = measure(value);
          this.#bytes += entry.bytes;
          this.#shrink();
        }
        return value;
      },
      (error) => {
        if (this.#entries.get(key) === entry) this.#entries.delete(key);
        throw error;
      },
    );
    this.#entries.set(key, entry);
    return entry.promise;
  }

  clear() {
    this.#entries.clear();
    this.#bytes = 0;
  }

  #shrink() {
    for (const [key, entry] of this.#entries) {
      if (this.#bytes <= this.limit || this.#entries.size <= 2 * AHEAD + 1) return;
      this.#entries.delete(key);
      this.#bytes -= entry.bytes;
    }
  }
}

export class ImageSession {
  #slices = new ByteCache(SLICE_BYTES);
  #masks = new ByteCache(MASK_BYTES);
  #labels = new ByteCache(SLICE_BYTES / 4);
  #ahead = 0;

  constructor(info) {
    this.info = info;
    [this.depth, this.height, this.width] = info.shape;
    /** (dy, dx) in mm */
    this.spacing = info.spacing.slice(1);
    /** @type {{key: string, job: string, structures: string[], numProposals: number, summary: object|null}|null} */
    this.result = null;
  }

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

  async useProposals(key) {
    const { summary } = await api.describeProposals(this.image, key);
    this.#masks.clear();
    const structures = Object.keys(summary.structures);
    this.result = { key, job: "", structures, numProposals: summary.num_proposals, summary };
  }

  /** Show what a running job has so far. */
  useJob(job, structures, numProposals) {
    this.#masks.clear();
    this.result = { key: "", job, structures, numProposals, summary: null };
  }

  dropResult() {
    this.#masks.clear();
    this.result = null;
  }

  slice(z) {
    const load = async () => new Int16Array(await api.getSlice(this.image, z));
    return this.#slices.get(z, load, (pixels) => pixels.byteLength);
  }

  /** Masks of every structure on a slice; rejects with kind "gone" while a job has not come to it. */
  masks(z) {
    const { key, job } = this.result;
    const load = async () => {
      const packed = await api.getMasks(this.image, z, job ? { job } : { proposals: key });
      if (!packed.byteLength) throw new api.ApiError("The job has not come to this slice yet.", "gone");
      return unpackMasks(packed);
    };
    const measure = (structures) => structures.reduce((sum, { masks }) => sum + masks.reduce((part, mask) => part + mask.length, 0), 1000);
    return this.#masks.get(`${job}${key}:${z}`, load, measure);
  }

  /** Label ids of the saved label on a slice. */
  label(z) {
    return this.#labels.get(z, async () => new Uint8Array(await api.getLabel(this.image, z)), (ids) => ids.byteLength);
  }

  /** Fetch what is likely to be looked at next, one slice at a time: what is looked at now must not wait behind it. */
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

  /** Disagreement of every slice: of one structure, or the highest of several. */
  disagreement(structures) {
    const perStructure = this.result?.summary?.structures;
    if (!perStructure) return [];
    return Array.from({ length: this.depth }, (_, z) => Math.max(0, ...structures.map((name) => perStructure[name]?.disagreement_per_slice[z] ?? 0)));
  }

  isSaved(z) {
    const slices = this.info.annotated_slices;
    return slices === null || slices.includes(z);
  }
}
