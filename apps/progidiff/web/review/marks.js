// Clicks, lines and boxes that steer, drawn over the slice.

import { fitToScreen, getContext } from "./draw.js";
import { find } from "./dom.js";
import { shown, state } from "./state.js";

/** @typedef {import("./edits.js").Edit} Edit */

const INSIDE = "#3ddc97";
const OUTSIDE = "#ff5d73";
const HALO = "#0b0f14";
const [RADIUS, ARM, LINE] = [7, 4, 2];

/** The line that is being drawn. @type {Edit|null} */
let open = null;

/** @param {Edit|null} edit */
export function showOpenLine(edit) {
  open = edit;
  paintMarks();
}

/** Draw those of the active structure on the slice that is shown. */
export function paintMarks() {
  const canvas = find("marks", HTMLCanvasElement);
  const { ratio } = fitToScreen(canvas);
  const context = /** @type {CanvasRenderingContext2D} */ (getContext(canvas));
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.clearRect(0, 0, canvas.width, canvas.height);
  const { edits, structure, z } = state;
  if (!edits || !shown.place || shown.z !== z || state.isHidden) return;
  const drawn = [...edits.on(structure, z), ...(open && open.z === z ? [open] : [])];
  canvas.dataset.count = String(drawn.length);
  for (const edit of drawn) paintEdit(context, edit, ratio);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {Edit} edit
 * @param {number} ratio
 */
function paintEdit(context, { kind, positive, points }, ratio) {
  const { place } = shown;
  if (!place) return;
  /** @param {readonly [number, number]} point @returns {[number, number]} the middle of a pixel on the screen */
  const locate = ([y, x]) => [place.left + (x + 0.5) * place.scaleX, place.top + (y + 0.5) * place.scaleY];
  const color = positive ? INSIDE : OUTSIDE;
  if (kind === "click") {
    paintClick(context, locate(points[0]), positive, color, ratio);
    return;
  }
  const path = new Path2D();
  if (kind === "box") {
    const [[y0, x0], [y1, x1]] = points.length > 1 ? points : [points[0], points[0]];
    const [left, top] = [place.left + Math.min(x0, x1) * place.scaleX, place.top + Math.min(y0, y1) * place.scaleY];
    path.rect(left, top, (Math.abs(x1 - x0) + 1) * place.scaleX, (Math.abs(y1 - y0) + 1) * place.scaleY);
  } else {
    points.forEach((point, index) => (index ? path.lineTo(...locate(point)) : path.moveTo(...locate(point))));
    if (kind === "lasso") path.closePath();
    if (points.length === 1) path.lineTo(...locate(points[0]));
  }
  context.lineCap = context.lineJoin = "round";
  context.setLineDash(kind === "scribble" ? [] : [6 * ratio, 4 * ratio]);
  for (const [width, style] of /** @type {const} */ ([[LINE + 2, HALO], [LINE, color]])) {
    context.lineWidth = width * ratio;
    context.strokeStyle = style;
    context.stroke(path);
  }
  context.setLineDash([]);
}

/**
 * @param {CanvasRenderingContext2D} context
 * @param {[number, number]} place
 * @param {boolean} positive
 * @param {string} color
 * @param {number} ratio
 */
function paintClick(context, [x, y], positive, color, ratio) {
  context.beginPath();
  context.arc(x, y, RADIUS * ratio, 0, 2 * Math.PI);
  context.fillStyle = color;
  context.fill();
  context.lineWidth = 1.5 * ratio;
  context.strokeStyle = HALO;
  context.stroke();
  context.beginPath();
  context.moveTo(x - ARM * ratio, y);
  context.lineTo(x + ARM * ratio, y);
  if (positive) {
    context.moveTo(x, y - ARM * ratio);
    context.lineTo(x, y + ARM * ratio);
  }
  context.lineWidth = LINE * ratio;
  context.stroke();
}
