// The two other planes and the surface beside the axial slice, linked by a crosshair.

import { getOverview, getOverviewMask } from "./api.js";
import { drawSlice, fitToScreen, getContext, maskLayer, renderGrey } from "./draw.js";
import { element, find, findInput } from "./dom.js";
import { report } from "./failures.js";
import { locate, wholeSlice } from "./geometry.js";
import { goTo } from "./moving.js";
import { CoarseResult, cutPlane, readOverview, readOverviewMask } from "./overview.js";
import { colorOf, shown, state, store } from "./state.js";
import { cropSlab, findSurface, soften } from "./surface.js";
import { SurfaceView } from "./surface_view.js";

/** @typedef {"coronal"|"sagittal"} Plane */
/** @typedef {import("./geometry.js").Point} Point */

/** @type {readonly Plane[]} */
const PLANES = ["coronal", "sagittal"];
const KEPT = "progidiff.views";
/** Windows at least so wide show the planes unless somebody hid them. */
const WIDE = 1500;
const SURFACE_MS = 250;
/** A pointer that moved less than this many pixels was a click. */
const CLICK = 4;

/** @type {{session: import("./session.js").ImageSession|null, overview: import("./overview.js").Overview|null}} */
let fetched = { session: null, overview: null };
/** @type {{key: string, result: CoarseResult|null}} */
let coarse = { key: "", result: null };
/** @type {SurfaceView|null} */
let surfaceView = null;
/** @type {{key: string, surface: import("./surface.js").Surface|null}} */
let made = { key: "", surface: null };
/** @type {ReturnType<typeof setTimeout>|undefined} */
let timer;

/** Put them there, once. */
export function buildViews() {
  let kept = null;
  try {
    kept = localStorage.getItem(KEPT);
  } catch {
    // Private windows may refuse storage: the width of the window decides then.
  }
  for (const plane of PLANES) listenToPlane(plane, find(plane, HTMLCanvasElement));
  findInput("slab").addEventListener("input", renderViews);
  listenToClicks(find("view", HTMLCanvasElement));
  new ResizeObserver(() => void renderViews()).observe(find("views"));
  store.set({ areViewsShown: kept === null ? window.innerWidth >= WIDE : kept === "yes" });
}

export function toggleViews() {
  store.set({ areViewsShown: !state.areViewsShown });
  try {
    localStorage.setItem(KEPT, state.areViewsShown ? "yes" : "no");
  } catch {
    // They are shown as asked until the page is closed.
  }
}

/** @param {Plane} plane @param {HTMLCanvasElement} canvas */
function listenToPlane(plane, canvas) {
  /** @param {PointerEvent} event */
  const go = (event) => {
    const { session } = state;
    const { overview } = fetched;
    if (!session || !overview || fetched.session !== session || (event.type === "pointermove" && !event.buttons)) return;
    const box = canvas.getBoundingClientRect();
    const ratio = window.devicePixelRatio || 1;
    const place = places.get(plane);
    if (!place) return;
    const [row, across] = locate(place, (event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio);
    const [y, x] = state.cross ?? centerOf(session);
    const along = across * overview.steps[plane === "coronal" ? 2 : 1];
    goTo(Math.floor((overview.depth - row) * overview.steps[0]));
    store.set({ cross: clip(plane === "coronal" ? [y, along] : [along, x], session) });
  };
  canvas.addEventListener("pointerdown", (event) => (canvas.setPointerCapture(event.pointerId), go(event)));
  canvas.addEventListener("pointermove", go);
}

/** @type {Map<Plane, import("./geometry.js").Place>} */
const places = new Map();

/** @param {{height: number, width: number}} session @returns {Point} */
const centerOf = ({ height, width }) => [height / 2, width / 2];

/** @param {Point} point @param {{height: number, width: number}} session @returns {Point} */
const clip = ([y, x], { height, width }) => [Math.min(height - 1, Math.max(0, y)), Math.min(width - 1, Math.max(0, x))];

/**
 * A click on the axial slice moves the crosshair; a drag is for others.
 * @param {HTMLCanvasElement} view
 */
function listenToClicks(view) {
  /** @type {{x: number, y: number}|null} */
  let start = null;
  view.addEventListener("pointerdown", ({ clientX, clientY, button }) => (start = button === 0 ? { x: clientX, y: clientY } : null), { capture: true });
  view.addEventListener(
    "pointerup",
    ({ clientX, clientY }) => {
      const { session } = state;
      if (!start || !session || !shown.place || !state.areViewsShown) return;
      if (!state.tool && Math.hypot(clientX - start.x, clientY - start.y) > CLICK) return;
      const box = view.getBoundingClientRect();
      const ratio = window.devicePixelRatio || 1;
      store.set({ cross: clip(locate(shown.place, (clientX - box.left) * ratio, (clientY - box.top) * ratio), session) });
    },
    { capture: true },
  );
}

/** Fetch what is missing and draw what is there. */
export async function renderViews() {
  const { session } = state;
  const areViewsShown = state.areViewsShown && !session?.picture; // A picture has no other planes.
  const views = find("views");
  views.hidden = !areViewsShown || !session;
  paintCross();
  if (!session || !areViewsShown) return;
  try {
    await fetchMissing(session);
  } catch (error) {
    report(error);
    return;
  }
  if (state.session !== session || fetched.session !== session || !fetched.overview || !coarse.result) return;
  coarse.result.update(state.drawing, state.structure);
  for (const plane of PLANES) paintPlane(plane, session, fetched.overview, coarse.result);
  scheduleSurface();
}

/** @param {import("./session.js").ImageSession} session */
async function fetchMissing(session) {
  if (fetched.session !== session) {
    fetched = { session, overview: null };
    coarse = { key: "", result: null };
    const overview = readOverview(await getOverview(session.image));
    if (fetched.session === session) fetched.overview = overview;
  }
  const { overview } = fetched;
  if (!overview || fetched.session !== session) return;
  const { structure } = state;
  const proposals = structure ? session.keyOf(structure) : "";
  const key = [session.image, proposals, structure].join("\n");
  if (coarse.key === key) return;
  coarse = { key, result: null };
  const consensus = proposals ? readOverviewMask(await getOverviewMask(session.image, proposals, structure)) : null;
  if (coarse.key === key) coarse.result = new CoarseResult(overview, consensus);
}

/**
 * @param {Plane} plane
 * @param {import("./session.js").ImageSession} session
 * @param {import("./overview.js").Overview} overview
 * @param {CoarseResult} result
 */
function paintPlane(plane, session, overview, result) {
  const [y, x] = state.cross ?? centerOf(session);
  const { steps } = overview;
  const index = plane === "coronal" ? Math.min(overview.height - 1, Math.floor(y / steps[1])) : Math.min(overview.width - 1, Math.floor(x / steps[2]));
  const { values, height, width } = cutPlane(overview.pixels, overview, plane, index);
  const mask = cutPlane(result.mask, overview, plane, index).values;
  const [dz, dy, dx] = session.info.spacing;
  const spacing = /** @type {const} */ ([dz * steps[0], plane === "coronal" ? dx * steps[2] : dy * steps[1]]);
  const grey = renderGrey(values, height, width, session.info.scale, state.window);
  const canvas = find(plane, HTMLCanvasElement);
  const layers = state.isHidden || !state.structure ? [] : [maskLayer(mask, { y0: 0, y1: height, x0: 0, x1: width }, colorOf(state.structure), { fill: state.opacity, width: 1.25 })];
  const place = drawSlice(canvas, grey, wholeSlice({ height, width, spacing }), spacing, layers);
  places.set(plane, place);
  const row = height - (state.z + 0.5) / steps[0];
  const column = plane === "coronal" ? x / steps[2] : y / steps[1];
  paintLines(canvas, place.left + column * place.scaleX, place.top + row * place.scaleY);
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {number} x pixels of the canvas
 * @param {number} y
 */
function paintLines(canvas, x, y) {
  const context = getContext(canvas);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.strokeStyle = "#ffd479b0";
  context.lineWidth = window.devicePixelRatio || 1;
  context.beginPath();
  context.moveTo(0, y);
  context.lineTo(canvas.width, y);
  context.moveTo(x, 0);
  context.lineTo(x, canvas.height);
  context.stroke();
}

/** The crosshair over the axial slice. */
export function paintCross() {
  const canvas = find("cross", HTMLCanvasElement);
  const { session } = state;
  fitToScreen(canvas);
  const context = getContext(canvas);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (!session || !shown.place || !state.areViewsShown || !state.cross) return;
  const [y, x] = state.cross;
  paintLines(canvas, shown.place.left + x * shown.place.scaleX, shown.place.top + y * shown.place.scaleY);
}

/** The surface takes longer than a frame: it is made when nothing has changed for a moment. */
function scheduleSurface() {
  clearTimeout(timer);
  timer = setTimeout(makeSurface, SURFACE_MS);
}

function makeSurface() {
  const { session } = state;
  const { result } = coarse;
  if (!session || !result || fetched.session !== session) return;
  surfaceView ??= new SurfaceView(find("surface", HTMLCanvasElement));
  const note = find("surface-note");
  note.hidden = surfaceView.canShow;
  if (!surfaceView.canShow) {
    note.textContent = "This browser draws no surfaces (WebGL 2 is off).";
    return;
  }
  const { steps, depth, height, width } = result.raster;
  const [dz, dy, dx] = session.info.spacing.map((length, axis) => length * steps[axis]);
  const slab = Number(findInput("slab").value);
  const isWhole = slab >= Number(findInput("slab").max);
  const middle = Math.floor(state.z / steps[0]);
  const reach = isWhole ? depth : Math.max(1, Math.round(slab / dz));
  find("slab-text").textContent = isWhole ? "whole" : `± ${Math.round(reach * dz)} mm`;
  const key = [coarse.key, result.version, isWhole ? "" : middle, reach].join("\n");
  if (made.key !== key) {
    const part = cropSlab(result.mask, { depth, height, width }, middle - reach, middle + reach + 1);
    const surface = part && findSurface(soften(part.mask, part.size), part.size, [dz, dy, dx]);
    if (part && surface) {
      const [oz, oy, ox] = part.origin;
      const shift = [(ox + 0.5) * dx, (oy + 0.5) * dy, (oz + 0.5) * dz];
      for (let i = 0; i < surface.positions.length; i += 1) surface.positions[i] += shift[i % 3];
    }
    made = { key, surface };
  }
  surfaceView.show({ surface: made.surface, size: [width * dx, height * dy, depth * dz], color: colorOf(state.structure), level: (state.z + 0.5) * session.info.spacing[0] });
  find("surface").dataset.triangles = String((made.surface?.indices.length ?? 0) / 3);
}

/** Their part of index.html is made here: nothing of it is there before somebody looks. */
export function insertViews() {
  const slab = element("input", { id: "slab", type: "range", min: "2", max: "120", value: "120", "aria-label": "Thickness of the slab" });
  find("views").replaceChildren(
    ...PLANES.map((plane) => element("figure", {}, element("canvas", { id: plane, "aria-label": `${plane} plane` }), element("figcaption", {}, plane))),
    element(
      "figure",
      {},
      element("canvas", { id: "surface", "aria-label": "surface" }),
      element("p", { id: "surface-note", hidden: true }),
      element("figcaption", {}, "surface, ", element("output", { id: "slab-text" }), slab),
    ),
  );
}
