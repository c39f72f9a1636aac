// Mouse, wheel and fingers on the picture and on the strip of slices.

import { find } from "./dom.js";
import { paint } from "./stage.js";
import { shown, state } from "./state.js";

export function listenToView({ goTo, scrollBy, setZoom }) {
  const view = find("view");
  let drag = null;
  view.addEventListener("pointerdown", (event) => {
    view.focus({ preventScroll: true });
    view.setPointerCapture(event.pointerId);
    drag = { x: event.clientX, y: event.clientY, z: state.z, window: state.window, center: state.center, isTouch: event.pointerType === "touch", button: event.button };
  });
  view.addEventListener("pointermove", (event) => {
    if (!drag || !state.session) return;
    state.lastActive = Date.now();
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    if (drag.isTouch) {
      goTo(drag.z + Math.round(-dy / 9));
    } else if ((drag.button === 1 || event.shiftKey) && shown.place && state.zoom > 1) {
      const ratio = window.devicePixelRatio || 1;
      const [y, x] = drag.center ?? [state.session.height / 2, state.session.width / 2];
      state.center = [y - (dy * ratio) / shown.place.scaleY, x - (dx * ratio) / shown.place.scaleX];
      paint();
    } else if (Math.abs(dx) + Math.abs(dy) > 2) {
      const [low, high] = drag.window;
      const span = Math.max(1e-6, (high - low) * Math.exp(dx / 300));
      const middle = (high + low) / 2 + (dy / 500) * (high - low);
      Object.assign(state, { window: [middle - span / 2, middle + span / 2], preset: "custom" });
      paint();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, () => (drag = null));
  let wheel = 0;
  view.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      state.lastActive = Date.now();
      if (event.ctrlKey) {
        zoomAt(event, setZoom);
        return;
      }
      wheel += Math.sign(event.deltaY) * Math.min(1, Math.abs(event.deltaY) / 40);
      const steps = Math.trunc(wheel);
      wheel -= steps;
      if (steps) scrollBy(-steps);
    },
    { passive: false },
  );
  const depth = find("depth");
  const jump = (event) => {
    if (!state.session || (event.type === "pointermove" && !event.buttons)) return;
    const box = depth.getBoundingClientRect();
    goTo(Math.floor((1 - (event.clientY - box.top) / box.height) * state.session.depth));
  };
  depth.addEventListener("pointerdown", (event) => (depth.setPointerCapture(event.pointerId), jump(event)));
  depth.addEventListener("pointermove", jump);
  find("scroll").addEventListener("input", (event) => goTo(Number(event.target.value)));
  new ResizeObserver(() => state.session && paint()).observe(find("view"));
}

/** Zoom so that the pixel under the pointer stays there. */
function zoomAt(event, setZoom) {
  if (!shown.place) return;
  const view = find("view").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const factor = Math.exp(-event.deltaY / 300);
  const x = ((event.clientX - view.left) * ratio - shown.place.left) / shown.place.scaleX;
  const y = ((event.clientY - view.top) * ratio - shown.place.top) / shown.place.scaleY;
  const [cy, cx] = state.center ?? [state.session.height / 2, state.session.width / 2];
  const zoom = Math.min(12, Math.max(1, state.zoom * factor));
  const moved = 1 - state.zoom / zoom;
  setZoom(zoom, [cy + (y - cy) * moved, cx + (x - cx) * moved]);
}
