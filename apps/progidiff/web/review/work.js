// What a person decided about one image and has not sent yet. It survives a closed tab, a crash and a server that is gone.

const PREFIX = "progidiff.review.";
const MAX_HISTORY = 200;

/** @typedef {import("./masks.js").Pick} Pick */

const copy = (value) => JSON.parse(JSON.stringify(value));
const isEmpty = (object) => Object.keys(object).length === 0;

/** Decisions on one result of one image, with undo. */
export class Work {
  constructor(image, proposals) {
    this.image = image;
    this.proposals = proposals;
    this.seconds = 0;
    /** @type {{picks: Record<string, Pick>, slicePicks: Record<string, Record<string, Pick>>, volume: Record<string, Pick>, slices: Record<string, Record<string, Pick>>}} */
    this.state = { picks: {}, slicePicks: {}, volume: {}, slices: {} };
    this.history = [];
  }

  /** The pick that is shown for a structure on a slice. */
  pickOn(structure, z) {
    return this.state.slicePicks[z]?.[structure] ?? this.state.picks[structure] ?? { rule: "consensus", members: [], threshold: 0.5 };
  }

  setPick(structure, pick, z = null) {
    this.#remember(z === null ? `pick for ${structure}` : `pick for ${structure} on slice ${z}`, z);
    if (z === null) {
      this.state.picks[structure] = pick;
      // A pick for the volume is meant for every slice.
      for (const [place, picks] of Object.entries(this.state.slicePicks)) {
        delete picks[structure];
        if (isEmpty(picks)) delete this.state.slicePicks[place];
      }
    } else {
      (this.state.slicePicks[z] ??= {})[structure] = pick;
    }
    // What was accepted before is accepted as it was; accepting again takes the new pick.
    this.#save();
  }

  acceptSlice(z, structures) {
    this.#remember(`slice ${z} accepted`, z);
    this.state.slices[z] = Object.fromEntries(structures.map((structure) => [structure, copy(this.pickOn(structure, z))]));
    this.#save();
  }

  acceptVolume(structures) {
    this.#remember("volume accepted");
    const { picks, slicePicks, slices } = this.state;
    this.state.volume = Object.fromEntries(structures.map((name) => [name, picks[name] ?? { rule: "consensus", members: [], threshold: 0.5 }]));
    for (const z of Object.keys(slicePicks)) {
      slices[z] = { ...slices[z], ...Object.fromEntries(structures.map((name) => [name, copy(this.pickOn(name, z))])) };
    }
    this.#save();
  }

  /** The pick that was accepted for a structure on a slice; null if none was. */
  acceptedPick(structure, z) {
    return this.state.slices[z]?.[structure] ?? this.state.volume[structure] ?? null;
  }

  isDecided(z) {
    return z in this.state.slices || !isEmpty(this.state.volume);
  }

  get decidedSlices() {
    return Object.keys(this.state.slices).map(Number);
  }

  get isVolumeAccepted() {
    return !isEmpty(this.state.volume);
  }

  get hasDecisions() {
    return this.isVolumeAccepted || !isEmpty(this.state.slices);
  }

  /** What was undone: in words, and the slice it was about (null for the volume); null if there was nothing. */
  undo() {
    const last = this.history.pop();
    if (!last) return null;
    this.state = last.state;
    this.#save();
    return last;
  }

  addSeconds(seconds) {
    this.seconds += seconds;
    if (this.hasDecisions) this.#save();
  }

  /** As the server takes it. */
  toDecisions(base) {
    const { volume, slices } = this.state;
    return { proposals: this.proposals, volume, slices, base, seconds: Math.round(this.seconds * 10) / 10 };
  }

  #remember(what, z = null) {
    this.history.push({ what, z, state: copy(this.state) });
    if (this.history.length > MAX_HISTORY) this.history.shift();
  }

  #save() {
    const key = PREFIX + this.image;
    try {
      if (!this.hasDecisions && isEmpty(this.state.picks) && isEmpty(this.state.slicePicks)) {
        localStorage.removeItem(key);
        return;
      }
      const { image, proposals, seconds, state } = this;
      localStorage.setItem(key, JSON.stringify({ image, proposals, seconds, state, time: Date.now() }));
    } catch {
      // Private windows may refuse storage: the page then works, and loses what was not sent when it is closed.
    }
  }
}

/** What is kept of an image: a `Work` and when it was last changed; null if nothing can be read. */
export function loadWork(image) {
  try {
    const kept = JSON.parse(localStorage.getItem(PREFIX + image));
    if (!kept || typeof kept.proposals !== "string" || typeof kept.state?.slices !== "object") return null;
    const work = new Work(image, kept.proposals);
    work.seconds = Number(kept.seconds) || 0;
    work.state = { ...work.state, ...kept.state };
    return { work, time: new Date(kept.time) };
  } catch {
    return null;
  }
}

export function forgetWork(image) {
  try {
    localStorage.removeItem(PREFIX + image);
  } catch {
    // Nothing was kept then.
  }
}

/** Images with decisions that were not sent. */
export function listUnsent() {
  try {
    return Object.keys(localStorage)
      .filter((key) => key.startsWith(PREFIX))
      .map((key) => loadWork(key.slice(PREFIX.length)))
      .filter((kept) => kept?.work.hasDecisions)
      .map((kept) => kept.work.image);
  } catch {
    return [];
  }
}

/** Tells tabs of one browser which of them may change an image: two tabs would overwrite each other's unsent decisions. */
export class TabGuard {
  #channel = "BroadcastChannel" in window ? new BroadcastChannel("progidiff.review") : null;
  #me = Math.random().toString(36).slice(2);
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

  open(image) {
    this.#image = image;
    this.#tell("open");
  }

  /** Take the image over; the other tab becomes read-only. */
  take(image) {
    this.#image = image;
    this.#tell("taken");
  }

  #tell(kind) {
    this.#channel?.postMessage({ kind, image: this.#image, from: this.#me });
  }
}
