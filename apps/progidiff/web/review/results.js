// Several results of one image together: what one prompt found, and what later ones added.

/** @typedef {import("../answers.d.ts").Summary} Summary */
/**
 * A kept result by its key, or what a job has so far; `summary` is null while it is not known.
 * @typedef {{key: string, job: string, structures: string[], numProposals: number, summary: Summary|null}} Part
 */
/**
 * What is shown of an image. A structure that several results draw belongs to one of them, its owner.
 * @typedef {{parts: readonly Part[], structures: string[], owners: Record<string, Part>, summary: {structures: Summary["structures"]}|null}} Result
 */

/**
 * Put results together, in the order in which they were asked for.
 * @param {readonly Part[]} parts
 * @param {Readonly<Record<string, string>>} bound structure -> key of the result that decisions on it speak about; others go by the newest
 * @returns {Result|null} null if there is none
 */
export function combineParts(parts, bound) {
  if (!parts.length) return null;
  const structures = [...new Set(parts.flatMap((part) => part.structures))];
  /** @type {Record<string, Part>} */
  const owners = {};
  for (const name of structures) {
    const holders = parts.filter((part) => part.structures.includes(name));
    owners[name] = holders.find(({ key }) => key && key === bound[name]) ?? holders[holders.length - 1];
  }
  const known = structures.filter((name) => owners[name].summary);
  const numbers = Object.fromEntries(known.map((name) => [name, /** @type {Summary} */ (owners[name].summary).structures[name]]));
  return { parts, structures, owners, summary: known.length ? { structures: numbers } : null };
}

/**
 * The masks of several results in the order of the structures they show.
 * @template M
 * @param {Result} result
 * @param {readonly (readonly M[]|null)[]} masks of every part, by its own structures; null where it has none yet
 * @returns {(M|null)[]}
 */
export function orderMasks(result, masks) {
  return result.structures.map((name) => {
    const owner = result.owners[name];
    return masks[result.parts.indexOf(owner)]?.[owner.structures.indexOf(name)] ?? null;
  });
}
