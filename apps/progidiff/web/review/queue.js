// The list of images to review, with the reason for each and the slices worth looking at.

import * as api from "./api.js";
import { element, find } from "./dom.js";
import { listUnsent } from "./work.js";

export class Queue {
  #entries = [];
  #current = null;
  #isDecided = () => false;
  #disputed = [];
  #onOpen;
  #onSlice;

  constructor(onOpen, onSlice) {
    this.#onOpen = onOpen;
    this.#onSlice = onSlice;
    find("queue-refresh").addEventListener("click", () => this.load());
  }

  async load() {
    try {
      this.#entries = await api.listQueue();
      find("queue-note").textContent = this.#entries.length ? "Most disputed first" : "No image is waiting.";
    } catch (error) {
      find("queue-note").textContent = error.message;
    }
    this.render();
  }

  /** `disputed`: slices to list where the server's queue names none. */
  setCurrent(image, isDecided, disputed) {
    this.#current = image;
    this.#disputed = disputed;
    this.#isDecided = isDecided;
    this.render();
  }

  /** The image after the current one; null at the end. */
  next() {
    const place = this.#entries.findIndex(({ image }) => image === this.#current);
    const others = [...this.#entries.slice(place + 1), ...this.#entries.slice(0, Math.max(place, 0))];
    return others.find((entry) => !entry.reserved_by && entry.image !== this.#current)?.image ?? null;
  }

  render() {
    const unsent = new Set(listUnsent());
    const known = new Set(this.#entries.map(({ image }) => image));
    const entries = [...this.#entries];
    // An image that left the queue meanwhile may still have work of this person.
    for (const image of [...unsent, this.#current]) {
      if (image && !known.has(image)) {
        known.add(image);
        entries.unshift({ image, slices: [], reason: "", state: "" });
      }
    }
    find("queue-list").replaceChildren(...entries.map((entry) => this.#renderEntry(entry, unsent.has(entry.image))));
  }

  #renderEntry(entry, isUnsent) {
    const isCurrent = entry.image === this.#current;
    const state = isUnsent ? ["unsent", "not sent"] : entry.reserved_by ? ["", `with ${entry.reserved_by}`] : entry.state ? ["", entry.state] : null;
    const button = element(
      "button",
      { className: "case", "aria-current": String(isCurrent), on: { click: () => this.#onOpen(entry.image) } },
      element("span", { className: "case-name" }, entry.image, state && element("span", { className: `tag ${state[0]}` }, state[1])),
      element("span", { className: "case-why" }, [entry.modality, entry.reason].filter(Boolean).join(" · ") || "not scored yet"),
    );
    const slices = isCurrent ? (entry.slices?.length ? entry.slices : this.#disputed) : [];
    return element("li", {}, button, slices.length ? element("div", { className: "slices" }, ...slices.map((slice) => this.#renderSlice(slice))) : null);
  }

  #renderSlice(slice) {
    const why = [slice.reason, (slice.structures ?? []).join(", ")].filter(Boolean).join(": ");
    return element(
      "button",
      { className: `small${this.#isDecided(slice.index) ? " decided" : ""}`, title: why, on: { click: () => this.#onSlice(slice.index) } },
      `z ${slice.index}`,
    );
  }
}
