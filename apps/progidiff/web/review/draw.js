// Drawing a slice and what lies over it on a 2-D canvas. Nothing here knows the server or the keyboard.

import { countDrawn, traceOutline } from "./masks.js";

/** @typedef {import("./masks.js").Box} Box */

/** Agreement from a single proposal to all of them: dark violet over magenta to light yellow, readable without telling red from green. */
const HEAT = [
  [59, 15, 112],
  [114, 31, 129],
  [183, 55, 121],
  [241, 96, 93],
  [254, 159, 109],
  [252, 253, 191],
];
const ONLY_FIRST = [255, 171, 64];
const ONLY_SECOND = [64, 196, 255];

/** Colour of an agreement between 0 and 1. */
export function heatColor(share) {
  const place = Math.min(Math.max(share, 0), 1) * (HEAT.length - 1);
  const low = Math.min(Math.floor(place), HEAT.length - 2);
  return HEAT[low].map((value, channel) => Math.round(value + (place - low) * (HEAT[low + 1][channel] - value)));
}

export function parseColor(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

/** Grey values of a slice as a canvas of its own size. */
export function renderGrey(pixels, height, width, scale, [low, high]) {
  const canvas = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const words = new Uint32Array(image.data.buffer);
  const [slope, intercept] = scale;
  const gain = 255 / Math.max(high - low, 1e-9);
  const offset = (intercept - low) * gain;
  const factor = slope * gain;
  for (let i = 0; i < words.length; i += 1) {
    const value = pixels[i] * factor + offset;
    const grey = value <= 0 ? 0 : value >= 255 ? 255 : value | 0;
    words[i] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/** A canvas of a box's size, coloured pixel by pixel; `colorOf(i)` gives [r, g, b, alpha] or null. */
function renderPixels(box, colorOf) {
  const canvas = new OffscreenCanvas(box.x1 - box.x0, box.y1 - box.y0);
  const image = new ImageData(canvas.width, canvas.height);
  for (let i = 0; i < canvas.width * canvas.height; i += 1) {
    const color = colorOf(i);
    if (color) image.data.set(color, 4 * i);
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

/**
 * A layer over a slice: pixels in a box, and outlines.
 * @typedef {{box: Box, pixels: OffscreenCanvas|null, outlines: {path: Path2D, color: string, width: number, dash?: number[]}[]}} Layer
 */

/** @returns {Layer} a mask as a tint with an outline */
export function maskLayer(mask, box, color, fill = 0.22, width = 1.75) {
  const [r, g, b] = parseColor(color);
  const pixels = fill > 0 ? renderPixels(box, (i) => (mask[i] ? [r, g, b, Math.round(255 * fill)] : null)) : null;
  return { box, pixels, outlines: [{ path: traceOutline(mask, box), color, width }] };
}

/** @returns {Layer} how many proposals draw each pixel */
export function agreementLayer(masks, box) {
  const count = countDrawn(masks);
  // Where all agree there is nothing to look for: the anatomy shows through.
  const alpha = (k) => (k === masks.length ? 80 : 215);
  const colors = Array.from({ length: masks.length + 1 }, (_, k) => [...heatColor((k - 1) / Math.max(1, masks.length - 1)), alpha(k)]);
  return { box, pixels: renderPixels(box, (i) => (count[i] ? colors[count[i]] : null)), outlines: [] };
}

/** @returns {Layer} where two masks differ, and the outline of what both draw */
export function differenceLayer(first, second, box) {
  const pixels = renderPixels(box, (i) => (first[i] === second[i] ? null : [...(first[i] ? ONLY_FIRST : ONLY_SECOND), 200]));
  const both = first.map((value, i) => value & second[i]);
  return { box, pixels, outlines: [{ path: traceOutline(both, box), color: "#d7dee6", width: 1.25, dash: [4, 3] }] };
}

/** The part of a slice that a canvas shows: {x, y, width, height} in pixels of the slice. */
export function fitFrame(frame, spacing, width, height) {
  const [dy, dx] = spacing;
  const scale = Math.min(width / (frame.width * dx), height / (frame.height * dy));
  return {
    scaleX: scale * dx,
    scaleY: scale * dy,
    left: (width - frame.width * dx * scale) / 2 - frame.x * dx * scale,
    top: (height - frame.height * dy * scale) / 2 - frame.y * dy * scale,
  };
}

/** Draw a slice and its layers. The canvas gets as many pixels as the screen has under it. */
export function drawSlice(canvas, grey, frame, spacing, layers) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d");
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
    for (const { path, color, width: stroke, dash } of layer.outlines) {
      const placed = new Path2D();
      placed.addPath(path, new DOMMatrix([place.scaleX, 0, 0, place.scaleY, place.left, place.top]));
      context.save();
      context.setTransform(1, 0, 0, 1, 0, 0);
      context.lineCap = "square";
      context.setLineDash((dash ?? []).map((length) => length * ratio));
      context.strokeStyle = color;
      context.lineWidth = stroke * ratio;
      context.stroke(placed);
      context.restore();
    }
  }
  return place;
}

/** The frame of a whole slice. */
export const wholeSlice = (height, width) => ({ x: 0, y: 0, width, height });

/** A frame around a box with a margin, as wide and high in mm as the canvas asks for. */
export function frameAround(box, height, width, spacing, aspect, margin = 0.12) {
  const [dy, dx] = spacing;
  let mmWide = (box.x1 - box.x0) * dx * (1 + 2 * margin);
  let mmHigh = (box.y1 - box.y0) * dy * (1 + 2 * margin);
  mmWide = Math.max(mmWide, mmHigh * aspect, 40);
  mmHigh = Math.max(mmHigh, mmWide / aspect);
  const middleX = (box.x0 + box.x1) / 2;
  const middleY = (box.y0 + box.y1) / 2;
  return { x: middleX - mmWide / dx / 2, y: middleY - mmHigh / dy / 2, width: mmWide / dx, height: mmHigh / dy };
}

/** The vertical strip beside the slice: disagreement per slice, what is decided, what is saved, where we are. */
export function drawDepth(canvas, depth, z, disagreement, decided, saved) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, Math.round(canvas.clientWidth * ratio));
  const height = Math.max(1, Math.round(canvas.clientHeight * ratio));
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  context.fillStyle = "#0b0f14";
  context.fillRect(0, 0, width, height);
  const row = height / depth;
  const top = (index) => height - (index + 1) * row; // Superior is up.
  const highest = Math.max(0.05, ...disagreement);
  for (let index = 0; index < depth; index += 1) {
    const value = disagreement[index] ?? 0;
    if (value > 0) {
      context.fillStyle = `rgb(${heatColor(0.15 + (0.85 * value) / highest).join(" ")})`;
      context.fillRect(width * 0.3, top(index), (width * 0.7 * value) / highest, Math.max(row, 1));
    }
    if (saved(index)) {
      context.fillStyle = "#4c8dff";
      context.fillRect(0, top(index), width * 0.11, Math.max(row, 1));
    }
    if (decided(index)) {
      context.fillStyle = "#3ddc97";
      context.fillRect(width * 0.13, top(index), width * 0.11, Math.max(row, 1));
    }
  }
  context.fillStyle = "#ffffff";
  const line = Math.max(2 * ratio, row);
  context.fillRect(0, top(z) + row / 2 - line / 2, width, line);
}
