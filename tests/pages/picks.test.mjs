import assert from "node:assert/strict";
import test from "node:test";

import * as picks from "../../apps/progidiff/web/review/picks.js";

const MASKS = [
  [1, 1, 1, 0],
  [1, 1, 0, 0],
  [1, 0, 0, 0],
  [1, 0, 1, 0],
].map((values) => Uint8Array.from(values));
const draw = (rule, members, threshold) => [...picks.drawPick(MASKS, picks.makePick(rule, members, threshold), 2)];

test("every rule draws what it says", () => {
  assert.deepEqual(draw("union"), [1, 1, 1, 0]);
  assert.deepEqual(draw("intersection"), [1, 0, 0, 0]);
  assert.deepEqual(draw("majority"), [1, 1, 1, 0], "a half is enough");
  assert.deepEqual(draw("consensus"), [1, 1, 1, 0]);
  assert.deepEqual(draw("threshold", [], 0.75), [1, 0, 0, 0]);
  assert.deepEqual(draw("best"), [1, 0, 0, 0]);
  assert.deepEqual(draw("proposal", [2]), [1, 1, 0, 0]);
  assert.deepEqual(draw("nothing"), [0, 0, 0, 0]);
  assert.deepEqual(draw("union", [2, 3]), [1, 1, 0, 0]);
});

test("a share of proposals is rounded up to whole ones, with the server's tolerance", () => {
  assert.equal(picks.countNeeded(0.3, 10), 3);
  assert.equal(picks.countNeeded(0.31, 10), 4);
  assert.equal(picks.countNeeded(0, 4), 1);
  assert.equal(picks.countNeeded(1, 4), 4);
});

test("a merge keeps the members that were chosen, and begins with all", () => {
  const union = picks.mergeBy(picks.pickProposal(2), "union", 4);
  assert.deepEqual([union.rule, union.members], ["union", []]);
  const some = picks.toggleMember(union, 2, 4);
  assert.deepEqual([some.rule, some.members], ["union", [1, 3, 4]]);
  assert.deepEqual(picks.mergeBy(some, "intersection", 4).members, [1, 3, 4]);
  assert.deepEqual(picks.toggleMember(some, 2, 4).members, [], "all again");
});

test("the last member stays, and a pick that is no merge becomes a majority", () => {
  assert.deepEqual(picks.toggleMember(picks.makePick("union", [3]), 3, 4).members, [3]);
  const made = picks.toggleMember(picks.makePick("consensus"), 1, 4);
  assert.deepEqual([made.rule, made.members], ["majority", [2, 3, 4]]);
});

test("a threshold begins with three quarters and moves by whole proposals, within bounds", () => {
  const first = picks.shiftThreshold(picks.makePick("consensus"), 1, 4);
  assert.deepEqual([first.rule, first.threshold], ["threshold", 0.75]);
  assert.equal(picks.shiftThreshold(first, -1, 4).threshold, 0.5);
  assert.equal(picks.shiftThreshold(picks.makePick("threshold", [], 1), 1, 4).threshold, 1);
  assert.equal(picks.shiftThreshold(picks.makePick("threshold", [], 0.25), -1, 4).threshold, 0.25);
  assert.equal(picks.requireProposals(picks.makePick("threshold", [1, 2, 3], 1), 2, 4).threshold, 2 / 3);
});

test("picks in words", () => {
  assert.equal(picks.describePick(picks.pickProposal(2), 4), "proposal 2");
  assert.equal(picks.describePick(picks.makePick("union", [1, 3]), 4), "union of 1, 3");
  assert.equal(picks.describePick(picks.makePick("threshold", [], 0.75), 4), "at least 75 % of all");
  assert.equal(picks.describePick(picks.makePick("nothing"), 4), "absent");
  assert.equal(picks.describePick(null, 4), "consensus");
});
