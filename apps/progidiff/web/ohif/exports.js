// The viewer's own export of a segmentation, mended.

import { cross, dot, toNumbers } from './vectors.js';

const EXPORTS = ['storeSegmentation', 'generateSegmentation', 'downloadSegmentation'];

/**
 * Mend two things: the stock command forgets to name the data source, and fails silently; and it gives the masks to the slices in the
 * order of the viewer, while the writer takes slices from the far end of their normal. If these differ, the exported mask is upside down.
 */
export function mendExport() {
  const { commandsManager, extensionManager } = window;
  const getSource = extensionManager?.getActiveDataSource?.bind(extensionManager);
  const run = commandsManager?.runCommand?.bind(commandsManager);
  if (!commandsManager || !run || !getSource) return;
  commandsManager.runCommand = (name, options = {}, ...rest) => {
    if (!EXPORTS.includes(name) || !options?.segmentationId) return run(name, options, ...rest);
    const given = name === 'storeSegmentation' && !options.dataSource ? { ...options, dataSource: getSource()[0] } : options;
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

/**
 * @param {string} segmentationId
 * @returns {() => void} puts the viewer's order back
 */
function orderForExport(segmentationId) {
  const { metaData } = window.cornerstone;
  const data = window.cornerstoneTools.segmentation.state.getSegmentation(segmentationId)?.representationData?.Labelmap;
  const ids = data?.imageIds ?? [];
  /** @type {Map<string, number[]>} */
  const places = new Map();
  /** @type {number[]|undefined} */
  let orientation;
  for (const id of ids) {
    const plane = metaData.get('imagePlaneModule', id);
    if (!plane?.imagePositionPatient || !plane.imageOrientationPatient) return () => undefined;
    places.set(id, toNumbers(plane.imagePositionPatient));
    orientation ??= toNumbers(plane.imageOrientationPatient);
  }
  if (!data || !orientation) return () => undefined;
  const normal = cross(orientation.slice(0, 3), orientation.slice(3));
  /** @param {string} id */
  const height = (id) => dot(places.get(id) ?? [0, 0, 0], normal);
  data.imageIds = [...ids].sort((a, b) => height(b) - height(a));
  return () => {
    data.imageIds = ids;
  };
}
