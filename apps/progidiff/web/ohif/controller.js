// What the panel's buttons do, with the series that the viewer shows.

import { clientId } from './browser.js';
import { Labelling } from './labelling.js';
import { relabel } from './masks.js';
import { rememberNext, takeNext } from './next.js';
import { encodeNrrd } from './nrrd.js';
import { Points } from './points.js';
import { Run, describeJob } from './run.js';
import { listSegments } from './segments.js';
import * as server from './server.js';
import { followTraining } from './training.js';
import { View } from './view.js';

/** @typedef {import('./viewer.js').Series} Series */
/** @typedef {import('./labelling.js').Submission} Submission */
/** @typedef {import('./labelling.js').Other} Other */

const MOST_PROPOSALS = 16;
const TOO_LARGE_BYTES = 1.5e9;
/** Prompted structures that a drawing may be counted as, as buttons. */
const MOST_CHOICES = 3;
/** Points that come within this time are asked about together. */
const STEER_MS = 300;

export class Panel {
  /** @type {Labelling|null} of the series that the viewer shows */
  labelling = null;
  /** @type {Run|null} the prompt that is waited for */
  running = null;
  busy = false;
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  #steering;

  /**
   * @param {import('../answers.d.ts').Prompt[]} prompts
   * @param {import('../answers.d.ts').ServerInfo} info
   * @param {readonly import('../answers.d.ts').FolderStructure[]} structures of the folder
   */
  constructor(prompts, info, structures) {
    this.segments = listSegments(prompts, structures);
    const numbers = (info.models?.progidiff?.config?.show ?? []).filter((show) => /^\d+$/.test(show));
    this.view = new View(prompts, numbers.length || MOST_PROPOSALS, {
      runOrCancel: () => this.#runOrCancel(),
      acceptSlice: () => this.#acceptSlice(),
      submitSlices: () => this.#guard((labelling) => this.#save(labelling, labelling.takeSlices())),
      submitVolume: () => this.#guard((labelling) => this.#save(labelling, labelling.takeVolume())),
      next: () => this.#guard((labelling) => this.#goToNext(labelling)),
      train: () => this.#guard(() => this.#train()),
      show: (show) => this.#guard((labelling) => labelling.show(show)),
      jumpTo: (index) => this.labelling?.series.jumpTo(index),
      takePoints: (positive) => (this.points.take(positive), this.#draw()),
      clearPoints: () => this.labelling && this.points.clear(this.labelling.series),
    });
    this.points = new Points(() => this.labelling?.active ?? '', () => this.#steerSoon());
    window.addEventListener('beforeunload', (event) => {
      if (this.labelling?.numAccepted) event.preventDefault();
    });
    this.#draw();
  }

  /**
   * Follow what the viewer shows.
   * @param {Series|null} series
   */
  follow(series) {
    document.body.classList.toggle('progidiff-open', Boolean(series));
    if (series?.uid === this.labelling?.series.uid) return;
    if (this.labelling?.numAccepted) {
      this.view.say(`${this.labelling.numAccepted} accepted slices of the other image were not submitted; go back to it to submit them.`, 'warning');
      return;
    }
    this.labelling = series && new Labelling(series, this.segments);
    this.#draw();
    this.#guard((labelling) => this.#arrive(labelling));
  }

  /** @param {Labelling} labelling */
  async #arrive(labelling) {
    const { series } = labelling;
    const { image, axial_slices: axial, listens_to_edits: listens } = await server.describeImage(series.uid);
    if (this.labelling !== labelling) return;
    Object.assign(labelling, { image, axial, listens });
    const next = takeNext(series.uid);
    if (next) {
      this.view.drawDisputed(next.slices.map(({ index, score }) => [index, score]), axial, 'Slices to look at');
      this.view.say([`Next sample: ${image}.`, next.reason].filter(Boolean).join(' '));
    } else {
      this.view.say(image);
    }
  }

  /**
   * Run one action at a time on what the viewer shows; its error becomes a message.
   * @param {(labelling: Labelling) => Promise<void>} action
   */
  async #guard(action) {
    const { labelling } = this;
    if (this.busy || !labelling) return;
    this.busy = true;
    this.#draw();
    try {
      await action(labelling);
    } catch (error) {
      if (!(error instanceof server.ServerError)) console.error('ProGiDiff panel', error);
      const near = error instanceof server.ServerError && error.suggestions.length ? ` Near: ${error.suggestions.join(', ')}.` : '';
      this.view.say((error instanceof Error ? error.message : String(error)) + near, 'error');
    } finally {
      this.busy = false;
      this.#draw();
    }
  }

  #runOrCancel() {
    if (this.running) this.running.cancel().catch((error) => this.view.say(error.message, 'error'));
    else this.#guard((labelling) => this.#propose(labelling));
  }

  /** Points were placed, moved or removed: ask again, in place of what still runs. */
  #steerSoon() {
    this.#draw();
    clearTimeout(this.#steering);
    this.#steering = setTimeout(() => {
      if (!this.busy) {
        this.#guard((labelling) => this.#propose(labelling));
        return;
      }
      this.running?.cancel().catch(() => undefined); // It may have ended meanwhile.
      this.#steerSoon();
    }, STEER_MS);
  }

  /**
   * @param {Labelling} labelling
   * @param {boolean} isSure that what was drawn and not saved may go
   */
  async #propose(labelling, isSure = false) {
    const { series, numAccepted } = labelling;
    if (numAccepted) throw new server.ServerError(`Submit the ${numAccepted} accepted slices first; another prompt would replace them.`);
    const unsent = isSure ? 0 : labelling.listUnsent().length;
    if (unsent) {
      this.view.ask(`What you drew on ${unsent === 1 ? '1 slice' : `${unsent} slices`} is not saved, and new proposals take its place.`, [
        ['Propose all the same', () => this.#guard((now) => this.#propose(now, true))],
        ['Go on drawing', () => undefined],
      ]);
      return;
    }
    if (series.bytes > TOO_LARGE_BYTES) {
      throw new server.ServerError(`This volume has ${(series.bytes / 1e9).toFixed(1)} GB of mask, too much for a browser. Use 3D Slicer or crop it.`);
    }
    const isWanted = () => this.labelling === labelling;
    this.running = new Run(labelling, isWanted, (job) => {
      this.view.showProgress(job.percent);
      this.view.say(describeJob(job));
    });
    const answering = this.running.start(this.view.prompt.value, this.view.count.value, labelling.listens ? this.points.toEdits(series) : []);
    this.view.say('Waiting for the server');
    this.#draw();
    try {
      const answer = await answering;
      if (isWanted()) await this.#use(labelling, answer);
    } finally {
      this.running = null;
    }
  }

  /**
   * @param {Labelling} labelling
   * @param {import('../answers.d.ts').Proposed} answer
   */
  async #use(labelling, answer) {
    const proposals = await labelling.useAnswer(answer, () => this.#markReady());
    this.#draw();
    performance.measure('progidiff:proposals', { start: labelling.started });
    const disputed = proposals.rankSlices();
    this.view.drawDisputed(disputed, labelling.axial);
    labelling.goToDrawn(disputed);
    const warning = (answer.warnings ?? []).join(' ');
    const points = labelling.listens ? this.points.count(labelling.series) : 0;
    const given = points ? `, given ${points === 1 ? 'one point' : `${points} points`}` : '';
    this.view.say(warning || proposals.describe() + given, warning ? 'warning' : '');
    this.view.version.textContent = [answer.model_version, answer.adapter].filter(Boolean).join(' + ');
    proposals.fetchAll(() => this.labelling?.proposals === proposals);
  }

  #acceptSlice() {
    const z = this.labelling?.acceptSlice() ?? null;
    if (z === null) {
      this.view.say('Slices are accepted one by one in axial views. Show an axial slice, or accept the volume.', 'warning');
      return;
    }
    this.view.say(`Slice ${z + 1} accepted; ${this.labelling?.numAccepted} to submit`);
    this.#draw();
  }

  /**
   * Save what was accepted. What was drawn in segments that nobody prompted is asked about first: it may be another structure, or the wrong
   * segment.
   * @param {Labelling} labelling
   * @param {Submission} submission
   */
  async #save(labelling, submission) {
    const { voxels } = submission;
    const others = labelling.findOthers(voxels);
    const asked = others.filter(({ index }) => labelling.findDecision(voxels, index) === null);
    if (!asked.length) {
      await this.#saveAs(labelling, submission, others, 0);
      return;
    }
    const names = asked.map(({ name }) => name).join(' and ');
    const drawn = asked.map(({ name, count }) => `${count === 1 ? '1 voxel' : `${count} voxels`} as ${name}`).join(' and ');
    /** @type {(name: string) => readonly [string, () => void]} */
    const countAs = (name) => [`Count as ${name}`, () => this.#guard((now) => this.#saveAs(now, submission, others, now.ids.get(name) ?? 1))];
    this.view.ask(`You drew ${drawn}, which was not prompted. Nothing is saved yet.`, [
      [`Keep as ${names}`, () => this.#guard((now) => this.#saveAs(now, submission, others, 0))],
      ...(labelling.proposals?.structures ?? []).slice(0, MOST_CHOICES).map(countAs),
      ['Go on drawing', () => undefined],
    ]);
  }

  /**
   * @param {Labelling} labelling
   * @param {Submission} submission
   * @param {readonly Other[]} others
   * @param {number} as the label that those of the others count as which somebody was just asked about; 0 to save them beside it, each on
   * the slices on which it is drawn
   */
  async #saveAs(labelling, submission, others, as) {
    const { series, proposals } = labelling;
    const { params, voxels } = submission;
    const structures = proposals?.structures ?? [];
    const said = others.map((other) => ({ ...other, as: labelling.findDecision(voxels, other.index) ?? as }));
    const fresh = others.filter(({ index }) => labelling.findDecision(voxels, index) === null);
    const own = relabel(voxels, new Map(said.map((other) => [other.index, other.as])));
    const answer = await server.saveLabel(series.uid, await encodeNrrd(own, series.grid), {
      ...params,
      structures,
      proposals: proposals?.key,
      seconds: Math.round((performance.now() - labelling.started) / 1000),
      label_info: structures.map((name) => ({ name, idx: labelling.ids.get(name) ?? 1 })),
      client_id: clientId(),
    });
    /** @type {Other[]} */
    const saved = [];
    /** @type {(() => void)[]} */
    const questions = [];
    for (const other of fresh) {
      try {
        if (!as) saved.push(await this.#saveBeside(labelling, voxels, other));
        labelling.beside.decide(series.grid.shape, voxels, other.index, as);
      } catch (error) {
        if (!server.saysNear(error)) throw error;
        questions.push(() => this.#askName(voxels, other, error.suggestions[0]));
      }
    }
    const { sequence, repeated, warnings = [] } = answer.annotation;
    const what = params.slices && params.slices.length < series.grid.shape[0] ? `${params.slices.length} slices` : 'the volume';
    const beside = saved.map(({ name, slices }) => `${name}, drawn on ${slices.length === 1 ? '1 slice' : `${slices.length} slices`}, is saved beside it.`);
    const isSame = repeated && !saved.length;
    this.view.say(isSame ? 'This was saved already; nothing changed.' : [`Saved ${what} of ${labelling.image} as label ${sequence}.`, ...beside, ...warnings].join(' '), 'done');
    labelling.markSent(submission);
    questions[0]?.();
  }

  /**
   * A segment is called nearly as something known: it is not saved before somebody says which is meant.
   * @param {Uint8Array} voxels
   * @param {Other} other
   * @param {string} meant
   */
  #askName(voxels, other, meant) {
    /** @type {(named: Other, confirm: boolean) => void} */
    const save = (named, confirm) =>
      void this.#guard(async (now) => {
        await this.#saveBeside(now, voxels, named, confirm);
        now.beside.decide(now.series.grid.shape, voxels, named.index, 0);
        this.view.say(`Saved as ${named.name}.`, 'done');
      });
    this.view.ask(`“${other.name}” is nearly “${meant}”, which is known already. It is not saved yet.`, [
      [`It is ${meant}`, () => save({ ...other, name: meant }, false)],
      [`Keep “${other.name}”`, () => save(other, true)],
    ]);
  }

  /**
   * Save a segment that was not prompted, on the slices on which it is drawn.
   * @param {Labelling} labelling
   * @param {Uint8Array} voxels
   * @param {Other} other
   * @param {boolean} confirm that a name which is nearly a known one is meant as it stands
   */
  async #saveBeside({ series, axial }, voxels, other, confirm = false) {
    const { index, name, color, slices } = other;
    const alone = relabel(voxels, new Map(Array.from({ length: 256 }, (_, label) => [label, label === index ? index : 0])));
    const where = axial ? { slices: slices.map((z) => axial[z] ?? z) } : {};
    await server.saveLabel(series.uid, await encodeNrrd(alone, series.grid), { ...where, structures: [name], edited: true, confirm, label_info: [{ name, idx: index, color }], client_id: clientId() });
    return other;
  }

  /** @param {Labelling} labelling */
  async #goToNext(labelling) {
    if (labelling.numAccepted) throw new server.ServerError(`Submit the ${labelling.numAccepted} accepted slices first.`);
    const next = await server.pickNext(clientId());
    if (!('id' in next)) {
      this.view.say(next.message || 'Nothing is left to label.');
      return;
    }
    const { study, series } = await server.describeImage(next.id);
    rememberNext({ series, slices: next.slices, reason: next.reason });
    if (series === labelling.series.uid) {
      await this.#arrive(labelling);
      return;
    }
    const address = new URL(location.href);
    address.search = String(new URLSearchParams({ StudyInstanceUIDs: study }));
    location.assign(address);
  }

  async #train() {
    await server.startTraining();
    this.view.say('Training has started; go on labelling.');
    followTraining(this.view).catch((error) => (this.view.training.textContent = error.message));
  }

  #draw() {
    const { labelling, busy } = this;
    this.view.draw(
      {
        hasSeries: Boolean(labelling),
        isRunning: Boolean(this.running),
        isBusy: busy,
        canAccept: Boolean(labelling?.canAccept) && !busy,
        accepted: labelling?.numAccepted ?? 0,
        show: labelling?.shown ?? '',
        shows: labelling?.proposals?.list() ?? [],
        listens: Boolean(labelling?.listens),
        sign: this.points?.sign ?? null,
        points: labelling ? (this.points?.count(labelling.series) ?? 0) : 0,
      },
      (show) => this.#isReady(show),
    );
  }

  /** @param {string} show */
  #isReady(show) {
    return Boolean(this.labelling?.proposals?.has(show));
  }

  #markReady() {
    this.view.markReady((show) => this.#isReady(show));
  }
}
