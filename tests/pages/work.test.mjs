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
  assert.equal(work.undo().what, "liver accepted on slice 6");
  assert.equal(work.hasDecisions, false);
  assert.deepEqual(work.undo(), { what: "pick for liver on slice 6", z: 5, state: { picks: {}, slicePicks: {}, volume: {}, slices: {} } });
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

test("structures are accepted one by one, and a later one on the same slice joins the first", () => {
  const work = new Work("a", "key");
  work.acceptSlice(5, ["liver"]);
  work.acceptSlice(5, ["spleen"]);
  work.acceptVolume(["left kidney"]);
  assert.deepEqual(Object.keys(work.toDecisions(0).slices[5]), ["liver", "spleen"]);
  assert.deepEqual(work.acceptedOf("liver"), { volume: null, slices: [5] });
  assert.deepEqual(work.acceptedOf("left kidney"), { volume: makePick("consensus"), slices: [] });
  assert.deepEqual([work.isAccepted("spleen"), work.isAccepted("aorta")], [true, false]);
});

test("structures of two results are sent together, each with the key of its own", () => {
  const work = new Work("a");
  work.bind(["liver"], "first");
  work.bind(["spleen"], "second");
  work.acceptSlice(5, ["liver"]);
  work.acceptVolume(["spleen"]);
  work.addClick("liver");
  work.addSeconds(2, "liver");
  const { parts, effort, ...others } = work.toDecisions(3);
  assert.deepEqual(parts, [
    { proposals: "second", volume: { spleen: makePick("consensus") }, slices: {} },
    { proposals: "first", volume: {}, slices: { 5: { liver: makePick("consensus") } } },
  ]);
  assert.deepEqual(effort, { liver: { seconds: 2, clicks: 1 } });
  assert.deepEqual(others, { base: 3, seconds: 2 });
  assert.deepEqual(loadWork("a").work.toDecisions(3), work.toDecisions(3));
});

test("a newer result takes a structure over with its picks gone, unless something of it is accepted", () => {
  const work = new Work("a");
  work.bind(["liver", "spleen"], "first");
  work.setPick("liver", pickProposal(4), 5);
  work.setPick("spleen", pickProposal(3), 5);
  work.acceptSlice(5, ["spleen"]);
  assert.deepEqual(work.bind(["liver", "spleen"], "second"), ["spleen"]);
  assert.deepEqual([work.keyOf("liver"), work.keyOf("spleen")], ["second", "first"]);
  assert.deepEqual(work.pickOn("liver", 5), makePick("consensus"));
  assert.deepEqual(work.pickOn("spleen", 5), pickProposal(3));
  work.undo();
  work.undo();
  assert.deepEqual(work.pickOn("liver", 5), makePick("consensus"));
});

test("decisions that an older version of the page kept go by its one result", () => {
  localStorage.setItem("progidiff.review.a", '{"image":"a","proposals":"key","seconds":3,"state":{"picks":{},"slicePicks":{},"volume":{},"slices":{"5":{"liver":{"rule":"union","members":[],"threshold":0.5}}}},"time":0}');
  const { work } = loadWork("a");
  assert.deepEqual(work.toDecisions(0), { proposals: "key", volume: {}, slices: { 5: { liver: makePick("union") } }, base: 0, seconds: 3 });
});

test("what is left of the effort after a submission is that of structures that were not decided", () => {
  const work = new Work("a", "key");
  work.addSeconds(2, "liver");
  work.addSeconds(3, "spleen");
  work.acceptSlice(5, ["liver"]);
  assert.deepEqual(work.next().effort, { spleen: { seconds: 3, clicks: 0 } });
});
