import assert from "node:assert/strict";
import test from "node:test";

import { Store } from "../../apps/progidiff/web/review/store.js";

const settle = () => new Promise((resolve) => setTimeout(resolve));

function watchAll(store, groups) {
  const calls = [];
  for (const keys of groups) store.watch(keys, () => calls.push(keys.join("+")));
  return calls;
}

test("who watches is called once after all changes of one go, and reads the last ones", async () => {
  const store = new Store({ z: 0, zoom: 1 });
  const seen = [];
  store.watch(["z", "zoom"], () => seen.push([store.values.z, store.values.zoom]));
  store.set({ z: 1 });
  store.set({ z: 2, zoom: 3 });
  assert.deepEqual(seen, []);
  await settle();
  assert.deepEqual(seen, [[2, 3]]);
});

test("only who watches what changed is called, and nobody when nothing did", async () => {
  const store = new Store({ z: 0, zoom: 1 });
  const calls = watchAll(store, [["z"], ["zoom"]]);
  store.set({ z: 0, zoom: 2 });
  await settle();
  assert.deepEqual(calls, ["zoom"]);
});

test("a change inside of a value is told by its name", async () => {
  const store = new Store({ work: { picks: 0 } });
  const calls = watchAll(store, [["work"], ["picks"]]);
  store.values.work.picks = 1;
  store.touch("picks");
  await settle();
  assert.deepEqual(calls, ["picks"]);
});

test("what a watcher changes is told in another round", async () => {
  const store = new Store({ z: 0, mode: "" });
  const calls = watchAll(store, [["mode"]]);
  store.watch(["z"], () => store.set({ mode: "pick" }));
  store.set({ z: 1 });
  await settle();
  assert.deepEqual(calls, ["mode"]);
});
