// The panel on the screen: what is in it, and what it shows. What its buttons do is in panel.js.

import { CONSENSUS, DISAGREEMENT, EDITED } from './proposals.js';

/** @typedef {''|'error'|'warning'|'done'} MessageKind */
/**
 * @typedef {object} Actions
 * @property {() => void} runOrCancel
 * @property {() => void} acceptSlice
 * @property {() => void} submitSlices
 * @property {() => void} submitVolume
 * @property {() => void} next
 * @property {() => void} train
 * @property {(show: string) => void} show
 * @property {(index: number) => void} jumpTo
 * @property {(positive: boolean) => void} takePoints
 * @property {() => void} clearPoints
 */
/**
 * What the panel shows, apart from messages.
 * @typedef {object} Shown
 * @property {boolean} hasSeries
 * @property {boolean} isRunning
 * @property {boolean} isBusy
 * @property {boolean} canAccept
 * @property {number} accepted slices that wait to be submitted
 * @property {string} show what is shown; '' for nothing
 * @property {readonly string[]} shows what can be shown
 * @property {boolean} listens whether the model draws by points
 * @property {boolean|null} sign of the points that are placed; null for none
 * @property {number} points that there are
 */

const INSIDE = 'Place points inside of the structure; the proposals are drawn given them';
const OUTSIDE = 'Place points outside of the structure; the proposals are drawn given them';
const DEAF = 'This model chooses among its proposals and does not draw by points.';
const NOT_AXIAL = 'The slices of this series run along another axis: show it in an axial view (MPR) and scroll there.';
/** @type {Record<string, string>} */
const NAMES = { [CONSENSUS]: 'Consensus', [DISAGREEMENT]: 'Where they differ', [EDITED]: 'Edited' };

/**
 * An element: make('button', {className, onclick, ...}, ...children); names with "-" and role become attributes.
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, unknown>} properties
 * @param {...(Node|string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes('-') || name === 'role' || name === 'list') element.setAttribute(name, String(value));
    else Object.assign(element, { [name]: value });
  }
  element.append(...children);
  return element;
}

export class View {
  /**
   * @param {readonly import('../answers.d.ts').Prompt[]} prompts
   * @param {number} maxProposals
   * @param {Actions} actions
   */
  constructor(prompts, maxProposals, actions) {
    this.actions = actions;
    this.prompt = make('input', { type: 'text', placeholder: 'liver and spleen', title: 'Name one or more structures', autocomplete: 'off', list: 'progidiff-prompts', 'aria-label': 'Prompt' });
    this.count = make('input', { type: 'number', min: 1, max: maxProposals, value: 4, title: 'How many proposals (K)', 'aria-label': 'Number of proposals' });
    this.run = make('button', { type: 'submit', className: 'progidiff-main', textContent: 'Propose' });
    this.progress = make('progress', { max: 100, value: 0, hidden: true });
    this.message = make('output', { className: 'progidiff-message' });
    this.choices = make('span', { className: 'progidiff-strip' });
    this.version = make('span', { className: 'progidiff-version', title: 'Model and adapter that the proposals come from' });
    this.training = make('span', { className: 'progidiff-version' });
    this.strip = make('div', { className: 'progidiff-strip', role: 'toolbar' });
    this.disputed = make('div', { className: 'progidiff-strip' });
    this.acceptSlice = make('button', { textContent: 'Accept this slice', onclick: actions.acceptSlice });
    this.submit = make('button', { className: 'progidiff-main', textContent: 'Submit', onclick: actions.submitSlices });
    this.acceptAll = make('button', { textContent: 'Accept volume', onclick: actions.submitVolume });
    this.next = make('button', { textContent: 'Next sample', onclick: actions.next });
    this.train = make('button', { textContent: 'Train', onclick: actions.train });
    this.inside = make('button', { type: 'button', textContent: '+ points', onclick: () => actions.takePoints(true) });
    this.outside = make('button', { type: 'button', textContent: '− points', onclick: () => actions.takePoints(false) });
    this.clear = make('button', { type: 'button', textContent: 'Remove points', onclick: actions.clearPoints, hidden: true });
    const words = prompts.flatMap(({ structure, synonyms = [] }) => [structure, ...synonyms]);
    const list = make('datalist', { id: 'progidiff-prompts' }, ...words.map((word) => make('option', { value: word })));
    this.root = make('section', { id: 'progidiff-panel', 'aria-label': 'Proposals' }, this.#makeForm(), this.#makeRow(), list);
    this.#place();
  }

  #makeForm() {
    /** @param {Event} event */
    const onsubmit = (event) => {
      event.preventDefault();
      this.actions.runOrCancel();
    };
    const name = make('strong', { textContent: 'ProGiDiff' });
    return make('form', { className: 'progidiff-row', onsubmit }, name, this.prompt, this.count, this.run, this.inside, this.outside, this.clear, this.progress, this.message, this.choices, this.training, this.version);
  }

  #makeRow() {
    const space = make('span', { className: 'progidiff-space' });
    return make('div', { className: 'progidiff-row' }, this.strip, this.disputed, space, this.acceptSlice, this.submit, this.acceptAll, this.next, this.train);
  }

  /** Put it below the viewer, which ends where the panel begins, also when that takes another line. */
  #place() {
    // The viewer's hot keys must not hear what is typed here.
    for (const type of ['keydown', 'keyup', 'keypress']) this.root.addEventListener(type, (event) => event.stopPropagation());
    document.body.append(this.root);
    new ResizeObserver(() => {
      document.body.style.setProperty('--progidiff-height', `${this.root.offsetHeight}px`);
      window.dispatchEvent(new Event('resize'));
    }).observe(this.root);
  }

  /**
   * @param {string} text
   * @param {MessageKind} kind
   */
  say(text, kind = '') {
    this.message.textContent = text;
    this.message.dataset.kind = kind;
    this.message.title = text;
    this.choices.replaceChildren();
  }

  /**
   * Ask something, with a button for each answer.
   * @param {string} text
   * @param {readonly (readonly [answer: string, act: () => void])[]} answers
   */
  ask(text, answers) {
    this.say(text, 'warning');
    /** @type {(act: () => void) => () => void} */
    const after = (act) => () => (this.say(''), act());
    this.choices.replaceChildren(...answers.map(([answer, act]) => make('button', { type: 'button', textContent: answer, onclick: after(act) })));
  }

  /** @param {number} percent of the prompt that runs */
  showProgress(percent) {
    this.progress.hidden = false;
    this.progress.value = percent;
  }

  /**
   * @param {Shown} shown
   * @param {(show: string) => boolean} isReady
   */
  draw({ hasSeries, isRunning, isBusy, canAccept, accepted, show, shows, listens, sign, points }, isReady) {
    for (const [button, positive, title] of /** @type {const} */ ([[this.inside, true, INSIDE], [this.outside, false, OUTSIDE]])) {
      button.disabled = !hasSeries || !listens;
      button.title = listens ? title : DEAF;
      button.setAttribute('aria-pressed', String(sign === positive));
    }
    this.clear.hidden = !points;
    this.clear.textContent = points === 1 ? 'Remove the point' : `Remove ${points} points`;
    this.run.textContent = isRunning ? 'Cancel' : 'Propose';
    this.run.disabled = !hasSeries || (isBusy && !isRunning);
    this.progress.hidden = !isRunning;
    this.acceptSlice.disabled = !canAccept;
    this.acceptAll.disabled = !canAccept;
    this.submit.disabled = !accepted || isBusy;
    this.submit.textContent = accepted ? `Submit ${accepted} slices` : 'Submit';
    this.next.disabled = this.train.disabled = isBusy;
    this.strip.replaceChildren(
      ...shows.map((name) => {
        const onclick = () => this.actions.show(name);
        const button = make('button', { textContent: NAMES[name] ?? name, disabled: isBusy && !isRunning, onclick, 'aria-pressed': name === show });
        button.dataset.show = name;
        return button;
      }),
    );
    this.markReady(isReady);
  }

  /**
   * Mark which proposals are here already, so that showing them waits for nothing.
   * @param {(show: string) => boolean} isReady
   */
  markReady(isReady) {
    for (const button of this.strip.querySelectorAll('button')) button.dataset.ready = String(isReady(button.dataset.show ?? ''));
  }

  /**
   * Axial slices to go to. A series along another axis shows none of them as it is, so there they are named only.
   * @param {readonly (readonly [z: number, disagreement: number])[]} slices
   * @param {readonly number[]|null} axial the axial index of every slice of the series
   */
  drawDisputed(slices, axial, heading = 'Most disputed slices') {
    const buttons = slices.map(([z, value]) => {
      const index = axial ? axial.indexOf(z) : -1;
      const title = index < 0 ? NOT_AXIAL : `Slice ${z + 1} from the feet, as on the review page; disagreement ${Number(value).toFixed(2)}`;
      const button = make('button', { textContent: String(z + 1), title, disabled: index < 0, onclick: () => this.actions.jumpTo(index) });
      button.style.setProperty('--heat', String(Math.min(1, value)));
      return button;
    });
    const name = axial ? make('span', { textContent: heading }) : make('span', { textContent: `${heading} (axial)`, title: NOT_AXIAL });
    this.disputed.replaceChildren(...(buttons.length ? [name, ...buttons] : []));
  }
}
