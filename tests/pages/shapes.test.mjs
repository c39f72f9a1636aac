import assert from "node:assert/strict";
import test from "node:test";

import { signedDistances, squaredDistances } from "../../apps/progidiff/web/review/distances.js";
import { drawLine, fillHoles, fillPolygon, flood, grow, interpolate, smooth } from "../../apps/progidiff/web/review/shapes.js";
import { startBrush, startLasso } from "../../apps/progidiff/web/review/strokes.js";

/** Rows of "#" and "." as a mask and its plane. */
function read(rows, spacing = [1, 1]) {
  const mask = Uint8Array.from([...rows.join("")].map((sign) => (sign === "#" ? 1 : 0)));
  return { mask, plane: { height: rows.length, width: rows[0].length, spacing } };
}

function show(mask, { height, width }) {
  return Array.from({ length: height }, (_, y) => [...mask.subarray(y * width, (y + 1) * width)].map((value) => (value ? "#" : ".")).join(""));
}

/** A disc in mm. */
function makeDisc(plane, [cy, cx], radius) {
  const mask = new Uint8Array(plane.height * plane.width);
  for (let y = 0; y < plane.height; y += 1)
    for (let x = 0; x < plane.width; x += 1)
      if (Math.hypot((y + 0.5 - cy) * plane.spacing[0], (x + 0.5 - cx) * plane.spacing[1]) <= radius) mask[y * plane.width + x] = 1;
  return mask;
}

const count = (mask) => mask.reduce((sum, value) => sum + value, 0);

test("distances are those of the nearest pixel in mm, also where pixels are not square", () => {
  const [height, width, spacing] = [13, 17, [0.7, 1.9]];
  const mask = Uint8Array.from({ length: height * width }, (_, i) => ((i * 7919) % 23 === 0 ? 1 : 0));
  for (const isInverse of [false, true]) {
    const found = squaredDistances(mask, height, width, spacing, isInverse);
    for (let i = 0; i < mask.length; i += 1) {
      let least = Infinity;
      for (let j = 0; j < mask.length; j += 1) {
        if (Boolean(mask[j]) === isInverse) continue;
        const dy = (Math.floor(i / width) - Math.floor(j / width)) * spacing[0];
        const dx = ((i % width) - (j % width)) * spacing[1];
        least = Math.min(least, dy * dy + dx * dx);
      }
      assert.ok(Math.abs(found[i] - least) < 1e-9, `${i}: ${found[i]} is not ${least}`);
    }
  }
  assert.equal(squaredDistances(new Uint8Array(6), 2, 3, spacing)[0], Infinity);
  assert.deepEqual([...signedDistances([0, 1, 1, 0], 1, 4, [1, 2])], [-2, 2, 2, -2]);
});

test("a brush is round in mm: on pixels twice as high as wide it covers half as many rows as columns", () => {
  const { mask, plane } = read(Array(21).fill(".".repeat(21)), [2, 1]);
  const box = drawLine(mask, plane, [10.5, 10.5], [10.5, 10.5], 4.2, 1);
  const rows = show(mask, plane);
  assert.equal(rows.filter((row) => row.includes("#")).length, 5);
  assert.equal(rows[10], `${".".repeat(6)}${"#".repeat(9)}${".".repeat(6)}`);
  assert.deepEqual(mask, makeDisc(plane, [10.5, 10.5], 4.2));
  assert.deepEqual(box, { y0: 8, y1: 13, x0: 6, x1: 15 });
});

test("a fast stroke leaves no gaps, a brush smaller than a pixel draws the one under it, and outside nothing happens", () => {
  const { mask, plane } = read(Array(9).fill(".".repeat(30)));
  drawLine(mask, plane, [4.5, 2.5], [4.5, 27.5], 1, 1);
  assert.equal(show(mask, plane)[4], `.${"#".repeat(28)}.`);
  drawLine(mask, plane, [0.9, 0.1], [0.9, 0.1], 0.05, 1);
  assert.equal(mask[0], 1);
  const before = mask.slice();
  assert.equal(drawLine(mask, plane, [-50, -50], [-50, -50], 3, 1), null);
  assert.deepEqual(mask, before);
});

test("a gated brush changes only what the gate lets through, and an eraser takes away", () => {
  const { mask, plane } = read(["....", "....", "...."]);
  drawLine(mask, plane, [1.5, 2], [1.5, 2], 9, 1, (index) => index % 2 === 0);
  assert.deepEqual(show(mask, plane), ["#.#.", "#.#.", "#.#."]);
  const stroke = startBrush(mask, plane, 1, 0);
  stroke.move([0.5, 0.5]);
  stroke.move([2.5, 0.5]);
  assert.deepEqual(show(mask, plane), ["..#.", "..#.", "..#."]);
});

test("a lasso fills what it runs around, whichever way round, and where it crosses itself", () => {
  const { mask, plane } = read(Array(8).fill(".".repeat(8)));
  const square = [[1, 1], [1, 6], [6, 6], [6, 1]];
  for (const points of [square, [...square].reverse(), [...square, ...square]]) {
    mask.fill(0);
    fillPolygon(mask, plane, points, 1);
    assert.deepEqual(show(mask, plane).slice(0, 3), ["........", ".#####..", ".#####.."]);
    assert.equal(count(mask), 25);
  }
  const lasso = startLasso(mask, plane, 0);
  for (const point of [[-3, -3], [-3, 3], [3, 3], [3, -3]]) assert.equal(lasso.move(point), null);
  lasso.finish();
  assert.equal(count(mask), 21);
});

test("holes are filled, what reaches the border is none", () => {
  const { mask, plane } = read(["######", "#.#..#", "####.#", "...#.#", "...#.#"]);
  assert.deepEqual(show(fillHoles(mask, plane), plane), ["######", "###..#", "####.#", "...#.#", "...#.#"]);
  assert.deepEqual(fillHoles(mask.map(() => 1), plane), mask.map(() => 1));
});

test("flooding fills the hole under the point, removes an island, and refuses what lies around", () => {
  const { mask, plane } = read(["###...", "#.#.##", "###.##"]);
  assert.deepEqual(show(flood(mask, plane, [1.5, 1.5]), plane), ["###...", "###.##", "###.##"]);
  assert.deepEqual(show(flood(mask, plane, [2.2, 4.4]), plane), ["###...", "#.#...", "###..."]);
  assert.equal(flood(mask, plane, [0.5, 4.5]), null);
  assert.equal(flood(mask, plane, [-1, 4]), null);
});

test("growing and shrinking go by mm, and by pixels when a pixel is 1", () => {
  const { mask, plane } = read([".......", ".......", "...#...", ".......", "......."], [2, 1]);
  assert.deepEqual(show(grow(mask, plane, 2), plane), [".......", "...#...", ".#####.", "...#...", "......."]);
  const square = { ...plane, spacing: [1, 1] };
  assert.deepEqual(show(grow(mask, square, 1), plane), [".......", "...#...", "..###..", "...#...", "......."]);
  assert.deepEqual(grow(grow(mask, square, 1), square, -1), mask);
  const disc = makeDisc({ height: 40, width: 60, spacing: [1.5, 1] }, [20, 30], 12);
  const larger = grow(disc, { height: 40, width: 60, spacing: [1.5, 1] }, 3);
  assert.ok(Math.abs(Math.sqrt((count(larger) * 1.5) / Math.PI) - 15) < 0.35);
});

test("smoothing drops a hair and keeps a disc", () => {
  const plane = { height: 60, width: 60, spacing: [1, 1] };
  const disc = makeDisc(plane, [30, 30], 14);
  const hairy = disc.slice();
  for (let x = 44; x < 58; x += 1) hairy[30 * 60 + x] = 1;
  const smoothed = smooth(hairy, plane, 2);
  assert.equal(smoothed[30 * 60 + 52], 0);
  const differing = smoothed.reduce((sum, value, i) => sum + (value !== disc[i]), 0);
  assert.ok(differing < 0.05 * count(disc), `${differing} pixels differ`);
});

test("between two discs lies a disc of the radius between, on pixels that are not square", () => {
  const plane = { height: 50, width: 80, spacing: [1.6, 1] };
  const [small, large] = [10, 30].map((radius) => makeDisc(plane, [25, 40], radius));
  for (const [share, radius] of [[0.25, 15], [0.5, 20], [0.75, 25]]) {
    const found = interpolate(small, large, plane, share);
    const wanted = makeDisc(plane, [25, 40], radius);
    const both = found.reduce((sum, value, i) => sum + (value & wanted[i]), 0);
    assert.ok((2 * both) / (count(found) + count(wanted)) > 0.97, `${share}`);
  }
  assert.deepEqual(interpolate(small, large, plane, 0), small);
  assert.deepEqual(interpolate(small, large, plane, 1), large);
});

test("a vessel that wanders is interpolated on its way, and nothing is made of nothing", () => {
  const plane = { height: 40, width: 60, spacing: [1, 1] };
  const [first, second] = [makeDisc(plane, [10, 10], 4), makeDisc(plane, [30, 50], 4)];
  const found = interpolate(first, second, plane, 0.5);
  assert.deepEqual(found, makeDisc(plane, [20, 30], 4));
  assert.equal(interpolate(first, new Uint8Array(2400), plane, 0.5), null);
});
