// Double reading: who read the image, how far two people agree, both outlines, and the decision of a third person.

import * as api from "./api.js";
import { ONLY_FIRST, ONLY_SECOND, cssColor } from "./colors.js";
import { maskLayer } from "./draw.js";
import { element, find, findButton, toast } from "./dom.js";
import { report } from "./failures.js";
import { nameSlice } from "./slices.js";
import { shown, state, store } from "./state.js";

/** @typedef {import("../answers.d.ts").Readings} Readings */

const COLORS = [ONLY_FIRST, ONLY_SECOND];
const MOST_LISTED = 6;

/** @type {Map<string, Uint8Array|null>} label ids of a reading on a slice; null while they are on their way */
const slices = new Map();
/** @type {Record<string, string>} structure -> whose reading counts */
let chosen = {};
/** @type {(z: number) => void} */
let goTo = () => {};
/** @type {() => Promise<void>} */
let decided = async () => {};

/**
 * What its buttons do.
 * @param {typeof goTo} jump
 * @param {typeof decided} after
 */
export function onReadings(jump, after) {
  goTo = jump;
  decided = after;
}

/** Ask who read the image that is open. */
export async function loadReadings() {
  const { session } = state;
  slices.clear();
  chosen = {};
  store.set({ readings: null });
  if (!session) return;
  try {
    const readings = await api.getReadings(session.image);
    if (state.session !== session || !readings.is_on) return;
    chosen = Object.fromEntries(readings.agreement.map(({ structure }) => [structure, readings.readings[0].user]));
    store.set({ readings });
  } catch (error) {
    report(error);
  }
}

/** The outlines of both readings of the active structure on the shown slice, for who decides. */
export function readingLayers() {
  const { session, readings, structure, z } = state;
  if (!session || !readings?.may_decide || shown.session !== session || shown.z !== z) return [];
  const box = { y0: 0, y1: session.height, x0: 0, x1: session.width };
  return readings.readings.flatMap(({ user, label_ids: ids }, index) => {
    const label = fetchSlice(session, user, z);
    const mask = label?.map((id) => (id === ids[structure] ? 1 : 0));
    return mask?.includes(1) ? [maskLayer(mask, box, toHex(COLORS[index]), { fill: 0, width: 2, dash: index ? [6, 4] : undefined })] : [];
  });
}

/** @param {readonly number[]} color */
const toHex = (color) => `#${color.map((part) => part.toString(16).padStart(2, "0")).join("")}`;

/**
 * @param {import("./session.js").ImageSession} session
 * @param {string} user
 * @param {number} z
 * @returns {Uint8Array|null} null while it is on its way
 */
function fetchSlice(session, user, z) {
  const key = `${session.image}:${user}:${z}`;
  const known = slices.get(key);
  if (known !== undefined) return known;
  slices.set(key, null);
  api.getReadingLabel(session.image, user, z).then(
    (bytes) => {
      slices.set(key, new Uint8Array(bytes));
      store.touch("info");
    },
    (error) => {
      slices.delete(key);
      report(error);
    },
  );
  return null;
}

export function renderReadings() {
  const { readings } = state;
  find("readings").hidden = !readings;
  if (!readings) return;
  const { may_decide: mayDecide, decided: isDecided, readings: read, agreement, wanted } = readings;
  const lines = [];
  if (!agreement.length) lines.push(`Read twice: ${read.length ? "your reading is kept" : "you have not read it"}; others see it when ${wanted} people have read it.`);
  else lines.push(isDecided === null ? (mayDecide ? "Two people read this. You decide." : "Two people read this; a third person decides.") : `Decided by save ${isDecided}.`);
  find("readings-text").textContent = lines.join(" ");
  find("readings-list").replaceChildren(...agreement.map((entry) => renderAgreement(entry, readings)));
  findButton("decide").hidden = !mayDecide || !agreement.length;
}

/**
 * @param {Readings["agreement"][number]} entry
 * @param {Readings} readings
 */
function renderAgreement({ structure, dice, slices: worst }, { readings, may_decide: mayDecide }) {
  const jumps = worst.slice(0, MOST_LISTED).map(({ index, dice: own }) =>
    element("button", { className: "small", title: `Dice ${own.toFixed(2)}`, on: { click: () => (store.set({ structure }), goTo(index)) } }, `${nameSlice(index)}: ${own.toFixed(2)}`),
  );
  const choices = readings.map(({ user }, index) => {
    const dot = element("i");
    dot.style.background = cssColor(COLORS[index]);
    const choose = () => ((chosen[structure] = user), renderReadings());
    return element("button", { className: "small", "aria-pressed": String(chosen[structure] === user), on: { click: choose } }, dot, user);
  });
  return element(
    "li",
    {},
    element("span", {}, element("strong", {}, structure), ` Dice ${dice.toFixed(3)}`),
    element("div", { className: "slices" }, ...jumps),
    mayDecide && element("div", { className: "rules" }, ...choices),
  );
}

export async function decide() {
  const { session } = state;
  if (!session) return;
  try {
    await api.decideReadings(session.image, { structures: chosen });
    toast(`Decided: ${Object.entries(chosen).map(([name, user]) => `${name} by ${user}`).join(", ")}`, "good", 5);
    await decided();
    await loadReadings();
  } catch (error) {
    report(error);
  }
}
