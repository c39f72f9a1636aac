// The kept results of an image: which of them are shown, also when it is opened again, and the choice of them.

import { element, find } from "./dom.js";
import { state } from "./state.js";

const PREFIX = "progidiff.results.";

/**
 * Keep which results of an image are shown.
 * @param {string} image
 * @param {readonly string[]} keys
 */
export function rememberResults(image, keys) {
  try {
    localStorage.setItem(PREFIX + image, JSON.stringify(keys));
  } catch {
    // Private windows may refuse storage: the newest result is shown then.
  }
}

/** @param {string} image @returns {string[]} keys of the results that were shown last */
export function recallResults(image) {
  try {
    const keys = JSON.parse(localStorage.getItem(PREFIX + image) ?? "[]");
    return Array.isArray(keys) ? keys.filter((key) => typeof key === "string") : [];
  } catch {
    return [];
  }
}

/** @type {(key: string, isShown: boolean) => void} */
let choose = () => {};
/**
 * Call back when a kept result is to be shown, or not any more.
 * @param {typeof choose} callback
 */
export function onChooseResult(callback) {
  choose = callback;
}

/** The list of what is kept, with a box for each. */
export function renderKept() {
  const { session } = state;
  const kept = session?.info.kept ?? [];
  find("kept").hidden = kept.length < 2;
  find("kept-title").textContent = `${session?.keys.length ?? 0} of ${kept.length} kept results shown`;
  find("kept-list").replaceChildren(
    ...kept.map(({ proposals, created, structures }) => {
      const isShown = Boolean(session?.keys.includes(proposals));
      const box = element("input", { type: "checkbox", checked: isShown, disabled: state.isReadOnly || Boolean(state.job), on: { change: () => choose(proposals, !isShown) } });
      const when = new Date(created * 1000).toLocaleString();
      return element("li", {}, element("label", {}, box, element("span", {}, structures.join(", "), element("small", {}, when))));
    }),
  );
}
