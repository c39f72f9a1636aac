// What keys do, in the order of the legend, and the windows that W goes through.

/** `action` names an entry of `actions` in review.js; `show` is what the legend prints instead of `keys`. */
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
  { keys: ["g"], show: ["G"], what: "Most disputed undecided slice", action: "disputed" },
  { keys: ["s"], show: ["S"], what: "Skip this image", action: "skip" },
  { keys: ["x"], show: ["X"], what: "Next structure", action: "structure" },
  { keys: ["e"], show: ["E"], what: "Leave this structure out", action: "leaveOut" },
  { keys: ["w"], show: ["W"], what: "Next window", action: "preset" },
  { keys: ["f"], show: ["F"], what: "Zoom to the structure and back", action: "fit" },
  { keys: ["+", "="], show: ["+", "−"], what: "Zoom", action: "zoomIn" },
  { keys: ["-"], what: "", action: "zoomOut" },
  { keys: ["Enter", "a"], show: ["Enter", "A"], what: "Accept this slice, go to the next", action: "acceptSlice" },
  { keys: ["Shift Enter", "Shift a"], show: ["Shift Enter"], what: "Accept the volume", action: "acceptVolume" },
  { keys: ["z", "Ctrl z"], show: ["Z"], what: "Undo", action: "undo" },
  { keys: ["Ctrl Enter"], show: ["Ctrl Enter"], what: "Submit", action: "submit" },
  { keys: ["n"], show: ["N"], what: "Next image of the queue", action: "next" },
  { keys: ["/"], what: "Type a prompt", action: "prompt" },
  { keys: ["?"], what: "These keys", action: "help" },
];

const CT_PRESETS = [
  { name: "soft tissue", window: [-160, 240] },
  { name: "liver", window: [-10, 170] },
  { name: "lung", window: [-1350, 150] },
  { name: "bone", window: [-600, 1400] },
];

/** Windows for an image, the first one to begin with; all as [low, high]. */
export function presetsFor(info) {
  const full = { name: "full range", window: info.range };
  return info.modality === "CT" ? [...CT_PRESETS, full] : [{ name: "body, 1 to 99 %", window: info.window }, full];
}
