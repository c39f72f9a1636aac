// The review page: what is shown follows from one state object, and every key and button changes that state.

import * as api from "./api.js";
import { clearNotice, element, find, notice, toast } from "./dom.js";
import * as draw from "./draw.js";
import { KEYS, presetsFor } from "./keys.js";
import { MERGE_RULES, computeDice, countPixels, countStructures, describePick, drawPick } from "./masks.js";
import { ModelPanel } from "./model.js";
import { Queue } from "./queue.js";
import { ImageSession } from "./session.js";
import { TabGuard, Work, forgetWork, loadWork } from "./work.js";

const POLL_MS = 300;
const IDLE_SECONDS = 60;
const RETRY_MS = 4000;
const MAX_KEY = 9;
const OTHER_COLORS = ["#e0aaff", "#80ed99", "#ff8fa3", "#a0c4ff", "#ffd6a5", "#caffbf"];

const state = {
  /** @type {ImageSession|null} */
  session: null,
  /** @type {Work|null} */
  work: null,
  z: 0,
  structure: "",
  included: new Set(),
  mode: "pick",
  compared: null,
  scope: "slice",
  window: [0, 1],
  preset: "",
  zoom: 1,
  center: null,
  isHidden: false,
  isSavedShown: false,
  isReadOnly: false,
  opening: 0,
  job: null,
  lastActive: Date.now(),
};

// What is drawn right now: pixels and masks of slice `z`, and the grey picture made of them.
const shown = { z: -1, pixels: null, masks: null, masksOf: null, label: null, grey: null, greyOf: "", place: null };

/** Times that somebody waits for: from the key or click to the picture. Read by anybody with `performance.getEntriesByType`. */
const waiting = new Map();
const startWaiting = (name) => waiting.set(name, performance.now());
function stopWaiting(name) {
  if (!waiting.has(name)) return;
  performance.measure(name, { start: waiting.get(name), end: performance.now() });
  waiting.delete(name);
}

const queue = new Queue(openImage, (z) => goTo(z));
const model = new ModelPanel();
const tabs = new TabGuard((image) => {
  if (image !== state.session?.image) return;
  state.isReadOnly = true;
  notice(`${image} is open in another tab of this browser. Here it can be looked at only, so that neither tab overwrites the other's decisions.`, "", [
    ["Use it here", takeImage],
  ]);
  render();
});

// Images and results

async function openImage(image) {
  startWaiting("first-pixels");
  const ticket = (state.opening += 1);
  find("queue").classList.remove("open");
  cancelWatch();
  clearNotice();
  showEmpty(`Opening ${image} …`);
  try {
    const session = await ImageSession.open(image);
    if (ticket !== state.opening) return;
    Object.assign(state, { session, work: null, structure: "", mode: "pick", compared: null, zoom: 1, center: null, isReadOnly: false, isSavedShown: false });
    Object.assign(shown, { z: -1, pixels: null, masks: null, masksOf: null, label: null, grey: null, greyOf: "" });
    const [preset] = presetsFor(session.info);
    Object.assign(state, { window: preset.window, preset: preset.name });
    state.z = Math.floor(session.depth / 2);
    history.replaceState(null, "", `#${new URLSearchParams({ image })}`);
    tabs.open(image);
    render();
    requestDraw(); // The picture does not wait for the proposals.
    await openResult(loadWork(image));
    if (ticket !== state.opening) return;
    if (!session.result) queue.setCurrent(image, isSliceDone, []);
    goToDisputed();
    find("view").focus({ preventScroll: true });
  } catch (error) {
    if (ticket !== state.opening) return;
    state.session = null;
    showEmpty(error.message);
    report(error);
    render();
  }
}

/** The result that unsent decisions speak about, or the newest one. */
async function openResult(unsent) {
  const { session } = state;
  const kept = session.info.kept.map(({ proposals }) => proposals);
  if (unsent?.work.hasDecisions) {
    if (kept.includes(unsent.work.proposals)) {
      await useResult(unsent.work.proposals, unsent.work);
      notice(`Decisions on this image from ${unsent.time.toLocaleString()} were not sent. They are here again.`, "", [
        ["Keep", clearNotice],
        ["Discard", discardWork],
      ]);
      return;
    }
    notice("Decisions on this image were not sent, and the proposals they speak about are no longer kept. Send the same prompt again to get them back.", "", [
      ["Discard them", discardWork],
    ]);
  }
  if (kept.length) await useResult(kept[0]);
}

async function useResult(key, work = null) {
  const { session } = state;
  await session.useProposals(key);
  if (session !== state.session) return;
  state.work = work ?? new Work(session.image, key);
  const { structures, summary } = session.result;
  state.included = new Set(structures);
  if (!structures.includes(state.structure)) {
    state.structure = structures.find((name) => summary.structures[name].present) ?? structures[0];
  }
  Object.assign(shown, { masks: null, masksOf: null });
  queue.setCurrent(session.image, isSliceDone, listDisputed());
  requestDraw();
  render();
}

/** The slices on which the shown proposals differ most, as the queue lists them. */
function listDisputed() {
  const { session } = state;
  const values = session.disagreement([...state.included]);
  const order = [...values.keys()].filter((z) => values[z] > 0).sort((a, b) => values[b] - values[a]);
  return order.slice(0, 8).map((index) => ({ index, score: values[index], reason: `disagreement ${values[index].toFixed(2)}`, structures: [] }));
}

function discardWork() {
  forgetWork(state.session.image);
  clearNotice();
  if (state.session.result?.key) state.work = new Work(state.session.image, state.session.result.key);
  queue.render();
  render();
  requestDraw();
}

function takeImage() {
  const kept = loadWork(state.session.image);
  tabs.take(state.session.image);
  state.isReadOnly = false;
  if (kept && kept.work.proposals === state.session.result?.key) state.work = kept.work;
  clearNotice();
  render();
  requestDraw();
}

// Prompts

async function runPrompt(event) {
  event?.preventDefault();
  const { session } = state;
  const prompt = find("prompt").value.trim();
  if (!session || state.job || !prompt) return;
  if (state.work?.hasDecisions) {
    showPromptError("Submit or undo the decisions on the proposals that are shown first; new ones would take their place.");
    return;
  }
  hidePromptError();
  startWaiting("first-proposal");
  const count = Math.min(16, Math.max(2, Number(find("count").value) || 4));
  const job = { id: `review-${Math.random().toString(36).slice(2, 12)}`, image: session.image, timer: 0, count };
  state.job = job;
  renderJob({ state: "queued", percent: 0 });
  job.timer = setTimeout(() => watchJob(job), POLL_MS);
  try {
    const answer = await api.runPrompt(session.image, { prompt, num_proposals: count, job_id: job.id, first_slice: state.z });
    if (state.session !== session) return;
    await session.refresh();
    state.structure = "";
    await useResult(answer.proposals);
    const absent = Object.entries(answer.structures).filter(([, numbers]) => !numbers.present);
    if (absent.length === Object.keys(answer.structures).length) toast(`Nothing found for “${prompt}” in this image.`);
    if (answer.warnings.length) notice(answer.warnings.join(" "), "", [["Understood", clearNotice]]);
    if (!isDrawnHere()) goToDisputed();
  } catch (error) {
    waiting.delete("first-proposal");
    if (session === state.session && session.result?.job === job.id) {
      session.dropResult();
      await openResult(null).catch(report);
    }
    if (error.kind === "refused" || error.kind === "busy" || error.kind === "conflict") showPromptError(error.message, error.suggestions);
    else report(error);
  } finally {
    clearTimeout(job.timer);
    if (state.job === job) {
      state.job = null;
      hideJob();
    }
    render();
    requestDraw();
  }
}

/** Progress, and the proposals of the slice that is looked at as soon as they are there. */
async function watchJob(job) {
  if (state.job !== job) return;
  try {
    const info = await api.getJob(job.id);
    if (state.job !== job) return;
    renderJob(info);
    if (info.state === "running" && state.session?.image === job.image) await showUnfinished(job);
  } catch (error) {
    if (error.kind !== "gone") renderJob({ state: error.message, percent: 0 });
  }
  if (state.job === job) job.timer = setTimeout(() => watchJob(job), POLL_MS);
}

async function showUnfinished(job) {
  const { session, z } = state;
  const packed = await api.getMasks(session.image, z, { job: job.id });
  if (!packed.byteLength || state.job !== job || state.session !== session) return;
  if (session.result?.job !== job.id) {
    const names = Array.from({ length: countStructures(packed) }, (_, index) => `structure ${index + 1}`);
    session.useJob(job.id, names, job.count);
    state.work = new Work(session.image, "");
    state.structure = names[0];
    state.included = new Set(names);
    Object.assign(shown, { masks: null, masksOf: null });
    render();
  }
  requestDraw();
}

function cancelWatch() {
  if (state.job) clearTimeout(state.job.timer);
  state.job = null;
  hideJob();
}

function hideJob() {
  find("job").hidden = true;
  find("prompt-form").classList.remove("busy");
}

function renderJob(info) {
  find("job").hidden = false;
  find("prompt-form").classList.add("busy");
  find("job-progress").value = info.percent ?? 0;
  const words = { queued: info.position ? `waiting, position ${info.position}` : "waiting", running: `${info.slices_done ?? 0} of ${info.slices_total || "?"} slices` };
  find("job-text").textContent = words[info.state] ?? info.state;
}

function showPromptError(text, suggestions = []) {
  const tries = suggestions.map((name) =>
    element("button", { type: "button", on: { click: () => ((find("prompt").value = name), runPrompt()) } }, name),
  );
  find("prompt-error").replaceChildren(text, ...tries);
  find("prompt-error").hidden = false;
}

function hidePromptError() {
  find("prompt-error").hidden = true;
}

// Looking

function goTo(z) {
  const { session } = state;
  if (!session) return;
  state.z = Math.min(session.depth - 1, Math.max(0, z));
  requestDraw();
}

/** The undecided slice with the highest disagreement, other than this one; null if none is left. */
function findDisputed(without = null) {
  const { session } = state;
  if (!session?.result?.summary) return null;
  const values = session.disagreement([...state.included]);
  let best = null;
  for (let z = 0; z < values.length; z += 1) {
    if (z !== without && values[z] > 0 && !isSliceDone(z) && (best === null || values[z] > values[best])) best = z;
  }
  return best;
}

/** Go to the most disputed slice that is left, and to the structure in dispute there; false if none is left. */
function goToDisputed(without = null) {
  const z = findDisputed(without);
  if (z === null) return false;
  const { session } = state;
  const values = [...state.included].map((name) => [session.disagreement([name])[z], name]);
  [[, state.structure]] = values.sort(([a], [b]) => b - a);
  goTo(z);
  renderPanel();
  return true;
}

const isSliceDone = (z) => Boolean(state.work?.isDecided(z) || state.session?.isSaved(z));

function isDrawnHere() {
  const values = state.session.disagreement([...state.included]);
  return values[state.z] > 0;
}

/** The masks and the pick of a structure on the shown slice; null while they are not there. */
function look(structure) {
  const { session, work } = state;
  if (!shown.masks || shown.z !== state.z || !work) return null;
  const index = session.result.structures.indexOf(structure);
  const entry = shown.masks[index];
  if (!entry) return null;
  const best = (session.result.summary?.structures[structure].best ?? 1) - 1;
  const pick = work.pickOn(structure, state.z);
  return { ...entry, best, pick, mask: entry.box ? drawPick(entry.masks, pick, best) : new Uint8Array(0) };
}

function colorOf(structure) {
  const { session } = state;
  return session.info.colors[structure] ?? OTHER_COLORS[session.result.structures.indexOf(structure) % OTHER_COLORS.length];
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
        })
        .catch((error) => error.kind !== "gone" && report(error));
    }
    if (state.isSavedShown && !shown.label && session.info.label) {
      const label = await session.label(z);
      if (shown.z === z) shown.label = label;
    }
    session.prefetch(z);
  } catch (error) {
    report(error);
  }
}

function paint() {
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
  stopWaiting("first-pixels");
  stopWaiting("proposal-switch");
  stopWaiting("slice-switch");
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

/** What the shown pick is compared with: the proposal that was asked for, else the consensus, else the first other one. */
function comparedPick(active) {
  if (state.compared) return state.compared;
  if (active.pick.rule !== "consensus") return { rule: "consensus", members: [], threshold: 0.5 };
  return { rule: "proposal", members: [1], threshold: 0.5 };
}

function showEmpty(text) {
  find("empty").hidden = false;
  find("empty-text").textContent = text;
}

// Deciding

function canDecide() {
  const { session, work } = state;
  if (!session || !work || !session.result?.key) return false;
  if (state.isReadOnly) toast("This image is open in another tab. Choose “Use it here” first.", "bad");
  return !state.isReadOnly;
}

function pick(rule, members = [], threshold = 0.5) {
  if (!state.work || !state.session.result || state.isReadOnly) return;
  startWaiting("proposal-switch");
  const found = look(state.structure);
  if (state.mode === "difference" && found) state.compared = found.pick;
  else state.mode = "pick";
  state.work.setPick(state.structure, { rule, members, threshold }, state.scope === "slice" ? state.z : null);
  paint();
  renderPanel();
}

/** Merge by a rule, with the members that are chosen. */
function merge(rule) {
  const current = currentPick();
  const members = MERGE_RULES.includes(current.rule) ? current.members : [];
  const count = members.length || state.session.result.numProposals;
  pick(rule, members, rule === "threshold" && current.rule !== "threshold" ? Math.ceil(count * 0.75) / count : current.threshold);
}

function toggleMember(number) {
  const current = currentPick();
  const all = Array.from({ length: state.session.result.numProposals }, (_, k) => k + 1);
  const chosen = new Set(MERGE_RULES.includes(current.rule) && current.members.length ? current.members : all);
  if (chosen.has(number) && chosen.size > 1) chosen.delete(number);
  else chosen.add(number);
  const members = chosen.size === all.length ? [] : [...chosen].sort((a, b) => a - b);
  const rule = MERGE_RULES.includes(current.rule) ? current.rule : "majority";
  const threshold = rule === "threshold" ? Math.ceil(chosen.size * 0.75) / chosen.size : 0.5;
  pick(rule, members, threshold);
}

const currentPick = () => state.work?.pickOn(state.structure, state.z) ?? { rule: "consensus", members: [], threshold: 0.5 };

function acceptSlice() {
  if (!canDecide() || !shown.masks || shown.z !== state.z) return;
  const { z } = state;
  state.work.acceptSlice(z, chosenStructures());
  toast(`Slice ${z} accepted`, "good", 2);
  afterDecision();
  if (!goToDisputed(z)) toast("No undecided slice with disagreement is left. Accept the volume, or submit.", "", 4);
}

function acceptVolume() {
  if (!canDecide()) return;
  state.work.acceptVolume(chosenStructures());
  toast(`Volume accepted: ${chosenStructures().join(", ")}`, "good", 3);
  afterDecision();
}

const chosenStructures = () => state.session.result.structures.filter((name) => state.included.has(name));

async function undo() {
  if (!state.work || state.isReadOnly) return;
  const what = state.work.undo();
  if (what) {
    toast(`Undone: ${what}`, "", 2);
    afterDecision();
  } else if (state.session?.info.label) {
    toast("Nothing unsent to undo. “Undo last save” goes back further.");
  }
}

function afterDecision() {
  queue.render();
  paint();
  renderPanel();
}

async function submit() {
  if (!canDecide() || !state.work.hasDecisions || find("submit").disabled) return;
  const { session, work } = state;
  find("submit").disabled = true;
  try {
    const answer = await api.submitDecisions(session.image, work.toDecisions(session.info.sequence));
    forgetWork(session.image);
    const { annotation } = answer;
    const extent = annotation.slices === null ? "the whole volume" : annotation.slices.length === 1 ? "1 slice" : `${annotation.slices.length} slices`;
    toast(annotation.repeated ? "This was saved already; nothing was saved twice." : `Saved: ${extent} of ${annotation.structures.join(", ")}`, "good", 5);
    clearNotice();
    if (annotation.warnings?.length) notice(annotation.warnings.join(" "), "", [["Understood", clearNotice]]);
    if (state.session === session) {
      const { picks, slicePicks } = work.state;
      state.work = new Work(session.image, work.proposals);
      Object.assign(state.work.state, { picks, slicePicks });
      await session.refresh();
      shown.label = null;
    }
    await queue.load();
  } catch (error) {
    await reportSubmit(error, session);
  } finally {
    render();
    requestDraw();
  }
}

async function reportSubmit(error, session) {
  if (error.kind !== "conflict") {
    report(error);
    return;
  }
  await session.refresh().catch(() => {});
  shown.label = null;
  notice(error.message, "bad", [
    ["Show that label", () => setSavedShown(true)],
    ["Submit again", () => (clearNotice(), submit())],
  ]);
}

async function undoSave() {
  const { session } = state;
  if (!session || state.isReadOnly) return;
  try {
    const answer = await api.undoSave(session.image);
    toast(answer.annotation ? `The last save is undone; save ${answer.annotation.sequence} is in force again.` : "The last save is undone; the image has no label now.", "good");
    await session.refresh();
    shown.label = null;
    await queue.load();
  } catch (error) {
    report(error);
  }
  render();
  requestDraw();
}

async function skip() {
  const { session } = state;
  if (!session) return;
  if (state.work?.hasDecisions) {
    toast("There are decisions on this image. Submit or undo them before skipping it.", "bad");
    return;
  }
  try {
    await api.skipImage(session.image, "skipped on the review page");
    toast(`${session.image} skipped`, "", 2);
    await openNext();
  } catch (error) {
    report(error);
  }
}

async function openNext() {
  await queue.load();
  const image = queue.next();
  if (image) await openImage(image);
  else toast("No other image is waiting.");
}

// Failures that a person has to know about

function report(error) {
  if (error.name === "AbortError") return;
  if (!error.kind) console.error(error);
  const pending = state.work?.hasDecisions ? " Your decisions are kept in this browser." : "";
  if (error.kind === "offline") {
    notice(error.message, "bad", [["Try now", retry]]);
    scheduleRetry();
  } else if (error.kind === "login") {
    notice(`Your login has expired.${pending} Log in, then go on here.`, "bad", [["Log in", () => window.open(api.loginAddress(), "_blank", "noopener")]]);
  } else {
    notice(error.message + (error.kind === "forbidden" ? pending : ""), "bad", [["Close", clearNotice]]);
  }
}

let retryTimer = 0;
function scheduleRetry() {
  clearTimeout(retryTimer);
  retryTimer = setTimeout(retry, RETRY_MS);
}

async function retry() {
  clearTimeout(retryTimer);
  try {
    await api.getJson("progidiff/jobs");
  } catch (error) {
    if (error.kind === "offline") scheduleRetry();
    else report(error);
    return;
  }
  if (state.work?.hasDecisions) notice("The server is back. Your decisions are still here.", "", [["Submit now", submit], ["Later", clearNotice]]);
  else clearNotice();
  await queue.load();
  requestDraw();
}

// Drawing the page around the picture

function render() {
  const { session } = state;
  find("where").replaceChildren(...(session ? [element("strong", {}, session.image), ` · ${session.info.modality} · ${session.depth} slices`] : ["Choose an image"]));
  for (const id of ["prompt-run", "skip"]) find(id).disabled = !session || Boolean(state.job) || state.isReadOnly;
  renderPanel();
}

function renderPanel() {
  const { session, work } = state;
  const result = session?.result;
  const isReady = Boolean(result && work && !state.isReadOnly);
  find("structures").replaceChildren(...(result ? result.structures.map(renderChip) : []));
  find("scope-slice").setAttribute("aria-pressed", String(state.scope === "slice"));
  find("scope-volume").setAttribute("aria-pressed", String(state.scope === "volume"));
  renderMerging(isReady);
  for (const id of ["accept-slice", "accept-volume"]) find(id).disabled = !isReady || !result.key;
  find("undo").disabled = !work?.history.length || state.isReadOnly;
  renderDecided();
}

function renderChip(name) {
  const { session } = state;
  const isIncluded = state.included.has(name);
  const dot = element("i");
  dot.style.background = isIncluded ? colorOf(name) : "#46525e";
  const isAbsent = session.result.summary && !session.result.summary.structures[name].present;
  const words = `${name}${isAbsent ? " (not found)" : ""}${isIncluded ? "" : " (left out)"}`;
  return element("button", { "aria-pressed": String(name === state.structure), on: { click: () => selectStructure(name) } }, dot, words);
}

function renderMerging(isReady) {
  const current = currentPick();
  const count = state.session?.result?.numProposals ?? 0;
  const isMerged = MERGE_RULES.includes(current.rule);
  const members = isMerged && current.members.length ? current.members : Array.from({ length: count }, (_, k) => k + 1);
  find("members").replaceChildren(
    ...Array.from({ length: count }, (_, k) =>
      element("button", { "aria-pressed": String(isMerged && members.includes(k + 1)), disabled: !isReady, title: `Proposal ${k + 1} takes part`, on: { click: () => toggleMember(k + 1) } }, String(k + 1)),
    ),
  );
  const rules = [["union", "Union", "U"], ["intersection", "Intersection", "I"], ["majority", "Majority", "J"], ["threshold", "At least …", "T"]];
  find("rules").replaceChildren(
    ...rules.map(([rule, label, key]) =>
      element("button", { "aria-pressed": String(current.rule === rule), "aria-keyshortcuts": key, disabled: !isReady || count < 2, on: { click: () => merge(rule) } }, label, element("kbd", {}, key)),
    ),
  );
  const isThreshold = current.rule === "threshold";
  find("threshold-row").hidden = !isThreshold;
  if (isThreshold) {
    const needed = Math.max(1, Math.ceil(current.threshold * members.length - 1e-6));
    Object.assign(find("threshold"), { max: members.length, value: needed });
    find("threshold-text").textContent = `${needed} of ${members.length}`;
  }
  find("picked").textContent = count ? describePick(current, count) : "nothing yet";
}

function renderDecided() {
  const { session, work } = state;
  const slices = work?.decidedSlices ?? [];
  const parts = [];
  if (work?.isVolumeAccepted) parts.push(`the whole volume (${Object.keys(work.state.volume).join(", ")})`);
  if (slices.length) parts.push(`${slices.length === 1 ? "slice" : "slices"} ${formatSlices(slices)}`);
  find("decided").textContent = parts.length ? `Accepted, not sent: ${parts.join(", with picks of their own on ")}` : "Nothing accepted yet.";
  find("submit").disabled = !work?.hasDecisions || state.isReadOnly;
  const label = session?.info.label;
  const extent = session?.info.annotated_slices;
  find("saved").textContent = label
    ? `Saved: ${extent === null ? "whole volume" : `${extent.length} slices`} · save ${label.sequence}${label.user ? ` by ${label.user}` : ""}, ${new Date(label.time).toLocaleString()}`
    : session
      ? "No saved label yet."
      : "";
  find("undo-save").hidden = !label || Boolean(work?.hasDecisions) || state.isReadOnly;
}

/** 3, 4, 5, 9 as "3–5, 9". */
function formatSlices(slices) {
  const parts = [];
  for (const z of [...slices].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === z - 1) last[1] = z;
    else parts.push([z, z]);
  }
  return parts.map(([from, to]) => (from === to ? String(from) : `${from}–${to}`)).join(", ");
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
    ...(work?.isDecided(z) ? [element("span", { className: "mark-decided" }, "✓ accepted, not sent\n")] : []),
    ...(session.isSaved(z) && session.info.label ? [element("span", { className: "mark-saved" }, "● saved")] : []),
  );
  find("corner-mode").replaceChildren(...renderLegend());
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

/** Thumbnails: consensus, every proposal, agreement, difference, absent. */
function renderStrip() {
  const { session } = state;
  const strip = find("strip");
  const result = session.result;
  if (!result || !state.work) {
    strip.replaceChildren(element("p", { className: "muted" }, session ? "Proposals appear here, side by side." : ""));
    delete strip.dataset.of;
    return;
  }
  const wanted = ["consensus", ...Array.from({ length: result.numProposals }, (_, k) => k + 1), "agreement", "difference", "nothing"];
  if (strip.dataset.of !== wanted.join()) {
    strip.dataset.of = wanted.join();
    strip.replaceChildren(...wanted.map(buildThumb));
  }
  const found = look(state.structure);
  for (const thumb of strip.children) paintThumb(thumb, found);
}

function buildThumb(kind) {
  const isProposal = typeof kind === "number";
  const names = { consensus: "Consensus", agreement: "Agreement", difference: "Difference", nothing: "Absent" };
  const keys = { consensus: "C", agreement: "H", difference: "D", nothing: "0" };
  const key = isProposal ? (kind <= MAX_KEY ? String(kind) : "") : keys[kind];
  const thumb = element(
    "button",
    { className: "thumb", role: "option", "aria-selected": "false", on: { click: () => chooseThumb(kind) } },
    element("canvas"),
    element("span", { className: "thumb-name" }, isProposal ? `Prop. ${kind}` : names[kind], key && element("kbd", {}, key)),
    element("span", { className: "thumb-note" }, "\u00a0"),
  );
  thumb.dataset.kind = kind;
  return thumb;
}

function chooseThumb(kind) {
  if (kind === "agreement" || kind === "difference") setMode(kind);
  else if (kind === "consensus" || kind === "nothing") pick(kind);
  else pick("proposal", [Number(kind)]);
}

function paintThumb(thumb, found) {
  const { session } = state;
  const { kind } = thumb.dataset;
  const number = Number(kind);
  const isMode = kind === "agreement" || kind === "difference";
  const current = currentPick();
  const isPicked = number ? current.rule === "proposal" && current.members[0] === number : current.rule === kind;
  thumb.setAttribute("aria-selected", String(isMode ? state.mode === kind : isPicked && state.mode === "pick"));
  const canvas = thumb.querySelector("canvas");
  const frame = found?.box
    ? draw.frameAround(found.box, session.height, session.width, session.spacing, 84 / 72)
    : draw.wholeSlice(session.height, session.width);
  draw.drawSlice(canvas, shown.grey, frame, session.spacing, found?.box ? thumbLayers(kind, found) : []);
  thumb.querySelector(".thumb-note").textContent = thumbNote(kind, found);
  thumb.title = number && found?.best === number - 1 ? "The most typical proposal: the others agree with it most" : "";
}

function thumbLayers(kind, found) {
  const color = colorOf(state.structure);
  if (kind === "agreement") return [draw.agreementLayer(found.masks, found.box)];
  if (kind === "difference") return [draw.differenceLayer(found.mask, drawPick(found.masks, comparedPick(found), found.best), found.box)];
  if (kind === "nothing") return [];
  const rule = Number(kind) ? { rule: "proposal", members: [Number(kind)] } : { rule: "consensus", members: [] };
  return [draw.maskLayer(drawPick(found.masks, rule, found.best), found.box, color, 0.18, 1.5)];
}

function thumbNote(kind, found) {
  const { session } = state;
  if (!found) return "…";
  const numbers = session.result.summary?.structures[state.structure];
  const number = Number(kind);
  const [dy, dx] = session.spacing;
  const area = (mask) => `${((countPixels(mask) * dy * dx) / 100).toFixed(1)} cm²`;
  if (number) return `${area(found.box ? found.masks[number - 1] : [])}${numbers?.best === number ? " ★" : ""}`;
  if (kind === "consensus") return found.box ? area(drawPick(found.masks, { rule: "consensus", members: [] }, found.best)) : "0.0 cm²";
  if (kind === "agreement") return "share";
  if (kind === "difference") return `to ${describePick(comparedPick(found), session.result.numProposals)}`;
  return "not here";
}

function setMode(mode) {
  startWaiting("proposal-switch");
  state.mode = state.mode === mode ? "pick" : mode;
  if (state.session) paint();
}

function setSavedShown(isShown) {
  state.isSavedShown = isShown;
  requestDraw();
}

function selectStructure(name) {
  if (name === state.structure) {
    toggleIncluded(name);
    return;
  }
  state.structure = name;
  state.compared = null;
  paint();
  renderPanel();
}

/** Structures that are left out are neither accepted nor called absent. */
function toggleIncluded(name) {
  if (state.included.has(name) && state.included.size > 1) state.included.delete(name);
  else state.included.add(name);
  paint();
  renderPanel();
}

function cycleStructure(step) {
  const names = state.session?.result?.structures ?? [];
  if (names.length) selectStructure(names[(names.indexOf(state.structure) + step + names.length) % names.length]);
}

function cyclePreset() {
  const { session } = state;
  if (!session) return;
  const presets = presetsFor(session.info);
  const next = presets[(presets.findIndex(({ name }) => name === state.preset) + 1) % presets.length];
  Object.assign(state, { window: next.window, preset: next.name });
  paint();
}

function setZoom(zoom, center = state.center) {
  state.zoom = Math.min(12, Math.max(1, zoom));
  state.center = state.zoom === 1 ? null : center;
  if (state.session) paint();
}

/** Fill the picture with the structure, or show the whole slice again. */
function toggleFit() {
  const found = state.session?.result && look(state.structure);
  if (state.zoom > 1 || !found?.box) {
    setZoom(1);
    return;
  }
  const { box } = found;
  const { session } = state;
  const share = Math.max((box.y1 - box.y0) / session.height, (box.x1 - box.x0) / session.width);
  setZoom(Math.max(1.2, 0.7 / share), [(box.y0 + box.y1) / 2, (box.x0 + box.x1) / 2]);
}

function setThreshold(step) {
  const current = currentPick();
  if (current.rule !== "threshold") {
    merge("threshold");
    return;
  }
  const size = current.members.length || state.session.result.numProposals;
  const needed = Math.min(size, Math.max(1, Math.round(current.threshold * size) + step));
  pick("threshold", current.members, needed / size);
}

function setScope(scope) {
  state.scope = scope;
  renderPanel();
}

const actions = {
  up: () => scrollBy(1),
  down: () => scrollBy(-1),
  farUp: () => scrollBy(10),
  farDown: () => scrollBy(-10),
  first: () => goTo(0),
  last: () => goTo(state.session?.depth ?? 0),
  disputed: () => {
    if (!goToDisputed(state.z)) toast("No other undecided slice with disagreement.");
  },
  proposal: (number) => number <= (state.session?.result?.numProposals ?? 0) && pick("proposal", [number]),
  compare: (number) => {
    if (number > (state.session?.result?.numProposals ?? 0)) return;
    state.compared = { rule: "proposal", members: [number], threshold: 0.5 };
    state.mode = "difference";
    startWaiting("proposal-switch");
    paint();
  },
  consensus: () => pick("consensus"),
  best: () => pick("best"),
  absent: () => pick("nothing"),
  union: () => merge("union"),
  intersection: () => merge("intersection"),
  majority: () => merge("majority"),
  threshold: () => merge("threshold"),
  lower: () => setThreshold(-1),
  higher: () => setThreshold(1),
  scope: () => setScope(state.scope === "slice" ? "volume" : "slice"),
  agreement: () => setMode("agreement"),
  difference: () => setMode("difference"),
  hide: () => ((state.isHidden = !state.isHidden), state.session && paint()),
  saved: () => setSavedShown(!state.isSavedShown),
  structure: () => cycleStructure(1),
  leaveOut: () => state.session?.result && toggleIncluded(state.structure),
  preset: cyclePreset,
  fit: toggleFit,
  zoomIn: () => setZoom(state.zoom * 1.25),
  zoomOut: () => setZoom(state.zoom / 1.25),
  acceptSlice,
  acceptVolume,
  skip,
  undo,
  submit,
  next: openNext,
  prompt: () => find("prompt").focus(),
  help: () => find("help").showModal(),
};

function scrollBy(step) {
  startWaiting("slice-switch");
  goTo(state.z + step);
}

// Listening

function onKey(event) {
  state.lastActive = Date.now();
  const isTyping = event.target instanceof HTMLInputElement && event.target.type !== "range";
  if (event.key === "Escape" && isTyping) {
    find("view").focus();
    return;
  }
  if (document.querySelector("dialog[open]") || event.altKey || event.metaKey) return;
  if (isTyping && !(event.ctrlKey && event.key === "Enter")) return;
  const isDigit = /^Digit[0-9]$/.test(event.code);
  if (isDigit && !event.ctrlKey && event.code !== "Digit0") {
    event.preventDefault();
    actions[event.shiftKey ? "compare" : "proposal"](Number(event.code.slice(5)));
    return;
  }
  const entry = KEYS.find(({ keys }) => keys.some((key) => matches(key, event)));
  // Enter and space press the button that has the focus.
  const isPress = event.target instanceof HTMLButtonElement && ["Enter", " "].includes(event.key) && !event.ctrlKey;
  if (!entry?.action || isPress) return;
  event.preventDefault();
  actions[entry.action]();
}

function matches(wanted, event) {
  const parts = wanted.split(" ");
  const key = parts.at(-1);
  const isLetter = /^[a-z]$/i.test(key);
  const isSame = isLetter ? event.key.toLowerCase() === key.toLowerCase() : event.key === key;
  const needsShift = parts.includes("Shift");
  // "?" and "+" need Shift on some keyboards and not on others.
  const isShiftRight = isLetter || key.length > 1 ? event.shiftKey === needsShift : true;
  return isSame && event.ctrlKey === parts.includes("Ctrl") && isShiftRight;
}

function listenToView() {
  const view = find("view");
  let drag = null;
  view.addEventListener("pointerdown", (event) => {
    view.focus({ preventScroll: true });
    view.setPointerCapture(event.pointerId);
    drag = { x: event.clientX, y: event.clientY, z: state.z, window: state.window, center: state.center, isTouch: event.pointerType === "touch", button: event.button };
  });
  view.addEventListener("pointermove", (event) => {
    if (!drag || !state.session) return;
    state.lastActive = Date.now();
    const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
    if (drag.isTouch) {
      goTo(drag.z + Math.round(-dy / 9));
    } else if ((drag.button === 1 || event.shiftKey) && shown.place && state.zoom > 1) {
      const ratio = window.devicePixelRatio || 1;
      const [y, x] = drag.center ?? [state.session.height / 2, state.session.width / 2];
      state.center = [y - (dy * ratio) / shown.place.scaleY, x - (dx * ratio) / shown.place.scaleX];
      paint();
    } else if (Math.abs(dx) + Math.abs(dy) > 2) {
      const [low, high] = drag.window;
      const span = Math.max(1e-6, (high - low) * Math.exp(dx / 300));
      const middle = (high + low) / 2 + (dy / 500) * (high - low);
      Object.assign(state, { window: [middle - span / 2, middle + span / 2], preset: "custom" });
      paint();
    }
  });
  for (const name of ["pointerup", "pointercancel"]) view.addEventListener(name, () => (drag = null));
  let wheel = 0;
  view.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      state.lastActive = Date.now();
      if (event.ctrlKey) {
        zoomAt(event);
        return;
      }
      wheel += Math.sign(event.deltaY) * Math.min(1, Math.abs(event.deltaY) / 40);
      const steps = Math.trunc(wheel);
      wheel -= steps;
      if (steps) scrollBy(-steps);
    },
    { passive: false },
  );
  const depth = find("depth");
  const jump = (event) => {
    if (!state.session || (event.type === "pointermove" && !event.buttons)) return;
    const box = depth.getBoundingClientRect();
    goTo(Math.floor((1 - (event.clientY - box.top) / box.height) * state.session.depth));
  };
  depth.addEventListener("pointerdown", (event) => (depth.setPointerCapture(event.pointerId), jump(event)));
  depth.addEventListener("pointermove", jump);
  find("scroll").addEventListener("input", (event) => goTo(Number(event.target.value)));
  new ResizeObserver(() => state.session && paint()).observe(find("view"));
}

/** Zoom so that the pixel under the pointer stays there. */
function zoomAt(event) {
  if (!shown.place) return;
  const view = find("view").getBoundingClientRect();
  const ratio = window.devicePixelRatio || 1;
  const factor = Math.exp(-event.deltaY / 300);
  const x = ((event.clientX - view.left) * ratio - shown.place.left) / shown.place.scaleX;
  const y = ((event.clientY - view.top) * ratio - shown.place.top) / shown.place.scaleY;
  const [cy, cx] = state.center ?? [state.session.height / 2, state.session.width / 2];
  const zoom = Math.min(12, Math.max(1, state.zoom * factor));
  const moved = 1 - state.zoom / zoom;
  setZoom(zoom, [cy + (y - cy) * moved, cx + (x - cx) * moved]);
}

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", () => (state.lastActive = Date.now()));
  listenToView();
  find("prompt-form").addEventListener("submit", runPrompt);
  find("job-cancel").addEventListener("click", () => state.job && api.cancelJob(state.job.id).catch(report));
  const buttons = { "accept-slice": acceptSlice, "accept-volume": acceptVolume, skip, undo, submit, "undo-save": undoSave, "help-open": actions.help };
  for (const [id, act] of Object.entries(buttons)) find(id).addEventListener("click", act);
  find("scope-slice").addEventListener("click", () => setScope("slice"));
  find("scope-volume").addEventListener("click", () => setScope("volume"));
  find("threshold").addEventListener("input", (event) => {
    const current = currentPick();
    const size = current.members.length || state.session.result.numProposals;
    pick("threshold", current.members, Number(event.target.value) / size);
  });
  find("versions-open").addEventListener("click", () => model.open());
  find("queue-toggle").addEventListener("click", (event) => {
    const isOpen = find("queue").classList.toggle("open");
    event.target.setAttribute("aria-expanded", String(isOpen));
  });
  api.watchConnection((isReachable) => {
    const dot = find("connection");
    dot.classList.toggle("lost", !isReachable);
    dot.title = isReachable ? "The server answers" : "The server does not answer";
  });
  setInterval(() => {
    const isActive = document.visibilityState === "visible" && Date.now() - state.lastActive < IDLE_SECONDS * 1000;
    if (isActive && state.work) state.work.addSeconds(1);
  }, 1000);
  window.addEventListener("hashchange", openFromAddress);
}

function fillKeys() {
  find("keys").replaceChildren(
    ...KEYS.filter(({ what }) => what).map(({ keys, show, what }) =>
      element("div", {}, element("span", {}, what), element("span", {}, ...(show ?? keys).map((key) => element("kbd", {}, key)))),
    ),
  );
}

async function fillPrompts() {
  try {
    const prompts = await api.listPrompts();
    const names = prompts.flatMap(({ structure, synonyms }) => [structure, ...synonyms.slice(0, 3)]);
    find("prompt-list").replaceChildren(...["all", ...names].map((name) => element("option", { value: name })));
  } catch (error) {
    report(error);
  }
}

function openFromAddress() {
  const image = new URLSearchParams(location.hash.slice(1)).get("image");
  if (image && image !== state.session?.image) openImage(image);
}

listen();
fillKeys();
render();
model.watch();
await Promise.all([queue.load(), fillPrompts()]);
openFromAddress();
