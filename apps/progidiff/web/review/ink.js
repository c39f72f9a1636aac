// The stroke that is being drawn, on a canvas of its own over the picture: of each frame only what changed is drawn again.

import { parseColor } from "./colors.js";
import { fitToScreen, getContext } from "./draw.js";
import { joinBoxes } from "./shapes.js";

/** @typedef {import("./masks.js").Box} Box */
/** @typedef {import("./geometry.js").Place} Place */
/** @typedef {import("./geometry.js").Point} Point */

const BORDER = 0.9;
const LINE = 1.75;

export class Ink {
  /** @type {HTMLCanvasElement} */
  #canvas;
  /** @type {{mask: Uint8Array, width: number, height: number, place: Place, color: string, fill: number, image: ImageData, pixels: OffscreenCanvas}|null} */
  #shown = null;
  /** What is to be drawn again in the next frame. @type {Box|null} */
  #dirty = null;
  #frame = 0;

  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas) {
    this.#canvas = canvas;
  }

  /**
   * Show a mask from now on.
   * @param {Uint8Array} mask of a whole slice; it will change, and `touch` will say where
   * @param {{height: number, width: number}} plane
   * @param {Place} place
   * @param {string} color
   * @param {number} fill opacity inside of the border
   */
  begin(mask, { height, width }, place, color, fill) {
    fitToScreen(this.#canvas);
    const pixels = new OffscreenCanvas(width, height);
    this.#shown = { mask, width, height, place, color, fill, image: new ImageData(width, height), pixels };
    this.touch({ y0: 0, y1: height, x0: 0, x1: width });
    this.#paint();
  }

  /** @param {Box|null} box what changed of the mask */
  touch(box) {
    if (!box || !this.#shown) return;
    this.#dirty = joinBoxes(this.#dirty, box);
    if (!this.#frame) this.#frame = requestAnimationFrame(() => this.#paint());
  }

  /**
   * Draw the last part of a line.
   * @param {readonly Point[]} line
   */
  drawLine(line) {
    if (!this.#shown || line.length < 2) return;
    const { place, color } = this.#shown;
    const context = getContext(this.#canvas);
    const [[ay, ax], [by, bx]] = line.slice(-2);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.strokeStyle = color;
    context.lineWidth = LINE * (window.devicePixelRatio || 1);
    context.lineCap = "round";
    context.beginPath();
    context.moveTo(place.left + ax * place.scaleX, place.top + ay * place.scaleY);
    context.lineTo(place.left + bx * place.scaleX, place.top + by * place.scaleY);
    context.stroke();
  }

  end() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#dirty = null;
    this.#shown = null;
    const context = getContext(this.#canvas);
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const [shown, dirty] = [this.#shown, this.#dirty];
    this.#dirty = null;
    if (!shown || !dirty) return;
    // A pixel is of the border by its neighbours, which therefore may change too.
    const box = { y0: Math.max(0, dirty.y0 - 1), y1: Math.min(shown.height, dirty.y1 + 1), x0: Math.max(0, dirty.x0 - 1), x1: Math.min(shown.width, dirty.x1 + 1) };
    color(shown.image, shown.mask, box, shown);
    getContext(shown.pixels).putImageData(shown.image, 0, 0, box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
    const { place } = shown;
    const left = Math.floor(place.left + box.x0 * place.scaleX);
    const top = Math.floor(place.top + box.y0 * place.scaleY);
    const right = Math.ceil(place.left + box.x1 * place.scaleX);
    const bottom = Math.ceil(place.top + box.y1 * place.scaleY);
    const context = getContext(this.#canvas);
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.beginPath();
    context.rect(left, top, right - left, bottom - top);
    context.clip();
    context.clearRect(left, top, right - left, bottom - top);
    // A little more than was cleared, for pixels of the screen that lie on two of the slice.
    const [x0, y0] = [Math.max(0, box.x0 - 1), Math.max(0, box.y0 - 1)];
    const [w, h] = [Math.min(shown.width, box.x1 + 1) - x0, Math.min(shown.height, box.y1 + 1) - y0];
    context.imageSmoothingEnabled = false;
    context.drawImage(shown.pixels, x0, y0, w, h, place.left + x0 * place.scaleX, place.top + y0 * place.scaleY, w * place.scaleX, h * place.scaleY);
    context.restore();
  }
}

/**
 * A tint with a border one pixel wide.
 * @param {ImageData} image is changed in the box
 * @param {Uint8Array} mask
 * @param {Box} box
 * @param {{width: number, height: number, color: string, fill: number}} style
 */
function color(image, mask, { y0, y1, x0, x1 }, { width, height, color: hex, fill: inner }) {
  const words = new Uint32Array(image.data.buffer);
  const [red, green, blue] = parseColor(hex);
  const base = (blue << 16) | (green << 8) | red;
  const [fill, border] = [inner, BORDER].map((alpha) => ((Math.round(255 * alpha) << 24) | base) >>> 0);
  for (let y = y0; y < y1; y += 1) {
    for (let x = x0; x < x1; x += 1) {
      const i = y * width + x;
      if (!mask[i]) words[i] = 0;
      else {
        const isInside = x > 0 && x < width - 1 && y > 0 && y < height - 1 && mask[i - 1] && mask[i + 1] && mask[i - width] && mask[i + width];
        words[i] = isInside ? fill : border;
      }
    }
  }
}
