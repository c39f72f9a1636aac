// The panel below the viewer: a prompt, its proposals to step through, slices to accept, the next sample, training.
// Loaded by /ohif/app-config.js. What touches the viewer is in viewer.js; if that has changed, the panel stays away and says so in the console.

import { encodeNrrd } from './nrrd.js';
import * as server from './server.js';
import { findActive, findMissing, mendExport } from './viewer.js';

const CONSENSUS = 'consensus';
const DISAGREEMENT = 'disagreement';
const EDITED = 'edited';
const MERGED = 'merged';
const HEAT = [
  { index: 201, label: 'disagreement up to 25 %', color: [255, 237, 160] },
  { index: 202, label: 'disagreement 25 to 50 %', color: [254, 178, 76] },
  { index: 203, label: 'disagreement 50 to 75 %', color: [240, 59, 32] },
  { index: 204, label: 'disagreement over 75 %', color: [189, 0, 38] },
];
const MOST_DISPUTED = 6;
const WATCH_MS = 700;
const POLL_MS = 400;
const TRAINING_MS = 3000;
const GIVE_UP_MS = 60000;
const KEPT_MASK_BYTES = 512e6;
const TOO_LARGE_BYTES = 1.5e9;
const NEXT = 'progidiff.next';
const CLIENT = 'progidiff.client';
const NOT_AXIAL = 'The slices of this series run along another axis: show it in an axial view (MPR) and scroll there.';
const NOTHING = { box: [0, 0, 0, 0, 0, 0], voxels: new Uint8Array() };

/** '#rrggbb' as three numbers up to 255. */
const toRgb = (color) => [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16));
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, '0')).join('');

/** An element: make('button', {className, onclick, ...}, ...children). */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function clientId() {
  const known = sessionStorage.getItem(CLIENT) || `ohif-${newId()}`;
  sessionStorage.setItem(CLIENT, known);
  return known;
}

class Panel {
  constructor(prompts, info) {
    this.prompts = prompts;
    this.names = new Map(prompts.map(({ structure, label }) => [structure, label]));
    this.maxProposals = (info.models?.progidiff?.config?.show || []).filter((show) => /^\d+$/.test(show)).length || 16;
    this.series = null;
    this.running = null;
    this.busy = false;
    this._forget();
    this._build();
  }

  _forget() {
    this.result = null;
    this.labelmap = null;
    this._forgetMasks();
    this.accepted = new Map();
    this.started = 0;
  }

  _forgetMasks() {
    // New ones each time: what still arrives for the result before goes into the old ones.
    this.masks = new Map();
    this.fetching = new Map();
    this.shown = '';
  }

  _build() {
    const words = this.prompts.flatMap(({ structure, synonyms = [] }) => [structure, ...synonyms]);
    this.prompt = make('input', { type: 'text', placeholder: 'liver and spleen', title: 'Name one or more structures', autocomplete: 'off' });
    this.prompt.setAttribute('list', 'progidiff-prompts');
    this.prompt.setAttribute('aria-label', 'Prompt');
    this.count = make('input', { type: 'number', min: 1, max: this.maxProposals, value: 4, title: 'How many proposals (K)' });
    this.count.setAttribute('aria-label', 'Number of proposals');
    this.run = make('button', { type: 'submit', className: 'progidiff-main', textContent: 'Propose' });
    this.progress = make('progress', { max: 100, value: 0, hidden: true });
    this.message = make('output', { className: 'progidiff-message' });
    this.version = make('span', { className: 'progidiff-version', title: 'Model and adapter that the proposals come from' });
    this.training = make('span', { className: 'progidiff-version' });
    this.strip = make('div', { className: 'progidiff-strip' });
    this.strip.setAttribute('role', 'toolbar');
    this.disputed = make('div', { className: 'progidiff-strip' });
    this.acceptSlice = make('button', { textContent: 'Accept this slice', onclick: () => this._acceptSlice() });
    this.submit = make('button', { className: 'progidiff-main', textContent: 'Submit', onclick: () => this._guard(() => this._submitSlices()) });
    this.acceptAll = make('button', { textContent: 'Accept volume', onclick: () => this._guard(() => this._submitVolume()) });
    this.next = make('button', { textContent: 'Next sample', onclick: () => this._guard(() => this._goToNext()) });
    this.train = make('button', { textContent: 'Train', onclick: () => this._guard(() => this._train()) });
    const form = make(
      'form',
      { className: 'progidiff-row', onsubmit: (event) => { event.preventDefault(); this._runOrCancel(); } },
      make('strong', { textContent: 'ProGiDiff' }), this.prompt, this.count, this.run, this.progress, this.message, this.training, this.version,
    );
    const row = make(
      'div', { className: 'progidiff-row' },
      this.strip, this.disputed, make('span', { className: 'progidiff-space' }), this.acceptSlice, this.submit, this.acceptAll, this.next, this.train,
    );
    const list = make('datalist', { id: 'progidiff-prompts' }, ...words.map((word) => make('option', { value: word })));
    this.root = make('section', { id: 'progidiff-panel' }, form, row, list);
    this.root.setAttribute('aria-label', 'Proposals');
    // The viewer's hot keys must not hear what is typed here.
    for (const type of ['keydown', 'keyup', 'keypress']) this.root.addEventListener(type, (event) => event.stopPropagation());
    window.addEventListener('beforeunload', (event) => { if (this.accepted.size) event.preventDefault(); });
    document.body.append(this.root);
    // The viewer ends where the panel begins, also when that takes another line.
    new ResizeObserver(() => {
      document.body.style.setProperty('--progidiff-height', `${this.root.offsetHeight}px`);
      window.dispatchEvent(new Event('resize'));
    }).observe(this.root);
    this._draw();
  }

  /** Follow what the viewer shows. */
  follow(series) {
    const isOther = series?.uid !== this.series?.uid;
    document.body.classList.toggle('progidiff-open', Boolean(series));
    if (!isOther) return;
    if (this.accepted.size) {
      this.say(`${this.accepted.size} accepted slices of the other image were not submitted; go back to it to submit them.`, 'warning');
      return;
    }
    this._forget();
    this.series = series;
    this.axial = null;
    this._draw();
    if (series) this._guard(() => this._arrive(series));
  }

  async _arrive(series) {
    const { image, axial_slices: axial } = await server.describeImage(series.uid);
    if (this.series !== series) return;
    this.image = image;
    this.axial = axial;
    const next = JSON.parse(sessionStorage.getItem(NEXT) || 'null');
    if (next?.series === series.uid) {
      sessionStorage.removeItem(NEXT);
      this._drawDisputed(next.slices.map(({ index, score }) => [index, score]), 'Slices to look at');
      this.say([`Next sample: ${image}.`, next.reason].filter(Boolean).join(' '));
    } else {
      this.say(image);
    }
  }

  say(text, kind = '') {
    this.message.textContent = text;
    this.message.dataset.kind = kind;
    this.message.title = text;
  }

  /** Run one action at a time; its error becomes a message. */
  async _guard(action) {
    if (this.busy) return;
    this.busy = true;
    this._draw();
    try {
      await action();
    } catch (error) {
      const hint = error.suggestions?.length ? ` Near: ${error.suggestions.join(', ')}.` : '';
      this.say((error.message || String(error)) + hint, 'error');
      if (!(error instanceof server.ServerError)) console.error('ProGiDiff panel', error);
    } finally {
      this.busy = false;
      this._draw();
    }
  }

  _runOrCancel() {
    if (this.running) {
      server.cancelJob(this.running).catch((error) => this.say(error.message, 'error'));
    } else {
      this._guard(() => this._propose());
    }
  }

  async _propose() {
    if (this.accepted.size) throw new server.ServerError(`Submit the ${this.accepted.size} accepted slices first; another prompt would replace them.`);
    const series = this.series;
    if (!series) throw new server.ServerError('Open an image first.');
    if (series.bytes > TOO_LARGE_BYTES) {
      throw new server.ServerError(`This volume has ${(series.bytes / 1e9).toFixed(1)} GB of mask, too much for a browser. Use 3D Slicer or crop it.`);
    }
    const job = newId();
    const current = this.axial?.[series.currentSlice()];
    const params = { prompt: this.prompt.value, num_proposals: this.count.value, job_id: job, client_id: clientId() };
    if (current !== undefined) params.first_slice = current;
    if (this._keepEdits()) this.shown = EDITED;
    this.running = job;
    this.started = performance.now();
    this.say('Waiting for the server');
    this._draw();
    let ended = false;
    const answer = server.propose(series.uid, params).finally(() => { ended = true; });
    const watching = this._watch(series, job, () => ended);
    try {
      const result = await answer;
      await watching;
      if (this.series !== series) return;
      this.result = result;
      this._forgetMasks();
      this.labelmap = await series.openLabelmap(this._segments());
      await this._show(CONSENSUS);
      performance.measure('progidiff:proposals', { start: this.started });
      const disputed = this._rankSlices();
      this._drawDisputed(disputed);
      this._goToDrawn(disputed);
      const warning = (result.warnings || []).join(' ');
      this.say(warning || describe(result), warning ? 'warning' : '');
      this.version.textContent = [result.model_version, result.adapter].filter(Boolean).join(' + ');
    } catch (error) {
      // The slices that were ready are no proposal: back to what was shown before.
      await watching.catch(() => undefined);
      if (this.series === series) this.labelmap?.write(this.masks.get(this.shown) ?? NOTHING);
      throw error;
    } finally {
      this.running = null;
      await watching.catch(() => undefined);
    }
    this._keepReady();
  }

  /** Progress, and the proposals of the slices that are ready, until the answer is here. */
  async _watch(series, job, isOver) {
    let drawn = 0;
    while (!isOver()) {
      await sleep(POLL_MS);
      if (isOver()) break;
      const state = await server.getJob(job).catch(() => null);
      if (!state) continue;
      this.progress.hidden = false;
      this.progress.value = state.percent;
      this.say(state.position > 0 ? `${state.position} before you` : `${state.slices_done} of ${state.slices_total} slices`);
      if (state.slices_done <= drawn || state.state !== 'running') continue;
      const mask = await server.getMask(series.uid, { job, show: CONSENSUS }).catch(() => null);
      if (!mask || isOver() || this.series !== series) continue;
      this.labelmap = await series.openLabelmap(this._segments());
      this.labelmap.write(mask);
      if (!drawn) performance.measure('progidiff:first', { start: this.started });
      drawn = state.slices_done;
    }
    this.progress.hidden = true;
  }

  _segments() {
    const named = this.prompts.map(({ structure, label, color }) => ({ index: label, label: structure, color: toRgb(color) }));
    return [...named, ...HEAT];
  }

  /** Fetch what was not looked at yet, so that switching waits for nothing. */
  async _keepReady() {
    const result = this.result;
    let bytes = 0;
    for (const show of this._shows()) {
      if (this.result !== result || bytes > KEPT_MASK_BYTES) return;
      const mask = await this._mask(show).catch(() => null);
      bytes += mask?.voxels.length || 0;
    }
  }

  _shows() {
    return this.result ? [CONSENSUS, ...Array.from({ length: this.result.num_proposals }, (_, k) => String(k + 1)), DISAGREEMENT] : [];
  }

  /** A mask from the server; asked for once, whoever wants it. */
  async _mask(show) {
    const { masks, fetching, result } = this;
    if (masks.has(show)) return masks.get(show);
    if (!fetching.has(show)) {
      const load = async () => {
        try {
          masks.set(show, await server.getMask(this.series.uid, { proposals: result.proposals, show }));
          this._markReady();
          return masks.get(show);
        } finally {
          fetching.delete(show);
        }
      };
      fetching.set(show, load());
    }
    return fetching.get(show);
  }

  async _show(show) {
    const start = performance.now();
    const mask = await this._mask(show);
    this._keepEdits();
    this.labelmap.write(mask);
    this.shown = show;
    // The viewer draws in the next frame; it is on the screen when the one after that begins.
    requestAnimationFrame(() => requestAnimationFrame(() => performance.measure('progidiff:switch', { start, detail: show })));
    this._draw();
  }

  /** What the person drew on a proposal stays, as an entry of its own in the strip. Whether there is any. */
  _keepEdits() {
    if (!this.labelmap || !this.masks.has(this.shown) || this.shown === DISAGREEMENT || !this._isEdited()) return false;
    const { shape, base = this.shown } = this.masks.get(this.shown);
    this.masks.set(EDITED, { box: [0, shape[0], 0, shape[1], 0, shape[2]], shape, voxels: this.labelmap.read(), base });
    return true;
  }

  /** Whether the mask on a slice (or on all) is no longer the proposal that it was. */
  _isEdited(slice = -1) {
    return this.shown === EDITED || this.labelmap.differsFrom(this.masks.get(this.shown), slice);
  }

  /** [[slice, disagreement], ...], the most disputed first. */
  _rankSlices() {
    const tables = Object.values(this.result.structures).map((entry) => entry.disagreement_per_slice);
    const worst = (tables[0] || []).map((_, z) => Math.max(...tables.map((table) => table[z])));
    return worst.map((value, z) => [z, value]).filter(([, value]) => value > 0).sort((a, b) => b[1] - a[1]).slice(0, MOST_DISPUTED);
  }

  /** If nothing is drawn on the slice in view, go to one on which there is. */
  _goToDrawn(disputed) {
    const { box: [z0, z1] } = this.masks.get(CONSENSUS);
    const current = this.series.currentSlice();
    if (z1 <= z0 || (current >= z0 && current < z1)) return;
    const worst = this.axial ? this.axial.indexOf(disputed[0]?.[0]) : -1;
    this.series.jumpTo(worst < 0 ? Math.floor((z0 + z1) / 2) : worst);
  }

  /** Axial slices to go to. A series along another axis shows none of them as it is, so there they are named only. */
  _drawDisputed(slices, heading = 'Most disputed slices') {
    const buttons = slices.map(([z, value]) => {
      const index = this.axial ? this.axial.indexOf(z) : -1;
      const title = index < 0 ? NOT_AXIAL : `Disagreement ${Number(value).toFixed(2)}`;
      const button = make('button', { textContent: `${z + 1}`, title, disabled: index < 0, onclick: () => this.series?.jumpTo(index) });
      button.style.setProperty('--heat', Math.min(1, value));
      return button;
    });
    const where = this.axial ? {} : { textContent: `${heading} (axial)`, title: NOT_AXIAL };
    this.disputed.replaceChildren(...(buttons.length ? [make('span', { textContent: heading, ...where }), ...buttons] : []));
  }

  _acceptSlice() {
    const z = this.series.currentSlice();
    if (z < 0 || !this.axial) {
      this.say('Slices are accepted one by one in axial views. Show an axial slice, or accept the volume.', 'warning');
      return;
    }
    this.accepted.set(z, { voxels: this.labelmap.readSlice(z), shown: this.masks.get(this.shown).base || this.shown, edited: this._isEdited(z) });
    this.say(`Slice ${this.axial[z] + 1} accepted; ${this.accepted.size} to submit`);
    this._draw();
  }

  async _submitSlices() {
    const entries = [...this.accepted];
    const [, rows, columns] = this.series.grid.shape;
    const voxels = new Uint8Array(this.series.bytes);
    for (const [z, entry] of entries) voxels.set(entry.voxels, z * rows * columns);
    const shown = new Set(entries.map(([, entry]) => entry.shown));
    await this._save(voxels, {
      slices: entries.map(([z]) => this.axial[z]),
      shown: shown.size === 1 ? [...shown][0] : MERGED,
      edited: entries.some(([, entry]) => entry.edited),
    });
    this.accepted.clear();
  }

  async _submitVolume() {
    const edited = this._isEdited();
    // Of a changed proposal the server takes the changed slices as annotated, unless it is told that all were accepted.
    const slices = edited && this.axial ? { slices: this.axial } : {};
    await this._save(this.labelmap.read(), { shown: this.masks.get(this.shown).base || this.shown, edited, ...slices });
    this.accepted.clear();
  }

  async _save(voxels, params) {
    const structures = Object.keys(this.result.structures);
    const file = await encodeNrrd(voxels, this.series.grid);
    const answer = await server.saveLabel(this.series.uid, file, {
      ...params,
      structures,
      proposals: this.result.proposals,
      seconds: Math.round((performance.now() - this.started) / 1000),
      label_info: structures.map((name) => ({ name, idx: this.names.get(name) ?? 1 })),
      client_id: clientId(),
    });
    const { sequence, repeated, warnings = [] } = answer.annotation || {};
    const what = params.slices && params.slices.length < this.series.grid.shape[0] ? `${params.slices.length} slices` : 'the volume';
    this.say(repeated ? 'This was saved already; nothing changed.' : [`Saved ${what} of ${this.image} as label ${sequence}.`, ...warnings].join(' '), 'done');
  }

  async _goToNext() {
    if (this.accepted.size) throw new server.ServerError(`Submit the ${this.accepted.size} accepted slices first.`);
    const next = await server.pickNext(clientId());
    if (!next.id) {
      this.say(next.message || 'Nothing is left to label.');
      return;
    }
    const { study, series } = await server.describeImage(next.id);
    sessionStorage.setItem(NEXT, JSON.stringify({ series, slices: next.slices || [], reason: next.reason || '' }));
    if (series === this.series?.uid) {
      await this._arrive(this.series);
      return;
    }
    const address = new URL(location.href);
    address.search = new URLSearchParams({ StudyInstanceUIDs: study });
    location.assign(address);
  }

  async _train() {
    await server.startTraining();
    this.say('Training has started; go on labelling.');
    this._followTraining().catch((error) => { this.training.textContent = error.message; });
  }

  /** Where the training stands, beside the version, without holding up the labelling. */
  async _followTraining() {
    for (;;) {
      const state = await server.getTraining();
      if (!state.running) {
        this.training.textContent = '';
        this.say(state.message || `Training: ${state.state}`, state.state === 'done' ? 'done' : 'warning');
        return;
      }
      this.training.textContent = state.total ? `training ${state.step} of ${state.total}` : 'training';
      this.training.title = state.message || '';
      await sleep(TRAINING_MS);
    }
  }

  _draw() {
    const canAccept = Boolean(this.result && this.labelmap && this.shown && this.shown !== DISAGREEMENT) && !this.busy;
    this.run.textContent = this.running ? 'Cancel' : 'Propose';
    this.run.disabled = !this.series || (this.busy && !this.running);
    this.progress.hidden = !this.running;
    this.acceptSlice.disabled = !canAccept;
    this.acceptAll.disabled = !canAccept;
    this.submit.disabled = !this.accepted.size || this.busy;
    this.submit.textContent = this.accepted.size ? `Submit ${this.accepted.size} slices` : 'Submit';
    this.next.disabled = this.train.disabled = this.busy;
    const names = { [CONSENSUS]: 'Consensus', [DISAGREEMENT]: 'Where they differ', [EDITED]: 'Edited' };
    const shows = this.masks.has(EDITED) ? [...this._shows(), EDITED] : this._shows();
    this.strip.replaceChildren(
      ...shows.map((show) => {
        const button = make('button', { textContent: names[show] || show, disabled: this.busy && !this.running });
        button.dataset.show = show;
        button.setAttribute('aria-pressed', String(show === this.shown));
        button.onclick = () => this._guard(() => this._show(show));
        return button;
      }),
    );
    this._markReady();
  }

  /** Which proposals are here already, so that showing them waits for nothing. */
  _markReady() {
    for (const button of this.strip.children) button.dataset.ready = String(this.masks.has(button.dataset.show));
  }
}

function describe(result) {
  const found = Object.entries(result.structures).map(([name, entry]) => `${name} ${entry.present ? `${entry.consensus_ml.toFixed(0)} ml` : 'not found'}`);
  return found.join(', ');
}

async function start() {
  const deadline = performance.now() + GIVE_UP_MS;
  while (findMissing().length) {
    if (performance.now() > deadline) {
      console.warn(`ProGiDiff panel: this viewer lacks ${findMissing().join(', ')}; the panel stays away.`);
      return;
    }
    await sleep(WATCH_MS);
  }
  mendExport();
  let panel = null;
  for (;;) {
    try {
      const series = findActive();
      if (series && !panel) panel = new Panel(await server.listPrompts(), await server.getInfo());
      panel?.follow(series);
    } catch (error) {
      console.warn('ProGiDiff panel', error);
    }
    await sleep(WATCH_MS);
  }
}

start();
