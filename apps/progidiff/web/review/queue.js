// The images as a list of work: to do, started, done, with the reason for each and the slices worth looking at.

import { listWork, messageOf } from "./api.js";
import { element, find, findButton, findInput } from "./dom.js";
import { nameSlice } from "./slices.js";
import { isSliceDone, listDisputed, state, store } from "./state.js";
import { listUnsent } from "./work.js";

/** @typedef {import("../answers.d.ts").WorkEntry} WorkEntry */
/** @typedef {import("../answers.d.ts").Worklist} Worklist */
/** @typedef {"all"|"todo"|"started"|"done"} Filter */

const PAGE = 50;
const TYPING_MS = 250;
/** @type {readonly [filter: Filter, label: string][]} */
const FILTERS = [
  ["todo", "To do"],
  ["started", "Started"],
  ["done", "Done"],
  ["all", "All"],
];
/** @type {Record<string, string>} */
const STATES = { todo: "", started: "started", done: "done" };

/** Files of the folder that nobody should look for in vain, and what to do about each. */
export function renderLeftOut() {
  const { leftOut } = state;
  find("left-out").hidden = leftOut.length === 0;
  find("left-out-title").textContent = leftOut.length === 1 ? "1 file is not served" : `${leftOut.length} files are not served`;
  find("left-out-list").replaceChildren(...leftOut.map(({ name, reason }) => element("li", {}, element("strong", {}, name), ` ${reason}`)));
}

export class Queue {
  /** @type {WorkEntry[]} */
  #entries = [];
  /** @type {string|null} the image that was opened last; it keeps its place here when another one cannot be opened */
  #current = null;
  /** @type {Filter} */
  #filter = "all";
  #limit = PAGE;
  #ticket = 0;
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
    find("queue-more").addEventListener("click", () => ((this.#limit += PAGE), void this.load()));
    /** @type {ReturnType<typeof setTimeout>|undefined} */
    let typing;
    findInput("queue-search").addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => this.#restart(), TYPING_MS);
    });
  }

  #restart() {
    this.#limit = PAGE;
    return this.load();
  }

  async load() {
    const ticket = (this.#ticket += 1);
    try {
      const worklist = await listWork({ state: this.#filter, search: findInput("queue-search").value.trim(), limit: this.#limit });
      if (ticket !== this.#ticket) return;
      this.#entries = worklist.entries;
      store.set({ worklist });
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

  /** The image after the current one that is not done; null at the end. */
  next() {
    const place = this.#entries.findIndex(({ image }) => image === this.#current);
    const others = [...this.#entries.slice(place + 1), ...this.#entries.slice(0, Math.max(place, 0))];
    const open = others.filter((entry) => !entry.reserved_by && entry.image !== this.#current && entry.state !== "done");
    return (open.find((entry) => entry.state === "todo") ?? open[0])?.image ?? null;
  }

  render() {
    this.#current = state.session?.image ?? this.#current;
    const unsent = new Set(listUnsent());
    const known = new Set(this.#entries.map(({ image }) => image));
    const entries = [...this.#entries];
    // An image that is not in this part of the list may be the one that is open, or have work that was not sent.
    for (const image of [...unsent, this.#current]) {
      if (image && !known.has(image)) {
        known.add(image);
        entries.unshift({ image, slices: [], reason: "", state: "", annotated: {} });
      }
    }
    find("queue-list").replaceChildren(...entries.map((entry) => this.#renderEntry(entry, unsent.has(entry.image))));
    if (state.worklist) this.#renderHead(state.worklist);
  }

  /** @param {Worklist} worklist */
  #renderHead({ counts, images, found, heading, organs }) {
    const place = this.#entries.findIndex(({ image }) => image === this.#current);
    find("queue-note").textContent = heading;
    find("queue-place").textContent = images ? (place < 0 ? `${found} of ${images}` : `${place + 1} of ${found}`) : "";
    find("queue-filters").replaceChildren(
      ...FILTERS.map(([filter, label]) => {
        const number = filter === "all" ? images : counts[filter];
        const act = () => ((this.#filter = filter), void this.#restart());
        return element("button", { className: "small", "aria-pressed": String(filter === this.#filter), on: { click: act } }, `${label} ${number}`);
      }),
    );
    findButton("queue-more").hidden = this.#entries.length >= found;
    find("organs").hidden = organs.length === 0;
    find("organs-list").replaceChildren(
      ...organs.map(({ structure, images: done }) =>
        element("li", {}, element("span", {}, structure), element("progress", { max: images, value: done, title: `${structure} on ${done} of ${images} images` }), element("span", { className: "number" }, `${done}/${images}`)),
      ),
    );
  }

  /**
   * @param {WorkEntry} entry
   * @param {boolean} isUnsent
   */
  #renderEntry(entry, isUnsent) {
    const isCurrent = entry.image === this.#current;
    const mark = isUnsent ? "not sent" : entry.reserved_by ? `with ${entry.reserved_by}` : (STATES[entry.state] ?? "");
    const saved = Object.keys(entry.annotated);
    const why = saved.length ? `saved: ${saved.join(", ")}` : [entry.modality, entry.reason].filter(Boolean).join(" · ");
    const button = element(
      "button",
      { className: "case", "aria-current": String(isCurrent), on: { click: () => this.#onOpen(entry.image) } },
      element("span", { className: "case-name" }, entry.image, mark && element("span", { className: `tag ${isUnsent ? "unsent" : entry.state}` }, mark)),
      element("span", { className: "case-why" }, why),
    );
    const slices = isCurrent && !state.session?.picture ? (entry.slices.length ? entry.slices : listDisputed()) : [];
    return element("li", {}, button, slices.length > 0 && element("div", { className: "slices" }, ...slices.map((slice) => this.#renderSlice(slice))));
  }

  /** @param {import("../answers.d.ts").QueueSlice} slice */
  #renderSlice(slice) {
    const why = [slice.reason, (slice.structures ?? []).join(", ")].filter(Boolean).join(": ");
    return element(
      "button",
      { className: `small${isSliceDone(slice.index) ? " decided" : ""}`, title: why, "aria-label": `Slice ${nameSlice(slice.index)}`, on: { click: () => this.#onSlice(slice.index) } },
      String(nameSlice(slice.index)),
    );
  }
}
