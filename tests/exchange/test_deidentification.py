"""What goes out de-identified has no name, date, number or text of a patient in any byte, and leads back by the key."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import ProGiDiffError
from progidiff.exchange.deidentification import deidentify_folder
from progidiff.exchange.dicom_folders import find_series
from progidiff.exchange.exporting import ExportSettings, export_dataset
from progidiff.exchange.pseudonyms import Pseudonyms
from progidiff.images.reading import load_series
from progidiff.labels.audit import list_audit
from progidiff.labels.history import AnnotationStore
from support.local_store import open_as_server
from support.phantoms import write_phantom
from support.series import write_series

SHAPE = (32, 24, 8)
IMAGE = "Mueller_Annemarie_PID4711007"
SECRETS = ("Mueller", "Müller", "Annemarie", "4711007", "19700203", "1970-02-03", "Marienhospital", "Dr. Wernicke")


def find_secrets(folder: Path, secrets: tuple[str, ...] = SECRETS) -> list[str]:
    """Where a name or byte of a folder gives somebody away, packed or not."""
    found = []
    for path in [folder, *folder.rglob("*")]:
        content = b"" if path.is_dir() else path.read_bytes()
        unpacked = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else b""
        if b"NRRD" in content[:4]:
            unpacked = gzip.decompress(content.partition(b"\n\n")[2])
        for secret in secrets:
            words = [secret.encode(code) for code in ("utf-8", "latin-1", "utf-16-le")]
            if secret in path.name or any(word in content or word in unpacked for word in words):
                found.append(f"{path.relative_to(folder.parent)}: {secret}")
    return found


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """An image whose header, sidecar and name say whose it is, with a label that a person saved."""
    studies = tmp_path / "studies"
    studies.mkdir()
    image = nibabel.load(write_phantom(tmp_path / "x.nii.gz", shape=SHAPE))
    header = image.header
    header["descrip"], header["aux_file"] = b"Mueller, Annemarie", b"4711007.mat"
    header["intent_name"], header["db_name"] = b"Mueller", b"4711007"
    header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", "Annemarie Müller, born 1970-02-03".encode()))
    nibabel.save(image, studies / f"{IMAGE}.nii.gz")
    (studies / f"{IMAGE}.json").write_text(json.dumps({"modality": "CT", "PatientName": "Müller"}), encoding="utf-8")
    array = np.zeros(SHAPE, np.uint8)
    array[4:8, 4:8, 2:5] = 6
    label = nibabel.Nifti1Image(array, image.affine)
    label.header["descrip"] = b"drawn by Dr. Wernicke"
    nibabel.save(label, tmp_path / "label.nii.gz")
    open_as_server(studies).save_annotated(IMAGE, tmp_path / "label.nii.gz", "final", {}, user="Dr. Wernicke")
    return studies


@pytest.mark.parametrize("target", ["nnunet", "msd", "slicer", "files"])
def test_no_exported_byte_or_name_says_whose_it_is(tmp_path: Path, studies: Path, target: Any):
    assert find_secrets(studies), "the test would see one"
    out, key = tmp_path / "Dataset501_Out", tmp_path / "key.csv"
    settings = ExportSettings(target, user="berta")
    export_dataset(studies, studies / ".progidiff", out, settings, Pseudonyms(key))
    assert find_secrets(out) == []
    for path in out.rglob("*.nii.gz"):
        assert path.read_bytes()[3:9] == b"\0" * 5 + path.read_bytes()[8:9], "no file name and no time in the packing"
        assert not nibabel.load(path).header.extensions
    (row,) = csv.DictReader(key.open(encoding="utf-8"))
    assert (row["kind"], row["original"]) == ("image", IMAGE)
    assert key.stat().st_mode & 0o077 == 0
    (image,) = [path for path in out.rglob(f"{row['replacement']}*.nii.gz") if "label" not in str(path.parent)]
    mine, theirs = nibabel.load(studies / f"{IMAGE}.nii.gz"), nibabel.load(image)
    np.testing.assert_array_equal(np.asarray(mine.dataobj), np.asarray(theirs.dataobj))
    np.testing.assert_array_equal(mine.affine, theirs.affine)
    audit = list_audit(AnnotationStore(studies / ".progidiff" / "annotations"))[-1]
    assert (audit["event"], audit["image"], audit["user"]) == ("export", IMAGE, "berta")
    assert audit["reason"] == f"{target}, de-identified, one of 1 images"
    assert row["replacement"] not in json.dumps(audit)


def test_the_order_of_images_does_not_tell_the_order_of_their_names(
    tmp_path: Path, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copy(write_phantom(tmp_path / "y.nii.gz", shape=SHAPE, seed=1), studies / "Zander_Otto.nii.gz")
    open_as_server(studies).save_annotated("Zander_Otto", tmp_path / "label.nii.gz", "final", {}, user="berta")
    names = {IMAGE: "image-ffffffff", "Zander_Otto": "image-00000000"}
    monkeypatch.setattr(Pseudonyms, "of_image", lambda _, image: names[image])
    out = tmp_path / "out"
    export_dataset(studies, studies / ".progidiff", out, ExportSettings("msd"), Pseudonyms(tmp_path / "key.csv"))
    listed = [pair["image"] for pair in json.loads((out / "dataset.json").read_text())["training"]]
    assert listed == ["./imagesTr/image-00000000.nii.gz", "./imagesTr/image-ffffffff.nii.gz"]


def test_the_same_key_gives_the_same_names_and_stays_apart(tmp_path: Path, studies: Path):
    run, key = CliRunner(), tmp_path / "keys" / "key.csv"
    command = ["--studies", str(studies), "--as", "files", "--deidentify"]
    for name in ("one", "two"):
        result = run.invoke(app, ["export", str(tmp_path / name), *command, "--key", str(key)])
        assert result.exit_code == 0, result.output
        assert "Faces can be recognised" in result.output
    names = [sorted(path.name for path in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert names[0] == names[1]
    for arguments, sentence in [
        (["--key", str(tmp_path / "three" / "key.csv")], "beside what it opens"),
        ([], "belong together"),
        (["--key", str(studies / "labels.md")], "is no key of pseudonyms"),
    ]:
        (studies / "labels.md").write_text("# notes\n")
        result = run.invoke(app, ["export", str(tmp_path / "three"), *command, *arguments])
        assert result.exit_code == 2
        assert sentence in " ".join(result.output.split())
        assert not (tmp_path / "three").exists()


def mark(file: Path) -> None:
    """Write the patient into an object in every way that there is."""
    dataset = pydicom.dcmread(file)
    dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate = "Müller^Annemarie", "4711007", "19700203"
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.OtherPatientNames, dataset.InstitutionName = "Mueller", "Marienhospital"
    dataset.ReferringPhysicianName, dataset.StudyDescription = "Dr. Wernicke", "Annemarie Müller"
    dataset.StudyDate = dataset.SeriesDate = dataset.ContentDate = "19700203"
    dataset.SeriesDescription, dataset.ImageComments = "for Dr. Wernicke", "Mueller"
    dataset.AccessionNumber, dataset.StationName = "4711007", "Marienhospital"
    dataset.file_meta.SourceApplicationEntityTitle = "Mueller"
    block = dataset.private_block(0x0029, "Mueller 1.0", create=True)
    block.add_new(0x10, "LO", "Annemarie")
    inner, deeper = Dataset(), Dataset()
    inner.PatientName, inner.TextValue = "Mueller", "Annemarie"
    inner.PatientID, deeper.PatientID, deeper.IssuerOfPatientID = "4711007", "4711007", "Marienhospital"
    deeper.PersonName, deeper.ReferencedSOPInstanceUID = "Dr. Wernicke", "1.2.3.4711007"
    inner.ContentSequence = Sequence([deeper])
    dataset.AcquisitionContextSequence = Sequence([inner])
    nested = Dataset()
    nested.CodeValue, nested.CodingSchemeDesignator, nested.CodeMeaning = "T-D4000", "SRT", "Abdomen"
    nested.PatientID = "4711007"
    nested.PersonTelephoneNumbers, nested.PatientComments = "4711007", "Mueller"
    dataset.AnatomicRegionSequence = Sequence([nested])
    dataset.add_new((0x6000, 0x4000), "LT", "Annemarie Mueller")
    dataset.save_as(file, enforce_file_format=True)


def test_dicom_series_keep_pixels_and_place_and_nothing_of_the_patient(tmp_path: Path):
    folder, out, key = tmp_path / "in", tmp_path / "out", tmp_path / "key.csv"
    folder.mkdir()
    for name in ("a", "b"):
        for file in write_series(folder / name, name=name).iterdir():
            mark(file)
    assert find_secrets(folder)
    outcomes, _ = deidentify_folder(folder, out, Pseudonyms(key))
    assert find_secrets(out) == []
    originals = {series.uid: series for series in find_series(folder).series}
    for outcome in outcomes:
        (made,) = find_series(out / outcome.name).series
        mine, theirs = load_series(outcome.series.files, "x"), load_series(made.files, "x")
        np.testing.assert_array_equal(mine.array, theirs.array)
        np.testing.assert_allclose(mine.affine, theirs.affine)
        for uid in (outcome.series.uid, outcome.series.study_uid):
            assert find_secrets(out, (uid,)) == []
        dataset = pydicom.dcmread(made.files[0])
        assert dataset.PatientIdentityRemoved == "YES"
        assert dataset.DeidentificationMethodCodeSequence[0].CodeValue == "113100"
        assert dataset.AnatomicRegionSequence[0].CodeMeaning == "Abdomen"
        assert str(dataset.PatientID).startswith("patient-")
        assert len({pydicom.dcmread(file).SeriesInstanceUID for file in made.files}) == 1
    assert len(originals) == len(outcomes) == 2
    assert len({pydicom.dcmread(file).PatientID for file in out.rglob("*.dcm")}) == 1, "one patient stays one"
    rows = list(csv.DictReader(key.open(encoding="utf-8")))
    assert {row["original"] for row in rows if row["kind"] == "patient"} == {"4711007"}
    assert originals.keys() <= {row["original"] for row in rows if row["kind"] == "uid"}


def test_what_may_show_a_name_in_its_pixels_stays_here(tmp_path: Path):
    good, burned = write_series(tmp_path / "in" / "good"), write_series(tmp_path / "in" / "burned", name="b")
    file = sorted(burned.iterdir())[0]
    dataset = pydicom.dcmread(file)
    dataset.BurnedInAnnotation = "YES"
    dataset.save_as(file)
    command = ["deidentify", str(tmp_path / "in"), str(tmp_path / "out"), "--key", str(tmp_path / "key.csv")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert "has text in its pixels" in result.output
    assert len(list((tmp_path / "out").iterdir())) == 1
    shutil.rmtree(good)
    with pytest.raises(ProGiDiffError, match="No series of .* can go out"):
        deidentify_folder(tmp_path / "in", tmp_path / "other", Pseudonyms(tmp_path / "key.csv"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("keyword", "value", "left_out"), [("SOPClassUID", None, True), ("InstanceNumber", "a", False)]
)
def test_an_object_with_a_damaged_header_ends_no_export(tmp_path: Path, keyword: str, value: Any, left_out: bool):
    write_series(tmp_path / "in" / "good")
    file = sorted(write_series(tmp_path / "in" / "bad", name="b").iterdir())[0]
    dataset = pydicom.dcmread(file)
    del dataset[keyword]
    if value is not None:
        dataset.add_new(pydicom.datadict.tag_for_keyword(keyword), "LO", value)
    dataset.save_as(file)
    outcomes, _ = deidentify_folder(tmp_path / "in", tmp_path / "out", Pseudonyms(tmp_path / "key.csv"))
    notes = [outcome.note for outcome in outcomes if outcome.note]
    assert [("SOPClassUID" in note) for note in notes] == ([True] if left_out else [])
    assert len(list((tmp_path / "out").iterdir())) == 2 - left_out
