// Drawing on the slice that is shown: what a stroke or a button changes becomes a step of the drawing, is kept at once, and is the decision
// for its structure on its slice from then on.

import { messageOf } from "./api.js";
import { notice, toast } from "./dom.js";
import { Drawing } from "./drawing.js";
import { DrawingStore, TakenError } from "./drawing_store.js";
import { reframe } from "./drawn_look.js";
import { goTo } from "./moving.js";
import { fillHoles, flood, grow, interpolate, smooth } from "./shapes.js";
import { nameSlice } from "./slices.js";
import { areMasksShown, listStructures, look, shown, state, store } from "./state.js";
import { firstSettings, readAmount } from "./tools.js";
import { Work } from "./work.js";

/** @typedef {import("./session.js").ImageSession} ImageSession */
/** @typedef {import("./drawing.js").Edit} Edit */
/** @typedef {import("./drawing.js").Step} Step */
/** @typedef {{session: ImageSession, drawing: Drawing, structure: string, z: number}} Subject what is drawn on */
/** @typedef {{mask: Uint8Array, start: import("./picks.js").Pick|null, source: string}} Base what is drawn on top of */

const kept = new DrawingStore();

/** Counts openings: a drawing that comes after the next image was chosen is too late. */
let opening = 0;
/** @type {ImageSession|null} */
let opened = null;
let isKept = true;
/** Whether another tab may have drawn since. */
let isStale = false;

/** Fetch what was drawn on the image that is opened, or that this tab takes over. */
export async function openDrawing() {
  const { session, isReadOnly } = state;
  if (!session || (session === opened && state.drawing && (isReadOnly || !isStale))) return;
  isStale = isReadOnly;
  const ticket = (opening += 1);
  const isSame = session === opened;
  opened = session;
  if (!isSame) store.set({ drawing: null, added: [], cross: null, inked: "", settings: firstSettings(session.spacing, state.window) });
  const journal = await kept.read(session.image).catch((error) => (tellNotKept(error), null));
  if (ticket !== opening) return;
  const drawing = new Drawing(session.image, session, journal);
  store.set({ drawing, structure: state.structure || (drawing.structures[0] ?? "") });
  store.touch("drawn");
  const slices = new Set(drawing.listUnsent().map(({ z }) => z));
  if (!slices.size) return;
  ensureWork(session);
  toast(`What was drawn on ${slices.size === 1 ? "one slice" : `${slices.size} slices`} and not sent is here again.`, "", 6);
}

/** Another tab has the image: what it draws is read again when this one takes it back. */
export function leaveDrawing() {
  if (state.isReadOnly) isStale = true;
}

/** @param {unknown} error */
function tellNotKept(error) {
  if (isKept) notice(`This browser keeps no drawings (${messageOf(error)}): what is drawn is lost when the tab is closed before it is submitted.`);
  isKept = false;
}

/** Decisions need something to hang on, with proposals or without. @param {ImageSession} session */
function ensureWork(session) {
  if (!state.work && !state.job) store.set({ work: new Work(session.image) });
}

/** What to say where it is not known what is to be drawn. */
export const findNameless = () => "Choose what to draw: propose a structure, or name one under Draw.";

/** @returns {Subject|null} null, and why on the screen, if nothing can be drawn now */
export function findSubject() {
  const { session, drawing, structure, z } = state;
  if (!session || !drawing) return null;
  const lack = state.isReadOnly
    ? "This image is open in another tab. Choose “Use it here” first."
    : session.result?.owners[structure]?.job
      ? `The proposals of ${structure} are still being made. Draw when they are there, or cancel them.`
      : structure && listStructures().includes(structure)
        ? ""
        : findNameless();
  if (lack) toast(lack, "bad");
  return lack ? null : { session, drawing, structure, z };
}

/**
 * What is shown of a structure on the slice, to draw on: what was drawn, else the pick, else the saved label.
 * @param {Subject} subject
 * @returns {Base|null} null, and why on the screen, while it is not there
 */
export function findBase({ session, drawing, structure, z }) {
  const drawn = drawing.get(structure, z);
  if (drawn) return { mask: drawing.decode(drawn).slice(), start: drawn.start, source: drawn.source };
  const isProposed = session.result?.structures.includes(structure);
  if (shown.session !== session || shown.z !== z || (isProposed && !areMasksShown())) {
    toast("This slice is still on its way.", "", 2);
    return null;
  }
  if (!isProposed) return { mask: readSaved(structure) ?? new Uint8Array(session.height * session.width), start: null, source: "" };
  const found = look(structure);
  const whole = { y0: 0, y1: session.height, x0: 0, x1: session.width };
  return { mask: reframe(found?.mask ?? new Uint8Array(0), found?.box ?? null, whole), start: found?.pick ?? null, source: session.keyOf(structure) };
}

/**
 * A structure of the saved label on the slice.
 * @param {string} structure
 * @returns {Uint8Array|null} null if it is not saved here, or the label is not there yet
 */
function readSaved(structure) {
  const { session, z } = state;
  const id = session?.info.label_ids[structure];
  if (!session || id === undefined || !shown.label || shown.labelOf !== session.info || !session.isSaved(structure, z)) return null;
  return shown.label.map((value) => (value === id ? 1 : 0));
}

/**
 * Take over what was drawn.
 * @param {string} what in words
 * @param {Edit[]} edits
 * @param {number} z where to look when it is undone
 */
export function commit(what, edits, z = state.z) {
  const { drawing, session } = state;
  if (!drawing || !session) return;
  const step = drawing.commit(what, z, edits);
  if (!step) return;
  ensureWork(session);
  keep(drawing, step);
  store.touch("drawn", "decisions");
}

/**
 * Keep what changed; whoever goes on does not wait for it.
 * @param {Drawing} drawing
 * @param {Step|null} step if it is new
 */
export function keep(drawing, step = null) {
  kept.write(drawing, step).catch((error) => (error instanceof TakenError ? recover(drawing, step) : tellNotKept(error)));
}

/**
 * Another tab drew on this image: its steps come first, then the one that could not be kept.
 * @param {Drawing} mine
 * @param {Step|null} step
 */
async function recover(mine, step) {
  const journal = await kept.read(mine.image).catch((error) => (tellNotKept(error), null));
  if (!journal || state.drawing !== mine || !state.session) return;
  const drawing = new Drawing(mine.image, state.session, journal);
  const edits = (step?.changes ?? []).map(({ structure, z, after }) => ({ structure, z, mask: after && mine.decode(after), way: after?.way }));
  const again = step && drawing.commit(step.what, step.z, edits);
  store.set({ drawing });
  store.touch("drawn", "decisions");
  if (again) keep(drawing, again);
  notice("Another tab drew on this image too. What both drew is here; where both drew on the same slice, this tab's is on top and undo shows the other's.");
}

/**
 * Take a drawn structure from a slice as a step of its own time, because a proposal was picked instead.
 * @param {string} structure
 * @param {number|null} z null for a pick of the volume, which leaves what was drawn
 * @param {number} at
 */
export function dropDrawn(structure, z, at) {
  const { drawing } = state;
  if (!drawing || z === null || !drawing.get(structure, z)) return;
  const step = drawing.commit(`drawing on slice ${nameSlice(z)} replaced by a pick`, z, [{ structure, z, mask: null }], at);
  keep(drawing, step);
  store.touch("drawn", "decisions");
}

/**
 * Name a structure to draw; it becomes the active one.
 * @param {string} name
 */
export function addStructure(name) {
  const wanted = name.trim().replace(/\s+/g, " ");
  const { session } = state;
  if (!wanted || !session) return;
  const known = listStructures().find((one) => one.toLowerCase() === wanted.toLowerCase());
  if (!known) store.set({ added: [...state.added, wanted] });
  store.set({ structure: known ?? wanted, mode: "pick" });
  ensureWork(session);
}

/**
 * What was drawn as one structure is another one; where that is drawn or saved already, both together are.
 * @param {string} former
 * @param {string} name
 */
export async function renameDrawn(former, name) {
  const { drawing, session } = state;
  if (!drawing || !session || former === name) return;
  /** @type {Edit[]} */
  const edits = [];
  for (const { z, drawn } of drawing.list().filter(({ structure }) => structure === former)) {
    const there = await findThere(drawing, session, name, z);
    const mask = drawing.decode(drawn).map((value, i) => value || there?.[i] || 0);
    edits.push({ structure: former, z, mask: null }, { structure: name, z, mask });
  }
  if (state.drawing !== drawing || state.session !== session) return;
  if (edits.length) commit(`${former} taken for ${name}`, edits);
  store.set({ added: state.added.filter((own) => own !== former) });
  if (state.structure === former) addStructure(name);
}

/**
 * @param {Drawing} drawing
 * @param {ImageSession} session
 * @param {string} structure
 * @param {number} z
 * @returns {Promise<Uint8Array|null>} null if it is neither drawn nor saved there
 */
async function findThere(drawing, session, structure, z) {
  const drawn = drawing.get(structure, z);
  if (drawn) return drawing.decode(drawn);
  const id = session.info.label_ids[structure];
  if (id === undefined || !session.isSaved(structure, z)) return null;
  return (await session.label(z)).map((value) => (value === id ? 1 : 0));
}

/** @typedef {(mask: Uint8Array, plane: ImageSession, amount: {length: number, spacing: import("./geometry.js").Spacing}) => Uint8Array} Reshape */

/** @type {Record<"fillHoles"|"grow"|"shrink"|"smooth", {what: string, act: Reshape}>} */
const RESHAPES = {
  fillHoles: { what: "holes filled", act: (mask, plane) => fillHoles(mask, plane) },
  grow: { what: "grown", act: (mask, { height, width }, { length, spacing }) => grow(mask, { height, width, spacing }, length) },
  shrink: { what: "shrunk", act: (mask, { height, width }, { length, spacing }) => grow(mask, { height, width, spacing }, -length) },
  smooth: { what: "smoothed", act: (mask, { height, width }, { length, spacing }) => smooth(mask, { height, width, spacing }, length) },
};

/** @param {keyof typeof RESHAPES} change */
export function reshape(change) {
  const subject = findSubject();
  const base = subject && findBase(subject);
  if (!base) return;
  const { what, act } = RESHAPES[change];
  const { structure, z, session } = subject;
  commit(`${structure} ${what} on slice ${nameSlice(z)}`, [{ ...base, structure, z, mask: act(base.mask, session, readAmount(state.settings, session.spacing)) }]);
}

/** @param {import("./geometry.js").Point} point */
export function floodAt(point) {
  const subject = findSubject();
  const base = subject && findBase(subject);
  if (!base) return;
  const { structure, z, session } = subject;
  const mask = flood(base.mask, session, point);
  if (mask) commit(`${structure} filled on slice ${nameSlice(z)}`, [{ ...base, structure, z, mask }]);
  else toast("That is no hole: it reaches the border of the slice. Click inside of a closed outline.", "bad");
}

/** @param {1|-1} step */
export function copyTo(step) {
  const subject = findSubject();
  const base = subject && findBase(subject);
  if (!base) return;
  const { structure, session } = subject;
  const z = subject.z + step;
  if (z < 0 || z >= session.depth) {
    toast("There is no slice beyond this one.", "bad");
    return;
  }
  commit(`${structure} copied to slice ${nameSlice(z)}`, [{ structure, z, mask: base.mask }], z);
  goTo(z);
}

/** Fill the slices between those that were drawn. */
export function interpolateBetween() {
  const subject = findSubject();
  if (!subject) return;
  const { drawing, structure, session, z } = subject;
  const gaps = drawing.findGaps(structure, z);
  if (!gaps.length) {
    toast(`Draw ${structure} on two slices with others between them first, and go between them.`, "bad", 6);
    return;
  }
  /** @type {Edit[]} */
  const edits = [];
  for (const [low, high] of gaps) {
    const [first, second] = [low, high].map((place) => decodeAt(drawing, structure, place));
    for (let place = low + 1; place < high; place += 1) {
      const mask = interpolate(first, second, session, (place - low) / (high - low));
      if (mask) edits.push({ structure, z: place, mask, way: "between" });
    }
  }
  if (edits.length) {
    const words = gaps.map(([low, high]) => `${nameSlice(low)} and ${nameSlice(high)}`).join(", and between ");
    commit(`${structure} interpolated between ${words}`, edits);
    toast(`${structure}: ${edits.length === 1 ? "one slice" : `${edits.length} slices`} drawn between ${words}.`, "good", 4);
  } else {
    toast(`There is nothing to interpolate: ${structure} was erased on one of the slices ${gaps.flat().map(nameSlice).join(", ")}.`, "bad", 6);
  }
}

/** @param {Drawing} drawing @param {string} structure @param {number} z */
function decodeAt(drawing, structure, z) {
  const drawn = drawing.get(structure, z);
  return drawn ? drawing.decode(drawn) : new Uint8Array(drawing.height * drawing.width);
}

/** Take the saved label of the slice to go on from. */
export async function takeSaved() {
  const subject = findSubject();
  if (!subject) return;
  const { session, structure, z } = subject;
  const id = session.info.label_ids[structure];
  if (id === undefined || !session.isSaved(structure, z)) {
    toast(`No saved label holds ${structure} on this slice.`, "bad");
    return;
  }
  const label = await session.label(z).catch((error) => (toast(messageOf(error), "bad"), null));
  if (label && state.session === session) commit(`${structure} taken from the saved label on slice ${nameSlice(z)}`, [{ structure, z, mask: label.map((value) => (value === id ? 1 : 0)) }], z);
}

/** Drop what was drawn on the slice. */
export function startOver() {
  const subject = findSubject();
  if (!subject) return;
  const { structure, z, drawing } = subject;
  if (drawing.get(structure, z)) commit(`drawing of ${structure} on slice ${nameSlice(z)} dropped`, [{ structure, z, mask: null }]);
  else toast(`${structure} was not drawn on this slice.`);
}

/** Say that the structure is not on the slice, by drawing nothing. */
export function clearSlice() {
  const subject = findSubject();
  if (!subject) return;
  const { structure, z, session } = subject;
  commit(`${structure} absent on slice ${nameSlice(z)}`, [{ structure, z, mask: new Uint8Array(session.height * session.width) }]);
}
