// What is said of a picture's sentence and of the model that reads it. Nothing here draws or asks the server.

/** @typedef {import("../answers.d.ts").Head} Head */
/** @typedef {{text: string, former: string}} Typed a sentence that is not saved, and the saved one that it was typed over */

const MOST_NAMED = 12;

/** A sentence as the server keeps it. @param {string} text */
export const tidy = (text) => text.trim().replace(/\s+/g, " ");

/**
 * What the field completes: the sentences that a model was taught, and what it draws if it reads any.
 * @param {Head|null} head
 */
export const listWords = (head) => [...new Set([...(head?.phrases ?? []), ...(head?.reads_text ? head.classes : [])])];

/**
 * @param {import("../answers.d.ts").Sentence} sentence
 * @param {Typed|null} typed
 */
export function describeSentence({ sentence, problem }, typed) {
  if (problem) return `${problem} Until then the sentence can be asked with, not saved.`;
  if (typed) return typed.text ? "Not saved yet: Submit saves it with the label." : "The field is empty: proposals are made without a sentence.";
  return sentence ? "Saved in text.csv." : "This picture has no sentence yet.";
}

/**
 * @param {Pick<import("../answers.d.ts").PictureInfo, "problem"|"is_coloured">} picture
 * @param {Head|null} head
 */
export function describeHead({ problem, is_coloured: isColoured }, head) {
  if (!head) return problem;
  const parts = [];
  if (!head.reads_text) parts.push(`${head.version} reads no sentence; it draws ${head.classes.join(", ")} whatever is written.`);
  else if (head.phrases.length) parts.push(`${head.version} knows: ${head.phrases.slice(0, MOST_NAMED).join(", ")}${head.phrases.length > MOST_NAMED ? " …" : ""}.`);
  if (head.gray === isColoured) parts.push(`${head.version} learned from ${head.gray ? "grey pictures" : "pictures in colour"}.`);
  return parts.join(" ");
}
