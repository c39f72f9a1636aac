// The review page: every key and button changes the state, and what is shown follows from it.

import * as api from "./api.js";
import { clearNotice, element, find, notice, toast } from "./dom.js";
import { onBack, report } from "./failures.js";
import { KEYS, presetsFor } from "./keys.js";
import { MERGE_RULES, countStructures } from "./masks.js";
import { ModelPanel } from "./model.js";
import { onDecide, render, renderPanel } from "./panel.js";
import { listenToView } from "./pointer.js";
import { Queue } from "./queue.js";
import { ImageSession } from "./session.js";
import { paint, requestDraw, showEmpty } from "./stage.js";
import { chosenStructures, currentPick, findDisputed, isDrawnHere, isSliceDone, listDisputed, look, shown, startWaiting, state, stopWaiting } from "./state.js";
import { onChoose } from "./strip.js";
import { TabGuard, Work, forgetWork, loadWork } from "./work.js";

const POLL_MS = 300;
const IDLE_SECONDS = 60;

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
    stopWaiting("first-proposal", false);
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

// Going from slice to slice

function goTo(z) {
  const { session } = state;
  if (!session) return;
  state.z = Math.min(session.depth - 1, Math.max(0, z));
  requestDraw();
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

function undo() {
  if (!state.work || state.isReadOnly) return;
  const undone = state.work.undo();
  if (undone) {
    toast(`Undone: ${undone.what}`, "", 2);
    if (undone.z !== null) goTo(undone.z);
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

/** The server is back after it was gone. */
async function offerAgain() {
  if (state.work?.hasDecisions) notice("The server is back. Your decisions are still here.", "", [["Submit now", submit], ["Later", clearNotice]]);
  await queue.load();
  requestDraw();
}

async function openNext() {
  await queue.load();
  const image = queue.next();
  if (image) await openImage(image);
  else toast("No other image is waiting.");
}

function chooseThumb(kind) {
  if (kind === "agreement" || kind === "difference") setMode(kind);
  else if (kind === "consensus" || kind === "nothing") pick(kind);
  else pick("proposal", [Number(kind)]);
}

// How it is looked at

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

// Keys and buttons

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

function listen() {
  document.addEventListener("keydown", onKey);
  document.addEventListener("pointerdown", () => (state.lastActive = Date.now()));
  listenToView({ goTo, scrollBy, setZoom });
  onChoose(chooseThumb);
  onDecide({ selectStructure, toggleMember, merge });
  onBack(offerAgain);
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
