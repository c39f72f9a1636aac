"""A DICOM SEG as a label map on the grid of its image; `segmentation_writer` writes them.

A BINARY SEG keeps one bit per voxel and segment, a LABELMAP SEG the number of the segment, frame by frame; what is
empty is left out: frames, and segments without any. What is not in it is background here. Its frames may run along any
axes of the image and be cropped; every pixel must fall onto a voxel. They are placed one by one: two labelled slices of
forty are no stack with an even step, which is what highdicom makes a volume of, and frame by frame a SEG of 255
segments needs no more memory than its image.

A label map holds one structure per voxel, so segments that overlap are refused, with their names and the number of
voxels: whichever of them won, a person's work would be lost without a word. Who stores it may say that the later one in
the list is to be kept there; then the answer says how much of what that was.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from progidiff.dicomweb.codes import read_coded, read_type
from progidiff.dicomweb.geometry import compute_lps_affine
from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.images.decoding import apart
from progidiff.images.geometry import GRID_TOLERANCE, Grid
from progidiff.images.reading import DECODED_PER_VOXEL
from progidiff.labels.segments import is_unnamed, name_code, read_color
from progidiff.prompts.parser import contradicts
from progidiff.prompts.structures import Code

SEGMENTATION_STORAGE = "1.2.840.10008.5.1.4.1.1.66.4"

LABEL_MAP_STORAGE = "1.2.840.10008.5.1.4.1.1.66.7"
"""Label Map Segmentation Storage, of 2024."""

BINARY, LABELMAP = "BINARY", "LABELMAP"

Overlap = Literal["refuse", "later"]
"""What becomes of voxels that several segments draw: the SEG is refused, or the later segment has them."""

MAX_SEGMENTS = 255
"""Label maps have 8 bits."""


@dataclass(frozen=True)
class SegmentLook:
    """Colour and code of a segment, as far as they say something.

    Attributes:
        lab: CIELab as DICOM writes it (PS3.3 C.10.7.1.1), each 0..65535; None if it has none.
        code: SNOMED CT; None if it has none.
    """

    lab: tuple[int, int, int] | None = None
    code: Code | None = None

    @property
    def color(self) -> str | None:
        """As "#rrggbb"."""
        if self.lab is None:
            return None
        from highdicom.color import CIELabColor  # Takes a second to load, and few segmentations come in.

        return read_color(CIELabColor.from_dicom_value(self.lab).to_rgb(clip=True))


@dataclass(frozen=True)
class Segmentation:
    """What a SEG says.

    Attributes:
        labels: uint8 in file order (I, J, K) of the image; 0 is background.
        names: Label -> segment name, of the segments that draw anything, ascending.
        notes: What is not as it was drawn, as sentences.
        looks: Label -> colour and code, of those in `names`.
    """

    labels: NDArray[Any]
    names: dict[int, str]
    notes: list[str] = field(default_factory=list)
    looks: dict[int, SegmentLook] = field(default_factory=dict)


def read_dataset(content: bytes) -> Dataset:
    """Open a DICOM file.

    Raises:
        ImageError: if it is none.
    """
    try:
        return pydicom.dcmread(io.BytesIO(content))
    except Exception as err:  # Whatever a reader raises on bytes that somebody sent, the file is at fault.
        raise ImageError(
            f"This is no DICOM file ({' '.join(str(err).split())[:200]}). Export the segmentation again."
        ) from err


@dataclass(frozen=True)
class Instance:
    """What a stored DICOM file says of itself.

    Attributes:
        study_uid, class_uid, instance_uid: "" where it does not say.
        series_uid: Of the image that it was drawn on.
        problem: Why there is none; "" if there is.
    """

    study_uid: str
    class_uid: str
    instance_uid: str
    series_uid: str
    problem: str


def open_instance(content: bytes) -> Instance:
    """What a DICOM file says of itself, found in a process of its own where files are read so.

    Raises:
        ImageError: if it is no DICOM file.
    """
    return apart(_open_instance, name="The DICOM file")(content)


def open_segmentation(content: bytes, image: Grid, overlap: Overlap = "refuse") -> Segmentation:
    """`read_segmentation` of a DICOM file, in a process of its own where files are read so."""
    decoded = DECODED_PER_VOXEL * math.prod(image.shape)
    return apart(_open_segmentation, decoded=decoded, name="The segmentation")(content, image, overlap)


def _open_instance(content: bytes) -> Instance:
    dataset = read_dataset(content)
    series, problem = "", ""
    try:
        series = find_referenced_series(dataset)
    except ImageError as err:
        problem = str(err)
    study, kind, uid = (str(dataset.get(name, "")) for name in ("StudyInstanceUID", "SOPClassUID", "SOPInstanceUID"))
    return Instance(study, kind, uid, series, problem)


def _open_segmentation(content: bytes, image: Grid, overlap: Overlap) -> Segmentation:
    return read_segmentation(read_dataset(content), image, overlap)


def find_referenced_series(dataset: Dataset) -> str:
    """SeriesInstanceUID of the image that a SEG was drawn on.

    Raises:
        ImageError: if it is no segmentation, or does not say.
    """
    if dataset.get("SOPClassUID") not in (SEGMENTATION_STORAGE, LABEL_MAP_STORAGE):
        kind = getattr(dataset.get("SOPClassUID"), "name", "") or "unknown"
        raise ImageError(
            "Only DICOM segmentations are stored here, as labels of the images; this is "
            f"'{kind}'. Put images into the studies folder."
        )
    references = dataset.get("ReferencedSeriesSequence") or []
    uids = {str(reference.get("SeriesInstanceUID", "")) for reference in references} - {""}
    if len(uids) != 1:
        raise ImageError(
            f"The segmentation refers to {len(uids)} series; it must be drawn on one. "
            "Export it from the viewer with its image open."
        )
    return uids.pop()


def read_segmentation(dataset: Dataset, image: Grid, overlap: Overlap = "refuse") -> Segmentation:
    """The voxels of a SEG on the grid of the image that it was drawn on.

    Args:
        dataset: Of class Segmentation Storage or Label Map Segmentation Storage, opened.
        image: The grid of the image.
        overlap: What becomes of voxels that several segments draw.

    Raises:
        ImageError: if it says fractions, is damaged, empty, or a segment has neither name nor code, or two that differ.
        GeometryError: if its pixels do not fall onto the voxels of the image.
        RequestError: if segments overlap, and `overlap` does not say what to do then.
    """
    kind = dataset.get("SegmentationType")
    if kind not in (BINARY, LABELMAP):
        raise ImageError(
            f"The segmentation is {kind or 'of an unknown type'}: a label says of a voxel what it is, not how much. "
            "Export it as BINARY or LABELMAP."
        )
    background = int(dataset.get("PixelPaddingValue") or 0) if kind == LABELMAP else 0
    segments = {
        int(segment.SegmentNumber): segment
        for segment in dataset.get("SegmentSequence") or []
        if kind == BINARY or int(segment.SegmentNumber) != background
    }
    names = {number: _find_name(segment) for number, segment in segments.items()}
    if not 1 <= len(names) <= MAX_SEGMENTS or not all(1 <= number <= 65535 for number in names):
        raise ImageError(f"The segmentation has {len(names)} segments; 1 to {MAX_SEGMENTS} can be read.")
    label_of = {number: position + 1 for position, number in enumerate(sorted(names))}
    frames = _read_frames(dataset)
    stack = np.zeros(image.stack_shape, dtype=np.uint8)
    to_index = np.linalg.inv(compute_lps_affine(image))
    overlaps: dict[tuple[int, int], int] = {}
    for index, frame in enumerate(frames):
        for number, mask in _split_frame(dataset, index, frame, background):
            if number not in names:
                raise ImageError(
                    f"Frame {index + 1} belongs to segment {number}, which the segmentation "
                    "does not describe. Export it again."
                )
            places = _locate(dataset, index, mask, to_index, image)
            before = stack[places]
            for other in np.unique(before[(before != 0) & (before != label_of[number])]):
                pair = (int(other), label_of[number])
                overlaps[pair] = overlaps.get(pair, 0) + int((before == other).sum())
            # Frames may come in any order: the later in the list of segments has the voxel.
            stack[places] = np.maximum(before, label_of[number])
    by_label = {label_of[number]: name for number, name in names.items()}
    if overlaps and overlap == "refuse":
        raise RequestError(
            f"Segments overlap: {_list_overlaps(overlaps, by_label)}. A label holds one structure per voxel; erase the "
            "overlap in one of them, then store it again, or store it with ?overlap=later to keep the one that comes "
            "later in the list there."
        )
    drawn = {label: by_label[label] for label in map(int, np.unique(stack)) if label}
    if not drawn:
        raise ImageError(
            "The segmentation is empty. To say that there is nothing, accept an empty "
            "proposal; to remove a label, delete it."
        )
    _check_names(drawn)
    notes = []
    if overlaps:
        notes.append(
            f"Segments overlap: {_list_overlaps(overlaps, by_label)}. A label holds one structure per voxel; the one "
            "that comes later in the list is kept there."
        )
    looks = {
        label_of[number]: SegmentLook(_read_lab(segment), name_code(read_type(segment)))
        for number, segment in segments.items()
        if label_of[number] in drawn
    }
    return Segmentation(image.from_stack(stack), drawn, notes, looks)


def _list_overlaps(overlaps: Mapping[tuple[int, int], int], names: Mapping[int, str]) -> str:
    counts: dict[tuple[int, int], int] = {}
    for (one, other), count in overlaps.items():
        pair = (min(one, other), max(one, other))
        counts[pair] = counts.get(pair, 0) + count
    return "; ".join(f"'{names[a]}' and '{names[b]}' in {count} voxels" for (a, b), count in list(counts.items())[:5])


def _split_frame(
    dataset: Dataset, index: int, frame: NDArray[Any], background: int
) -> Iterator[tuple[int, NDArray[Any]]]:
    """The segments of a frame, each with its pixels, bool: one of a BINARY SEG, those that are drawn of a LABELMAP."""
    if dataset.SegmentationType == BINARY:
        yield _find_segment(dataset, index), frame != 0
        return
    for number in map(int, np.unique(frame)):
        if number != background:
            yield number, frame == number


def _find_name(segment: Dataset) -> str:
    """What a segment is called, or coded as if its label says nothing.

    Raises:
        ImageError: if the label names one structure and the code another.
    """
    name = str(segment.get("SegmentLabel", "")).strip()
    coded = read_coded(segment)
    if is_unnamed(name) and len(coded) == 1:
        return coded[0]
    if is_unnamed(name) and not coded and (code := name_code(read_type(segment))) is not None:
        return code.meaning or name
    if contradicts(name, coded):
        raise ImageError(
            f"A segment is called '{name[:40]}' and coded as '{' or '.join(coded)}'. Correct its label or its code in "
            "the viewer, and store it again."
        )
    return name


def _read_lab(segment: Dataset) -> tuple[int, int, int] | None:
    value = segment.get("RecommendedDisplayCIELabValue")
    return (int(value[0]), int(value[1]), int(value[2])) if value is not None and len(value) == 3 else None


def _read_frames(dataset: Dataset) -> NDArray[Any]:
    """As stored, of shape (frames, rows, columns)."""
    try:
        pixels: NDArray[Any] = np.asarray(dataset.pixel_array)
    except Exception as err:  # pydicom raises whatever its decoders do
        raise ImageError(
            "The pixels of the segmentation cannot be read "
            f"({' '.join(str(err).split())[:200]}). Export it uncompressed."
        ) from err
    frames = pixels[None] if pixels.ndim == 2 else pixels
    if len(dataset.get("PerFrameFunctionalGroupsSequence") or []) != len(frames):
        raise ImageError(
            "The segmentation describes another number of frames than it has. It may be cut off; export it again."
        )
    return frames


def _find_group(dataset: Dataset, index: int, keyword: str) -> Dataset | None:
    """The one item of a functional group of a frame, its own or the shared one."""
    own = dataset.PerFrameFunctionalGroupsSequence[index]
    shared = (dataset.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    for holder in (own, shared):
        items = holder.get(keyword) or []
        if len(items):
            return items[0]
    return None


def _find_segment(dataset: Dataset, index: int) -> int:
    group = _find_group(dataset, index, "SegmentIdentificationSequence")
    return int(group.ReferencedSegmentNumber) if group is not None else 0


def _locate(
    dataset: Dataset, index: int, frame: NDArray[Any], to_index: NDArray[Any], image: Grid
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """The voxels (z, y, x) of the axial stack that the pixels of a frame which are set fall onto."""
    groups = [
        _find_group(dataset, index, name)
        for name in ("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence")
    ]
    position, orientation, measures = groups
    if position is None or orientation is None or measures is None:
        raise ImageError(
            f"Frame {index + 1} of the segmentation does not say where it lies in the "
            "patient. Export it again, with its geometry."
        )
    directions = np.array(orientation.ImageOrientationPatient, dtype=np.float64)
    spacing = np.array(measures.PixelSpacing, dtype=np.float64)
    to_world = np.column_stack(
        [
            directions[:3] * spacing[1],
            directions[3:] * spacing[0],
            np.array(position.ImagePositionPatient, dtype=np.float64),
        ]
    )
    # (column, row, 1) -> (x, y, z) of the image: columns and rows must each run along one axis, voxel by voxel.
    exact = to_index[:3, :3] @ to_world
    exact[:, 2] += to_index[:3, 3]
    rounded = np.rint(exact)
    height, width = frame.shape
    drift = np.abs(exact - rounded) @ np.array([width - 1, height - 1, 1.0])
    steps = np.abs(rounded[:, :2])
    if drift.max() > GRID_TOLERANCE or not (steps.sum(axis=0) == 1).all() or steps.sum(axis=1).max() > 1:
        raise GeometryError(
            f"Frame {index + 1} of the segmentation lies up to {drift.max():.2f} voxels "
            f"beside the voxels of '{image.name}' (another spacing, orientation or "
            "origin). Draw it on this image, or resample it."
        )
    rows, columns = np.nonzero(frame)
    x, y, z = (rounded @ np.stack([columns, rows, np.ones_like(rows)])).astype(np.int64)
    depth, rows_of_image, columns_of_image = image.stack_shape
    outside = (x < 0) | (x >= columns_of_image) | (y < 0) | (y >= rows_of_image) | (z < 0) | (z >= depth)
    if outside.any():
        raise GeometryError(
            f"{int(outside.sum())} pixels of frame {index + 1} lie outside of "
            f"'{image.name}'. The segmentation is of another image."
        )
    return z, y, x


def _check_names(names: Mapping[int, str]) -> None:
    unnamed = [name or "(empty)" for name in names.values() if is_unnamed(name)]
    if unnamed:
        raise ImageError(
            f"Segment '{unnamed[0][:40]}' has no name that says what it is. Rename it in "
            "the viewer, for example 'liver', and store it again."
        )
    repeated = sorted({name for name in names.values() if list(names.values()).count(name) > 1})
    if repeated:
        raise ImageError(f"Two segments are called '{repeated[0][:40]}'. Join them or rename one, and store it again.")
