// Where a slice lies on a canvas. Slices have pixels of their own, spacing is (dy, dx) in mm, and a canvas has pixels of the screen.

/** @typedef {import("./masks.js").Box} Box */
/** @typedef {{x: number, y: number, width: number, height: number}} Frame the part of a slice that a canvas shows, in pixels of the slice */
/** @typedef {{scaleX: number, scaleY: number, left: number, top: number}} Place pixel of the slice -> pixel of the canvas */
/** @typedef {readonly [y: number, x: number]} Point in pixels of the slice */
/** @typedef {readonly [dy: number, dx: number]} Spacing */
/** @typedef {{height: number, width: number, spacing: Spacing}} Plane a slice: pixels and mm */

export const MAX_ZOOM = 12;
/** A structure is shown with this much around it. */
const MARGIN = 0.12;
const LEAST_MM = 40;

/** @param {number} zoom */
export const limitZoom = (zoom) => Math.min(MAX_ZOOM, Math.max(1, zoom));

/**
 * The frame in the middle of a canvas, as large as fits, in true proportions.
 * @param {Frame} frame
 * @param {Spacing} spacing
 * @param {number} width
 * @param {number} height
 * @returns {Place}
 */
export function fitFrame(frame, [dy, dx], width, height) {
  const scale = Math.min(width / (frame.width * dx), height / (frame.height * dy));
  return {
    scaleX: scale * dx,
    scaleY: scale * dy,
    left: (width - frame.width * dx * scale) / 2 - frame.x * dx * scale,
    top: (height - frame.height * dy * scale) / 2 - frame.y * dy * scale,
  };
}

/** @param {Plane} plane @returns {Frame} */
export const wholeSlice = ({ height, width }) => ({ x: 0, y: 0, width, height });

/**
 * A frame around a box with a margin, as wide and high in mm as the canvas asks for.
 * @param {Box} box
 * @param {Spacing} spacing
 * @param {number} aspect width by height of the canvas
 * @returns {Frame}
 */
export function frameAround(box, [dy, dx], aspect) {
  const mmHighLeast = (box.y1 - box.y0) * dy * (1 + 2 * MARGIN);
  const mmWide = Math.max((box.x1 - box.x0) * dx * (1 + 2 * MARGIN), mmHighLeast * aspect, LEAST_MM);
  const mmHigh = Math.max(mmHighLeast, mmWide / aspect);
  const middleX = (box.x0 + box.x1) / 2;
  const middleY = (box.y0 + box.y1) / 2;
  return { x: middleX - mmWide / dx / 2, y: middleY - mmHigh / dy / 2, width: mmWide / dx, height: mmHigh / dy };
}

/**
 * The frame that is left of a slice when it is enlarged.
 * @param {Plane} plane
 * @param {number} zoom from 1, the whole slice
 * @param {Point|null} center null for the middle
 * @param {number} aspect width by height of the canvas
 * @returns {Frame}
 */
export function frameZoomed(plane, zoom, center, aspect) {
  if (zoom === 1) return wholeSlice(plane);
  const [dy, dx] = plane.spacing;
  const [y, x] = center ?? [plane.height / 2, plane.width / 2];
  const mmHigh = Math.max(plane.height * dy, (plane.width * dx) / aspect) / zoom;
  const width = (mmHigh * aspect) / dx;
  const height = mmHigh / dy;
  return { x: x - width / 2, y: y - height / 2, width, height };
}

/**
 * Zoom and centre with which a structure fills the picture.
 * @param {Box} box
 * @param {Plane} plane
 * @returns {{zoom: number, center: Point}}
 */
export function zoomTo(box, plane) {
  const share = Math.max((box.y1 - box.y0) / plane.height, (box.x1 - box.x0) / plane.width);
  return { zoom: limitZoom(Math.max(1.2, 0.7 / share)), center: [(box.y0 + box.y1) / 2, (box.x0 + box.x1) / 2] };
}

/**
 * The centre with which a point stays where it is while the zoom changes.
 * @param {Point} point
 * @param {Point} center
 * @param {number} before zoom
 * @param {number} after zoom
 * @returns {Point}
 */
export function keepPoint([y, x], [cy, cx], before, after) {
  const moved = 1 - before / after;
  return [cy + (y - cy) * moved, cx + (x - cx) * moved];
}

/**
 * The pixel of the slice under a pixel of the canvas.
 * @param {Place} place
 * @param {number} x
 * @param {number} y
 * @returns {Point}
 */
export const locate = (place, x, y) => [(y - place.top) / place.scaleY, (x - place.left) / place.scaleX];

/**
 * Window after a drag: sideways is its width, up and down its level.
 * @param {readonly [low: number, high: number]} window
 * @param {number} dx
 * @param {number} dy
 * @returns {[low: number, high: number]}
 */
export function dragWindow([low, high], dx, dy) {
  const span = Math.max(1e-6, (high - low) * Math.exp(dx / 300));
  const middle = (high + low) / 2 + (dy / 500) * (high - low);
  return [middle - span / 2, middle + span / 2];
}

/** @typedef {{y: number, x: number}} Finger in pixels of the canvas */

/**
 * Zoom and centre with which what lay between two fingers still does.
 * @param {Point} point of the slice that lay between them
 * @param {[Finger, Finger]} before
 * @param {[Finger, Finger]} now
 * @param {Place} place of the slice when they came
 * @param {number} zoom when they came
 * @param {{width: number, height: number}} canvas
 * @returns {{zoom: number, center: Point}}
 */
export function pinch(point, before, now, place, zoom, { width, height }) {
  /** @param {[Finger, Finger]} fingers */
  const span = ([one, other]) => Math.max(1, Math.hypot(one.y - other.y, one.x - other.x));
  const after = limitZoom((zoom * span(now)) / span(before));
  const [y, x] = [(now[0].y + now[1].y) / 2, (now[0].x + now[1].x) / 2];
  const grown = after / zoom;
  return { zoom: after, center: [point[0] - (y - height / 2) / (place.scaleY * grown), point[1] - (x - width / 2) / (place.scaleX * grown)] };
}
