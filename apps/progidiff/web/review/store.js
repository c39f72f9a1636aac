// A state that tells who watches it what has changed.

/**
 * Holds the values of `T`; `E` are names of what changes inside of a value while the value stays the same object.
 *
 * Whoever watches is called once after everything that happened in one go (before the next task, so before anything is painted), however
 * many of its keys changed. What a watcher changes itself is told in another round.
 * @template {object} T
 * @template {string} [E=never]
 */
export class Store {
  /** @type {Set<keyof T|E>} */
  #changed = new Set();
  /** @type {{keys: ReadonlySet<keyof T|E>, act: () => void}[]} */
  #watchers = [];

  /** @param {T} values */
  constructor(values) {
    /** @type {Readonly<T>} what is read; `set` changes it */
    this.values = values;
  }

  /**
   * Change some values. Those that stay what they are are not told of.
   * @param {Partial<T>} values
   */
  set(values) {
    const names = /** @type {(keyof T)[]} */ (Object.keys(values));
    const changed = names.filter((name) => !Object.is(this.values[name], values[name]));
    Object.assign(this.values, values);
    this.touch(...changed);
  }

  /**
   * Tell of a change inside of a value.
   * @param {...(keyof T|E)} keys
   */
  touch(...keys) {
    if (keys.length && !this.#changed.size) queueMicrotask(() => this.flush());
    for (const key of keys) this.#changed.add(key);
  }

  /**
   * Call `act` after any of the keys changed.
   * @param {readonly (keyof T|E)[]} keys
   * @param {() => void} act
   */
  watch(keys, act) {
    this.#watchers.push({ keys: new Set(keys), act });
  }

  /** Tell now what has changed so far. */
  flush() {
    const changed = this.#changed;
    this.#changed = new Set();
    for (const { keys, act } of this.#watchers) {
      if ([...changed].some((key) => keys.has(key))) act();
    }
  }
}
