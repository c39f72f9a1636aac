// The surface of a mask of voxels as triangles (surface nets: Gibson, "Constrained Elastic Surface Nets", 1998): one corner in every cell
// that the surface runs through, where the crossings of its edges lie on average.

/** @typedef {{depth: number, height: number, width: number}} Size */
/** @typedef {{positions: Float32Array, normals: Float32Array, indices: Uint32Array}} Surface positions in mm as (x, y, z) */

/**
 * Blur a mask a little, so that its surface has no steps: the mean of each voxel and its six neighbours, twice; 0 outside.
 * @param {Uint8Array} mask
 * @param {Size} size
 * @returns {Float32Array}
 */
export function soften(mask, { depth, height, width }) {
  let values = Float32Array.from(mask);
  const layer = height * width;
  for (let round = 0; round < 2; round += 1) {
    const next = new Float32Array(values.length);
    for (let z = 0, i = 0; z < depth; z += 1) {
      for (let y = 0; y < height; y += 1) {
        for (let x = 0; x < width; x += 1, i += 1) {
          let sum = 2 * values[i];
          if (x > 0) sum += values[i - 1];
          if (x < width - 1) sum += values[i + 1];
          if (y > 0) sum += values[i - width];
          if (y < height - 1) sum += values[i + width];
          if (z > 0) sum += values[i - layer];
          if (z < depth - 1) sum += values[i + layer];
          next[i] = sum / 8;
        }
      }
    }
    values = next;
  }
  return values;
}

/**
 * A box of voxels of a mask with one voxel of nothing around; null if nothing is drawn in it.
 * @param {Uint8Array} mask
 * @param {Size} size
 * @param {number} from first slice
 * @param {number} to one after the last
 * @returns {{mask: Uint8Array, size: Size, origin: [z: number, y: number, x: number]}|null}
 */
export function cropSlab(mask, { depth, height, width }, from, to) {
  let [z0, z1, y0, y1, x0, x1] = [depth, -1, height, -1, width, -1];
  for (let z = Math.max(0, from); z < Math.min(depth, to); z += 1) {
    for (let y = 0; y < height; y += 1) {
      for (let x = 0, i = (z * height + y) * width; x < width; x += 1, i += 1) {
        if (!mask[i]) continue;
        z0 = Math.min(z0, z);
        z1 = z;
        y0 = Math.min(y0, y);
        y1 = Math.max(y1, y);
        x0 = Math.min(x0, x);
        x1 = Math.max(x1, x);
      }
    }
  }
  if (z1 < 0) return null;
  const size = { depth: z1 - z0 + 3, height: y1 - y0 + 3, width: x1 - x0 + 3 };
  const part = new Uint8Array(size.depth * size.height * size.width);
  for (let z = z0; z <= z1; z += 1) {
    for (let y = y0; y <= y1; y += 1) {
      const start = (z * height + y) * width + x0;
      part.set(mask.subarray(start, start + x1 - x0 + 1), ((z - z0 + 1) * size.height + y - y0 + 1) * size.width + 1);
    }
  }
  return { mask: part, size, origin: [z0 - 1, y0 - 1, x0 - 1] };
}

/**
 * Where values pass one half.
 * @param {Float32Array} values
 * @param {Size} size
 * @param {readonly [dz: number, dy: number, dx: number]} spacing mm
 * @returns {Surface} triangles run against the clock as seen from outside; the first voxel lies at (0, 0, 0)
 */
export function findSurface(values, { depth, height, width }, [dz, dy, dx]) {
  const layer = height * width;
  const corners = new Int32Array(values.length).fill(-1);
  /** @type {number[]} */
  const positions = [];
  /** @type {number[]} */
  const indices = [];
  const offsets = [0, 1, width, width + 1, layer, layer + 1, layer + width, layer + width + 1];
  /** Pairs of the corners of a cell that an edge joins. */
  const edges = [0, 1, 2].flatMap((axis) => [0, 1, 2, 3, 4, 5, 6, 7].filter((corner) => !(corner & (1 << axis))).map((corner) => [corner, corner | (1 << axis)]));
  for (let z = 0; z < depth - 1; z += 1) {
    for (let y = 0; y < height - 1; y += 1) {
      for (let x = 0; x < width - 1; x += 1) {
        const i = z * layer + y * width + x;
        let inside = 0;
        for (let corner = 0; corner < 8; corner += 1) if (values[i + offsets[corner]] > 0.5) inside += 1;
        if (inside === 0 || inside === 8) continue;
        let [count, sx, sy, sz] = [0, 0, 0, 0];
        for (const [one, other] of edges) {
          const [a, b] = [values[i + offsets[one]], values[i + offsets[other]]];
          if (a > 0.5 === b > 0.5) continue;
          const share = (0.5 - a) / (b - a);
          count += 1;
          sx += (one & 1) + share * ((other & 1) - (one & 1));
          sy += ((one >> 1) & 1) + share * (((other >> 1) & 1) - ((one >> 1) & 1));
          sz += ((one >> 2) & 1) + share * (((other >> 2) & 1) - ((one >> 2) & 1));
        }
        corners[i] = positions.length / 3;
        positions.push((x + sx / count) * dx, (y + sy / count) * dy, (z + sz / count) * dz);
      }
    }
  }
  // Around each edge of the grid that the surface crosses lie four cells: two triangles.
  const steps = [1, width, layer];
  for (let z = 1; z < depth - 1; z += 1) {
    for (let y = 1; y < height - 1; y += 1) {
      for (let x = 1; x < width - 1; x += 1) {
        const i = z * layer + y * width + x;
        for (let axis = 0; axis < 3; axis += 1) {
          const isIn = values[i] > 0.5;
          if (isIn === values[i + steps[axis]] > 0.5) continue;
          const [u, v] = [steps[(axis + 1) % 3], steps[(axis + 2) % 3]];
          const [a, b, c, d] = [corners[i], corners[i - u], corners[i - u - v], corners[i - v]];
          if (isIn) indices.push(a, b, c, a, c, d);
          else indices.push(a, c, b, a, d, c);
        }
      }
    }
  }
  const points = Float32Array.from(positions);
  return { positions: points, normals: findNormals(points, indices), indices: Uint32Array.from(indices) };
}

/**
 * The mean direction of the triangles around each corner, larger ones counting more.
 * @param {Float32Array} positions
 * @param {readonly number[]} indices
 */
function findNormals(positions, indices) {
  const normals = new Float32Array(positions.length);
  for (let t = 0; t < indices.length; t += 3) {
    const [a, b, c] = [3 * indices[t], 3 * indices[t + 1], 3 * indices[t + 2]];
    const [ux, uy, uz] = [0, 1, 2].map((axis) => positions[b + axis] - positions[a + axis]);
    const [vx, vy, vz] = [0, 1, 2].map((axis) => positions[c + axis] - positions[a + axis]);
    const normal = [uy * vz - uz * vy, uz * vx - ux * vz, ux * vy - uy * vx];
    for (const corner of [a, b, c]) for (let axis = 0; axis < 3; axis += 1) normals[corner + axis] += normal[axis];
  }
  for (let i = 0; i < normals.length; i += 3) {
    const length = Math.hypot(normals[i], normals[i + 1], normals[i + 2]) || 1;
    for (let axis = 0; axis < 3; axis += 1) normals[i + axis] /= length;
  }
  return normals;
}
