// Talking to the server: one place that knows addresses, and that turns every failure into a sentence.

import { sayOnPage } from "./words.js";

/** @typedef {import("../answers.d.ts").Refusal} Refusal */
/** @typedef {"offline"|"login"|"forbidden"|"conflict"|"busy"|"gone"|"refused"} FailureKind */

const BASE = new URL("../", document.baseURI);

/** Something went wrong, and the message says what in words for people. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {FailureKind} kind
   * @param {string[]} suggestions
   */
  constructor(message, kind, suggestions = []) {
    super(message);
    this.kind = kind;
    this.suggestions = suggestions;
  }
}

/** @type {Record<number, FailureKind>} */
const KINDS = { 401: "login", 403: "forbidden", 404: "gone", 409: "conflict", 429: "busy", 503: "busy" };

/**
 * What kind of failure the server told of; "" if it is none of the server's.
 * @param {unknown} error
 * @returns {FailureKind|""}
 */
export const kindOf = (error) => (error instanceof ApiError ? error.kind : "");

/** @param {unknown} error */
export const messageOf = (error) => (error instanceof Error ? error.message : String(error));

/** @param {unknown} error */
export const isAborted = (error) => error instanceof Error && error.name === "AbortError";

/** @type {(isReachable: boolean) => void} */
let onReachable = () => {};
/**
 * Call back with true when the server answers and with false when it does not.
 * @param {(isReachable: boolean) => void} callback
 */
export function watchConnection(callback) {
  onReachable = callback;
}

/**
 * @param {string} path
 * @param {RequestInit} options
 */
async function send(path, options = {}) {
  /** @type {Response} */
  let response;
  try {
    response = await fetch(new URL(path, BASE), { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (isAborted(error)) throw error;
    onReachable(false);
    throw new ApiError("The server does not answer. Your decisions are kept in this browser; submit them when it is back.", "offline");
  }
  onReachable(true);
  if (response.ok) return response;
  /** @type {Refusal} */
  let answer = {};
  try {
    answer = await response.json();
  } catch {
    // A proxy's error page, or a request cut off: the status has to do.
  }
  throw toError(response.status, answer);
}

/**
 * @param {number} status
 * @param {Refusal} answer
 */
function toError(status, answer) {
  const detail = typeof answer.detail === "string" ? answer.detail : `The server answers ${status} without a reason.`;
  return new ApiError(sayOnPage(detail), KINDS[status] ?? "refused", answer.suggestions ?? []);
}

/** @param {string} path */
const getJson = async (path) => (await send(path)).json();

/** @param {string} path */
const getBytes = async (path) => (await send(path)).arrayBuffer();

/**
 * @param {string} path
 * @param {unknown} body
 */
async function postJson(path, body = undefined, method = "POST") {
  const options = { method, headers: { "Content-Type": "application/json" }, body: body === undefined ? undefined : JSON.stringify(body) };
  return (await send(path, options)).json();
}

const name = encodeURIComponent;

/** @type {(image: string) => Promise<import("../answers.d.ts").ImageInfo>} */
export const describeImage = (image) => getJson(`progidiff/review/${name(image)}`);
/** @type {(image: string) => Promise<import("../answers.d.ts").PictureInfo>} */
export const describePicture = (image) => getJson(`progidiff/pictures/${name(image)}`);
/** A picture in its colours, as a PNG. @type {(image: string) => Promise<Blob>} */
export const getPicture = async (image) => (await send(`progidiff/pictures/${name(image)}/pixels`)).blob();
/** @type {(image: string, sentence: string|null, former: string) => Promise<import("../answers.d.ts").Sentence>} */
export const saveSentence = (image, sentence, former) => postJson(`progidiff/pictures/${name(image)}/sentence`, { sentence, former }, "PUT");
/** int16 of an axial slice. @type {(image: string, z: number) => Promise<ArrayBuffer>} */
export const getSlice = (image, z) => getBytes(`progidiff/review/${name(image)}/slices/${z}`);
/** For `unpackMasks`; empty while a job has not come to this slice. @type {(image: string, z: number, source: {proposals: string}|{job: string}) => Promise<ArrayBuffer>} */
export const getMasks = (image, z, source) => getBytes(`progidiff/review/${name(image)}/masks/${z}?${new URLSearchParams(source)}`);
/** Label ids of an axial slice. @type {(image: string, z: number) => Promise<ArrayBuffer>} */
export const getLabel = (image, z) => getBytes(`progidiff/review/${name(image)}/label/${z}`);
/** For `readOverview`. @type {(image: string) => Promise<ArrayBuffer>} */
export const getOverview = (image) => getBytes(`progidiff/review/${name(image)}/overview`);
/** For `readOverviewMask`. @type {(image: string, proposals: string, structure: string) => Promise<ArrayBuffer>} */
export const getOverviewMask = (image, proposals, structure) =>
  getBytes(`progidiff/review/${name(image)}/overview/mask?${new URLSearchParams({ proposals, structure })}`);
/** @type {(image: string, key: string) => Promise<import("../answers.d.ts").KeptProposals>} */
export const describeProposals = (image, key) => getJson(`progidiff/proposals/${name(image)}?proposals=${key}`);
/** @type {(image: string, decisions: import("../answers.d.ts").Decisions) => Promise<import("../answers.d.ts").Submitted>} */
export const submitDecisions = (image, decisions) => postJson(`progidiff/review/${name(image)}`, decisions);
/** @type {(image: string) => Promise<import("../answers.d.ts").Undone>} */
export const undoSave = (image) => postJson(`progidiff/annotations/${name(image)}/undo`);
/** @type {(image: string, reason: string) => Promise<unknown>} */
export const skipImage = (image, reason) => postJson(`progidiff/annotations/${name(image)}/skip?${new URLSearchParams({ reason })}`);
/** @type {() => Promise<import("../answers.d.ts").Prompt[]>} */
export const listPrompts = () => getJson("progidiff/prompts");
/** @type {() => Promise<import("../answers.d.ts").Structures>} */
export const listStructures = () => getJson("progidiff/structures");
/** @type {(structure: import("../answers.d.ts").NewStructure) => Promise<import("../answers.d.ts").FolderStructure>} */
export const addStructure = (structure) => postJson("progidiff/structures", structure);
/** @type {(id: number, change: Partial<import("../answers.d.ts").NewStructure>) => Promise<import("../answers.d.ts").FolderStructure>} */
export const changeStructure = (id, change) => postJson(`progidiff/structures/${id}`, change);
/** @type {() => Promise<import("../answers.d.ts").Job[]>} */
export const listJobs = () => getJson("progidiff/jobs");
/** @type {(id: string) => Promise<import("../answers.d.ts").Job>} */
export const getJob = (id) => getJson(`progidiff/jobs/${name(id)}`);
/** @type {(id: string) => Promise<import("../answers.d.ts").Job>} */
export const cancelJob = (id) => postJson(`progidiff/jobs/${name(id)}`, undefined, "DELETE");
/** @type {() => Promise<import("../answers.d.ts").Training>} */
export const getTraining = () => getJson("progidiff/training");
/** @type {() => Promise<import("../answers.d.ts").Scoring>} */
export const getScoring = () => getJson("progidiff/scoring");
/** @type {() => Promise<import("../answers.d.ts").Adapter[]>} */
export const listVersions = () => getJson("progidiff/versions");
/** @type {(adapter: string, version: number) => Promise<import("../answers.d.ts").Served>} */
export const useVersion = (adapter, version) => postJson(`progidiff/versions/${name(adapter)}/${version}/use`);
/** @type {(adapter: string) => Promise<import("../answers.d.ts").Served>} */
export const rollBack = (adapter) => postJson(`progidiff/versions/${name(adapter)}/rollback`);

/**
 * Images with what is done on each, in the order of the strategy.
 * @param {{state: string, search: string, limit: number}} wanted
 * @returns {Promise<import("../answers.d.ts").Worklist>}
 */
export const listWork = ({ state, search, limit }) => getJson(`progidiff/worklist?${new URLSearchParams({ state, search, limit: String(limit) })}`);
/** @type {(image: string, isDone: boolean) => Promise<import("../answers.d.ts").Finished>} */
export const finishImage = (image, isDone) => postJson(`progidiff/annotations/${name(image)}/done?is_done=${isDone}`);
/** @type {(trainer: string, options: Record<string, unknown>) => Promise<unknown>} */
export const startTraining = (trainer, options) => postJson(`train/${trainer}`, options);
/** @type {(image: string) => Promise<import("../answers.d.ts").Readings>} */
export const getReadings = (image) => getJson(`progidiff/readings/${name(image)}`);
/** Label ids of a reading on an axial slice. @type {(image: string, user: string, z: number) => Promise<ArrayBuffer>} */
export const getReadingLabel = (image, user, z) => getBytes(`progidiff/readings/${name(image)}/${name(user)}/label/${z}`);
/** @type {(image: string, decision: {structures: Record<string, string>}) => Promise<unknown>} */
export const decideReadings = (image, decision) => postJson(`progidiff/readings/${name(image)}/decide`, decision);
/** Stop the training under way. */
export const stopTraining = () => postJson("train/", undefined, "DELETE");

/**
 * Add an image, and tell how much of it was sent.
 * @param {File} file
 * @param {(share: number) => void} onProgress from 0 to 1
 * @returns {Promise<{image: string}>}
 */
export function addImage(file, onProgress) {
  const form = new FormData();
  form.set("file", file);
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest(); // fetch does not tell how much was sent
    request.open("PUT", new URL("datastore/image", BASE));
    request.responseType = "json";
    request.upload.addEventListener("progress", ({ loaded, total }) => onProgress(total ? loaded / total : 1));
    request.addEventListener("error", () => reject(new ApiError("The server does not answer; nothing was added. Add it again when it is back.", "offline")));
    request.addEventListener("load", () => {
      if (request.status < 300) resolve(request.response);
      else reject(toError(request.status, request.response ?? {}));
    });
    request.send(form);
  });
}

/**
 * Ask for proposals; answers when all are there.
 * @template {"progidiff"|"textdiff"} M
 * @param {M} model for volumes, for pictures
 * @param {string} image
 * @param {Record<string, unknown> & {num_proposals: number, job_id: string}} params
 * @returns {Promise<M extends "textdiff" ? import("../answers.d.ts").ProposedPicture : import("../answers.d.ts").Proposed>}
 */
export async function runPrompt(model, image, params) {
  const form = new FormData();
  form.set("params", JSON.stringify(params));
  const query = new URLSearchParams({ image, output: "json" });
  return (await send(`infer/${model}?${query}`, { method: "POST", body: form })).json();
}

export const loginAddress = () => new URL(`progidiff/login?next=${name(location.pathname + location.hash)}`, BASE).href;
