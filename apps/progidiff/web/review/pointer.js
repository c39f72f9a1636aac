// Mouse, wheel and fingers on the picture and on the strip of slices.

import { noteActivity } from "./activity.js";
import { find, findInput } from "./dom.js";
import { dragWindow, keepPoint, limitZoom, locate } from "./geometry.js";
import { goTo, scrollBy, setZoom } from "./moving.js";
import { paint } from "./stage.js";
import { shown, state, store } from "./state.js";

const PIXELS_PER_SLICE = 9;
const PIXELS_PER_STEP = 40;
const ZOOM_PIXELS = 300;

export function listenToView() {
  const view = find("view", HTMLCanvasElement);
  listenToDrags(view);
  listenToWheel(view);
  listenToDepth(find("depth", HTMLCanvasElement));
  const scroll = findInput("scroll");
  scroll.addEventListener("input", () => goTo(Number(scroll.value)));
  new ResizeObserver(paint).observe(view);
}

/** @param {HTMLCanvasElement} view */
function listenToDrags(view) {
  /** @type {{event: PointerEvent, z: number, window: readonly [number, number], center: import("./geometry.js").Point}|null} */
  let start = null;
  view.addEventListener("pointerdown", (event) => {
    const { session, z, window, center } = state;
    view.focus({ preventScroll: true });
    view.setPointerCapture(event.pointerId);
    if (session) start = { event, z, window, center: center ?? [session.height / 2, session.width / 2] };
  });
  view.addEventListener("pointermove", (event) => {
    if (!start || !state.session) return;
    noteActivity();
    const [dx, dy] = [event.clientX - start.event.clientX, event.clientY - start.event.clientY];
    if (start.event.pointerType === "touch") {
      if (state.session.picture) pan(start.center, dx, dy);
      else goTo(start.z + Math.round(-dy / PIXELS_PER_SLICE));
    } else if ((start.event.button === 1 || event.shiftKey) && state.zoom > 1) {
      pan(start.center, dx, dy);
    } else if (Math.abs(dx) + Math.abs(dy) > 2) {
      store.set({ window: dragWindow(start.window, dx, dy), preset: "custom" });
    }
  });
  view.addEventListener("pointerup", () => (start = null));
  view.addEventListener("pointercancel", () => (start = null));
}

/**
 * @param {import("./geometry.js").Point} center when the pointer went down
 * @param {number} dx
 * @param {number} dy
 */
function pan([y, x], dx, dy) {
  if (!shown.place || state.zoom <= 1) return;
  const ratio = window.devicePixelRatio || 1;
  store.set({ center: [y - (dy * ratio) / shown.place.scaleY, x - (dx * ratio) / shown.place.scaleX] });
}

/** @param {HTMLCanvasElement} view */
function listenToWheel(view) {
  let wheel = 0;
  /** @param {WheelEvent} event */
  const turn = (event) => {
    event.preventDefault();
    noteActivity();
    if (event.ctrlKey || state.session?.picture) {
      zoomAt(event, view);
      return;
    }
    wheel += Math.sign(event.deltaY) * Math.min(1, Math.abs(event.deltaY) / PIXELS_PER_STEP);
    const steps = Math.trunc(wheel);
    wheel -= steps;
    if (steps) scrollBy(-steps);
  };
  view.addEventListener("wheel", turn, { passive: false });
}

/** @param {HTMLCanvasElement} depth */
function listenToDepth(depth) {
  /** @param {PointerEvent} event */
  const jump = (event) => {
    if (!state.session || (event.type === "pointermove" && !event.buttons)) return;
    const box = depth.getBoundingClientRect();
    goTo(Math.floor((1 - (event.clientY - box.top) / box.height) * state.session.depth));
  };
  depth.addEventListener("pointerdown", (event) => (depth.setPointerCapture(event.pointerId), jump(event)));
  depth.addEventListener("pointermove", jump);
}

/**
 * Zoom so that the pixel under the pointer stays there.
 * @param {WheelEvent} event
 * @param {HTMLCanvasElement} view
 */
function zoomAt(event, view) {
  const { session } = state;
  if (!session || !shown.place) return;
  const box = view.getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const point = locate(shown.place, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
  const zoom = limitZoom(state.zoom * Math.exp(-event.deltaY / ZOOM_PIXELS));
  setZoom(zoom, keepPoint(point, state.center ?? [session.height / 2, session.width / 2], state.zoom, zoom));
}
