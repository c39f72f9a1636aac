import assert from "node:assert/strict";
import test from "node:test";

import { cssColor, heatColor, parseColor } from "../../apps/progidiff/web/review/colors.js";
import { ByteCache } from "../../apps/progidiff/web/review/cache.js";
import { describeProgress } from "../../apps/progidiff/web/review/progress.js";
import { countSlices, findHighest, formatSlices, rankSlices } from "../../apps/progidiff/web/review/slices.js";

test("the most disputed slice that is left", () => {
  const values = [0, 0.5, 0.9, 0.9, 0.1];
  assert.equal(findHighest(values, () => false), 2);
  assert.equal(findHighest(values, (z) => z === 2), 3);
  assert.equal(findHighest(values, () => false, 2), 3);
  assert.equal(findHighest(values, (z) => z > 0), null);
  assert.equal(findHighest([], () => false), null);
});

test("slices in order of dispute, at most eight, none without a dispute", () => {
  assert.deepEqual(rankSlices([0, 0.2, 0.7]).map(({ index, reason }) => [index, reason]), [[2, "disagreement 0.70"], [1, "disagreement 0.20"]]);
  assert.equal(rankSlices(Array(20).fill(0.5)).length, 8);
});

test("slices in words", () => {
  assert.equal(formatSlices([9, 3, 4, 5]), "3–5, 9");
  assert.equal(formatSlices([7]), "7");
  assert.equal(countSlices(1), "1 slice");
  assert.equal(countSlices(0), "0 slices");
});

test("a job says how far it is, or what it waits for", () => {
  assert.equal(describeProgress({ state: "queued", position: 2 }), "waiting, position 2");
  assert.equal(describeProgress({ state: "queued", position: 0 }), "waiting");
  assert.equal(describeProgress({ state: "queued", position: 1, waiting_for: "the background scoring" }), "waiting for the background scoring");
  assert.equal(describeProgress({ state: "running", slices_done: 3, slices_total: 0 }), "3 of ? slices");
  assert.equal(describeProgress({ state: "running", slices_done: 3, slices_total: 24 }), "3 of 24 slices");
  assert.equal(describeProgress({ problem: "The server does not answer." }), "The server does not answer.");
});

test("colours", () => {
  assert.deepEqual(parseColor("#0a10ff"), [10, 16, 255]);
  assert.deepEqual([heatColor(-1), heatColor(2)], [[59, 15, 112], [252, 253, 191]]);
  assert.equal(cssColor([1, 2, 3]), "rgb(1 2 3)");
});

test("a cache asks once, forgets what failed, and lets go what was not used for longest", async () => {
  const cache = new ByteCache(2, 1);
  const asked = [];
  const get = (key) => cache.get(key, async () => (asked.push(key), key), () => 1);
  await Promise.all([get("a"), get("a")]);
  await get("b");
  await get("a");
  await get("c");
  await get("a");
  assert.deepEqual(asked, ["a", "b", "c"]);
  await get("b");
  assert.deepEqual(asked, ["a", "b", "c", "b"]);
  await assert.rejects(cache.get("x", () => Promise.reject(new Error("gone")), () => 1));
  assert.equal(await cache.get("x", async () => 7, () => 1), 7);
});
