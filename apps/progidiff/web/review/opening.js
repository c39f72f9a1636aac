// Opening an image, and the result of it that is shown.

import { messageOf } from "./api.js";
import { clearNotice, find, notice } from "./dom.js";
import { report } from "./failures.js";
import { presetsFor } from "./keys.js";
import { goToDisputed } from "./moving.js";
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
      ...{ session, work: null, structure: "", z: Math.floor(session.depth / 2), window, preset: name },
      ...{ mode: "pick", compared: null, zoom: 1, center: null, isReadOnly: false, isSavedShown: false },
    });
    history.replaceState(null, "", `#${new URLSearchParams({ image })}`);
    tabs.open(image);
    tellWarnings();
    await openResult(session, loadWork(image)); // The picture does not wait for it.
    if (ticket !== opening) return;
    goToDisputed();
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
 * Show the result that unsent decisions speak about, or the newest one.
 * @param {ImageSession} session
 * @param {Kept} unsent
 */
export async function openResult(session, unsent = null) {
  const kept = session.info.kept.map(({ proposals }) => proposals);
  if (unsent?.work.hasDecisions) {
    if (kept.includes(unsent.work.proposals)) {
      await useResult(session, unsent.work.proposals, unsent.work);
      notice(`Decisions on this image from ${unsent.time.toLocaleString()} were not sent. They are here again.`, "", [
        ["Keep", clearNotice],
        ["Discard", discardWork],
      ]);
      return;
    }
    notice("Decisions on this image were not sent, and the proposals they speak about are no longer kept. Send the same prompt again to get them back.", "", [
      ["Discard them", discardWork],
    ]);
  }
  if (kept.length) await useResult(session, kept[0]);
}

/**
 * Show a kept result.
 * @param {ImageSession} session
 * @param {string} key
 * @param {Work} work
 * @param {boolean} isOther whether it begins with the first structure that was found, whatever was looked at before
 */
export async function useResult(session, key, work = new Work(session.image, key), isOther = false) {
  const { structures, summary } = await session.useProposals(key);
  if (session !== state.session) return;
  const isKnown = !isOther && structures.includes(state.structure);
  const found = structures.find((name) => summary.structures[name].present) ?? structures[0];
  store.set({ work, included: new Set(structures), structure: isKnown ? state.structure : found });
  store.touch("result");
}

function discardWork() {
  const { session } = state;
  if (!session) return;
  forgetWork(session.image);
  clearNotice();
  if (session.result?.key) store.set({ work: new Work(session.image, session.result.key) });
  store.touch("decisions");
}

function takeImage() {
  const { session } = state;
  if (!session) return;
  const kept = loadWork(session.image);
  tabs.take(session.image);
  store.set({ isReadOnly: false });
  if (kept && kept.work.proposals === session.result?.key) store.set({ work: kept.work });
  clearNotice();
}
