// What a person drew on an image to steer the proposals: clicks, scribbles, boxes and lassos, step by step, with undo and redo. Nothing here
// knows the page; the browser keeps it from the first click on.

import { nextTime } from "./clock.js";
import { nameSlice } from "./slices.js";

/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {"click"|"scribble"|"box"|"lasso"} Kind */
/** @typedef {{kind: Kind, positive: boolean, structure: string, z: number, points: [y: number, x: number][]}} Edit `points` are whole pixels of the slice */
/** @typedef {{what: string, z: number, structure: string}} Step in words, and where and what it was about */
/** @typedef {Step & {before: readonly Edit[], after: readonly Edit[], at: number}} Kept */

const PREFIX = "progidiff.edits.";
/** @type {Record<Kind, string>} */
const NAMES = { click: "click", scribble: "scribble", box: "box", lasso: "lasso" };

export class Edits {
  /** @type {Kept[]} */
  #steps = [];
  #done = 0;

  /** @param {string} image */
  constructor(image) {
    this.image = image;
    /** @type {readonly Edit[]} */
    this.all = [];
  }

  /** @param {string} structure */
  of(structure) {
    return this.all.filter((edit) => edit.structure === structure);
  }

  /**
   * @param {string} structure
   * @param {number} z
   */
  on(structure, z) {
    return this.of(structure).filter((edit) => edit.z === z);
  }

  /**
   * @param {Edit} edit
   * @param {number} at
   */
  add(edit, at = nextTime()) {
    const what = `${NAMES[edit.kind]} ${edit.positive ? "inside" : "outside"} of ${edit.structure} on slice ${nameSlice(edit.z)}`;
    this.#commit({ what, z: edit.z, structure: edit.structure, before: this.all, after: [...this.all, edit], at });
  }

  /**
   * Take all of a structure away, as one step.
   * @param {string} structure
   * @param {number} z where to look when it is undone
   */
  clear(structure, z) {
    const after = this.all.filter((edit) => edit.structure !== structure);
    if (after.length < this.all.length) this.#commit({ what: `clicks and lines of ${structure} removed`, z, structure, before: this.all, after, at: nextTime() });
  }

  /**
   * The server calls a structure otherwise than the person who named it.
   * @param {string} from
   * @param {string} to
   */
  rename(from, to) {
    /** @param {readonly Edit[]} edits */
    const renamed = (edits) => edits.map((edit) => (edit.structure === from ? { ...edit, structure: to } : edit));
    this.#steps = this.#steps.map((step) => ({ ...step, structure: step.structure === from ? to : step.structure, before: renamed(step.before), after: renamed(step.after) }));
    this.all = renamed(this.all);
    this.#save();
  }

  /** @param {Kept} step */
  #commit(step) {
    this.#steps = [...this.#steps.slice(0, this.#done), step];
    this.#done = this.#steps.length;
    this.all = step.after;
    this.#save();
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
    const step = this.#steps[this.#done - 1];
    if (!step) return null;
    this.#done -= 1;
    this.all = step.before;
    this.#save();
    return step;
  }

  /** @returns {Step|null} what was redone */
  redo() {
    const step = this.#steps[this.#done];
    if (!step) return null;
    this.#done += 1;
    this.all = step.after;
    this.#save();
    return step;
  }

  #save() {
    try {
      if (this.#steps.length) localStorage.setItem(PREFIX + this.image, JSON.stringify({ steps: this.#steps, done: this.#done }));
      else localStorage.removeItem(PREFIX + this.image);
    } catch {
      // Private windows may refuse storage, and a full one too: they are there until the tab is closed.
    }
  }

  /**
   * What this browser keeps of an image.
   * @param {string} image
   */
  static load(image) {
    const edits = new Edits(image);
    try {
      const kept = JSON.parse(localStorage.getItem(PREFIX + image) ?? "null");
      if (!kept || !Array.isArray(kept.steps)) return edits;
      edits.#steps = kept.steps;
      edits.#done = Math.min(kept.steps.length, Number(kept.done) || 0);
      edits.all = edits.#steps[edits.#done - 1]?.after ?? edits.#steps[0]?.before ?? [];
    } catch {
      // Nothing that can be read was kept.
    }
    return edits;
  }
}

/** @typedef {{origin: number[], steps: number[][]}} Voxels how the file counts the voxels of the stack */

/**
 * Edits of one structure as the server takes them, in voxels of the image: they are about all that the prompt names.
 * @param {readonly Edit[]} edits
 * @param {Voxels} voxels
 * @returns {import("../answers.d.ts").Edit[]}
 */
export function toRequest(edits, { origin, steps }) {
  /** @type {(z: number, y: number, x: number) => [number, number, number]} */
  const place = (z, y, x) => {
    const [i, j, k] = origin.map((start, axis) => start + z * steps[0][axis] + y * steps[1][axis] + x * steps[2][axis]);
    return [i, j, k];
  };
  return edits.map(({ kind, positive, z, points }) => ({ kind, positive, points: points.map(([y, x]) => place(z, y, x)) }));
}

/**
 * A slice that was drawn by hand, as a painted one.
 * @param {number} z
 * @param {Uint8Array} mask
 * @returns {import("../answers.d.ts").Edit}
 */
export function toPaintEdit(z, mask) {
  const bytes = new Uint8Array(Math.ceil(mask.length / 8));
  for (let i = 0; i < mask.length; i += 1) if (mask[i]) bytes[i >> 3] |= 128 >> (i & 7);
  const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return { kind: "paint", slice: z, mask: btoa(text) };
}

/**
 * A line with as few points as it needs: those nearer than a step to a line through the others are left out.
 * @param {readonly Point[]} line
 * @param {{height: number, width: number}} plane
 * @returns {[y: number, x: number][]} whole pixels inside of the slice
 */
export function thinLine(line, { height, width }) {
  /** @type {[number, number][]} */
  const pixels = [];
  for (const [y, x] of line) {
    const [row, column] = [Math.floor(y), Math.floor(x)];
    if (row < 0 || column < 0 || row >= height || column >= width) continue;
    const last = pixels.at(-1);
    if (!last || last[0] !== row || last[1] !== column) pixels.push([row, column]);
  }
  return simplify(pixels);
}

/**
 * @param {[number, number][]} pixels
 * @returns {[number, number][]}
 */
function simplify(pixels) {
  if (pixels.length < 3) return pixels;
  const [first, last] = [pixels[0], pixels[pixels.length - 1]];
  const [dy, dx] = [last[0] - first[0], last[1] - first[1]];
  const length = Math.hypot(dy, dx);
  let [worst, farthest] = [0, 0];
  for (let index = 1; index < pixels.length - 1; index += 1) {
    const [y, x] = [pixels[index][0] - first[0], pixels[index][1] - first[1]];
    const distance = length ? Math.abs(dy * x - dx * y) / length : Math.hypot(y, x);
    if (distance > worst) [worst, farthest] = [distance, index];
  }
  if (worst < 1) return [first, last];
  return [...simplify(pixels.slice(0, farthest + 1)).slice(0, -1), ...simplify(pixels.slice(farthest))];
}

/**
 * Which proposals agree with clicks and lines on one slice; what no proposal draws is outside of its box.
 * @param {{box: import("./masks.js").Box|null, masks: readonly Uint8Array[]}} proposed
 * @param {readonly Edit[]} edits
 * @returns {{members: number[], missed: number}} numbers from 1: all that agree, or the one that contradicts the fewest, and how many that are
 */
export function chooseByEdits({ box, masks }, edits) {
  /** @type {(mask: Uint8Array, y: number, x: number) => boolean} */
  const draws = (mask, y, x) => Boolean(box && y >= box.y0 && y < box.y1 && x >= box.x0 && x < box.x1 && mask[(y - box.y0) * (box.x1 - box.x0) + x - box.x0]);
  const missed = masks.map((mask) => edits.reduce((sum, { points, positive }) => sum + points.filter(([y, x]) => draws(mask, y, x) !== positive).length, 0));
  const least = Math.min(...missed);
  const best = missed.flatMap((count, k) => (count === least ? [k + 1] : []));
  return { members: least === 0 ? best : best.slice(0, 1), missed: least };
}
