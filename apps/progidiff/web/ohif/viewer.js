// The viewer, as the panel needs it: everything that touches OHIF or Cornerstone is here, in labelmap.js and in exports.js, and nothing of it is sure to be there.
// Slices are counted as the server counts them, ascending along their normal, whatever the order that the viewer loads them in.

import { openLabelmap } from './labelmap.js';
import { cross, dot, scale, toNumbers } from './vectors.js';

/** @typedef {import('./host.d.ts').DisplaySet} DisplaySet */
/** @typedef {import('./vectors.js').Vector} Vector */

/** @type {readonly (keyof Window['services'])[]} */
const SERVICES = ['viewportGridService', 'displaySetService', 'segmentationService', 'cornerstoneViewportService'];

/** Whether the viewer offers what the panel uses; names what is missing. */
export function findMissing() {
  /** @type {string[]} */
  const missing = SERVICES.filter((name) => !window.services?.[name]);
  if (typeof window.services?.segmentationService?.createLabelmapForDisplaySet !== 'function') missing.push('createLabelmapForDisplaySet');
  if (!window.cornerstone?.cache || !window.cornerstone?.metaData || !window.cornerstone?.eventTarget) missing.push('cornerstone');
  if (typeof window.cornerstoneTools?.segmentation?.updateSegmentations !== 'function') missing.push('cornerstoneTools');
  if (typeof window.cornerstoneTools?.annotation?.state?.getAllAnnotations !== 'function') missing.push('annotations');
  return missing;
}

/** The image series in the active viewport, or null. */
export function findActive() {
  const { viewportGridService, displaySetService } = window.services;
  const { viewports, activeViewportId } = viewportGridService.getState();
  for (const uid of viewports?.get?.(activeViewportId)?.displaySetInstanceUIDs ?? []) {
    const displaySet = displaySetService.getDisplaySetByUID(uid);
    if (displaySet && ['CT', 'MR'].includes(displaySet.Modality) && displaySet.instances?.length > 1) {
      return new Series(displaySet);
    }
  }
  return null;
}

function getViewport() {
  const { viewportGridService, cornerstoneViewportService } = window.services;
  return cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getState().activeViewportId);
}

export class Series {
  /** @param {DisplaySet} displaySet */
  constructor(displaySet) {
    const [instance] = displaySet.instances;
    const orientation = toNumbers(instance.ImageOrientationPatient);
    const [row, column] = [orientation.slice(0, 3), orientation.slice(3)];
    const normal = cross(row, column);
    const places = displaySet.instances.map((entry) => toNumbers(entry.ImagePositionPatient));
    places.sort((a, b) => dot(a, normal) - dot(b, normal));
    const last = places.length - 1;
    const spacing = toNumbers(instance.PixelSpacing);
    this.displaySet = displaySet;
    this.uid = displaySet.SeriesInstanceUID;
    this.normal = normal;
    this.heights = places.map((place) => dot(place, normal));
    /** @type {import('./nrrd.js').Grid} */
    this.grid = {
      shape: [places.length, Number(instance.Rows), Number(instance.Columns)],
      origin: places[0],
      directions: [scale(row, spacing[1]), scale(column, spacing[0]), places[last].map((value, axis) => (value - places[0][axis]) / last)],
    };
    /** @type {Map<string, number>} */
    this.slices = new Map();
  }

  /**
   * The index of a slice of the viewer, or -1. Looked up once: the viewer takes a moment for it, and there may be hundreds.
   * @param {string} imageId
   */
  sliceOf(imageId) {
    const known = this.slices.get(imageId);
    if (known !== undefined) return known;
    const place = window.cornerstone.metaData.get('imagePlaneModule', imageId)?.imagePositionPatient;
    if (!place) return -1;
    const found = this.findSlice(place);
    this.slices.set(imageId, found);
    return found;
  }

  /**
   * The index of the slice at a place, or -1.
   * @param {Vector} place
   */
  findSlice(place) {
    const height = dot(place, this.normal);
    const nearest = this.heights.reduce((best, value, z) => (Math.abs(value - height) < Math.abs(this.heights[best] - height) ? z : best), 0);
    return Math.abs(this.heights[nearest] - height) < Math.abs(dot(this.grid.directions[2], this.normal)) / 2 ? nearest : -1;
  }

  /**
   * The voxel at a place.
   * @param {Vector} place
   * @returns {[column: number, row: number, slice: number]}
   */
  toVoxel(place) {
    const { origin, directions } = this.grid;
    const from = origin.map((value, axis) => place[axis] - value);
    const [column, row] = directions.map((step) => Math.round(dot(from, step) / dot(step, step)));
    return [column, row, this.findSlice(place)];
  }

  /** The slice that is shown in the active viewport, or -1 if that shows another plane. */
  currentSlice() {
    const id = getViewport()?.getCurrentImageId?.();
    return id ? this.sliceOf(id) : -1;
  }

  /**
   * Show a slice.
   * @param {number} z
   */
  jumpTo(z) {
    const viewport = getViewport();
    if (!viewport) return;
    const wanted = (viewport.getImageIds?.() ?? []).findIndex((id) => this.sliceOf(id) === z);
    if (typeof viewport.setImageIdIndex === 'function' && wanted >= 0) {
      viewport.setImageIdIndex(wanted);
    } else if (typeof viewport.jumpToWorld === 'function') {
      const { shape, origin, directions } = this.grid;
      const middle = [(shape[2] - 1) / 2, (shape[1] - 1) / 2, z];
      viewport.jumpToWorld(origin.map((value, axis) => value + directions.reduce((sum, step, i) => sum + step[axis] * middle[i], 0)));
    }
    viewport.render?.();
  }

  /** Of a mask of the whole series. */
  get bytes() {
    return this.grid.shape.reduce((product, size) => product * size, 1);
  }

  /**
   * The labelmap of the panel, made if need be.
   * @param {readonly import('./labelmap.js').Segment[]} segments
   * @param {readonly number[]} asked ids of those that were prompted
   */
  openLabelmap(segments, asked) {
    return openLabelmap(this, segments, asked, () => getViewport()?.render?.());
  }
}
