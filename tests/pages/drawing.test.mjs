import assert from "node:assert/strict";
import test from "node:test";

import { Drawing, toPainted } from "../../apps/progidiff/web/review/drawing.js";
import { combineLook, reframe } from "../../apps/progidiff/web/review/drawn_look.js";
import { fitFrame, frameZoomed, locate, pinch } from "../../apps/progidiff/web/review/geometry.js";
import { makePick, pickProposal } from "../../apps/progidiff/web/review/picks.js";
import { packMask, unpackMask } from "../../apps/progidiff/web/review/runs.js";
import { findWindow, firstSettings, readAmount, stepSize } from "../../apps/progidiff/web/review/tools.js";
import { Work } from "../../apps/progidiff/web/review/work.js";

const plane = { height: 4, width: 5 };
const fill = (...indices) => Uint8Array.from({ length: 20 }, (_, i) => (indices.includes(i) ? 1 : 0));
const draw = (drawing, structure, z, mask, more = {}) => drawing.commit(`${structure} ${z}`, z, [{ structure, z, mask, ...more }]);
const shown = (drawing, structure, z) => {
  const drawn = drawing.get(structure, z);
  return drawn && [...drawing.decode(drawn)];
};

test("a mask comes out of its runs as it went in", () => {
  for (let seed = 1; seed < 60; seed += 1) {
    const mask = Uint8Array.from({ length: 7 * 9 }, (_, i) => ((i * i * 31 + i * seed) % seed < seed / 3 ? 1 : 0));
    const packed = packMask(mask, 7, 9);
    assert.deepEqual(unpackMask(packed, 7, 9), mask, `${seed}`);
    if (packed.box) {
      const { y0, y1, x0, x1 } = packed.box;
      assert.equal(packed.runs.reduce((sum, length) => sum + length), (y1 - y0) * (x1 - x0));
      assert.ok(packed.runs.slice(1).every((length) => length > 0));
    }
  }
  assert.deepEqual(packMask(new Uint8Array(20), 4, 5), { box: null, runs: [] });
});

test("undo and redo go through every step, and something new ends what could be redone", () => {
  const drawing = new Drawing("a", plane);
  const masks = Array.from({ length: 600 }, (_, i) => fill(i % 20, (i * 3 + 1) % 20));
  masks.forEach((mask, i) => draw(drawing, "liver", i % 7, mask));
  const { total } = drawing.place;
  let steps = 0;
  while (drawing.undo()) steps += 1;
  assert.deepEqual([steps, drawing.list()], [total, []]);
  while (drawing.redo()) steps -= 1;
  assert.equal(steps, 0);
  assert.deepEqual(shown(drawing, "liver", 599 % 7), [...masks[599]]);
  drawing.undo();
  draw(drawing, "liver", 1, fill(4));
  assert.equal(drawing.redo(), null);
  assert.equal(draw(drawing, "liver", 1, fill(4)), null, "what changes nothing is no step");
});

test("several slices are one step, and a dropped slice comes back", () => {
  const drawing = new Drawing("a", plane);
  drawing.commit("both", 2, [{ structure: "liver", z: 1, mask: fill(1) }, { structure: "liver", z: 3, mask: fill(3) }]);
  draw(drawing, "liver", 1, null);
  assert.equal(drawing.get("liver", 1), null);
  assert.equal(drawing.undo().z, 1);
  assert.deepEqual(shown(drawing, "liver", 1), [...fill(1)]);
  drawing.undo();
  assert.deepEqual(drawing.list(), []);
});

test("what was kept is there again with everything that can be undone and redone", () => {
  const drawing = new Drawing("a", plane);
  const steps = [draw(drawing, "liver", 1, fill(1)), draw(drawing, "liver", 1, fill(2)), draw(drawing, "spleen", 2, fill(3)), draw(drawing, "liver", 1, fill(5))];
  drawing.markSent(drawing.list().filter(({ structure }) => structure === "spleen"));
  drawing.undo();
  const journal = JSON.parse(JSON.stringify({ steps, done: drawing.place.done, sent: drawing.sent }));
  const again = new Drawing("a", plane, journal);
  assert.deepEqual(again.list(), drawing.list());
  assert.deepEqual([again.place, again.sent, again.lastAt, again.nextAt], [{ done: 3, total: 4 }, [["spleen", 2]], drawing.lastAt, drawing.nextAt]);
  again.redo();
  assert.deepEqual(shown(again, "liver", 1), [...fill(5)]);
  while (again.undo());
  assert.deepEqual(again.list(), []);
});

test("what was sent is not sent again until it changes, and undoing past it is a change", () => {
  const drawing = new Drawing("a", plane);
  draw(drawing, "liver", 1, fill(1));
  draw(drawing, "liver", 1, fill(2));
  assert.equal(drawing.hasUnsent, true);
  drawing.markSent(drawing.listUnsent());
  assert.equal(drawing.hasUnsent, false);
  drawing.undo();
  assert.deepEqual(drawing.listUnsent().map(({ z }) => z), [1]);
  drawing.redo();
  assert.equal(drawing.hasUnsent, false);
  drawing.markUnsent(1, ["liver"]);
  assert.equal(drawing.hasUnsent, true);
});

test("gaps lie between slices that a person drew, not between those that were interpolated", () => {
  const drawing = new Drawing("a", plane);
  for (const z of [2, 9, 20]) draw(drawing, "liver", z, fill(z));
  draw(drawing, "liver", 5, fill(5), { way: "between" });
  assert.deepEqual(drawing.findGaps("liver", 4), [[2, 9]]);
  assert.deepEqual(drawing.findGaps("liver", 9), [[2, 9], [9, 20]]);
  assert.deepEqual(drawing.findGaps("liver", 30), []);
  assert.deepEqual(drawing.findGaps("spleen", 4), []);
  draw(drawing, "liver", 5, fill(5));
  assert.deepEqual(drawing.findGaps("liver", 4), [[2, 5]]);
});

test("what is sent names the box, the runs, how many edits, and what it was drawn on; the last drawn comes last", () => {
  const drawing = new Drawing("a", plane);
  draw(drawing, "liver", 1, fill(6, 7, 12), { start: pickProposal(2), source: "key" });
  draw(drawing, "spleen", 1, fill(0), { start: pickProposal(1), source: "older" });
  draw(drawing, "liver", 1, fill(6, 12));
  draw(drawing, "spleen", 3, fill());
  assert.deepEqual(toPainted(drawing.listUnsent(), [9, 4, 5]), {
    shape: [9, 4, 5],
    slices: {
      1: [
        { structure: "spleen", box: [0, 1, 0, 1], runs: [0, 1], edits: 1, start: pickProposal(1), proposals: "older" },
        { structure: "liver", box: [1, 3, 1, 3], runs: [0, 1, 2, 1], edits: 2, start: pickProposal(2), proposals: "key" },
      ],
      3: [{ structure: "spleen", box: null, runs: [], edits: 1, start: null, proposals: "" }],
    },
  });
  assert.equal(toPainted([], [9, 4, 5]), null);
});

test("what is drawn is shown instead of the pick, without what was drawn over it later", () => {
  const drawing = new Drawing("b", plane);
  const box = { y0: 1, y1: 3, x0: 1, x1: 3 };
  const proposed = { box, masks: [Uint8Array.from([1, 1, 1, 1])], mask: Uint8Array.from([1, 1, 1, 1]), best: 0, pick: makePick("consensus") };
  assert.equal(combineLook(drawing, "liver", 1, proposed), proposed);
  draw(drawing, "liver", 1, fill(0, 6));
  const own = combineLook(drawing, "liver", 1, proposed);
  assert.deepEqual([own.box, [...own.mask]], [{ y0: 0, y1: 3, x0: 0, x1: 3 }, [1, 0, 0, 0, 1, 0, 0, 0, 0]]);
  assert.deepEqual([...own.masks[0]], [0, 0, 0, 0, 1, 1, 0, 1, 1]);
  assert.equal(own.drawn.edits, 1);
  draw(drawing, "spleen", 1, fill(6));
  assert.deepEqual([...combineLook(drawing, "liver", 1, proposed).mask], [1, 0, 0, 0, 0, 0, 0, 0, 0]);
  assert.deepEqual([...combineLook(drawing, "kidney", 1, proposed).mask], [0, 1, 1, 1], "a pick yields to what is drawn");
  assert.deepEqual([...reframe(Uint8Array.from([1, 2]), { y0: 0, y1: 1, x0: 3, x1: 5 }, { y0: 0, y1: 2, x0: 4, x1: 6 })], [2, 0, 0, 0]);
});

test("drawing counts as deciding, and one undo goes back through picks and strokes as they came", () => {
  const work = new Work("c", "key");
  const drawing = new Drawing("c", plane);
  work.drawing = drawing;
  work.setPick("liver", pickProposal(2), 1);
  draw(drawing, "liver", 4, fill(1));
  assert.ok(drawing.lastAt > work.lastAt);
  assert.deepEqual([work.hasDecisions, work.isDecided(4), work.isDecided(1), work.decidedSlices], [true, true, false, [4]]);
  assert.deepEqual([work.decided, work.acceptedOf("liver")], [["liver"], { volume: null, slices: [4] }]);
  assert.deepEqual(work.toDecisions(3), { proposals: "key", volume: {}, slices: {}, base: 3, seconds: 0 });
  work.acceptSlice(1, ["liver"]);
  assert.ok(work.lastAt > drawing.lastAt);
  assert.match(work.undo().what, /liver accepted/);
  assert.ok(work.nextAt > drawing.lastAt);
  assert.match(work.redo().what, /liver accepted/);
  assert.deepEqual(work.decidedSlices, [1, 4]);
  work.undo();
  work.setPick("liver", pickProposal(1), 1);
  assert.equal(work.redo(), null);
});

test("what lies between two fingers stays there while they move and spread", () => {
  const slice = { height: 200, width: 100, spacing: [1, 2] };
  const canvas = { width: 600, height: 500 };
  const place = fitFrame(frameZoomed(slice, 2, [90, 40], 1.2), slice.spacing, 600, 500);
  const before = [{ y: 200, x: 250 }, { y: 260, x: 350 }];
  const now = [{ y: 150, x: 200 }, { y: 330, x: 500 }];
  const point = locate(place, 300, 230);
  const { zoom, center } = pinch(point, before, now, place, 2, canvas);
  assert.ok(Math.abs(zoom / 2 - 3) < 1e-9);
  const after = fitFrame(frameZoomed(slice, zoom, center, 1.2), slice.spacing, 600, 500);
  const found = locate(after, 350, 240);
  assert.ok(Math.abs(found[0] - point[0]) < 1e-6 && Math.abs(found[1] - point[1]) < 1e-6);
});

test("a brush begins some pixels wide, and amounts are of pixels or of mm", () => {
  const settings = firstSettings([0.8, 0.7], [-160, 240]);
  assert.deepEqual(settings, { size: 9.8, low: -160, high: 240, amount: 1, unit: "px" });
  assert.equal(stepSize(8, 1), 10);
  assert.equal(stepSize(stepSize(8, 1), -1), 8);
  assert.deepEqual(readAmount(settings, [0.8, 0.7]), { length: 1, spacing: [1, 1] });
  assert.deepEqual(readAmount({ ...settings, amount: 3, unit: "mm" }, [0.8, 0.7]), { length: 3, spacing: [0.8, 0.7] });
});

test("the window of what is drawn leaves out the darkest and the brightest twentieth", () => {
  const pixels = Int16Array.from({ length: 101 }, (_, i) => i);
  assert.deepEqual(findWindow(pixels, new Uint8Array(101).fill(1), [2, -100]), [-90, 90]);
  assert.equal(findWindow(pixels, new Uint8Array(101), [1, 0]), null);
});
