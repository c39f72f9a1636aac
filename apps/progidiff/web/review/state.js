// What the page shows, in one place, and what follows from it. Nothing here draws or asks the server.

import { combineLook } from "./drawn_look.js";
import { describePick, drawPick, makePick, pickProposal } from "./picks.js";
import { findHighest, rankSlices } from "./slices.js";
import { Store } from "./store.js";
import { firstSettings } from "./tools.js";

/** Where no image says another one. */
const UNKNOWN_COLOR = "#e0aaff";

/** @typedef {import("./picks.js").Pick} Pick */
/** @typedef {"pick"|"agreement"|"difference"} Mode */
/** @typedef {Partial<import("../answers.d.ts").Job> & {problem?: string}} Progress what the server says of a job, or why it says nothing */
/** @typedef {{id: string, image: string, count: number, names?: readonly string[], progress: Progress}} RunningJob `names` of its structures, where they are known before it answers */

/**
 * @typedef {object} State
 * @property {import("./session.js").ImageSession|null} session
 * @property {import("./work.js").Work|null} work
 * @property {number} z
 * @property {string} structure
 * @property {ReadonlySet<string>} included structures that are shown
 * @property {Mode} mode
 * @property {Pick|null} compared what the shown pick is compared with, if that was asked for
 * @property {"slice"|"volume"} scope
 * @property {readonly [low: number, high: number]} window
 * @property {string} preset
 * @property {number} zoom
 * @property {import("./geometry.js").Point|null} center
 * @property {boolean} isHidden
 * @property {boolean} isSavedShown
 * @property {boolean} isReadOnly
 * @property {boolean} isSubmitting
 * @property {RunningJob|null} job
 * @property {readonly import("../answers.d.ts").QueueSlice[]} walk slices of the image that the strategy chose, best first
 * @property {import("../answers.d.ts").Worklist|null} worklist the part of the images that is listed, and numbers of all; null while it is not known
 * @property {import("../answers.d.ts").Scoring|null} scoring
 * @property {import("../answers.d.ts").Readings|null} readings where images are read twice; null while it is not known, or they are not
 * @property {readonly import("../answers.d.ts").LeftOut[]} leftOut files that the server does not serve
 * @property {import("./drawing.js").Drawing|null} drawing what was drawn by hand on the image; null until it is known what was
 * @property {import("../answers.d.ts").Structures|null} folder structures of the folder; null while they are not known
 * @property {readonly string[]} added structures that were named to be drawn, of which there are no proposals
 * @property {import("./tools.js").Tool|null} tool
 * @property {import("./tools.js").Settings} settings of the tools
 * @property {import("./edits.js").Edits|null} edits what was clicked and drawn to steer the proposals of the image
 * @property {string} inked structure that a stroke is being drawn of; "" if none is
 * @property {boolean} areViewsShown the two other planes and the surface
 * @property {import("./geometry.js").Point|null} cross where they cross on the slice; null for the middle
 * @property {number} opacity of the active mask, from 0 to 1
 * @property {import("./sentences.js").Typed|null} typed a picture's sentence that is not saved
 * @property {readonly string[]} notes what is to be known of the picture and of its last proposals
 */

/**
 * Changes inside of the session (what is saved and kept; the result) and of the work (what is picked; what is accepted).
 * "drawn" is a change of the drawing, "edits" one of what steers.
 * @typedef {"info"|"result"|"picks"|"decisions"|"drawn"|"edits"} Change
 */

/** @type {Store<State, Change>} */
export const store = new Store(
  /** @type {State} */ ({
    session: null,
    work: null,
    z: 0,
    structure: "",
    included: new Set(),
    mode: "pick",
    compared: null,
    scope: "slice",
    window: [0, 1],
    preset: "",
    zoom: 1,
    center: null,
    isHidden: false,
    isSavedShown: false,
    isReadOnly: false,
    isSubmitting: false,
    job: null,
    walk: [],
    worklist: null,
    scoring: null,
    readings: null,
    leftOut: [],
    drawing: null,
    edits: null,
    folder: null,
    added: [],
    tool: null,
    settings: firstSettings([1, 1], [0, 1]),
    inked: "",
    areViewsShown: false,
    cross: null,
    opacity: 0.24,
    typed: null,
    notes: [],
  }),
);

export const state = store.values;

/**
 * What the large picture is made of right now; the stage alone changes it.
 * @typedef {object} Shown
 * @property {import("./session.js").ImageSession|null} session
 * @property {number} z
 * @property {Int16Array|null} pixels
 * @property {Uint8ClampedArray|null} colours of a picture in colour
 * @property {readonly (import("./masks.js").StructureMasks|null)[]|null} masks
 * @property {boolean} isPartial whether a job had not come to the slice when they were fetched
 * @property {string} masksOf source of the masks
 * @property {Uint8Array|null} label
 * @property {import("./session.js").ImageInfo|null} labelOf what was known when the label was fetched
 * @property {OffscreenCanvas|null} grey
 * @property {string} greyOf
 * @property {import("./geometry.js").Place|null} place
 */

/** @type {Shown} */
export const shown = { session: null, z: -1, pixels: null, colours: null, masks: null, isPartial: false, masksOf: "", label: null, labelOf: null, grey: null, greyOf: "", place: null };

/**
 * A structure on the shown slice: all proposals, and what is picked of them.
 * @typedef {import("./masks.js").StructureMasks & {best: number, pick: Pick, mask: Uint8Array, drawn?: import("./drawing.js").Drawn|null}} Look
 */

/** Whether the active structure is accepted or saved on a slice. @param {number} z */
export const isSliceDone = (z) =>
  Boolean(state.work?.acceptedPick(state.structure, z) || state.drawing?.isUnsent(state.structure, z) || state.session?.isSaved(state.structure, z));

/** @returns {number[]} disagreement per slice of the active structure; empty while it is not known */
const activeDisagreement = () => state.session?.disagreement([state.structure]) ?? [];

/**
 * The slice to look at next, other than this one: the first one that the strategy chose and that is not done, after those the undecided one
 * with the highest disagreement; null if none is left.
 * @param {number|null} without
 */
export function findNext(without = null) {
  const values = activeDisagreement();
  const chosen = state.walk.find(({ index }) => index !== without && index < (state.session?.depth ?? 0) && !isSliceDone(index));
  return chosen ? chosen.index : findHighest(values, isSliceDone, without);
}

/** The slices that the strategy chose of the image and on which the active structure is not done. */
export const countChosenLeft = () => state.walk.filter(({ index }) => !isSliceDone(index)).length;

/** The slices on which the shown proposals differ most, as the queue lists them. */
export const listDisputed = () => rankSlices(state.session?.disagreement(state.session.result?.structures ?? []) ?? []);

export const isDrawnHere = () => activeDisagreement()[state.z] > 0;

/** Whether masks of the slice that is looked at are there. */
export const areMasksShown = () => Boolean(shown.masks) && shown.session === state.session && shown.z === state.z && shown.masksOf === state.session?.source;

/**
 * The masks and the pick of a structure on the shown slice, and what was drawn by hand instead; null while they are not there.
 * @param {string} structure
 * @returns {Look|null}
 */
export function look(structure) {
  const proposed = lookProposed(structure);
  const { session, drawing, z } = state;
  return session && drawing && shown.session === session && shown.z === z ? combineLook(drawing, structure, z, proposed) : proposed;
}

/**
 * @param {string} structure
 * @returns {Look|null}
 */
function lookProposed(structure) {
  const { session, work } = state;
  if (!session?.result || !work || !areMasksShown()) return null;
  const entry = shown.masks?.[session.result.structures.indexOf(structure)];
  if (!entry) return null;
  const best = (session.result.summary?.structures[structure]?.best ?? 1) - 1;
  const pick = work.pickOn(structure, state.z);
  return { ...entry, best, pick, mask: entry.box ? drawPick(entry.masks, pick, best) : new Uint8Array(0) };
}

/** Of the folder's own structures that are listed for every image; of more, those that are drawn or labelled there. */
const MOST_OWN = 12;

/** What the folder says of a structure; undefined if it does not know it, or of a picture. @param {string} structure */
export const findInFolder = (structure) => (state.session?.picture ? undefined : state.folder?.structures.find(({ name }) => name === structure));

/** Whether a model proposes a structure by its name. @param {string} structure */
export const isKnown = (structure) => findInFolder(structure)?.is_known ?? structure in (state.session?.info.colors ?? {});

/** @returns {readonly string[]} the folder's own structures, if they are few */
function listOwn() {
  const own = state.session?.picture ? [] : (state.folder?.structures ?? []).filter(({ is_own: isOwn }) => isOwn);
  return own.length > MOST_OWN ? [] : own.map(({ name }) => name);
}

/** @param {string} structure */
export function colorOf(structure) {
  const { session } = state;
  if (!session) return UNKNOWN_COLOR;
  const { colors, other_colors: others } = session.info;
  const place = session.result?.structures.indexOf(structure) ?? 0;
  return findInFolder(structure)?.color ?? colors[structure] ?? others[place % others.length] ?? UNKNOWN_COLOR;
}

export const currentPick = () => state.work?.pickOn(state.structure, state.z) ?? makePick("consensus");

/** What is shown of a structure, in words. @param {Look} found */
export function describeLook({ drawn, pick, masks }) {
  if (!drawn) return masks.length ? describePick(pick, masks.length) : "saved label";
  if (drawn.way === "between") return "interpolated";
  return `drawn by hand, ${drawn.edits === 1 ? "one edit" : `${drawn.edits} edits`}`;
}

export const countProposals = () => state.session?.result?.owners[state.structure]?.numProposals ?? 0;

/** What has a row in the checklist and can be drawn: what there are proposals of, what is saved, what was drawn or named to be drawn, and what the folder brings. */
export const listStructures = () => [
  ...new Set([
    ...(state.session?.result?.structures ?? []),
    ...Object.keys(state.session?.info.label_ids ?? {}),
    ...(state.drawing?.structures ?? []),
    ...state.added,
    ...(state.session?.classes ?? []),
    ...(state.session ? listOwn() : []),
  ]),
];

/** What has proposals and is shown. */
export const chosenStructures = () => state.session?.result?.structures.filter((name) => state.included.has(name)) ?? [];

/**
 * What the shown pick is compared with: the proposal that was asked for, else the consensus, else the first other one.
 * @param {Look} active
 * @returns {Pick}
 */
export function comparedPick(active) {
  if (state.compared) return state.compared;
  return active.pick.rule === "consensus" ? pickProposal(1) : makePick("consensus");
}
