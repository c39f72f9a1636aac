// Asking for proposals: the prompt, the job that answers it, and what it has so far.

import * as api from "./api.js";
import { clearNotice, element, find, findInput, notice, toast } from "./dom.js";
import { report } from "./failures.js";
import { countStructures } from "./masks.js";
import { goToNext } from "./moving.js";
import { addResult, showParts } from "./opening.js";
import { readQuestion } from "./picture.js";
import { describeProgress } from "./progress.js";
import { isDrawnHere, state, store } from "./state.js";
import { giveUpWaiting, startWaiting } from "./timing.js";
import { Work } from "./work.js";

/** @typedef {import("./session.js").ImageSession} ImageSession */
/** @typedef {import("./state.js").RunningJob} RunningJob */
/** @typedef {import("./state.js").Progress} Progress */

const POLL_MS = 150;
const [FEWEST, USUAL, MOST] = [2, 4, 16];

/** @param {Event} [event] of the form */
export async function runPrompt(event) {
  event?.preventDefault();
  const { session } = state;
  const prompt = findInput(session?.picture ? "sentence" : "prompt").value.trim();
  if (!session || state.job || !(prompt || session.picture)) return;
  find("prompt-error").hidden = true;
  try {
    const answer = await runJob(session, { id: `review-${Math.random().toString(36).slice(2, 12)}`, prompt, count: readCount() });
    if (!answer || state.session !== session) return;
    await addResult(session, answer.proposals, true);
    if (session.picture) session.dropUnused();
    tellResult(prompt, answer);
  } catch (error) {
    if (["refused", "busy", "conflict"].includes(api.kindOf(error))) showPromptError(api.messageOf(error), error instanceof api.ApiError ? error.suggestions : []);
    else report(error);
  }
}

/** How many proposals are asked for. */
export const readCount = () => Math.min(MOST, Math.max(FEWEST, Number(findInput("count").value) || USUAL));

/**
 * A job: what it asks, and the structures that it is about where they are known before it answers; else they get their names then.
 * @typedef {{id: string, prompt: string, count: number, edits?: import("../answers.d.ts").Edit[], names?: string[]}} Asked
 */

/**
 * Ask, and show what the job has so far while it runs.
 * @param {ImageSession} session
 * @param {Asked} asked
 * @returns {Promise<import("../answers.d.ts").Proposed|import("../answers.d.ts").ProposedPicture|null>} null if another image was opened meanwhile
 */
export async function runJob(session, { id, prompt, count, edits = [], names = [] }) {
  startWaiting("first-proposal");
  store.set({ job: { id, image: session.image, count, names, progress: { state: "queued", position: 0, percent: 0 } } });
  const timer = setInterval(() => watchJob(id, session), POLL_MS);
  try {
    const steering = edits.length ? { edits } : {};
    const asked = { num_proposals: count, job_id: id };
    const answer = session.picture
      ? await api.runPrompt("textdiff", session.image, { ...readQuestion(), ...asked })
      : await api.runPrompt("progidiff", session.image, { ...asked, prompt, first_slice: state.z, ...steering });
    if (state.session !== session) return null;
    await session.refresh();
    store.touch("info");
    return answer;
  } catch (error) {
    giveUpWaiting("first-proposal");
    if (session === state.session && session.job === id) dropUnfinished(session);
    throw error;
  } finally {
    clearInterval(timer);
    forget(id);
  }
}

/**
 * @param {string} prompt
 * @param {import("../answers.d.ts").Proposed|import("../answers.d.ts").ProposedPicture} answer
 */
function tellResult(prompt, answer) {
  const isFound = Object.values(answer.structures).some((found) => ("present" in found ? found.present : found.consensus_pixels > 0));
  if (!isFound) toast(prompt ? `Nothing found for “${prompt}” in this image.` : "Nothing found in this image.");
  if (state.session?.picture) {
    // Said again with every answer: beside the sentence, where it stands in nobody's way.
    store.set({ notes: answer.warnings });
    return;
  }
  if (answer.warnings.length) notice(answer.warnings.join(" "), "", [["Understood", clearNotice]]);
  if (!isDrawnHere()) goToNext();
}

/**
 * The slices that were ready are no result: back to what was shown before.
 * @param {ImageSession} session
 */
function dropUnfinished(session) {
  session.dropJob();
  if (state.work) session.bind(state.work.keys);
  showParts(session);
}

let isAsking = false;

/**
 * Progress, and the proposals of the slice that is looked at as soon as they are there.
 * @param {string} id
 * @param {ImageSession} session
 */
async function watchJob(id, session) {
  if (isAsking || state.job?.id !== id) return;
  isAsking = true;
  try {
    const progress = await api.getJob(id);
    follow(id, progress);
    if (progress.state === "running" && state.session === session) await useUnfinished(id, session);
  } catch (error) {
    if (api.kindOf(error) !== "gone") follow(id, { problem: api.messageOf(error), percent: 0 });
  } finally {
    isAsking = false;
  }
}

/**
 * @param {string} id
 * @param {Progress} progress
 */
function follow(id, progress) {
  if (state.job?.id === id) store.set({ job: { ...state.job, progress } });
}

/** @param {string} id */
function forget(id) {
  if (state.job?.id === id) store.set({ job: null });
}

/**
 * The first slices of a job become the result that is shown; from then on the stage fetches what is there.
 * @param {string} id
 * @param {ImageSession} session
 */
async function useUnfinished(id, session) {
  if (session.job === id) return;
  const packed = await api.getMasks(session.image, state.z, { job: id });
  if (!packed.byteLength || state.job?.id !== id || state.session !== session) return;
  const known = state.job.names ?? [];
  const names = Array.from({ length: countStructures(packed) }, (_, index) => known[index] ?? `structure ${index + 1}`);
  if (known.length) session.bind(Object.fromEntries(Object.entries(state.work?.keys ?? {}).filter(([name]) => !known.includes(name))));
  session.useJob(id, names, state.job.count);
  store.set({ work: state.work ?? new Work(session.image), structure: names[0], included: new Set([...state.included, ...names]) });
  store.touch("result");
}

export function cancelJob() {
  if (state.job) api.cancelJob(state.job.id).catch(report);
}

export function renderJob() {
  const { job } = state;
  find("job").hidden = !job;
  find("prompt-form").classList.toggle("busy", Boolean(job));
  if (!job) return;
  find("job-progress", HTMLProgressElement).value = job.progress.percent ?? 0;
  find("job-text").textContent = describeProgress(job.progress, state.session?.picture ? "tiles" : "slices");
}

/**
 * @param {string} text
 * @param {readonly string[]} suggestions
 */
function showPromptError(text, suggestions = []) {
  const tries = suggestions.map((name) =>
    element("button", { type: "button", on: { click: () => ((findInput("prompt").value = name), runPrompt()) } }, name),
  );
  find("prompt-error").replaceChildren(text, ...tries);
  find("prompt-error").hidden = false;
}

/** The names that the box completes. */
export async function fillPrompts() {
  try {
    const [prompts, { structures }] = await Promise.all([api.listPrompts(), api.listStructures()]);
    const taught = structures.filter(({ is_own: isOwn, is_known: known }) => isOwn && known).map(({ name }) => name);
    const names = new Set([...prompts.flatMap(({ structure, synonyms }) => [structure, ...synonyms.slice(0, 3)]), ...taught]);
    find("prompt-list").replaceChildren(...["all", ...names].map((name) => element("option", { value: name })));
  } catch (error) {
    report(error);
  }
}
