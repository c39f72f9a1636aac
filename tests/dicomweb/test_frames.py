"""Volumes as DICOM series: the voxels come back where they were, whatever the orientation; searches; files on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import MRImageStorage

from progidiff.dicomweb import headers
from progidiff.dicomweb.catalogue import Catalogue
from progidiff.dicomweb.frames import FrameStore, Series
from progidiff.dicomweb.headers import Identity
from progidiff.dicomweb.multipart import Envelope, read_parts
from progidiff.dicomweb.pixels import Rescale
from progidiff.dicomweb.query import Query
from progidiff.errors import GeometryError, NotFoundError, RequestError
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.volume import Volume
from progidiff.images.writing import save_array
from support.series import AXIAL, CORONAL, SAGITTAL, affines, make_volume, rebuild


def write_and_read(series: Series) -> list[pydicom.Dataset]:
    datasets = []
    for index in range(series.grid.shape[0]):
        target = io.BytesIO()
        series.dataset(index).save_as(target, enforce_file_format=True)
        datasets.append(pydicom.dcmread(io.BytesIO(target.getvalue())))
    return datasets


def check_same_world(volume: Volume, series: Series, tolerance: float = 0.0) -> None:
    """Every voxel of the files is the voxel of the volume at the same place in the patient."""
    datasets = write_and_read(series)
    stack, lps = rebuild(datasets[::-1])
    assert stack.size == volume.array.size
    zyx = np.stack(np.meshgrid(*(np.arange(n) for n in stack.shape), indexing="ij"), axis=-1).reshape(-1, 3)
    world = np.c_[zyx[:, ::-1], np.ones(len(zyx))] @ (np.diag([-1.0, -1, 1, 1]) @ lps).T
    index = world @ np.linalg.inv(volume.affine).T
    nearest = np.rint(index[:, :3]).astype(int)
    assert np.abs(index[:, :3] - nearest).max() < 1e-4
    np.testing.assert_allclose(stack.ravel(), volume.array[tuple(nearest.T)].astype(float), rtol=0, atol=tolerance)


@pytest.mark.parametrize("affine", [AXIAL, SAGITTAL, CORONAL], ids=["axial", "sagittal", "coronal"])
def test_a_series_is_the_volume_at_the_same_place_in_the_patient(affine: np.ndarray):
    volume = make_volume(affine)
    series = Series.of(Identity("case", "d1", "CT"), volume)
    check_same_world(volume, series)
    first = series.dataset(0)
    assert first.ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    edges = sorted(volume.spacing)
    assert sorted([*map(float, first.PixelSpacing), float(first.SpacingBetweenSlices)]) == pytest.approx(edges)
    heights = [float(ds.ImagePositionPatient[2]) for ds in write_and_read(series)]
    assert heights == sorted(heights)
    assert first.RescaleType == "HU"


@settings(max_examples=60, deadline=None)
@given(affine=affines(), shape=st.tuples(*[st.integers(2, 6)] * 3))
def test_any_orientation_comes_back_voxel_by_voxel(affine: np.ndarray, shape: tuple[int, int, int]):
    volume = make_volume(affine, shape)
    series = Series.of(Identity("case", "d1", "CT"), volume)
    check_same_world(volume, series)
    own_affine = series.grid.to_file_grid("own").affine
    array = volume.arrange(volume.array).transpose(2, 1, 0)
    Series.of(Identity("own", "d1", "CT"), Volume(array, own_affine, "CT", "option", "own"))
    assert np.linalg.det(own_affine[:3, :3]) == pytest.approx(abs(np.linalg.det(affine[:3, :3])))


def test_shear_is_refused_with_its_size():
    sheared = np.diag([1.0, 1.0, 3.0, 1.0])
    sheared[1, 2] = 0.5
    with pytest.raises(GeometryError, match=r"not at right angles.*1\.50 mm"):
        Series.of(Identity("case", "d1", "CT"), make_volume(sheared))


def test_whole_numbers_are_kept_and_everything_else_is_within_half_a_step():
    rng = np.random.default_rng(0)
    exact = [
        np.array([[[-32768, 32767]]], np.int32),
        np.array([[[0, 65535]]], np.uint16),
        np.array([[[-1024.0, 3071.0]]], np.float32),
    ]
    for array in exact:
        rescale = Rescale.of(array)
        assert rescale.is_exact
        np.testing.assert_array_equal(rescale.read(rescale.store(array)), array)
    wide = [
        rng.normal(0, 1e-3, (3, 4, 5)),
        rng.normal(1e6, 3, (3, 4, 5)).astype(np.float32),
        np.array([[[-5, 4_000_000]]]),
    ]
    for array in wide:
        rescale = Rescale.of(array)
        assert not rescale.is_exact
        assert len(headers._decimal(rescale.slope)) <= 16
        assert float(headers._decimal(rescale.slope)) == rescale.slope
        assert float(headers._decimal(rescale.intercept)) == rescale.intercept
        span = float(array.max()) - float(array.min())
        assert rescale.slope <= 1.01 * span / 65535 + 1e-9 * abs(float(array.min()))
        assert np.abs(rescale.read(rescale.store(array)) - array).max() <= rescale.slope / 2 * (1 + 1e-6)


def test_a_real_valued_mr_says_how_precise_it_is():
    array = np.random.default_rng(1).gamma(2, 0.1, (6, 5, 4)).astype(np.float32)
    volume = Volume(array, np.diag([1.0, 1.0, 4.0, 1.0]), "MR", "option", "mr")
    series = Series.of(Identity("mr", "d1", "MR"), volume)
    check_same_world(volume, series, tolerance=series.rescale.slope / 2 * 1.001)
    dataset = series.dataset(0)
    assert dataset.SOPClassUID == MRImageStorage
    assert (dataset.PixelRepresentation, dataset.RescaleType) == (0, "US")


def test_uids_depend_on_id_and_bytes_and_on_nothing_else():
    one = Identity("a", "1", "CT")
    assert one.series_uid == Identity("a", "1", "CT", "20200101", "other words").series_uid
    uids = {one.study_uid, one.series_uid, one.frame_of_reference_uid, one.instance_uid(0), one.instance_uid(1)}
    uids |= {Identity("a", "2", "CT").series_uid, Identity("b", "1", "CT").series_uid}
    assert len(uids) == 7
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)
    # Written down: another version of this package must not rename what a PACS or a browser has kept.
    assert one.series_uid == "2.25.277718680254064341556743424736623103491"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    volume = make_volume(SAGITTAL, (12, 10, 8))
    save_array(volume.array, volume.affine, tmp_path / "case.nii.gz")
    (tmp_path / "case.json").write_text(
        json.dumps({"modality": "CT", "study_date": "20240229", "description": "a spine"})
    )
    return tmp_path


def test_the_catalogue_reads_an_image_once_and_again_when_it_changed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    catalogue = Catalogue(folder / "state")
    entry = catalogue.describe("case", folder / "case.nii.gz")
    assert (entry.identity.modality, entry.identity.study_date, entry.identity.description) == (
        "CT",
        "20240229",
        "a spine",
    )
    assert (entry.num_slices, entry.refused) == (10, "")
    with monkeypatch.context() as patch:
        patch.setattr("progidiff.dicomweb.catalogue.describe_file", lambda *_: pytest.fail("read again"))
        assert Catalogue(folder / "state").describe("case", folder / "case.nii.gz") == entry
    volume = make_volume(AXIAL, (12, 10, 8))
    save_array(volume.array, volume.affine, folder / "case.nii.gz")
    changed = catalogue.describe("case", folder / "case.nii.gz")
    assert changed.num_slices == 8
    assert changed.identity.series_uid != entry.identity.series_uid


def test_the_catalogue_says_why_an_image_cannot_be_served(folder: Path):
    catalogue = Catalogue(folder / "state")
    (folder / "broken.nii.gz").write_bytes(b"no image")
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 3), np.int16), np.eye(4)), folder / "four.nii.gz")
    sheared = np.diag([1.0, 1.0, 3.0, 1.0])
    sheared[1, 2] = 0.5
    save_array(make_volume(sheared).array, sheared, folder / "sheared.nii.gz")
    reasons = {
        name: catalogue.describe(name, folder / f"{name}.nii.gz").refused for name in ("broken", "four", "sheared")
    }
    assert "cannot be read as an image" in reasons["broken"]
    assert "single volume" in reasons["four"]
    assert "right angles" in reasons["sheared"]


def test_a_damaged_entry_is_made_again(folder: Path):
    entry = Catalogue(folder / "state").describe("case", folder / "case.nii.gz")
    for file in (folder / "state").iterdir():
        file.write_text("{")
    assert Catalogue(folder / "state").describe("case", folder / "case.nii.gz") == entry


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_the_header_alone_gives_the_grid_of_the_volume(tmp_path: Path, suffix: str):
    made = make_volume(SAGITTAL)
    path = save_array(made.array, made.affine, tmp_path / f"case{suffix}")
    volume = load_volume(path, "CT")
    grid = read_grid(path)
    assert grid.shape == volume.array.shape
    np.testing.assert_array_equal(grid.affine, volume.affine)


def test_slices_are_kept_on_disk_and_the_image_is_read_once(folder: Path):
    identity = Identity("case", "d1", "CT")
    volume = load_volume(folder / "case.nii.gz")
    expected = Series.of(identity, volume)
    store = FrameStore(folder / "frames")
    assert store.open(identity, lambda: volume).frame(3) == expected.frame(3)
    again = FrameStore(folder / "frames").open(identity, lambda: pytest.fail("read again"))
    assert again.frame(3) == expected.frame(3)
    assert again.metadata == expected.metadata
    assert json.loads(json.dumps(again.metadata)) == again.metadata
    assert not [path for path in (folder / "frames").iterdir() if path.name.startswith(".")]


def test_damaged_slices_are_made_again_and_old_ones_make_room(folder: Path):
    volume = load_volume(folder / "case.nii.gz")
    identities = [Identity(name, "d1", "CT") for name in ("a", "b", "c")]
    size = volume.array.size * 2
    store = FrameStore(folder / "frames", max_bytes=2 * size)
    for identity in identities:
        store.open(identity, lambda: volume)
    kept = {path.name for path in (folder / "frames").iterdir()}
    assert kept == {identity.series_uid for identity in identities[1:]}
    pixels = folder / "frames" / identities[1].series_uid / "pixels.raw"
    pixels.write_bytes(pixels.read_bytes()[:-2])
    assert FrameStore(folder / "frames").open(identities[1], lambda: volume).frame(9) == Series.of(
        identities[1], volume
    ).frame(9)


def test_pictures_have_square_pixels():
    volume = make_volume(SAGITTAL, (30, 20, 10))
    series = Series.of(Identity("case", "d1", "CT"), volume)
    picture = Image.open(io.BytesIO(series.picture(5, "PNG")))
    assert picture.size == (44, 30)  # 10 columns of 4 mm, 30 rows of 0.9 mm
    assert max(Image.open(io.BytesIO(series.picture(5, "JPEG", 256))).size) == 256


def select(text: str, datasets: list[dict]) -> list[str]:
    pairs = [tuple(part.split("=", 1)) for part in text.split("&")] if text else []
    return [dataset["00100020"]["Value"][0] for dataset in Query.read(pairs).select(datasets)]


STUDIES = [
    headers.to_json(headers.build_study(Identity("Liver_01", "1", "CT", "20240105"), 10)),
    headers.to_json(headers.build_study(Identity("liver_02", "1", "MR", "20240229"), 10)),
    headers.to_json(headers.build_study(Identity("spine", "1", "MR"), 10)),
]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", "012"),
        ("PatientName=LIVER*", "01"),  # names whatever their case
        ("PatientID=liver*", "1"),
        ("PatientID=?iver_0?", "01"),
        ("00100020=spine", "2"),
        ("ModalitiesInStudy=MR", "12"),
        ("ModalitiesInStudy=CT,MR", "012"),
        ("ModalitiesInStudy=CT\\MR&PatientID=*2", "1"),
        ("StudyDate=20240105", "0"),
        ("StudyDate=20240101-20240131", "0"),
        ("StudyDate=20240106-", "1"),
        ("StudyDate=-20240105", "0"),
        ("StudyDate=*", "012"),
        ("StudyInstanceUID=" + Identity("spine", "1", "MR").study_uid, "2"),
        ("StudyInstanceUID=1.2.3", ""),
        ("AccessionNumber=7", ""),
        ("limit=1", "0"),
        ("limit=1&offset=1", "1"),
        ("ModalitiesInStudy=MR&offset=1", "2"),
        ("includefield=00081030,00080060&fuzzymatching=true&limit=101&offset=0", "012"),
        ("PatientID=*[.]*", ""),
    ],
)
def test_searches(query: str, found: str):
    assert select(query, STUDIES) == [["Liver_01", "liver_02", "spine"][int(digit)] for digit in found]


@pytest.mark.parametrize(
    "query",
    ["Colour=red", "limit=ten", "offset=-1", "StudyDate=yesterday", "StudyDate=-", "StudyTime=9-10", "0010002=x"],
)
def test_searches_that_make_no_sense_are_refused(query: str):
    with pytest.raises(RequestError):
        select(query, STUDIES)


def test_multipart_bodies_that_are_cut_off_are_refused():
    envelope = Envelope.of("application/dicom")
    body = b"".join(envelope.write([b"--one\r\n", b"two"]))
    assert read_parts(envelope.content_type, body) == [b"--one\r\n", b"two"]
    for wrong, content_type in (
        (body[:-8], envelope.content_type),
        (body, "application/dicom"),
        (b"", envelope.content_type),
    ):
        with pytest.raises(RequestError):
            read_parts(content_type, wrong)


def test_unknown_instances_are_not_found():
    series = Series.of(Identity("case", "d1", "CT"), make_volume(AXIAL))
    with pytest.raises(NotFoundError, match="no instance"):
        series.find("1.2.3")
    assert series.find(series.identity.instance_uid(2)) == 2
