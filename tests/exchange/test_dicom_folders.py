"""DICOM series in folders become images on the grid that SimpleITK sees, or are named with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.dicomweb.catalogue import describe_file
from progidiff.exchange.dicom_folders import find_series, import_series
from progidiff.images import decoding
from progidiff.images.reading import load_volume
from support.series import AXIAL, CORONAL, SAGITTAL, make_volume, write_series

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = np.linalg.qr([[-1.0, 0.1, 0.4], [-0.1, -1.0, 0.3], [0.2, 0.1, 1.0]])[0] * [0.8, 0.8, 5.0]
OBLIQUE[:3, 3] = 5, 9, -7


def bring(folder: Path, studies: Path) -> dict[str, str]:
    """State, and the first note, by image."""
    outcomes = [import_series(series, studies) for series in find_series(folder).series]
    return {entry.image: " ".join([entry.state, *entry.notes]) for entry in outcomes}


@pytest.mark.parametrize("affine", [AXIAL, SAGITTAL, CORONAL, OBLIQUE], ids=["axial", "sagittal", "coronal", "oblique"])
def test_an_imported_series_lies_where_simpleitk_sees_it(tmp_path: Path, affine: np.ndarray):
    folder, studies = write_series(tmp_path / "in", affine), tmp_path / "studies"
    (image_id,) = bring(folder, studies)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    wanted, made = reader.Execute(), sitk.ReadImage(str(studies / f"{image_id}.nii.gz"))
    assert made.GetSize() == wanted.GetSize()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(made), sitk.GetArrayFromImage(wanted))
    for index in ((0, 0, 0), tuple(size - 1 for size in made.GetSize())):
        places = [image.TransformIndexToPhysicalPoint(index) for image in (made, wanted)]
        np.testing.assert_allclose(places[0], places[1], atol=1e-3)
    values = json.loads((studies / f"{image_id}.json").read_text())
    assert values["modality"] == "CT"
    assert values["series_uid"] == find_series(folder).series[0].uid
    assert describe_file(image_id, studies / f"{image_id}.nii.gz").refused == ""
    assert list(bring(folder, studies).values()) == ["there"]


def test_series_are_found_by_what_files_hold_wherever_they_lie_and_whatever_they_are_called(tmp_path: Path):
    first, second = (
        write_series(tmp_path / "x", name="a"),
        write_series(tmp_path / "y", SAGITTAL, name="b", shape=(6, 6, 4)),
    )
    folder, studies = tmp_path / "in", tmp_path / "studies"
    for index, path in enumerate([*first.iterdir(), *second.iterdir()]):
        target = folder / f"disk {index % 3}" / ("DICOM" if index % 2 else "") / f"IM{index}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    shutil.copy(next(first.iterdir()), folder / "copy.of.it")
    (folder / "notes.txt").write_text("to whom it may concern")
    (folder / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    report = Dataset()
    report.SOPClassUID, report.Modality, report.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "SR", "1.2.3"
    report.file_meta = FileMetaDataset()
    report.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    report.file_meta.MediaStorageSOPClassUID, report.file_meta.MediaStorageSOPInstanceUID = report.SOPClassUID, "1.2.4"
    report.save_as(folder / "report", enforce_file_format=True)

    found = find_series(folder)
    assert sorted(len(series.files) for series in found.series) == [4, 6]
    assert found.notes == (
        "Passed over: 1 DICOM objects without an image (SR).",
        "Passed over: 1 copies of the same object.",
        "Passed over: 1 files that are not DICOM.",
    )
    assert set(bring(folder, studies).values()) == {"imported"}
    assert len(list(studies.glob("*.nii.gz"))) == 2


def write_enhanced(path: Path, affine: np.ndarray, skip: int | None = None) -> np.ndarray:
    """An enhanced CT object of a volume, its frames out of order; the volume in file order (I, J, K)."""
    volume = make_volume(affine)
    source = write_series(path.parent / "plain", affine)
    slices = [pydicom.dcmread(file) for file in sorted(source.iterdir())]
    order = [z for z in (2, 0, 3, 1) if z != skip]
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.SeriesInstanceUID, dataset.StudyInstanceUID = "CT", generate_uid(), generate_uid()
    for name in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"):
        setattr(dataset, name, slices[0][name].value)
    dataset.PhotometricInterpretation, dataset.NumberOfFrames = "MONOCHROME2", len(order)
    shared, plane, measures, rescale = Dataset(), Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient = slices[0].ImageOrientationPatient
    measures.PixelSpacing = slices[0].PixelSpacing
    rescale.RescaleSlope, rescale.RescaleIntercept = slices[0].RescaleSlope, slices[0].RescaleIntercept
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = Sequence([plane]), Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([rescale])
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    frames = []
    for z in order:
        frame, place = Dataset(), Dataset()
        place.ImagePositionPatient = slices[z].ImagePositionPatient
        frame.PlanePositionSequence = Sequence([place])
        frames.append(frame)
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    dataset.PixelData = b"".join(slices[z].PixelData for z in order)
    dataset.save_as(path, enforce_file_format=True)
    shutil.rmtree(source)
    return volume.array


def test_an_enhanced_object_is_read_by_the_place_of_each_frame(tmp_path: Path):
    (tmp_path / "in").mkdir()
    array = write_enhanced(tmp_path / "in" / "enhanced", AXIAL)
    ((image_id, told),) = bring(tmp_path / "in", tmp_path / "studies").items()
    assert told == "imported"
    made = load_volume(tmp_path / "studies" / f"{image_id}.nii.gz")
    np.testing.assert_array_equal(made.to_stack()[0], make_volume(AXIAL).to_stack()[0])
    assert made.array.shape == array.shape
    shutil.rmtree(tmp_path / "in")
    (tmp_path / "in").mkdir()
    write_enhanced(tmp_path / "in" / "enhanced", AXIAL, skip=1)
    (told,) = bring(tmp_path / "in", tmp_path / "studies").values()
    assert "some are missing, doubled or belong to another phase" in told


def test_what_is_no_complete_stack_is_named_and_the_others_come_in(tmp_path: Path):
    folder, studies = tmp_path / "in", tmp_path / "studies"
    folder.mkdir()
    gap = write_series(folder / "gap", name="a", shape=(5, 6, 6))
    (sorted(gap.iterdir())[2]).unlink()
    single = write_series(folder / "single", name="b")
    for path in sorted(single.iterdir())[1:]:
        path.unlink()
    cut = write_series(folder / "cut", name="c")
    first = sorted(cut.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-40])
    write_series(folder / "good", name="d")
    result = CliRunner().invoke(app, ["import", str(folder), "--studies", str(studies)])
    assert result.exit_code == 1
    words = " ".join(result.output.split())
    assert "5.00 to 10.00 mm apart: some are missing" in words
    assert "is a single DICOM slice; send the folder with the whole series" in words
    assert "cannot be read as an image" in words
    assert "4 DICOM series in 'in'" in words
    assert len(list(studies.glob("*.nii.gz"))) == 1
    assert CliRunner().invoke(app, ["import", str(studies / ".."), "--studies", str(studies)]).exit_code == 1
    (tmp_path / "none").mkdir()
    result = CliRunner().invoke(app, ["import", str(tmp_path / "none"), "--studies", str(studies)])
    assert result.exit_code == 2
    assert "neither a dataset.json" in " ".join(result.output.split())
    result = CliRunner().invoke(app, ["import", str(tmp_path / "gone"), "--studies", str(studies)])
    assert result.exit_code == 2
    assert "or one with DICOM files in it" in " ".join(result.output.split())


def test_a_series_in_a_relative_folder_is_read_apart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_series(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    decoding.read_apart()
    try:
        assert list(bring(Path("in"), Path("studies")).values()) == ["imported"]
    finally:
        decoding.read_apart(False)


def test_a_series_that_grew_does_not_take_the_place_of_its_image(tmp_path: Path):
    folder, studies = write_series(tmp_path / "in"), tmp_path / "studies"
    last = sorted(folder.iterdir())[-1]
    last.rename(tmp_path / "later")
    bring(folder, studies)
    (tmp_path / "later").rename(last)
    (told,) = bring(folder, studies).values()
    assert "was made of the same series with 5 x 6 x 3 voxels, and now it has 5 x 6 x 4" in told
