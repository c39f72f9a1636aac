"""Geometry as round trips, readers against each other, and every refusal with its cure."""

from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation

from progidiff.dicomweb.catalogue import describe_file
from progidiff.errors import GeometryError, ImageError, NotFoundError, RequestError, StoreError
from progidiff.images.formats import strip_suffix
from progidiff.images.intensities import compute_body_threshold, compute_window, guess_modality
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.images.writing import save_mask
from support.images import GEOMETRIES, SHAPE, make_affine, make_image, write_dicom

ALL_ORIENTATIONS = ["".join(letters) for axes in permutations(("LR", "PA", "SI")) for letters in product(*axes)]
"""The 48 ways to order and point three axes, as nibabel's axis codes."""


def make_volume(affine: np.ndarray, array: np.ndarray | None = None) -> Volume:
    return Volume(make_image() if array is None else array, affine, "CT", "option", "case")


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    nibabel.save(nibabel.Nifti1Image(array, make_affine("LPS") if affine is None else affine), path)
    return path


@pytest.mark.parametrize("codes", ALL_ORIENTATIONS)
def test_a_stack_returns_to_file_order_exactly(codes: str) -> None:
    volume = make_volume(make_affine(codes))
    stack, _ = volume.to_stack()
    assert np.array_equal(volume.from_stack(stack), volume.array)


@pytest.mark.parametrize("affine", GEOMETRIES.values(), ids=GEOMETRIES)
def test_a_voxel_is_located_where_the_stack_has_it(affine: np.ndarray) -> None:
    volume = Volume(np.arange(np.prod(SHAPE), dtype=np.int32).reshape(SHAPE), affine, "CT", "option", "numbers")
    stack, _ = volume.to_stack()
    for index in ((0, 0, 0), (10, 8, 6), (3, 7, 2)):
        assert stack[volume.grid.locate(index)] == volume.array[index]
    assert stack.shape[0] == SHAPE[volume.grid.axial_axis]
    with pytest.raises(GeometryError, match="outside of 'numbers'"):
        volume.grid.locate((0, 9, 0))


@pytest.mark.parametrize("codes", ALL_ORIENTATIONS)
def test_a_stack_is_what_nibabel_calls_lps_transposed(codes: str) -> None:
    affine = make_affine(codes)
    image = nibabel.Nifti1Image(make_image(), affine)
    lps = image.as_reoriented(nibabel.orientations.ornt_transform(io_orientation(affine), axcodes2ornt("LPS")))
    stack, spacing = make_volume(affine).to_stack()
    assert np.array_equal(stack, np.asarray(lps.dataobj).transpose(2, 1, 0))
    assert spacing == pytest.approx(lps.header.get_zooms()[::-1], rel=1e-5)


@given(
    codes=st.sampled_from(ALL_ORIENTATIONS),
    shape=st.tuples(*[st.integers(2, 6)] * 3),
    spacing=st.tuples(*[st.floats(0.3, 8.0)] * 3),
    degrees=st.floats(-25, 25),
)
@settings(max_examples=60, deadline=None)
def test_any_geometry_survives_the_way_there_and_back(
    codes: str, shape: tuple[int, int, int], spacing: tuple[float, float, float], degrees: float
) -> None:
    volume = make_volume(make_affine(codes, spacing, degrees), make_image(shape=shape))
    stack, edges = volume.to_stack()
    assert np.array_equal(volume.from_stack(stack), volume.array)
    assert sorted(edges) == pytest.approx(sorted(spacing))


def test_patient_left_posterior_and_superior_are_at_the_high_ends_of_the_stack(affine: np.ndarray) -> None:
    centre = affine @ [*(np.array(SHAPE) - 1) / 2, 1]
    indices = np.stack(np.meshgrid(*[np.arange(size) for size in SHAPE], indexing="ij"), -1)
    world = indices @ affine[:3, :3].T + affine[:3, 3] - centre[:3]
    volume = make_volume(affine)
    for axis, towards in ((0, (0, 0, 1)), (1, (0, -1, 0)), (2, (-1, 0, 0))):  # stack axes z, y, x in RAS
        height = volume.arrange(world @ np.array(towards, float)).mean(axis=tuple({0, 1, 2} - {axis}))
        assert (np.diff(height) > 0).all()


def test_a_stack_is_a_view_and_costs_no_memory(affine: np.ndarray) -> None:
    volume = make_volume(affine)
    stack, _ = volume.to_stack()
    assert np.shares_memory(stack, volume.array)
    assert np.shares_memory(volume.from_stack(stack), volume.array)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_mask_comes_back_on_the_grid_of_the_input(tmp_path: Path, affine: np.ndarray, suffix: str) -> None:
    volume = load_volume(write_nifti(tmp_path / "image.nii.gz", make_image(), affine), modality="CT")
    stack, _ = volume.to_stack()
    path = save_mask(volume.from_stack(stack > 900), volume.grid, tmp_path / f"mask{suffix}")
    assert np.array_equal(load_label(path, like=volume.grid), (volume.array > 900).astype(np.uint8))
    again = load_volume(path, modality="CT")
    assert np.allclose(again.affine, volume.affine, atol=1e-4)
    assert again.array.dtype == np.uint8


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_nifti_and_itk_readers_agree(tmp_path: Path, affine: np.ndarray, suffix: str) -> None:
    path = write_nifti(tmp_path / "image.nii", make_image(), affine)
    sitk.WriteImage(sitk.ReadImage(str(path)), str(tmp_path / f"image{suffix}"))
    ours, theirs = load_volume(path), load_volume(tmp_path / f"image{suffix}")
    assert np.array_equal(ours.array, theirs.array)
    assert np.allclose(ours.affine, theirs.affine, atol=1e-4)


def test_a_nrrd_mask_is_where_simpleitk_finds_the_nifti_image(tmp_path: Path, affine: np.ndarray) -> None:
    volume = load_volume(write_nifti(tmp_path / "image.nii.gz", make_image(), affine))
    mask = sitk.ReadImage(str(save_mask(volume.array > 0, volume.grid, tmp_path / "mask.nrrd")))
    image = sitk.ReadImage(str(tmp_path / "image.nii.gz"))
    assert mask.GetOrigin() == pytest.approx(image.GetOrigin(), abs=1e-4)
    assert mask.GetDirection() == pytest.approx(image.GetDirection(), abs=1e-4)
    assert mask.GetSpacing() == pytest.approx(image.GetSpacing(), abs=1e-4)


def test_a_sheared_affine_is_kept_and_not_squared_up(tmp_path: Path) -> None:
    sheared = make_affine("LPS")
    sheared[1, 2] = 0.9  # gantry tilt
    volume = load_volume(write_nifti(tmp_path / "tilted.nii.gz", make_image(), sheared))
    again = load_volume(save_mask(volume.array > 0, volume.grid, tmp_path / "mask.nii.gz"), modality="CT")
    assert np.allclose(again.affine, sheared, atol=1e-4)


@pytest.mark.parametrize("compressor", [None, "JPEG2000"])
@pytest.mark.parametrize("codes", ["LPS", "PIR", "oblique"])
def test_a_dicom_series_is_the_nifti_of_the_same_voxels(tmp_path: Path, codes: str, compressor: str | None) -> None:
    affine = make_affine("LPS", (0.75, 0.75, 3.0), 10) if codes == "oblique" else make_affine(codes, (0.75, 0.75, 3.0))
    stored = make_image(shape=(12, 10, 5))
    volume = load_volume(write_dicom(tmp_path / "series", stored, affine, compressor=compressor))
    reference = make_volume(affine, stored)
    stack, spacing = volume.to_stack()
    expected, expected_spacing = reference.to_stack()
    assert np.array_equal(stack, expected)
    assert spacing == pytest.approx(expected_spacing, abs=1e-4)
    flip = inv_ornt_aff(
        io_orientation(np.linalg.inv(affine) @ volume.affine), stored.shape
    )  # slices may count from the other end
    assert np.allclose(affine @ flip, volume.affine, atol=1e-3)
    assert (volume.modality, volume.modality_source) == ("CT", "dicom")


def test_dicom_slices_are_sorted_by_position_and_not_by_file_name(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.int16) * 100, (6, 6, 8)).copy()
    volume = load_volume(write_dicom(tmp_path / "series", ramp, make_affine("LPS")))
    stack, _ = volume.to_stack()
    assert np.array_equal(stack[:, 0, 0], np.arange(8) * 100)


def test_one_dicom_file_opens_its_whole_series(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "series", make_image(), make_affine("LPS"))
    write_dicom(tmp_path / "other", make_image(1), make_affine("LPS"), uid="1.2.826.0.1.2")
    for path in (tmp_path / "other").iterdir():
        path.rename(folder / f"other-{path.name}")
    assert np.array_equal(load_volume(folder / "000.dcm").array, load_volume(folder / "007.dcm").array)
    assert load_volume(folder / "000.dcm").array.shape == SHAPE


def test_two_dicom_series_in_a_folder_are_named_in_the_error(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", make_image(), make_affine("LPS"))
    write_dicom(tmp_path / "b", make_image(), make_affine("LPS"), uid="1.2.826.0.1.2")
    for path in (tmp_path / "b").iterdir():
        path.rename(tmp_path / "a" / f"b-{path.name}")
    with pytest.raises(
        ImageError, match=r"2 DICOM series: 1\.2\.826\.0\.1\.1 \(CT, abdomen, 7 files\).*folder of its own"
    ):
        load_volume(tmp_path / "a")


def test_a_missing_dicom_slice_is_noticed(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "series", make_image(), make_affine("LPS"))
    (folder / f"{(3 * 7) % 23:03d}.dcm").unlink()
    with pytest.raises(ImageError, match=r"4\.00 to 8\.00 mm apart.*one complete series"):
        load_volume(folder)


def test_a_pet_series_is_refused_until_the_user_insists(tmp_path: Path) -> None:
    folder = write_dicom(tmp_path / "series", make_image(), make_affine("LPS"), **{"0008x0060": "PT"})
    with pytest.raises(ImageError, match="PT image.*give modality=CT or MR"):
        load_volume(folder)
    assert load_volume(folder, modality="ct").modality_source == "option"


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no DICOM series"):
        load_volume(tmp_path)


def test_the_modality_comes_from_option_then_info_then_sidecar_then_a_guess(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "case.nii.gz", make_image())
    assert (load_volume(path).modality, load_volume(path).modality_source) == ("CT", "guessed")
    (tmp_path / "case.json").write_text(json.dumps({"modality": "MR"}))
    assert (load_volume(path).modality, load_volume(path).modality_source) == ("MR", "sidecar")
    assert load_volume(path, info={"modality": "ct"}).modality == "CT"
    assert load_volume(path, modality="auto").modality_source == "sidecar"
    assert load_volume(path, modality="CT").modality_source == "option"


def test_the_dicom_tag_that_a_datastore_hands_on_is_the_modality(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "case.nii.gz", make_image())
    volume = load_volume(path, info={"Modality": "MR", "PatientID": "x"})
    assert (volume.modality, volume.modality_source) == ("MR", "dicom")
    assert load_volume(path, modality="CT", info={"Modality": "MR"}).modality == "CT"
    assert load_volume(path, info={"Modality": "UNK"}).modality_source == "guessed"
    with pytest.raises(ImageError, match="is a PT image"):
        load_volume(path, info={"Modality": "PT"})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_converters_sidecar_says_the_modality_with_a_capital_m(tmp_path: Path, encoding: str) -> None:
    path = write_nifti(tmp_path / "case.nii.gz", make_image())  # HU, which would be guessed to be CT.
    sidecar = tmp_path / "case.json"
    # Names of places come as the scanner has them.
    stated = {"Modality": "MR", "ConversionSoftware": "dcm2niix", "InstitutionName": "Universitätsspital"}
    sidecar.write_text(json.dumps(stated, ensure_ascii=False), encoding=encoding)
    assert (load_volume(path).modality, load_volume(path).modality_source) == ("MR", "sidecar")
    sidecar.write_text(json.dumps({"Modality": "MR", "modality": "CT"}), encoding=encoding)
    assert load_volume(path).modality == "CT"
    sidecar.write_text(json.dumps({"Modality": "PT"}), encoding=encoding)
    with pytest.raises(ImageError, match="is a PT image, and only CT and MR are known here; give modality=CT or MR"):
        load_volume(path)
    assert load_volume(path, modality="CT").modality_source == "option"
    assert "is a PT image" in describe_file("case", path).refused
    sidecar.write_text(json.dumps({"Modality": "OT"}), encoding=encoding)
    assert load_volume(path).modality_source == "guessed"


def test_a_sidecar_with_no_modality_that_is_known_is_named(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "case.nii.gz", make_image())
    (tmp_path / "case.json").write_text('{"modality": "T1w"}')
    with pytest.raises(RequestError, match=r"The modality in 'case\.json' is 'T1w'; it must be CT or MR"):
        load_volume(path)


def test_a_broken_sidecar_is_ignored(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "case.nii.gz", make_image())
    (tmp_path / "case.json").write_text("{")
    assert load_volume(path).modality_source == "guessed"


def test_an_unknown_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'ultrasound'; it must be CT or MR"):
        load_volume(write_nifti(tmp_path / "case.nii.gz", make_image()), modality="ultrasound")


def test_integers_are_kept_and_scaled_integers_become_float32(tmp_path: Path) -> None:
    assert load_volume(write_nifti(tmp_path / "plain.nii.gz", make_image())).array.dtype == np.int16
    image = nibabel.Nifti1Image(make_image(), make_affine("LPS"))
    image.header.set_slope_inter(0.5, -10)
    nibabel.save(image, tmp_path / "scaled.nii.gz")
    scaled = load_volume(tmp_path / "scaled.nii.gz").array
    assert scaled.dtype == np.float32
    assert np.array_equal(scaled, make_image().astype(np.float32) / 2 - 10)
    assert (
        load_volume(write_nifti(tmp_path / "double.nii.gz", make_image().astype(np.float64))).array.dtype == np.float32
    )


def test_a_big_endian_file_is_read_in_native_order(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(make_image().astype(">i2"), make_affine("LPS"), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "big.nii")
    volume = load_volume(tmp_path / "big.nii")
    assert volume.array.dtype.isnative
    assert np.array_equal(volume.array, make_image())


def test_a_fourth_axis_of_one_frame_is_dropped(tmp_path: Path) -> None:
    assert load_volume(write_nifti(tmp_path / "one.nii.gz", make_image()[..., None])).array.shape == SHAPE


def test_a_time_series_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds 3 volumes.*four_to_three"):
        load_volume(write_nifti(tmp_path / "series.nii.gz", np.repeat(make_image()[..., None], 3, axis=3)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 6), np.int16), "has 2 axes"),
        (np.full((5, 6, 7), 4, np.int16), "value 4; there is nothing to see"),
        (np.where(np.arange(60).reshape(3, 4, 5) == 7, np.nan, 1.5), "1 of 60 voxels.*nan_to_num"),
        (np.where(np.arange(60).reshape(3, 4, 5) == 7, np.inf, 1.5), "1 of 60 voxels.*not finite"),
        (np.ones((1, 6, 7), np.int16), "single sagittal or coronal slice"),
        (np.ones((3, 4, 5), np.complex64), "colour or complex"),
    ],
)
def test_an_image_that_shows_nothing_usable_is_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_volume(write_nifti(tmp_path / "image.nii.gz", array))


def test_a_flat_affine_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "flat.nii", make_image())
    header = bytearray(path.read_bytes())
    header[252:254] = bytes(2)  # qform_code
    header[312:328] = bytes(16)  # srow_z
    path.write_bytes(header)
    with pytest.raises(ImageError, match="no usable voxel size and orientation"):
        load_volume(path)


def test_a_text_file_named_as_an_image_is_refused(tmp_path: Path) -> None:
    for name in ("notes.nii.gz", "notes.nii", "notes.nrrd", "notes.mha", "notes.dcm", "notes.txt", "notes"):
        (tmp_path / name).write_text("this is not an image " * 30)
        with pytest.raises(ImageError, match=r"notes.*(cannot be read as an image|is no image format).*"):
            load_volume(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "image.nii.gz", make_image(shape=(40, 40, 20)))
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(ImageError, match="cut off or of another format"):
        load_volume(path)


def test_a_header_that_claims_too_much_is_refused_before_reading(tmp_path: Path) -> None:
    path = write_nifti(tmp_path / "bomb.nii", make_image())
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([30000, 30000, 30000], np.int16).tobytes()
    path.write_bytes(content)
    with pytest.raises(ImageError, match="30000 x 30000 x 30000 voxels, more than"):
        load_volume(path)


def test_a_missing_image_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no image at .*nowhere\.nii\.gz"):
        load_volume(tmp_path / "nowhere.nii.gz")


def test_labels_use_the_smallest_type_and_may_be_empty(tmp_path: Path) -> None:
    volume = make_volume(make_affine("LPS"))
    labels = np.zeros(SHAPE, np.float64)
    assert load_label(write_nifti(tmp_path / "empty.nii.gz", labels), like=volume.grid).dtype == np.uint8
    labels[0, 0, 0] = 300
    assert load_label(write_nifti(tmp_path / "many.nii.gz", labels), like=volume.grid).dtype == np.uint16


def test_a_label_of_another_grid_is_refused(tmp_path: Path) -> None:
    volume = make_volume(make_affine("LPS"))
    with pytest.raises(GeometryError, match="has 11 x 9 x 6 voxels and the image 'case' 11 x 9 x 7"):
        load_label(write_nifti(tmp_path / "cropped.nii.gz", np.zeros((11, 9, 6), np.uint8)), like=volume.grid)
    shifted = make_affine("LPS")
    shifted[2, 3] += 2
    with pytest.raises(GeometryError, match=r"lies up to 2\.00 mm away"):
        load_label(write_nifti(tmp_path / "shifted.nii.gz", np.zeros(SHAPE, np.uint8), shifted), like=volume.grid)


@pytest.mark.parametrize("value", [0.5, -1.0, np.nan])
def test_a_label_map_of_anything_but_whole_numbers_is_refused(tmp_path: Path, value: float) -> None:
    labels = np.zeros(SHAPE, np.float32)
    labels[2, 2, 2] = value
    with pytest.raises(ImageError, match="whole numbers"):
        load_label(write_nifti(tmp_path / "label.nii.gz", labels))


def test_a_saved_map_of_shares_stays_float(tmp_path: Path) -> None:
    volume = make_volume(make_affine("RAS"))
    shares = np.linspace(0, 1, volume.array.size).reshape(SHAPE)
    again = load_volume(save_mask(shares, volume.grid, tmp_path / "agreement.nii.gz"), modality="CT").array
    assert again.dtype == np.float32
    assert np.allclose(again, shares, atol=1e-6)


def test_saving_leaves_no_temporary_files_and_replaces_what_was_there(tmp_path: Path) -> None:
    volume = make_volume(make_affine("LPS"))
    for value in (1, 2):
        save_mask(np.full(SHAPE, value, np.uint8), volume.grid, tmp_path / "out" / "mask.nii.gz")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mask.nii.gz"]
    assert load_label(tmp_path / "out" / "mask.nii.gz").max() == 2


def test_a_mask_of_another_shape_or_suffix_is_not_saved(tmp_path: Path) -> None:
    volume = make_volume(make_affine("LPS"))
    with pytest.raises(GeometryError, match="is not on the grid of 'case'"):
        save_mask(np.zeros((7, 9, 11), np.uint8), volume.grid, tmp_path / "mask.nii.gz")
    with pytest.raises(RequestError, match=r"suffix must be one of \.nii\.gz"):
        save_mask(np.zeros(SHAPE, np.uint8), volume.grid, tmp_path / "mask.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        save_mask(np.zeros(SHAPE, np.uint8), volume.grid, tmp_path / "file" / "mask.nii.gz")


def test_the_digest_follows_content_and_grid() -> None:
    first = make_volume(make_affine("LPS"))
    assert first.digest == make_volume(make_affine("LPS")).digest
    assert first.digest != make_volume(make_affine("RAS")).digest
    assert first.digest != make_volume(make_affine("LPS"), make_image(1)).digest


def test_voxel_volume_is_in_millilitres() -> None:
    assert make_volume(make_affine("PIR", (1.0, 2.0, 5.0), 15)).voxel_ml == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "stem"), [("a.nii.gz", "a"), ("a.b.NII", "a.b"), ("a.nrrd", "a"), ("CT.1.2.3", "CT.1.2.3")]
)
def test_a_name_loses_only_an_image_suffix(name: str, stem: str) -> None:
    assert strip_suffix(name) == stem


def make_scan(kind: str) -> np.ndarray:
    """A body with fat, muscle and bone in air, as int16 or float32 intensities of this kind."""
    generator = np.random.default_rng(3)
    y, x, _ = np.ogrid[-1:1:48j, -1:1:48j, 0:1:8j]
    radius = np.hypot(x / 0.8, y / 0.6) + np.zeros((1, 1, 8))
    hu = np.full(radius.shape, -1000.0)
    hu[radius < 1] = -100
    hu[radius < 0.85] = 50
    hu[radius < 0.15] = 700
    hu = hu + generator.normal(0, 12, hu.shape)
    if kind == "ct":
        return hu.astype(np.int16)
    if kind == "clipped ct":
        return np.clip(hu, -125, 275).astype(np.float32)
    signal = np.abs(
        np.interp(hu, [-1000, -200, -100, 50, 700], [0, 0, 800, 300, 60]) + generator.normal(0, 10, hu.shape)
    )
    if kind == "normalised mr":
        return ((signal - signal.mean()) / signal.std()).astype(np.float32)
    if kind == "resampled mr":
        return (signal - 25).astype(np.int16)
    return signal.astype(np.int16)


@pytest.mark.parametrize(
    ("kind", "modality"),
    [("ct", "CT"), ("clipped ct", "CT"), ("mr", "MR"), ("normalised mr", "MR"), ("resampled mr", "MR")],
)
def test_the_modality_is_guessed_from_the_intensities(kind: str, modality: str) -> None:
    assert guess_modality(make_scan(kind)) == modality


@pytest.mark.parametrize("kind", ["ct", "clipped ct", "mr", "normalised mr"])
def test_the_body_threshold_separates_the_body_from_air(kind: str) -> None:
    array = make_scan(kind)
    volume = Volume(array, make_affine("LPS"), guess_modality(array), "guessed", "scan")
    body = make_scan("ct") > -300
    found = array > compute_body_threshold(volume)
    assert (found & body).sum() * 2 / (found.sum() + body.sum()) > 0.97


def test_ct_has_a_fixed_window_and_mr_follows_its_intensities() -> None:
    ct = Volume(make_scan("ct"), make_affine("LPS"), "CT", "option", "ct")
    assert compute_window(ct) == (-125.0, 275.0)
    mr = make_scan("mr")
    low, high = compute_window(Volume(mr, make_affine("LPS"), "MR", "option", "mr"))
    spiked = mr.astype(np.float32)
    spiked[0, 0, 0] = 1e6
    doubled = compute_window(Volume(spiked * 2, make_affine("LPS"), "MR", "option", "mr"))
    assert 0 < low < 300 < 750 < high < 900
    assert doubled == pytest.approx((2 * low, 2 * high), rel=0.1)
