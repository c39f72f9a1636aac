"""Labels and proposals -> DICOM SEG, read again by us and by highdicom."""

from __future__ import annotations

import io
import shutil
import subprocess
from pathlib import Path

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from progidiff.dicomweb.export import export_series
from progidiff.dicomweb.frames import Series
from progidiff.dicomweb.segmentation import find_referenced_series, read_dataset, read_segmentation
from progidiff.dicomweb.segmentation_writer import (
    LEVELS,
    MAX_VOXELS,
    Segment,
    write_agreement,
    write_label,
    write_overlapping,
)
from progidiff.dicomweb.sources import list_sources, read_sources
from progidiff.errors import GeometryError, ImageError, TooLargeError
from progidiff.images.volume import Volume
from support.segmentations import IDENTITY, make_masks
from support.series import AXIAL, CORONAL, SAGITTAL, make_volume

LIVER, ADRENAL = Segment("liver", 6, "Save 3 of today"), Segment("left adrenal gland", 13)
AFFINES = pytest.mark.parametrize("affine", [AXIAL, SAGITTAL, CORONAL], ids=["axial", "sagittal", "coronal"])


def sources_of(volume: Volume) -> list[Dataset]:
    return list_sources(Series.of(IDENTITY, volume))


def make_stack(volume: Volume) -> np.ndarray:
    masks = make_masks(volume)
    return np.where(masks["liver"], 6, np.where(masks["spleen"], 13, 0)).astype(np.uint8)


@AFFINES
def test_a_written_label_is_read_voxel_by_voxel_by_us_and_by_highdicom(affine: np.ndarray):
    volume = make_volume(affine)
    stack = make_stack(volume)
    content = write_label(sources_of(volume), stack, {6: LIVER, 13: ADRENAL})
    assert find_referenced_series(read_dataset(content)) == IDENTITY.series_uid
    read = read_segmentation(read_dataset(content), volume.grid)
    assert read.names == {1: "liver", 2: "left adrenal gland"}
    np.testing.assert_array_equal(volume.arrange(read.labels), np.select([stack == 6, stack == 13], [1, 2]))
    theirs = highdicom.seg.segread(io.BytesIO(content))
    uids = [source.SOPInstanceUID for source in sources_of(volume)]
    pixels = theirs.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    np.testing.assert_array_equal(pixels, np.select([stack == 6, stack == 13], [1, 2]))


def test_two_slices_far_apart_stay_where_they_are():
    volume = make_volume(AXIAL, (5, 6, 9))
    stack = np.zeros(volume.to_stack()[0].shape, np.uint8)
    stack[1, 2, 3] = stack[6, 1, 1] = 6
    read = read_segmentation(read_dataset(write_label(sources_of(volume), stack, {6: LIVER})), volume.grid)
    np.testing.assert_array_equal(volume.arrange(read.labels), stack // 6)


def test_a_segment_says_what_it_is_by_name_code_side_and_who_made_it():
    volume = make_volume(AXIAL)
    seg = read_dataset(write_label(sources_of(volume), make_stack(volume), {6: LIVER, 13: ADRENAL}))
    liver, adrenal = seg.SegmentSequence
    assert (liver.SegmentLabel, liver.SegmentDescription) == ("liver", "liver. Save 3 of today")
    assert liver.SegmentedPropertyTypeCodeSequence[0].CodeValue == "10200004"
    assert liver.SegmentAlgorithmType == "SEMIAUTOMATIC"
    side = adrenal.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodeValue, side.CodeMeaning) == ("7771000", "Left")
    assert highdicom.color.CIELabColor.from_dicom_value(liver.RecommendedDisplayCIELabValue).to_rgb()
    name = "a structure with a name that is far longer than the 64 characters of a DICOM label"
    proposal = Segment(name, 14, is_proposal=True)
    seg = read_dataset(write_label(sources_of(volume), (make_stack(volume) == 6) * np.uint8(14), {14: proposal}))
    (segment,) = seg.SegmentSequence
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    assert len(segment.SegmentLabel) == 64
    assert segment.SegmentDescription.startswith(proposal.name)


@AFFINES
def test_the_agreement_is_a_fraction_per_voxel_and_structure(affine: np.ndarray):
    volume = make_volume(affine, (5, 6, 7))
    shape = volume.to_stack()[0].shape
    shares = [np.random.default_rng(k).integers(0, 5, shape).astype(np.float32) / 4 for k in (0, 1)]
    for share in shares:
        share[[0, -1]] = 0
    nothing = (Segment("spleen", 1), np.zeros(shape, np.float32))
    content = write_agreement(sources_of(volume), [(LIVER, shares[0]), nothing, (ADRENAL, shares[1])])
    theirs = highdicom.seg.segread(io.BytesIO(content))
    assert (theirs.SegmentationType, theirs.SegmentationFractionalType) == ("FRACTIONAL", "PROBABILITY")
    assert theirs.MaximumFractionalValue == LEVELS
    assert [segment.SegmentLabel for segment in theirs.SegmentSequence] == ["liver", "left adrenal gland"]
    uids = [source.SOPInstanceUID for source in sources_of(volume)][1:-1]
    pixels = theirs.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for index, share in enumerate(shares):
        np.testing.assert_allclose(pixels[..., index], share[1:-1], atol=1e-6)  # quarters are whole numbers of levels
    with pytest.raises(ImageError, match="BINARY or LABELMAP"):
        read_segmentation(read_dataset(content), volume.grid)


def test_all_proposals_are_segments_that_overlap():
    volume = make_volume(AXIAL)
    mask = make_masks(volume)["liver"]
    proposals = [(Segment("liver", 6, suffix=f" ({k}/2)", is_proposal=True), np.roll(mask, k, 1)) for k in (0, 1)]
    theirs = highdicom.seg.segread(io.BytesIO(write_overlapping(sources_of(volume), proposals)))
    assert theirs.SegmentsOverlap == "YES"
    assert [segment.SegmentLabel for segment in theirs.SegmentSequence] == ["liver (0/2)", "liver (1/2)"]
    occupied = np.flatnonzero(mask.any(axis=(1, 2)))
    uids = [sources_of(volume)[z].SOPInstanceUID for z in occupied]
    pixels = theirs.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    for index, (_, proposal) in enumerate(proposals):
        np.testing.assert_array_equal(pixels[..., index], proposal[occupied])


def test_what_cannot_be_written_is_refused():
    volume = make_volume(AXIAL)
    sources, stack = sources_of(volume), make_stack(volume)
    with pytest.raises(ImageError, match="Nothing is drawn"):
        write_label(sources, np.zeros_like(stack), {})
    with pytest.raises(ImageError, match="holds 13"):
        write_label(sources, stack, {6: LIVER})
    with pytest.raises(ImageError, match="No proposal draws"):
        write_agreement(sources, [(LIVER, np.zeros(stack.shape, np.float32))])
    with pytest.raises(GeometryError, match="no file of the series is missing"):
        write_label(sources[1:], stack, {6: LIVER, 13: ADRENAL})
    with pytest.raises(GeometryError, match="no file of the series is missing"):
        write_agreement(sources[1:], [(LIVER, np.ones(stack.shape, np.float32))])
    many = [(LIVER, np.ones(stack.shape, bool))] * (MAX_VOXELS // stack.size + 1)
    with pytest.raises(TooLargeError, match="fewer structures"):
        write_overlapping(sources, many)


@AFFINES
def test_the_files_of_a_series_are_the_sources_in_the_order_of_its_slices(affine: np.ndarray, tmp_path: Path):
    volume = make_volume(affine)
    files = export_series(Series.of(IDENTITY, volume), tmp_path / "series")
    for index, file in enumerate(files):  # names say nothing of places
        file.rename(file.with_name(f"{(index * 7) % 11:02d}.dcm"))
    read, wanted = read_sources(tmp_path / "series"), sources_of(volume)
    assert [source.SOPInstanceUID for source in read] == [source.SOPInstanceUID for source in wanted]
    stack = make_stack(volume)
    content = write_label(read, stack, {6: LIVER, 13: ADRENAL})
    labels = read_segmentation(read_dataset(content), volume.grid).labels
    np.testing.assert_array_equal(volume.arrange(labels) > 0, stack > 0)


def test_a_careless_header_does_not_make_a_bad_segmentation(tmp_path: Path):
    volume = make_volume(AXIAL)
    files = export_series(Series.of(IDENTITY, volume), tmp_path / "series")
    for file in files:
        dataset = pydicom.dcmread(file)
        del dataset.PatientSex, dataset.AccessionNumber, dataset.StudyID, dataset.FrameOfReferenceUID
        with pydicom.config.disable_value_validation():
            dataset.StudyDate = "20.1.2026"
            dataset.PatientID = "x" * 80
            dataset.save_as(file)
    seg = read_dataset(write_label(read_sources(tmp_path / "series"), make_stack(volume), {6: LIVER, 13: ADRENAL}))
    assert (seg.StudyDate, seg.PatientSex) == ("", "")
    assert len(str(seg.FrameOfReferenceUID)) > 20
    del dataset.PixelSpacing
    dataset.save_as(files[-1])
    with pytest.raises(ImageError, match="PixelSpacing"):
        read_sources(tmp_path / "series")
    (tmp_path / "series" / "notes.txt").write_text("hello")
    files[-1].unlink()
    with pytest.raises(ImageError, match=r"'notes\.txt' of the series cannot be segmented"):
        read_sources(tmp_path / "series")


@pytest.mark.skipif(not shutil.which("dcmdump"), reason="dcmdump (Debian's dcmtk) is missing")
def test_another_toolkit_reads_every_element(tmp_path: Path):
    volume = make_volume(SAGITTAL)
    shares = [(LIVER, make_masks(volume)["liver"] * np.float32(0.5))]
    contents = {
        "label": write_label(sources_of(volume), make_stack(volume), {6: LIVER, 13: ADRENAL}),
        "agreement": write_agreement(sources_of(volume), shares),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        command = ["dcmdump", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0
        assert done.stderr == ""
        assert "SegmentationStorage" in done.stdout
