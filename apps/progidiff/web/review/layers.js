// What lies over the slice in the large picture, by mode.

import { agreementLayer, differenceLayer, maskLayer } from "./draw.js";
import { drawPick } from "./picks.js";
import { readingLayers } from "./readings.js";
import { colorOf, comparedPick, listStructures, look, shown, state } from "./state.js";

/** @typedef {import("./draw.js").Layer} Layer */

const SAVED_COLOR = "#6ea8ff";
/** Structures beside the active one are drawn with this part of its opacity. */
const OTHERS = 0.42;

/** @returns {Layer[]} from the bottom */
export function buildLayers() {
  const { session } = state;
  const layers = [...(state.isSavedShown ? savedLayers() : []), ...readingLayers()];
  if (!session) return layers;
  const active = look(state.structure);
  if (state.mode === "agreement" && active?.box && active.masks.length) return [...layers, agreementLayer(active.masks, active.box)];
  if (state.mode === "difference" && active?.box && active.masks.length) {
    return [...layers, differenceLayer(active.mask, drawPick(active.masks, comparedPick(active), active.best), active.box)];
  }
  for (const name of listStructures()) {
    const found = look(name);
    const isActive = name === state.structure;
    if (!found?.box || name === state.inked || !(isActive || found.drawn || state.included.has(name))) continue;
    layers.push(maskLayer(found.mask, found.box, colorOf(name), isActive ? { fill: state.opacity, width: 2 } : { fill: state.opacity * OTHERS, width: 1.25 }));
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
