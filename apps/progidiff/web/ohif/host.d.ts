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

export interface Annotation {
  annotationUID: string;
  metadata: { toolName: string; referencedImageId?: string };
  data: { label: string; handles: { points: Vector[] } };
}

export interface ListedSegment {
  segmentIndex: number;
  label: string;
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
    setActiveSegment: (id: string, index: number) => void;
  };
  cornerstoneViewportService: { getCornerstoneViewport: (id: string) => Viewport | undefined };
}

interface Cornerstone {
  cache: {
    getImage: (id: string) => { voxelManager?: { getScalarData: () => Uint8Array } } | undefined;
    getVolume: (id: string | undefined) => { imageIds?: string[] } | undefined;
  };
  eventTarget: EventTarget;
  metaData: { get: (module: "imagePlaneModule", imageId: string) => Plane | undefined };
}

interface CornerstoneTools {
  annotation: { state: { getAllAnnotations: () => Annotation[]; removeAnnotation: (id: string) => void } };
  segmentation: {
    state: {
      getSegmentation: (id: string) => { representationData?: { Labelmap?: LabelmapData }; segments?: Record<number, ListedSegment> } | undefined;
    };
    segmentIndex: { getActiveSegmentIndex: (id: string) => number | undefined };
    updateSegmentations: (updates: { segmentationId: string; payload: { segments: Record<number, ListedSegment> } }[]) => void;
    config: { color: { setSegmentIndexColor: (viewportId: string, id: string, index: number, color: number[]) => void; getSegmentIndexColor?: (viewportId: string, id: string, index: number) => number[] | undefined } };
    triggerSegmentationEvents: { triggerSegmentationDataModified: (id: string) => void };
  };
}

type RunCommand = (name: string, options?: { segmentationId?: string; dataSource?: unknown; toolName?: string }, ...rest: unknown[]) => Promise<unknown> | undefined;

declare global {
  interface Window {
    services: Services;
    cornerstone: Cornerstone;
    cornerstoneTools: CornerstoneTools;
    commandsManager?: { runCommand?: RunCommand };
    extensionManager?: { getActiveDataSource?: () => unknown[] };
  }
}
