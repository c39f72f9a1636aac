import assert from "node:assert/strict";
import test from "node:test";

import { KEYS, presetsFor, readKey } from "../../apps/progidiff/web/review/keys.js";

const press = (key, more = {}) => readKey({ key, code: "", shiftKey: false, ctrlKey: false, altKey: false, metaKey: false, ...more });

test("every key of the legend does what its row says", () => {
  for (const { keys, action } of KEYS) {
    for (const name of keys) {
      const parts = name.split(" ");
      assert.deepEqual(press(parts.at(-1), { shiftKey: parts.includes("Shift"), ctrlKey: parts.includes("Ctrl") }), { action }, name);
    }
  }
});

test("numbers pick, with Shift they compare, whatever the layout prints on them", () => {
  assert.deepEqual(press("3", { code: "Digit3" }), { proposal: 3 });
  assert.deepEqual(press("&", { code: "Digit1" }), { proposal: 1 });
  assert.deepEqual(press("#", { code: "Digit3", shiftKey: true }), { compared: 3 });
  assert.deepEqual(press("0", { code: "Digit0" }), { action: "absent" });
});

test("a shortcut of the browser is left to it", () => {
  assert.equal(press("c", { ctrlKey: true }), null);
  assert.equal(press("c", { altKey: true }), null);
  assert.equal(press("c", { metaKey: true }), null);
  assert.equal(press("C", { shiftKey: true }), null);
  assert.equal(press("3", { code: "Digit3", ctrlKey: true }), null);
});

test("Enter accepts the slice, with Shift the volume, with Ctrl it submits", () => {
  assert.deepEqual(press("Enter"), { action: "acceptSlice" });
  assert.deepEqual(press("Enter", { shiftKey: true }), { action: "acceptVolume" });
  assert.deepEqual(press("Enter", { ctrlKey: true }), { action: "submit" });
});

test("plus and question mark count with and without Shift", () => {
  for (const shiftKey of [false, true]) {
    assert.deepEqual(press("+", { shiftKey }), { action: "zoomIn" });
    assert.deepEqual(press("?", { shiftKey }), { action: "help" });
  }
});

test("a CT begins with soft tissue, another image with its own window; both end with the full range", () => {
  const info = { range: [0, 900], window: [10, 500] };
  assert.equal(presetsFor({ ...info, modality: "CT" })[0].name, "soft tissue");
  assert.deepEqual(presetsFor({ ...info, modality: "MR" })[0].window, [10, 500]);
  assert.deepEqual(presetsFor({ ...info, modality: "MR" }).at(-1).window, [0, 900]);
});
