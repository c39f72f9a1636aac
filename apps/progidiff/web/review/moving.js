// Going from slice to slice, and how the slice is looked at: mode, window, zoom, structure.

import { limitZoom, zoomTo } from "./geometry.js";
import { presetsFor } from "./keys.js";
import { pickProposal } from "./picks.js";
import { findHighest } from "./slices.js";
import { countProposals, findNext, listStructures, look, state, store } from "./state.js";
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
 * Go to the slice that is to be looked at next for the active structure.
 * @param {number|null} without
 * @returns {boolean} false if none is left
 */
export function goToNext(without = null) {
  const z = findNext(without);
  if (z === null) return false;
  goTo(z);
  return true;
}

/** Begin with the structure in dispute on the first slice that is to be looked at, of all that are shown. */
export function goToFirst() {
  const { session } = state;
  if (!session) return;
  const names = [...state.included];
  /** @type {(name: string, z: number) => number} */
  const value = (name, z) => session.disagreement([name])[z] ?? 0;
  const first = state.walk.find(({ index }) => index < session.depth)?.index ?? findHighest(session.disagreement(names), () => false);
  if (first === null) return;
  const structure = names.reduce((best, name) => (value(name, first) > value(best, first) ? name : best), state.structure);
  store.set({ structure });
  if (!goToNext()) goTo(first);
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

/** @param {string} name */
export const selectStructure = (name) => store.set({ structure: name, compared: null });

/**
 * Show a structure, or show it no longer.
 * @param {string} name
 */
export function toggleIncluded(name) {
  const included = new Set(state.included);
  if (!included.delete(name)) included.add(name);
  store.set({ included });
}

export function cycleStructure() {
  const names = listStructures();
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
