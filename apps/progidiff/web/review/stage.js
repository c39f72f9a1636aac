// The large picture: fetching what the slice needs, and drawing it.

import { renderCorners, renderFacts } from "./corners.js";
import { find, findInput } from "./dom.js";
import { drawDepth, drawSlice, renderColours, renderGrey } from "./draw.js";
import { report } from "./failures.js";
import { frameZoomed } from "./geometry.js";
import { buildLayers } from "./layers.js";
import { paintMarks } from "./marks.js";
import { areMasksShown, shown, state } from "./state.js";
import { renderStrip } from "./strip.js";
import { stopWaiting } from "./timing.js";

/** Show what the state says: at once if all that it needs is here, else in the next frame when that is fetched. */
export function refresh() {
  if (isComplete()) paint();
  else requestDraw();
}

/** Fetch what is still missing, for example because a job had not come to it. */
export function fetchMissing() {
  if (!isComplete()) requestDraw();
}

function isComplete() {
  const { session, z } = state;
  if (!session) return true;
  if (shown.session !== session || shown.z !== z) return false;
  return (!session.result || (areMasksShown() && !shown.isPartial)) && !isLabelMissing();
}

/** Whether the saved label is to be shown, or drawn on where there is no proposal, and is not there. */
function isLabelMissing() {
  const { session, structure } = state;
  const isDrawnOn = session && structure in session.info.label_ids && !session.result?.structures.includes(structure);
  return Boolean(session?.info.label && (state.isSavedShown || isDrawnOn) && (!shown.label || shown.labelOf !== session.info));
}

let isDrawWanted = false;
function requestDraw() {
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
    if (shown.session !== session || shown.z !== z) {
      const [pixels, colours] = await Promise.all([session.slice(z), session.colours()]);
      if (state.session !== session || state.z !== z) return;
      Object.assign(shown, { session, z, pixels, colours, masks: null, isPartial: false, masksOf: "", label: null, labelOf: null, grey: null });
    }
    if (session.result && (!areMasksShown() || shown.isPartial)) loadMasks(session, z);
    else session.prefetch(z);
    if (isLabelMissing()) {
      const { info } = session;
      const label = await session.label(z);
      if (shown.session === session && shown.z === z) Object.assign(shown, { label, labelOf: info });
    }
  } catch (error) {
    report(error);
  }
}

/**
 * @param {import("./session.js").ImageSession} session
 * @param {number} z
 */
async function loadMasks(session, z) {
  const { source } = session;
  try {
    const { masks, isPartial } = await session.masks(z);
    if (state.session !== session || shown.z !== z || session.source !== source) return;
    Object.assign(shown, { masks, isPartial, masksOf: source });
    paint();
    if (!isPartial) stopWaiting("first-proposal");
    session.prefetch(z);
  } catch (error) {
    report(error);
  }
}

/** Draw what is here. */
export function paint() {
  const { session } = state;
  if (!session || !shown.pixels || shown.session !== session) return;
  find("empty").hidden = true;
  const key = `${shown.z}:${state.window}`;
  if (!shown.grey || shown.greyOf !== key) {
    shown.grey = shown.colours
      ? renderColours(shown.colours, session.height, session.width, state.window)
      : renderGrey(shown.pixels, session.height, session.width, session.info.scale, state.window);
    shown.greyOf = key;
  }
  const view = find("view", HTMLCanvasElement);
  const frame = frameZoomed(session, state.zoom, state.center, view.clientWidth / Math.max(1, view.clientHeight));
  shown.place = drawSlice(view, shown.grey, frame, session.spacing, state.isHidden ? [] : buildLayers());
  if (shown.z === state.z) stopWaiting("first-pixels", "proposal-switch", "slice-switch");
  paintMarks();
  paintDepth(session);
  renderCorners(session);
  renderStrip();
  renderFacts(session);
}

/** @param {import("./session.js").ImageSession} session */
function paintDepth(session) {
  drawDepth(
    find("depth", HTMLCanvasElement),
    session.depth,
    state.z,
    session.disagreement(state.structure ? [state.structure] : []),
    (z) => Boolean(state.work?.acceptedPick(state.structure, z)),
    (z) => session.isSaved(state.structure, z),
  );
  Object.assign(findInput("scroll"), { max: session.depth - 1, value: state.z });
}

/** @param {string} text */
export function showEmpty(text) {
  find("empty").hidden = false;
  find("empty-text").textContent = text;
}
