// Structures that no model knows yet: the form that adds one or changes it, and what is asked when a name is nearly a known one.

import * as api from "./api.js";
import { element, find, findButton, findInput, toast } from "./dom.js";
import { report } from "./failures.js";
import { addStructure, renameDrawn } from "./painting.js";
import { colorOf, findInFolder, state, store } from "./state.js";

/** @typedef {import("../answers.d.ts").FolderStructure} FolderStructure */

/** Colours that are offered, in turn: far from each other and from those of the structures that models know. */
const COLORS = ["#80ed99", "#c77dff", "#48bfe3", "#ff8fa3", "#ffd166", "#a0c4ff", "#f4a261", "#caffbf"];

/** The structure that the form changes; null while it adds one. @type {FolderStructure|null} */
let changed = null;

/** Ask what the folder labels, and how far each is. */
export async function loadStructures() {
  try {
    store.set({ folder: await api.listStructures() });
  } catch (error) {
    report(error);
  }
}

/** Listen to the form. */
export function listenToTeaching() {
  find("teach-open").addEventListener("click", () => open(null));
  find("teach-change").addEventListener("click", () => open(findInFolder(state.structure) ?? null));
  find("teach-cancel").addEventListener("click", close);
  find("teach-form").addEventListener("submit", (event) => {
    event.preventDefault();
    void send(false);
  });
}

/** @param {FolderStructure|null} structure to change; null to add one */
function open(structure) {
  changed = structure;
  const own = state.folder?.structures.filter(({ is_own: isOwn }) => isOwn) ?? [];
  findInput("teach-name").value = structure?.name ?? "";
  findInput("teach-words").value = structure?.words.join(", ") ?? "";
  findInput("teach-color").value = structure ? colorOf(structure.name) : COLORS[own.length % COLORS.length];
  findButton("teach-add").textContent = structure ? "Change" : "Add";
  show(true);
  findInput("teach-name").focus();
}

/** @param {boolean} isShown */
function show(isShown) {
  find("teach-form").hidden = !isShown;
  find("teach-problem").hidden = true;
  find("teach-open").setAttribute("aria-expanded", String(isShown));
}

function close() {
  show(false);
  find("view").focus({ preventScroll: true });
}

/** @param {boolean} confirm that a name which is nearly a known one is meant as it stands */
async function send(confirm) {
  const name = findInput("teach-name").value.trim();
  const words = findInput("teach-words").value.split(/[,;、，]/).map((word) => word.trim()).filter(Boolean);
  const asked = { name, words, color: findInput("teach-color").value, confirm };
  findButton("teach-add").disabled = true;
  try {
    const structure = changed?.label_id ? await api.changeStructure(changed.label_id, asked) : await api.addStructure(asked);
    await loadStructures();
    if (changed) await follow(changed.name, structure.name);
    else take(structure.name);
    toast(changed ? `${structure.name}: changed. Its labels stay.` : `${structure.name} can be labelled now, here and in every other program.`, "good", 5);
    close();
  } catch (error) {
    tellProblem(error, name);
  } finally {
    findButton("teach-add").disabled = false;
  }
}

/**
 * Draw a structure; clicks and the brush are for it.
 * @param {string} name
 */
function take(name) {
  addStructure(name);
  store.set({ included: new Set([...state.included, name]) });
}

/**
 * A structure is called otherwise now.
 * @param {string} former
 * @param {string} name
 */
async function follow(former, name) {
  const { session } = state;
  await session?.refresh();
  await renameDrawn(former, name);
  if (state.structure === former) addStructure(name);
  store.touch("info");
}

/**
 * @param {unknown} error
 * @param {string} name
 */
function tellProblem(error, name) {
  if (!["refused", "conflict", "busy"].includes(api.kindOf(error))) {
    report(error);
    return;
  }
  const meant = error instanceof api.ApiError ? error.suggestions : [];
  const isNear = meant.length > 0 && meant[0].toLowerCase() !== name.toLowerCase() && messageSaysNear(error);
  /** @type {(known: string) => HTMLElement} */
  const use = (known) => element("button", { type: "button", on: { click: () => (take(known), close()) } }, `Draw ${known}`);
  find("teach-problem").replaceChildren(
    api.messageOf(error),
    ...(changed ? [] : meant.map(use)),
    ...(isNear ? [element("button", { type: "button", on: { click: () => void send(true) } }, `Keep “${name}”`)] : []),
  );
  find("teach-problem").hidden = false;
}

/** Whether a name was asked back that may be meant as it stands. @param {unknown} error */
export const messageSaysNear = (error) => / is nearly /.test(api.messageOf(error));
