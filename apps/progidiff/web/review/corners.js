// The words in the corners of the large picture, and the numbers of the structure beside it.

import { ONLY_FIRST, ONLY_SECOND, cssColor, heatColor } from "./colors.js";
import { element, find } from "./dom.js";
import { computeDice, countPixels } from "./masks.js";
import { describePick, drawPick } from "./picks.js";
import { nameSlice } from "./slices.js";
import { comparedPick, countProposals, describeLook, look, state } from "./state.js";

/** @typedef {import("./session.js").ImageSession} ImageSession */

/** @param {ImageSession} session */
export function renderCorners(session) {
  const { z } = state;
  const value = session.disagreement(state.structure ? [state.structure] : [])[z];
  find("corner-slice").replaceChildren(
    element("b", {}, session.picture ? `${session.width} × ${session.height}` : `slice ${nameSlice(z)}`),
    `${session.picture ? "" : ` of ${session.depth}`}${value === undefined ? "" : `\ndisagreement ${value.toFixed(2)}`}${session.job ? "\nproposals are being made" : ""}`,
  );
  find("corner-window").textContent = describeWindow();
  find("corner-mark").replaceChildren(...renderMarks(session));
  find("corner-mode").replaceChildren(...renderLegend(session));
}

function describeWindow() {
  const [low, high] = state.window;
  const digits = high - low < 10 ? 2 : 0;
  const zoom = state.zoom === 1 ? "" : `\n× ${state.zoom.toFixed(1)}`;
  if (state.session?.picture && state.preset !== "custom") return `${state.preset}${zoom}`;
  return `${state.preset}\nW ${(high - low).toFixed(digits)}  L ${((high + low) / 2).toFixed(digits)}${zoom}`;
}

/** @param {ImageSession} session */
function renderMarks(session) {
  const { work, z } = state;
  const marks = [];
  const { structure } = state;
  if (state.drawing?.isUnsent(structure, z)) marks.push(element("span", { className: "mark-decided" }, `✎ ${structure} drawn, not sent\n`));
  else if (work?.acceptedPick(structure, z)) marks.push(element("span", { className: "mark-decided" }, `✓ ${structure} ${describeAccepted(work, z)}, not sent\n`));
  if (session.isSaved(structure, z)) marks.push(element("span", { className: "mark-saved" }, `● ${structure} saved`));
  return marks;
}

/**
 * What was accepted here, where that is not what is shown.
 * @param {import("./work.js").Work} work
 * @param {number} z
 */
function describeAccepted(work, z) {
  const accepted = work.acceptedPick(state.structure, z);
  const count = countProposals();
  const words = accepted && describePick(accepted, count);
  return words && words !== describePick(work.pickOn(state.structure, z), count) ? `accepted as ${words}` : "accepted";
}

/** @param {import("./colors.js").Color} color */
function swatch(color) {
  const box = element("i");
  box.style.background = cssColor(color);
  return box;
}

/**
 * @param {ImageSession} session
 * @returns {(string|Node)[]}
 */
function renderLegend(session) {
  if (state.isHidden) return ["overlay hidden"];
  const found = look(state.structure);
  if (!found) return [];
  const count = countProposals();
  if (state.mode === "agreement" && count) {
    const steps = Array.from({ length: count }, (_, k) => element("span", {}, swatch(heatColor(k / Math.max(1, count - 1))), String(k + 1)));
    return [element("span", { className: "legend" }, `drawn by … of ${count} (not a probability)`, ...steps)];
  }
  if (state.mode === "difference" && count) {
    const other = comparedPick(found);
    const dice = found.box ? computeDice(found.mask, drawPick(found.masks, other, found.best)) : 1;
    return [
      element(
        "span",
        { className: "legend" },
        element("span", {}, swatch(ONLY_FIRST), `only ${describeLook(found)}`),
        element("span", {}, swatch(ONLY_SECOND), `only ${describePick(other, count)}`),
        `Dice ${dice.toFixed(3)}`,
      ),
    ];
  }
  return [`${state.structure}: ${describeLook(found)}`];
}

/** @param {ImageSession} session */
export function renderFacts(session) {
  const facts = find("facts");
  const found = look(state.structure);
  if (!found) {
    const begin = session.picture ? "Press Propose, or draw." : "Type what to find and press Propose.";
    facts.textContent = session.result ? "" : begin;
    return;
  }
  const [dy, dx] = session.spacing;
  const pixels = countPixels(found.mask);
  const numbers = session.result?.summary?.structures[state.structure];
  const volume = numbers
    ? `\nvolume ${numbers.consensus_ml.toFixed(0)} ml by consensus, ${Math.min(...numbers.proposals_ml).toFixed(0)} to ${Math.max(...numbers.proposals_ml).toFixed(0)} ml by proposal`
    : "";
  facts.dataset.pixels = String(pixels);
  if (session.picture) {
    const drawn = found.masks.map(countPixels);
    const range = drawn.length ? `\n${Math.min(...drawn)} to ${Math.max(...drawn)} pixels by proposal` : "";
    facts.textContent = `${pixels} pixels, ${((100 * pixels) / (session.width * session.height)).toFixed(1)} % of the picture${range}`;
    return;
  }
  facts.textContent = `this slice ${((pixels * dy * dx) / 100).toFixed(1)} cm²${volume}`;
}
