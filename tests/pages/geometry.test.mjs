import assert from "node:assert/strict";
import test from "node:test";

import * as geometry from "../../apps/progidiff/web/review/geometry.js";

const PLANE = { height: 100, width: 200, spacing: [2, 0.5] };
const near = (value, expected) => assert.ok(Math.abs(value - expected) < 1e-9, `${value} is not ${expected}`);

test("a whole slice is in the middle, as large as fits, in true proportions", () => {
  // 200 mm high and 100 mm wide on 400 x 400 pixels: 2 pixels a mm.
  const place = geometry.fitFrame(geometry.wholeSlice(PLANE), PLANE.spacing, 400, 400);
  assert.deepEqual(place, { scaleX: 1, scaleY: 4, left: 100, top: 0 });
});

test("the pixel under the pointer is found again", () => {
  const place = geometry.fitFrame(geometry.frameZoomed(PLANE, 3, [40, 70], 1.5), PLANE.spacing, 600, 400);
  const [y, x] = geometry.locate(place, 17 * place.scaleX + place.left, 33 * place.scaleY + place.top);
  near(x, 17);
  near(y, 33);
});

test("zoom 1 is the whole slice, zoom 2 half of it around the centre, as wide as the canvas", () => {
  assert.deepEqual(geometry.frameZoomed(PLANE, 1, [1, 1], 1), geometry.wholeSlice(PLANE));
  const frame = geometry.frameZoomed(PLANE, 2, null, 1);
  near(frame.height * 2, 100);
  near(frame.width * 0.5, 100);
  near(frame.x + frame.width / 2, 100);
  near(frame.y + frame.height / 2, 50);
});

test("a frame around a small box has 40 mm and the proportions of the canvas", () => {
  const frame = geometry.frameAround({ y0: 50, y1: 52, x0: 90, x1: 94 }, PLANE.spacing, 84 / 72);
  near(frame.width * 0.5, 40);
  near((frame.width * 0.5) / (frame.height * 2), 84 / 72);
  near(frame.x + frame.width / 2, 92);
  near(frame.y + frame.height / 2, 51);
});

test("a frame holds its box with a margin, whatever the proportions", () => {
  for (const box of [{ y0: 0, y1: 90, x0: 10, x1: 20 }, { y0: 40, y1: 42, x0: 0, x1: 200 }]) {
    const frame = geometry.frameAround(box, PLANE.spacing, 84 / 72);
    assert.ok(frame.x < box.x0 && frame.y < box.y0 && frame.x + frame.width > box.x1 && frame.y + frame.height > box.y1);
    near((frame.width * 0.5) / (frame.height * 2), 84 / 72);
  }
});

test("zooming keeps the point under the pointer where it is", () => {
  const [point, center] = [[20, 150], [50, 100]];
  const place = (zoom, middle) => geometry.fitFrame(geometry.frameZoomed(PLANE, zoom, middle, 1), PLANE.spacing, 400, 400);
  const before = place(2, center);
  const after = place(4, geometry.keepPoint(point, center, 2, 4));
  near(point[1] * after.scaleX + after.left, point[1] * before.scaleX + before.left);
  near(point[0] * after.scaleY + after.top, point[0] * before.scaleY + before.top);
});

test("a structure fills most of the picture, and no zoom goes beyond its bounds", () => {
  assert.deepEqual(geometry.zoomTo({ y0: 20, y1: 40, x0: 50, x1: 120 }, PLANE), { zoom: 2, center: [30, 85] });
  assert.equal(geometry.zoomTo({ y0: 0, y1: 1, x0: 0, x1: 1 }, PLANE).zoom, geometry.MAX_ZOOM);
  assert.equal(geometry.limitZoom(0.2), 1);
});

test("a drag sideways widens the window, a drag down raises it", () => {
  assert.deepEqual(geometry.dragWindow([0, 100], 0, 0), [0, 100]);
  assert.deepEqual(geometry.dragWindow([0, 100], 0, 500), [100, 200]);
  const [low, high] = geometry.dragWindow([0, 100], 300, 0);
  near(high - low, 100 * Math.E);
  near(high + low, 100);
});
