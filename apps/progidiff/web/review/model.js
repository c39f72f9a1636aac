// The model: what is running, which versions there are and how good they are, and the way back to an earlier one.

import * as api from "./api.js";
import { element, find, toast } from "./dom.js";

const WATCH_MS = 10000;

export class ModelPanel {
  #training = null;
  #scoring = null;

  /** Keep the line in the bar up to date while somebody looks at the page. */
  watch() {
    const tick = async () => {
      if (document.visibilityState === "visible") await this.#refresh();
      setTimeout(tick, WATCH_MS);
    };
    tick();
  }

  async open() {
    find("versions-body").replaceChildren(element("p", { className: "muted" }, "Loading …"));
    if (!find("versions").open) find("versions").showModal();
    await this.#refresh();
    try {
      this.#render(await api.getVersions());
    } catch (error) {
      find("versions-body").replaceChildren(...this.#renderProgress(), element("p", { className: "block" }, error.message));
    }
  }

  async #refresh() {
    const ask = async (request) => {
      try {
        return await request();
      } catch {
        return null; // Not offered by this server, or not now; a lost server shows in the bar by itself.
      }
    };
    [this.#training, this.#scoring] = await Promise.all([ask(api.getTraining), ask(api.getScoring)]);
    const running = this.#training?.running ? describeTraining(this.#training) : "";
    find("activity").textContent = [running, describeScoring(this.#scoring)].filter(Boolean).join(" · ");
  }

  #renderProgress() {
    const training = this.#training;
    const parts = [element("p", { className: "block" }, describeTraining(training) || "No training was started yet.")];
    if (training?.running && training.total) parts.push(element("progress", { max: training.total, value: training.step }));
    const scoring = describeScoring(this.#scoring);
    if (scoring) parts.push(element("p", { className: "block muted" }, scoring));
    return parts;
  }

  #render(adapters) {
    find("versions-body").replaceChildren(
      ...this.#renderProgress(),
      ...(adapters.length ? adapters.map((adapter) => this.#renderAdapter(adapter)) : [element("p", { className: "block" }, "No adapter yet: every image gets the base model.")]),
    );
  }

  #renderAdapter(adapter) {
    const served = adapter.current ? `version ${adapter.current} is served` : "none is served: images get the base model";
    const rows = [...adapter.versions].reverse().map((version) => this.#renderVersion(adapter, version));
    const head = element("tr", {}, ...["Version", "For", "Dice, held back", "Verdict", ""].map((name) => element("th", {}, name)));
    const back = element(
      "button",
      { className: "small", disabled: !adapter.current, on: { click: () => this.#change(`progidiff/versions/${encodeURIComponent(adapter.name)}/rollback`) } },
      "Roll back",
    );
    return element(
      "section",
      { className: "block" },
      element("div", { className: "queue-head" }, element("h2", {}, `Adapter ${adapter.name}: ${served}`), back),
      adapter.problem ? element("p", { className: "prompt-error" }, adapter.problem) : null,
      element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)),
    );
  }

  #renderVersion(adapter, version) {
    const isServed = version.version === adapter.current;
    const dice = [version.dice?.base?.consensus, version.dice?.adapted?.consensus].map((value) => (typeof value === "number" ? value.toFixed(3) : "–"));
    const path = `progidiff/versions/${encodeURIComponent(adapter.name)}/${version.version}/use`;
    const use = isServed
      ? element("span", { className: "tag done" }, "served")
      : element("button", { className: "small", disabled: !version.fits, on: { click: () => this.#change(path) } }, "Use");
    return element(
      "tr",
      {},
      element("td", {}, `${version.version}`, element("div", { className: "muted" }, new Date(version.created).toLocaleDateString())),
      element("td", {}, `${version.modality}`, element("div", { className: "muted" }, version.structures.join(", "))),
      element("td", { className: "number" }, `${dice[0]} → ${dice[1]}`),
      element("td", {}, version.problem || version.verdict),
      element("td", {}, use),
    );
  }

  async #change(path) {
    try {
      const answer = await api.postJson(path);
      toast(answer.served ? `${answer.served} is served from the next prompt on.` : "The base model is served from the next prompt on.", "good");
    } catch (error) {
      toast(error.message, "bad", 7);
    }
    await this.open();
  }
}

function describeTraining(training) {
  if (!training || training.state === "idle") return "";
  const share = training.running && training.total ? ` ${Math.round((100 * training.step) / training.total)} %` : "";
  const left = training.running && training.eta_seconds ? `, about ${Math.max(1, Math.round(training.eta_seconds / 60))} min left` : "";
  return `Training ${training.trainer ?? ""}: ${training.state}${share}${left}. ${training.reason || training.message || ""}`.trim();
}

function describeScoring(scoring) {
  if (!scoring || scoring.state === "off" || !scoring.images) return "";
  return `${scoring.scored} of ${scoring.images} images scored${scoring.image ? `, now ${scoring.image}` : ""}`;
}
