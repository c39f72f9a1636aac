// Two fingers on the picture move and enlarge it, whatever one finger does.

import { find } from "./dom.js";
import { locate, pinch } from "./geometry.js";
import { setZoom } from "./moving.js";
import { cancelStroke } from "./pen.js";
import { cancelLine } from "./steering_pen.js";
import { shown, state } from "./state.js";

/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {import("./geometry.js").Finger} Finger */

/** Begin to listen; before whoever listens to single fingers. */
export function listenToFingers() {
  const view = find("view", HTMLCanvasElement);
  /** @type {Map<number, Finger>} */
  const fingers = new Map();
  /** @type {{point: Point, fingers: [Finger, Finger], place: import("./geometry.js").Place, zoom: number}|null} */
  let start = null;
  let isHeld = false;
  /** @param {PointerEvent} event @returns {Finger} */
  const read = (event) => {
    const box = view.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    return { y: (event.clientY - box.top) * ratio, x: (event.clientX - box.left) * ratio };
  };
  const pair = () => /** @type {[Finger, Finger]} */ ([...fingers.values()].slice(0, 2));
  const capture = { capture: true };
  view.addEventListener(
    "pointerdown",
    (event) => {
      if (event.pointerType !== "touch") return;
      fingers.set(event.pointerId, read(event));
      if (fingers.size < 2) return;
      event.stopImmediatePropagation();
      isHeld = true;
      cancelStroke();
      cancelLine();
      if (fingers.size !== 2 || !shown.place) return;
      const [one, other] = pair();
      const point = locate(shown.place, (one.x + other.x) / 2, (one.y + other.y) / 2);
      start = { point, fingers: [one, other], place: { ...shown.place }, zoom: state.zoom };
    },
    capture,
  );
  view.addEventListener(
    "pointermove",
    (event) => {
      if (fingers.has(event.pointerId)) fingers.set(event.pointerId, read(event));
      if (!isHeld || event.pointerType !== "touch") return;
      event.stopImmediatePropagation();
      if (!start || fingers.size !== 2) return;
      const { zoom, center } = pinch(start.point, start.fingers, pair(), start.place, start.zoom, view);
      setZoom(zoom, center);
    },
    capture,
  );
  /** @param {PointerEvent} event */
  const lift = (event) => {
    fingers.delete(event.pointerId);
    start = null;
    // The last finger must not go on as if it had been alone.
    if (!fingers.size) isHeld = false;
  };
  view.addEventListener("pointerup", lift, capture);
  view.addEventListener("pointercancel", lift, capture);
}
