"""A label file says itself what its numbers mean, and is believed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from progidiff.errors import ImageError, RequestError
from progidiff.images.reading import read_grid
from progidiff.labels.saving import CheckedLabel, SaveOptions, check_label, open_label
from progidiff.labels.segments import load_label_map, read_names
from progidiff.prompts.structures import fixed_ids
from support.phantoms import write_phantom
from support.segment_files import write_labelled_nifti, write_seg_nrrd

SHAPE = (16, 12, 6)
AFFINE = np.array([[-0.8, 0, 0, 20], [0, -0.8, 0, 15], [0, 0, 5.0, -40], [0, 0, 0, 1]])
LIVER, SPLEEN = fixed_ids()["liver"], fixed_ids()["spleen"]
BOX, OTHER = np.s_[2:8, 2:8, 1:4], np.s_[6:12, 2:8, 2:5]
IN_BOX, IN_OTHER, IN_BOTH = (2, 2, 1), (11, 7, 4), (7, 7, 3)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write_phantom(tmp_path / "image.nii.gz", shape=SHAPE, affine=AFFINE)


def draw(first: int, second: int) -> np.ndarray:
    array = np.zeros(SHAPE, np.uint8)
    array[BOX] = first
    array[OTHER] = second
    return array


def check(file: Path, image: Path, **params: object) -> CheckedLabel:
    grid = read_grid(image)
    return check_label(file, open_label(file, grid), SaveOptions.from_params(params, grid.num_slices), fixed_ids())


def test_the_header_of_a_segmentation_names_its_numbers(tmp_path: Path, image: Path):
    file = write_seg_nrrd(tmp_path / "x.seg.nrrd", draw(1, 2), [("liver", 1), ("Spleen", 2)], AFFINE)
    checked = check(file, image)
    assert checked.array[IN_BOX] == LIVER
    assert checked.array[IN_OTHER] == SPLEEN
    assert checked.label_ids == {"liver": LIVER, "spleen": SPLEEN}
    assert not checked.is_as_sent


def test_the_header_knows_the_numbers_of_segments_that_were_moved(tmp_path: Path, image: Path):
    file = write_seg_nrrd(tmp_path / "x.seg.nrrd", draw(2, 1), [("liver", 2), ("spleen", 1)], AFFINE)
    assert check(file, image).array[IN_BOX] == LIVER
    by_position = [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]
    with pytest.raises(RequestError, match=r"The file says that 2 is 'liver', and label_info says 'spleen'") as caught:
        check(file, image, label_info=by_position)
    assert caught.value.status == 422
    agreeing = [{"name": "Liver", "idx": 2}, {"name": "spleen", "idx": 1}, {"name": "aorta", "idx": 3}]
    assert check(file, image, label_info=agreeing).label_ids == {"liver": LIVER, "spleen": SPLEEN, "aorta": 8}


def test_a_segment_without_a_name_is_named_by_its_code_or_by_the_table_or_told_of(tmp_path: Path, image: Path):
    names = [("Segment_1", 1), ("Segment_2", 2)]
    coded = write_seg_nrrd(
        tmp_path / "a.seg.nrrd",
        draw(1, 2),
        names,
        AFFINE,
        ["SCT^10200004^Liver~^^", "SCT^64033007^Kidney~SCT^7771000^Left"],
    )
    assert check(coded, image).label_ids == {"liver": LIVER, "left kidney": 3}
    plain = write_seg_nrrd(tmp_path / "b.seg.nrrd", draw(1, 2), names, AFFINE)
    checked = check(plain, image, label_info=[{"name": "liver", "idx": 1}])
    assert checked.label_ids == {"liver": LIVER, "Segment_2": 14}
    assert len(checked.notes) == 1
    assert "'Segment_2' has no name" in checked.notes[0]
    assert set(check(plain, image).label_ids) == {"Segment_1", "Segment_2"}  # and not what 1 and 2 mean elsewhere


def test_a_name_and_a_code_that_differ_are_refused(tmp_path: Path, image: Path):
    file = write_seg_nrrd(tmp_path / "x.seg.nrrd", draw(1, 0), [("liver", 1)], AFFINE, ["SCT^78961009^Spleen~^^"])
    with pytest.raises(ImageError, match=r"calls a segment 'liver' and codes it as 'spleen'"):
        check(file, image)


@pytest.mark.parametrize("values", [(1, 1), (1, 2)], ids=["a number for each layer", "numbers of all layers"])
def test_overlapping_layers_become_one_map_and_what_is_kept_is_told(
    tmp_path: Path, image: Path, values: tuple[int, int]
):
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0][BOX], layers[1][OTHER] = values
    file = write_seg_nrrd(tmp_path / "x.seg.nrrd", layers, [("liver", values[0], 0), ("spleen", values[1], 1)], AFFINE)
    checked = check(file, image)
    assert checked.array[IN_BOX] == LIVER
    assert checked.array[IN_OTHER] == checked.array[IN_BOTH] == SPLEEN
    overlap = int((layers[0].astype(bool) & layers[1].astype(bool)).sum())
    assert checked.notes == (
        f"'spleen' lies over 'liver' in {overlap} voxels; a label holds one structure per voxel, and 'spleen', which "
        "comes later in the list, is kept there.",
    )
    assert not checked.is_as_sent
    assert read_names(file) == {1: "liver", 2: "spleen"}


def test_a_layered_file_on_another_grid_or_with_strange_numbers_is_refused(tmp_path: Path, image: Path):
    layers = np.zeros((2, *SHAPE), np.uint8)
    layers[0][BOX] = 1
    segments = [("liver", 1, 0), ("spleen", 1, 1)]
    moved = AFFINE.copy()
    moved[0, 3] += 3
    with pytest.raises(ImageError, match="mm away"):
        check(write_seg_nrrd(tmp_path / "a.seg.nrrd", layers, segments, moved), image)
    layers[1][OTHER] = 7
    with pytest.raises(ImageError, match="none of its segments"):
        check(write_seg_nrrd(tmp_path / "b.seg.nrrd", layers, segments, AFFINE), image)
    with pytest.raises(ImageError, match="2 values per voxel and names no segments"):
        check(write_seg_nrrd(tmp_path / "c.seg.nrrd", layers, [], AFFINE), image)


def test_a_layered_header_that_points_to_another_file_is_refused(tmp_path: Path, image: Path):
    layers = np.zeros((2, *SHAPE), np.uint8)
    file = write_seg_nrrd(tmp_path / "x.seg.nrrd", layers, [("liver", 1, 0), ("spleen", 1, 1)], AFFINE)
    header, _, data = file.read_bytes().partition(b"\n\n")
    (tmp_path / "secret.raw").write_bytes(data)
    file.write_bytes(header + b"\ndata file: secret.raw\n\n")
    with pytest.raises(ImageError):
        load_label_map(file, read_grid(image))


def test_a_nifti_with_a_label_table_names_what_it_draws(tmp_path: Path, image: Path):
    names = {1: "kidney_right", 2: "liver", 3: "vertebrae_L5"}
    file = write_labelled_nifti(tmp_path / "x.nii.gz", draw(1, 2), names, AFFINE)
    checked = check(file, image)
    assert checked.label_ids == {"right kidney": 2, "liver": LIVER}
    assert checked.array[IN_BOX] == 2
    with pytest.raises(RequestError, match="The file says that 2 is 'liver', and label_info says 'spleen'"):
        check(file, image, label_info=[{"name": "spleen", "idx": 2}])


def test_a_file_that_says_nothing_is_read_as_before(tmp_path: Path, image: Path):
    file = write_seg_nrrd(tmp_path / "x.nrrd", draw(LIVER, SPLEEN), [], AFFINE)
    assert read_names(file) == {}
    assert check(file, image).label_ids == {"liver": LIVER, "spleen": SPLEEN}
    assert check(file, image).is_as_sent
    (tmp_path / "broken.nrrd").write_bytes(b"NRRD0004")
    assert read_names(tmp_path / "broken.nrrd") == {}
    assert read_names(tmp_path / "absent.nii.gz") == {}
