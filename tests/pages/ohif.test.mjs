import assert from "node:assert/strict";
import test from "node:test";
import { gunzipSync } from "node:zlib";

import { Beside } from "../../apps/progidiff/web/ohif/beside.js";
import { drawSlice, emptyMask, findLabel, joinSlices, listLabels, relabel, takeStrokes, wholeMask } from "../../apps/progidiff/web/ohif/masks.js";
import { encodeNrrd } from "../../apps/progidiff/web/ohif/nrrd.js";
import { rankSlices } from "../../apps/progidiff/web/ohif/proposals.js";
import { describeJob } from "../../apps/progidiff/web/ohif/run.js";
import { listSegments } from "../../apps/progidiff/web/ohif/segments.js";
import { cross, dot } from "../../apps/progidiff/web/ohif/vectors.js";

const SHAPE = [3, 4, 5];

test("a mask is drawn in its box and nowhere else", () => {
  const mask = { box: [1, 2, 1, 3, 2, 4], shape: SHAPE, voxels: Uint8Array.from([1, 2, 3, 4]) };
  const target = new Uint8Array(20).fill(9);
  drawSlice(mask, 1, target);
  assert.deepEqual([...target], [0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 3, 4, 0, 0, 0, 0, 0, 0]);
  drawSlice(mask, 2, target);
  assert.ok(target.every((value) => value === 0));
});

test("slices become one array and come out of it again", () => {
  const slices = [2, 0].map((z) => [z, Uint8Array.from({ length: 20 }, (_, i) => z * 20 + i + 1)]);
  const all = joinSlices(SHAPE, slices);
  const mask = wholeMask(SHAPE, all, "2");
  const target = new Uint8Array(20);
  for (const [z, voxels] of slices) {
    drawSlice(mask, z, target);
    assert.deepEqual(target, voxels);
  }
  drawSlice(mask, 1, target);
  assert.ok(target.every((value) => value === 0));
  drawSlice(emptyMask(SHAPE), 0, target);
  assert.ok(target.every((value) => value === 0));
});

test("an NRRD file holds the voxels and says where they are", async () => {
  const voxels = Uint8Array.from({ length: 24 }, (_, i) => i);
  const file = await encodeNrrd(voxels, { shape: [2, 3, 4], origin: [1, 2, 3], directions: [[1, 0, 0], [0, 2, 0], [0, 0, 3]] });
  const bytes = Buffer.from(await file.arrayBuffer());
  const end = bytes.indexOf("\n\n");
  const header = bytes.subarray(0, end).toString();
  assert.match(header, /^NRRD0004\n/);
  assert.match(header, /sizes: 4 3 2\n/);
  assert.match(header, /space directions: \(1,0,0\) \(0,2,0\) \(0,0,3\)\n/);
  assert.match(header, /space origin: \(1,2,3\)/);
  assert.deepEqual(Uint8Array.from(gunzipSync(bytes.subarray(end + 2))), voxels);
});

test("the most disputed slices over all structures", () => {
  assert.deepEqual(rankSlices([[0, 0.2, 0.1], [0, 0, 0.5]]), [[2, 0.5], [1, 0.2]]);
  assert.deepEqual(rankSlices([]), []);
});

test("a job says how far it is, or what it waits for", () => {
  const job = { id: "a", state: "queued", position: 2, percent: 0, slices_done: 0, slices_total: 0 };
  assert.equal(describeJob(job), "2 before you");
  assert.equal(describeJob({ ...job, waiting_for: "the background scoring" }), "Waiting for the background scoring");
  assert.equal(describeJob({ ...job, state: "running", position: 0, slices_done: 3, slices_total: 9 }), "3 of 9 slices");
});

test("segments have the label ids of the structures, and bands of disagreement beside them", () => {
  const segments = listSegments([{ structure: "liver", label: 6, synonyms: [], color: "#c98a5b" }]);
  assert.deepEqual(segments[0].color, [201, 138, 91]);
  assert.deepEqual(segments.map(({ index }) => index), [6, 201, 202, 203, 204]);
  const own = [{ name: "left ventricle", label_id: 14, color: "#3366cc" }, { name: "liver", label_id: 6, color: "#c98a5b" }];
  const both = listSegments([{ structure: "liver", label: 6, synonyms: [], color: "#c98a5b" }], own);
  assert.deepEqual(both.slice(0, 2).map(({ index, label, color }) => [index, label, color]), [[6, "liver", [201, 138, 91]], [14, "left ventricle", [51, 102, 204]]]);
});

test("the normal of a plane is at right angles to it", () => {
  const [row, column] = [[1, 0, 0], [0, 0.8, 0.6]];
  const normal = cross(row, column);
  assert.deepEqual([dot(normal, row), dot(normal, column)], [0, 0]);
});

test("labels are found, counted and replaced", () => {
  const voxels = new Uint8Array(60);
  voxels.set([6, 1, 6], 3);
  voxels[41] = 1;
  assert.deepEqual(listLabels(voxels), [1, 6]);
  assert.deepEqual(findLabel(SHAPE, voxels, 1), { count: 2, slices: [0, 2] });
  assert.deepEqual(listLabels(relabel(voxels, new Map([[1, 6]]))), [6]);
  assert.deepEqual(listLabels(relabel(voxels, new Map([[6, 0]]))), [1]);
});

test("what is drawn on a picture of the disagreement is drawn on the mask", () => {
  const mask = { box: [0, 1, 0, 1, 0, 2], shape: SHAPE, voxels: Uint8Array.from([6, 6]) };
  const picture = { box: [0, 1, 0, 1, 1, 3], shape: SHAPE, voxels: Uint8Array.from([201, 204]) };
  const shown = new Uint8Array(60);
  shown.set([0, 201, 204]);
  assert.equal(takeStrokes(mask, picture, shown, 201), null);
  shown[2] = 6;
  shown[45] = 1;
  const drawn = takeStrokes(mask, picture, shown, 201);
  assert.deepEqual([...drawn.subarray(0, 4), drawn[45]], [6, 6, 6, 0, 1]);
});

test("what a segment is was said once, until it is drawn on", () => {
  const beside = new Beside();
  const voxels = new Uint8Array(60);
  voxels.set([1, 1], 3);
  assert.equal(beside.find(SHAPE, voxels, 1), null);
  beside.decide(SHAPE, voxels, 1, 0);
  assert.equal(beside.find(SHAPE, voxels, 1), 0);
  assert.equal(beside.find(SHAPE, new Uint8Array(60), 1), 0); // a submission of other slices

  const more = voxels.slice();
  more[41] = 1;
  assert.equal(beside.find(SHAPE, more, 1), null);
  beside.decide(SHAPE, more, 1, 6);
  assert.equal(beside.find(SHAPE, more, 1), 6);
  const moved = more.slice();
  moved.set([0, 1], 41);
  assert.equal(beside.find(SHAPE, moved, 1), null);
  beside.clear();
  assert.equal(beside.find(SHAPE, more, 1), null);
});
