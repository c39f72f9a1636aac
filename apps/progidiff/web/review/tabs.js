// Tabs of one browser on one image: two would overwrite each other's unsent decisions.

/** Tells tabs which of them may change an image. */
export class TabGuard {
  #channel = "BroadcastChannel" in window ? new BroadcastChannel("progidiff.review") : null;
  #me = Math.random().toString(36).slice(2);
  /** @type {string|null} */
  #image = null;
  #onTaken;

  /** @param {(image: string) => void} onTaken called when another tab holds or takes the image */
  constructor(onTaken) {
    this.#onTaken = onTaken;
    this.#channel?.addEventListener("message", ({ data }) => {
      if (data.from === this.#me || data.image !== this.#image) return;
      if (data.kind === "open") this.#tell("held");
      else {
        this.#image = null;
        this.#onTaken(data.image);
      }
    });
  }

  /** @param {string} image */
  open(image) {
    this.#image = image;
    this.#tell("open");
  }

  /**
   * Take the image over; the other tab becomes read-only.
   * @param {string} image
   */
  take(image) {
    this.#image = image;
    this.#tell("taken");
  }

  /** @param {"open"|"held"|"taken"} kind */
  #tell(kind) {
    this.#channel?.postMessage({ kind, image: this.#image, from: this.#me });
  }
}
