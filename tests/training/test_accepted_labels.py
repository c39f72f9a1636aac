"""What a datastore's labels are called and which slices of them count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.errors import ImageError, RequestError
from progidiff.labels.history import AnnotationStore
from progidiff.model.folder import load_card
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.accepted_labels import (
    build_cases,
    find_folder_structures,
    find_local_cases,
    from_json,
    list_local_labels,
    read_label_names,
    to_json,
)
from progidiff.training.split import AdaptData, prepare_data
from support.labelled_phantoms import write_case, write_table
from support.segment_files import write_seg_nrrd

LIVER, SPLEEN = STRUCTURES.index("liver") + 1, STRUCTURES.index("spleen") + 1


def write_study(folder: Path, ids: tuple[int, int], names: tuple[str, ...] = ("a", "b")) -> Path:
    """Two volumes of 12 slices with two boxes each, and no labels.json."""
    folder.mkdir()
    for name in names:
        write_case(folder, name, {ids[0]: np.s_[6:16, 6:20, 2:8], ids[1]: np.s_[24:30, 8:16, 1:9]}, slices=12)
    return folder


def write_records(folder: Path, records: dict[str, Any]) -> None:
    objects = {
        name: {"image": {"info": {}, "ext": ".nii.gz"}, "labels": {"final": {"info": info}}}
        for name, info in records.items()
    }
    (folder / "datastore_v2.json").write_text(json.dumps({"name": "x", "objects": objects}))


def prepare(folder: Path, model: Path, cases: Any = None, **options: Any) -> AdaptData:
    return prepare_data(
        folder if cases is None else cases, load_card(model), folder.parent / "cache", held_out=["b"], **options
    )


def test_the_labels_own_records_name_its_ids(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (1, 2))
    write_records(
        studies,
        {
            "a": {"label_info": [{"name": "Liver", "idx": 1}, {"name": "Left Kidney", "idx": 2}]},
            "b": {"label_info": [{"name": "left kidney", "idx": 1}, {"name": "liver", "idx": 2}]},
        },
    )
    data = prepare(studies, tiny_model)
    assert data.training.structures == ("left kidney", "liver")
    first, second = data.training.read([5])[1], data.validation.read([5])[1]
    # The same box is the liver in one volume and the left kidney in the other.
    assert np.array_equal((first == 1).numpy(), (second == 2).numpy())
    assert (first == 1).any()


def test_a_record_wins_over_labels_json_which_wins_over_our_own_ids(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (1, 2))
    cases = {c.name: c for c in find_local_cases(studies)}
    assert cases["a"].structures[LIVER] == "liver"
    assert not cases["a"].names_all
    write_table(studies, {1: "spleen", 2: "aorta"})
    write_records(studies, {"a": {"label_info": [{"name": "liver", "id": 1}]}})
    cases = {c.name: c for c in find_local_cases(studies)}
    assert cases["a"].structures == {1: "liver", 2: "aorta"}
    assert cases["b"].structures == {1: "spleen", 2: "aorta"}
    assert cases["a"].names_all


def test_labels_with_the_ids_that_the_server_hands_out_need_no_names(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN))
    data = prepare(studies, tiny_model)
    assert set(data.training.structures) == {"liver", "spleen"}
    assert data.training.annotated[0].all()


def test_what_is_not_drawn_is_unknown_where_nothing_names_the_ids(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN), ("a", "c"))
    write_case(studies, "b", {LIVER: np.s_[6:16, 6:20, 2:8], SPLEEN: np.s_[24:30, 8:16, 1:9]}, slices=12)
    write_case(studies, "c", {LIVER: np.s_[6:16, 6:20, 2:8]}, slices=12)
    data = prepare(studies, tiny_model)
    spoken = dict(zip(data.training.names, data.training.annotated, strict=True))
    spleen = data.training.structures.index("spleen")
    assert spoken["a"][:, spleen].all()
    assert not spoken["c"][:, spleen].any()
    position = data.training.index.index((data.training.names.index("c"), 5))
    assert data.training.weigh([position])[0, spleen] == 0


@pytest.mark.parametrize(
    "record", [{}, {"label_info": [{"name": "liver", "idx": 1}]}], ids=["no record", "a record that leaves it out"]
)
def test_an_unknown_id_is_refused_with_what_to_write_where(tmp_path: Path, tiny_model: Path, record: dict[str, Any]):
    studies = write_study(tmp_path / "studies", (1, 222))
    write_records(studies, {"a": record})
    with pytest.raises(
        ImageError,
        match=r"The label of '[ab]' holds ids 222, which neither.*Write them into labels.json.*\{\"222\": \"liver\"\}",
    ):
        prepare(studies, tiny_model)


def test_records_that_are_no_names_are_passed_over():
    assert read_label_names({"label_info": "liver"}) == {}
    assert read_label_names(
        {"label_info": [{"name": "liver"}, {"idx": 3}, "x", {"name": "aorta", "idx": "4"}, {"name": "air", "idx": 0}]}
    ) == {4: "aorta"}
    assert read_label_names({"params": {"label_names": {"liver": 6}}}) == {6: "liver"}


def test_a_slice_counts_for_the_structures_that_its_saves_speak_about(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN))
    store = AnnotationStore(tmp_path / "annotations", studies / "labels" / "final")
    final = studies / "labels" / "final"
    store.record("a", final / "a.nii.gz", slices=[3, 4], structures=["liver"])
    store.record("a", final / "a.nii.gz", slices=[4, 10], structures=["spleen"])
    data = prepare(studies, tiny_model, find_local_cases(studies, store))
    cache = data.training
    assert [(cache.names[v], z) for v, z in cache.index] == [("a", 3), ("a", 4), ("a", 10)]
    liver, spleen = (cache.structures.index(s) for s in ("liver", "spleen"))
    weights = cache.weigh([0, 1, 2])
    assert weights[:, liver].tolist() == [1, 1, 0]
    assert weights[:, spleen].tolist() == [0, 1, 1]
    # The spleen is drawn on slice 3 of the file, but nobody has said so; on slice 10 somebody said that it is not
    # there.
    assert cache.by_structure[spleen].tolist() == [1]
    # Made elsewhere, without a record: the whole volume counts.
    assert data.validation.annotated[0].all()


def test_a_structure_that_a_save_names_and_does_not_draw_is_absent(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN), ("a", "c"))
    write_case(studies, "b", {LIVER: np.s_[6:16, 6:20, 2:8], SPLEEN: np.s_[24:30, 8:16, 1:9]}, slices=12)
    write_case(studies, "c", {LIVER: np.s_[6:16, 6:20, 2:8]}, slices=12)
    store = AnnotationStore(tmp_path / "annotations", studies / "labels" / "final")
    store.record("c", studies / "labels" / "final" / "c.nii.gz", structures=["liver", "Spleen"])
    data = prepare(studies, tiny_model, find_local_cases(studies, store))
    spleen = data.training.structures.index("spleen")
    assert data.training.annotated[data.training.names.index("c")][:, spleen].all()


def test_the_history_of_a_label_knows_best_what_its_ids_mean(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (1, 2))
    write_table(studies, {1: "spleen", 2: "aorta", 3: "liver"})
    store = AnnotationStore(tmp_path / "annotations", studies / "labels" / "final")
    store.record("a", studies / "labels" / "final" / "a.nii.gz", label_ids={"left kidney": 1, "right kidney": 2})
    cases = {c.name: c for c in find_local_cases(studies, store)}
    assert cases["a"].structures == {1: "left kidney", 2: "right kidney", 3: "liver"}
    assert cases["b"].structures[1] == "spleen"


def test_a_deleted_label_and_an_unannotated_image_are_left_out(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN))
    store = AnnotationStore(tmp_path / "annotations", studies / "labels" / "final")
    store.record("a", studies / "labels" / "final" / "a.nii.gz")
    store.delete("a")
    assert [c.name for c in find_local_cases(studies, store)] == ["b"]


def test_the_folder_of_a_server_is_read_with_its_history(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN))
    store = AnnotationStore(studies / ".progidiff" / "annotations", studies / "labels" / "final")
    store.record("a", studies / "labels" / "final" / "a.nii.gz", slices=[2])
    cases = {c.name: c for c in find_local_cases(studies)}
    assert cases["a"].annotated == {"": frozenset({2})}
    assert cases["b"].annotated is None


def test_cases_survive_the_way_to_another_process(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (LIVER, SPLEEN))
    store = AnnotationStore(tmp_path / "annotations")
    store.record("a", studies / "labels" / "final" / "a.nii.gz", slices=[3, 4], structures=["liver"])
    store.record("b", studies / "labels" / "final" / "b.nii.gz")
    cases = build_cases(list_local_labels(studies), {1: "liver"}, store)
    assert from_json(json.loads(json.dumps(to_json(cases)))) == cases


def test_without_any_label_the_message_says_how_to_get_one(tmp_path: Path, tiny_model: Path):
    with pytest.raises(RequestError, match="No slice is labelled yet. Save a label with tag final"):
        prepare_data([], load_card(tiny_model), tmp_path / "cache")


def test_a_file_in_the_folder_that_names_its_ids_is_believed(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (1, 2))
    write_table(studies, {1: "spleen", 2: "aorta"})
    write_records(studies, {"a": {"label_info": [{"name": "spleen", "idx": 1}, {"name": "liver", "idx": 2}]}})
    final = studies / "labels" / "final"
    image = nibabel.load(final / "a.nii.gz")
    labels = np.asarray(image.dataobj)
    (final / "a.nii.gz").unlink()
    layers = np.stack([labels == 1, labels == 2]).astype(np.uint8)
    write_seg_nrrd(final / "a.nrrd", layers, [("liver", 1, 0), ("left kidney", 1, 1)], image.affine)
    cases = {c.name: c for c in find_local_cases(studies)}
    assert cases["a"].structures == {1: "liver", 2: "left kidney"}
    assert cases["b"].structures == {1: "spleen", 2: "aorta"}
    write_table(studies, {1: "liver", 2: "left kidney"})
    data = prepare(studies, tiny_model)
    assert data.training.structures == ("left kidney", "liver")
    assert np.array_equal(data.training.read([5])[1].numpy(), data.validation.read([5])[1].numpy())


def test_a_segment_without_a_name_is_left_out_and_told_of(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (1, 2), ("a", "b", "c"))
    named = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
    unnamed = {"label_info": [{"name": "liver", "idx": 1}, {"name": "Segment_2", "idx": 2}]}
    write_records(studies, {"a": unnamed, "b": named, "c": named})
    data = prepare(studies, tiny_model)
    (note,) = data.notes
    assert note.startswith("'Segment_2' of 'a' does not say what it is, and is left out.")
    assert "POST /progidiff/annotations/a/rename" in note
    spoken = dict(zip(data.training.names, data.training.annotated, strict=True))
    liver, spleen = (data.training.structures.index(name) for name in ("liver", "spleen"))
    assert spoken["a"][:, liver].all()
    assert not spoken["a"][:, spleen].any()  # It may be what has no name.
    assert spoken["c"][:, spleen].all()


def test_a_volume_without_any_named_segment_stops_no_training(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (1, 2), ("a", "b", "c"))
    named = {"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]}
    unnamed = {"label_info": [{"name": "Segment_1", "idx": 1}, {"name": "Segment_2", "idx": 2}]}
    write_records(studies, {"a": unnamed, "b": named, "c": named})
    data = prepare(studies, tiny_model)
    assert data.training.names == ["c"]
    assert "'Segment_1', 'Segment_2' of 'a'" in data.notes[0]
    write_records(studies, {"a": unnamed, "b": named, "c": unnamed})
    with pytest.raises(ImageError, match="No volume is left to train on. 'Segment_1'"):
        prepare(studies, tiny_model)


def test_what_is_new_is_background_nowhere_but_where_somebody_said_so(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", (LIVER, 14), ("a", "b", "c"))
    own = find_folder_structures(studies)
    own.add("cyst")
    final = studies / "labels" / "final"
    store = AnnotationStore(studies / ".progidiff" / "annotations", final)
    store.record("a", final / "a.nii.gz", structures=["liver", "cyst"], label_ids={"liver": LIVER, "cyst": 14})
    store.record("b", final / "b.nii.gz", slices=[3, 11], structures=["cyst"], label_ids={"liver": LIVER, "cyst": 14})
    write_case(studies, "c", {LIVER: np.s_[6:16, 6:20, 2:8]}, slices=12)  # Made elsewhere, and knows of no cyst.
    data = prepare(studies, tiny_model, declared=own.declared())
    spoken = {
        name: cache.annotated[cache.names.index(name)][:, cache.structures.index("cyst")]
        for cache in (data.training, data.validation)
        for name in cache.names
    }
    liver = {
        name: cache.annotated[cache.names.index(name)][:, cache.structures.index("liver")]
        for cache in (data.training, data.validation)
        for name in cache.names
        if "liver" in cache.structures
    }
    assert np.flatnonzero(spoken["a"]).tolist() == list(range(1, 9))  # Drawn there; who saves all says nothing more.
    assert liver["a"].all()
    assert np.flatnonzero(spoken["b"]).tolist() == [3, 11]
    assert not spoken["c"].any()


def test_labels_that_were_saved_before_a_rename_are_of_the_same_structure(tmp_path: Path):
    studies = write_study(tmp_path / "studies", (LIVER, 14), ("a", "b"))
    own = find_folder_structures(studies)
    own.add("ventricle")
    final = studies / "labels" / "final"
    store = AnnotationStore(studies / ".progidiff" / "annotations", final)
    store.record("a", final / "a.nii.gz", slices=[3], structures=["Ventricle"], label_ids={"Ventricle": 14})
    own.rename("ventricle", "left ventricle")
    cases = {case.name: case for case in find_local_cases(studies)}
    assert cases["a"].structures[14] == "left ventricle"
    assert cases["a"].annotated == {"left ventricle": frozenset({3})}
    assert cases["b"].structures[14] == "left ventricle"
    assert not cases["b"].names_all
