// The mask that the viewer shows, and that people draw on.

import { drawSlice, joinSlices, listLabels } from './masks.js';

/** @typedef {import('./masks.js').Mask} Mask */
/** @typedef {import('./viewer.js').Series} Series */
/** @typedef {{index: number, label: string, color: readonly [number, number, number]}} Segment index is the label id */

const SEGMENTATION = 'progidiff';
const LABELMAP = 'Labelmap';

/**
 * The labelmap of a series, made if need be.
 * @param {Series} series
 * @param {readonly Segment[]} segments that there can be
 * @param {readonly number[]} asked ids of those that were prompted: these are listed, and the first one is drawn with
 * @param {() => void} render shows what was written
 */
export async function openLabelmap(series, segments, asked, render) {
  const { segmentationService, viewportGridService } = window.services;
  const viewportId = viewportGridService.getState().activeViewportId;
  const id = `${SEGMENTATION}-${series.uid}`;
  if (!segmentationService.getSegmentation(id)) {
    const first = segments.filter(({ index }) => (asked.length ? asked.includes(index) : index === segments[0].index));
    const named = Object.fromEntries(first.map((segment, i) => [segment.index, { ...toSegment(segment), active: i === 0 }]));
    await segmentationService.createLabelmapForDisplaySet(series.displaySet, { segmentationId: id, label: 'ProGiDiff', segments: named });
  }
  const shown = segmentationService.getSegmentationRepresentations?.(viewportId, { segmentationId: id, type: LABELMAP }) || [];
  if (!shown.length) await segmentationService.addSegmentationRepresentation(viewportId, { segmentationId: id, type: LABELMAP });
  for (const { index, color } of segments) {
    try {
      window.cornerstoneTools.segmentation.config.color.setSegmentIndexColor(viewportId, id, index, [...color, 255]);
    } catch {
      // A colour of the viewer's own then.
    }
  }
  return new Labelmap(series, id, segments, asked, render);
}

/** @param {Segment} segment as the viewer keeps it */
const toSegment = ({ index, label }) => ({ segmentIndex: index, label, locked: false, cachedStats: {} });

export class Labelmap {
  /**
   * @param {Series} series
   * @param {string} id of the segmentation
   * @param {readonly Segment[]} palette
   * @param {readonly number[]} asked
   * @param {() => void} render
   */
  constructor(series, id, palette, asked, render) {
    this.series = series;
    this.id = id;
    this.palette = palette;
    this.asked = asked;
    this.render = render;
  }

  get #state() {
    return window.cornerstoneTools.segmentation.state.getSegmentation(this.id);
  }

  /**
   * List the segments that are prompted or drawn, and those that a person added; one of them is drawn with.
   * @param {readonly number[]} drawn
   */
  #list(drawn) {
    const { segmentation } = window.cornerstoneTools;
    const known = this.#state?.segments ?? {};
    const wanted = this.palette.filter(({ index }) => this.asked.includes(index) || drawn.includes(index));
    const ours = new Map(this.palette.map(({ index, label }) => [index, label]));
    const added = Object.values(known).filter(({ segmentIndex, label }) => ours.get(segmentIndex) !== label && !wanted.some(({ index }) => index === segmentIndex));
    /** @type {Map<number, import('./host.d.ts').ListedSegment>} */
    const listed = new Map();
    for (const segment of wanted) listed.set(segment.index, known[segment.index] ?? toSegment(segment));
    for (const segment of added) listed.set(segment.segmentIndex, segment);
    if (!listed.size) return;
    if (Object.keys(known).length !== listed.size || Object.keys(known).some((index) => !listed.has(Number(index)))) {
      segmentation.updateSegmentations([{ segmentationId: this.id, payload: { segments: Object.fromEntries(listed) } }]);
    }
    if (!listed.has(this.active ?? 0)) this.draw(this.asked[0] ?? [...listed.keys()][0]);
  }

  /** The segment that is drawn with. */
  get active() {
    return window.cornerstoneTools.segmentation.segmentIndex.getActiveSegmentIndex(this.id);
  }

  /**
   * Make a segment the one that is drawn with.
   * @param {number} index
   */
  draw(index) {
    window.services.segmentationService.setActiveSegment(this.id, index);
  }

  /**
   * What the viewer calls a segment.
   * @param {number} index
   */
  nameOf(index) {
    return this.#state?.segments?.[index]?.label || this.palette.find((segment) => segment.index === index)?.label || `Segment ${index}`;
  }

  /**
   * The colour of a segment as the viewer shows it; undefined if it does not say.
   * @param {number} index
   */
  colorOf(index) {
    const { activeViewportId } = window.services.viewportGridService.getState();
    return window.cornerstoneTools.segmentation.config.color.getSegmentIndexColor?.(activeViewportId, this.id, index)?.slice(0, 3);
  }

  /** Slice -> its voxels, as they are shown. */
  #slices() {
    const { cache } = window.cornerstone;
    const data = this.#state?.representationData?.[LABELMAP];
    const ids = data?.imageIds?.length ? data.imageIds : cache.getVolume(data?.volumeId)?.imageIds || [];
    /** @type {Map<number, Uint8Array>} */
    const slices = new Map();
    for (const id of ids) {
      const voxels = cache.getImage(id)?.voxelManager?.getScalarData();
      const z = this.series.sliceOf(id);
      if (z >= 0 && voxels) slices.set(z, voxels);
    }
    const [depth] = this.series.grid.shape;
    if (slices.size !== depth) throw new Error(`The viewer gives ${slices.size} of the ${depth} slices of the mask. Reload the page.`);
    return slices;
  }

  /**
   * Show a mask in place of what is shown.
   * @param {Mask} mask
   */
  write(mask) {
    for (const [z, voxels] of this.#slices()) drawSlice(mask, z, voxels);
    this.#list(listLabels(mask.voxels));
    window.cornerstoneTools.segmentation.triggerSegmentationEvents.triggerSegmentationDataModified(this.id);
    this.render();
  }

  /**
   * Whether anything else than a mask is shown: on a slice, or on any.
   * @param {Mask} mask
   * @param {number} slice
   */
  differsFrom(mask, slice = -1) {
    const [, rows, columns] = this.series.grid.shape;
    const expected = new Uint8Array(rows * columns);
    for (const [z, voxels] of this.#slices()) {
      if (slice >= 0 && z !== slice) continue;
      drawSlice(mask, z, expected);
      for (let i = 0; i < expected.length; i += 1) if (voxels[i] !== expected[i]) return true;
    }
    return false;
  }

  /**
   * A copy of one slice.
   * @param {number} z
   */
  readSlice(z) {
    const voxels = this.#slices().get(z);
    if (!voxels) throw new Error(`The mask has no slice ${z + 1}. Reload the page.`);
    return voxels.slice();
  }

  /** A copy of everything, slice by slice. */
  read() {
    return joinSlices(this.series.grid.shape, this.#slices());
  }
}
