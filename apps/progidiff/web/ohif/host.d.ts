// What the panel uses of OHIF and Cornerstone. Nothing of it is sure to be there in another version: `findMissing` looks.

export type Vector = ArrayLike<number>;

export interface Plane {
  imagePositionPatient?: Vector;
  imageOrientationPatient?: Vector;
}

export interface Instance {
  ImageOrientationPatient: Vector;
  ImagePositionPatient: Vector;
  PixelSpacing: Vector;
  Rows: number;
  Columns: number;
}

export interface DisplaySet {
  Modality: string;
  SeriesInstanceUID: string;
  StudyInstanceUID: string;
  instances: Instance[];
}

export interface Viewport {
  getCurrentImageId?: () => string | undefined;
  getImageIds?: () => string[];
  setImageIdIndex?: (index: number) => unknown;
  jumpToWorld?: (point: number[]) => unknown;
  render?: () => void;
}

export interface LabelmapData {
  imageIds?: string[];
  volumeId?: string;
}

interface Services {
  viewportGridService: {
    getState: () => { viewports?: Map<string, { displaySetInstanceUIDs?: string[] }>; activeViewportId: string };
  };
  displaySetService: { getDisplaySetByUID: (uid: string) => DisplaySet | undefined };
  segmentationService: {
    getSegmentation: (id: string) => unknown;
    createLabelmapForDisplaySet: (displaySet: DisplaySet, options: object) => Promise<unknown>;
    getSegmentationRepresentations?: (viewportId: string, options: object) => unknown[];
    addSegmentationRepresentation: (viewportId: string, options: object) => Promise<unknown>;
  };
  cornerstoneViewportService: { getCornerstoneViewport: (id: string) => Viewport | undefined };
}

interface Cornerstone {
  cache: {
    getImage: (id: string) => { voxelManager?: { getScalarData: () => Uint8Array } } | undefined;
    getVolume: (id: string | undefined) => { imageIds?: string[] } | undefined;
  };
  metaData: { get: (module: "imagePlaneModule", imageId: string) => Plane | undefined };
}

interface CornerstoneTools {
  segmentation: {
    state: { getSegmentation: (id: string) => { representationData?: { Labelmap?: LabelmapData } } | undefined };
    config: { color: { setSegmentIndexColor: (viewportId: string, id: string, index: number, color: number[]) => void } };
    triggerSegmentationEvents: { triggerSegmentationDataModified: (id: string) => void };
  };
}

type RunCommand = (name: string, options?: { segmentationId?: string; dataSource?: unknown }, ...rest: unknown[]) => Promise<unknown> | undefined;

declare global {
  interface Window {
    services: Services;
    cornerstone: Cornerstone;
    cornerstoneTools: CornerstoneTools;
    commandsManager?: { runCommand?: RunCommand };
    extensionManager?: { getActiveDataSource?: () => unknown[] };
  }
}
