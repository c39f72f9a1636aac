// The large picture: fetching what slice z needs, drawing it, and the words in its corners.

import { element, find } from "./dom.js";
import * as draw from "./draw.js";
import { report } from "./failures.js";
import { computeDice, countPixels, describePick, drawPick } from "./masks.js";
import { colorOf, comparedPick, look, shown, state, stopWaiting } from "./state.js";
import { renderStrip } from "./strip.js";

let isDrawWanted = false;
export function requestDraw() {
  if (isDrawWanted) return;
  isDrawWanted = true;
  requestAnimationFrame(async () => {
    isDrawWanted = false;
    await loadShown();
    paint();
  });
}

/** Fetch what slice z needs; the picture comes first, the masks when they are there. */
async function loadShown() {
  const { session, z } = state;
  if (!session) return;
  try {
    if (session.result) session.masks(z).catch(() => {}); // Asked for beside the picture, and reported below.
    if (shown.z !== z) {
      const pixels = await session.slice(z);
      if (state.session !== session || state.z !== z) return;
      Object.assign(shown, { z, pixels, masks: null, masksOf: null, label: null, grey: null });
    }
    const source = session.result && `${session.result.key}${session.result.job}`;
    if (source && shown.masksOf !== source) {
      session
        .masks(z)
        .then((masks) => {
          if (state.session !== session || shown.z !== z || `${session.result?.key}${session.result?.job}` !== source) return;
          Object.assign(shown, { masks, masksOf: source });
          paint();
          stopWaiting("first-proposal");
          session.prefetch(z);
        })
        .catch((error) => error.kind !== "gone" && report(error));
    } else {
      session.prefetch(z);
    }
    if (state.isSavedShown && !shown.label && session.info.label) {
      const label = await session.label(z);
      if (shown.z === z) shown.label = label;
    }
  } catch (error) {
    report(error);
  }
}

export function paint() {
  const { session } = state;
  if (!session || !shown.pixels) return;
  find("empty").hidden = true;
  const key = `${shown.z}:${state.window}`;
  if (!shown.grey || shown.greyOf !== key) {
    shown.grey = draw.renderGrey(shown.pixels, session.height, session.width, session.info.scale, state.window);
    shown.greyOf = key;
  }
  const view = find("view");
  const layers = state.isHidden ? [] : buildLayers();
  shown.place = draw.drawSlice(view, shown.grey, pickFrame(view), session.spacing, layers);
  if (shown.z === state.z) {
    for (const name of ["first-pixels", "proposal-switch", "slice-switch"]) stopWaiting(name);
  }
  paintDepth();
  renderCorners();
  renderStrip();
  renderFacts();
}

function paintDepth() {
  const { session, work } = state;
  draw.drawDepth(
    find("depth"),
    session.depth,
    state.z,
    session.disagreement(state.structure ? [state.structure] : []),
    (z) => Boolean(work?.isDecided(z)),
    (z) => session.isSaved(z),
  );
  Object.assign(find("scroll"), { max: session.depth - 1, value: state.z });
}

function pickFrame(view) {
  const { session, zoom } = state;
  if (zoom === 1) return draw.wholeSlice(session.height, session.width);
  const [dy, dx] = session.spacing;
  const [y, x] = state.center ?? [session.height / 2, session.width / 2];
  const aspect = view.clientWidth / Math.max(1, view.clientHeight);
  const mmHigh = Math.max(session.height * dy, (session.width * dx) / aspect) / zoom;
  const width = (mmHigh * aspect) / dx;
  const height = mmHigh / dy;
  return { x: x - width / 2, y: y - height / 2, width, height };
}

function buildLayers() {
  const { session } = state;
  const layers = [];
  if (state.isSavedShown && shown.label) layers.push(...savedLayers());
  if (!session.result || !state.work) return layers;
  const active = look(state.structure);
  if (state.mode === "agreement" && active?.box) return [...layers, draw.agreementLayer(active.masks, active.box)];
  if (state.mode === "difference" && active?.box) {
    return [...layers, draw.differenceLayer(active.mask, drawPick(active.masks, comparedPick(active), active.best), active.box)];
  }
  for (const name of session.result.structures) {
    const found = look(name);
    if (!found?.box || (!state.included.has(name) && name !== state.structure)) continue;
    const isActive = name === state.structure;
    layers.push(draw.maskLayer(found.mask, found.box, colorOf(name), isActive ? 0.24 : 0.1, isActive ? 2 : 1.25));
  }
  return layers;
}

/** The label in force, structure by structure. */
function savedLayers() {
  const { session } = state;
  const box = { y0: 0, y1: session.height, x0: 0, x1: session.width };
  return Object.values(session.info.label_ids).flatMap((value) => {
    const mask = shown.label.map((id) => (id === value ? 1 : 0));
    if (!mask.includes(1)) return [];
    const layer = draw.maskLayer(mask, box, "#6ea8ff", 0, 1.5);
    layer.outlines[0].dash = [6, 4];
    return [layer];
  });
}

export function showEmpty(text) {
  find("empty").hidden = false;
  find("empty-text").textContent = text;
}

function renderCorners() {
  const { session, work, z } = state;
  const value = session.disagreement(state.structure ? [state.structure] : [])[z];
  find("corner-slice").replaceChildren(
    element("b", {}, `z ${z}`),
    ` of ${session.depth - 1}${session.result?.summary ? `\ndisagreement ${(value ?? 0).toFixed(2)}` : ""}${session.result?.job ? "\nproposals are being made" : ""}`,
  );
  const [low, high] = state.window;
  const digits = high - low < 10 ? 2 : 0;
  find("corner-window").textContent = `${state.preset}\nW ${(high - low).toFixed(digits)}  L ${((high + low) / 2).toFixed(digits)}${state.zoom === 1 ? "" : `\n× ${state.zoom.toFixed(1)}`}`;
  find("corner-mark").replaceChildren(
    ...(work?.isDecided(z) ? [element("span", { className: "mark-decided" }, `✓ ${describeAccepted(work, z)}, not sent\n`)] : []),
    ...(session.isSaved(z) && session.info.label ? [element("span", { className: "mark-saved" }, "● saved")] : []),
  );
  find("corner-mode").replaceChildren(...renderLegend());
}

/** What was accepted here, where that is not what is shown. */
function describeAccepted(work, z) {
  const accepted = work.acceptedPick(state.structure, z);
  const count = state.session.result.numProposals;
  const words = accepted && describePick(accepted, count);
  return words && words !== describePick(work.pickOn(state.structure, z), count) ? `accepted as ${words}` : "accepted";
}

function renderLegend() {
  if (state.isHidden) return ["overlay hidden"];
  const found = state.session.result && look(state.structure);
  if (!found) return [];
  const swatch = (color) => {
    const box = element("i");
    box.style.background = color;
    return box;
  };
  const count = state.session.result.numProposals;
  if (state.mode === "agreement") {
    const steps = Array.from({ length: count }, (_, k) => element("span", {}, swatch(`rgb(${draw.heatColor(k / Math.max(1, count - 1)).join(" ")})`), String(k + 1)));
    return [element("span", { className: "legend" }, `drawn by … of ${count} (not a probability)`, ...steps)];
  }
  if (state.mode === "difference") {
    const other = comparedPick(found);
    const dice = found.box ? computeDice(found.mask, drawPick(found.masks, other, found.best)) : 1;
    return [
      element(
        "span",
        { className: "legend" },
        element("span", {}, swatch("rgb(255 171 64)"), `only ${describePick(found.pick, count)}`),
        element("span", {}, swatch("rgb(64 196 255)"), `only ${describePick(other, count)}`),
        `Dice ${dice.toFixed(3)}`,
      ),
    ];
  }
  return [`${state.structure}: ${describePick(found.pick, count)}`];
}

function renderFacts() {
  const { session } = state;
  const found = session.result && look(state.structure);
  if (!found) {
    find("facts").textContent = session.result ? "" : "Type what to find and press Propose.";
    return;
  }
  const [dy, dx] = session.spacing;
  const area = (countPixels(found.mask) * dy * dx) / 100;
  const numbers = session.result.summary?.structures[state.structure];
  const volume = numbers ? `\nvolume ${numbers.consensus_ml.toFixed(0)} ml by consensus, ${Math.min(...numbers.proposals_ml).toFixed(0)} to ${Math.max(...numbers.proposals_ml).toFixed(0)} ml by proposal` : "";
  find("facts").textContent = `this slice ${area.toFixed(1)} cm²${volume}`;
  find("facts").dataset.pixels = String(countPixels(found.mask));
}
