// What brushes and buttons do to the mask of one slice: a Uint8Array of 0 and 1, one per pixel of the slice, row by row. Lengths are in mm
// on the slice's own pixels, which need not be square. A point is [y, x] in pixels; the centre of the first pixel is [0.5, 0.5].

import { signedDistances, squaredDistances } from "./distances.js";
import { findBox } from "./runs.js";

/** @typedef {import("./geometry.js").Plane} Plane */
/** @typedef {import("./geometry.js").Point} Point */
/** @typedef {import("./masks.js").Box} Box */

/** Smoothing goes this many standard deviations far. */
const REACH = 3;
/** Two shapes that share less than this part of the smaller one are moved onto each other before they are interpolated. */
const LEAST_OVERLAP = 0.5;

/**
 * The smallest box around two; null if both are.
 * @param {Box|null} one
 * @param {Box|null} other
 * @returns {Box|null}
 */
export function joinBoxes(one, other) {
  if (!one || !other) return one ?? other;
  return { y0: Math.min(one.y0, other.y0), y1: Math.max(one.y1, other.y1), x0: Math.min(one.x0, other.x0), x1: Math.max(one.x1, other.x1) };
}

/**
 * Draw with a round brush from one point to another: every pixel whose centre is at most the radius away, and the pixel under the end.
 * @param {Uint8Array} mask is changed
 * @param {Plane} plane
 * @param {Point} from
 * @param {Point} to
 * @param {number} radius mm
 * @param {0|1} value
 * @param {(index: number) => boolean} isAllowed which pixels may change
 * @returns {Box|null} where something may have changed
 */
export function drawLine(mask, { height, width, spacing: [dy, dx] }, from, to, radius, value, isAllowed = () => true) {
  const [ay, ax, by, bx] = [from[0] * dy, from[1] * dx, to[0] * dy, to[1] * dx];
  const [uy, ux] = [by - ay, bx - ax];
  const square = uy * uy + ux * ux;
  const limit = radius * radius;
  /** @type {(value: number, most: number) => number} */
  const clip = (value, most) => Math.min(most, Math.max(0, value));
  const y0 = clip(Math.floor((Math.min(ay, by) - radius) / dy), height);
  const y1 = clip(Math.ceil((Math.max(ay, by) + radius) / dy), height);
  const x0 = clip(Math.floor((Math.min(ax, bx) - radius) / dx), width);
  const x1 = clip(Math.ceil((Math.max(ax, bx) + radius) / dx), width);
  if (y0 >= y1 || x0 >= x1) return null;
  for (let y = y0; y < y1; y += 1) {
    const py = (y + 0.5) * dy - ay;
    for (let x = x0; x < x1; x += 1) {
      const px = (x + 0.5) * dx - ax;
      const along = square ? Math.min(1, Math.max(0, (py * uy + px * ux) / square)) : 0;
      const [ry, rx] = [py - along * uy, px - along * ux];
      const index = y * width + x;
      if (ry * ry + rx * rx <= limit && isAllowed(index)) mask[index] = value;
    }
  }
  const [ey, ex] = [Math.floor(to[0]), Math.floor(to[1])];
  const end = ey * width + ex;
  if (ey >= y0 && ey < y1 && ex >= x0 && ex < x1 && isAllowed(end)) mask[end] = value;
  return { y0, y1, x0, x1 };
}

/**
 * Fill what a closed line runs around; where it crosses itself, all of it.
 * @param {Uint8Array} mask is changed
 * @param {Plane} plane
 * @param {readonly Point[]} points
 * @param {0|1} value
 */
export function fillPolygon(mask, { height, width }, points, value) {
  for (let y = 0; y < height; y += 1) {
    /** @type {{x: number, turn: number}[]} */
    const crossings = [];
    points.forEach(([ay, ax], index) => {
      const [by, bx] = points[(index + 1) % points.length];
      const isDown = ay <= y + 0.5 && by > y + 0.5;
      const isUp = by <= y + 0.5 && ay > y + 0.5;
      if (isDown || isUp) crossings.push({ x: ax + ((y + 0.5 - ay) / (by - ay)) * (bx - ax), turn: isDown ? 1 : -1 });
    });
    crossings.sort((one, other) => one.x - other.x);
    let winding = 0;
    crossings.forEach(({ x, turn }, index) => {
      winding += turn;
      if (!winding) return;
      const first = Math.max(0, Math.ceil(x - 0.5));
      const last = Math.min(width - 1, Math.ceil(crossings[index + 1].x - 0.5) - 1);
      if (last >= first) mask.fill(value, y * width + first, y * width + last + 1);
    });
  }
}

/**
 * Whatever hangs together with a pixel over edges and has its value.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @param {readonly number[]} seeds indices of one value
 * @returns {{region: Uint8Array, isAtBorder: boolean}}
 */
function findRegion(mask, { height, width }, seeds) {
  const region = new Uint8Array(mask.length);
  const stack = [...seeds];
  for (const seed of seeds) region[seed] = 1;
  const value = mask[seeds[0]];
  let isAtBorder = false;
  /** @param {number} next */
  const visit = (next) => {
    if (!region[next] && mask[next] === value) {
      region[next] = 1;
      stack.push(next);
    }
  };
  for (let index = stack.pop(); index !== undefined; index = stack.pop()) {
    const x = index % width;
    const y = (index - x) / width;
    if (x === 0 || y === 0 || x === width - 1 || y === height - 1) isAtBorder = true;
    if (x > 0) visit(index - 1);
    if (x < width - 1) visit(index + 1);
    if (y > 0) visit(index - width);
    if (y < height - 1) visit(index + width);
  }
  return { region, isAtBorder };
}

/**
 * Fill every hole: what is not drawn and does not hang together with the border of the slice.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @returns {Uint8Array}
 */
export function fillHoles(mask, plane) {
  const { height, width } = plane;
  const seeds = [];
  for (let x = 0; x < width; x += 1) for (const y of [0, height - 1]) if (!mask[y * width + x]) seeds.push(y * width + x);
  for (let y = 0; y < height; y += 1) for (const x of [0, width - 1]) if (!mask[y * width + x]) seeds.push(y * width + x);
  if (!seeds.length) return new Uint8Array(mask.length).fill(1);
  const { region } = findRegion(mask, plane, seeds);
  return region.map((isOutside) => 1 - isOutside);
}

/**
 * Turn the region under a point over: a hole is filled, an island is removed.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @param {Point} point
 * @returns {Uint8Array|null} null if the point is outside, or the region is what lies around everything
 */
export function flood(mask, plane, [y, x]) {
  const [row, column] = [Math.floor(y), Math.floor(x)];
  if (row < 0 || column < 0 || row >= plane.height || column >= plane.width) return null;
  const index = row * plane.width + column;
  const { region, isAtBorder } = findRegion(mask, plane, [index]);
  if (!mask[index] && isAtBorder) return null;
  return mask.map((value, i) => (region[i] ? 1 - value : value));
}

/**
 * Pixels at most so far from what is drawn are drawn too; with a length below 0, those so near to what is not drawn are not any more.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @param {number} length mm
 * @returns {Uint8Array}
 */
export function grow(mask, { height, width, spacing }, length) {
  // A little more than asked: 3 pixels of 0.7 mm are 2.1 mm whatever the last digit of the product.
  const limit = (Math.abs(length) * (1 + 1e-9)) ** 2;
  const isShrinking = length < 0;
  const distances = squaredDistances(mask, height, width, spacing, isShrinking);
  return mask.map((value, i) => (distances[i] <= limit ? (isShrinking ? 0 : 1) : value));
}

/**
 * Round off corners and drop what is thinner than about twice the length.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @param {number} length mm, standard deviation of the blur
 * @returns {Uint8Array}
 */
export function smooth(mask, { height, width, spacing: [dy, dx] }, length) {
  const across = blur(Float32Array.from(mask), height, width, 1, width, length / dx);
  const blurred = blur(across, width, height, width, 1, length / dy);
  return mask.map((_, i) => (blurred[i] > 0.5 ? 1 : 0));
}

/**
 * Blur along one axis; beyond its ends the slice goes on as it ends.
 * @param {Float32Array} values
 * @param {number} lines
 * @param {number} count pixels of a line
 * @param {number} step from one pixel of a line to the next
 * @param {number} apart from one line to the next
 * @param {number} deviation pixels
 */
function blur(values, lines, count, step, apart, deviation) {
  const reach = Math.max(1, Math.ceil(REACH * deviation));
  const weights = Float32Array.from({ length: 2 * reach + 1 }, (_, i) => Math.exp(-((i - reach) ** 2) / (2 * deviation ** 2)));
  const total = weights.reduce((sum, weight) => sum + weight);
  const result = new Float32Array(values.length);
  for (let line = 0; line < lines; line += 1) {
    for (let place = 0; place < count; place += 1) {
      let sum = 0;
      for (let offset = -reach; offset <= reach; offset += 1) {
        const near = Math.min(count - 1, Math.max(0, place + offset));
        sum += weights[offset + reach] * values[line * apart + near * step];
      }
      result[line * apart + place * step] = sum / total;
    }
  }
  return result;
}

/**
 * The shape between two: where the distance to the borders, weighted by how near each is, says inside (Raya and Udupa, "Shape-Based
 * Interpolation of Multidimensional Objects", 1990). Shapes that hardly overlap are first moved along the line between their centres.
 * @param {Uint8Array} first
 * @param {Uint8Array} second
 * @param {Plane} plane
 * @param {number} share 0 is the first, 1 the second
 * @returns {Uint8Array|null} null if one of them is empty
 */
export function interpolate(first, second, plane, share) {
  const boxes = [findBox(first, plane.height, plane.width), findBox(second, plane.height, plane.width)];
  const box = joinBoxes(boxes[0], boxes[1]);
  if (!boxes[0] || !boxes[1] || !box) return null;
  const [from, to] = [first, second].map((mask) => findCenter(mask, plane.width));
  const isApart = measureOverlap(first, second) < LEAST_OVERLAP;
  /** @type {(place: number) => [dy: number, dx: number]} whole pixels from a centre to that of the result */
  const findShift = (place) => {
    const part = isApart ? share - place : 0;
    return [Math.round(part * (to[0] - from[0])), Math.round(part * (to[1] - from[1]))];
  };
  // Background all around, and room for shapes that are moved.
  const [roomY, roomX] = [0, 1].map((axis) => 1 + (isApart ? Math.ceil(Math.abs(to[axis] - from[axis])) : 0));
  const frame = { y0: box.y0 - roomY, y1: box.y1 + roomY, x0: box.x0 - roomX, x1: box.x1 + roomX };
  const [height, width] = [frame.y1 - frame.y0, frame.x1 - frame.x0];
  const [near, far] = [first, second].map((mask, place) => signedDistances(cut(mask, plane, frame, findShift(place)), height, width, plane.spacing));
  const result = new Uint8Array(first.length);
  for (let y = Math.max(0, frame.y0); y < Math.min(plane.height, frame.y1); y += 1) {
    for (let x = Math.max(0, frame.x0); x < Math.min(plane.width, frame.x1); x += 1) {
      const i = (y - frame.y0) * width + x - frame.x0;
      if ((1 - share) * near[i] + share * far[i] > 0) result[y * plane.width + x] = 1;
    }
  }
  return result;
}

/**
 * A part of a mask, moved by whole pixels; 0 outside of the slice.
 * @param {Uint8Array} mask
 * @param {Plane} plane
 * @param {Box} frame may reach beyond the slice
 * @param {readonly [dy: number, dx: number]} shift
 */
function cut(mask, { height, width }, frame, [dy, dx]) {
  const across = frame.x1 - frame.x0;
  const part = new Uint8Array((frame.y1 - frame.y0) * across);
  for (let y = frame.y0; y < frame.y1; y += 1) {
    for (let x = frame.x0; x < frame.x1; x += 1) {
      const [row, column] = [y - dy, x - dx];
      if (row >= 0 && column >= 0 && row < height && column < width) part[(y - frame.y0) * across + x - frame.x0] = mask[row * width + column];
    }
  }
  return part;
}

/**
 * @param {Uint8Array} mask not empty
 * @param {number} width
 * @returns {Point}
 */
function findCenter(mask, width) {
  let [count, sumY, sumX] = [0, 0, 0];
  mask.forEach((value, i) => {
    if (!value) return;
    count += 1;
    sumY += Math.floor(i / width);
    sumX += i % width;
  });
  return [sumY / count, sumX / count];
}

/**
 * Shared pixels as a part of the smaller mask.
 * @param {Uint8Array} first
 * @param {Uint8Array} second
 */
function measureOverlap(first, second) {
  let [both, one, other] = [0, 0, 0];
  for (let i = 0; i < first.length; i += 1) {
    both += first[i] & second[i];
    one += first[i];
    other += second[i];
  }
  return both / Math.max(1, Math.min(one, other));
}
