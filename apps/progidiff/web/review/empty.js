// What stands where no image is open: there are none, they are being scored, all are done, or one is to be chosen.

import { element, find } from "./dom.js";
import { state } from "./state.js";

/** @typedef {import("../answers.d.ts").Worklist} Worklist */
/** @typedef {Pick<import("../answers.d.ts").Scoring, "state"|"images"|"scored"|"image">} Scored */

/**
 * What to say, line by line; the first is the heading.
 * @param {Worklist|null} worklist
 * @param {Scored|null} scoring
 * @returns {string[]}
 */
export function describeEmpty(worklist, scoring) {
  if (!worklist) return ["Asking the server which images there are …"];
  const { images, counts, folder, formats } = worklist;
  if (!images) {
    return ["No images yet", `They lie in ${folder || "the folder of studies"} as ${formats.join(", ")}.`, "Drop files here, or a folder or zip file with a DICOM series; or put files into that folder."];
  }
  if (counts.done === images) return [images === 1 ? "The image is done" : `All ${images} images are done`, "Add more, train the model on them, or open one under Done to look at it again."];
  const lines = ["Choose an image", `${counts.todo} to do, ${counts.started} started, ${counts.done} done. N opens the next one.`];
  if (scoring && scoring.scored < scoring.images && scoring.state !== "off" && scoring.state !== "done") {
    lines.push(`The model looks through the images: ${scoring.scored} of ${scoring.images} so far${scoring.image ? `, now ${scoring.image}` : ""}. The order gets better as it goes; any image can be opened before.`);
  }
  return lines;
}

export function renderEmpty() {
  const { worklist, session, scoring, leftOut } = state;
  if (session) return;
  const [heading, ...lines] = describeEmpty(worklist, scoring);
  const isEmpty = worklist?.images === 0;
  find("empty-text").replaceChildren(
    element("strong", {}, heading),
    ...lines.map((line) => element("span", {}, line)),
    ...(isEmpty ? leftOut.map(({ name, reason }) => element("span", { className: "muted" }, `${name}: ${reason}`)) : []),
  );
}
