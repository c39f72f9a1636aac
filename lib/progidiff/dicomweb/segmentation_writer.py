"""Labels and proposals as DICOM SEG, with highdicom.

A segmentation is drawn on the slices of a series (`sources`): its frames lie on them pixel by pixel, so what is written
here needs no geometry of its own, and what `segmentation` reads of it is the same voxels again. Three kinds are
written:

* a label, or one proposal: BINARY, one structure per voxel,
* all proposals: BINARY, one segment per structure and proposal, which overlap,
* the agreement: FRACTIONAL, for each structure the share of proposals that draw a voxel. DICOM has two words for a
  fraction, probability and occupancy; "PROBABILITY" is the nearer, and the descriptions say that it is not calibrated.

What a person made or accepted has segments of the type SEMIAUTOMATIC, what only the model says is AUTOMATIC: by this
programs, this server among them, tell labels from proposals.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import progidiff
from progidiff.dicomweb.codes import describe_segment
from progidiff.dicomweb.headers import IMPLEMENTATION_UID
from progidiff.errors import GeometryError, ImageError, RequestError, TooLargeError

if TYPE_CHECKING:
    from highdicom.seg import SegmentDescription

LEVELS = 240
"""Value of a FRACTIONAL SEG that stands for all proposals: the shares of 2, 3, 4, 5, 6, 8, 10, 12 or 16 are whole
numbers of it."""

MAX_VOXELS = 1 << 28
"""Voxels times segments of a SEG whose segments may overlap: highdicom holds them all, as numbers of four bytes."""

_SERIES_NUMBER = 300
_LABEL_CHARACTERS = 64
"""Of Segment Label (0062,0005)."""


@dataclass(frozen=True)
class Segment:
    """One segment.

    Attributes:
        name: Of the structure.
        label_id: In the label map; it picks the colour of what the table of structures does not know.
        description: Who saved it, or what it is a proposal of.
        is_proposal: Whether only the model says so.
        suffix: What of several segments of one structure this is; stands behind the name.
    """

    name: str
    label_id: int
    description: str = ""
    is_proposal: bool = False
    suffix: str = ""


def write_label(sources: Sequence[Dataset], stack: NDArray[Any], segments: Mapping[int, Segment]) -> bytes:
    """A label map as a BINARY SEG. Segments are numbered in the order of their label ids, empty frames left out.

    Args:
        sources: The slices, see `sources`.
        stack: Label ids, one slice per source, shape (N, rows, columns).
        segments: Label id -> segment; those that draw nothing are left out.

    Raises:
        ImageError: if nothing is drawn.
        GeometryError: if the stack is not on the slices.
    """
    drawn = [int(value) for value in np.flatnonzero(np.bincount(stack.ravel())) if value]
    if not drawn:
        raise ImageError(
            "Nothing is drawn, and a DICOM SEG without any voxel cannot be written. Draw a structure first."
        )
    missing = [value for value in drawn if value not in segments]
    if missing:
        raise ImageError(f"The label holds {missing[0]}, and nothing says what that is. Name it in label_info.")
    numbers = np.zeros(max(drawn) + 1, dtype=np.uint8)
    numbers[drawn] = np.arange(1, len(drawn) + 1)
    return _write(sources, numbers[stack], [segments[value] for value in drawn], "BINARY")


def write_overlapping(sources: Sequence[Dataset], stacks: Sequence[tuple[Segment, NDArray[Any]]]) -> bytes:
    """Masks that may overlap as a BINARY SEG; those that are empty are left out.

    Args:
        sources: The slices.
        stacks: Each segment with its mask, bool of shape (N, rows, columns).

    Raises:
        ImageError: if all are empty.
        GeometryError: if a mask is not on the slices.
        TooLargeError: if they are more than `MAX_VOXELS`.
    """
    return _write_stacked(sources, [(segment, mask.astype(np.uint8)) for segment, mask in stacks], "BINARY")


def write_agreement(sources: Sequence[Dataset], shares: Sequence[tuple[Segment, NDArray[Any]]]) -> bytes:
    """Shares of proposals as a FRACTIONAL SEG of `LEVELS` levels; structures that no proposal draws are left out.

    Args:
        sources: The slices.
        shares: Each segment with the share of proposals that draw a voxel, float32 in [0, 1], shape (N, rows, columns).

    Raises:
        ImageError: if no proposal draws anything.
        GeometryError: if an array is not on the slices.
        TooLargeError: if they are more than `MAX_VOXELS`.
    """
    return _write_stacked(sources, [(segment, share.astype(np.float32)) for segment, share in shares], "FRACTIONAL")


def _write_stacked(sources: Sequence[Dataset], stacks: list[tuple[Segment, NDArray[Any]]], kind: str) -> bytes:
    drawn = [(segment, stack) for segment, stack in stacks if stack.any()]
    if not drawn:
        raise ImageError(
            "No proposal draws anything, and a DICOM SEG without any voxel cannot be written. Ask for a structure that "
            "the image shows."
        )
    for _, stack in drawn:
        _check_on(sources, stack)
    occupied = np.flatnonzero(np.logical_or.reduce([stack.any(axis=(1, 2)) for _, stack in drawn]))
    shown = slice(int(occupied[0]), int(occupied[-1]) + 1)
    voxels = sum(stack[shown].size for _, stack in drawn)
    if voxels > MAX_VOXELS:
        raise TooLargeError(
            f"The segmentation would hold {voxels / 1e6:.0f} million voxels in {len(drawn)} segments; "
            f"{MAX_VOXELS / 1e6:.0f} are written at most. Ask for fewer structures, or for one proposal."
        )
    pixels = np.stack([stack[shown] for _, stack in drawn], axis=-1)
    return _write(sources[shown], pixels, [segment for segment, _ in drawn], kind)


def _check_on(sources: Sequence[Dataset], stack: NDArray[Any]) -> None:
    wanted = (len(sources), int(sources[0].Rows), int(sources[0].Columns)) if sources else (0, 0, 0)
    if stack.shape[:3] != wanted:
        raise GeometryError(
            f"The label has {stack.shape[0]} slices of {stack.shape[1:3]}, and its series {wanted[0]} of {wanted[1:]}. "
            "See that no file of the series is missing, and save again."
        )


def _write(sources: Sequence[Dataset], pixels: NDArray[Any], segments: Sequence[Segment], kind: str) -> bytes:
    from highdicom.seg import Segmentation

    _check_on(sources, pixels)
    try:
        written = Segmentation(
            source_images=sources,
            pixel_array=pixels,
            segmentation_type=kind,
            segment_descriptions=[_describe(number, segment) for number, segment in enumerate(segments, 1)],
            series_instance_uid=generate_uid(prefix=None),
            series_number=_SERIES_NUMBER,
            sop_instance_uid=generate_uid(prefix=None),
            instance_number=1,
            manufacturer="ProGiDiff Label",
            manufacturer_model_name="ProGiDiff Label",
            software_versions=progidiff.__version__,
            device_serial_number=progidiff.__version__,
            max_fractional_value=LEVELS,
            content_label="SEGMENTATION",
            content_description=_describe_content(kind),
            series_description=_describe_content(kind),
            specific_character_set="ISO_IR 192",
            transfer_syntax_uid=ExplicitVRLittleEndian,
        )
    except (ValueError, TypeError, AttributeError) as err:  # What highdicom raises for a series it cannot refer to.
        raise RequestError(
            f"The series cannot have a DICOM segmentation ({' '.join(str(err).split())[:200]}). Export it again, with "
            "one frame of reference and slices of one size."
        ) from err
    written.file_meta.ImplementationClassUID = IMPLEMENTATION_UID
    target = io.BytesIO()
    written.save_as(target, enforce_file_format=True)
    return target.getvalue()


def _describe_content(kind: str) -> str:
    return "Agreement of proposals" if kind == "FRACTIONAL" else "ProGiDiff Label"


def _describe(number: int, segment: Segment) -> SegmentDescription:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from highdicom.sr import CodedConcept
    from pydicom.sr.codedict import codes

    facts = describe_segment(segment.name, segment.label_id, segment.description)
    label = f"{segment.name[: _LABEL_CHARACTERS - len(segment.suffix)]}{segment.suffix}"
    described = SegmentDescription(
        segment_number=number,
        segment_label=label,
        segmented_property_category=_code(facts["SegmentedPropertyCategoryCodeSequence"]),
        segmented_property_type=_code(facts["SegmentedPropertyTypeCodeSequence"]),
        algorithm_type="AUTOMATIC" if segment.is_proposal else "SEMIAUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=facts["SegmentAlgorithmName"],
            family=codes.cid7162.ArtificialIntelligence,
            version=progidiff.__version__,
        ),
        display_color=CIELabColor.from_rgb(*facts["recommendedDisplayRGBValue"]),
    )
    described.SegmentDescription = facts["SegmentDescription"]
    side = facts.get("SegmentedPropertyTypeModifierCodeSequence")
    if side is not None:
        kind: CodedConcept = described.SegmentedPropertyTypeCodeSequence[0]
        kind.SegmentedPropertyTypeModifierCodeSequence = [_code(side)]
    return described


def _code(facts: Mapping[str, str]) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(facts["CodeValue"], facts["CodingSchemeDesignator"], facts["CodeMeaning"])
