// What the panel's buttons do, with the series that the viewer shows.

import { clientId } from './browser.js';
import { Labelling } from './labelling.js';
import { rememberNext, takeNext } from './next.js';
import { encodeNrrd } from './nrrd.js';
import { Run, describeJob } from './run.js';
import { listSegments } from './segments.js';
import * as server from './server.js';
import { followTraining } from './training.js';
import { View } from './view.js';

/** @typedef {import('./viewer.js').Series} Series */

const MOST_PROPOSALS = 16;
const TOO_LARGE_BYTES = 1.5e9;

export class Panel {
  /** @type {Labelling|null} of the series that the viewer shows */
  labelling = null;
  /** @type {Run|null} the prompt that is waited for */
  running = null;
  busy = false;

  /**
   * @param {import('../answers.d.ts').Prompt[]} prompts
   * @param {import('../answers.d.ts').ServerInfo} info
   */
  constructor(prompts, info) {
    this.segments = listSegments(prompts);
    this.labels = new Map(prompts.map(({ structure, label }) => [structure, label]));
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
    });
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
    const { image, axial_slices: axial } = await server.describeImage(series.uid);
    if (this.labelling !== labelling) return;
    Object.assign(labelling, { image, axial });
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

  /** @param {Labelling} labelling */
  async #propose(labelling) {
    const { series, numAccepted } = labelling;
    if (numAccepted) throw new server.ServerError(`Submit the ${numAccepted} accepted slices first; another prompt would replace them.`);
    if (series.bytes > TOO_LARGE_BYTES) {
      throw new server.ServerError(`This volume has ${(series.bytes / 1e9).toFixed(1)} GB of mask, too much for a browser. Use 3D Slicer or crop it.`);
    }
    const isWanted = () => this.labelling === labelling;
    this.running = new Run(labelling, isWanted, (job) => {
      this.view.showProgress(job.percent);
      this.view.say(describeJob(job));
    });
    const answering = this.running.start(this.view.prompt.value, this.view.count.value);
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
    this.view.say(warning || proposals.describe(), warning ? 'warning' : '');
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
   * @param {Labelling} labelling
   * @param {import('./labelling.js').Submission} submission
   */
  async #save(labelling, { voxels, params }) {
    const { series, proposals } = labelling;
    const structures = proposals?.structures ?? [];
    const answer = await server.saveLabel(series.uid, await encodeNrrd(voxels, series.grid), {
      ...params,
      structures,
      proposals: proposals?.key,
      seconds: Math.round((performance.now() - labelling.started) / 1000),
      label_info: structures.map((name) => ({ name, idx: this.labels.get(name) ?? 1 })),
      client_id: clientId(),
    });
    const { sequence, repeated, warnings = [] } = answer.annotation;
    const what = params.slices && params.slices.length < series.grid.shape[0] ? `${params.slices.length} slices` : 'the volume';
    this.view.say(repeated ? 'This was saved already; nothing changed.' : [`Saved ${what} of ${labelling.image} as label ${sequence}.`, ...warnings].join(' '), 'done');
    labelling.clearAccepted();
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
