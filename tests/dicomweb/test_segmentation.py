"""DICOM SEG -> label map: any axes, left-out frames, crops; what does not fit is refused with a reason."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from progidiff.dicomweb.export import export_series
from progidiff.dicomweb.frames import Series
from progidiff.dicomweb.segmentation import (
    LABEL_MAP_STORAGE,
    find_referenced_series,
    read_dataset,
    read_segmentation,
)
from progidiff.errors import GeometryError, ImageError, ProGiDiffError, RequestError
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from support.segmentations import IDENTITY, make_masks, make_seg, to_bytes
from support.series import AXIAL, CORONAL, SAGITTAL, affines, make_volume


def check_same(volume: Volume, dataset: Dataset, masks: dict[str, np.ndarray]) -> None:
    result = read_segmentation(read_dataset(to_bytes(dataset)), volume.grid)
    drawn = {name for name, mask in masks.items() if mask.any()}
    assert set(result.names.values()) == drawn
    stack = volume.arrange(result.labels)
    for label, name in result.names.items():
        np.testing.assert_array_equal(stack == label, masks[name])
    assert set(np.unique(stack)) - {0} == set(result.names)


@settings(max_examples=40, deadline=None)
@given(
    affine=affines(),
    axis=st.integers(0, 2),
    flips=st.tuples(st.booleans(), st.booleans()),
    crop=st.booleans(),
    seed=st.integers(0, 9),
)
def test_a_seg_along_any_axis_comes_back_voxel_by_voxel(
    affine: np.ndarray, axis: int, flips: tuple[bool, bool], crop: bool, seed: int
):
    volume = make_volume(affine, (5, 6, 4))
    masks = make_masks(volume, seed)
    check_same(volume, make_seg(volume, masks, axis, flips, crop), masks)


@pytest.mark.parametrize("affine", [AXIAL, SAGITTAL, CORONAL], ids=["axial", "sagittal", "coronal"])
def test_empty_frames_and_empty_segments_are_background(affine: np.ndarray):
    volume = make_volume(affine)
    masks = make_masks(volume)
    masks["liver"][1:-1] = False
    masks["pancreas"] = np.zeros_like(masks["liver"])
    check_same(volume, make_seg(volume, masks), masks)


def refuse(dataset: Dataset, volume: Volume) -> str:
    with pytest.raises(ProGiDiffError) as caught:
        read_segmentation(dataset, volume.grid)
    assert caught.value.status == 422
    return str(caught.value)


def test_overlapping_segments_are_refused_with_their_names():
    volume = make_volume(AXIAL)
    masks = make_masks(volume)
    masks["spleen"] = masks["spleen"] | masks["liver"]
    with pytest.raises(RequestError, match=f"'liver' and 'spleen' in {int(masks['liver'].sum())} voxels"):
        read_segmentation(make_seg(volume, masks), volume.grid)


def test_a_seg_of_another_grid_is_refused():
    volume = make_volume(AXIAL)
    masks = make_masks(volume)
    shifted = AXIAL.copy()
    shifted[0, 3] += 0.4
    finer = AXIAL @ np.diag([0.5, 0.5, 1, 1])
    away = AXIAL.copy()
    away[2, 3] += 5 * 4
    for affine in (shifted, finer):
        with pytest.raises(GeometryError, match="beside the voxels"):
            read_segmentation(make_seg(make_volume(affine), masks), volume.grid)
    with pytest.raises(GeometryError, match="outside of"):
        read_segmentation(make_seg(make_volume(away), masks), volume.grid)


def test_what_says_too_little_is_refused():
    volume = make_volume(AXIAL)
    masks = make_masks(volume)
    for name in ("Segment 1", "", "unnamed"):
        assert "has no name" in refuse(make_seg(volume, {name: masks["liver"]}), volume)
    blank = make_seg(volume, {"liver": masks["liver"]})
    blank.PixelData = bytes(len(blank.PixelData))
    assert "is empty" in refuse(blank, volume)
    fractional = make_seg(volume, masks)
    fractional.SegmentationType = "FRACTIONAL"
    assert "BINARY" in refuse(fractional, volume)
    cut = make_seg(volume, masks)
    cut.PixelData = cut.PixelData[: len(cut.PixelData) // 2]
    assert "cannot be read" in refuse(cut, volume)
    missing = make_seg(volume, masks)
    del missing.PerFrameFunctionalGroupsSequence[0]
    assert "another number of frames" in refuse(missing, volume)
    nowhere = make_seg(volume, masks)
    del nowhere.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
    assert "does not say where" in refuse(nowhere, volume)
    stray = make_seg(volume, masks)
    stray.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 9
    assert "segment 9" in refuse(stray, volume)


def test_only_segmentations_of_one_series_are_taken():
    volume = make_volume(AXIAL)
    seg = make_seg(volume, make_masks(volume))
    assert find_referenced_series(seg) == IDENTITY.series_uid
    seg.ReferencedSeriesSequence = []
    with pytest.raises(ImageError, match="refers to 0 series"):
        find_referenced_series(seg)
    with pytest.raises(ImageError, match="CT Image Storage"):
        find_referenced_series(Series.of(IDENTITY, volume).dataset(0))
    with pytest.raises(ImageError, match="no DICOM"):
        read_dataset(b"hello")


@pytest.mark.parametrize("affine", [AXIAL, SAGITTAL, CORONAL], ids=["axial", "sagittal", "coronal"])
def test_an_exported_folder_is_the_volume(tmp_path, affine: np.ndarray):
    volume = make_volume(affine)
    files = export_series(Series.of(IDENTITY, volume), tmp_path / "series")
    assert len(files) == volume.to_stack()[0].shape[0]
    assert pydicom.dcmread(files[0]).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    # Read by ITK, another project's reader.
    again = load_volume(tmp_path / "series")
    assert again.modality_source == "dicom"
    np.testing.assert_array_equal(again.to_stack()[0], volume.to_stack()[0])
    np.testing.assert_allclose(again.grid.stack_affine, volume.grid.stack_affine, atol=1e-4)
    with pytest.raises(RequestError, match="not empty"):
        export_series(Series.of(IDENTITY, volume), tmp_path / "series")


def code_segment(seg: Dataset, value: str, modifier: str = "") -> None:
    """Give the first segment the SNOMED CT code of its type."""
    kind = Dataset()
    kind.CodeValue, kind.CodingSchemeDesignator = value, "SCT"
    if modifier:
        side = Dataset()
        side.CodeValue, side.CodingSchemeDesignator = modifier, "SCT"
        kind.SegmentedPropertyTypeModifierCodeSequence = [side]
    seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence = [kind]


def test_a_segment_that_only_its_code_names_is_what_the_code_says():
    volume = make_volume(AXIAL)
    seg = make_seg(volume, {"Segment_1": make_masks(volume)["liver"]})
    code_segment(seg, "64033007", "7771000")
    assert list(read_segmentation(seg, volume.grid).names.values()) == ["left kidney"]
    code_segment(seg, "64033007")
    assert "has no name" in refuse(seg, volume)


def test_a_segment_whose_label_and_code_differ_is_refused_with_both():
    volume = make_volume(AXIAL)
    seg = make_seg(volume, {"liver": make_masks(volume)["liver"]})
    code_segment(seg, "78961009")
    assert "called 'liver' and coded as 'spleen'" in refuse(seg, volume)
    code_segment(seg, "10200004")
    assert list(read_segmentation(seg, volume.grid).names.values()) == ["liver"]


def as_label_map(seg: Dataset, background: int = 0) -> Dataset:
    """A BINARY SEG of one plane orientation as another program would store it as a Label Map Segmentation."""
    frames = np.asarray(seg.pixel_array)
    frames = frames[None] if frames.ndim == 2 else frames
    by_place: dict[tuple[str, ...], tuple[Dataset, np.ndarray]] = {}
    for group, frame in zip(seg.PerFrameFunctionalGroupsSequence, frames, strict=True):
        place = tuple(map(str, group.PlanePositionSequence[0].ImagePositionPatient))
        _, values = by_place.setdefault(place, (group, np.full(frame.shape, background, np.uint8)))
        values[frame != 0] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    seg.PerFrameFunctionalGroupsSequence = [group for group, _ in by_place.values()]
    for group in seg.PerFrameFunctionalGroupsSequence:
        del group.SegmentIdentificationSequence
    stack = np.stack([values for _, values in by_place.values()])
    seg.SOPClassUID = seg.file_meta.MediaStorageSOPClassUID = LABEL_MAP_STORAGE
    seg.SegmentationType, seg.PixelPaddingValue = "LABELMAP", background
    seg["PixelPaddingValue"].VR = "US"
    seg.BitsAllocated = seg.BitsStored = 8
    seg.HighBit, seg.NumberOfFrames = 7, len(stack)
    seg.PixelData = stack.tobytes() + b"\0" * (stack.size % 2)
    return seg


@pytest.mark.parametrize("background", [0, 9])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_label_map_segmentation_is_read(axis: int, background: int):
    volume = make_volume(SAGITTAL)
    masks = make_masks(volume)
    check_same(volume, as_label_map(make_seg(volume, masks, axis), background), masks)


def test_a_label_map_with_numbers_that_no_segment_has_is_refused():
    volume = make_volume(AXIAL)
    seg = as_label_map(make_seg(volume, make_masks(volume)))
    del seg.SegmentSequence[1]
    assert "segment 2" in refuse(seg, volume)


def test_codes_of_older_programs_mean_what_they_meant():
    volume = make_volume(AXIAL)
    seg = make_seg(volume, {"Segment_1": make_masks(volume)["liver"]})
    for scheme in ("SRT", "SNM3", "99SDM"):
        code_segment(seg, "T-71000", "G-A101")
        kind = seg.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0]
        kind.CodingSchemeDesignator = scheme
        kind.SegmentedPropertyTypeModifierCodeSequence[0].CodingSchemeDesignator = scheme
        assert list(read_segmentation(seg, volume.grid).names.values()) == ["left kidney"]
    kind.CodingSchemeDesignator = "99LOCAL"
    assert "has no name" in refuse(seg, volume)


def test_who_stores_segments_that_overlap_may_keep_the_later():
    volume = make_volume(AXIAL)
    masks = make_masks(volume)
    masks["spleen"] = masks["spleen"] | masks["liver"]
    for reverse in (False, True):
        seg = make_seg(volume, masks)
        if reverse:  # Frames come in any order.
            groups = list(seg.PerFrameFunctionalGroupsSequence)
            frames = np.asarray(seg.pixel_array)[::-1]
            seg.PerFrameFunctionalGroupsSequence = groups[::-1]
            packed = np.packbits(frames.ravel(), bitorder="little").tobytes()
            seg.PixelData = packed + b"\0" * (len(packed) % 2)
        read = read_segmentation(read_dataset(to_bytes(seg)), volume.grid, "later")
        stack = volume.arrange(read.labels)
        np.testing.assert_array_equal(stack == 2, masks["spleen"])
        assert read.names == {2: "spleen"}
        assert f"'liver' and 'spleen' in {int(masks['liver'].sum())} voxels" in read.notes[0]
