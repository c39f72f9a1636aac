import assert from "node:assert/strict";
import test from "node:test";

import { describeProgressOf, describeTeaching, formatMl, measurePick } from "../../apps/progidiff/web/review/checklist.js";
import { makePick, pickProposal } from "../../apps/progidiff/web/review/picks.js";
import { combineParts, orderMasks } from "../../apps/progidiff/web/review/results.js";

const numbers = (best) => ({ consensus_ml: 10 * best, proposals_ml: [1, 22.2, 3], best, present: true });
const part = (key, structures, job = "") => ({
  ...{ key, job, structures, numProposals: 3 },
  summary: job ? null : { structures: Object.fromEntries(structures.map((name, index) => [name, numbers(index + 1)])) },
});

test("later results add structures, and take over those that they share", () => {
  const [first, second] = [part("a", ["liver", "spleen"]), part("b", ["aorta", "liver"])];
  const result = combineParts([first, second], {});
  assert.deepEqual(result.structures, ["liver", "spleen", "aorta"]);
  assert.deepEqual(result.structures.map((name) => result.owners[name].key), ["b", "a", "b"]);
  assert.equal(result.summary.structures.liver.consensus_ml, 20);
  assert.deepEqual(orderMasks(result, [["l1", "s1"], ["a2", "l2"]]), ["l2", "s1", "a2"]);
  assert.equal(combineParts([], {}), null);
});

test("a structure on which something is accepted stays with its result", () => {
  const result = combineParts([part("a", ["liver"]), part("b", ["liver"])], { liver: "a" });
  assert.equal(result.owners.liver.key, "a");
});

test("a job that has not come to a slice yet has no masks there, and the kept results have theirs", () => {
  const result = combineParts([part("a", ["liver"]), part("", ["structure 1"], "job")], {});
  assert.deepEqual(orderMasks(result, [["l"], null]), ["l", null]);
  assert.deepEqual(Object.keys(result.summary.structures), ["liver"]);
});

test("a structure is open, accepted, saved or absent", () => {
  const say = (volume, slices, saved, isPresent = true) => describeProgressOf({ volume, slices }, saved, isPresent);
  assert.deepEqual(say(null, [], undefined), { mark: "open", words: "open" });
  assert.deepEqual(say(null, [], undefined, false), { mark: "open", words: "open, not found" });
  assert.deepEqual(say(null, [4, 7], undefined), { mark: "accepted", words: "accepted: 2 slices" });
  assert.deepEqual(say(makePick("union"), [4], null), { mark: "accepted", words: "accepted: volume" });
  assert.deepEqual(say(makePick("nothing"), [], undefined), { mark: "absent", words: "absent, not sent" });
  assert.deepEqual(say(null, [], null), { mark: "saved", words: "saved: volume" });
  assert.deepEqual(say(null, [], [3]), { mark: "saved", words: "saved: 1 slice" });
});

test("the volume of what is picked, where the page knows it", () => {
  assert.deepEqual([makePick("consensus"), pickProposal(2), makePick("best"), makePick("nothing"), makePick("union")].map((pick) => measurePick(pick, numbers(3))), [30, 22.2, 3, 0, null]);
  assert.deepEqual([formatMl(22.2), formatMl(3), formatMl(null)], ["22 ml", "3.0 ml", ""]);
});

test("a structure that no model knows says how many slices are missing", () => {
  assert.equal(describeTeaching({ slices: 0, missing: 10 }), "no slice labelled yet, 10 until proposals can be expected");
  assert.equal(describeTeaching({ slices: 1, missing: 9 }), "1 slice labelled, 9 more until proposals can be expected");
  assert.equal(describeTeaching({ slices: 12, missing: 0 }), "12 slices labelled; train, and proposals can be expected");
});
