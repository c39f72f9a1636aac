// Points that steer: the viewer's own Probe tool places them, and the panel's + and − say which side of the border they are on.

/** @typedef {import('./viewer.js').Series} Series */
/** @typedef {{positive: boolean, structure: string}} Meaning `structure` is "" for all that are prompted */

const TOOL = 'Probe';
const OTHER_TOOL = 'WindowLevel';
const EVENT = 'CORNERSTONE_TOOLS_ANNOTATION_';

export class Points {
  /** @type {Map<string, Meaning>} by the viewer's id of the point */
  #meanings = new Map();
  /** @type {boolean|null} whether the next points are inside; null while none are placed */
  sign = null;

  /**
   * @param {() => string} findStructure what a new point is about
   * @param {() => void} onChange called when points were placed, moved or removed
   */
  constructor(findStructure, onChange) {
    const target = window.cornerstone.eventTarget;
    /** @param {Event} event */
    const read = (event) => /** @type {CustomEvent<{annotation: import('./host.d.ts').Annotation}>} */ (event).detail.annotation;
    target.addEventListener(`${EVENT}COMPLETED`, (event) => {
      const annotation = read(event);
      if (this.sign === null || annotation.metadata.toolName !== TOOL) return;
      const structure = findStructure();
      annotation.data.label = `${this.sign ? '+' : '−'} ${structure}`.trim();
      this.#meanings.set(annotation.annotationUID, { positive: this.sign, structure });
      onChange();
    });
    target.addEventListener(`${EVENT}MODIFIED`, (event) => this.#meanings.has(read(event).annotationUID) && onChange());
    target.addEventListener(`${EVENT}REMOVED`, (event) => this.#meanings.delete(read(event).annotationUID) && onChange());
  }

  /**
   * Place points of a sign from now on; the same sign again puts the tool down.
   * @param {boolean} positive
   */
  take(positive) {
    this.sign = this.sign === positive ? null : positive;
    window.commandsManager?.runCommand?.('setToolActiveToolbar', { toolName: this.sign === null ? OTHER_TOOL : TOOL });
  }

  /**
   * The points on a series.
   * @param {Series} series
   */
  #find(series) {
    const all = window.cornerstoneTools.annotation.state.getAllAnnotations();
    return all.filter(({ annotationUID, metadata }) => this.#meanings.has(annotationUID) && series.sliceOf(metadata.referencedImageId ?? '') >= 0);
  }

  /** @param {Series} series */
  count(series) {
    return this.#find(series).length;
  }

  /**
   * The points as the server takes them: column, row and slice of the series.
   * @param {Series} series
   * @returns {import('../answers.d.ts').Edit[]}
   */
  toEdits(series) {
    return this.#find(series).map(({ annotationUID, data }) => {
      const meaning = /** @type {Meaning} */ (this.#meanings.get(annotationUID));
      return { kind: 'click', points: [series.toVoxel(data.handles.points[0])], ...meaning };
    });
  }

  /** @param {Series} series */
  clear(series) {
    for (const { annotationUID } of this.#find(series)) window.cornerstoneTools.annotation.state.removeAnnotation(annotationUID);
  }
}
