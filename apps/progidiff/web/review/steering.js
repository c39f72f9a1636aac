// Clicks, scribbles, boxes and lassos that steer. A model that draws by edits is asked again after each of them; with others, clicks choose
// among the proposals that there are.

import * as api from "./api.js";
import { nextTime } from "./clock.js";
import { clearNotice, notice, toast } from "./dom.js";
import { Edits, chooseByEdits, toPaintEdit, toRequest } from "./edits.js";
import { report } from "./failures.js";
import { countSlices } from "./slices.js";
import { removeResult, replaceResult } from "./opening.js";
import { dropDrawn, findNameless } from "./painting.js";
import { makePick, pickProposal } from "./picks.js";
import { readCount, runJob } from "./prompting.js";
import { submit } from "./saving.js";
import { areMasksShown, isKnown, listStructures, look, state, store } from "./state.js";

/** @typedef {import("./edits.js").Edit} Edit */
/** @typedef {import("./session.js").ImageSession} ImageSession */

/** Edits that come within this time are asked about together. */
const WAIT_MS = 150;
const AGAIN_MS = 120;
/** Slices drawn by hand that go along: the nearest ones. */
const MOST_PAINTED = 8;

/** @type {ReturnType<typeof setTimeout>|undefined} */
let timer;
/** The structure that is to be asked about; "" for none. */
let wanted = "";
/** The job that answers the last edits; "" for none. */
let running = "";

/** Fetch what was clicked and drawn on the image that is opened, or that this tab takes over. */
export function openEdits() {
  const { session } = state;
  clearTimeout(timer);
  wanted = "";
  store.set({ edits: session && Edits.load(session.image) });
}

/** Whether something can be clicked now; why not is said on the screen. */
export function canSteer() {
  const { session, edits, structure } = state;
  if (!session || !edits) return false;
  const lack = state.isReadOnly
    ? "This image is open in another tab. Choose “Use it here” first."
    : structure && listStructures().includes(structure)
      ? ""
      : findNameless();
  if (lack) toast(lack, "bad");
  return !lack;
}

/**
 * Take over what was clicked or drawn.
 * @param {Pick<Edit, "kind"|"positive"|"points">} drawn
 */
export function steer(drawn) {
  const { session, edits, structure, z } = state;
  if (!session || !edits || !canSteer()) return;
  const at = nextTime();
  if (session.info.listens_to_edits) {
    edits.add({ ...drawn, structure, z }, at);
    askSoon(structure);
  } else {
    if (!areMasksShown() || !look(structure)?.masks.length) {
      toast(`There are no proposals of ${structure} on this slice to choose from. Find it, or draw it.`, "bad");
      return;
    }
    edits.add({ ...drawn, structure, z }, at);
    choose(at);
  }
  store.touch("edits");
}

/** Take all clicks and lines of the active structure away. */
export function clearEdits() {
  const { edits, structure, z } = state;
  if (!edits?.of(structure).length || state.isReadOnly) return;
  edits.clear(structure, z);
  store.touch("edits");
  followEdits(structure);
}

/**
 * Edits were undone, redone or removed: show what those that are left make.
 * @param {string} structure
 */
export function followEdits(structure) {
  if (state.session?.info.listens_to_edits) askSoon(structure);
}

/**
 * Of the proposals on the slice, pick those that agree with all clicks.
 * @param {number} at
 */
function choose(at) {
  const { work, edits, structure, z } = state;
  const found = look(structure);
  if (!work || !edits || !found) return;
  const { members, missed } = chooseByEdits(found, edits.on(structure, z));
  const count = found.masks.length;
  const pick = members.length === count ? makePick("consensus") : members.length === 1 ? pickProposal(members[0]) : makePick("majority", members);
  dropDrawn(structure, z, at);
  work.setPick(structure, pick, z, at);
  store.touch("picks");
  if (missed) {
    toast(`None of the ${count} proposals agrees with all clicks; the nearest is picked. This model chooses by clicks and does not draw by them: draw what is missing.`, "bad", 6);
  } else {
    toast(members.length === 1 ? `One of ${count} proposals agrees with the clicks.` : `${members.length} of ${count} proposals agree with the clicks.`, "", 3);
  }
}

/** @param {string} structure */
function askSoon(structure) {
  wanted = structure;
  clearTimeout(timer);
  timer = setTimeout(ask, WAIT_MS);
}

/** Ask for what is wanted, in place of what still runs. */
async function ask() {
  const { session, edits, work } = state;
  if (!session || !edits || !wanted || state.isReadOnly) return;
  const structure = wanted;
  if (state.job) {
    // A prompt that somebody typed is answered first; what an earlier click asked for is not needed any more.
    if (state.job.id === running) await api.cancelJob(running).catch(() => {}); // It may have ended meanwhile.
    timer = setTimeout(ask, AGAIN_MS);
    return;
  }
  const accepted = work?.findPicked(structure);
  if (accepted) {
    offerSubmit(structure, accepted);
    return;
  }
  wanted = "";
  if (!edits.of(structure).length && !isKnown(structure)) {
    // Of something without a name there is nothing left to ask.
    removeResult(session, session.keyOf(structure));
    store.set({ structure });
    return;
  }
  const owner = session.result?.owners[structure];
  const former = owner?.structures.length === 1 ? owner.key : ""; // The job that runs now takes its place.
  running = `steer-${Math.random().toString(36).slice(2, 12)}`;
  try {
    const answer = await runJob(session, {
      id: running,
      prompt: structure,
      count: readCount(),
      edits: [...toRequest(edits.of(structure), session.info.voxels), ...listPainted(structure)],
      names: [structure],
    });
    if (!answer || state.session !== session) return;
    const [named = structure] = Object.keys(answer.structures);
    if (named !== structure) {
      edits.rename(structure, named);
      store.set({ added: state.added.filter((name) => name !== structure) });
    }
    await replaceResult(session, answer.proposals, former);
    store.touch("edits");
    if (answer.warnings.length) toast(answer.warnings.join(" "), "", 6);
  } catch (error) {
    tellFailure(error, structure);
  } finally {
    running = "";
  }
}

/**
 * @param {unknown} error
 * @param {string} structure
 */
function tellFailure(error, structure) {
  if (wanted) return; // It was given up for the edits that came since.
  wanted = structure; // Asked again when the server is back, or with the next edit.
  if (["refused", "busy", "conflict"].includes(api.kindOf(error))) {
    notice(`${api.messageOf(error)} What you clicked is kept; undo takes the last of it back.`, "bad", [["Close", clearNotice]]);
  } else report(error);
}

/** The server is back: ask what could not be asked. */
export function askAgain() {
  if (wanted) askSoon(wanted);
}

/**
 * What is accepted speaks about the proposals before, which new ones would take away.
 * @param {string} structure
 * @param {{volume: boolean, slices: number[]}} accepted
 */
function offerSubmit(structure, { volume, slices }) {
  const where = volume ? "in the volume" : `on ${countSlices(slices.length)}`;
  notice(`${structure} is accepted ${where} and not sent. Submit it first; then your clicks are answered.`, "", [
    ["Submit now", () => (clearNotice(), void submit().then(() => askSoon(structure)))],
    ["Later", clearNotice],
  ]);
}

/**
 * The nearest slices of a structure that were drawn by hand.
 * @param {string} structure
 */
function listPainted(structure) {
  const { drawing, z } = state;
  const drawn = drawing?.list().filter((entry) => entry.structure === structure && entry.drawn.way === "hand") ?? [];
  drawn.sort((one, other) => Math.abs(one.z - z) - Math.abs(other.z - z));
  return drawn.slice(0, MOST_PAINTED).flatMap((entry) => (drawing ? [toPaintEdit(entry.z, drawing.decode(entry.drawn))] : []));
}
