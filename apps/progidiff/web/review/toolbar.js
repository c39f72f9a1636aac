// The row of drawing tools over the picture.

import { element, find, findInput, toast } from "./dom.js";
import { icon } from "./icons.js";
import { presetsFor } from "./keys.js";
import { listStructures, shown, state, store } from "./state.js";
import { addStructure, copyTo, findBase, findSubject, interpolateBetween, reshape, startOver, takeSaved } from "./painting.js";
import { redoNext } from "./timeline.js";
import { toggleViews } from "./views.js";
import { canSteer, clearEdits } from "./steering.js";
import { CHANGES, STEER_TOOLS, TOOLS, findWindow, roundSize, stepSize } from "./tools.js";

/** @typedef {import("./tools.js").Tool} Tool */
/** @typedef {import("./tools.js").DrawAction} DrawAction */

const CHOOSES = "This model has no close-up: clicks choose among its proposals, and it does not draw by scribbles, boxes and loops.";

/** @param {Tool} tool the same again puts it down */
export function takeTool(tool) {
  const isTaken = state.tool !== tool;
  const steering = STEER_TOOLS.find((one) => one.tool === tool);
  if (isTaken && steering && steering.kind !== "click" && !state.session?.info.listens_to_edits) {
    toast(CHOOSES, "bad");
    return;
  }
  if (isTaken && !(steering ? canSteer() : findSubject())) return;
  store.set({ tool: isTaken ? tool : null });
}

/** @param {Partial<import("./tools.js").Settings>} change */
const set = (change) => store.set({ settings: { ...state.settings, ...change } });

/** @type {Record<DrawAction, () => unknown>} */
export const DRAW_ACTIONS = {
  brush: () => takeTool("brush"),
  eraser: () => takeTool("eraser"),
  lasso: () => takeTool("lasso"),
  range: () => takeTool("range"),
  flood: () => takeTool("flood"),
  plus: () => takeTool("plus"),
  minus: () => takeTool("minus"),
  scribbleIn: () => takeTool("scribbleIn"),
  scribbleOut: () => takeTool("scribbleOut"),
  boxIn: () => takeTool("boxIn"),
  lassoIn: () => takeTool("lassoIn"),
  clearEdits,
  noTool: () => store.set({ tool: null }),
  smaller: () => set({ size: stepSize(state.settings.size, -1) }),
  larger: () => set({ size: stepSize(state.settings.size, 1) }),
  fillHoles: () => reshape("fillHoles"),
  grow: () => reshape("grow"),
  shrink: () => reshape("shrink"),
  smooth: () => reshape("smooth"),
  copyUp: () => copyTo(1),
  copyDown: () => copyTo(-1),
  interpolate: interpolateBetween,
  fromSaved: takeSaved,
  startOver,
  redo: redoNext,
  views: toggleViews,
};

const OTHER = "\u0000other";
/** Whether a name is being typed. */
let isNaming = false;
/** The slider of the size goes by equal parts of it, from 0.1 to 400 mm. */
const SIZE_STEPS = 100;
const [LOW, SPAN] = [Math.log(0.5), Math.log(200 / 0.5)];

const CLEAR = /** @type {const} */ ({ tool: "clearEdits", name: "Remove clicks and lines", key: "Shift D", hint: "Remove the clicks and lines of this structure" });

/** @param {{tool: import("./tools.js").SteerTool|"clearEdits", name: string, key: string, hint: string}} tool */
const steerButton = ({ tool, name, key, hint }) =>
  element(
    "button",
    { id: `draw-${tool}`, className: "small steer", "aria-label": name, "aria-keyshortcuts": key, title: `${name} (${key}): ${hint}`, on: { click: () => DRAW_ACTIONS[tool]() } },
    icon(tool === "clearEdits" ? "clear" : tool),
  );

/** Put the controls there, once. */
export function buildToolbar() {
  const button = (/** @type {{name: string, key: string, hint: string, action: DrawAction}} */ { name, key, hint, action }) =>
    element("button", { id: `draw-${action}`, className: "small", title: `${hint} (${key})`, on: { click: () => DRAW_ACTIONS[action]() } }, name, element("kbd", {}, key));
  find("tools").replaceChildren(
    element(
      "span",
      { className: "tool-group" },
      element("label", { htmlFor: "draw-structure" }, "Draw"),
      element("select", { id: "draw-structure", title: "What is drawn", on: { change: chooseStructure } }),
      element(
        "form",
        { id: "draw-name-form", hidden: true, on: { submit: nameStructure } },
        element("input", { id: "draw-name", placeholder: "name of a structure", maxLength: 64, autocomplete: "off", "aria-label": "Name of the structure to draw" }),
        element("button", { className: "small" }, "Draw it"),
      ),
    ),
    element("span", { className: "tool-group", role: "group", "aria-label": "Tools" }, ...TOOLS.map((tool) => button({ ...tool, action: tool.tool }))),
    element("span", { id: "draw-steer", className: "tool-group", role: "group", "aria-label": "Steer" }, element("span", {}, "Steer"), ...STEER_TOOLS.map(steerButton), steerButton(CLEAR)),
    element(
      "label",
      { className: "tool-group", id: "draw-size-row", title: "Size of the brush (, and .)" },
      element("span", {}, "size ", element("output", { id: "draw-size-text" })),
      element("input", { id: "draw-size", type: "range", min: "0", max: String(SIZE_STEPS), on: { input: readSize } }),
    ),
    element(
      "span",
      { className: "tool-group", id: "draw-window", title: "Intensities that the threshold brush draws" },
      element("input", { id: "draw-low", type: "number", "aria-label": "Lowest intensity", on: { change: readWindow } }),
      "to",
      element("input", { id: "draw-high", type: "number", "aria-label": "Highest intensity", on: { change: readWindow } }),
      element("button", { className: "small", title: "The middle nine tenths of what is drawn on this slice", on: { click: takeWindow } }, "As drawn"),
    ),
    element(
      "details",
      { className: "tool-menu", id: "draw-more" },
      element("summary", {}, "Change"),
      element(
        "div",
        { className: "tool-list" },
        element(
          "label",
          { className: "tool-amount" },
          "by",
          element("input", { id: "draw-amount", type: "number", min: "0.1", max: "50", step: "any", "aria-label": "How far", on: { change: readAmountInput } }),
          element(
            "select",
            { id: "draw-unit", "aria-label": "Unit", on: { change: readAmountInput } },
            element("option", { value: "px" }, "px"),
            element("option", { value: "mm" }, "mm"),
          ),
        ),
        ...CHANGES.map((change) => button({ ...change, action: change.change })),
      ),
    ),
    element("span", { className: "tool-group" }, element("button", { id: "draw-redo", className: "small", title: "Redo (Shift Z)", on: { click: redoNext } }, "Redo", element("kbd", {}, "Shift Z"))),
    element(
      "span",
      { className: "tool-group tools-end" },
      element("label", { title: "Opacity of masks" }, "opacity ", element("input", { id: "opacity", type: "range", min: "0", max: "100", on: { input: readOpacity } })),
      element("button", { id: "draw-views", className: "small", title: "Coronal and sagittal plane and the surface (Shift V)", on: { click: toggleViews } }, "Planes"),
      element("select", { id: "window-preset", title: "Window (W)", "aria-label": "Window", on: { change: choosePreset } }),
    ),
  );
}

/** Show what the state says. */
export function renderToolbar() {
  const { session, tool, settings, drawing } = state;
  find("tools").hidden = !session;
  if (!session) return;
  find("view").classList.toggle("drawing", Boolean(tool));
  for (const { tool: name } of TOOLS) find(`draw-${name}`).setAttribute("aria-pressed", String(tool === name));
  for (const id of [...TOOLS.map(({ tool: name }) => name), ...CHANGES.map(({ change }) => change)]) {
    find(`draw-${id}`, HTMLButtonElement).disabled = !drawing || state.isReadOnly || !state.structure;
  }
  renderSteering(session);
  find("draw-size-row").hidden = tool === "lasso" || tool === "flood";
  findInput("draw-size").value = String(Math.round(((Math.log(settings.size) - LOW) / SPAN) * SIZE_STEPS));
  find("draw-size-text").textContent = `${settings.size} ${session.picture ? "px" : "mm"}`;
  find("draw-window").hidden = tool !== "range";
  findInput("draw-low").value = String(round(settings.low));
  findInput("draw-high").value = String(round(settings.high));
  findInput("draw-amount").value = String(settings.amount);
  find("draw-unit", HTMLSelectElement).value = settings.unit;
  findInput("opacity").value = String(Math.round(state.opacity * 100));
  find("draw-views").setAttribute("aria-pressed", String(state.areViewsShown));
  for (const id of ["draw-views", "draw-copyUp", "draw-copyDown", "draw-interpolate", "draw-unit", "window-preset"]) find(id).classList.add("of-volumes");
  findInput("draw-name").setAttribute("list", session.picture ? "class-list" : "prompt-list"); // The property is read-only.
  renderNames();
  renderPresets(session);
}

/** @param {import("./session.js").ImageSession} session */
function renderSteering(session) {
  const { tool, edits, structure } = state;
  find("draw-steer").hidden = Boolean(session.picture);
  const listens = session.info.listens_to_edits;
  for (const { tool: name, kind } of STEER_TOOLS) {
    const button = find(`draw-${name}`, HTMLButtonElement);
    button.setAttribute("aria-pressed", String(tool === name));
    button.disabled = state.isReadOnly || !structure || !(listens || kind === "click");
  }
  find("draw-clearEdits", HTMLButtonElement).disabled = state.isReadOnly || !edits?.of(structure).length;
  const isSteering = STEER_TOOLS.some(({ tool: name }) => name === tool);
  find("steer-note").hidden = listens || !isSteering;
  find("steer-note").textContent = CHOOSES;
}

/** Of intensities, as many digits as are of use. @param {number} value */
const round = (value) => Number(value.toPrecision(4));

function renderNames() {
  const names = listStructures();
  const select = find("draw-structure", HTMLSelectElement);
  const wanted = [...names, OTHER];
  if ([...select.options].map(({ value }) => value).join("\n") !== wanted.join("\n")) {
    select.replaceChildren(...names.map((name) => element("option", { value: name }, name)), element("option", { value: OTHER }, names.length ? "another …" : "name one …"));
  }
  // With none chosen the list stands on "another …", which cannot be chosen once more: the field is there at once.
  const isChosen = names.includes(state.structure) && !isNaming;
  find("draw-name-form").hidden = isChosen;
  select.value = isChosen ? state.structure : OTHER;
}

/** @param {import("./session.js").ImageSession} session */
function renderPresets(session) {
  const presets = presetsFor(session.info);
  const names = [...presets.map(({ name }) => name), "custom"];
  const select = find("window-preset", HTMLSelectElement);
  if ([...select.options].map(({ value }) => value).join("\n") !== names.join("\n")) select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
  select.value = names.includes(state.preset) ? state.preset : "custom";
}

function chooseStructure() {
  const { value } = find("draw-structure", HTMLSelectElement);
  isNaming = value === OTHER;
  renderNames();
  if (isNaming) findInput("draw-name").focus();
  else store.set({ structure: value, compared: null });
}

/** @param {Event} event */
function nameStructure(event) {
  event.preventDefault();
  const input = findInput("draw-name");
  addStructure(input.value);
  input.value = "";
  isNaming = false;
  renderNames();
  find("view").focus();
}

function readSize() {
  set({ size: roundSize(Math.exp(LOW + (SPAN * Number(findInput("draw-size").value)) / SIZE_STEPS)) });
}

function readWindow() {
  const [low, high] = [Number(findInput("draw-low").value), Number(findInput("draw-high").value)];
  set({ low: Math.min(low, high), high: Math.max(low, high) });
}

function takeWindow() {
  const subject = findSubject();
  const base = subject && findBase(subject);
  if (!base || !shown.pixels) return;
  const found = findWindow(shown.pixels, base.mask, subject.session.info.scale);
  if (found) set({ low: found[0], high: found[1] });
  else toast("Nothing is drawn on this slice to take intensities from.", "bad");
}

function readAmountInput() {
  const amount = Number(findInput("draw-amount").value);
  set({ amount: amount > 0 ? Math.min(50, amount) : state.settings.amount, unit: find("draw-unit", HTMLSelectElement).value === "mm" ? "mm" : "px" });
}

function readOpacity() {
  store.set({ opacity: Number(findInput("opacity").value) / 100 });
}

function choosePreset() {
  const { session } = state;
  const preset = session && presetsFor(session.info).find(({ name }) => name === find("window-preset", HTMLSelectElement).value);
  if (preset) store.set({ window: preset.window, preset: preset.name });
}
