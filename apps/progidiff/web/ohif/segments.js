// The segments of the panel's mask: one per structure by its label id, those that the folder brings, and the bands of disagreement.

/** @typedef {import('./labelmap.js').Segment} Segment */

/** Label of the first band of disagreement; structures have lower ones. */
export const FIRST_BAND = 201;

/** @type {readonly Segment[]} */
const HEAT = [
  { index: FIRST_BAND, label: 'disagreement up to 25 %', color: [255, 237, 160] },
  { index: 202, label: 'disagreement 25 to 50 %', color: [254, 178, 76] },
  { index: 203, label: 'disagreement 50 to 75 %', color: [240, 59, 32] },
  { index: 204, label: 'disagreement over 75 %', color: [189, 0, 38] },
];

/**
 * @param {string} color "#rrggbb"
 * @returns {Segment['color']}
 */
function parseColor(color) {
  /** @param {number} start */
  const read = (start) => parseInt(color.slice(start, start + 2), 16);
  return [read(1), read(3), read(5)];
}

/**
 * @param {readonly import('../answers.d.ts').Prompt[]} prompts
 * @param {readonly Pick<import('../answers.d.ts').FolderStructure, 'name'|'label_id'|'color'>[]} structures of the folder
 * @returns {Segment[]}
 */
export function listSegments(prompts, structures = []) {
  const named = prompts.map(({ structure, label, color }) => ({ index: label, label: structure, color: parseColor(color) }));
  const all = structures.flatMap(({ name, label_id: id, color }) => (id === null || id >= FIRST_BAND ? [] : [{ index: id, label: name, color: parseColor(color) }]));
  const own = all.filter(({ index, label }) => !named.some((segment) => segment.index === index || segment.label === label));
  return [...named, ...own, ...HEAT];
}
