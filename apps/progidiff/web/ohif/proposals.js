// The proposals that answer a prompt, on one series: their masks, and where they differ.

import { getMask } from './server.js';

/** @typedef {import('./masks.js').Mask} Mask */
/** @typedef {import('../answers.d.ts').Proposed} Proposed */
/** @typedef {string} Show 'consensus', the number of a proposal, 'disagreement' or 'edited' */

export const CONSENSUS = 'consensus';
export const DISAGREEMENT = 'disagreement';
export const EDITED = 'edited';
export const MERGED = 'merged';

const KEPT_MASK_BYTES = 512e6;
const MOST_DISPUTED = 6;

export class Proposals {
  /** @type {Map<Show, Mask>} */
  #masks = new Map();
  /** @type {Map<Show, Promise<Mask>>} */
  #fetching = new Map();

  /**
   * @param {string} series
   * @param {Proposed} answer
   * @param {() => void} onReady called when another mask is here
   */
  constructor(series, answer, onReady) {
    this.series = series;
    this.answer = answer;
    this.onReady = onReady;
  }

  get key() {
    return this.answer.proposals;
  }

  get structures() {
    return Object.keys(this.answer.structures);
  }

  /** What can be shown, in order. */
  list() {
    const numbers = Array.from({ length: this.answer.num_proposals }, (_, k) => String(k + 1));
    return [CONSENSUS, ...numbers, DISAGREEMENT, ...(this.has(EDITED) ? [EDITED] : [])];
  }

  /** @param {Show} show */
  has(show) {
    return this.#masks.has(show);
  }

  /**
   * A mask that is here.
   * @param {Show} show
   */
  get(show) {
    return this.#masks.get(show);
  }

  /**
   * Keep what a person drew.
   * @param {Mask} mask
   */
  setEdited(mask) {
    this.#masks.set(EDITED, mask);
  }

  /**
   * A mask, from the server if it is not here; asked for once, whoever wants it.
   * @param {Show} show
   * @returns {Promise<Mask>}
   */
  async fetch(show) {
    const known = this.#masks.get(show);
    if (known) return known;
    const loading = this.#fetching.get(show) ?? this.#load(show);
    this.#fetching.set(show, loading);
    return loading;
  }

  /** @param {Show} show */
  async #load(show) {
    try {
      const mask = await getMask(this.series, { proposals: this.key, show });
      this.#masks.set(show, mask);
      this.onReady();
      return mask;
    } finally {
      this.#fetching.delete(show);
    }
  }

  /**
   * Fetch what was not looked at yet, so that switching waits for nothing.
   * @param {() => boolean} isWanted
   */
  async fetchAll(isWanted) {
    let bytes = 0;
    for (const show of this.list()) {
      if (!isWanted() || bytes > KEPT_MASK_BYTES) return;
      const mask = await this.fetch(show).catch(() => null); // Asked for again, and told, when it is to be shown.
      bytes += mask?.voxels.length || 0;
    }
  }

  /** @returns {[z: number, disagreement: number][]} axial slices, the most disputed first */
  rankSlices() {
    return rankSlices(Object.values(this.answer.structures).map((entry) => entry.disagreement_per_slice));
  }

  /** How much of what was found. */
  describe() {
    const found = Object.entries(this.answer.structures).map(([name, entry]) => `${name} ${entry.present ? `${entry.consensus_ml.toFixed(0)} ml` : 'not found'}`);
    return found.join(', ');
  }
}

/**
 * @param {readonly (readonly number[])[]} tables disagreement per slice of every structure
 * @returns {[z: number, disagreement: number][]} the most disputed first
 */
export function rankSlices(tables) {
  const worst = (tables[0] ?? []).map((_, z) => Math.max(...tables.map((table) => table[z])));
  /** @type {[number, number][]} */
  const ranked = worst.map((value, z) => [z, value]);
  return ranked.filter(([, value]) => value > 0).sort(([, a], [, b]) => b - a).slice(0, MOST_DISPUTED);
}
