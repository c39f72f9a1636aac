// Mouse, pen and one finger on the picture while a drawing tool is in hand. What is not for the tool goes on to whoever listens next.

import { noteActivity } from "./activity.js";
import { find } from "./dom.js";
import { locate } from "./geometry.js";
import { Ink } from "./ink.js";
import { commit, findBase, findSubject, floodAt } from "./painting.js";
import { nameSlice } from "./slices.js";
import { paint } from "./stage.js";
import { colorOf, shown, state, store } from "./state.js";
import { startBrush, startLasso } from "./strokes.js";
import { TOOLS } from "./tools.js";

/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {{pointer: number, stroke: import("./strokes.js").Stroke, base: import("./painting.js").Base, structure: string, z: number, words: string}} Running */

/** @type {Running|null} */
let running = null;
/** @type {Ink|null} */
let ink = null;

/** Begin to listen; before everybody else who listens to the picture. */
export function listenToPen() {
  const view = find("view", HTMLCanvasElement);
  ink = new Ink(find("ink", HTMLCanvasElement));
  const capture = { capture: true };
  view.addEventListener("pointerdown", onDown, capture);
  view.addEventListener("pointermove", onMove, capture);
  view.addEventListener("pointerup", onUp, capture);
  view.addEventListener("pointercancel", cancelStroke, capture);
  view.addEventListener("pointerleave", () => showRing(null));
}

/** @param {PointerEvent} event @returns {Point|null} in pixels of the slice */
export function locateEvent(event) {
  const box = find("view").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  return shown.place && locate(shown.place, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
}

/**
 * Take a press of the pointer for a tool, and show again what is hidden instead of drawing unseen.
 * @param {PointerEvent} event
 * @returns {Point|null} where to begin, in pixels of the slice; null for nowhere
 */
export function takePress(event) {
  event.stopImmediatePropagation();
  event.preventDefault();
  noteActivity();
  find("view", HTMLCanvasElement).focus({ preventScroll: true });
  const point = locateEvent(event);
  if (point && !state.isHidden) return point;
  store.set({ isHidden: false });
  return null;
}

/** @param {PointerEvent} event */
function onDown(event) {
  if (!TOOLS.some(({ tool }) => tool === state.tool) || event.button !== 0 || event.shiftKey || running) return;
  const point = takePress(event);
  if (!point) return;
  if (state.tool === "flood") {
    floodAt(point);
    return;
  }
  if (begin(event, point)) find("view", HTMLCanvasElement).setPointerCapture(event.pointerId);
}

/**
 * @param {PointerEvent} event
 * @param {Point} point
 */
function begin(event, point) {
  const subject = findSubject();
  const base = subject && findBase(subject);
  if (!base || !shown.place || !ink) return false;
  const { session, structure, z } = subject;
  const isInverse = event.ctrlKey || event.metaKey;
  const value = /** @type {0|1} */ ((state.tool === "eraser") === isInverse ? 1 : 0);
  const mask = base.mask.slice();
  const stroke = state.tool === "lasso" ? startLasso(mask, session, value) : startBrush(mask, session, state.settings.size, value, state.tool === "range" ? buildGate() : undefined);
  const name = TOOLS.find(({ tool }) => tool === state.tool)?.name.toLowerCase();
  running = { pointer: event.pointerId, stroke, base, structure, z, words: `${name} on ${structure}, slice ${nameSlice(z)}` };
  store.set({ inked: structure, mode: "pick" });
  store.flush();
  paint();
  ink.begin(mask, session, shown.place, colorOf(structure), state.opacity);
  ink.touch(stroke.move(point));
  return true;
}

/** Which pixels the threshold brush may change. */
function buildGate() {
  const { pixels } = shown;
  const { low, high } = state.settings;
  const [slope, intercept] = state.session?.info.scale ?? [1, 0];
  /** @param {number} index */
  return (index) => {
    const value = (pixels?.[index] ?? 0) * slope + intercept;
    return value >= low && value <= high;
  };
}

/** @param {PointerEvent} event */
function onMove(event) {
  showRing(event);
  if (!running || event.pointerId !== running.pointer || !ink) return;
  event.stopImmediatePropagation();
  noteActivity();
  const { stroke } = running;
  // A fast hand moves several times between two frames.
  const events = event.getCoalescedEvents?.() ?? [];
  for (const part of events.length ? events : [event]) {
    const point = locateEvent(part);
    if (!point) continue;
    ink.touch(stroke.move(point));
    ink.drawLine(stroke.line);
  }
}

/** @param {PointerEvent} event */
function onUp(event) {
  if (!running || event.pointerId !== running.pointer) return;
  const { stroke, base, structure, z, words } = running;
  stroke.finish();
  running = null;
  commit(words, [{ ...base, structure, z, mask: stroke.mask }], z);
  endInk();
}

/** Forget the stroke that is being drawn: a second finger came, or the pointer was taken away. */
export function cancelStroke() {
  if (!running) return;
  running = null;
  endInk();
}

/** The picture shows the structure again, and the ink above it goes in the same frame. */
function endInk() {
  store.set({ inked: "" });
  store.flush();
  paint();
  ink?.end();
}

/**
 * A ring as large as the brush, where the pointer is.
 * @param {PointerEvent|null} event
 */
function showRing(event) {
  const ring = find("ring");
  const isRound = state.tool === "brush" || state.tool === "eraser" || state.tool === "range";
  const isShown = Boolean(event && isRound && shown.place && state.session && event.pointerType !== "touch");
  ring.hidden = !isShown;
  if (!event || !isShown || !shown.place || !state.session) return;
  const box = find("view").getBoundingClientRect();
  const across = (state.settings.size * shown.place.scaleX) / state.session.spacing[1] / (window.devicePixelRatio || 1);
  Object.assign(ring.style, {
    width: `${across}px`,
    height: `${across}px`,
    transform: `translate(${event.clientX - box.left - across / 2}px, ${event.clientY - box.top - across / 2}px)`,
  });
  ring.classList.toggle("takes", (state.tool === "eraser") !== (event.ctrlKey || event.metaKey));
}
