"""Data sets of nnU-Net v2 and of the Decathlon come in and go out, voxel by voxel and name by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import ProGiDiffError
from progidiff.exchange.datasets import read_dataset
from progidiff.exchange.exporting import ExportSettings, export_dataset
from progidiff.exchange.importing import CaseOutcome, ImportSettings, import_dataset
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.history import AnnotationStore, hash_file
from support.local_store import make_studies, open_as_server
from support.phantoms import write_phantom

SHAPE = (32, 24, 8)


def write_nnunet(
    folder: Path,
    labels: dict[str, Any],
    ids: tuple[int, ...] = (1, 2),
    cases: tuple[str, ...] = ("a", "b"),
    **more: Any,
) -> Path:
    """A data set whose labels draw a square of each id; every case on slices of its own."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for index, case in enumerate(cases):
        image = write_phantom(folder / "imagesTr" / f"{case}_0000.nii.gz", shape=SHAPE, seed=index)
        array = np.zeros(SHAPE, np.uint8)
        for number in ids:
            array[4 * number : 4 * number + 3, 4:7, 1 + index : 4 + index] = number
        nibabel.save(nibabel.Nifti1Image(array, nibabel.load(image).affine), folder / "labelsTr" / f"{case}.nii.gz")
    values = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": len(cases), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**values, **more}), encoding="utf-8")
    return folder


def bring(folder: Path, studies: Path, told: dict[int, str] | None = None, **options: Any) -> list[CaseOutcome]:
    dataset = read_dataset(folder, told=told)
    return list(import_dataset(dataset, studies, studies / ".progidiff", ImportSettings(user="anna", **options)))


def read(path: Path) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def get_annotations(studies: Path) -> AnnotationStore:
    return AnnotationStore(studies / ".progidiff" / "annotations", studies / "labels" / "final")


LABELS = {"background": 0, "kidney_left": 1, "my tumour": 2}


def test_an_nnunet_data_set_comes_in_with_its_names_and_the_history_says_who(tmp_path: Path):
    folder, studies = write_nnunet(tmp_path / "Dataset001_X", LABELS), tmp_path / "studies"
    assert bring(folder, studies) == [CaseOutcome("a", "imported"), CaseOutcome("b", "imported")]
    assert json.loads((studies / "labels.json").read_text()) == {"1": "left kidney", "2": "my tumour"}
    assert json.loads((studies / "a.json").read_text()) == {"modality": "CT"}
    assert hash_file(studies / "a.nii.gz") == hash_file(folder / "imagesTr" / "a_0000.nii.gz")
    assert hash_file(studies / "labels" / "final" / "a.nii.gz") == hash_file(folder / "labelsTr" / "a.nii.gz")
    (saved,) = get_annotations(studies).list("a")
    assert (saved.user, saved.client) == ("anna", "import nnU-Net v2 Dataset001_X")
    assert saved.structures == ("left kidney", "my tumour")
    assert saved.label_ids == (("left kidney", 1), ("my tumour", 2))
    assert saved.slices is None

    server = open_as_server(studies)
    assert server.get_label_uri("a", "final") == str(studies / "labels" / "final" / "a.nii.gz")
    assert len(server.annotations.list()) == 2, "the server takes them for what the history says, not for others' files"
    assert bring(folder, studies) == [CaseOutcome("a", "there"), CaseOutcome("b", "there")]
    assert len(get_annotations(studies).list()) == 2


@pytest.mark.parametrize("target", ["nnunet", "msd"])
def test_what_goes_out_comes_back_the_same(tmp_path: Path, target: Any):
    studies, out, back = tmp_path / "studies", tmp_path / "Dataset501_Back", tmp_path / "back"
    labels = {"background": 0, "liver": 2, "my tumour": 5}
    bring(write_nnunet(tmp_path / "Dataset001_X", labels, (2, 5)), studies)
    settings = ExportSettings(target, user="berta")
    outcomes = export_dataset(studies, studies / ".progidiff", out, settings)
    assert [(entry.image, entry.state) for entry in outcomes] == [("a", "exported"), ("b", "exported")]

    assert {entry.state for entry in bring(out, back)} == {"imported"}
    assert json.loads((back / "labels.json").read_text()) == {"1": "liver", "2": "my tumour"}
    for case in ("a", "b"):
        before, after = (read(place / "labels" / "final" / f"{case}.nii.gz") for place in (studies, back))
        np.testing.assert_array_equal(before == 2, after == 1)
        np.testing.assert_array_equal(before == 5, after == 2)
        assert hash_file(studies / f"{case}.nii.gz") == hash_file(back / f"{case}.nii.gz")
        mine, theirs = (sitk.ReadImage(str(place / f"{case}.nii.gz")) for place in (studies, back))
        assert mine.GetDirection() == theirs.GetDirection()
    noted = [(event.kind, event.user, event.reason) for event in get_annotations(studies).events("a")]
    assert noted[-1] == ("export", "berta", f"{target}, one of 2 images")
    assert len(get_annotations(studies).in_force("a")) == 1, "an export changes nothing of what counts"


def test_an_exported_data_set_is_described_as_its_format_asks(tmp_path: Path):
    studies = tmp_path / "studies"
    bring(write_nnunet(tmp_path / "Dataset001_X", LABELS), studies)
    write_phantom(studies / "other.nii.gz", shape=SHAPE)
    for target in ("nnunet", "msd"):
        settings = ExportSettings(target, with_unlabelled=True)
        export_dataset(studies, studies / ".progidiff", tmp_path / target / "Dataset501_Back", settings)
    nnunet, msd = (tmp_path / target / "Dataset501_Back" for target in ("nnunet", "msd"))
    values = json.loads((nnunet / "dataset.json").read_text())
    assert values["labels"] == {"background": 0, "left kidney": 1, "my tumour": 2}
    assert (values["channel_names"], values["numTraining"], values["file_ending"]) == ({"0": "CT"}, 2, ".nii.gz")
    assert sorted(path.name for path in (nnunet / "imagesTr").iterdir()) == ["a_0000.nii.gz", "b_0000.nii.gz"]
    assert [path.name for path in (nnunet / "imagesTs").iterdir()] == ["other_0000.nii.gz"]
    values = json.loads((msd / "dataset.json").read_text())
    assert values["labels"] == {"0": "background", "1": "left kidney", "2": "my tumour"}
    assert values["training"][0] == {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    assert (values["test"], values["numTest"]) == (["./imagesTs/other.nii.gz"], 1)
    for pair in values["training"]:
        assert all((msd / name).is_file() for name in pair.values())


def test_slices_that_nobody_labelled_go_out_and_come_back_as_such(tmp_path: Path):
    studies, out, back = make_studies(tmp_path / "studies"), tmp_path / "Dataset501_Part", tmp_path / "back"
    store = open_as_server(studies)
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 2:5] = 6
    file = tmp_path / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array, nibabel.load(studies / "one.nii.gz").affine), file)
    store.save_annotated("one", file, "final", {"slices": [2, 3], "structures": ["liver"]})

    with pytest.raises(ProGiDiffError, match="only nnU-Net knows voxels that are to be ignored"):
        export_dataset(studies, studies / ".progidiff", tmp_path / "Task", ExportSettings("msd"))
    (outcome,) = export_dataset(studies, studies / ".progidiff", out, ExportSettings("nnunet"))
    assert outcome.notes == ("6 of its 8 axial slices are not labelled and are to be ignored.",)
    values = json.loads((out / "dataset.json").read_text())["labels"]
    assert values == {"background": 0, "liver": 1, "ignore": 2}
    label = read(out / "labelsTr" / "one.nii.gz")
    assert set(np.unique(label[:, :, 2:4])) == {0, 1}
    assert set(np.unique(label[:, :, [0, 1, 4, 5, 6, 7]])) == {2}

    assert [entry.state for entry in bring(out, back)] == ["imported"]
    (saved,) = get_annotations(back).in_force("one")
    assert saved.slices == (2, 3)
    assert int((read(back / "labels" / "final" / "one.nii.gz") == 1).sum()) == 18


def test_a_structure_that_a_label_does_not_speak_about_is_not_taken_for_absent(tmp_path: Path):
    studies = tmp_path / "studies"
    bring(write_nnunet(tmp_path / "Dataset001_X", {"background": 0, "liver": 1}, (1,), ("a",)), studies)
    bring(write_nnunet(tmp_path / "Dataset002_Y", {"background": 0, "liver": 1, "spleen": 2}, cases=("b",)), studies)
    state = studies / ".progidiff"
    told = {entry.image: entry for entry in export_dataset(studies, state, tmp_path / "one", ExportSettings("msd"))}
    assert told["a"].state == "left out"
    assert "does not say whether there is spleen" in told["a"].notes[0]
    assert told["b"].state == "exported"
    more = ExportSettings("msd", assume_absent=True)
    assert {entry.state for entry in export_dataset(studies, state, tmp_path / "two", more)} == {"exported"}
    liver = ExportSettings("msd", structures=("liver",))
    assert {entry.state for entry in export_dataset(studies, state, tmp_path / "three", liver)} == {"exported"}
    assert json.loads((tmp_path / "three" / "dataset.json").read_text())["labels"] == {"0": "background", "1": "liver"}


def test_regions_of_several_ids_are_refused_until_each_id_has_a_name(tmp_path: Path):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    folder = write_nnunet(tmp_path / "Dataset001_X", labels, regions_class_order=[1, 2])
    with pytest.raises(ProGiDiffError, match=r"are regions of several ids \('whole' is 1, 2\).*--label 1="):
        read_dataset(folder)
    assert bring(folder, tmp_path / "studies", {1: "oedema", 2: "core"})[0].state == "imported"
    (saved,) = get_annotations(tmp_path / "studies").list("a")
    assert saved.structures == ("oedema", "core")


def test_one_of_several_channels_is_taken_and_has_to_be_chosen(tmp_path: Path):
    folder = write_nnunet(tmp_path / "Dataset001_X", {"background": 0, "liver": 1}, (1,), ("a",))
    second = write_phantom(folder / "imagesTr" / "a_0001.nii.gz", shape=SHAPE, seed=9)
    values = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**values, "channel_names": {"0": "T2w", "1": "ADC"}}))
    with pytest.raises(ProGiDiffError, match=r"2 channels \(0 T2w, 1 ADC\).*--channel T2w"):
        read_dataset(folder)
    with pytest.raises(ProGiDiffError, match="has no channel 'FLAIR'; it has 0 T2w, 1 ADC"):
        read_dataset(folder, "FLAIR")
    dataset = read_dataset(folder, "adc")
    assert (dataset.cases[0].image, dataset.channel, dataset.modality) == (second, "ADC", "MR")


def test_a_channel_along_the_fourth_axis_of_the_decathlon_is_taken_out(tmp_path: Path):
    folder, studies = tmp_path / "Task05_X", tmp_path / "studies"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    image = nibabel.load(write_phantom(tmp_path / "x.nii.gz", shape=SHAPE))
    stack = np.stack([np.asarray(image.dataobj), np.asarray(image.dataobj) + 1000], axis=3)
    nibabel.save(nibabel.Nifti1Image(stack, image.affine), folder / "imagesTr" / "p.nii.gz")
    label = np.zeros(SHAPE, np.uint8)
    label[3:5, 3:5, 3] = 1
    nibabel.save(nibabel.Nifti1Image(label, image.affine), folder / "labelsTr" / "p.nii.gz")
    values = {
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "prostate"},
        "tensorImageSize": "4D",
        "training": [{"image": "./imagesTr/p.nii.gz", "label": "./labelsTr/p.nii.gz"}],
        "test": ["./imagesTs/q.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(values))
    dataset = read_dataset(folder, "ADC", with_test=True)
    assert dataset.missing == ("'q' has no image at './imagesTs/q.nii.gz', so it is left out.",)
    (outcome,) = import_dataset(dataset, studies, studies / ".progidiff", ImportSettings())
    assert outcome.state == "imported"
    np.testing.assert_array_equal(read(studies / "p.nii.gz"), stack[..., 1])
    assert json.loads((studies / "p.json").read_text()) == {"modality": "MR"}


def test_another_image_or_label_of_the_same_name_stays_and_is_told_of(tmp_path: Path):
    studies = tmp_path / "studies"
    bring(write_nnunet(tmp_path / "Dataset001_X", LABELS, cases=("a",)), studies)
    other = write_nnunet(tmp_path / "Dataset002_Y", LABELS, (1,), cases=("a",))
    (outcome,) = bring(other, studies)
    assert outcome.state == "failed"
    assert "Save 1 by anna of" in outcome.notes[0]
    assert "--replace" in outcome.notes[0]
    (outcome,) = bring(other, studies, replace=True)
    assert outcome.state == "imported"
    assert set(np.unique(read(studies / "labels" / "final" / "a.nii.gz"))) == {0, 1}
    assert len(get_annotations(studies).list("a")) == 2
    write_phantom(other / "imagesTr" / "a_0000.nii.gz", shape=SHAPE, seed=5)
    (outcome,) = bring(other, studies)
    assert outcome.state == "failed"
    assert "'a.nii.gz' is another image of the id 'a'" in outcome.notes[0]


def test_labels_take_the_ids_of_a_folder_that_has_some(tmp_path: Path):
    studies = tmp_path / "studies"
    studies.mkdir()
    (studies / "labels.json").write_text('{"7": "left kidney"}')
    bring(write_nnunet(tmp_path / "Dataset001_X", LABELS, cases=("a",)), studies)
    (saved,) = get_annotations(studies).list("a")
    assert dict(saved.label_ids) == {"left kidney": 7, "my tumour": 14}
    assert set(np.unique(read(studies / "labels" / "final" / "a.nii.gz"))) == {0, 7, 14}
    assert json.loads((studies / "labels.json").read_text()) == {"7": "left kidney", "14": "my tumour"}


def test_images_may_be_links_and_other_formats_are_converted(tmp_path: Path):
    folder, studies = write_nnunet(tmp_path / "Dataset001_X", LABELS, cases=("a",)), tmp_path / "studies"
    bring(folder, studies, placing="link")
    assert (studies / "a.nii.gz").stat().st_ino == (folder / "imagesTr" / "a_0000.nii.gz").stat().st_ino
    meta, fresh = tmp_path / "Dataset002_Y", tmp_path / "fresh"
    for part, name in (("imagesTr", "a_0000"), ("labelsTr", "a")):
        (meta / part).mkdir(parents=True)
        sitk.WriteImage(sitk.ReadImage(str(folder / part / f"{name}.nii.gz")), str(meta / part / f"{name}.mha"))
    values = json.loads((folder / "dataset.json").read_text())
    (meta / "dataset.json").write_text(json.dumps({**values, "file_ending": ".mha"}))
    assert [entry.state for entry in bring(meta, fresh)] == ["imported"]
    assert [entry.state for entry in bring(meta, fresh)] == ["there"]
    np.testing.assert_array_equal(read(fresh / "a.nii.gz"), read(studies / "a.nii.gz"))
    np.testing.assert_array_equal(
        read(fresh / "labels" / "final" / "a.nii.gz"), read(studies / "labels" / "final" / "a.nii.gz")
    )


def test_a_label_that_does_not_fit_or_holds_strange_ids_fails_alone(tmp_path: Path):
    folder, studies = write_nnunet(tmp_path / "Dataset001_X", {"background": 0, "liver": 1}), tmp_path / "studies"
    affine = nibabel.load(folder / "labelsTr" / "b.nii.gz").affine
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 4, 4), np.uint8), affine), folder / "labelsTr" / "b.nii.gz")
    first, second = bring(folder, studies)
    assert "'a.nii.gz' holds the ids 2, which dataset.json does not name." in first.notes[0]
    assert '--label 2="..."' in first.notes[0]
    assert "resample it to the image's grid" in second.notes[0]
    assert (first.state, second.state) == ("failed", "failed")
    assert not get_annotations(studies).list()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "neither channel_names"),
        ('{"channel_names": {"0": "CT"}}', 'has no "labels"'),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": -1}}', "'-1' where an id belongs"),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": 1, "lesion": 1}}', "both 'liver' and 'lesion'"),
        ('{"labels": {"liver": 1}, "file_ending": ".nii.gz"}', "does not name its channels"),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}, "file_ending": ".npz"}', "is not read here"),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}}', "holds no image"),
        ('{"modality": {"0": "CT"}, "labels": {"1": "liver"}, "training": [{"image": "/etc/passwd"}]}', "outside of"),
        ('{"modality": {"0": "CT"}, "labels": {"1": "liver"}, "training": [{"image": "../x.nii.gz"}]}', "outside of"),
        ('{"modality": {"0": "CT"}, "labels": {"1": "liver"}, "training": [7]}', "where a case belongs"),
        ('{"channel_names": {"0": "CT"}, "labels": {"liver": 1}, "dataset": {"a": {"images": ["../b"]}}}', "outside"),
    ],
)
def test_a_damaged_or_hostile_description_is_refused_with_a_sentence(tmp_path: Path, text: str, sentence: str):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ProGiDiffError, match=sentence) as caught:
        read_dataset(tmp_path)
    assert caught.value.status == 422


@pytest.mark.parametrize("target", ["nnunet", "msd"])
def test_a_structure_called_as_the_format_calls_no_structure_is_not_exported_as_one(tmp_path: Path, target: Any):
    studies = tmp_path / "studies"
    bring(write_nnunet(tmp_path / "Dataset001_A", {"background": 0, "liver": 1, "lesion": 2}), studies)
    open_as_server(studies).rename_structure("a", "lesion", "Ignore", "anna")
    with pytest.raises(ProGiDiffError, match="means something else"):
        export_dataset(studies, studies / ".progidiff", tmp_path / "Dataset002_B", ExportSettings(target))
    assert not (tmp_path / "Dataset002_B").exists()


def test_hundreds_of_structures_go_out_with_the_numbers_that_are_told(tmp_path: Path):
    studies = tmp_path / "studies"
    studies.mkdir()
    for index in range(2):  # 255 fit into one label, and each image has its own.
        image = write_phantom(studies / f"case{index}.nii.gz", shape=SHAPE, seed=index)
        array = np.zeros(SHAPE, np.uint8)
        array[2:4], array[5:8] = 1, 3
        nibabel.save(nibabel.Nifti1Image(array, nibabel.load(image).affine), tmp_path / "label.nii.gz")
        info = [{"name": f"lesion {150 * index + number}", "idx": number} for number in range(1, 151)]
        params = {"label_info": info, "structures": [entry["name"] for entry in info]}
        open_as_server(studies).save_annotated(f"case{index}", tmp_path / "label.nii.gz", "final", params, user="anna")
    out = tmp_path / "Dataset009_B"
    settings = ExportSettings("nnunet", assume_absent=True)
    assert {entry.state for entry in export_dataset(studies, studies / ".progidiff", out, settings)} == {"exported"}
    told = json.loads((out / "dataset.json").read_text())["labels"]
    assert len(told) == 301
    for index in range(2):
        drawn = set(np.unique(read(out / "labelsTr" / f"case{index}.nii.gz")).tolist()) - {0}
        assert drawn == {told[f"lesion {150 * index + number}"] for number in (1, 3)}
    with pytest.raises(ProGiDiffError, match="more than the 255 ids"):
        export_dataset(studies, studies / ".progidiff", tmp_path / "files", ExportSettings("files", assume_absent=True))


def test_the_commands_import_and_export(tmp_path: Path):
    folder, studies, run = write_nnunet(tmp_path / "Dataset001_X", LABELS), tmp_path / "studies", CliRunner()
    result = run.invoke(app, ["import", str(folder), "--studies", str(studies), "--user", "anna"])
    assert result.exit_code == 0, result.output
    assert "nnU-Net v2 'Dataset001_X': 2 imported." in result.output
    result = run.invoke(app, ["export", str(tmp_path / "mine"), "--studies", str(studies)])
    assert result.exit_code == 2
    assert "Dataset501_mine" in " ".join(result.output.split())
    result = run.invoke(app, ["export", str(tmp_path / "Dataset501_mine"), "--studies", str(studies)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "Dataset501_mine" / "dataset.json").is_file()
    assert run.invoke(app, ["import", str(tmp_path / "gone"), "--studies", str(studies)]).exit_code == 2
    result = run.invoke(app, ["export", str(tmp_path / "Dataset501_mine"), "--studies", str(studies)])
    assert "is not empty" in result.output


def test_the_same_id_for_two_names_in_two_folders_is_mapped_by_name(tmp_path: Path):
    studies = tmp_path / "studies"
    bring(write_nnunet(tmp_path / "Dataset001_X", {"background": 0, "hippocampus head": 1}, (1,), ("a",)), studies)
    labels = {"background": 0, "left atrium": 1, "livr": 2}
    (told,) = bring(write_nnunet(tmp_path / "Dataset002_Y", labels, cases=("b",)), studies)
    assert any(note.startswith("'livr' is nearly 'liver'") for note in told.notes)  # kept in the label, and asked back
    table = FolderStructures(studies, studies / ".progidiff")
    ids = {row.name: row.label_id for row in table.own()}
    assert ids["hippocampus head"] == 1
    assert ids["left atrium"] != 1
    assert "livr" not in ids
    for image, name in (("a", "hippocampus head"), ("b", "left atrium")):
        label = read(studies / "labels" / "final" / f"{image}.nii.gz")
        assert ids[name] in np.unique(label)
