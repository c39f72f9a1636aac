// Mouse, pen and one finger on the picture while a tool that steers is in hand.

import { noteActivity } from "./activity.js";
import { find, toast } from "./dom.js";
import { thinLine } from "./edits.js";
import { showOpenLine } from "./marks.js";
import { locateEvent, takePress } from "./pen.js";
import { state } from "./state.js";
import { canSteer, steer } from "./steering.js";
import { STEER_TOOLS } from "./tools.js";

/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {{pointer: number, kind: import("./edits.js").Kind, positive: boolean, line: Point[]}} Running */

/** @type {Running|null} */
let running = null;

/** Begin to listen; before the pen that draws. */
export function listenToSteering() {
  const view = find("view", HTMLCanvasElement);
  const capture = { capture: true };
  view.addEventListener("pointerdown", onDown, capture);
  view.addEventListener("pointermove", onMove, capture);
  view.addEventListener("pointerup", onUp, capture);
  view.addEventListener("pointercancel", cancelLine, capture);
}

/** @param {PointerEvent} event */
function onDown(event) {
  const tool = STEER_TOOLS.find((one) => one.tool === state.tool);
  if (!tool || event.button !== 0 || event.shiftKey || running) return;
  const point = takePress(event);
  if (!point || !canSteer()) return;
  running = { pointer: event.pointerId, kind: tool.kind, positive: tool.positive !== (event.ctrlKey || event.metaKey), line: [point] };
  find("view", HTMLCanvasElement).setPointerCapture(event.pointerId);
  show();
}

/** @param {PointerEvent} event */
function onMove(event) {
  if (!running || event.pointerId !== running.pointer) return;
  event.stopImmediatePropagation();
  noteActivity();
  const events = event.getCoalescedEvents?.() ?? [];
  for (const part of events.length ? events : [event]) {
    const point = locateEvent(part);
    if (!point) continue;
    if (running.kind === "click") running.line = [point];
    else if (running.kind === "box") running.line = [running.line[0], point];
    else running.line.push(point);
  }
  show();
}

/** @param {PointerEvent} event */
function onUp(event) {
  if (!running || event.pointerId !== running.pointer) return;
  const { kind, positive } = running;
  const points = readPoints(running);
  cancelLine();
  if (points) steer({ kind, positive, points });
}

/** Forget the line that is being drawn: a second finger came, or the pointer was taken away. */
export function cancelLine() {
  running = null;
  showOpenLine(null);
}

/**
 * @param {Running} stroke
 * @returns {[number, number][]|null} null, and why on the screen, if it says nothing
 */
function readPoints({ kind, line }) {
  const { session } = state;
  if (!session) return null;
  const { height, width } = session;
  if (kind === "box") {
    /** @type {(value: number, most: number) => number} */
    const clip = (value, most) => Math.min(most - 1, Math.max(0, Math.floor(value)));
    const corners = line.map(([y, x]) => /** @type {[number, number]} */ ([clip(y, height), clip(x, width)]));
    if (corners.length > 1 && corners[0][0] !== corners[1][0] && corners[0][1] !== corners[1][1]) return corners;
    toast("Drag from one corner of the box to the other.", "bad");
    return null;
  }
  const points = thinLine(line, session);
  if (!points.length) toast("That is outside of the image.", "bad");
  else if (kind === "lasso" && points.length < 3) toast("Draw around the structure.", "bad");
  else return points;
  return null;
}

function show() {
  const { session, structure, z } = state;
  if (!running || !session) return;
  const { kind, positive, line } = running;
  showOpenLine({ kind, positive, structure, z, points: line.map(([y, x]) => [Math.floor(y), Math.floor(x)]) });
}
