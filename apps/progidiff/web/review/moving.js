// Going from slice to slice, and how the slice is looked at: mode, window, zoom, structure.

import { limitZoom, zoomTo } from "./geometry.js";
import { presetsFor } from "./keys.js";
import { pickProposal } from "./picks.js";
import { countProposals, findDisputed, look, state, store } from "./state.js";
import { startWaiting } from "./timing.js";

/** @typedef {import("./geometry.js").Point} Point */

/** @param {number} z the nearest slice that there is, if there is none */
export function goTo(z) {
  const { session } = state;
  if (session) store.set({ z: Math.min(session.depth - 1, Math.max(0, z)) });
}

/** @param {number} step */
export function scrollBy(step) {
  const { z } = state;
  goTo(z + step);
  if (state.z !== z) startWaiting("slice-switch");
}

/**
 * Go to the most disputed slice that is left, and to the structure in dispute there.
 * @param {number|null} without
 * @returns {boolean} false if none is left
 */
export function goToDisputed(without = null) {
  const { session } = state;
  const z = findDisputed(without);
  if (z === null || !session) return false;
  const names = [...state.included];
  const values = names.map((name) => session.disagreement([name])[z]);
  store.set({ structure: names[values.indexOf(Math.max(...values))] });
  goTo(z);
  return true;
}

/** @param {import("./state.js").Mode} mode the same again leaves it */
export function toggleMode(mode) {
  startWaiting("proposal-switch");
  store.set({ mode: state.mode === mode ? "pick" : mode });
}

/** @param {number} number show the difference to this proposal */
export function compareWith(number) {
  if (number > countProposals()) return;
  startWaiting("proposal-switch");
  store.set({ compared: pickProposal(number), mode: "difference" });
}

export const toggleHidden = () => store.set({ isHidden: !state.isHidden });

export const toggleSaved = () => store.set({ isSavedShown: !state.isSavedShown });

/** @param {"slice"|"volume"} scope */
export const setScope = (scope) => store.set({ scope });

/** @param {string} name the same again leaves it out, or takes it in */
export function selectStructure(name) {
  if (name === state.structure) toggleIncluded(name);
  else store.set({ structure: name, compared: null });
}

/**
 * Structures that are left out are neither accepted nor called absent.
 * @param {string} name
 */
export function toggleIncluded(name) {
  if (!state.session?.result) return;
  const included = new Set(state.included);
  if (included.has(name) && included.size > 1) included.delete(name);
  else included.add(name);
  store.set({ included });
}

export function cycleStructure() {
  const names = state.session?.result?.structures ?? [];
  if (names.length) selectStructure(names[(names.indexOf(state.structure) + 1) % names.length]);
}

export function cyclePreset() {
  const { session } = state;
  if (!session) return;
  const presets = presetsFor(session.info);
  const { name, window } = presets[(presets.findIndex((preset) => preset.name === state.preset) + 1) % presets.length];
  store.set({ window, preset: name });
}

/**
 * @param {number} zoom
 * @param {Point|null} center
 */
export function setZoom(zoom, center = state.center) {
  const limited = limitZoom(zoom);
  store.set({ zoom: limited, center: limited === 1 ? null : center });
}

/** Fill the picture with the structure, or show the whole slice again. */
export function toggleFit() {
  const { session } = state;
  const box = look(state.structure)?.box;
  if (!session || !box || state.zoom > 1) setZoom(1);
  else store.set(zoomTo(box, session));
}
