import assert from "node:assert/strict";
import test, { beforeEach } from "node:test";

import { makePick, pickProposal } from "../../apps/progidiff/web/review/picks.js";
import { Work, forgetWork, listUnsent, loadWork } from "../../apps/progidiff/web/review/work.js";

/** Of a browser, as far as it is used: own properties are the keys. */
class Storage {
  getItem(key) {
    return this[key] ?? null;
  }
  setItem(key, value) {
    this[key] = value;
  }
  removeItem(key) {
    delete this[key];
  }
}

beforeEach(() => {
  globalThis.localStorage = new Storage();
});

test("a pick of a slice holds there, a pick of the volume everywhere", () => {
  const work = new Work("a", "key");
  work.setPick("liver", pickProposal(2), 5);
  assert.deepEqual(work.pickOn("liver", 5), pickProposal(2));
  assert.deepEqual(work.pickOn("liver", 6), makePick("consensus"));
  work.setPick("liver", pickProposal(3));
  assert.deepEqual(work.pickOn("liver", 5), pickProposal(3));
});

test("what is accepted stays as it was when the pick changes", () => {
  const work = new Work("a", "key");
  work.setPick("liver", pickProposal(2), 5);
  work.acceptSlice(5, ["liver"]);
  work.setPick("liver", pickProposal(1), 5);
  assert.deepEqual(work.acceptedPick("liver", 5), pickProposal(2));
  assert.deepEqual(work.toDecisions(7), { proposals: "key", volume: {}, slices: { 5: { liver: pickProposal(2) } }, base: 7, seconds: 0 });
});

test("an accepted volume keeps the picks of single slices", () => {
  const work = new Work("a", "key");
  work.setPick("liver", makePick("union"));
  work.setPick("liver", pickProposal(2), 5);
  work.acceptVolume(["liver", "spleen"]);
  const { volume, slices } = work.toDecisions(0);
  assert.deepEqual(volume, { liver: makePick("union"), spleen: makePick("consensus") });
  assert.deepEqual(slices, { 5: { liver: pickProposal(2), spleen: makePick("consensus") } });
});

test("undo goes back step by step and says what", () => {
  const work = new Work("a", "key");
  work.setPick("liver", pickProposal(2), 5);
  work.acceptSlice(5, ["liver"]);
  assert.equal(work.undo().what, "slice 5 accepted");
  assert.equal(work.hasDecisions, false);
  assert.deepEqual(work.undo(), { what: "pick for liver on slice 5", z: 5, state: { picks: {}, slicePicks: {}, volume: {}, slices: {} } });
  assert.equal(work.undo(), null);
});

test("decisions survive a closed tab, and are gone when they are sent", () => {
  const work = new Work("a", "key");
  work.acceptSlice(5, ["liver"]);
  work.addSeconds(3.26);
  const kept = loadWork("a");
  assert.deepEqual(kept.work.toDecisions(1), work.toDecisions(1));
  assert.equal(kept.work.toDecisions(1).seconds, 3.3);
  assert.deepEqual(listUnsent(), ["a"]);
  forgetWork("a");
  assert.deepEqual([loadWork("a"), listUnsent()], [null, []]);
});

test("what another version of the page kept and cannot be read is left alone", () => {
  localStorage.setItem("progidiff.review.a", "{");
  localStorage.setItem("progidiff.review.b", '{"proposals": 3}');
  assert.deepEqual([loadWork("a"), loadWork("b"), listUnsent()], [null, null, []]);
});

test("a browser without storage works all the same", () => {
  delete globalThis.localStorage;
  const work = new Work("a", "key");
  work.acceptSlice(5, ["liver"]);
  assert.equal(work.hasDecisions, true);
  assert.deepEqual([loadWork("a"), listUnsent()], [null, []]);
});
