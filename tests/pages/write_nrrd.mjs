// A label as the panel in OHIF sends it. Wants {shape, origin, directions, voxels: base64} on its input, gives the file.

import { text } from 'node:stream/consumers';

import { encodeNrrd } from '../../apps/progidiff/web/ohif/nrrd.js';

const { voxels, ...grid } = JSON.parse(await text(process.stdin));
const file = await encodeNrrd(Uint8Array.from(Buffer.from(voxels, 'base64')), grid);
process.stdout.write(Buffer.from(await file.arrayBuffer()));
