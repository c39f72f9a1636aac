// Opening an image, and the result of it that is shown.

import { messageOf } from "./api.js";
import { clearNotice, find, notice, toast } from "./dom.js";
import { report } from "./failures.js";
import { recallResults, rememberResults } from "./kept.js";
import { presetsFor } from "./keys.js";
import { goToFirst } from "./moving.js";
import { ImageSession } from "./session.js";
import { showEmpty } from "./stage.js";
import { state, store } from "./state.js";
import { TabGuard } from "./tabs.js";
import { startWaiting } from "./timing.js";
import { Work, forgetWork, loadWork } from "./work.js";

/** @typedef {ReturnType<typeof loadWork>} Kept */

const tabs = new TabGuard((image) => {
  if (image !== state.session?.image) return;
  store.set({ isReadOnly: true });
  notice(`${image} is open in another tab of this browser. Here it can be looked at only, so that neither tab overwrites the other's decisions.`, "", [
    ["Use it here", takeImage],
  ]);
});

/** @type {(image: string) => readonly import("../answers.d.ts").QueueSlice[]} */
let chosenSlices = () => [];
/**
 * Ask this which slices of an image the strategy chose.
 * @param {typeof chosenSlices} ask
 */
export function askForSlices(ask) {
  chosenSlices = ask;
}

/** Counts openings: an answer that comes after the next image was chosen is too late. */
let opening = 0;

/** @param {string} image */
export async function openImage(image) {
  startWaiting("first-pixels");
  const ticket = (opening += 1);
  find("queue").classList.remove("open");
  store.set({ job: null }); // Nobody waits for it any more.
  clearNotice();
  showEmpty(`Opening ${image} …`);
  try {
    const session = await ImageSession.open(image);
    if (ticket !== opening) return;
    const [{ name, window }] = presetsFor(session.info);
    store.set({
      ...{ session, work: null, structure: session.classes[0] ?? "", included: new Set(), walk: chosenSlices(image), z: Math.floor(session.depth / 2), window, preset: name },
      ...{ mode: "pick", compared: null, zoom: 1, center: null, isReadOnly: false, isSavedShown: false },
    });
    history.replaceState(null, "", `#${new URLSearchParams({ image })}`);
    tabs.open(image);
    tellWarnings();
    await openResults(session, loadWork(image)); // The picture does not wait for it.
    if (ticket !== opening) return;
    goToFirst();
    find("view").focus({ preventScroll: true });
  } catch (error) {
    if (ticket !== opening) return;
    store.set({ session: null });
    showEmpty(messageOf(error));
    report(error);
  }
}

/** What is to be known of where the image lies, if its header can be read in two ways or says too little. */
export function tellWarnings() {
  const warnings = state.session?.info.geometry.warnings ?? [];
  if (warnings.length) notice(warnings.join(" "), "", [["Understood", clearNotice]]);
}

export function openFromAddress() {
  const image = new URLSearchParams(location.hash.slice(1)).get("image");
  if (image && image !== state.session?.image) openImage(image);
}

/**
 * Show the results that unsent decisions speak about and those that were shown last, or the newest one.
 * @param {ImageSession} session
 * @param {Kept} unsent
 */
async function openResults(session, unsent = null) {
  const kept = session.info.kept.map(({ proposals }) => proposals);
  const work = unsent?.work.hasDecisions ? unsent.work : null;
  const needed = work ? [...new Set(work.decided.map((name) => work.keyOf(name)))] : [];
  const isWhole = needed.every((key) => kept.includes(key));
  const wanted = [...new Set([...recallResults(session.image), ...(isWhole ? needed : [])])].filter((key) => kept.includes(key));
  if (work && isWhole) store.set({ work });
  for (const key of wanted.length ? wanted : kept.slice(0, 1)) await addResult(session, key);
  if (work && unsent) tellUnsent(isWhole, unsent.time);
}

/**
 * @param {boolean} isWhole whether all proposals are still kept
 * @param {Date} time
 */
function tellUnsent(isWhole, time) {
  if (isWhole) {
    notice(`Decisions on this image from ${time.toLocaleString()} were not sent. They are here again.`, "", [
      ["Keep", clearNotice],
      ["Discard", discardWork],
    ]);
  } else {
    notice("Decisions on this image were not sent, and the proposals they speak about are no longer kept. Send the same prompt again to get them back.", "", [
      ["Discard them", discardWork],
    ]);
  }
}

/**
 * Show a kept result beside those that are shown already. A structure that they share goes by the new one, unless something of it is accepted.
 * @param {ImageSession} session
 * @param {string} key
 * @param {boolean} isAsked whether somebody asked for it, and looks at what it found
 */
export async function addResult(session, key, isAsked = false) {
  const { structures, summary } = await session.useProposals(key);
  if (session !== state.session) return;
  const work = state.work ?? new Work(session.image);
  const held = work.bind(structures, key);
  session.bind(work.keys);
  rememberResults(session.image, session.keys);
  const isKnown = !isAsked && Boolean(session.result?.structures.includes(state.structure));
  const found = structures.find((name) => summary.structures[name].present) ?? structures[0];
  const known = session.result?.structures ?? [];
  const included = new Set([...state.included, ...structures].filter((name) => known.includes(name)));
  store.set({ work, included, structure: isKnown ? state.structure : found });
  store.touch("result");
  if (held.length && isAsked) toast(`${held.join(", ")}: what is accepted is of other proposals. Submit or undo it to see the new ones.`, "", 6);
}

/**
 * Show a result in place of an earlier one that it comes from.
 * @param {ImageSession} session
 * @param {string} key
 * @param {string} former "" if there was none
 */
export async function replaceResult(session, key, former) {
  await addResult(session, key, true);
  if (!former || former === key || session !== state.session) return;
  session.dropProposals(former);
  rememberResults(session.image, session.keys);
  store.touch("result");
}

/**
 * Show a kept result no longer; its structures go by another one that has them, or leave the list.
 * @param {ImageSession} session
 * @param {string} key
 */
export function removeResult(session, key) {
  const { work } = state;
  const held = work?.decided.filter((name) => work.keyOf(name) === key) ?? [];
  if (held.length) {
    toast(`${held.join(", ")} of these proposals is accepted and not sent. Submit or undo it first.`, "bad");
    return;
  }
  session.dropProposals(key);
  showParts(session);
}

/**
 * Show what is left after a result is gone.
 * @param {ImageSession} session
 */
export function showParts(session) {
  const { result } = session;
  for (const part of result?.parts ?? []) state.work?.bind(part.structures.filter((name) => result?.owners[name] === part), part.key);
  rememberResults(session.image, session.keys);
  const known = result?.structures ?? [];
  const structure = known.includes(state.structure) ? state.structure : (known[0] ?? "");
  store.set({ structure, included: new Set([...state.included].filter((name) => known.includes(name))) });
  store.touch("result");
}

function discardWork() {
  const { session } = state;
  if (!session) return;
  forgetWork(session.image);
  clearNotice();
  const work = new Work(session.image);
  for (const part of session.result?.parts ?? []) work.bind(part.structures, part.key);
  session.bind(work.keys);
  store.set({ work });
  store.touch("decisions", "result");
}

function takeImage() {
  const { session } = state;
  if (!session) return;
  const kept = loadWork(session.image);
  tabs.take(session.image);
  store.set({ isReadOnly: false });
  const isShown = kept?.work.decided.every((name) => session.keys.includes(kept.work.keyOf(name)));
  if (kept && isShown) {
    session.bind(kept.work.keys);
    store.set({ work: kept.work });
    store.touch("result");
  }
  clearNotice();
}
