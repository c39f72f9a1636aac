// The mask that the viewer shows, and that people draw on.

import { drawSlice, joinSlices } from './masks.js';

/** @typedef {import('./masks.js').Mask} Mask */
/** @typedef {import('./viewer.js').Series} Series */
/** @typedef {{index: number, label: string, color: readonly [number, number, number]}} Segment index is the label id */

const SEGMENTATION = 'progidiff';
const LABELMAP = 'Labelmap';

/**
 * The labelmap of a series, made if need be.
 * @param {Series} series
 * @param {readonly Segment[]} segments
 * @param {() => void} render shows what was written
 */
export async function openLabelmap(series, segments, render) {
  const { segmentationService, viewportGridService } = window.services;
  const viewportId = viewportGridService.getState().activeViewportId;
  const id = `${SEGMENTATION}-${series.uid}`;
  if (!segmentationService.getSegmentation(id)) {
    const named = Object.fromEntries(segments.map(({ index, label }, i) => [index, { segmentIndex: index, label, active: i === 0, locked: false }]));
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
  return new Labelmap(series, id, render);
}

export class Labelmap {
  /**
   * @param {Series} series
   * @param {string} id of the segmentation
   * @param {() => void} render
   */
  constructor(series, id, render) {
    this.series = series;
    this.id = id;
    this.render = render;
  }

  /** Slice -> its voxels, as they are shown. */
  #slices() {
    const { cache } = window.cornerstone;
    const data = window.cornerstoneTools.segmentation.state.getSegmentation(this.id)?.representationData?.[LABELMAP];
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
