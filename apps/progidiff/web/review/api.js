// Talking to the server: one place that knows addresses, and that turns every failure into a sentence.

const BASE = new URL("../", document.baseURI);

/** Something went wrong; `kind` is "offline", "login", "forbidden", "conflict", "busy", "gone" or "refused". */
export class ApiError extends Error {
  constructor(message, kind, suggestions = []) {
    super(message);
    this.kind = kind;
    this.suggestions = suggestions;
  }
}

const KINDS = { 401: "login", 403: "forbidden", 404: "gone", 409: "conflict", 429: "busy", 503: "busy" };

/** Called with true when the server answers and with false when it does not. */
let onReachable = () => {};
export function watchConnection(callback) {
  onReachable = callback;
}

async function send(path, options = {}) {
  let response;
  try {
    response = await fetch(new URL(path, BASE), { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    onReachable(false);
    throw new ApiError("The server does not answer. Your decisions are kept in this browser; submit them when it is back.", "offline");
  }
  onReachable(true);
  if (response.ok) return response;
  let answer = {};
  try {
    answer = await response.json();
  } catch {
    // A proxy's error page, or a request cut off: the status has to do.
  }
  const detail = typeof answer.detail === "string" ? answer.detail : `The server answers ${response.status} without a reason.`;
  throw new ApiError(detail, KINDS[response.status] ?? "refused", answer.suggestions ?? []);
}

export async function getJson(path, options) {
  return (await send(path, options)).json();
}

export async function getBytes(path, options) {
  return (await send(path, options)).arrayBuffer();
}

export async function postJson(path, body, method = "POST") {
  const options = { method, headers: { "Content-Type": "application/json" }, body: body === undefined ? undefined : JSON.stringify(body) };
  return (await send(path, options)).json();
}

const name = encodeURIComponent;

export const describeImage = (image) => getJson(`progidiff/review/${name(image)}`);
export const getSlice = (image, z, signal) => getBytes(`progidiff/review/${name(image)}/slices/${z}`, { signal });
export const getMasks = (image, z, source, signal) =>
  getBytes(`progidiff/review/${name(image)}/masks/${z}?${new URLSearchParams(source)}`, { signal });
export const getLabel = (image, z, signal) => getBytes(`progidiff/review/${name(image)}/label/${z}`, { signal });
export const describeProposals = (image, key) => getJson(`progidiff/proposals/${name(image)}?proposals=${key}`);
export const submitDecisions = (image, decisions) => postJson(`progidiff/review/${name(image)}`, decisions);
export const undoSave = (image) => postJson(`progidiff/annotations/${name(image)}/undo`);
export const skipImage = (image, reason) => postJson(`progidiff/annotations/${name(image)}/skip?${new URLSearchParams({ reason })}`);
export const listPrompts = () => getJson("progidiff/prompts");
export const getJob = (id) => getJson(`progidiff/jobs/${name(id)}`);
export const cancelJob = (id) => postJson(`progidiff/jobs/${name(id)}`, undefined, "DELETE");

/** Images to review, the most disputed first; every image of the datastore where the server has no queue. */
export async function listQueue() {
  try {
    return await getJson("progidiff/queue");
  } catch (error) {
    if (error.kind !== "gone") throw error;
    const { objects } = await getJson("datastore/?output=all");
    return Object.keys(objects).map((image) => ({ image, slices: [], reason: "", state: objects[image].labels?.final ? "labelled" : "" }));
  }
}

/** Ask for proposals; answers when all are there. */
export async function runPrompt(image, params) {
  const form = new FormData();
  form.set("params", JSON.stringify(params));
  const query = new URLSearchParams({ image, output: "json" });
  return (await send(`infer/progidiff?${query}`, { method: "POST", body: form })).json();
}

export const getTraining = () => getJson("progidiff/training");
export const getVersions = () => getJson("progidiff/versions");
export const getScoring = () => getJson("progidiff/scoring");

export const loginAddress = () => new URL(`progidiff/login?next=${name(location.pathname + location.hash)}`, BASE).href;
