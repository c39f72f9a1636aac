// The viewer, as the panel needs it: everything that touches OHIF or Cornerstone is in this file, and nothing here is sure to be there.
// Slices are counted as the server counts them, ascending along their normal, whatever the order that the viewer loads them in.

const SEGMENTATION = 'progidiff';
const LABELMAP = 'Labelmap';
const EXPORTS = ['storeSegmentation', 'generateSegmentation', 'downloadSegmentation'];
const SERVICES = ['viewportGridService', 'displaySetService', 'segmentationService', 'cornerstoneViewportService'];

/** Whether the viewer offers what the panel uses; names what is missing. */
export function findMissing() {
  const missing = SERVICES.filter((name) => !window.services?.[name]);
  if (typeof window.services?.segmentationService?.createLabelmapForDisplaySet !== 'function') missing.push('createLabelmapForDisplaySet');
  if (!window.cornerstone?.cache || !window.cornerstone?.metaData) missing.push('cornerstone');
  if (!window.cornerstoneTools?.segmentation) missing.push('cornerstoneTools');
  return missing;
}

/**
 * The viewer's own export of a segmentation, mended: the stock command forgets to name the data source, and fails silently; and it gives
 * the masks to the slices in the order of the viewer, while the writer takes slices from the far end of their normal. If these
 * differ, the exported mask is upside down.
 */
export function mendExport() {
  const { commandsManager, extensionManager } = window;
  if (typeof commandsManager?.runCommand !== 'function' || typeof extensionManager?.getActiveDataSource !== 'function') return;
  const run = commandsManager.runCommand.bind(commandsManager);
  commandsManager.runCommand = (name, options = {}, ...rest) => {
    if (!EXPORTS.includes(name) || !options?.segmentationId) return run(name, options, ...rest);
    const given = name === 'storeSegmentation' && !options.dataSource ? { ...options, dataSource: extensionManager.getActiveDataSource()[0] } : options;
    const restore = orderForExport(options.segmentationId);
    try {
      const result = run(name, given, ...rest);
      if (typeof result?.finally === 'function') return result.finally(restore);
      restore();
      return result;
    } catch (error) {
      restore();
      throw error;
    }
  };
}

function orderForExport(segmentationId) {
  const { metaData } = window.cornerstone;
  const data = window.cornerstoneTools.segmentation.state.getSegmentation(segmentationId)?.representationData?.[LABELMAP];
  const ids = data?.imageIds;
  const planes = new Map((ids || []).map((id) => [id, metaData.get('imagePlaneModule', id)]));
  if (!ids?.length || [...planes.values()].some((plane) => !plane?.imagePositionPatient || !plane.imageOrientationPatient)) return () => undefined;
  const orientation = Array.from(planes.get(ids[0]).imageOrientationPatient, Number);
  const normal = cross(orientation.slice(0, 3), orientation.slice(3));
  const height = (id) => dot(Array.from(planes.get(id).imagePositionPatient, Number), normal);
  data.imageIds = [...ids].sort((a, b) => height(b) - height(a));
  return () => {
    data.imageIds = ids;
  };
}

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const cross = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
const scale = (a, factor) => a.map((value) => value * factor);

/** The image series in the active viewport, or null. */
export function findActive() {
  const { viewportGridService, displaySetService } = window.services;
  const { viewports, activeViewportId } = viewportGridService.getState();
  const viewport = viewports?.get?.(activeViewportId);
  for (const uid of viewport?.displaySetInstanceUIDs || []) {
    const displaySet = displaySetService.getDisplaySetByUID(uid);
    if (displaySet && ['CT', 'MR'].includes(displaySet.Modality) && displaySet.instances?.length > 1) {
      return new Series(displaySet);
    }
  }
  return null;
}

export class Series {
  constructor(displaySet) {
    const instance = displaySet.instances[0];
    const orientation = Array.from(instance.ImageOrientationPatient, Number);
    const [row, column] = [orientation.slice(0, 3), orientation.slice(3)];
    const normal = cross(row, column);
    const places = displaySet.instances.map((entry) => Array.from(entry.ImagePositionPatient, Number));
    places.sort((a, b) => dot(a, normal) - dot(b, normal));
    const last = places.length - 1;
    const spacing = Array.from(instance.PixelSpacing, Number);
    this.displaySet = displaySet;
    this.uid = displaySet.SeriesInstanceUID;
    this.study = displaySet.StudyInstanceUID;
    this.normal = normal;
    this.heights = places.map((place) => dot(place, normal));
    this.grid = {
      shape: [places.length, Number(instance.Rows), Number(instance.Columns)],
      origin: places[0],
      directions: [scale(row, spacing[1]), scale(column, spacing[0]), places[last].map((value, axis) => (value - places[0][axis]) / last)],
    };
    this.slices = new Map();
  }

  /** The index of a slice of the viewer, or -1. Looked up once: the viewer takes a moment for it, and there may be hundreds. */
  sliceOf(imageId) {
    if (!this.slices.has(imageId)) {
      const place = window.cornerstone.metaData.get('imagePlaneModule', imageId)?.imagePositionPatient;
      if (!place) return -1;
      this.slices.set(imageId, this.findSlice(place));
    }
    return this.slices.get(imageId);
  }

  /** The index of the slice at a place, or -1. */
  findSlice(place) {
    const height = dot(Array.from(place), this.normal);
    const nearest = this.heights.reduce((best, value, z) => (Math.abs(value - height) < Math.abs(this.heights[best] - height) ? z : best), 0);
    return Math.abs(this.heights[nearest] - height) < Math.abs(dot(this.grid.directions[2], this.normal)) / 2 ? nearest : -1;
  }

  /** The slice that is shown in the active viewport, or -1 if that shows another plane. */
  currentSlice() {
    const viewport = getViewport();
    const id = viewport?.getCurrentImageId?.();
    return id ? this.sliceOf(id) : -1;
  }

  /** Show a slice. */
  jumpTo(z) {
    const viewport = getViewport();
    if (!viewport) return;
    const ids = viewport.getImageIds?.() || [];
    const wanted = ids.findIndex((id) => this.sliceOf(id) === z);
    if (typeof viewport.setImageIdIndex === 'function' && wanted >= 0) {
      viewport.setImageIdIndex(wanted);
    } else if (typeof viewport.jumpToWorld === 'function') {
      const { shape, origin, directions } = this.grid;
      const middle = [(shape[2] - 1) / 2, (shape[1] - 1) / 2, z];
      viewport.jumpToWorld(origin.map((value, axis) => value + directions.reduce((sum, step, i) => sum + step[axis] * middle[i], 0)));
    }
    viewport.render?.();
  }

  get bytes() {
    return this.grid.shape.reduce((product, size) => product * size, 1);
  }

  /** The labelmap of the panel, made if need be. `segments`: [{index, label, color: [r, g, b]}]. */
  async openLabelmap(segments) {
    const { segmentationService, viewportGridService } = window.services;
    const viewportId = viewportGridService.getState().activeViewportId;
    const id = `${SEGMENTATION}-${this.uid}`;
    if (!segmentationService.getSegmentation(id)) {
      const named = Object.fromEntries(segments.map(({ index, label }, i) => [index, { segmentIndex: index, label, active: i === 0, locked: false }]));
      await segmentationService.createLabelmapForDisplaySet(this.displaySet, { segmentationId: id, label: 'ProGiDiff', segments: named });
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
    return new Labelmap(this, id);
  }
}

function getViewport() {
  const { viewportGridService, cornerstoneViewportService } = window.services;
  return cornerstoneViewportService.getCornerstoneViewport(viewportGridService.getState().activeViewportId);
}

class Labelmap {
  constructor(series, id) {
    this.series = series;
    this.id = id;
  }

  /** Slice -> its voxels, as they are shown. */
  _slices() {
    const { cache } = window.cornerstone;
    const data = window.cornerstoneTools.segmentation.state.getSegmentation(this.id)?.representationData?.[LABELMAP];
    const ids = data?.imageIds?.length ? data.imageIds : cache.getVolume(data?.volumeId)?.imageIds || [];
    const slices = new Map();
    for (const id of ids) {
      const voxels = cache.getImage(id)?.voxelManager?.getScalarData();
      const z = this.series.sliceOf(id);
      if (z >= 0 && voxels) slices.set(z, voxels);
    }
    if (slices.size !== this.series.grid.shape[0]) {
      throw new Error(`The viewer gives ${slices.size} of the ${this.series.grid.shape[0]} slices of the mask. Reload the page.`);
    }
    return slices;
  }

  /** Show a mask of `server.getMask`, in place of what is shown. */
  write(mask) {
    for (const [z, voxels] of this._slices()) this._draw(mask, z, voxels);
    this.refresh();
  }

  /** Whether anything else than a mask of `server.getMask` is shown: on a slice, or on any. */
  differsFrom(mask, slice = -1) {
    const [, rows, columns] = this.series.grid.shape;
    const expected = new Uint8Array(rows * columns);
    for (const [z, voxels] of this._slices()) {
      if (slice >= 0 && z !== slice) continue;
      this._draw(mask, z, expected);
      for (let i = 0; i < expected.length; i++) if (voxels[i] !== expected[i]) return true;
    }
    return false;
  }

  /** A slice of a mask into `target`. */
  _draw({ box: [z0, z1, y0, y1, x0, x1], voxels }, z, target) {
    const columns = this.series.grid.shape[2];
    const width = x1 - x0;
    target.fill(0);
    for (let y = y0; z >= z0 && z < z1 && y < y1; y++) {
      const from = ((z - z0) * (y1 - y0) + (y - y0)) * width;
      target.set(voxels.subarray(from, from + width), y * columns + x0);
    }
  }

  /** A copy of one slice. */
  readSlice(z) {
    return this._slices().get(z).slice();
  }

  /** A copy of everything, slice by slice. */
  read() {
    const [depth, rows, columns] = this.series.grid.shape;
    const all = new Uint8Array(depth * rows * columns);
    for (const [z, voxels] of this._slices()) all.set(voxels, z * rows * columns);
    return all;
  }

  refresh() {
    const { triggerSegmentationEvents } = window.cornerstoneTools.segmentation;
    triggerSegmentationEvents.triggerSegmentationDataModified(this.id);
    getViewport()?.render?.();
  }
}
