// Sending what was decided, going back to an earlier save, and going on to the next image.

import * as api from "./api.js";
import { findDecidable } from "./deciding.js";
import { clearNotice, notice, toast } from "./dom.js";
import { toPainted } from "./drawing.js";
import { report } from "./failures.js";
import { openImage } from "./opening.js";
import { keep, renameDrawn } from "./painting.js";
import { isSentenceTyped, saveSentence } from "./picture.js";
import { countSlices } from "./slices.js";
import { state, store } from "./state.js";
import { loadStructures, messageSaysNear } from "./teaching.js";
import { sayOnPage } from "./words.js";
import { forgetWork } from "./work.js";

/** @typedef {import("./session.js").ImageSession} ImageSession */

/** @type {{load: () => Promise<void>, next: () => string|null}} */
let queue = { load: async () => {}, next: () => null };
/**
 * The list that a save changes, and that names the next image.
 * @param {typeof queue} list
 */
export function useQueue(list) {
  queue = list;
}

/** The saves of the last submission of this page. */
let lastSaves = { image: "", sequences: /** @type {number[]} */ ([]) };

/** Send what was decided and drawn, and the sentence of a picture before it. */
export const submit = () => send(false);

/** @param {boolean} confirm that names which are nearly known ones are meant as they stand */
async function send(confirm) {
  if (isSentenceTyped() && !state.isSubmitting && !(await saveSentence())) return;
  const found = findDecidable();
  if (!found?.work.hasDecisions || state.isSubmitting) return;
  const { session, work } = found;
  const { drawing } = state;
  const drawn = drawing?.listUnsent() ?? [];
  store.set({ isSubmitting: true });
  try {
    const [depth, height, width] = session.info.shape;
    const painted = toPainted(drawn, [depth, height, width]);
    const { saves } = await api.submitDecisions(session.image, { ...work.toDecisions(session.info.sequence), painted, confirm });
    forgetWork(session.image);
    drawing?.markSent(drawn);
    if (drawing) keep(drawing);
    lastSaves = { image: session.image, sequences: saves.filter(({ repeated }) => !repeated).map(({ sequence }) => sequence) };
    tellSaved(saves);
    if (state.session === session) {
      store.set({ work: work.next() });
      await refresh(session);
    }
    await Promise.all([queue.load(), loadStructures()]);
  } catch (error) {
    if (messageSaysNear(error)) askName(error, drawn);
    else await reportSubmit(error, session);
  } finally {
    store.set({ isSubmitting: false });
  }
}

/** @param {import("../answers.d.ts").Submitted["saves"]} saves */
function tellSaved(saves) {
  /** @type {(save: typeof saves[number]) => string} */
  const describe = ({ slices, structures }) => `${slices === null ? "the whole volume" : countSlices(slices.length)} of ${structures.join(", ")}`;
  const isRepeated = saves.every(({ repeated }) => repeated);
  const isPicture = Boolean(state.session?.picture);
  toast(isRepeated ? "This was saved already; nothing was saved twice." : `Saved: ${saves.map((save) => (isPicture ? save.structures.join(", ") : describe(save))).join("; ")}`, "good", 5);
  clearNotice();
  const warnings = [...new Set(saves.flatMap(({ warnings: told }) => told))];
  if (warnings.length) notice(sayOnPage(warnings.join(" ")), "", [["Understood", clearNotice]]);
}

/**
 * @param {unknown} error
 * @param {ImageSession} session
 */
async function reportSubmit(error, session) {
  if (api.kindOf(error) !== "conflict") {
    report(error);
    return;
  }
  await refresh(session).catch(() => {}); // Then the page knows of the other save when it is opened again.
  notice(api.messageOf(error), "bad", [
    ["Show that label", () => store.set({ isSavedShown: true })],
    ["Submit again", () => (clearNotice(), void submit())],
  ]);
}

/**
 * A name is nearly a known one: nothing is saved before somebody says which is meant.
 * @param {unknown} error
 * @param {readonly {structure: string}[]} drawn
 */
function askName(error, drawn) {
  const message = api.messageOf(error);
  const name = [...new Set(drawn.map(({ structure }) => structure))].find((own) => message.startsWith(`'${own}'`));
  const [meant] = error instanceof api.ApiError ? error.suggestions : [];
  notice(`“${name}” is nearly “${meant}”, which is known already. Nothing is saved yet.`, "", [
    ...(name && meant ? [/** @type {[string, () => void]} */ ([`It is ${meant}`, () => (clearNotice(), void renameDrawn(name, meant).then(() => submit()).catch(report))])] : []),
    [`Keep “${name}”`, () => (clearNotice(), void send(true))],
    ["Go on drawing", clearNotice],
  ]);
}

/**
 * Ask again what is saved.
 * @param {ImageSession} session
 */
async function refresh(session) {
  await session.refresh();
  store.touch("info");
}

export async function undoSave() {
  const { session } = state;
  if (!session || state.isReadOnly) return;
  try {
    let { annotation } = await api.undoSave(session.image);
    // One submission may be several saves, and is taken back as a whole.
    const others = lastSaves.image === session.image && lastSaves.sequences.includes(session.info.sequence) ? lastSaves.sequences.slice(1) : [];
    for (let left = others.length; left > 0; left -= 1) ({ annotation } = await api.undoSave(session.image));
    lastSaves = { image: "", sequences: [] };
    toast(annotation ? `The last save is undone; save ${annotation.sequence} is in force again.` : "The last save is undone; the image has no label now.", "good");
    await refresh(session);
    await queue.load();
  } catch (error) {
    report(error);
  }
}

/** Say that nothing is left to do on the image and go on, or that there is again. What is not sent yet is sent first. */
export async function finish() {
  const { session } = state;
  if (!session || state.isReadOnly) return;
  const isDone = !session.info.is_done;
  if (isDone && (state.work?.hasDecisions || isSentenceTyped())) {
    await submit();
    if (state.work?.hasDecisions || isSentenceTyped()) return; // It was refused, and says why.
  }
  try {
    await api.finishImage(session.image, isDone);
    toast(isDone ? `${session.image} is done` : `${session.image} is open again`, "good", 3);
    if (isDone) await openNext();
    else await Promise.all([refresh(session), queue.load()]);
  } catch (error) {
    report(error);
  }
}

export async function skip() {
  const { session } = state;
  if (!session) return;
  if (state.work?.hasDecisions) {
    toast("There are decisions on this image. Submit or undo them before skipping it.", "bad");
    return;
  }
  try {
    await api.skipImage(session.image, "skipped on the review page");
    toast(`${session.image} skipped`, "", 2);
    await openNext();
  } catch (error) {
    report(error);
  }
}

export async function openNext() {
  await queue.load();
  const image = queue.next();
  if (image) await openImage(image);
  else {
    if (state.session) await refresh(state.session);
    toast("No other image is waiting.");
  }
}

/** The server is back after it was gone. */
export async function offerAgain() {
  if (state.work?.hasDecisions) {
    notice("The server is back. Your decisions are still here.", "", [
      ["Submit now", submit],
      ["Later", clearNotice],
    ]);
  }
  await queue.load();
  store.touch("info");
}
