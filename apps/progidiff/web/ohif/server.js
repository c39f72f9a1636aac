// The server, as the panel needs it. Errors become `ServerError` with a text for people.

/** @typedef {import('../answers.d.ts').Refusal} Refusal */
/** @typedef {import('./masks.js').Mask} Mask */

export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0 if there was no answer
   * @param {string[]} suggestions
   */
  constructor(message, status = 0, suggestions = []) {
    super(message);
    this.status = status;
    this.suggestions = suggestions;
  }
}

/**
 * Whether a name was asked back that may be meant as it stands.
 * @param {unknown} error
 * @returns {error is ServerError}
 */
export const saysNear = (error) => error instanceof ServerError && error.suggestions.length > 0 && / is nearly /.test(error.message);

// Behind a proxy with a sub-path the server's addresses begin there; this file lies three folders below.
const BASE = new URL('../../../', import.meta.url);

const GONE = 'The server does not answer. What was saved is safe, and what you accepted here stays in this tab. Try again when it is back.';

/**
 * @param {string} path
 * @param {RequestInit} options
 */
async function ask(path, options = {}) {
  /** @type {Response} */
  let response;
  try {
    response = await fetch(new URL(`.${path}`, BASE), { credentials: 'same-origin', ...options });
  } catch (error) {
    if (error instanceof Error && error.name === 'AbortError') throw error;
    throw new ServerError(GONE);
  }
  if (response.ok) return response;
  /** @type {Refusal} */
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) {
    const login = new URL(`./progidiff/login?next=${encodeURIComponent(location.pathname + location.search)}`, BASE).href;
    throw new ServerError(`Your session has ended. Log in at ${login} in another tab, then go on here; what you accepted stays in this tab.`, 401);
  }
  const detail = typeof answer.detail === 'string' ? answer.detail : `The server answered ${response.status} to ${path.split('?')[0]}.`;
  throw new ServerError(detail, response.status, answer.suggestions || []);
}

/**
 * @param {string} path
 * @param {RequestInit} options
 */
const askJson = async (path, options = {}) => (await ask(path, options)).json();

/**
 * @param {string} path
 * @param {string} method
 * @param {object} value
 */
const sendJson = (path, method, value) =>
  askJson(path, { method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(value) });

/**
 * @param {object} params
 * @param {Blob} [label]
 */
function makeForm(params, label) {
  const form = new FormData();
  form.append('params', JSON.stringify(params));
  if (label) form.append('label', label, 'label.nrrd');
  return form;
}

const name = encodeURIComponent;

/** @type {() => Promise<import('../answers.d.ts').Prompt[]>} */
export const listPrompts = () => askJson('/progidiff/prompts');

/** What this folder labels. @type {() => Promise<import('../answers.d.ts').Structures>} */
export const listStructures = () => askJson('/progidiff/structures');

/** @type {() => Promise<import('../answers.d.ts').ServerInfo>} */
export const getInfo = () => askJson('/info/');

/** @type {(image: string) => Promise<import('../answers.d.ts').SeriesInfo>} */
export const describeImage = (image) => askJson(`/progidiff/ohif/images/${name(image)}`);

/** @type {(series: string, params: object) => Promise<import('../answers.d.ts').Proposed>} */
export const propose = (series, params) => askJson(`/infer/progidiff?image=${name(series)}&output=json`, { method: 'POST', body: makeForm(params) });

/** @type {(id: string) => Promise<import('../answers.d.ts').Job>} */
export const getJob = (id) => askJson(`/progidiff/jobs/${id}`);

/** @type {(id: string) => Promise<import('../answers.d.ts').Job>} */
export const cancelJob = (id) => askJson(`/progidiff/jobs/${id}`, { method: 'DELETE' });

/**
 * One proposal.
 * @param {string} series
 * @param {{show: string, proposals: string}|{show: string, job: string}} query
 * @returns {Promise<Mask>}
 */
export async function getMask(series, query) {
  const response = await ask(`/progidiff/ohif/masks/${name(series)}?${new URLSearchParams(query)}`);
  /** @param {string} header */
  const read = (header) => (response.headers.get(header) ?? '').split(',').map(Number);
  const [z0, z1, y0, y1, x0, x1] = read('X-Box');
  const [depth, rows, columns] = read('X-Shape');
  return { box: [z0, z1, y0, y1, x0, x1], shape: [depth, rows, columns], voxels: new Uint8Array(await response.arrayBuffer()) };
}

/** @type {(series: string, file: Blob, params: object) => Promise<import('../answers.d.ts').Saved>} */
export const saveLabel = (series, file, params) =>
  askJson(`/datastore/label?image=${name(series)}&tag=final`, { method: 'PUT', body: makeForm(params, file) });

/** @type {(client: string) => Promise<import('../answers.d.ts').NextSample>} */
export const pickNext = (client) => sendJson('/activelearning/proposal_disagreement', 'POST', { client_id: client });

/** @type {() => Promise<unknown>} */
export const startTraining = () => sendJson('/train/progidiff_adapt', 'POST', {});

/**
 * The training under way or the last one.
 * @type {() => Promise<import('../answers.d.ts').Training>}
 */
export const getTraining = () => askJson('/progidiff/training?limit=0');
