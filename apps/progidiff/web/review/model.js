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
    find("versions").showModal();
    find("versions-body").replaceChildren(element("p", { className: "muted" }, "Loading …"));
    await this.#refresh();
    try {
      this.#render(await api.getVersions());
    } catch (error) {
      find("versions-body").replaceChildren(...this.#renderProgress(), element("p", {}, error.message));
    }
  }

  async #refresh() {
    const ask = async (request) => {
      try {
        return await request();
      } catch {
        return null; // Not offered by this server, or not now; the notice about a lost server comes from elsewhere.
      }
    };
    [this.#training, this.#scoring] = await Promise.all([ask(api.getTraining), ask(api.getScoring)]);
    find("activity").textContent = [describeTraining(this.#training), describeScoring(this.#scoring)].filter(Boolean).join(" · ");
  }

  #renderProgress() {
    const lines = [describeTraining(this.#training) || "No training is running.", describeScoring(this.#scoring)].filter(Boolean);
    return lines.map((line) => element("p", { className: "block" }, line));
  }

  #render(versions) {
    find("versions-body").replaceChildren(...this.#renderProgress(), ...versions.map((entry) => this.#renderVersions(entry)));
  }

  #renderVersions(entry) {
    return element("p", {}, JSON.stringify(entry));
  }
}

function describeTraining(training) {
  return training ? String(training.state ?? "") : "";
}

function describeScoring(scoring) {
  if (!scoring || scoring.state === "off") return "";
  return `${scoring.scored} of ${scoring.images} images scored${scoring.state === "scoring" ? ` (${scoring.image})` : ""}`;
}
