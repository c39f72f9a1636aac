// What a person decided about one image and has not sent yet. It survives a closed tab, a crash and a server that is gone.

import { nextTime } from "./clock.js";
import { listDrawn } from "./drawing_store.js";
import { makePick } from "./picks.js";
import { nameSlice } from "./slices.js";

const PREFIX = "progidiff.review.";
const MAX_HISTORY = 200;

/** @typedef {import("./picks.js").Pick} Pick */
/** @typedef {Record<string, Pick>} Picks structure -> pick */
/** @typedef {Record<string, Picks>} SlicePicks axial index -> structure -> pick */
/** @typedef {{picks: Picks, slicePicks: SlicePicks, volume: Picks, slices: SlicePicks}} Decided `picks` and `slicePicks` are shown, `volume` and `slices` accepted */
/** @typedef {{what: string, z: number|null}} Step in words, and the slice it was about; null for the volume */

/** @template T @param {T} value @returns {T} */
const copy = (value) => JSON.parse(JSON.stringify(value));
/** @param {object} object */
const isEmpty = (object) => Object.keys(object).length === 0;
/** @param {number} seconds @returns {number} in tenths */
const round = (seconds) => Math.round(seconds * 10) / 10;

/**
 * Drop the picks of a structure.
 * @param {Decided} state
 * @param {string} structure
 */
function forget(state, structure) {
  delete state.picks[structure];
  delete state.volume[structure];
  for (const picks of [...Object.values(state.slicePicks), ...Object.values(state.slices)]) delete picks[structure];
}

/** @typedef {{seconds: number, clicks: number}} Effort */

/** Decisions on the results of one image, with undo. */
export class Work {
  /** @type {(Step & {state: Decided})[]} */
  #history = [];
  /** When each step of the history was done. @type {number[]} */
  #times = [];
  /** What was undone, and the state after it. @type {(Step & {state: Decided, at: number})[]} */
  #undone = [];
  /** What was drawn by hand on the image; it is decided as it is drawn. @type {import("./drawing.js").Drawing|null} */
  drawing = null;

  /**
   * @param {string} image
   * @param {string} proposals key of the result that structures go by which are bound to none
   */
  constructor(image, proposals = "") {
    this.image = image;
    this.proposals = proposals;
    /** @type {Record<string, string>} structure -> key of the result that its picks speak about */
    this.keys = {};
    this.seconds = 0;
    /** @type {Record<string, Effort>} structure -> what a person spent on it */
    this.effort = {};
    /** @type {Decided} */
    this.state = { picks: {}, slicePicks: {}, volume: {}, slices: {} };
  }

  /** @param {string} structure */
  keyOf(structure) {
    return this.keys[structure] ?? this.proposals;
  }

  /**
   * Let structures go by a result. Picks of another one mean nothing there and go; what is accepted holds its structure where it is.
   * @param {readonly string[]} structures
   * @param {string} key
   * @returns {string[]} the structures that stay with their result, because something of it is accepted
   */
  bind(structures, key) {
    const held = structures.filter((name) => this.keyOf(name) !== key && this.#picked.includes(name));
    for (const name of structures.filter((own) => !held.includes(own))) {
      if (this.keyOf(name) !== key) for (const state of [this.state, ...this.#history.map((step) => step.state)]) forget(state, name);
      this.keys[name] = key;
    }
    return held;
  }

  /**
   * The pick that is shown for a structure on a slice.
   * @param {string} structure
   * @param {number} z
   */
  pickOn(structure, z) {
    return this.state.slicePicks[z]?.[structure] ?? this.state.picks[structure] ?? makePick("consensus");
  }

  /**
   * @param {string} structure
   * @param {Pick} pick
   * @param {number|null} z null for the volume
   * @param {number} at
   */
  setPick(structure, pick, z = null, at = nextTime()) {
    this.#remember(z === null ? `pick for ${structure}` : `pick for ${structure} on slice ${nameSlice(z)}`, z, at);
    if (z === null) {
      this.state.picks[structure] = pick;
      // A pick for the volume is meant for every slice.
      for (const [place, picks] of Object.entries(this.state.slicePicks)) {
        delete picks[structure];
        if (isEmpty(picks)) delete this.state.slicePicks[place];
      }
    } else {
      (this.state.slicePicks[z] ??= {})[structure] = pick;
    }
    // What was accepted before is accepted as it was; accepting again takes the new pick.
    this.#save();
  }

  /**
   * @param {number} z
   * @param {readonly string[]} structures
   */
  acceptSlice(z, structures) {
    this.#remember(`${structures.join(", ")} accepted on slice ${nameSlice(z)}`, z);
    const accepted = Object.fromEntries(structures.map((structure) => [structure, copy(this.pickOn(structure, z))]));
    this.state.slices[z] = { ...this.state.slices[z], ...accepted };
    this.#save();
  }

  /** @param {readonly string[]} structures */
  acceptVolume(structures) {
    this.#remember(`${structures.join(", ")} accepted in the volume`);
    const { picks, slicePicks, slices, volume } = this.state;
    this.state.volume = { ...volume, ...Object.fromEntries(structures.map((name) => [name, picks[name] ?? makePick("consensus")])) };
    for (const z of Object.keys(slicePicks)) {
      slices[z] = { ...slices[z], ...Object.fromEntries(structures.map((name) => [name, copy(this.pickOn(name, Number(z)))])) };
    }
    this.#save();
  }

  /**
   * The pick that was accepted for a structure on a slice; null if none was.
   * @param {string} structure
   * @param {number} z
   */
  acceptedPick(structure, z) {
    return this.state.slices[z]?.[structure] ?? this.state.volume[structure] ?? null;
  }

  /** @param {number} z */
  isDecided(z) {
    return z in this.state.slices || !isEmpty(this.state.volume) || this.#drawn.some((entry) => entry.z === z);
  }

  get decidedSlices() {
    return [...new Set([...Object.keys(this.state.slices).map(Number), ...this.#drawn.map(({ z }) => z)])];
  }

  /**
   * What of a structure is accepted.
   * @param {string} structure
   * @returns {import("./checklist.js").Accepted}
   */
  acceptedOf(structure) {
    const { volume, slices } = this.state;
    const own = Object.keys(slices).filter((z) => structure in slices[z]);
    const drawn = this.#drawn.flatMap((entry) => (entry.structure === structure ? [entry.z] : []));
    return { volume: volume[structure] ?? null, slices: [...new Set([...own.map(Number), ...drawn])] };
  }

  /**
   * Where a pick of a structure is accepted; what was drawn by hand is no pick.
   * @param {string} structure
   * @returns {{volume: boolean, slices: number[]}|null} null if nowhere
   */
  findPicked(structure) {
    const { volume, slices } = this.state;
    const own = Object.keys(slices).filter((z) => structure in slices[z]).map(Number);
    return structure in volume || own.length ? { volume: structure in volume, slices: own } : null;
  }

  /** @param {string} structure */
  isAccepted(structure) {
    const { volume, slices } = this.acceptedOf(structure);
    return volume !== null || slices.length > 0;
  }

  /** The structures of which a pick is accepted. */
  get #picked() {
    const { volume, slices } = this.state;
    return [...new Set([...Object.keys(volume), ...Object.values(slices).flatMap(Object.keys)])];
  }

  /** What was drawn and not sent. */
  get #drawn() {
    return this.drawing?.listUnsent() ?? [];
  }

  /** The structures of which something is accepted, or drawn and so accepted. */
  get decided() {
    return [...new Set([...this.#picked, ...this.#drawn.map(({ structure }) => structure)])];
  }

  get isVolumeAccepted() {
    return !isEmpty(this.state.volume);
  }

  get hasDecisions() {
    return this.isVolumeAccepted || !isEmpty(this.state.slices) || this.#drawn.length > 0;
  }

  get canUndo() {
    return this.#history.length > 0 || Boolean(this.drawing?.lastAt);
  }

  /** When the last step that can be undone was done; 0 if there is none. */
  get lastAt() {
    return this.#times.at(-1) ?? 0;
  }

  /** When the next step that can be redone was done; Infinity if there is none. */
  get nextAt() {
    return this.#undone.at(-1)?.at ?? Infinity;
  }

  /**
   * Take the last step back.
   * @returns {Step|null} what was undone; null if there was nothing
   */
  undo() {
    const last = this.#history.pop();
    if (!last) return null;
    this.#undone.push({ ...last, state: this.state, at: this.#times.pop() ?? 0 });
    this.state = last.state;
    this.#save();
    return last;
  }

  /** @returns {Step|null} what was redone; null if there was nothing */
  redo() {
    const next = this.#undone.pop();
    if (!next) return null;
    this.#history.push({ what: next.what, z: next.z, state: this.state });
    this.#times.push(next.at);
    this.state = next.state;
    this.#save();
    return next;
  }

  /**
   * @param {number} seconds
   * @param {string} structure that they were spent on; "" for none
   */
  addSeconds(seconds, structure = "") {
    this.seconds += seconds;
    if (structure) this.#effortOn(structure).seconds += seconds;
    if (this.hasDecisions) this.#save();
  }

  /** @param {string} structure that a click or a key was for */
  addClick(structure) {
    if (structure) this.#effortOn(structure).clicks += 1;
  }

  /** @param {string} structure */
  #effortOn(structure) {
    return (this.effort[structure] ??= { seconds: 0, clicks: 0 });
  }

  /**
   * As the server takes it.
   * @param {number} base the newest save that is known
   * @returns {import("../answers.d.ts").Decisions}
   */
  toDecisions(base) {
    const keys = [...new Set(this.#picked.map((name) => this.keyOf(name)))];
    const parts = (keys.length ? keys : [this.proposals]).map((key) => this.#decidedBy(key));
    const spent = this.decided.filter((name) => name in this.effort).map((name) => [name, { ...this.effort[name], seconds: round(this.effort[name].seconds) }]);
    const effort = spent.length ? { effort: Object.fromEntries(spent) } : {};
    return { ...(parts.length === 1 ? parts[0] : { parts }), base, seconds: round(this.seconds), ...effort };
  }

  /**
   * What is decided about the structures of one result.
   * @param {string} key
   * @returns {import("../answers.d.ts").DecidedPart}
   */
  #decidedBy(key) {
    const { volume, slices } = this.state;
    /** @type {(picks: Picks) => Picks} */
    const own = (picks) => Object.fromEntries(Object.entries(picks).filter(([name]) => this.keyOf(name) === key));
    const chosen = Object.entries(slices).map(([z, picks]) => /** @type {const} */ ([z, own(picks)]));
    return { proposals: key, volume: own(volume), slices: Object.fromEntries(chosen.filter(([, picks]) => !isEmpty(picks))) };
  }

  /** What comes after this was sent: the same picks, nothing decided. */
  next() {
    const work = new Work(this.image, this.proposals);
    const { picks, slicePicks } = this.state;
    Object.assign(work.state, { picks, slicePicks });
    const others = Object.entries(this.effort).filter(([name]) => !this.decided.includes(name));
    Object.assign(work, { keys: this.keys, effort: Object.fromEntries(others) });
    return work;
  }

  /**
   * @param {string} what
   * @param {number|null} z
   * @param {number} at
   */
  #remember(what, z = null, at = nextTime()) {
    this.#undone = [];
    this.#history.push({ what, z, state: copy(this.state) });
    this.#times.push(at);
    if (this.#history.length > MAX_HISTORY) {
      this.#history.shift();
      this.#times.shift();
    }
  }

  #save() {
    const key = PREFIX + this.image;
    try {
      const hasPicks = this.isVolumeAccepted || !isEmpty(this.state.slices);
      if (!hasPicks && isEmpty(this.state.picks) && isEmpty(this.state.slicePicks)) {
        localStorage.removeItem(key);
        return;
      }
      const { image, proposals, keys, seconds, effort, state } = this;
      localStorage.setItem(key, JSON.stringify({ image, proposals, keys, seconds, effort, state, time: Date.now() }));
    } catch {
      // Private windows may refuse storage: the page then works, and loses what was not sent when it is closed.
    }
  }
}

/**
 * What is kept of an image, and when it was last changed; null if nothing can be read.
 * @param {string} image
 * @returns {{work: Work, time: Date}|null}
 */
export function loadWork(image) {
  try {
    const kept = JSON.parse(localStorage.getItem(PREFIX + image) ?? "null");
    if (!kept || typeof kept.proposals !== "string" || typeof kept.state?.slices !== "object") return null;
    const work = new Work(image, kept.proposals);
    work.seconds = Number(kept.seconds) || 0;
    Object.assign(work, { keys: { ...kept.keys }, effort: { ...kept.effort } }); // An older version of the page kept none.
    work.state = { ...work.state, ...kept.state };
    return { work, time: new Date(kept.time) };
  } catch {
    return null;
  }
}

/** @param {string} image */
export function forgetWork(image) {
  try {
    localStorage.removeItem(PREFIX + image);
  } catch {
    // Nothing was kept then.
  }
}

/** Images with decisions that were not sent. */
export function listUnsent() {
  try {
    const images = Object.keys(localStorage).flatMap((key) => (key.startsWith(PREFIX) ? [key.slice(PREFIX.length)] : []));
    return [...new Set([...images.filter((image) => loadWork(image)?.work.hasDecisions), ...listDrawn()])];
  } catch {
    return [];
  }
}
