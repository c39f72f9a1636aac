import assert from "node:assert/strict";
import test, { beforeEach } from "node:test";

import { Edits, chooseByEdits, thinLine, toPaintEdit, toRequest } from "../../apps/progidiff/web/review/edits.js";

beforeEach(() => {
  const kept = new Map();
  globalThis.localStorage = { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value), removeItem: (key) => kept.delete(key) };
});

const click = (y, x, more = {}) => ({ kind: "click", positive: true, structure: "liver", z: 3, points: [[y, x]], ...more });

test("edits are kept from the first click on, and undo goes on after a reload", () => {
  const edits = new Edits("a");
  edits.add(click(1, 2));
  edits.add(click(3, 4, { positive: false }));
  edits.add(click(5, 6, { structure: "spleen", z: 4 }));
  assert.equal(edits.undo().what, "click inside of spleen on slice 5");
  const again = Edits.load("a");
  assert.deepEqual(again.all, edits.all);
  assert.equal(again.on("liver", 3).length, 2);
  assert.deepEqual(again.on("liver", 4), []);
  assert.equal(again.redo().structure, "spleen");
  assert.equal(again.undo().structure, "spleen");
  assert.equal(again.undo().what, "click outside of liver on slice 4");
  assert.ok(again.lastAt > 0 && again.nextAt > again.lastAt);
  again.add(click(9, 9));
  assert.equal(again.redo(), null);
  assert.deepEqual(Edits.load("b").all, []);
});

test("all edits of a structure are removed in one step", () => {
  const edits = new Edits("a");
  edits.add(click(1, 2));
  edits.add(click(1, 2, { structure: "spleen" }));
  edits.clear("liver", 3);
  edits.clear("liver", 3);
  assert.deepEqual(edits.all.map(({ structure }) => structure), ["spleen"]);
  edits.undo();
  assert.equal(edits.of("liver").length, 1);
});

test("a structure that the server calls otherwise keeps its edits and their undo", () => {
  const edits = new Edits("a");
  edits.add(click(1, 2, { structure: "Leber" }));
  edits.add(click(3, 4, { structure: "Leber" }));
  edits.rename("Leber", "liver");
  assert.equal(edits.of("liver").length, 2);
  assert.equal(edits.undo().structure, "liver");
  assert.equal(Edits.load("a").of("liver").length, 1);
});

test("points are counted as the file counts its voxels", () => {
  const voxels = { origin: [3, 4, 0], steps: [[0, 0, 1], [0, -1, 0], [-1, 0, 0]] };
  const [first, second] = toRequest([click(0, 0, { z: 0 }), click(4, 3, { z: 5, positive: false })], voxels);
  assert.deepEqual(first, { kind: "click", positive: true, points: [[3, 4, 0]] });
  assert.deepEqual(second.points, [[0, 0, 5]]);
});

test("a drawn slice is packed with the first pixel in the highest bit", () => {
  const mask = new Uint8Array(10);
  mask[0] = mask[9] = 1;
  assert.deepEqual([...Buffer.from(toPaintEdit(2, mask).mask, "base64")], [128, 64]);
});

test("a line keeps its corners and leaves out what lies beyond the slice", () => {
  const plane = { height: 20, width: 20 };
  const line = [...Array.from({ length: 11 }, (_, i) => [0.5, i + 0.5]), ...Array.from({ length: 30 }, (_, i) => [i + 0.5, 10.5])];
  assert.deepEqual(thinLine(line, plane), [[0, 0], [0, 10], [19, 10]]);
  assert.deepEqual(thinLine([[-3, 4], [25, 4]], plane), []);
  assert.deepEqual(thinLine([[2.9, 4.1], [2.2, 4.9]], plane), [[2, 4]]);
});

test("clicks choose the proposals that agree, or the one that contradicts the fewest", () => {
  const found = { box: { y0: 2, y1: 4, x0: 2, x1: 4 }, masks: [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]].map((mask) => Uint8Array.from(mask)) };
  assert.deepEqual(chooseByEdits(found, [click(2, 3)]), { members: [2, 3], missed: 0 });
  assert.deepEqual(chooseByEdits(found, [click(2, 3), click(3, 2, { positive: false })]), { members: [2], missed: 0 });
  assert.deepEqual(chooseByEdits(found, [click(2, 3), click(9, 9)]), { members: [2], missed: 1 });
  assert.deepEqual(chooseByEdits({ box: null, masks: [new Uint8Array(0)] }, [click(0, 0, { positive: false })]), { members: [1], missed: 0 });
});
