// Drawing a slice and what lies over it on a 2-D canvas. Nothing here knows the server or the keyboard.

import { ONLY_FIRST, ONLY_SECOND, cssColor, heatColor, parseColor } from "./colors.js";
import { fitFrame } from "./geometry.js";
import { countDrawn, traceEdges } from "./masks.js";

/** @typedef {import("./masks.js").Box} Box */
/** @typedef {{path: Path2D, color: string, width: number, dash?: number[]}} Outline */
/** @typedef {{box: Box, pixels: OffscreenCanvas|null, outlines: Outline[]}} Layer what lies over a slice: pixels in a box, and outlines */
/** @typedef {readonly number[]} Rgba red, green, blue, alpha; 0 to 255 */

const DECIDED = "#3ddc97";
const SAVED = "#4c8dff";

/** @param {HTMLCanvasElement|OffscreenCanvas} canvas */
export function getContext(canvas) {
  const context = /** @type {CanvasRenderingContext2D|OffscreenCanvasRenderingContext2D|null} */ (canvas.getContext("2d"));
  if (!context) throw new Error("This browser gives no canvas to draw on. Close some tabs, or try another browser.");
  return context;
}

/**
 * Give a canvas as many pixels as the screen has under it.
 * @param {HTMLCanvasElement} canvas
 */
export function fitToScreen(canvas) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
  return { ratio, width, height };
}

/**
 * Grey values of a slice as a canvas of its own size.
 * @param {Int16Array} pixels
 * @param {number} height
 * @param {number} width
 * @param {readonly [slope: number, intercept: number]} scale
 * @param {readonly [low: number, high: number]} window
 */
export function renderGrey(pixels, height, width, [slope, intercept], [low, high]) {
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  const gain = 255 / Math.max(high - low, 1e-9);
  const offset = (intercept - low) * gain;
  const factor = slope * gain;
  for (let i = 0; i < words.length; i += 1) {
    const value = pixels[i] * factor + offset;
    const grey = value <= 0 ? 0 : value >= 255 ? 255 : value | 0;
    words[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  getContext(canvas).putImageData(image, 0, 0);
  return canvas;
}

/**
 * A picture in colour as a canvas of its own size, brighter or with more contrast if the window says so.
 * @param {Uint8ClampedArray} colours red, green, blue, alpha
 * @param {number} height
 * @param {number} width
 * @param {readonly [low: number, high: number]} window what is shown as 0 and as 255
 */
export function renderColours(colours, height, width, [low, high]) {
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const gain = 255 / Math.max(high - low, 1e-9);
  const table = Uint8ClampedArray.from({ length: 256 }, (_, value) => (value - low) * gain);
  const { data } = image;
  for (let i = 0; i < data.length; i += 1) data[i] = (i & 3) === 3 ? 255 : table[colours[i]];
  getContext(canvas).putImageData(image, 0, 0);
  return canvas;
}

/**
 * A canvas of a box's size, coloured pixel by pixel.
 * @param {Box} box
 * @param {(index: number) => Rgba|null} colorOf
 */
function renderPixels(box, colorOf) {
  const canvas = new OffscreenCanvas(box.x1 - box.x0, box.y1 - box.y0);
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < canvas.width * canvas.height; i += 1) {
    const color = colorOf(i);
    if (color) image.data.set(color, 4 * i);
  }
  getContext(canvas).putImageData(image, 0, 0);
  return canvas;
}

/**
 * @param {Uint8Array} mask
 * @param {Box} box
 */
function traceOutline(mask, box) {
  const path = new Path2D();
  for (const [x0, y0, x1, y1] of traceEdges(mask, box)) {
    path.moveTo(x0, y0);
    path.lineTo(x1, y1);
  }
  return path;
}

/**
 * A mask as a tint with an outline.
 * @param {Uint8Array} mask
 * @param {Box} box
 * @param {string} color
 * @param {{fill?: number, width?: number, dash?: number[]}} style
 * @returns {Layer}
 */
export function maskLayer(mask, box, color, { fill = 0.22, width = 1.75, dash } = {}) {
  const tint = [...parseColor(color), Math.round(255 * fill)];
  const pixels = fill > 0 ? renderPixels(box, (i) => (mask[i] ? tint : null)) : null;
  return { box, pixels, outlines: [{ path: traceOutline(mask, box), color, width, dash }] };
}

/**
 * How many proposals draw each pixel.
 * @param {readonly Uint8Array[]} masks
 * @param {Box} box
 * @returns {Layer}
 */
export function agreementLayer(masks, box) {
  const count = countDrawn(masks);
  // Where all agree there is nothing to look for: the anatomy shows through.
  const colors = Array.from({ length: masks.length + 1 }, (_, k) => [
    ...heatColor((k - 1) / Math.max(1, masks.length - 1)),
    k === masks.length ? 80 : 215,
  ]);
  return { box, pixels: renderPixels(box, (i) => (count[i] ? colors[count[i]] : null)), outlines: [] };
}

/**
 * Where two masks differ, and the outline of what both draw.
 * @param {Uint8Array} first
 * @param {Uint8Array} second
 * @param {Box} box
 * @returns {Layer}
 */
export function differenceLayer(first, second, box) {
  const [mine, other] = [ONLY_FIRST, ONLY_SECOND].map((color) => [...color, 200]);
  const pixels = renderPixels(box, (i) => (first[i] === second[i] ? null : first[i] ? mine : other));
  const both = first.map((value, i) => value & second[i]);
  return { box, pixels, outlines: [{ path: traceOutline(both, box), color: "#d7dee6", width: 1.25, dash: [4, 3] }] };
}

/**
 * Draw a slice and its layers.
 * @param {HTMLCanvasElement} canvas
 * @param {OffscreenCanvas|null} grey
 * @param {import("./geometry.js").Frame} frame
 * @param {import("./geometry.js").Spacing} spacing
 * @param {readonly Layer[]} layers
 * @returns {import("./geometry.js").Place}
 */
export function drawSlice(canvas, grey, frame, spacing, layers) {
  const { ratio, width, height } = fitToScreen(canvas);
  const context = getContext(canvas);
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.fillStyle = "#000";
  context.fillRect(0, 0, width, height);
  const place = fitFrame(frame, spacing, width, height);
  context.setTransform(place.scaleX, 0, 0, place.scaleY, place.left, place.top);
  context.imageSmoothingEnabled = true;
  context.imageSmoothingQuality = "high";
  if (grey) context.drawImage(grey, 0, 0);
  for (const layer of layers) {
    // Masks are voxels: their edges are shown where they are.
    context.imageSmoothingEnabled = false;
    if (layer.pixels) context.drawImage(layer.pixels, layer.box.x0, layer.box.y0);
    for (const outline of layer.outlines) strokeOutline(context, outline, place, ratio);
  }
  return place;
}

/**
 * @param {CanvasRenderingContext2D|OffscreenCanvasRenderingContext2D} context
 * @param {Outline} outline
 * @param {import("./geometry.js").Place} place
 * @param {number} ratio pixels of the canvas for one of the page
 */
function strokeOutline(context, { path, color, width, dash = [] }, place, ratio) {
  const placed = new Path2D();
  placed.addPath(path, new DOMMatrix([place.scaleX, 0, 0, place.scaleY, place.left, place.top]));
  context.save();
  context.setTransform(1, 0, 0, 1, 0, 0);
  context.lineCap = "square";
  context.setLineDash(dash.map((length) => length * ratio));
  context.strokeStyle = color;
  context.lineWidth = width * ratio;
  context.stroke(placed);
  context.restore();
}

/**
 * The vertical strip beside the slice: disagreement per slice from 0 to 1 on one scale for all images, what is decided, what is saved, where we are.
 * @param {HTMLCanvasElement} canvas
 * @param {number} depth
 * @param {number} z
 * @param {readonly number[]} disagreement
 * @param {(z: number) => boolean} isDecided
 * @param {(z: number) => boolean} isSaved
 */
export function drawDepth(canvas, depth, z, disagreement, isDecided, isSaved) {
  const { ratio, width, height } = fitToScreen(canvas);
  const context = getContext(canvas);
  context.fillStyle = "#0b0f14";
  context.fillRect(0, 0, width, height);
  const row = height / depth;
  /** @type {(index: number) => number} Superior is up. */
  const top = (index) => height - (index + 1) * row;
  for (let index = 0; index < depth; index += 1) {
    const value = disagreement[index] ?? 0;
    if (value > 0) {
      context.fillStyle = cssColor(heatColor(0.15 + 0.85 * value));
      context.fillRect(width * 0.3, top(index), width * 0.7 * value, Math.max(row, 1));
    }
    if (isSaved(index)) {
      context.fillStyle = SAVED;
      context.fillRect(0, top(index), width * 0.11, Math.max(row, 1));
    }
    if (isDecided(index)) {
      context.fillStyle = DECIDED;
      context.fillRect(width * 0.13, top(index), width * 0.11, Math.max(row, 1));
    }
  }
  context.fillStyle = "#ffffff";
  const line = Math.max(2 * ratio, row);
  context.fillRect(0, top(z) + row / 2 - line / 2, width, line);
}
