// A label as an NRRD file, gzip inside.

/**
 * @param {Uint8Array} voxels X fastest, then Y, then Z.
 * @param {{shape: number[], origin: number[], directions: number[][]}} grid shape (Z, Y, X); origin and steps along x, y, z in LPS mm.
 * @returns {Promise<Blob>}
 */
export async function encodeNrrd(voxels, { shape, origin, directions }) {
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
