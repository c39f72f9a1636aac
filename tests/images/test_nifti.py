"""NIfTI headers that can be read in more than one way: ITK is the judge of where an image and its answers lie."""

from __future__ import annotations

import re
import struct
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from progidiff.errors import GeometryError, ImageError
from progidiff.images.reading import load_label, load_volume, read_grid
from progidiff.images.writing import save_array, save_mask
from support.images import SHAPE, make_affine, make_image

BASE = make_affine("LPS", (1.5, 0.8, 4.0), degrees=12)
MM_IN = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}
"""By code of `xyzt_units`."""


def change(kind: str) -> np.ndarray:
    """An sform beside the qform `BASE`."""
    affine = BASE.copy()
    if kind == "sheared":
        affine[:3, 1] += 3e-3 * affine[:3, 0]
    elif kind == "moved":
        affine[0, 3] += 35
    elif kind == "flipped":
        affine[:3, 0] *= -1
    elif kind == "without a row":
        affine[2] = 0
    elif kind == "twice as large":
        affine[:3, :3] *= 2
    return affine


def write(
    path: Path, *, sform: str = "same", sform_code: int = 1, qform_code: int = 1, unit: int = 2, array: Any = None
) -> Path:
    """An image whose voxels are `BASE` by its qform, and what `change` says by its sform."""
    to_unit = np.diag([*[1 / MM_IN[unit]] * 3, 1])
    image = nibabel.Nifti1Image(make_image() if array is None else array, None)
    image.header.set_qform(to_unit @ BASE, code=1)
    image.header.set_sform(to_unit @ change(sform), code=1)
    image.header["qform_code"], image.header["sform_code"] = qform_code, sform_code
    image.header["xyzt_units"] = unit
    nibabel.save(image, path)
    return path


def find_place(path: Path) -> np.ndarray | None:
    """Voxel index -> RAS mm as ITK has it; None if it does not open the file."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (3, 3)) * reader.GetSpacing()
    affine[:3, 3] = reader.GetOrigin()
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def check_answers(image: Path, folder: Path) -> None:
    """Answers in every format lie on the image, by ITK; as NIfTI they have its header's fields."""
    volume = load_volume(image, "CT")
    seen = find_place(image)
    assert seen is not None
    np.testing.assert_allclose(volume.affine, seen, atol=1e-3)
    np.testing.assert_array_equal(read_grid(image).affine, volume.affine)
    mask = (volume.array > 0).astype(np.uint8)
    for suffix in (".nii.gz", ".nii", ".nrrd", ".mha"):
        answer = save_mask(mask, volume.grid, folder / f"answer{suffix}")
        place = find_place(answer)
        assert place is not None, suffix
        np.testing.assert_allclose(place, seen, atol=1e-3, err_msg=suffix)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(answer))).T, mask)
        assert np.array_equal(load_label(answer, volume.grid), mask)
    theirs, ours = nibabel.load(image).header, nibabel.load(folder / "answer.nii.gz").header
    for name in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "xyzt_units"):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    np.testing.assert_array_equal(ours["pixdim"][:4], theirs["pixdim"][:4])


@pytest.mark.parametrize(
    ("header", "taken", "warning"),
    [
        ({}, "both", None),
        ({"sform_code": 0}, "qform", None),
        ({"qform_code": 0}, "sform", None),
        ({"sform": "sheared"}, "qform", None),  # too little to speak of in so small an image
        ({"sform": "moved", "sform_code": 2}, "qform", r"sform \(code 2\).*35.00 mm apart.*qform was taken"),
        ({"sform": "moved", "sform_code": 1}, "sform", "35.00 mm apart.*sform was taken"),
        ({"sform_code": 0, "qform_code": 0}, "none", "no orientation.*left"),
        ({"unit": 3}, "both", "micrometres"),
        ({"unit": 1, "qform_code": 0}, "sform", "metres"),
        ({"sform": "without a row"}, "qform", "qform was taken"),
        ({"sform": "twice as large", "qform_code": 0}, "sform", "other voxel sizes than its pixdim"),
    ],
)
def test_an_answer_lies_on_its_image_and_says_what_was_taken(
    tmp_path: Path, header: dict[str, Any], taken: str, warning: str | None
) -> None:
    image = write(tmp_path / "case.nii.gz", **header)
    check_answers(image, tmp_path)
    grid = read_grid(image)
    assert grid.header is not None
    assert grid.header.taken == taken
    if warning is None:
        assert grid.warnings == ()
    else:
        assert len(grid.warnings) == 1
        assert re.search(warning, grid.warnings[0]), grid.warnings


def test_every_mixture_is_read_as_itk_reads_it(tmp_path: Path) -> None:
    kinds = ("same", "sheared", "moved", "flipped", "without a row", "twice as large")
    mixtures = list(product(kinds, (0, 1, 2, 4), (0, 1, 2), (0, 1, 2, 3)))
    seen = 0
    for number in np.random.default_rng(5).permutation(len(mixtures))[:48]:
        kind, sform_code, qform_code, unit = mixtures[number]
        image = write(tmp_path / "case.nii", sform=kind, sform_code=sform_code, qform_code=qform_code, unit=unit)
        if find_place(image) is not None:
            seen += 1
            check_answers(image, tmp_path)
        elif kind == "without a row":
            with pytest.raises(ImageError, match="no usable voxel size"):
                load_volume(image, "CT")
        else:
            assert "right angles" in load_volume(image, "CT").grid.warnings[-1]
    assert seen > 30


@pytest.mark.parametrize("codes", [{"sform_code": 0, "qform_code": 0}, {"sform": "moved", "sform_code": 2}])
def test_a_label_on_either_reading_is_accepted_voxel_by_voxel(tmp_path: Path, codes: dict[str, Any]) -> None:
    image = write(tmp_path / "case.nii.gz", **codes)
    grid = read_grid(image)
    labels = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
    by_nibabel = tmp_path / "by_nibabel.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, nibabel.load(image).affine), by_nibabel)
    by_itk = sitk.GetImageFromArray(labels.T)
    by_itk.CopyInformation(sitk.ReadImage(str(image)))
    sitk.WriteImage(by_itk, str(tmp_path / "by_itk.nrrd"))
    for file in (by_nibabel, tmp_path / "by_itk.nrrd", write(tmp_path / "same.nii", array=labels, **codes)):
        assert np.array_equal(load_label(file, grid), labels), file.name
    elsewhere = grid.affine.copy()
    elsewhere[2, 3] += 7
    with pytest.raises(GeometryError, match="lies up to"):
        load_label(save_array(labels, elsewhere, tmp_path / "elsewhere.nrrd"), grid)


def set_sizes(path: Path, *sizes: float) -> Path:
    """Other voxel sizes in the header of an uncompressed file, in its bytes: the library writes positive ones only."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<3f", content, 80, *sizes)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("codes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_negative_voxel_sizes_are_read_as_itk_reads_them_and_said(tmp_path: Path, codes: tuple[int, int]) -> None:
    written = write(tmp_path / "case.nii", sform_code=codes[0], qform_code=codes[1])
    usual = nibabel.load(written).affine
    image = set_sizes(written, *(-nibabel.load(written).header["pixdim"][1:2]), 0.8, 4.0)
    grid = read_grid(image)
    check_answers(image, tmp_path)
    assert len(grid.warnings) == 1
    assert "negative voxel sizes (pixdim -1.5, 0.8, 4)" in grid.warnings[0]
    # What was drawn in a program that takes them as positive means the same voxels.
    nibabel.save(nibabel.Nifti1Image(np.ones(grid.shape, np.uint8), usual), tmp_path / "label.nii")
    load_label(tmp_path / "label.nii", grid)


@pytest.mark.parametrize("name", ["Case.Nii", "case.NII", "case.nii.GZ", "Case.Nii.Gz"])
def test_a_name_may_have_its_suffix_in_any_case(tmp_path: Path, name: str) -> None:
    usual = write(tmp_path / ("plain.nii.gz" if name.lower().endswith("gz") else "plain.nii"))
    image = usual.rename(tmp_path / name)
    np.testing.assert_array_equal(load_volume(image, "CT").array, make_image())
    assert read_grid(image).shape == SHAPE


def test_a_file_whose_name_and_packing_differ_says_what_to_call_it(tmp_path: Path) -> None:
    packed, plain = write(tmp_path / "a.nii.gz"), write(tmp_path / "b.nii")
    packed, plain = packed.rename(tmp_path / "packed.nii"), plain.rename(tmp_path / "plain.nii.gz")
    (tmp_path / "empty.nii.gz").touch()
    for path, reason in {
        packed: r"it is compressed.*rename it to end in \.nii\.gz",
        plain: r"it is not compressed.*rename it to end in \.nii\.",
        tmp_path / "empty.nii.gz": "is empty.*Copy it again",
    }.items():
        for read in (load_volume, read_grid):
            with pytest.raises(ImageError, match=reason):
                read(path)
