// The drawing tools: what each is called, which key takes it, and what its settings are.

/** @typedef {"brush"|"eraser"|"lasso"|"range"|"flood"} DrawTool */
/** @typedef {"plus"|"minus"|"scribbleIn"|"scribbleOut"|"boxIn"|"lassoIn"} SteerTool */
/** @typedef {DrawTool|SteerTool} Tool */
/** @typedef {"fillHoles"|"grow"|"shrink"|"smooth"|"copyUp"|"copyDown"|"interpolate"|"fromSaved"|"startOver"} Change */
/** @typedef {"redo"|"views"|"noTool"|"smaller"|"larger"|"clearEdits"|Tool|Change} DrawAction */
/** @typedef {{keys: string[], show?: string[], what: string, action?: DrawAction}} DrawKey */
/** @typedef {{size: number, low: number, high: number, amount: number, unit: "px"|"mm"}} Settings size of the brush in mm across; low and high are the intensities of the threshold brush */

/** @type {readonly {tool: DrawTool, name: string, key: string, hint: string}[]} */
export const TOOLS = [
  { tool: "brush", name: "Brush", key: "P", hint: "Draw; with Ctrl erase" },
  { tool: "eraser", name: "Eraser", key: "R", hint: "Erase; with Ctrl draw" },
  { tool: "lasso", name: "Lasso", key: "M", hint: "Draw around what is to be added; with Ctrl around what is to be taken away" },
  { tool: "range", name: "Threshold", key: "Q", hint: "Draw only where the intensity is in the window; with Ctrl erase there" },
  { tool: "flood", name: "Flood", key: "Shift P", hint: "Click into a hole to fill it, on an island to remove it" },
];

/** @type {readonly {tool: SteerTool, kind: import("./edits.js").Kind, positive: boolean, name: string, key: string, hint: string}[]} */
export const STEER_TOOLS = [
  { tool: "plus", kind: "click", positive: true, name: "Click inside", key: "Shift E", hint: "Click what belongs to the structure; with Ctrl what does not" },
  { tool: "minus", kind: "click", positive: false, name: "Click outside", key: "Shift X", hint: "Click what does not belong to the structure; with Ctrl what does" },
  { tool: "scribbleIn", kind: "scribble", positive: true, name: "Scribble inside", key: "Shift B", hint: "Draw a line through the structure; with Ctrl outside of it" },
  { tool: "scribbleOut", kind: "scribble", positive: false, name: "Scribble outside", key: "Shift N", hint: "Draw a line outside of the structure; with Ctrl through it" },
  { tool: "boxIn", kind: "box", positive: true, name: "Box", key: "Shift K", hint: "Drag a box around the structure" },
  { tool: "lassoIn", kind: "lasso", positive: true, name: "Loop", key: "Shift O", hint: "Draw a loop around the structure; with Ctrl around what is no part of it" },
];

/** @type {readonly {change: Change, name: string, key: string, hint: string}[]} */
export const CHANGES = [
  { change: "fillHoles", name: "Fill holes", key: "Shift F", hint: "Fill every hole of the structure on this slice" },
  { change: "grow", name: "Grow", key: "Shift G", hint: "Grow by the amount beside" },
  { change: "shrink", name: "Shrink", key: "Shift S", hint: "Shrink by the amount beside" },
  { change: "smooth", name: "Smooth", key: "Shift M", hint: "Round off corners and drop what is thinner than the amount beside" },
  { change: "copyDown", name: "Copy down", key: "Shift ↓", hint: "Copy to the slice below and go there" },
  { change: "copyUp", name: "Copy up", key: "Shift ↑", hint: "Copy to the slice above and go there" },
  { change: "interpolate", name: "Interpolate", key: "Shift I", hint: "Fill the slices between the nearest ones that were drawn" },
  { change: "fromSaved", name: "From saved", key: "Shift L", hint: "Take the saved label of this slice to go on from" },
  { change: "startOver", name: "Start over", key: "Shift R", hint: "Drop what was drawn on this slice; the pick is shown again" },
];

/** @type {readonly DrawKey[]} */
export const DRAW_KEYS = [
  { keys: ["p"], show: ["P"], what: "Brush", action: "brush" },
  { keys: ["r"], show: ["R"], what: "Eraser", action: "eraser" },
  { keys: ["m"], show: ["M"], what: "Lasso", action: "lasso" },
  { keys: ["q"], show: ["Q"], what: "Threshold brush", action: "range" },
  { keys: ["Shift p"], show: ["Shift P"], what: "Flood: fill a hole, remove an island", action: "flood" },
  { keys: ["Shift e"], show: ["Shift E", "Shift X"], what: "Steer: click inside, outside", action: "plus" },
  { keys: ["Shift x"], what: "", action: "minus" },
  { keys: ["Shift b"], show: ["Shift B", "Shift N"], what: "Steer: scribble inside, outside", action: "scribbleIn" },
  { keys: ["Shift n"], what: "", action: "scribbleOut" },
  { keys: ["Shift k"], show: ["Shift K", "Shift O"], what: "Steer: box, loop around the structure", action: "boxIn" },
  { keys: ["Shift o"], what: "", action: "lassoIn" },
  { keys: ["Shift d"], show: ["Shift D"], what: "Steer: remove clicks and lines of the structure", action: "clearEdits" },
  { keys: [","], show: [",", "."], what: "Smaller, larger brush", action: "smaller" },
  { keys: ["."], what: "", action: "larger" },
  { keys: [], show: ["Ctrl"], what: "While drawing: the other way round" },
  { keys: ["Escape"], show: ["Esc"], what: "Put the tool down", action: "noTool" },
  { keys: ["Shift f"], show: ["Shift F"], what: "Fill holes", action: "fillHoles" },
  { keys: ["Shift g"], show: ["Shift G", "Shift S"], what: "Grow, shrink", action: "grow" },
  { keys: ["Shift s"], what: "", action: "shrink" },
  { keys: ["Shift m"], show: ["Shift M"], what: "Smooth", action: "smooth" },
  { keys: ["Shift ArrowUp"], show: ["Shift ↑", "Shift ↓"], what: "Copy to the next slice", action: "copyUp" },
  { keys: ["Shift ArrowDown"], what: "", action: "copyDown" },
  { keys: ["Shift i"], show: ["Shift I"], what: "Interpolate between drawn slices", action: "interpolate" },
  { keys: ["Shift l"], show: ["Shift L"], what: "Go on from the saved label", action: "fromSaved" },
  { keys: ["Shift r"], show: ["Shift R"], what: "Drop what was drawn on this slice", action: "startOver" },
  { keys: ["Shift v"], show: ["Shift V"], what: "Other planes and surface", action: "views" },
  { keys: ["Shift z", "Ctrl y", "Ctrl Shift z"], show: ["Shift Z"], what: "Redo", action: "redo" },
];

const [SMALLEST, LARGEST] = [0.1, 400];
const STEP = 1.25;
/** A brush begins as wide as this many pixels. */
const FIRST_PIXELS = 14;

/**
 * Settings to begin an image with.
 * @param {readonly [dy: number, dx: number]} spacing
 * @param {readonly [low: number, high: number]} window
 * @returns {Settings}
 */
export const firstSettings = ([dy, dx], [low, high]) => ({ size: roundSize(FIRST_PIXELS * Math.min(dy, dx)), low, high, amount: 1, unit: "px" });

/** @param {number} size mm @returns {number} */
export const roundSize = (size) => Math.min(LARGEST, Math.max(SMALLEST, Number(size.toPrecision(2))));

/**
 * The next smaller or larger size of a brush.
 * @param {number} size mm
 * @param {1|-1} direction
 */
export const stepSize = (size, direction) => roundSize(size * STEP ** direction);

/**
 * How far to grow, shrink or smooth: what is shown, in mm.
 * @param {Settings} settings
 * @param {readonly [dy: number, dx: number]} spacing
 * @returns {{length: number, spacing: readonly [dy: number, dx: number]}} a pixel is as long one way as the other, whatever its shape
 */
export const readAmount = ({ amount, unit }, spacing) => (unit === "px" ? { length: amount, spacing: [1, 1] } : { length: amount, spacing });

/**
 * The window in which most of a structure lies.
 * @param {ArrayLike<number>} pixels
 * @param {ArrayLike<number>} mask
 * @param {readonly [slope: number, intercept: number]} scale
 * @returns {[low: number, high: number]|null} the middle nine tenths of its intensities; null if it is empty
 */
export function findWindow(pixels, mask, [slope, intercept]) {
  /** @type {number[]} */
  const values = [];
  for (let i = 0; i < mask.length; i += 1) if (mask[i]) values.push(pixels[i]);
  if (!values.length) return null;
  values.sort((one, other) => one - other);
  /** @param {number} share */
  const at = (share) => values[Math.round(share * (values.length - 1))] * slope + intercept;
  return [at(0.05), at(0.95)];
}
