// One undo and one redo for all that a person does to an image: picks and acceptances, which `Work` keeps, and drawing, which `Drawing` keeps.

import { toast } from "./dom.js";
import { goTo } from "./moving.js";
import { keep } from "./painting.js";
import { state, store } from "./state.js";
import { followEdits } from "./steering.js";

/** Take the last step back, whatever it was. @returns {boolean} false if there was none */
export function undoLast() {
  const { work, drawing, edits } = state;
  const at = Math.max(work?.lastAt ?? 0, drawing?.lastAt ?? 0, edits?.lastAt ?? 0);
  if (!at) return false;
  // A pick that took the place of what was drawn, or that a click made, is one step of both.
  const clicked = edits?.lastAt === at ? edits.undo() : null;
  const drawn = drawing?.lastAt === at ? drawing.undo() : null;
  const decided = work?.lastAt === at ? work.undo() : null;
  if (drawing && drawn) keep(drawing);
  tell("Undone", clicked ?? decided ?? drawn);
  if (clicked) followEdits(clicked.structure);
  return true;
}

export function redoNext() {
  const { work, drawing, edits } = state;
  if (state.isReadOnly) return;
  const at = Math.min(work?.nextAt ?? Infinity, drawing?.nextAt ?? Infinity, edits?.nextAt ?? Infinity);
  // What was done since has taken the place of what was undone.
  if (at === Infinity || at < Math.max(work?.lastAt ?? 0, drawing?.lastAt ?? 0, edits?.lastAt ?? 0)) {
    toast("Nothing to redo.");
    return;
  }
  const clicked = edits?.nextAt === at ? edits.redo() : null;
  const drawn = drawing?.nextAt === at ? drawing.redo() : null;
  const decided = work?.nextAt === at ? work.redo() : null;
  if (drawing && drawn) keep(drawing);
  tell("Redone", clicked ?? decided ?? drawn);
  if (clicked) followEdits(clicked.structure);
}

/**
 * @param {string} how
 * @param {{what: string, z: number|null}|null} step
 */
function tell(how, step) {
  if (!step) return;
  // A picture has one slice, which nobody counts.
  toast(`${how}: ${state.session?.picture ? step.what.replace(/,? (on )?slice 1$/, "") : step.what}`, "", 2);
  if (step.z !== null) goTo(step.z);
  store.touch("picks", "decisions", "drawn", "edits");
}
