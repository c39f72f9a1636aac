// A label as an NRRD file, gzip inside.

/** @typedef {{shape: [number, number, number], origin: number[], directions: number[][]}} Grid shape (Z, Y, X); origin and steps along x, y, z in LPS mm */

/**
 * @param {Uint8Array<ArrayBuffer>} voxels X fastest, then Y, then Z.
 * @param {Grid} grid
 * @returns {Promise<Blob>}
 */
export async function encodeNrrd(voxels, { shape, origin, directions }) {
  /** @param {number[]} values */
  const vector = (values) => `(${values.join(',')})`;
  const header = [
    'NRRD0004',
    'type: uint8',
    'dimension: 3',
    'space: left-posterior-superior',
    `sizes: ${[...shape].reverse().join(' ')}`,
    `space directions: ${directions.map(vector).join(' ')}`,
    'kinds: domain domain domain',
    'encoding: gzip',
    `space origin: ${vector(origin)}`,
    '\n',
  ].join('\n');
  const packed = new Response(new Blob([voxels]).stream().pipeThrough(new CompressionStream('gzip')));
  return new Blob([header, await packed.arrayBuffer()], { type: 'application/octet-stream' });
}
