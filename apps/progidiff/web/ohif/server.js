// The server, as the panel needs it. Errors become `ServerError` with a text for people.

export class ServerError extends Error {
  constructor(message, status = 0, suggestions = []) {
    super(message);
    this.status = status;
    this.suggestions = suggestions;
  }
}

const GONE = 'The server does not answer. What was saved is safe, and what you accepted here stays in this tab. Try again when it is back.';

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: 'same-origin', ...options });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ServerError(GONE);
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => ({}));
  if (response.status === 401) {
    const login = `/progidiff/login?next=${encodeURIComponent(location.pathname + location.search)}`;
    throw new ServerError(`Your session has ended. Log in at ${login} in another tab, then go on here; what you accepted stays in this tab.`, 401);
  }
  const detail = typeof answer.detail === 'string' ? answer.detail : `The server answered ${response.status} to ${path.split('?')[0]}.`;
  throw new ServerError(detail, response.status, answer.suggestions || []);
}

const askJson = async (path, options) => (await ask(path, options)).json();

const asForm = (fields) => {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields)) form.append(name, ...[].concat(value));
  return form;
};

const sendJson = (path, method, value) =>
  askJson(path, { method, headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(value) });

export const listPrompts = () => askJson('/progidiff/prompts');

export const getInfo = () => askJson('/info/');

export const describeImage = (image) => askJson(`/progidiff/ohif/images/${encodeURIComponent(image)}`);

export const propose = (series, params) =>
  askJson(`/infer/progidiff?image=${encodeURIComponent(series)}&output=json`, {
    method: 'POST',
    body: asForm({ params: JSON.stringify(params) }),
  });

export const getJob = (id) => askJson(`/progidiff/jobs/${id}`);

export const cancelJob = (id) => askJson(`/progidiff/jobs/${id}`, { method: 'DELETE' });

/** One proposal: {box: [z0, z1, y0, y1, x0, x1], shape: [Z, Y, X], voxels: Uint8Array of what is in the box}. */
export async function getMask(series, query) {
  const response = await ask(`/progidiff/ohif/masks/${encodeURIComponent(series)}?${new URLSearchParams(query)}`);
  const read = (name) => response.headers.get(name).split(',').map(Number);
  return { box: read('X-Box'), shape: read('X-Shape'), voxels: new Uint8Array(await response.arrayBuffer()) };
}

export const saveLabel = (series, file, params) =>
  askJson(`/datastore/label?image=${encodeURIComponent(series)}&tag=final`, {
    method: 'PUT',
    body: asForm({ params: JSON.stringify(params), label: [file, 'label.nrrd'] }),
  });

export const pickNext = (client) => sendJson('/activelearning/proposal_disagreement', 'POST', { client_id: client });

export const startTraining = () => sendJson('/train/progidiff_adapt', 'POST', {});

/** The training under way or the last one: {running, state, step, total, message, published, version}. */
export const getTraining = () => askJson('/progidiff/training?limit=0');
