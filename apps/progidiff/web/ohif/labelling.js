// What is shown of one series, drawn on it and accepted.

import { Beside } from './beside.js';
import { drawSlice, emptyMask, findLabel, joinSlices, listLabels, takeStrokes, wholeMask } from './masks.js';
import { CONSENSUS, DISAGREEMENT, EDITED, MERGED, Proposals } from './proposals.js';
import { FIRST_BAND } from './segments.js';

/** @typedef {import('./viewer.js').Series} Series */
/** @typedef {import('./masks.js').Mask} Mask */
/** @typedef {import('../answers.d.ts').Proposed} Proposed */
/** @typedef {{voxels: Uint8Array, shown: string, edited: boolean}} AcceptedSlice `shown`: the proposal that it comes from */
/** @typedef {{voxels: Uint8Array<ArrayBuffer>, params: {slices?: number[], shown: string, edited: boolean}}} Submission */
/** @typedef {{index: number, name: string, color: number[]|undefined, count: number, slices: number[]}} Other what was drawn of a segment that was not prompted; slices of the series */

export class Labelling {
  /** @type {Proposals|null} */
  proposals = null;
  /** @type {import('./labelmap.js').Labelmap|null} */
  #labelmap = null;
  /** @type {Map<number, AcceptedSlice>} by slice of the series */
  #accepted = new Map();
  /** The proposal that is shown; '' for none. */
  shown = '';
  /** Whether the model draws by edits. */
  listens = false;
  /** How the server calls the image. */
  image = '';
  /** @type {number[]|null} the axial index of every slice of the series; null if it is not axial, or not known yet */
  axial = null;
  /** When the prompt was sent. */
  started = 0;
  /** @type {Map<number, Uint8Array>} slice of the series -> its voxels as they were saved */
  #sent = new Map();

  /** What was said of segments that were not prompted. */
  beside = new Beside();

  /**
   * @param {Series} series
   * @param {readonly import('./labelmap.js').Segment[]} segments
   */
  constructor(series, segments) {
    this.series = series;
    this.segments = segments;
    this.ids = new Map(segments.map(({ label, index }) => [label, index]));
  }

  /** The prompted structure that the viewer's brush draws, or the only one; "" for all that are prompted. */
  get active() {
    const structures = this.proposals?.structures ?? [];
    const name = structures.find((own) => this.ids.get(own) === this.#labelmap?.active);
    return name ?? (structures.length === 1 ? structures[0] : '');
  }

  /** Label ids of what was prompted. */
  get asked() {
    return (this.proposals?.structures ?? []).map((name) => this.ids.get(name) ?? 1);
  }

  get numAccepted() {
    return this.#accepted.size;
  }

  get canAccept() {
    return Boolean(this.proposals && this.#labelmap && this.shown && this.shown !== DISAGREEMENT);
  }

  /** The axial index of the slice that is looked at; undefined if it is not known. */
  get currentAxial() {
    return this.axial?.[this.series.currentSlice()];
  }

  /** A prompt is sent: what was drawn until now is kept. */
  begin() {
    if (this.#keepEdits()) this.shown = EDITED;
    this.started = performance.now();
  }

  /**
   * Show what a job has so far.
   * @param {Mask} mask
   */
  async showUnfinished(mask) {
    this.#labelmap = await this.series.openLabelmap(this.segments, listLabels(mask.voxels));
    this.#labelmap.write(mask);
  }

  /** The slices that were ready are no proposal: back to what was shown before. */
  dropUnfinished() {
    this.#labelmap?.write(this.proposals?.get(this.shown) ?? emptyMask(this.series.grid.shape));
  }

  /**
   * @param {Proposed} answer
   * @param {() => void} onReady called when another mask is here
   */
  async useAnswer(answer, onReady) {
    this.proposals = new Proposals(this.series.uid, answer, onReady);
    this.shown = '';
    this.#sent.clear();
    this.beside.clear();
    this.#labelmap = await this.series.openLabelmap(this.segments, this.asked);
    await this.show(CONSENSUS);
    this.#labelmap.draw(this.asked[0]);
    return this.proposals;
  }

  /** @param {string} show */
  async show(show) {
    const start = performance.now();
    const mask = await this.proposals?.fetch(show);
    if (!mask || !this.#labelmap) return;
    this.#keepEdits();
    this.#labelmap.write(mask);
    this.shown = show;
    // The viewer draws in the next frame; it is on the screen when the one after that begins.
    requestAnimationFrame(() => requestAnimationFrame(() => performance.measure('progidiff:switch', { start, detail: show })));
  }

  /** What the person drew on a proposal stays, as an entry of its own in the strip. Whether there is any. */
  #keepEdits() {
    const mask = this.proposals?.get(this.shown);
    if (!this.proposals || !this.#labelmap || !mask) return false;
    if (this.shown === DISAGREEMENT) return this.#keepStrokes(mask);
    if (!this.#isEdited(mask)) return false;
    this.proposals.setEdited(wholeMask(mask.shape, this.#labelmap.read(), mask.base ?? this.shown));
    return true;
  }

  /**
   * What was drawn where the proposals differ is kept as drawn on the consensus, or on what was drawn before.
   * @param {Mask} picture
   */
  #keepStrokes(picture) {
    const base = this.proposals?.get(EDITED) ?? this.proposals?.get(CONSENSUS);
    const voxels = base && this.#labelmap ? takeStrokes(base, picture, this.#labelmap.read(), FIRST_BAND) : null;
    if (!base || !voxels) return false;
    this.proposals?.setEdited(wholeMask(base.shape, voxels, base.base ?? CONSENSUS));
    return true;
  }

  /**
   * Whether the mask on a slice (or on all) is no longer the proposal that it was.
   * @param {Mask} mask
   * @param {number} slice
   */
  #isEdited(mask, slice = -1) {
    return this.shown === EDITED || Boolean(this.#labelmap?.differsFrom(mask, slice));
  }

  /**
   * If nothing is drawn on the slice in view, go to one on which there is.
   * @param {readonly (readonly [z: number, disagreement: number])[]} disputed
   */
  goToDrawn(disputed) {
    const [z0, z1] = this.proposals?.get(CONSENSUS)?.box ?? [0, 0];
    const current = this.series.currentSlice();
    if (z1 <= z0 || (current >= z0 && current < z1)) return;
    const worst = this.axial && disputed.length ? this.axial.indexOf(disputed[0][0]) : -1;
    this.series.jumpTo(worst < 0 ? Math.floor((z0 + z1) / 2) : worst);
  }

  /**
   * Keep what is shown on the slice in view.
   * @returns {number|null} its axial index; null if this view shows no axial slice
   */
  acceptSlice() {
    const z = this.series.currentSlice();
    const mask = this.proposals?.get(this.shown);
    if (z < 0 || !this.axial || !mask || !this.#labelmap) return null;
    this.#accepted.set(z, { voxels: this.#labelmap.readSlice(z), shown: mask.base ?? this.shown, edited: this.#isEdited(mask, z) });
    return this.axial[z];
  }

  /** @returns {Submission} the accepted slices */
  takeSlices() {
    const entries = [...this.#accepted];
    const shown = new Set(entries.map(([, entry]) => entry.shown));
    return {
      voxels: joinSlices(this.series.grid.shape, entries.map(([z, { voxels }]) => [z, voxels])),
      params: {
        slices: entries.map(([z]) => this.axial?.[z] ?? z),
        shown: shown.size === 1 ? [...shown][0] : MERGED,
        edited: entries.some(([, entry]) => entry.edited),
      },
    };
  }

  /** @returns {Submission} everything, as it is shown */
  takeVolume() {
    const mask = this.proposals?.get(this.shown);
    if (!mask || !this.#labelmap) throw new Error('No proposal is shown. Run a prompt first.');
    const edited = this.#isEdited(mask);
    // Of a changed proposal the server takes the changed slices as annotated, unless it is told that all were accepted.
    const slices = edited && this.axial ? { slices: this.axial } : {};
    return { voxels: this.#labelmap.read(), params: { shown: mask.base ?? this.shown, edited, ...slices } };
  }

  /**
   * What was drawn in segments that were not prompted: the save of a prompt does not speak about them.
   * @param {Uint8Array} voxels
   * @returns {Other[]}
   */
  findOthers(voxels) {
    const { asked, series } = this;
    const others = listLabels(voxels).filter((index) => !asked.includes(index));
    return others.map((index) => ({ index, name: this.#labelmap?.nameOf(index) ?? `Segment ${index}`, color: this.#labelmap?.colorOf(index), ...findLabel(series.grid.shape, voxels, index) }));
  }

  /**
   * What a segment that was not prompted counts as, see `Beside.find`.
   * @param {Uint8Array} voxels
   * @param {number} index
   */
  findDecision(voxels, index) {
    return this.beside.find(this.series.grid.shape, voxels, index);
  }

  /**
   * The slices on which something was drawn by hand since the proposals came, and not saved.
   * @returns {number[]} of the series
   */
  listUnsent() {
    const shown = this.proposals?.get(this.shown);
    if (!this.proposals || !this.#labelmap || !shown || this.shown === DISAGREEMENT) return [];
    const drawn = this.#isEdited(shown) ? wholeMask(shown.shape, this.#labelmap.read(), shown.base ?? this.shown) : this.proposals.get(EDITED);
    const start = drawn && this.proposals.get(drawn.base ?? '');
    if (!drawn || !start) return [];
    const [depth, rows, columns] = drawn.shape;
    const expected = new Uint8Array(rows * columns);
    return Array.from({ length: depth }, (_, z) => z).filter((z) => {
      const voxels = drawn.voxels.subarray(z * expected.length, (z + 1) * expected.length);
      drawSlice(start, z, expected);
      return voxels.some((value, i) => value !== expected[i]) && !this.#sent.get(z)?.every((value, i) => value === voxels[i]);
    });
  }

  /**
   * A submission is saved; nothing is accepted any more.
   * @param {Submission} submission as it was drawn
   */
  markSent({ voxels, params: { slices } }) {
    const [depth, rows, columns] = this.series.grid.shape;
    const size = rows * columns;
    for (let z = 0; z < depth; z += 1) {
      if (!slices || !this.axial || slices.includes(this.axial[z])) this.#sent.set(z, voxels.slice(z * size, (z + 1) * size));
    }
    this.#accepted.clear();
  }
}
