import assert from "node:assert/strict";
import test from "node:test";

import { computeDice, countDrawn, countPixels, countStructures, traceEdges, unpackMasks } from "../../apps/progidiff/web/review/masks.js";

/** Two structures, two proposals: one in a box of 3 x 3 at (y 5, x 7), one that is nowhere. */
function packExample() {
  const bytes = new Uint8Array(4 + 8 + 2 * 2 + 8);
  const view = new DataView(bytes.buffer);
  [2, 2].forEach((value, i) => view.setUint16(2 * i, value, true));
  [5, 8, 7, 10].forEach((value, i) => view.setUint16(4 + 2 * i, value, true));
  bytes.set([0b00010001, 0b1, 0b11111111, 0b1], 12);
  return bytes.buffer;
}

test("masks come out of the bits as they went in, first pixel in the lowest bit", () => {
  const [first, second] = unpackMasks(packExample());
  assert.deepEqual(first.box, { y0: 5, y1: 8, x0: 7, x1: 10 });
  assert.deepEqual([...first.masks[0]], [1, 0, 0, 0, 1, 0, 0, 0, 1]);
  assert.deepEqual([...first.masks[1]], Array(9).fill(1));
  assert.equal(second.box, null);
  assert.deepEqual(second.masks.map((mask) => mask.length), [0, 0]);
  assert.equal(countStructures(packExample()), 2);
});

test("pixels are counted per mask and over masks", () => {
  const masks = [[1, 0, 1], [1, 1, 0]].map((values) => Uint8Array.from(values));
  assert.deepEqual([...countDrawn(masks)], [2, 1, 1]);
  assert.deepEqual([...countDrawn([])], []);
  assert.equal(countPixels(masks[0]), 2);
});

test("Dice is 1 for two empty masks, 0 without an overlap", () => {
  const of = (a, b) => computeDice(Uint8Array.from(a), Uint8Array.from(b));
  assert.equal(of([0, 0], [0, 0]), 1);
  assert.equal(of([1, 0], [0, 1]), 0);
  assert.equal(of([1, 1, 0], [1, 0, 0]), 2 / 3);
});

test("an outline runs along the edges of the pixels, one line for a straight run", () => {
  const lines = traceEdges(Uint8Array.from([1, 1]), { y0: 10, y1: 11, x0: 20, x1: 22 });
  assert.deepEqual(lines, [
    [20, 10, 22, 10],
    [20, 11, 22, 11],
    [20, 10, 20, 11],
    [22, 10, 22, 11],
  ]);
});

test("an outline has as many edges as pixels touch others of another kind", () => {
  const [height, width] = [9, 7];
  const mask = Uint8Array.from({ length: height * width }, (_, i) => (i * 7919) % 3 === 0);
  const at = (y, x) => (y >= 0 && x >= 0 && y < height && x < width ? mask[y * width + x] : 0);
  let expected = 0;
  for (let y = 0; y <= height; y += 1) for (let x = 0; x <= width; x += 1) expected += (at(y, x) !== at(y, x - 1)) + (at(y, x) !== at(y - 1, x));
  const lines = traceEdges(mask, { y0: 0, y1: height, x0: 0, x1: width });
  assert.equal(lines.reduce((sum, [x0, y0, x1, y1]) => sum + (x1 - x0) + (y1 - y0), 0), expected);
});
