import assert from "node:assert/strict";
import test from "node:test";

import { Drawing } from "../../apps/progidiff/web/review/drawing.js";
import { CoarseResult, cutPlane, readOverview, readOverviewMask } from "../../apps/progidiff/web/review/overview.js";
import { cropSlab, findSurface, soften } from "../../apps/progidiff/web/review/surface.js";

const size = { depth: 20, height: 30, width: 40 };
const spacing = [2, 1.5, 1];

/** A ball of 12 mm around voxel (10, 15, 20). */
function makeBall() {
  const mask = new Uint8Array(size.depth * size.height * size.width);
  for (let z = 0, i = 0; z < size.depth; z += 1)
    for (let y = 0; y < size.height; y += 1)
      for (let x = 0; x < size.width; x += 1, i += 1) mask[i] = Math.hypot((z - 10) * 2, (y - 15) * 1.5, x - 20) <= 12 ? 1 : 0;
  return mask;
}

test("the surface of a ball is closed, faces outward, and holds the ball's volume", () => {
  const slab = cropSlab(makeBall(), size, 0, size.depth);
  const { positions, normals, indices } = findSurface(soften(slab.mask, slab.size), slab.size, spacing);
  const middle = [20 - slab.origin[2], (15 - slab.origin[1]) * 1.5, (10 - slab.origin[0]) * 2];
  let volume = 0;
  const edges = new Map();
  for (let t = 0; t < indices.length; t += 3) {
    const [a, b, c] = [0, 1, 2].map((k) => [0, 1, 2].map((axis) => positions[3 * indices[t + k] + axis] - middle[axis]));
    volume += (a[0] * (b[1] * c[2] - b[2] * c[1]) + a[1] * (b[2] * c[0] - b[0] * c[2]) + a[2] * (b[0] * c[1] - b[1] * c[0])) / 6;
    for (const [from, to] of [[0, 1], [1, 2], [2, 0]]) {
      const key = [indices[t + from], indices[t + to]];
      edges.set(key.join(), (edges.get(key.join()) ?? 0) + 1);
      edges.set(key.reverse().join(), (edges.get(key.join()) ?? 0) - 1);
    }
  }
  assert.ok([...edges.values()].every((sum) => sum === 0), "an edge has a triangle on one side only");
  const wanted = (4 / 3) * Math.PI * 12 ** 3;
  assert.ok(Math.abs(volume / wanted - 1) < 0.08, `${volume} is not ${wanted}`);
  for (let i = 0; i < positions.length; i += 3) {
    const out = [0, 1, 2].reduce((sum, axis) => sum + normals[i + axis] * (positions[i + axis] - middle[axis]), 0);
    assert.ok(out > 0);
  }
});

test("a slab holds its slices only, and an empty one is none", () => {
  const slab = cropSlab(makeBall(), size, 9, 12);
  assert.deepEqual([slab.size.depth, slab.origin[0]], [5, 8]);
  assert.equal(cropSlab(makeBall(), size, 0, 3), null);
});

test("the overview and a mask on it are read as the server packs them", () => {
  const header = Uint16Array.of(2, 1, 3, 1, 4, 4);
  const pixels = Int16Array.of(-5, 0, 7, 1, 2, 3);
  const bytes = new Uint8Array(12 + 12);
  bytes.set(new Uint8Array(header.buffer));
  bytes.set(new Uint8Array(pixels.buffer), 12);
  const overview = readOverview(bytes.buffer);
  assert.deepEqual([overview.depth, overview.height, overview.width, overview.steps, [...overview.pixels]], [2, 1, 3, [1, 4, 4], [...pixels]]);
  const packed = new Uint8Array(13);
  packed.set(new Uint8Array(header.buffer));
  packed[12] = 0b100101;
  assert.deepEqual([...readOverviewMask(packed.buffer)], [1, 0, 1, 0, 0, 1]);
  assert.deepEqual([...cutPlane(overview.pixels, overview, "coronal", 0).values], [1, 2, 3, -5, 0, 7]);
  assert.deepEqual([...cutPlane(overview.pixels, overview, "sagittal", 2).values], [3, 7]);
});

test("what is drawn takes the place of the consensus on its slice, and gives it back", () => {
  const raster = { depth: 3, height: 2, width: 2, steps: [1, 2, 2] };
  const result = new CoarseResult(raster, Uint8Array.from([1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]));
  const drawing = new Drawing("a", { height: 4, width: 4 });
  drawing.commit("all", 1, [{ structure: "liver", z: 1, mask: new Uint8Array(16).fill(1) }]);
  result.update(drawing, "liver");
  assert.deepEqual([...result.mask], [1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0]);
  const { version } = result;
  result.update(drawing, "liver");
  assert.equal(result.version, version);
  drawing.undo();
  result.update(drawing, "liver");
  assert.deepEqual([...result.mask.subarray(4, 8)], [1, 0, 0, 0]);
});
