"""DICOM SEG objects."""

from __future__ import annotations

import io

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from progidiff.dicomweb.geometry import compute_lps_affine
from progidiff.dicomweb.headers import Identity, make_uid
from progidiff.dicomweb.segmentation import SEGMENTATION_STORAGE
from progidiff.images.volume import Volume

IDENTITY = Identity("case", "d1", "CT")


def make_seg(
    volume: Volume,
    masks: dict[str, np.ndarray],
    axis: int = 0,
    flips: tuple[bool, bool] = (False, False),
    crop: bool = False,
) -> Dataset:
    """A SEG of masks (Z, Y, X) on the axial stack, cut into frames along a stack axis, empty frames left out, as PS3.3
    C.8.20 describes it.
    """
    lps = compute_lps_affine(volume.grid)
    row_axis, column_axis = [
        other for other in (0, 1, 2) if other != axis
    ]  # of the stack: a frame is [row_axis, column_axis]
    steps = {stack_axis: lps[:3, 2 - stack_axis] for stack_axis in range(3)}
    seg = Dataset()
    seg.SOPClassUID, seg.SOPInstanceUID = SEGMENTATION_STORAGE, make_uid("seg")
    seg.StudyInstanceUID, seg.SeriesInstanceUID, seg.Modality = IDENTITY.study_uid, make_uid("seg series"), "SEG"
    reference = Dataset()
    reference.SeriesInstanceUID = IDENTITY.series_uid
    seg.ReferencedSeriesSequence = [reference]
    seg.SegmentationType = "BINARY"
    seg.SegmentSequence = []
    seg.PerFrameFunctionalGroupsSequence = []
    frames = []
    for number, (name, mask) in enumerate(masks.items(), 1):
        segment = Dataset()
        segment.SegmentNumber, segment.SegmentLabel = number, name
        seg.SegmentSequence.append(segment)
        for index in range(mask.shape[axis]):
            frame = mask.take(index, axis)
            if not frame.any():
                continue
            start = {axis: index, row_axis: 0, column_axis: 0}
            if crop:
                rows, columns = np.nonzero(frame)
                start[row_axis], start[column_axis] = int(rows.min()), int(columns.min())
                size = [max(np.ptp(np.nonzero(m.any(axis=axis))[k]) for m in masks.values()) + 1 for k in (0, 1)]
                frame = np.pad(frame, ((0, size[0]), (0, size[1])))[start[row_axis] :, start[column_axis] :][
                    : size[0], : size[1]
                ]
            row_step, column_step = steps[row_axis].copy(), steps[column_axis].copy()
            if flips[0]:
                frame, start[row_axis], row_step = frame[::-1], start[row_axis] + frame.shape[0] - 1, -row_step
            if flips[1]:
                frame, start[column_axis], column_step = (
                    frame[:, ::-1],
                    start[column_axis] + frame.shape[1] - 1,
                    -column_step,
                )
            frames.append(frame)
            group = Dataset()
            position, orientation, measures, segment_of_frame = Dataset(), Dataset(), Dataset(), Dataset()
            place = lps[:3, 3] + sum(start[k] * steps[k] for k in range(3))
            position.ImagePositionPatient = [f"{value:.10g}" for value in place]
            edges = np.linalg.norm(row_step), np.linalg.norm(column_step)
            orientation.ImageOrientationPatient = [
                f"{value:.10f}" for value in (*(column_step / edges[1]), *(row_step / edges[0]))
            ]
            measures.PixelSpacing = [f"{value:.10g}" for value in edges]
            segment_of_frame.ReferencedSegmentNumber = number
            group.PlanePositionSequence, group.PlaneOrientationSequence = [position], [orientation]
            group.PixelMeasuresSequence, group.SegmentIdentificationSequence = [measures], [segment_of_frame]
            seg.PerFrameFunctionalGroupsSequence.append(group)
    stack = np.stack(frames) if frames else np.zeros((1, 2, 2), bool)
    seg.NumberOfFrames, seg.Rows, seg.Columns = stack.shape
    seg.SamplesPerPixel, seg.PhotometricInterpretation, seg.PixelRepresentation = 1, "MONOCHROME2", 0
    seg.BitsAllocated, seg.BitsStored, seg.HighBit = 1, 1, 0
    packed = np.packbits(stack.astype(np.uint8).ravel(), bitorder="little").tobytes()
    seg.add_new("PixelData", "OB", packed + b"\0" * (len(packed) % 2))
    seg.file_meta = FileMetaDataset()
    seg.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    seg.file_meta.MediaStorageSOPClassUID, seg.file_meta.MediaStorageSOPInstanceUID = (
        seg.SOPClassUID,
        seg.SOPInstanceUID,
    )
    return seg


def to_bytes(dataset: Dataset) -> bytes:
    target = io.BytesIO()
    dataset.save_as(target, enforce_file_format=True)
    return target.getvalue()


def make_masks(volume: Volume, seed: int = 0) -> dict[str, np.ndarray]:
    """Liver and spleen, apart from each other, on a few slices each."""
    shape = volume.to_stack()[0].shape
    choice = np.random.default_rng(seed).integers(0, 6, shape)
    choice[0] = 0
    return {"liver": choice == 1, "spleen": choice == 2}
