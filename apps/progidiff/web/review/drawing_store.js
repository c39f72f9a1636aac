// Drawings in the browser's database (IndexedDB): every step is there as soon as it is drawn, and a closed tab or a crash loses nothing.
// Every write says which one it follows. One that follows another than the last is refused, because another tab has written since.

/** @typedef {import("./drawing.js").Drawing} Drawing */
/** @typedef {import("./drawing.js").Journal} Journal */
/** @typedef {import("./drawing.js").Step} Step */
/** @typedef {{image: string, done: number, sent: Journal["sent"], revision: number}} Head `revision` counts writes */

const NAME = "progidiff.drawings";
const VERSION = 1;
const MARK = "progidiff.drawn.";

/** Another tab has drawn on the image since. */
export class TakenError extends Error {}

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
const settle = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** @param {IDBTransaction} transaction @returns {Promise<void>} */
const complete = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onerror = () => reject(transaction.error);
    transaction.onabort = () => reject(transaction.error ?? new TakenError("The drawing was changed in another tab."));
  });

/** Steps by image and place, and of each image how many are done and what was sent. */
export class DrawingStore {
  /** Of the last write that this tab knows of. @type {Map<string, number>} */
  #revisions = new Map();
  /** @type {Promise<IDBDatabase>|null} */
  #database = null;
  /** Writes come one after the other. @type {Promise<unknown>} */
  #last = Promise.resolve();

  /** @returns {Promise<IDBDatabase>} rejects where a browser keeps nothing, as some private windows do */
  #open() {
    this.#database ??= new Promise((resolve, reject) => {
      const request = indexedDB.open(NAME, VERSION);
      request.onupgradeneeded = () => {
        request.result.createObjectStore("steps", { keyPath: ["image", "place"] });
        request.result.createObjectStore("heads", { keyPath: "image" });
      };
      request.onsuccess = () => resolve(request.result);
      request.onerror = () => reject(request.error);
    });
    return this.#database;
  }

  /**
   * What is kept of an image.
   * @param {string} image
   * @returns {Promise<Journal>}
   */
  async read(image) {
    await this.#last.catch(() => {});
    const database = await this.#open();
    const transaction = database.transaction(["steps", "heads"]);
    const [head, rows] = await Promise.all([
      settle(/** @type {IDBRequest<Head|undefined>} */ (transaction.objectStore("heads").get(image))),
      settle(/** @type {IDBRequest<{step: Step}[]>} */ (transaction.objectStore("steps").getAll(rangeOf(image)))),
    ]);
    const { done = 0, sent = [], revision = 0 } = head ?? {};
    this.#revisions.set(image, revision);
    return { steps: rows.map(({ step }) => step), done, sent };
  }

  /**
   * Keep what was drawn, undone, redone or sent.
   * @param {Drawing} drawing as it is now
   * @param {Step|null} step the last one, if it is new
   * @returns {Promise<void>} rejects with `TakenError` if another tab has written since this one read
   */
  write(drawing, step = null) {
    const { image, sent } = drawing;
    const { done, total } = drawing.place;
    const writing = this.#last.catch(() => {}).then(async () => {
      const database = await this.#open();
      const transaction = database.transaction(["steps", "heads"], "readwrite");
      const finished = complete(transaction);
      const [heads, steps] = [transaction.objectStore("heads"), transaction.objectStore("steps")];
      heads.get(image).onsuccess = (event) => {
        const head = /** @type {IDBRequest<Head|undefined>} */ (event.target).result;
        if ((head?.revision ?? 0) !== (this.#revisions.get(image) ?? 0)) {
          transaction.abort();
          return;
        }
        const revision = (head?.revision ?? 0) + 1;
        this.#revisions.set(image, revision);
        steps.delete(rangeOf(image, step ? done - 1 : total));
        if (step) steps.put({ image, place: done - 1, step });
        heads.put({ image, done, sent, revision });
      };
      await finished;
    });
    this.#last = writing;
    mark(drawing);
    return writing;
  }
}

/** @param {string} image @param {number} first */
const rangeOf = (image, first = 0) => IDBKeyRange.bound([image, first], [image, Infinity]);

/**
 * Which images have drawings that were not sent is asked for the whole queue at once.
 * @param {Drawing} drawing
 */
function mark(drawing) {
  try {
    if (drawing.hasUnsent) localStorage.setItem(MARK + drawing.image, String(Date.now()));
    else localStorage.removeItem(MARK + drawing.image);
  } catch {
    // Private windows may refuse storage: the queue then marks the image only while it is open.
  }
}

/** Images with drawings that were not sent. */
export function listDrawn() {
  try {
    return Object.keys(localStorage).flatMap((key) => (key.startsWith(MARK) ? [key.slice(MARK.length)] : []));
  } catch {
    return [];
  }
}
