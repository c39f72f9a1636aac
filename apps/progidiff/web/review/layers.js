// What lies over the slice in the large picture, by mode.

import { agreementLayer, differenceLayer, maskLayer } from "./draw.js";
import { drawPick } from "./picks.js";
import { colorOf, comparedPick, look, shown, state } from "./state.js";

/** @typedef {import("./draw.js").Layer} Layer */

const SAVED_COLOR = "#6ea8ff";

/** @returns {Layer[]} from the bottom */
export function buildLayers() {
  const { session } = state;
  const layers = state.isSavedShown ? savedLayers() : [];
  if (!session?.result || !state.work) return layers;
  const active = look(state.structure);
  if (state.mode === "agreement" && active?.box) return [...layers, agreementLayer(active.masks, active.box)];
  if (state.mode === "difference" && active?.box) {
    return [...layers, differenceLayer(active.mask, drawPick(active.masks, comparedPick(active), active.best), active.box)];
  }
  for (const name of session.result.structures) {
    const found = look(name);
    const isActive = name === state.structure;
    if (!found?.box || !(isActive || state.included.has(name))) continue;
    layers.push(maskLayer(found.mask, found.box, colorOf(name), isActive ? { fill: 0.24, width: 2 } : { fill: 0.1, width: 1.25 }));
  }
  return layers;
}

/** @returns {Layer[]} the label in force, structure by structure */
function savedLayers() {
  const { session } = state;
  const { label } = shown;
  if (!session || !label || shown.labelOf !== session.info) return [];
  const box = { y0: 0, y1: session.height, x0: 0, x1: session.width };
  return Object.values(session.info.label_ids).flatMap((value) => {
    const mask = label.map((id) => (id === value ? 1 : 0));
    return mask.includes(1) ? [maskLayer(mask, box, SAVED_COLOR, { fill: 0, width: 1.5, dash: [6, 4] })] : [];
  });
}
