// What was fetched and may be looked at again.

/** @template V @typedef {{bytes: number, promise: Promise<V>}} Entry */

/**
 * Promises by key; the ones that were not used for longest go when they hold too many bytes.
 * @template V
 */
export class ByteCache {
  /** @type {Map<string, Entry<V>>} */
  #entries = new Map();
  #bytes = 0;

  /**
   * @param {number} limit bytes
   * @param {number} least entries that stay however large they are
   */
  constructor(limit, least) {
    this.limit = limit;
    this.least = least;
  }

  /**
   * The value of a key, from `load` if it is not there; what failed is forgotten, so that it can be tried again.
   * @param {string} key
   * @param {() => Promise<V>} load
   * @param {(value: V) => number} measure bytes of a value
   * @returns {Promise<V>}
   */
  get(key, load, measure) {
    const known = this.#entries.get(key);
    if (known) {
      this.#entries.delete(key);
      this.#entries.set(key, known);
      return known.promise;
    }
    const promise = load().then(
      (value) => {
        if (this.#entries.get(key) === entry) {
          entry.bytes = measure(value);
          this.#bytes += entry.bytes;
          this.#shrink();
        }
        return value;
      },
      (error) => {
        if (this.#entries.get(key) === entry) this.#entries.delete(key);
        throw error;
      },
    );
    const entry = { bytes: 0, promise };
    this.#entries.set(key, entry);
    return promise;
  }

  clear() {
    this.#entries.clear();
    this.#bytes = 0;
  }

  #shrink() {
    for (const [key, entry] of this.#entries) {
      if (this.#bytes <= this.limit || this.#entries.size <= this.least) return;
      this.#entries.delete(key);
      this.#bytes -= entry.bytes;
    }
  }
}
