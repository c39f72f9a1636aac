// What the page would draw for decisions, for pytest to compare with the server's label.
// Wants on its input [{structures, best: {structure: index}, steps: [[method of Work, ...arguments]], slices: {z: packed masks, base64}}];
// gives [{decisions, drawn: {z: {structure: {box, mask: base64}}}}].

import { text } from 'node:stream/consumers';

import { unpackMasks } from '../../apps/progidiff/web/review/masks.js';
import { drawPick, mergeBy, shiftThreshold, toggleMember } from '../../apps/progidiff/web/review/picks.js';
import { Work } from '../../apps/progidiff/web/review/work.js';

const CHANGES = { mergeBy, toggleMember, shiftThreshold };

/** What a person did, as the controllers do it. */
function act(work, [what, ...given], count) {
  if (what in CHANGES) {
    const [structure, z, argument] = given;
    work.setPick(structure, CHANGES[what](work.pickOn(structure, z), argument, count), z);
  } else {
    work[what](...given);
  }
}

function decide({ structures, best, steps, slices }) {
  const work = new Work('image', 'key');
  const unpacked = Object.entries(slices).map(([z, packed]) => [Number(z), unpackMasks(Uint8Array.from(Buffer.from(packed, 'base64')).buffer)]);
  const count = unpacked[0][1][0].masks.length;
  for (const step of steps) act(work, step, count);
  const drawn = {};
  for (const [z, entries] of unpacked) {
    drawn[z] = {};
    for (const [index, name] of structures.entries()) {
      const pick = work.acceptedPick(name, z);
      const { box, masks } = entries[index];
      if (pick) drawn[z][name] = { box, mask: box ? Buffer.from(drawPick(masks, pick, best[name])).toString('base64') : '' };
    }
  }
  return { decisions: work.toDecisions(0), drawn };
}

const cases = JSON.parse(await text(process.stdin));
process.stdout.write(JSON.stringify(cases.map(decide)));
