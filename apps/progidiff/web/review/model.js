// The model: what is running, which versions there are and how good they are, and the way back to an earlier one.

import * as api from "./api.js";
import { clearNotice, element, find, notice, toast } from "./dom.js";
import { state, store } from "./state.js";

/** @typedef {import("../answers.d.ts").Adapter} Adapter */
/** @typedef {import("../answers.d.ts").Version} Version */
/** @typedef {import("../answers.d.ts").Training} Training */
/** @typedef {import("../answers.d.ts").Scoring} Scoring */

const WATCH_MS = 10000;

export class ModelPanel {
  /** @type {Training|null} */
  #training = null;
  /** @type {Scoring|null} */
  #scoring = null;
  #wasRunning = false;
  /** @type {Set<string>} images that a training is to hold back; empty to let the server choose */
  #heldOut = new Set();

  /** Keep the line in the bar up to date while somebody looks at the page. */
  watch() {
    const tick = async () => {
      if (document.visibilityState === "visible") await this.#refresh();
      setTimeout(tick, WATCH_MS);
    };
    tick();
  }

  async open() {
    const dialog = find("versions", HTMLDialogElement);
    find("versions-body").replaceChildren(element("p", { className: "muted" }, "Loading …"));
    if (!dialog.open) dialog.showModal();
    await this.#refresh();
    try {
      this.#render(await api.listVersions());
    } catch (error) {
      find("versions-body").replaceChildren(...this.#renderProgress(), element("p", { className: "block" }, api.messageOf(error)));
    }
  }

  /** A training that was under way and ended says how, wherever somebody looks. */
  #tellEnd() {
    const wasRunning = this.#wasRunning;
    this.#wasRunning = Boolean(this.#training?.running);
    if (!wasRunning || this.#wasRunning || !this.#training) return;
    const isGood = this.#training.state === "done";
    notice(describeTraining(this.#training), isGood ? "" : "bad", [
      ["Versions", () => (clearNotice(), void this.open())],
      ["Close", clearNotice],
    ]);
  }

  async #refresh() {
    [this.#training, this.#scoring] = await Promise.all([askOrNull(api.getTraining), askOrNull(api.getScoring)]);
    this.#tellEnd();
    noteLeftOut(this.#scoring?.left_out ?? []);
    store.set({ scoring: this.#scoring });
    const running = this.#training?.running ? describeTraining(this.#training) : "";
    find("activity").textContent = [running, describeScoring(this.#scoring)].filter(Boolean).join(" · ");
  }

  #renderProgress() {
    const training = this.#training;
    /** @type {HTMLElement[]} */
    const parts = [element("p", { className: "block" }, describeTraining(training) || "No training was started yet.")];
    if (training?.running && training.total) parts.push(element("progress", { max: training.total, value: training.step }));
    const scoring = describeScoring(this.#scoring);
    if (scoring) parts.push(element("p", { className: "block muted" }, scoring));
    return parts;
  }

  /** What a training is to hold back, and the button that starts or stops it. */
  #renderTrain() {
    const isRunning = Boolean(this.#training?.running);
    const { session } = state;
    // Pictures and volumes have models of their own: the one for what is open is trained.
    const isPicture = Boolean(session?.picture);
    const labelled = (state.worklist?.entries ?? []).filter(
      ({ image, annotated, modality }) => Object.keys(annotated).length && (modality === "picture" || (isPicture && image === session?.image)) === isPicture,
    );
    const boxes = labelled.map(({ image, annotated }) => {
      const turn = () => void (this.#heldOut.delete(image) || this.#heldOut.add(image));
      const box = element("input", { type: "checkbox", checked: this.#heldOut.has(image), on: { change: turn } });
      return element("li", {}, element("label", {}, box, element("span", {}, image, element("small", {}, Object.keys(annotated).join(", ")))));
    });
    const problem = element("p", { className: "prompt-error", role: "alert", hidden: true });
    const button = element("button", { className: isRunning ? "" : "primary", on: { click: () => this.#train(isRunning, problem) } }, isRunning ? "Stop the training" : isPicture ? "Train on the labelled pictures" : "Train on the labels");
    const choice = element(
      "details",
      { className: "kept" },
      element("summary", {}, "Hold back for the check (none ticked: the server chooses)"),
      element("ul", { className: "held-out" }, ...boxes),
    );
    return element("section", { className: "block train" }, !isRunning && labelled.length > 0 && choice, button, problem);
  }

  /**
   * @param {boolean} isRunning
   * @param {HTMLElement} problem
   */
  async #train(isRunning, problem) {
    try {
      if (isRunning) await api.stopTraining();
      else await this.#startTraining();
      toast(isRunning ? "The training stops after a clean checkpoint." : "The training has started. Its version is served if it is better on what is held back.", "good", 6);
      await this.open();
    } catch (error) {
      problem.textContent = api.messageOf(error);
      problem.hidden = false;
    }
  }

  /** Train the model that is asked about what is open. */
  #startTraining() {
    const heldOut = this.#heldOut.size ? { held_out: [...this.#heldOut] } : {};
    const { session } = state;
    if (!session?.picture) return api.startTraining("progidiff_adapt", heldOut);
    return api.startTraining("textdiff", { ...heldOut, ...(session.head ? { name: session.head.name } : {}) });
  }

  /** @param {Adapter[]} adapters */
  #render(adapters) {
    find("versions-body").replaceChildren(
      ...this.#renderProgress(),
      this.#renderTrain(),
      ...(adapters.length ? adapters.map((adapter) => this.#renderAdapter(adapter)) : [element("p", { className: "block" }, "No adapter yet: every image gets the base model.")]),
    );
  }

  /** @param {Adapter} adapter */
  #renderAdapter(adapter) {
    const isHead = adapter.trainer === "textdiff";
    const none = isHead ? "none is served" : "none is served: images get the base model";
    const served = adapter.current ? `version ${adapter.current} is served` : none;
    const rows = [...adapter.versions].reverse().map((version) => this.#renderVersion(adapter, version));
    const head = element("tr", {}, ...["Version", "For", "Dice, held back", "Verdict", ""].map((name) => element("th", {}, name)));
    const back = () => this.#change(() => api.rollBack(adapter.name));
    return element(
      "section",
      { className: "block" },
      element(
        "div",
        { className: "queue-head" },
        element("h2", {}, `${isHead ? "Picture model" : "Adapter"} ${adapter.name}: ${served}`),
        element("button", { className: "small", disabled: !adapter.current, on: { click: back } }, "Roll back"),
      ),
      adapter.problem && element("p", { className: "prompt-error" }, adapter.problem),
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
    );
  }

  /**
   * @param {Adapter} adapter
   * @param {Version} version
   */
  #renderVersion(adapter, version) {
    const [base, adapted] = [version.dice?.base?.consensus, version.dice?.adapted?.consensus].map((value) => (typeof value === "number" ? value.toFixed(3) : "–"));
    const use = () => this.#change(() => api.useVersion(adapter.name, version.version));
    const created = version.created ? new Date(version.created).toLocaleDateString() : "";
    return element(
      "tr",
      {},
      element("td", {}, String(version.version), element("div", { className: "muted" }, created)),
      element("td", {}, version.modality, element("div", { className: "muted" }, (version.structures ?? []).join(", "))),
      element("td", { className: "number" }, `${base} → ${adapted}`),
      element("td", {}, version.problem || version.verdict),
      element(
        "td",
        {},
        version.version === adapter.current
          ? element("span", { className: "tag done" }, "served")
          : element("button", { className: "small", disabled: !version.fits, on: { click: use } }, "Use"),
      ),
    );
  }

  /** @param {() => Promise<import("../answers.d.ts").Served>} request */
  async #change(request) {
    try {
      const { served } = await request();
      toast(served ? `${served} is served from the next prompt on.` : "The base model is served from the next prompt on.", "good");
    } catch (error) {
      toast(api.messageOf(error), "bad", 7);
    }
    await this.open();
  }
}

/**
 * @template T
 * @param {() => Promise<T>} request
 * @returns {Promise<T|null>}
 */
async function askOrNull(request) {
  try {
    return await request();
  } catch {
    return null; // Not offered by this server, or not now; a lost server shows in the bar by itself.
  }
}

/** @param {readonly import("../answers.d.ts").LeftOut[]} leftOut */
function noteLeftOut(leftOut) {
  if (JSON.stringify(leftOut) !== JSON.stringify(state.leftOut)) store.set({ leftOut });
}

/** @param {Training|null} training */
function describeTraining(training) {
  if (!training || training.state === "idle") return "";
  const { running, step = 0, total = 0, eta_seconds: eta } = training;
  const share = running && total ? ` ${Math.round((100 * step) / total)} %` : "";
  const left = running && eta ? `, about ${Math.max(1, Math.round(eta / 60))} min left` : "";
  return `Training ${training.trainer ?? ""}: ${training.state}${share}${left}. ${training.reason || training.message || ""}`.trim();
}

/** @param {Scoring|null} scoring */
function describeScoring(scoring) {
  if (!scoring || scoring.state === "off" || !scoring.images) return "";
  return `${scoring.scored} of ${scoring.images} images scored${scoring.image ? `, now ${scoring.image}` : ""}`;
}
