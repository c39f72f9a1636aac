// The list of images to review, with the reason for each and the slices worth looking at.

import { listQueue, messageOf } from "./api.js";
import { element, find } from "./dom.js";
import { nameSlice } from "./slices.js";
import { isSliceDone, listDisputed, state } from "./state.js";
import { listUnsent } from "./work.js";

/** @typedef {import("../answers.d.ts").QueueEntry} QueueEntry */

/** Files of the folder that nobody should look for in vain, and what to do about each. */
export function renderLeftOut() {
  const { leftOut } = state;
  find("left-out").hidden = leftOut.length === 0;
  find("left-out-title").textContent = leftOut.length === 1 ? "1 file is not served" : `${leftOut.length} files are not served`;
  find("left-out-list").replaceChildren(...leftOut.map(({ name, reason }) => element("li", {}, element("strong", {}, name), ` ${reason}`)));
}

export class Queue {
  /** @type {QueueEntry[]} */
  #entries = [];
  /** @type {string|null} the image that was opened last; it keeps its place here when another one cannot be opened */
  #current = null;
  #onOpen;
  #onSlice;

  /**
   * @param {(image: string) => void} onOpen
   * @param {(z: number) => void} onSlice
   */
  constructor(onOpen, onSlice) {
    this.#onOpen = onOpen;
    this.#onSlice = onSlice;
    find("queue-refresh").addEventListener("click", () => this.load());
  }

  async load() {
    try {
      this.#entries = await listQueue();
      find("queue-note").textContent = this.#entries.length ? "Most disputed first" : "No image is waiting.";
    } catch (error) {
      find("queue-note").textContent = messageOf(error);
    }
    this.render();
  }

  /**
   * The slices of an image that the strategy chose, best first.
   * @param {string} image
   */
  slicesOf(image) {
    return this.#entries.find((entry) => entry.image === image)?.slices ?? [];
  }

  /** The image after the current one; null at the end. */
  next() {
    const place = this.#entries.findIndex(({ image }) => image === this.#current);
    const others = [...this.#entries.slice(place + 1), ...this.#entries.slice(0, Math.max(place, 0))];
    return others.find((entry) => !entry.reserved_by && entry.image !== this.#current)?.image ?? null;
  }

  render() {
    this.#current = state.session?.image ?? this.#current;
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

  /**
   * @param {QueueEntry} entry
   * @param {boolean} isUnsent
   */
  #renderEntry(entry, isUnsent) {
    const isCurrent = entry.image === this.#current;
    const mark = isUnsent ? "not sent" : entry.reserved_by ? `with ${entry.reserved_by}` : entry.state;
    const button = element(
      "button",
      { className: "case", "aria-current": String(isCurrent), on: { click: () => this.#onOpen(entry.image) } },
      element("span", { className: "case-name" }, entry.image, mark && element("span", { className: `tag ${isUnsent ? "unsent" : ""}` }, mark)),
      element("span", { className: "case-why" }, [entry.modality, entry.reason].filter(Boolean).join(" · ") || "not scored yet"),
    );
    const slices = isCurrent ? (entry.slices?.length ? entry.slices : listDisputed()) : [];
    return element("li", {}, button, slices.length > 0 && element("div", { className: "slices" }, ...slices.map((slice) => this.#renderSlice(slice))));
  }

  /** @param {import("../answers.d.ts").QueueSlice} slice */
  #renderSlice(slice) {
    const why = [slice.reason, (slice.structures ?? []).join(", ")].filter(Boolean).join(": ");
    return element(
      "button",
      { className: `small${isSliceDone(slice.index) ? " decided" : ""}`, title: why, on: { click: () => this.#onSlice(slice.index) } },
      String(nameSlice(slice.index)),
    );
  }
}
