// Buttons for what only keys did: overlay, saved label, window, zoom, the next slice and the next image.

import { element, find } from "./dom.js";
import { icon } from "./icons.js";
import { state } from "./state.js";

/** @typedef {import("./keys.js").Action} Action */

/** @type {readonly [action: Action, icon: string, label: string, key: string, isOn?: () => boolean][]} */
const BUTTONS = [
  ["hide", "layers", "Overlay", "O", () => !state.isHidden],
  ["saved", "saved", "Saved label", "L", () => state.isSavedShown],
  ["preset", "contrast", "Next window, or the window as it was", "W"],
  ["fit", "fit", "Zoom to the structure and back", "F"],
  ["zoomIn", "zoomIn", "Enlarge", "+"],
  ["zoomOut", "zoomOut", "Make smaller", "−"],
  ["up", "up", "One slice towards the head", "↑"],
  ["down", "down", "One slice towards the feet", "↓"],
  ["disputed", "target", "Next slice to look at", "G"],
  ["next", "next", "Next image", "N"],
];

/** What a picture has no use for. @type {ReadonlySet<Action>} */
const OF_VOLUMES = new Set(["up", "down", "disputed"]);

/** @param {(action: Action) => void} act */
export function buildToolstrip(act) {
  find("toolstrip").replaceChildren(
    ...BUTTONS.map(([action, name, label, key]) =>
      element("button", { className: OF_VOLUMES.has(action) ? "ghost of-volumes" : "ghost", "aria-label": label, "aria-keyshortcuts": key, title: `${label} (${key})`, on: { click: () => act(action) } }, icon(name)),
    ),
  );
}

export function renderToolstrip() {
  [...find("toolstrip").children].forEach((node, index) => {
    const isOn = BUTTONS[index][4];
    if (isOn) node.setAttribute("aria-pressed", String(isOn()));
  });
}
