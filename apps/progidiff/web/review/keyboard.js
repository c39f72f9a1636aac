// What keys and buttons do.

import { noteActivity, noteClick } from "./activity.js";
import { acceptShown, acceptShownVolume, acceptSlice, acceptVolume, merge, pick, pickProposal, requireProposals, shiftThreshold, undo } from "./deciding.js";
import { element, find, findInput, toast } from "./dom.js";
import { KEYS, readKey } from "./keys.js";
import { compareWith, cyclePreset, cycleStructure, goTo, goToNext, scrollBy, setScope, setZoom, toggleFit } from "./moving.js";
import { toggleHidden, toggleIncluded, toggleMode, toggleSaved } from "./moving.js";
import { tellWarnings } from "./opening.js";
import { makePick } from "./picks.js";
import { DRAW_ACTIONS } from "./toolbar.js";
import { cancelJob, runPrompt } from "./prompting.js";
import { decide } from "./readings.js";
import { finish, openNext, skip, submit, undoSave } from "./saving.js";
import { state } from "./state.js";

const openHelp = () => find("help", HTMLDialogElement).showModal();

/** @type {Record<import("./keys.js").Action, () => unknown>} */
const ACTIONS = {
  up: () => scrollBy(1),
  down: () => scrollBy(-1),
  farUp: () => scrollBy(10),
  farDown: () => scrollBy(-10),
  first: () => goTo(0),
  last: () => goTo(state.session?.depth ?? 0),
  disputed: () => goToNext(state.z) || toast(`No other slice of ${state.structure} is left that the proposals dispute.`),
  consensus: () => pick(makePick("consensus")),
  best: () => pick(makePick("best")),
  absent: () => pick(makePick("nothing")),
  union: () => merge("union"),
  intersection: () => merge("intersection"),
  majority: () => merge("majority"),
  threshold: () => merge("threshold"),
  lower: () => shiftThreshold(-1),
  higher: () => shiftThreshold(1),
  scope: () => setScope(state.scope === "slice" ? "volume" : "slice"),
  agreement: () => toggleMode("agreement"),
  difference: () => toggleMode("difference"),
  hide: toggleHidden,
  saved: toggleSaved,
  structure: cycleStructure,
  leaveOut: () => toggleIncluded(state.structure),
  preset: cyclePreset,
  fit: toggleFit,
  zoomIn: () => setZoom(state.zoom * 1.25),
  zoomOut: () => setZoom(state.zoom / 1.25),
  acceptSlice: () => acceptSlice(),
  acceptVolume: () => acceptVolume(),
  acceptShown,
  acceptShownVolume,
  skip,
  undo,
  submit,
  finish,
  next: openNext,
  prompt: () => find(state.session?.picture ? "sentence" : "prompt").focus(),
  help: openHelp,
  ...DRAW_ACTIONS,
};

/** @param {import("./keys.js").Action} action */
export const perform = (action) => void ACTIONS[action]();

/** @param {KeyboardEvent} event */
function onKey(event) {
  noteActivity();
  const { target } = event;
  const isTyping = target instanceof HTMLInputElement && target.type !== "range";
  if (event.key === "Escape" && isTyping) {
    find("view").focus();
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  if (isTyping && !(event.ctrlKey && event.key === "Enter")) return;
  const meaning = readKey(event);
  if (!meaning) return;
  // Enter and space press the button that has the focus.
  if ("action" in meaning && target instanceof HTMLButtonElement && ["Enter", " "].includes(event.key) && !event.ctrlKey) return;
  event.preventDefault();
  noteClick();
  if ("proposal" in meaning) pickProposal(meaning.proposal);
  else if ("compared" in meaning) compareWith(meaning.compared);
  else ACTIONS[meaning.action]();
}

export function listenToKeys() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", noteClick);
}

export function listenToButtons() {
  find("prompt-form").addEventListener("submit", runPrompt);
  const threshold = findInput("threshold");
  threshold.addEventListener("input", () => requireProposals(Number(threshold.value)));
  /** @type {Record<string, () => unknown>} */
  const buttons = {
    ...{ "accept-slice": () => acceptSlice(), "accept-volume": () => acceptVolume(), "accept-shown": acceptShown, undo, skip, submit, finish, decide, "undo-save": undoSave },
    ...{ "scope-slice": () => setScope("slice"), "scope-volume": () => setScope("volume") },
    ...{ "job-cancel": cancelJob, "help-open": openHelp, "header-warning": tellWarnings },
  };
  for (const [id, act] of Object.entries(buttons)) find(id).addEventListener("click", act);
  const toggle = find("queue-toggle");
  toggle.addEventListener("click", () => toggle.setAttribute("aria-expanded", String(find("queue").classList.toggle("open"))));
}

/** The legend of the keys. */
export function fillKeys() {
  find("keys").replaceChildren(
    ...KEYS.filter(({ what }) => what).map(({ keys, show, what }) =>
      element("div", {}, element("span", {}, what), element("span", {}, ...(show ?? keys).map((key) => element("kbd", {}, key)))),
    ),
  );
}
