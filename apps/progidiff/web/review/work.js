// What a person decided about one image and has not sent yet. It survives a closed tab, a crash and a server that is gone.

import { makePick } from "./picks.js";

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

/** Decisions on one result of one image, with undo. */
export class Work {
  /** @type {(Step & {state: Decided})[]} */
  #history = [];

  /**
   * @param {string} image
   * @param {string} proposals key of the result; "" while a job makes it
   */
  constructor(image, proposals) {
    this.image = image;
    this.proposals = proposals;
    this.seconds = 0;
    /** @type {Decided} */
    this.state = { picks: {}, slicePicks: {}, volume: {}, slices: {} };
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
   */
  setPick(structure, pick, z = null) {
    this.#remember(z === null ? `pick for ${structure}` : `pick for ${structure} on slice ${z}`, z);
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
    this.#remember(`slice ${z} accepted`, z);
    this.state.slices[z] = Object.fromEntries(structures.map((structure) => [structure, copy(this.pickOn(structure, z))]));
    this.#save();
  }

  /** @param {readonly string[]} structures */
  acceptVolume(structures) {
    this.#remember("volume accepted");
    const { picks, slicePicks, slices } = this.state;
    this.state.volume = Object.fromEntries(structures.map((name) => [name, picks[name] ?? makePick("consensus")]));
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
    return z in this.state.slices || !isEmpty(this.state.volume);
  }

  get decidedSlices() {
    return Object.keys(this.state.slices).map(Number);
  }

  get isVolumeAccepted() {
    return !isEmpty(this.state.volume);
  }

  get hasDecisions() {
    return this.isVolumeAccepted || !isEmpty(this.state.slices);
  }

  get canUndo() {
    return this.#history.length > 0;
  }

  /**
   * Take the last step back.
   * @returns {Step|null} what was undone; null if there was nothing
   */
  undo() {
    const last = this.#history.pop();
    if (!last) return null;
    this.state = last.state;
    this.#save();
    return last;
  }

  /** @param {number} seconds */
  addSeconds(seconds) {
    this.seconds += seconds;
    if (this.hasDecisions) this.#save();
  }

  /**
   * As the server takes it.
   * @param {number} base the newest save that is known
   * @returns {import("../answers.d.ts").Decisions}
   */
  toDecisions(base) {
    const { volume, slices } = this.state;
    return { proposals: this.proposals, volume, slices, base, seconds: Math.round(this.seconds * 10) / 10 };
  }

  /** What comes after this was sent: the same picks, nothing decided. */
  next() {
    const work = new Work(this.image, this.proposals);
    const { picks, slicePicks } = this.state;
    Object.assign(work.state, { picks, slicePicks });
    return work;
  }

  /**
   * @param {string} what
   * @param {number|null} z
   */
  #remember(what, z = null) {
    this.#history.push({ what, z, state: copy(this.state) });
    if (this.#history.length > MAX_HISTORY) this.#history.shift();
  }

  #save() {
    const key = PREFIX + this.image;
    try {
      if (!this.hasDecisions && isEmpty(this.state.picks) && isEmpty(this.state.slicePicks)) {
        localStorage.removeItem(key);
        return;
      }
      const { image, proposals, seconds, state } = this;
      localStorage.setItem(key, JSON.stringify({ image, proposals, seconds, state, time: Date.now() }));
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
    return images.filter((image) => loadWork(image)?.work.hasDecisions);
  } catch {
    return [];
  }
}
