// What a person drew on the slices of one image, step by step, with undo and redo of all of it. Nothing here knows the page or the browser.

import { nextTime } from "./clock.js";
import { packMask, unpackMask } from "./runs.js";

/** @typedef {import("./picks.js").Pick} Pick */
/** @typedef {"hand"|"between"} Way drawn by a person, or interpolated between two slices that were */
/**
 * A structure on a slice as it was drawn; never changed, replaced by the next one.
 * @typedef {import("./runs.js").Packed & {
 *   way: Way,
 *   edits: number,
 *   start: Pick|null,
 *   source: string,
 *   order: number,
 * }} Drawn `edits` counts strokes and buttons; `start` is the pick that it began with, of the proposals `source`; a higher `order` lies on top
 */
/** @typedef {{structure: string, z: number, after: Drawn|null}} Change null if it is not drawn by hand any more */
/** @typedef {{what: string, z: number, at: number, changes: Change[]}} Step `at` sorts steps of all kinds by time; `z` is where to look */
/** @typedef {{structure: string, z: number, mask: Uint8Array|null, way?: Way, start?: Pick|null, source?: string}} Edit null to go back to what was shown without */
/** @typedef {{steps: Step[], done: number, sent: [structure: string, z: number][]}} Journal all that there is to keep */

const DECODED = 24;

/** @param {string} structure @param {number} z */
const keyOf = (structure, z) => `${z}\n${structure}`;

/** Drawn slices of one image. */
export class Drawing {
  /** @type {Step[]} */
  #steps = [];
  /** For each step what it replaced, as its changes say what came after. @type {(Drawn|null)[][]} */
  #before = [];
  #done = 0;
  /** @type {Map<string, {structure: string, z: number, drawn: Drawn}>} */
  #slices = new Map();
  /** @type {Map<string, Drawn>} what was sent as it was then */
  #sent = new Map();
  /** @type {Map<Drawn, Uint8Array>} */
  #decoded = new Map();
  #order = 0;

  /**
   * @param {string} image
   * @param {{height: number, width: number}} plane
   * @param {Journal|null} journal of an earlier day
   */
  constructor(image, { height, width }, journal = null) {
    this.image = image;
    this.height = height;
    this.width = width;
    /** Counts changes, for whoever keeps what was derived. */
    this.version = 0;
    for (const [index, step] of (journal?.steps ?? []).entries()) {
      this.#steps.push(step);
      this.#before.push(step.changes.map(({ structure, z }) => this.get(structure, z)));
      this.#apply(step.changes);
      if (index < (journal?.done ?? 0)) this.#done = index + 1;
    }
    for (let index = this.#steps.length - 1; index >= this.#done; index -= 1) this.#takeBack(index);
    for (const [structure, z] of journal?.sent ?? []) {
      const drawn = this.get(structure, z);
      if (drawn) this.#sent.set(keyOf(structure, z), drawn);
    }
  }

  /**
   * @param {string} structure
   * @param {number} z
   * @returns {Drawn|null} null if it is not drawn by hand
   */
  get(structure, z) {
    return this.#slices.get(keyOf(structure, z))?.drawn ?? null;
  }

  /**
   * @param {Drawn} drawn
   * @returns {Uint8Array} of the whole slice; not to be changed
   */
  decode(drawn) {
    const mask = this.#decoded.get(drawn) ?? unpackMask(drawn, this.height, this.width);
    this.#decoded.delete(drawn);
    this.#decoded.set(drawn, mask);
    for (const oldest of this.#decoded.keys()) {
      if (this.#decoded.size <= DECODED) break;
      this.#decoded.delete(oldest);
    }
    return mask;
  }

  /**
   * All that is drawn on a slice, from the bottom.
   * @param {number} z
   * @returns {{structure: string, drawn: Drawn}[]}
   */
  listOn(z) {
    return [...this.#slices.values()].filter((entry) => entry.z === z).sort((one, other) => one.drawn.order - other.drawn.order);
  }

  /** Every drawn slice, in the order of slices. */
  list() {
    return [...this.#slices.values()].sort((one, other) => one.z - other.z || one.drawn.order - other.drawn.order);
  }

  /** Structures that are drawn somewhere. */
  get structures() {
    return [...new Set([...this.#slices.values()].map(({ structure }) => structure))];
  }

  /**
   * Whether it was drawn and not sent as it is.
   * @param {string} structure
   * @param {number} z
   */
  isUnsent(structure, z) {
    const key = keyOf(structure, z);
    const drawn = this.#slices.get(key)?.drawn;
    return Boolean(drawn && this.#sent.get(key) !== drawn);
  }

  listUnsent() {
    return this.list().filter(({ structure, z }) => this.isUnsent(structure, z));
  }

  get hasUnsent() {
    return this.listUnsent().length > 0;
  }

  /**
   * Do something to one or several slices as one step; what was undone before cannot be redone any more.
   * @param {string} what in words
   * @param {number} z where to look when it is undone
   * @param {readonly Edit[]} edits
   * @param {number} at
   * @returns {Step|null} null if nothing changes
   */
  commit(what, z, edits, at = nextTime()) {
    this.#order += 1;
    const changes = edits.flatMap((edit) => {
      const change = { structure: edit.structure, z: edit.z, after: this.#make(edit) };
      return change.after === this.get(edit.structure, edit.z) ? [] : [change];
    });
    if (!changes.length) return null;
    const step = { what, z, at, changes };
    this.#steps.length = this.#done;
    this.#before.length = this.#done;
    this.#steps.push(step);
    this.#before.push(changes.map((change) => this.get(change.structure, change.z)));
    this.#done += 1;
    this.#apply(changes);
    return step;
  }

  /**
   * @param {Edit} edit
   * @returns {Drawn|null}
   */
  #make({ structure, z, mask, way = "hand", start = null, source = "" }) {
    if (!mask) return null;
    const known = this.get(structure, z);
    const packed = packMask(mask, this.height, this.width);
    if (known && known.way === way && isSame(known, packed)) return known;
    const edits = (known?.edits ?? 0) + 1;
    return known ? { ...known, ...packed, way, edits, order: this.#order } : { ...packed, way, edits, start, source, order: this.#order };
  }

  /** When the last step that can be undone was done; 0 if there is none. */
  get lastAt() {
    return this.#steps[this.#done - 1]?.at ?? 0;
  }

  /** When the next step that can be redone was done; Infinity if there is none. */
  get nextAt() {
    return this.#steps[this.#done]?.at ?? Infinity;
  }

  /** @returns {Step|null} what was undone */
  undo() {
    if (!this.#done) return null;
    this.#done -= 1;
    this.#takeBack(this.#done);
    return this.#steps[this.#done];
  }

  /** @returns {Step|null} what was redone */
  redo() {
    const step = this.#steps[this.#done];
    if (!step) return null;
    this.#done += 1;
    this.#apply(step.changes);
    return step;
  }

  /** What was undone can not be redone any more, because something else was done. @returns {boolean} whether there was anything */
  dropRedo() {
    const isDropped = this.#steps.length > this.#done;
    this.#steps.length = this.#done;
    this.#before.length = this.#done;
    return isDropped;
  }

  /** How many steps are done, of how many. */
  get place() {
    return { done: this.#done, total: this.#steps.length };
  }

  /** @param {readonly {structure: string, z: number, drawn: Drawn}[]} slices that were saved as they are here */
  markSent(slices) {
    for (const { structure, z, drawn } of slices) this.#sent.set(keyOf(structure, z), drawn);
    this.version += 1;
  }

  /**
   * What was sent is to be sent again.
   * @param {number} z
   * @param {readonly string[]} structures
   */
  markUnsent(z, structures) {
    for (const structure of structures) this.#sent.delete(keyOf(structure, z));
    this.version += 1;
  }

  /** @returns {Journal["sent"]} */
  get sent() {
    return this.list().flatMap(({ structure, z }) => (this.isUnsent(structure, z) ? [] : [/** @type {[string, number]} */ ([structure, z])]));
  }

  /**
   * Pairs of slices that a person drew, with others between them: around a slice, or on both sides of one that is drawn itself.
   * @param {string} structure
   * @param {number} z
   * @returns {[below: number, above: number][]}
   */
  findGaps(structure, z) {
    const ends = this.list().flatMap((entry) => (entry.structure === structure && entry.drawn.way === "hand" ? [entry.z] : []));
    const below = ends.filter((place) => place < z).at(-1);
    const above = ends.find((place) => place > z);
    /** @type {[number|undefined, number|undefined][]} */
    const pairs = ends.includes(z) ? [[below, z], [z, above]] : [[below, above]];
    return pairs.flatMap(([low, high]) => (low !== undefined && high !== undefined && high - low > 1 ? [/** @type {[number, number]} */ ([low, high])] : []));
  }

  /** @param {readonly Change[]} changes */
  #apply(changes) {
    for (const { structure, z, after } of changes) this.#put(structure, z, after);
  }

  /** @param {number} index of a step */
  #takeBack(index) {
    this.#steps[index].changes.forEach(({ structure, z }, place) => this.#put(structure, z, this.#before[index][place]));
  }

  /**
   * @param {string} structure
   * @param {number} z
   * @param {Drawn|null} drawn
   */
  #put(structure, z, drawn) {
    this.version += 1;
    this.#order = Math.max(this.#order, drawn?.order ?? 0);
    if (drawn) this.#slices.set(keyOf(structure, z), { structure, z, drawn });
    else this.#slices.delete(keyOf(structure, z));
  }
}

/**
 * @param {import("./runs.js").Packed} one
 * @param {import("./runs.js").Packed} other
 */
function isSame(one, other) {
  if (!one.box || !other.box) return !one.box && !other.box;
  const isBox = one.box.y0 === other.box.y0 && one.box.y1 === other.box.y1 && one.box.x0 === other.box.x0 && one.box.x1 === other.box.x1;
  return isBox && one.runs.length === other.runs.length && one.runs.every((length, i) => length === other.runs[i]);
}

/**
 * Drawn slices as the server takes them, each with what lies on top of it after it.
 * @param {readonly {structure: string, z: number, drawn: Drawn}[]} slices
 * @param {readonly [depth: number, height: number, width: number]} shape of the image
 * @returns {import("../answers.d.ts").Painted|null} null if nothing is drawn
 */
export function toPainted(slices, shape) {
  if (!slices.length) return null;
  /** @type {import("../answers.d.ts").Painted["slices"]} */
  const painted = {};
  for (const { structure, z, drawn } of [...slices].sort((one, other) => one.drawn.order - other.drawn.order)) {
    const { box, runs, edits, start, source } = drawn;
    const at = box ? /** @type {[number, number, number, number]} */ ([box.y0, box.y1, box.x0, box.x1]) : null;
    (painted[z] ??= []).push({ structure, box: at, runs, edits, start: source ? start : null, proposals: source });
  }
  return { shape: [...shape], slices: painted };
}
