// What keys do, in the order of the legend, and the windows that W goes through.

import { DRAW_KEYS } from "./tools.js";

/**
 * @typedef {"consensus"|"best"|"absent"|"union"|"intersection"|"majority"|"threshold"|"lower"|"higher"|"scope"|"agreement"|"difference"
 *   |"hide"|"saved"|"up"|"down"|"farUp"|"farDown"|"first"|"last"|"disputed"|"skip"|"structure"|"leaveOut"|"preset"|"fit"|"zoomIn"
 *   |"zoomOut"|"finish"|"acceptShown"|"acceptShownVolume"|"acceptSlice"|"acceptVolume"|"undo"|"submit"|"next"|"prompt"|"help"
 *   |import("./tools.js").DrawAction} Action
 */
/** @typedef {{keys: string[], show?: string[], what: string, action?: Action}} Key `show` is what the legend prints instead of `keys` */
/** @typedef {Pick<KeyboardEvent, "key"|"code"|"shiftKey"|"ctrlKey"|"altKey"|"metaKey">} Press */
/** @typedef {{action: Action}|{proposal: number}|{compared: number}} Meaning */

/** @type {readonly Key[]} */
export const KEYS = [
  { keys: [], show: ["1", "…", "9"], what: "Pick a proposal" },
  { keys: ["c"], show: ["C"], what: "Pick the consensus", action: "consensus" },
  { keys: ["b"], show: ["B"], what: "Pick the most typical proposal", action: "best" },
  { keys: ["0"], what: "Not there: draw nothing", action: "absent" },
  { keys: ["u"], show: ["U"], what: "Merge: union", action: "union" },
  { keys: ["i"], show: ["I"], what: "Merge: intersection", action: "intersection" },
  { keys: ["j"], show: ["J"], what: "Merge: majority", action: "majority" },
  { keys: ["t"], show: ["T"], what: "Merge: at least so many", action: "threshold" },
  { keys: ["["], show: ["[", "]"], what: "Fewer, more of them", action: "lower" },
  { keys: ["]"], what: "", action: "higher" },
  { keys: ["v"], show: ["V"], what: "Picks apply to slice or volume", action: "scope" },
  { keys: ["h"], show: ["H"], what: "Agreement map", action: "agreement" },
  { keys: ["d"], show: ["D"], what: "Difference to another pick", action: "difference" },
  { keys: [], show: ["Shift 1", "…", "9"], what: "Difference to that proposal" },
  { keys: ["o"], show: ["O"], what: "Hide or show the overlay", action: "hide" },
  { keys: ["l"], show: ["L"], what: "Show the saved label", action: "saved" },
  { keys: ["ArrowUp", "k"], show: ["↑", "↓"], what: "Scroll towards head, feet", action: "up" },
  { keys: ["ArrowDown"], what: "", action: "down" },
  { keys: ["PageUp"], show: ["PgUp", "PgDn"], what: "Ten slices", action: "farUp" },
  { keys: ["PageDown"], what: "", action: "farDown" },
  { keys: ["Home"], what: "", action: "first" },
  { keys: ["End"], what: "", action: "last" },
  { keys: ["g"], show: ["G"], what: "Next slice that was chosen, then the most disputed", action: "disputed" },
  { keys: ["s"], show: ["S"], what: "Skip this image", action: "skip" },
  { keys: ["x"], show: ["X"], what: "Next structure", action: "structure" },
  { keys: ["e"], show: ["E"], what: "Hide or show this structure", action: "leaveOut" },
  { keys: ["w"], show: ["W"], what: "Next window", action: "preset" },
  { keys: ["f"], show: ["F"], what: "Zoom to the structure and back", action: "fit" },
  { keys: ["+", "="], show: ["+", "−"], what: "Zoom", action: "zoomIn" },
  { keys: ["-"], what: "", action: "zoomOut" },
  { keys: ["Enter", "a"], show: ["Enter", "A"], what: "Accept the structure on this slice, go to the next", action: "acceptSlice" },
  { keys: ["Shift Enter", "Shift a"], show: ["Shift Enter"], what: "Accept the structure in the volume", action: "acceptVolume" },
  { keys: ["y"], show: ["Y"], what: "Accept all that is shown on this slice", action: "acceptShown" },
  { keys: ["Shift y"], show: ["Shift Y"], what: "Accept all that is shown in the volume", action: "acceptShownVolume" },
  { keys: ["z", "Ctrl z"], show: ["Z"], what: "Undo", action: "undo" },
  ...DRAW_KEYS,
  { keys: ["Ctrl Enter"], show: ["Ctrl Enter"], what: "Submit", action: "submit" },
  { keys: ["Ctrl Shift Enter"], show: ["Ctrl Shift Enter"], what: "Submit; the image is done", action: "finish" },
  { keys: ["n"], show: ["N"], what: "Next image of the queue", action: "next" },
  { keys: ["/"], what: "Type a prompt", action: "prompt" },
  { keys: ["?"], what: "These keys", action: "help" },
];

/**
 * What a pressed key means; null if nothing.
 * @param {Press} press
 * @returns {Meaning|null}
 */
export function readKey(press) {
  if (press.altKey || press.metaKey) return null;
  if (/^Digit[1-9]$/.test(press.code) && !press.ctrlKey) {
    const number = Number(press.code.slice(5));
    return press.shiftKey ? { compared: number } : { proposal: number };
  }
  const action = KEYS.find(({ keys }) => keys.some((key) => matches(key, press)))?.action;
  return action ? { action } : null;
}

/**
 * @param {string} wanted "Ctrl z"
 * @param {Press} press
 */
function matches(wanted, press) {
  const parts = wanted.split(" ");
  const key = parts[parts.length - 1];
  const isLetter = /^[a-z]$/i.test(key);
  const isSame = isLetter ? press.key.toLowerCase() === key.toLowerCase() : press.key === key;
  const needsShift = parts.includes("Shift");
  // "?" and "+" need Shift on some keyboards and not on others.
  const isShiftRight = isLetter || key.length > 1 ? press.shiftKey === needsShift : true;
  return isSame && press.ctrlKey === parts.includes("Ctrl") && isShiftRight;
}

/** @typedef {{name: string, window: readonly [low: number, high: number]}} Preset */

/** @type {readonly Preset[]} */
const CT_PRESETS = [
  { name: "soft tissue", window: [-160, 240] },
  { name: "liver", window: [-10, 170] },
  { name: "lung", window: [-1350, 150] },
  { name: "bone", window: [-600, 1400] },
];

/**
 * Windows for an image, the first one to begin with; all as [low, high].
 * @param {{modality: string, range: readonly [number, number], window: readonly [number, number], presets?: readonly {name: string, window: readonly number[]}[]}} info
 * @returns {[Preset, ...Preset[]]}
 */
export function presetsFor({ modality, range, window, presets = [] }) {
  /** @type {Preset} */
  const full = { name: "full range", window: range };
  const named = presets.map(({ name, window: [low, high] }) => ({ name, window: /** @type {const} */ ([low, high]) }));
  const [first, ...others] = named.length || modality !== "CT" ? named : CT_PRESETS;
  if (first) return [first, ...others, full];
  // Intensities without a unit: windows of this image's own.
  const [low, high] = window;
  const middle = (low + high) / 2;
  return [{ name: "body, 1 to 99 %", window }, { name: "dark tissue", window: [low, middle] }, { name: "bright tissue", window: [middle, high + middle - low] }, full];
}
