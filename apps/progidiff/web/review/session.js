// One image and one result of it: what the server said, and the slices and masks that were looked at.

import * as api from "./api.js";
import { ByteCache } from "./cache.js";
import { unpackMasks } from "./masks.js";
import { combineParts, orderMasks } from "./results.js";

const SLICE_BYTES = 160e6;
const MASK_BYTES = 120e6;
const AHEAD = 3;
const LEAST_KEPT = 2 * AHEAD + 1;

/** @typedef {import("../answers.d.ts").ImageInfo} ImageInfo */
/** @typedef {import("./masks.js").StructureMasks} StructureMasks */
/** @typedef {import("./results.js").Part} Part */
/** @typedef {{masks: (StructureMasks|null)[], isPartial: boolean}} SliceMasks of every structure that is shown; partial while a job has not come to the slice */

export class ImageSession {
  /** @type {ByteCache<Int16Array>} */
  #slices = new ByteCache(SLICE_BYTES, LEAST_KEPT);
  /** @type {ByteCache<StructureMasks[]>} */
  #masks = new ByteCache(MASK_BYTES, LEAST_KEPT);
  /** @type {ByteCache<Uint8Array>} */
  #labels = new ByteCache(SLICE_BYTES / 4, LEAST_KEPT);
  #ahead = 0;
  /** @type {Part[]} in the order in which they were asked for */
  #parts = [];
  /** @type {Readonly<Record<string, string>>} */
  #bound = {};

  /** @type {Promise<Uint8ClampedArray>|null} */
  #colours = null;

  /**
   * @param {ImageInfo} info
   * @param {import("../answers.d.ts").PictureInfo|null} picture null for a volume
   */
  constructor(info, picture = null) {
    this.info = info;
    this.picture = picture;
    /** Name of the model that is asked about a picture. */
    this.headName = picture?.head ?? "";
    const [depth, height, width] = info.shape;
    const [, dy, dx] = info.spacing;
    this.depth = depth;
    this.height = height;
    this.width = width;
    /** @type {import("./geometry.js").Spacing} */
    this.spacing = [dy, dx];
    /** @type {import("./results.js").Result|null} */
    this.result = null;
  }

  /** @param {string} image */
  static async open(image) {
    const info = await api.describeImage(image);
    return new ImageSession(info, info.modality === "picture" ? await api.describePicture(image) : null);
  }

  get image() {
    return this.info.image;
  }

  /** The model that is asked about a picture; null for a volume, or if there is none. */
  get head() {
    const heads = this.picture?.heads ?? [];
    return heads.find(({ name }) => name === this.headName) ?? heads[0] ?? null;
  }

  /** What the model for the picture draws. */
  get classes() {
    return this.head?.classes ?? [];
  }

  /** Ask again what is saved and kept. */
  async refresh() {
    const [info, picture] = await Promise.all([api.describeImage(this.image), this.picture && api.describePicture(this.image)]);
    this.info = info;
    this.picture = picture;
    this.#labels.clear();
  }

  /**
   * Show a kept result beside those that are shown already.
   * @param {string} key
   */
  async useProposals(key) {
    const { summary } = await api.describeProposals(this.image, key);
    /** @type {Part & {summary: import("../answers.d.ts").Summary}} */
    const part = { key, job: "", structures: Object.keys(summary.structures), numProposals: summary.num_proposals, summary };
    this.#setParts([...this.#parts.filter((other) => other.key !== key && !other.job), part]);
    return part;
  }

  /**
   * Show a result no longer.
   * @param {string} key
   */
  dropProposals(key) {
    this.#setParts(this.#parts.filter((part) => part.key !== key || part.job));
  }

  /** Show no longer the results that no structure goes by. */
  dropUnused() {
    const used = new Set(Object.values(this.result?.owners ?? {}).map(({ key }) => key));
    this.#setParts(this.#parts.filter((part) => part.job || used.has(part.key)));
  }

  /**
   * Show what a running job has so far.
   * @param {string} job
   * @param {string[]} structures
   * @param {number} numProposals
   */
  useJob(job, structures, numProposals) {
    this.#setParts([...this.#parts.filter((part) => !part.job), { key: "", job, structures, numProposals, summary: null }]);
  }

  /** Show nothing of a job that came to no end. */
  dropJob() {
    this.#setParts(this.#parts.filter((part) => !part.job));
  }

  /**
   * Say by which result structures go on which something is decided.
   * @param {Readonly<Record<string, string>>} keys structure -> key
   */
  bind(keys) {
    this.#bound = keys;
    this.#setParts(this.#parts);
  }

  /** @param {Part[]} parts */
  #setParts(parts) {
    this.#parts = parts;
    this.result = combineParts(parts, this.#bound);
  }

  /** Keys of the kept results that are shown, the newest last. */
  get keys() {
    return this.#parts.flatMap(({ key }) => (key ? [key] : []));
  }

  /** The running job whose slices are shown; "" if none is. */
  get job() {
    return this.#parts.find(({ job }) => job)?.job ?? "";
  }

  /**
   * Key of the result that a structure goes by; "" if it is of none, or of a job.
   * @param {string} structure
   */
  keyOf(structure) {
    return this.result?.owners[structure]?.key ?? "";
  }

  /** What the masks come from; "" if there are none. */
  get source() {
    if (!this.result) return "";
    return this.result.structures.map((name) => `${this.result?.owners[name].job}${this.keyOf(name)}`).join(" ");
  }

  /**
   * Pixels of a slice, see `scale` of the image.
   * @param {number} z
   */
  slice(z) {
    const load = async () => new Int16Array(await api.getSlice(this.image, z));
    return this.#slices.get(String(z), load, (pixels) => pixels.byteLength);
  }

  /** Red, green, blue, alpha of a picture in colour; null for everything else. @returns {Promise<Uint8ClampedArray|null>} */
  async colours() {
    if (!this.picture?.is_coloured) return null;
    this.#colours ??= api.getPicture(this.image).then(decodeColours);
    try {
      return await this.#colours;
    } catch (error) {
      this.#colours = null; // Asked again when it is looked at again.
      throw error;
    }
  }

  /**
   * Masks of every structure on a slice.
   * @param {number} z
   * @returns {Promise<SliceMasks>}
   */
  async masks(z) {
    const { result } = this;
    if (!result) return { masks: [], isPartial: false };
    const found = await Promise.all(result.parts.map((part) => this.#masksOf(part, z)));
    return { masks: orderMasks(result, found), isPartial: found.includes(null) };
  }

  /**
   * Masks of a result on a slice; null while its job has not come to it.
   * @param {Part} part
   * @param {number} z
   * @returns {Promise<StructureMasks[]|null>}
   */
  async #masksOf({ key, job }, z) {
    const load = async () => {
      const packed = await api.getMasks(this.image, z, job ? { job } : { proposals: key });
      if (!packed.byteLength) throw new api.ApiError("The job has not come to this slice yet.", "gone");
      return unpackMasks(packed);
    };
    /** @type {(structures: StructureMasks[]) => number} */
    const measure = (structures) => structures.reduce((sum, { masks }) => sum + masks.reduce((part, mask) => part + mask.length, 0), 1000);
    try {
      return await this.#masks.get(`${job}${key}:${z}`, load, measure);
    } catch (error) {
      if (job && api.kindOf(error) === "gone") return null;
      throw error;
    }
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
        await Promise.allSettled([this.slice(near), this.result && !this.job ? this.masks(near) : null]);
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

  /**
   * Axial slices on which a structure is saved; null for the whole volume, undefined for nothing.
   * @param {string} structure
   * @returns {readonly number[]|null|undefined}
   */
  savedOn(structure) {
    const { annotated, annotated_slices: slices, label_ids: ids } = this.info;
    if (structure in annotated) return annotated[structure];
    // A label that was made elsewhere says of no structure where it was looked for.
    return structure in ids && !Object.keys(annotated).length ? slices : undefined;
  }

  /**
   * Whether a structure is saved on a slice.
   * @param {string} structure
   * @param {number} z
   */
  isSaved(structure, z) {
    const slices = this.savedOn(structure);
    return slices === null || Boolean(slices?.includes(z));
  }
}

/** @param {Blob} png */
async function decodeColours(png) {
  const bitmap = await createImageBitmap(png, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  if (!context) throw new Error("This browser gives no canvas to draw on. Close some tabs, or try another browser.");
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}
