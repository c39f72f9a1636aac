"""The local datastore: what counts as a label, what a save keeps, and what is there after everything that can go
wrong.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from watchdog.events import (
    FileClosedEvent,
    FileClosedNoWriteEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileOpenedEvent,
)

from progidiff.errors import (
    BusyError,
    GeometryError,
    ImageError,
    NotFoundError,
    ProGiDiffError,
    RequestError,
    StoreError,
)
from progidiff.images.reading import read_grid
from progidiff.images.writing import save_array
from progidiff.labels.history import AnnotationStore
from progidiff.server.datastores import local as module
from progidiff.server.datastores.image_locks import ImageLocks
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from support.local_store import (
    LIVER,
    SHAPE,
    SPLEEN,
    make_studies,
    open_as_server,
    open_store,
    read_final,
    write_label,
)
from support.phantoms import write_phantom
from support.segment_files import write_seg_nrrd


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return make_studies(tmp_path / "studies")


@pytest.fixture
def store(studies: Path) -> SafeLocalDatastore:
    return open_as_server(studies)


def test_a_saved_label_is_kept_byte_for_byte_in_the_folder_and_in_the_history(store: SafeLocalDatastore, studies: Path):
    label = write_label(studies, "a", {3: LIVER})
    saved = store.save_annotated("one", label, "final", {}, "ada")
    assert (studies / "labels/final/one.nii.gz").read_bytes() == label.read_bytes()
    assert store.annotations.label_file(saved.annotation).read_bytes() == label.read_bytes()
    assert (saved.annotation.slices, saved.annotation.structures, saved.annotation.user) == (None, ("liver",), "ada")
    assert store.get_labeled_images() == ["one"]
    assert store.get_label_info("one", "final")["label_info"] == [{"name": "liver", "idx": LIVER}]
    assert open_store(studies).get_labeled_images() == ["one"]


def test_saving_the_same_bytes_again_keeps_no_second_version(store: SafeLocalDatastore, studies: Path):
    label = write_label(studies, "a", {3: LIVER})
    first = store.save_annotated("one", label, "final", {})
    again = store.save_annotated("one", label, "final", {})
    assert (first.repeated, again.repeated) == (False, True)
    assert again.annotation == first.annotation
    assert len(store.annotations.list()) == 1


def test_a_save_of_some_slices_leaves_the_others_as_they_were(store: SafeLocalDatastore, studies: Path):
    store.save_annotated("one", write_label(studies, "a", {2: LIVER}), "final", {"slices": [2]})
    store.save_annotated("one", write_label(studies, "b", {2: SPLEEN, 5: LIVER}), "final", {"slices": [5]})
    final = read_final(studies)
    assert {k: int(final[5, 5, k]) for k in range(8) if final[5, 5, k]} == {2: LIVER, 5: LIVER}
    assert store.annotations.annotated_slices("one") == {2, 5}
    store.save_annotated("one", write_label(studies, "c", {}), "final", {"slices": ["2"]})
    assert {int(k) for k in np.flatnonzero(read_final(studies)[5, 5])} == {5}
    assert store.annotations.annotated_slices("one") == {2, 5}


def test_a_save_of_one_structure_leaves_the_others_as_they_were(store: SafeLocalDatastore, studies: Path):
    store.save_annotated("one", write_label(studies, "a", {2: LIVER, 3: LIVER}), "final", {"structures": ["liver"]})
    store.save_annotated("one", write_label(studies, "b", {5: SPLEEN}), "final", {"structures": ["spleen"]})
    final = read_final(studies)
    assert {k: int(final[5, 5, k]) for k in range(8) if final[5, 5, k]} == {2: LIVER, 3: LIVER, 5: SPLEEN}
    assert [label.structures for label in store.annotations.in_force("one")] == [("liver",), ("spleen",)]
    store.save_annotated("one", write_label(studies, "c", {}), "final", {"structures": "spleen"})
    assert {int(k) for k in np.flatnonzero(read_final(studies)[5, 5])} == {2, 3}


def test_ids_that_slicer_numbers_by_position_become_the_ids_of_the_folder(store: SafeLocalDatastore, studies: Path):
    info = {"label_info": [{"name": "Liver", "idx": 1}, {"name": "tumour 1", "idx": 2}]}
    saved = store.save_annotated("one", write_label(studies, "a", {2: 1, 3: 2}), "final", info)
    assert dict(saved.annotation.label_ids) == {"liver": LIVER, "tumour 1": 14}
    assert set(np.unique(read_final(studies))) == {0, LIVER, 14}
    (studies / "labels.json").write_text('{"1": "liver", "2": "spleen"}')
    store.save_annotated(
        "two", write_label(studies, "b", {2: 7}, "two"), "final", {"label_info": [{"name": "liver", "idx": 7}]}
    )
    assert set(np.unique(read_final(studies, "two"))) == {0, 1}
    store.save_annotated("one", write_label(studies, "c", {6: 1}), "final", {"slices": [6]})
    final = read_final(studies)
    assert [int(final[5, 5, k]) for k in (2, 3, 6)] == [1, 14, 1]  # The old ids moved along with labels.json.
    saved = store.save_annotated(
        "one", write_label(studies, "d", {}), "final", {"structures": ["spleen"], "slices": [0]}
    )
    assert dict(saved.annotation.label_ids) == {"liver": 1, "tumour 1": 14, "spleen": 2}


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_labels_of_every_format_are_taken_and_replace_one_another(
    store: SafeLocalDatastore, studies: Path, suffix: str
):
    from progidiff.images.reading import load_label
    from progidiff.images.writing import save_array

    store.save_annotated("one", write_label(studies, "a", {3: LIVER}), "final", {})
    affine = nibabel.load(studies / "one.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[1:3, 1:3, 4] = SPLEEN
    store.save_annotated("one", save_array(array, affine, studies.parent / f"b{suffix}"), "final", {})
    files = sorted(path.name for path in (studies / "labels/final").iterdir())
    assert files == [f"one{'.nii.gz' if suffix == '.mha' else suffix}"]
    assert np.array_equal(load_label(studies / "labels/final" / files[0]), array)
    store.refresh()
    assert store.get_label_uri("one", "final").endswith(files[0])


def refused_labels(studies: Path) -> list[tuple[str, Path, dict[str, Any], type[ProGiDiffError], str]]:
    affine = nibabel.load(studies / "one.nii.gz").affine
    good = write_label(studies, "good", {3: LIVER})

    def save(name: str, array: np.ndarray, affine: np.ndarray = affine) -> Path:
        path = studies.parent / f"{name}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(array, affine), path)
        return path

    text = studies.parent / "text.nii.gz"
    text.write_text("this is no label")
    cut = studies.parent / "cut.nii.gz"
    cut.write_bytes(good.read_bytes()[:60])
    odd = studies.parent / "label.txt"
    odd.write_text("x")
    nan = np.zeros(SHAPE, np.float32)
    nan[0, 0, 0] = np.nan
    infinite = np.zeros(SHAPE, np.float32)
    infinite[0, 0, 0] = np.inf
    moved = affine.copy()
    moved[:3, 3] += 40
    return [
        ("a text file", text, {}, ImageError, "cannot be read"),
        ("a cut file", cut, {}, ImageError, "cannot be read"),
        ("another format", odd, {}, ImageError, "is not read"),
        ("another size", save("size", np.zeros((32, 24, 7), np.uint8)), {}, GeometryError, "resample it"),
        ("another place", save("place", np.zeros(SHAPE, np.uint8), moved), {}, GeometryError, "mm away"),
        ("four axes", save("four", np.zeros((*SHAPE, 2), np.uint8)), {}, ImageError, "single volume"),
        ("two axes", save("flat", np.zeros((32, 24), np.uint8)), {}, ImageError, "needed"),
        ("fractions", save("half", np.full(SHAPE, 0.5, np.float32)), {}, ImageError, "whole numbers"),
        ("NaN", save("nan", nan), {}, ImageError, "whole numbers"),
        ("infinity", save("inf", infinite), {}, ImageError, "infinite"),
        ("negative ids", save("minus", np.full(SHAPE, -1, np.int16)), {}, ImageError, "whole numbers from 0"),
        ("unknown ids", write_label(studies, "strange", {3: 77}), {}, ImageError, "77, which nothing names"),
        ("ids outside the table", good, {"label_info": [{"name": "liver", "idx": 1}]}, ImageError, "nothing names"),
        ("a slice too far", good, {"slices": [8]}, RequestError, "from 0 to 7"),
        ("a negative slice", good, {"slices": [-1]}, RequestError, "from 0 to 7"),
        ("half a slice", good, {"slices": [2.5]}, RequestError, "whole number"),
        ("no slices", good, {"slices": []}, RequestError, "leave it out"),
        ("slices as text", good, {"slices": "1,2"}, RequestError, "must be a list"),
        ("structures as number", good, {"structures": 5}, RequestError, "list of names"),
        ("a structure without a name", good, {"structures": [" "]}, RequestError, "printable"),
        ("seconds in the past", good, {"seconds": -1}, RequestError, "seconds"),
        ("edited maybe", good, {"edited": "maybe"}, RequestError, "true or false"),
        ("a made-up key", good, {"proposals": "../../x"}, RequestError, "no key"),
        ("shown nothing", good, {"shown": "nicest"}, RequestError, "shown"),
        ("a table of text", good, {"label_info": "liver"}, RequestError, "label_info"),
        (
            "a table with two names for an id",
            good,
            {"label_info": [{"name": "a", "idx": 1}, {"name": "b", "idx": 1}]},
            RequestError,
            "two structures",
        ),
    ]


def test_labels_that_cannot_count_are_refused_and_change_nothing(store: SafeLocalDatastore, studies: Path):
    store.save_annotated("one", write_label(studies, "first", {3: SPLEEN}), "final", {})
    before = {
        path: path.read_bytes() for path in studies.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    }
    for name, file, params, error, words in refused_labels(studies):
        with pytest.raises(error) as caught:
            store.save_annotated("one", file, "final", params)
        assert words in str(caught.value), (name, str(caught.value))
    after = {
        path: path.read_bytes() for path in studies.rglob("*") if path.is_file() and not path.name.endswith(".lock")
    }
    assert after == before


@pytest.mark.parametrize("tag", ["../final", "..", ".hidden", "a/b", "", "a\\b", "x" * 65, "-rf", "a\0b", "fin al"])
def test_tags_that_leave_the_folder_are_refused(store: SafeLocalDatastore, studies: Path, tag: str):
    label = write_label(studies, "a", {3: LIVER})
    with pytest.raises(RequestError, match="is no tag"):
        store.save_annotated("one", label, tag, {})
    with pytest.raises(RequestError, match="is no tag"):
        store.save_label("one", str(label), tag, {})


@pytest.mark.parametrize(
    "image_id", ["../evil", "..", ".hidden", "a/b", "a\\b", "/etc/passwd", "x" * 129, "-rf", "a\0b", "a b"]
)
def test_ids_that_leave_the_folder_are_refused(store: SafeLocalDatastore, studies: Path, image_id: str):
    with pytest.raises(RequestError, match="cannot name an image"):
        store.add_image(image_id, str(studies / "one.nii.gz"), {})
    with pytest.raises(NotFoundError):
        store.save_annotated(image_id, write_label(studies, "a", {3: LIVER}), "final", {})


def test_an_image_is_opened_before_it_counts_and_never_replaced(store: SafeLocalDatastore, studies: Path):
    text = studies.parent / "text.nii.gz"
    text.write_text("this is no image")
    with pytest.raises(ImageError, match="cannot be read"):
        store.add_image("new", str(text), {})
    with pytest.raises(RequestError, match=r"\.nii\.gz"):
        store.add_image("new", str(studies.parent / "evil.py"), {})
    fresh = write_phantom(studies.parent / "fresh.nii.gz", shape=SHAPE, seed=9)
    assert store.add_image("new", str(fresh), {"a": 1}) == "new"
    assert store.add_image("new", str(fresh), {}) == "new"
    assert (studies / "new.nii.gz").read_bytes() == fresh.read_bytes()
    with pytest.raises(RequestError, match="another image 'new'"):
        store.add_image("new", str(studies / "one.nii.gz"), {})
    assert store.get_image_info("new")["a"] == 1


def test_undo_restore_and_delete_move_the_label_and_lose_no_version(store: SafeLocalDatastore, studies: Path):
    files = [write_label(studies, name, {k: LIVER}) for name, k in (("a", 1), ("b", 2), ("c", 3))]
    saves = [store.save_annotated("one", file, "final", {}).annotation for file in files]
    final = studies / "labels/final/one.nii.gz"
    assert store.undo("one", "ada") == saves[1]
    assert final.read_bytes() == files[1].read_bytes()
    assert store.restore("one", saves[0].sequence, "ada") == saves[0]
    assert final.read_bytes() == files[0].read_bytes()
    assert store.get_label_info("one", "final")["label_info"] == [{"name": "liver", "idx": LIVER}]
    store.remove_label("one", "final", "ada")
    assert not final.exists()
    assert store.get_labeled_images() == []
    assert store.annotations.annotated_images() == {}
    with pytest.raises(NotFoundError, match="no label with tag"):
        store.remove_label("one", "final")
    store.undo("one")
    assert final.read_bytes() == files[0].read_bytes()
    for label, file in zip(saves, files, strict=True):
        assert store.annotations.label_file(label).read_bytes() == file.read_bytes()
    assert store.annotations.verify() == []
    with pytest.raises(NotFoundError, match="nothing to undo"):
        store.undo("two")


def test_a_removed_image_goes_to_the_trash_with_its_history_kept(store: SafeLocalDatastore, studies: Path):
    saved = store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    image = (studies / "one.nii.gz").read_bytes()
    store.remove_image("one", "ada")
    assert store.list_images() == ["two"]
    assert [path.read_bytes() for path in (studies / ".progidiff/trash").iterdir()] == [image]
    assert store.annotations.label_file(saved.annotation).exists()
    with pytest.raises(NotFoundError, match="There is no image"):
        store.remove_image("one")


def test_a_label_that_somebody_put_into_the_folder_is_kept_before_it_is_replaced(
    store: SafeLocalDatastore, studies: Path
):
    foreign = write_label(studies, "foreign", {5: SPLEEN})
    final = studies / "labels/final/one.nii.gz"
    shutil.copyfile(foreign, final)
    store.refresh()
    assert store.annotations.annotated_images() == {"one": None}
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {"slices": [1]})
    kept = store.annotations.list("one")
    assert [label.client for label in kept] == ["folder", ""]
    assert store.annotations.label_file(kept[0]).read_bytes() == foreign.read_bytes()
    merged = read_final(studies)
    assert (int(merged[5, 5, 1]), int(merged[5, 5, 5])) == (LIVER, SPLEEN)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("mirrored", "lies up to .* mm away"), ("cropped", "voxels and the image"), ("junk", "cannot be read")],
)
def test_a_label_from_elsewhere_that_does_not_fit_its_image_does_not_count_until_it_does(
    studies: Path, fault: str, reason: str
):
    fitting = write_label(studies, "foreign", {5: SPLEEN}).read_bytes()
    image = nibabel.load(studies.parent / "foreign.nii.gz")
    array = np.asarray(image.dataobj)
    final = studies / "labels" / "final" / "one.nii.gz"
    final.parent.mkdir(parents=True)
    if fault == "junk":
        final.write_bytes(b"no label")
    elif fault == "mirrored":
        nibabel.save(nibabel.Nifti1Image(array, image.affine @ np.diag([-1, 1, 1, 1])), final)
    else:
        nibabel.save(nibabel.Nifti1Image(array[1:], image.affine), final)
    wrong = final.read_bytes()
    store = open_as_server(studies)
    store.check_foreign_labels()
    assert store.annotations.annotated_images() == {}
    assert store.get_unlabeled_images() == ["one", "two"]
    assert {entry.name for entry in store.left_out} == {"labels/final/one.nii.gz"}
    assert re.search(f"This label does not count: .*{reason}", store.left_out[0].reason)
    assert final.read_bytes() == wrong

    final.write_bytes(fitting)  # Somebody mends it.
    store.refresh()
    store.check_foreign_labels()
    assert store.annotations.annotated_images() == {"one": None}
    assert store.get_unlabeled_images() == ["two"]
    assert store.left_out == ()
    final.write_bytes(wrong)
    store.refresh()
    store.check_foreign_labels()
    # A label of the first slice is that, and what was there is kept.
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {"slices": [1]})
    assert {z for z in range(SHAPE[2]) if read_final(studies)[..., z].any()} == {1}
    assert store.annotations.annotated_images() == {"one": frozenset({1})}
    assert [path.read_bytes() for path in (studies / ".progidiff/trash").iterdir()] == [wrong]


def test_a_label_from_elsewhere_with_fractions_counts_no_more_once_somebody_opens_its_image(
    store: SafeLocalDatastore, studies: Path
):
    label = nibabel.load(write_label(studies, "a", {1: LIVER}))
    halves = np.asarray(label.dataobj, np.float32) / 4
    nibabel.save(nibabel.Nifti1Image(halves, label.affine), studies / "labels" / "final" / "one.nii.gz")
    store.refresh()
    assert store.annotations.annotated_images() == {"one": None}  # By its header it is one.
    store.adopt("one")
    for _ in range(2):
        assert store.annotations.annotated_images() == {}
        assert store.get_unlabeled_images() == ["one", "two"]
        store.refresh()
    assert "holds fractions" in store.left_out[0].reason


def test_a_label_whose_name_is_no_images_is_said(store: SafeLocalDatastore, studies: Path):
    label = write_label(studies, "a", {1: LIVER})
    names = ("One.nii.gz", "one_seg.nii.gz")
    for name in (*names, "one.nii.gz", ".one.nii.gz", "notes.txt"):
        shutil.copyfile(label, studies / "labels" / "final" / name)
    store.refresh()
    assert [entry.name for entry in store.left_out] == [f"labels/final/{name}" for name in names]
    assert store.left_out[0].reason.startswith("There is no image 'One', so this label counts for none.")
    assert store.get_unlabeled_images() == ["two"]


def test_files_that_vanish_behind_its_back_count_no_more_and_come_back_by_undo(
    store: SafeLocalDatastore, studies: Path
):
    label = write_label(studies, "a", {1: LIVER})
    store.save_annotated("one", label, "final", {})
    (studies / "labels/final/one.nii.gz").unlink()
    store.refresh()
    assert store.get_labeled_images() == []
    assert store.annotations.annotated_images() == {}
    store.undo("one")
    assert (studies / "labels/final/one.nii.gz").read_bytes() == label.read_bytes()
    (studies / "one.nii.gz").unlink()
    with pytest.raises(NotFoundError, match="is gone"):
        store.save_annotated("one", label, "final", {})
    store.refresh()
    assert store.list_images() == ["two"]


def test_a_folder_that_is_not_mounted_any_more_loses_nothing(store: SafeLocalDatastore, studies: Path):
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    away = studies.with_name("away")
    studies.rename(away)
    studies.mkdir()
    store.refresh()
    assert store.list_images() == ["one", "two"]
    shutil.rmtree(studies)
    away.rename(studies)
    store.refresh()
    assert store.get_labeled_images() == ["one"]


@pytest.mark.parametrize("content", [b"", b'{"name": "x", "obj', b"\xff\xfe\x00", b"[]", b"null"])
def test_a_damaged_list_recovers_from_its_backup(
    store: SafeLocalDatastore, studies: Path, content: bytes, caplog: pytest.LogCaptureFixture
):
    store.update_image_info("one", {"note": "kept"})
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    (studies / "datastore_v2.json").write_bytes(content)
    again = open_store(studies)
    assert again.get_image_info("one")["note"] == "kept"
    again.refresh()
    assert again.get_labeled_images() == ["one"]
    assert "Recovered the list" in caplog.text
    assert [path.read_bytes() for path in studies.glob("datastore_v2.json.damaged-*")] == [content]


def test_without_list_and_backup_the_folders_are_looked_through(
    store: SafeLocalDatastore, studies: Path, caplog: pytest.LogCaptureFixture
):
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    (studies / "datastore_v2.json").write_bytes(b"{")
    (studies / "datastore_v2.json.bak").write_bytes(b"{")
    (studies / ".progidiff" / "datastore.sqlite").write_bytes(b"no database" * 1000)
    again = open_store(studies)
    again.refresh()
    assert again.list_images() == ["one", "two"]
    assert again.get_labeled_images() == ["one"]
    assert "notes on images and labels are lost" in caplog.text
    json.loads((studies / "datastore_v2.json").read_text())


def test_entries_of_a_list_that_leave_the_folder_are_left_out(studies: Path):
    open_store(studies).refresh()
    path = studies / "datastore_v2.json"
    model = json.loads(path.read_text())
    entry = model["objects"]["one"]
    model["objects"]["../../etc/passwd"] = {**entry, "image": {"ext": "", "info": {}}}
    model["objects"]["one"] = {**entry, "labels": {"../x": {"ext": ".nii.gz", "info": {}}}}
    path.write_text(json.dumps(model))
    again = open_store(studies)
    assert set(again.list_images()) == {"one", "two"}
    assert again.get_labels_by_image_id("one") == {}
    assert again.get_label_uri("one", "../x") == ""


def test_a_full_disk_is_said_and_the_label_before_stays(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    first = write_label(studies, "a", {1: LIVER})
    store.save_annotated("one", first, "final", {})
    second = write_label(studies, "b", {2: LIVER})

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for target in ("progidiff.labels.history.shutil.copyfile", "progidiff.labels.history.os.write"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            with pytest.raises(StoreError, match="Free some disk space"):
                store.save_annotated("one", second, "final", {})
        assert (studies / "labels/final/one.nii.gz").read_bytes() == first.read_bytes()
        assert [label.sequence for label in store.annotations.list("one")] == [1]
    assert store.annotations.verify() == []
    assert store.save_annotated("one", second, "final", {}).repeated is False


def test_two_saves_at_once_are_both_kept_and_joined(store: SafeLocalDatastore, studies: Path):
    files = {k: write_label(studies, f"at{k}", {k: LIVER}) for k in range(8)}
    errors: list[BaseException] = []

    def save(k: int) -> None:
        try:
            store.save_annotated("one", files[k], "final", {"slices": [k]}, f"user{k}")
        except BaseException as err:
            errors.append(err)

    threads = [threading.Thread(target=save, args=(k,)) for k in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert set(np.flatnonzero(read_final(studies)[5, 5]).tolist()) == set(range(8))
    assert len(store.annotations.list("one")) == 8
    assert store.annotations.verify() == []


def test_machine_made_labels_have_no_history_and_no_say(store: SafeLocalDatastore, studies: Path):
    label = write_label(studies, "a", {1: LIVER})
    store.save_label("one", str(label), "original", {"model": "progidiff"})
    assert (studies / "labels/original/one.nii.gz").read_bytes() == label.read_bytes()
    assert store.annotations.list() == []
    assert store.annotations.annotated_images() == {}
    store.remove_label("one", "original")
    assert store.get_labels_by_image_id("one") == {}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start as copies")
def test_a_second_server_on_the_folder_refuses_until_the_first_is_dead(studies: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "_held", {})
    read, write = os.pipe()
    first = os.fork()
    if not first:
        with contextlib.suppress(BaseException):
            open_store(studies, serves=True)
            os.write(write, b"open")
            time.sleep(600)
        os._exit(1)
    try:
        assert os.read(read, 4) == b"open"
        with pytest.raises(BusyError, match="Another server is running on"):
            open_store(studies, serves=True)
        assert open_store(studies).list_images() == ["one", "two"]  # A process of the first server may look.
    finally:
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert open_store(studies, serves=True).list_images() == ["one", "two"]
    assert open_store(studies, serves=True).list_images() == ["one", "two"]  # A reload of the app.
    module._held[str(studies.resolve())].release()


def test_an_annotation_store_without_a_datastore_still_sees_labels_made_elsewhere(tmp_path: Path):
    final = tmp_path / "labels/final"
    final.mkdir(parents=True)
    (final / "x.nii.gz").write_bytes(b"label")
    store = AnnotationStore(tmp_path / "annotations", final)
    assert store.annotated_images() == {"x": None}
    assert store.annotated_slices("x") is None
    assert store.annotated_slices("y") == frozenset()


def test_files_that_are_only_read_do_not_keep_the_watcher_busy(studies: Path, monkeypatch: pytest.MonkeyPatch):
    state = studies / ".progidiff"
    monkeypatch.setattr(module, "_claim", lambda folder: None)  # it belongs to the process and not to a test
    watching = SafeLocalDatastore(
        str(studies), state, open_annotations(state, str(studies)), serves=True, auto_reload=True
    )
    watching._observer.stop()
    watching._observer.join(20)
    matched: list[str] = []
    handled: list[str] = []
    is_included = watching._handler.is_included
    monkeypatch.setattr(watching._handler, "is_included", lambda path: matched.append(path) or is_included(path))
    for name in ("created", "deleted", "modified", "moved"):
        monkeypatch.setattr(watching._handler, f"on_{name}", lambda event: handled.append(event.event_type))
    image, score = str(studies / "one.nii.gz"), str(state / "scores" / "base@1" / "one.safetensors")
    for file in (image, score):
        for read in (FileOpenedEvent(file), FileClosedNoWriteEvent(file), FileClosedEvent(file)):
            watching._handler.dispatch(read)
    assert (matched, handled) == ([], [])
    for change in (FileCreatedEvent, FileDeletedEvent, FileModifiedEvent):
        watching._handler.dispatch(change(image))
    watching._handler.dispatch(FileMovedEvent(score, image))
    assert handled == ["created", "deleted", "modified", "moved"]


def test_every_spelling_of_a_suffix_is_served_and_what_is_not_is_named(studies: Path, caplog: pytest.LogCaptureFixture):
    image = studies / "one.nii.gz"
    shutil.copy(image, studies / "UPPER.NII.GZ")
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(studies / "IMG.JPG", format="JPEG")
    with gzip.open(image) as packed:
        (studies / "one.nii").write_bytes(packed.read())
    (studies / "clinic").mkdir()
    shutil.copy(image, studies / "clinic" / "deep.nii.gz")
    shutil.copy(image, studies / "other.mha")
    for name in ("notes.txt", "one.json", "text.csv", ".hidden.nii"):
        (studies / name).write_text("{}")
    (studies / "series").mkdir()
    (studies / "series" / "IM0001").write_bytes(bytes(128) + b"DICM")
    state = studies / ".progidiff"
    with caplog.at_level("WARNING"):
        store = SafeLocalDatastore(
            str(studies),
            state,
            open_annotations(state, str(studies)),
            extensions=["*.nii.gz", "*.nii", "*.jpg"],
        )
    assert sorted(store.list_images()) == ["IMG", "UPPER", "one", "two"]
    assert Path(store.get_image_uri("UPPER")).name == "UPPER.NII.GZ"
    assert read_grid(store.get_image_uri("UPPER")).shape == SHAPE
    assert read_grid(store.get_image_uri("IMG")).shape == (9, 8, 1)
    labels = np.zeros(SHAPE, np.uint8)
    labels[3:9, 4:8, 2] = LIVER
    saved = store.save_annotated(
        "UPPER", save_array(labels, read_grid(image).affine, studies.parent / "l.nii"), "final", {}
    )
    assert saved.label_id == "UPPER"
    reasons = {entry.name: entry.reason for entry in store.left_out}
    assert set(reasons) == {"clinic/", "one.nii.gz", "other.mha", "series/"}
    assert "'one.nii' has the same name" in reasons["one.nii.gz"]
    assert "deep.nii.gz" in reasons["clinic/"]
    assert "Move them" in reasons["clinic/"]
    assert ".mha" in reasons["other.mha"]
    assert "DICOM" in reasons["series/"]
    for name in reasons:
        assert f"Not served: '{name}'" in caplog.text
    caplog.clear()
    store.refresh()
    assert "Not served" not in caplog.text


def save_in_thread(store: SafeLocalDatastore, *arguments: Any) -> tuple[threading.Thread, list[Any]]:
    """A save of its own thread, and where its result or error will be."""
    outcome: list[Any] = []

    def save() -> None:
        try:
            outcome.append(store.save_annotated(*arguments))
        except ProGiDiffError as err:
            outcome.append(err)

    thread = threading.Thread(target=save, daemon=True)
    thread.start()
    return thread, outcome


class Gate:
    """Stands before a function and lets its first call through only when it is opened."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.reached, self.opened = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if not self.reached.is_set():
            self.reached.set()
            assert self.opened.wait(60)
        return self.function(*arguments, **options)


def test_a_label_that_takes_for_ever_to_read_keeps_nobody_from_saving(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(module.open_label)
    monkeypatch.setattr(module, "open_label", gate)
    thread, outcome = save_in_thread(store, "one", write_label(studies, "slow", {1: LIVER}), "final", {})
    assert gate.reached.wait(30)
    for image in ("one", "two"):
        thread_2, outcome_2 = save_in_thread(
            store, image, write_label(studies, "fast", {2: SPLEEN}, image), "final", {}
        )
        thread_2.join(30)
        assert [saved.label_id for saved in outcome_2] == [image]
    assert store.undo("two") is None
    store.refresh()
    gate.opened.set()
    thread.join(30)
    assert outcome[0].label_id == "one"
    assert read_final(studies)[..., 1].any()


def test_joining_a_label_keeps_only_its_own_image_and_that_not_for_ever(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(module.prepare_label)
    monkeypatch.setattr(module, "prepare_label", gate)
    monkeypatch.setattr(store, "_images", ImageLocks(seconds=0.2))
    thread, outcome = save_in_thread(store, "one", write_label(studies, "slow", {1: LIVER}), "final", {})
    assert gate.reached.wait(30)
    fast = write_label(studies, "fast", {2: SPLEEN})
    with pytest.raises(BusyError, match="'one' has been saved for somebody else") as refused:
        store.save_annotated("one", fast, "final", {})
    assert refused.value.retry_after > 0
    assert store.save_annotated("two", write_label(studies, "two", {2: SPLEEN}, "two"), "final", {}).label_id == "two"
    gate.opened.set()
    thread.join(30)
    assert outcome[0].label_id == "one"
    assert store.save_annotated("one", fast, "final", {}).label_id == "one"
    assert not store._images._locks


def test_a_change_of_the_datastore_that_hangs_is_said_and_not_waited_for(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_LOCK_SECONDS", 0.2)
    gate = Gate(module.record_ready)
    monkeypatch.setattr(module, "record_ready", gate)
    thread, outcome = save_in_thread(store, "one", write_label(studies, "slow", {1: LIVER}), "final", {})
    assert gate.reached.wait(30)
    with pytest.raises(BusyError, match="has been going on"):
        store.save_annotated("two", write_label(studies, "two", {2: SPLEEN}, "two"), "final", {})
    gate.opened.set()
    thread.join(30)
    assert outcome[0].label_id == "one"


def test_a_label_that_another_process_saves_meanwhile_is_joined_with_and_not_lost(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    other = open_store(studies)
    theirs = write_label(studies, "theirs", {2: SPLEEN})
    prepare, calls = module.prepare_label, iter(range(9))

    def interrupted(*arguments: Any) -> Any:
        ready = prepare(*arguments)
        if next(calls) == 0:
            other.save_annotated("one", theirs, "final", {"slices": [2]})
        return ready

    monkeypatch.setattr(module, "prepare_label", interrupted)
    saved = store.save_annotated("one", write_label(studies, "ours", {1: LIVER}), "final", {"slices": [1]})
    assert not saved.repeated
    assert {z for z in range(SHAPE[2]) if read_final(studies)[..., z].any()} == {1, 2}
    assert len(store.annotations.list("one")) == 2
    assert store.annotations.verify() == []


def test_links_out_of_the_studies_folder_and_devices_are_left_out_with_the_reason(
    store: SafeLocalDatastore, studies: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    outside = tmp_path / "outside"
    outside.mkdir()
    write_phantom(outside / "secret.nii.gz", shape=SHAPE)
    (studies / "out.nii.gz").symlink_to(outside / "secret.nii.gz")
    (studies / "device.nii.gz").symlink_to("/dev/zero")
    (studies / "key.nii.gz").symlink_to(studies / ".progidiff" / "key")
    (studies / "inside.nii.gz").symlink_to("one.nii.gz")
    os.mkfifo(studies / "pipe.nii.gz")
    (studies / "labels" / "other").symlink_to(outside)
    store.refresh()
    assert sorted(store.list_images()) == ["inside", "one", "two"]
    assert store._object("one").labels == {}
    assert "'out.nii.gz' is a link to something outside" in caplog.text
    label = write_label(studies, "label", {1: LIVER})
    for image, reason in {
        "out": "not followed. Copy",
        "device": "not followed",
        "key": "not followed",
        "pipe": "is a device, pipe",
    }.items():
        with pytest.raises(ImageError, match=reason):
            store.save_annotated(image, label, "final", {})
        assert reason.split(".")[0] in (store.explain_absence(image) or "")
    assert store.explain_absence("nobody") is None
    reasons = {entry.name: entry.reason for entry in store.left_out}
    assert set(reasons) == {"device.nii.gz", "key.nii.gz", "out.nii.gz", "pipe.nii.gz"}
    for name, reason in reasons.items():
        assert f"'{name}' is a " in reason
        assert "other formats" not in reason
    (studies / "out.nii.gz").unlink()
    with pytest.raises(NotFoundError):
        store.save_annotated("out", label, "final", {})


def test_a_name_that_no_address_holds_is_left_out_with_the_reason_and_any_other_is_served(
    store: SafeLocalDatastore, studies: Path
):
    # As archives made on Windows unpack, and what people type.
    for name in ("folder\\scan.nii.gz", "new\nline.nii.gz", "full\u3000width.nii.gz", "narrow\u00a0space.nii.gz"):
        shutil.copyfile(studies / "one.nii.gz", studies / name)
    long = "ä" * 100
    shutil.copyfile(studies / "one.nii.gz", studies / f"{long}.nii.gz")
    store.refresh()
    assert set(store.list_images()) == {"one", "two", "full\u3000width", "narrow\u00a0space", long}
    reasons = [entry.reason for entry in store.left_out]
    assert len(reasons) == 2
    assert reasons[0].startswith("'folder_scan.nii.gz' has a backslash or a control character in its name")
    for image in (long, long[:-1] + "ö", "full\u3000width"):
        (studies / f"{image}.nii.gz").write_bytes((studies / "one.nii.gz").read_bytes())
        store.refresh()
        store.save_annotated(image, write_label(studies, "label", {1: LIVER}), "final", {})
    files = {store.annotations.label_file(store.annotations.list(image)[0]) for image in (long, long[:-1] + "ö")}
    assert len(files) == 2
    assert store.annotations.verify() == []


def test_an_image_that_becomes_a_link_is_not_followed_before_the_next_look_at_the_folder_either(
    store: SafeLocalDatastore, studies: Path, tmp_path: Path
):
    label = write_label(studies, "label", {1: LIVER})
    store.save_annotated("one", label, "final", {})
    outside = tmp_path / "outside.nii.gz"
    for path in (studies / "one.nii.gz", studies / "labels/final/one.nii.gz"):
        shutil.copyfile(path, outside)
        path.unlink()
        path.symlink_to(outside)
    with pytest.raises(ImageError, match="not followed"):
        store.get_image_uri("one")
    with pytest.raises(ImageError, match="not followed"):
        store.get_label_uri("one", "final")
    with pytest.raises(ImageError, match="not followed"):
        store.save_annotated("one", label, "final", {})
    write_phantom(studies / "new.nii.gz", shape=SHAPE)
    os.replace(studies / "new.nii.gz", studies / "one.nii.gz")
    store.save_annotated("one", label, "final", {})
    assert not (studies / "labels/final/one.nii.gz").is_symlink()
    assert outside.exists()


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_label_that_becomes_a_pipe_or_a_device_stops_no_save(store: SafeLocalDatastore, studies: Path, kind: str):
    store.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    path = studies / "labels/final/one.nii.gz"
    path.unlink()
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    thread, outcome = save_in_thread(store, "one", write_label(studies, "b", {2: SPLEEN}), "final", {})
    thread.join(30)
    assert outcome[0].label_id == "one"
    assert path.is_file()
    assert not path.is_symlink()
    assert module.hash_file(path) == store.annotations.list("one")[-1].sha256


def test_a_segment_without_a_name_is_renamed_and_the_rename_can_be_undone(store: SafeLocalDatastore, studies: Path):
    store.save_annotated("one", write_label(studies, "a", {2: LIVER}), "final", {"slices": [2]})
    info = {"label_info": [{"name": "Segment_1", "idx": 1}], "slices": [5, 6], "structures": ["Segment_1"]}
    saved = store.save_annotated("one", write_label(studies, "b", {5: 1}), "final", info)
    assert "'Segment_1' has no name" in saved.warnings[0]
    label = store.rename_structure("one", "segment_1", "Spleen", "ann")
    assert (label.structures, label.slices, label.user, label.client) == (("spleen",), (5, 6), "ann", "rename")
    assert dict(label.label_ids) == {"liver": LIVER, "spleen": SPLEEN}
    final = read_final(studies)
    assert {k: int(final[5, 5, k]) for k in range(8) if final[5, 5, k]} == {2: LIVER, 5: SPLEEN}
    assert store.annotations.annotated_slices("one") == {2, 5, 6}
    assert [len(save.structures) for save in store.annotations.in_force("one")] == [1, 1, 1]
    store.undo("one")
    assert set(np.unique(read_final(studies))) == {0, LIVER, 14}


@pytest.mark.parametrize(
    ("image", "old", "new", "error", "message"),
    [
        ("one", "aorta", "spleen", NotFoundError, "has no structure 'aorta'; it has liver"),
        ("one", "liver", "Segment_2", RequestError, "does not say what is drawn"),
        ("one", "liver", " ", RequestError, "is named by"),
        ("two", "liver", "spleen", NotFoundError, "no saved label"),
        ("three", "liver", "spleen", NotFoundError, "no image"),
    ],
)
def test_a_rename_that_makes_no_sense_is_refused(
    store: SafeLocalDatastore, studies: Path, image: str, old: str, new: str, error: type[ProGiDiffError], message: str
):
    store.save_annotated("one", write_label(studies, "a", {2: LIVER}), "final", {})
    with pytest.raises(error, match=message):
        store.rename_structure(image, old, new)
    assert len(store.annotations.list()) == 1


def test_a_file_put_into_the_folder_names_its_own_ids(store: SafeLocalDatastore, studies: Path):
    affine = nibabel.load(studies / "one.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 3] = 2
    final = studies / "labels" / "final"
    final.mkdir(parents=True, exist_ok=True)
    write_seg_nrrd(final / "one.nrrd", array, [("spleen", 1), ("liver", 2)], affine)
    store.refresh()
    store.save_annotated("one", write_label(studies, "a", {6: SPLEEN}), "final", {"slices": [6]})
    assert {k: int(read_final(studies)[5, 5, k]) for k in (3, 6)} == {3: LIVER, 6: SPLEEN}
    assert dict(store.annotations.list("one")[0].label_ids) == {"spleen": 1, "liver": 2}


def test_two_segments_of_one_name_are_one_structure_also_when_they_are_joined(store: SafeLocalDatastore, studies: Path):
    affine = nibabel.load(studies / "one.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 3], array[4:7, 4:7, 4] = 1, 2
    final = studies / "labels" / "final"
    final.mkdir(parents=True, exist_ok=True)
    write_seg_nrrd(final / "one.nrrd", array, [("liver", 1), ("Liver", 2)], affine)
    store.refresh()
    store.save_annotated("one", write_label(studies, "a", {6: SPLEEN}), "final", {"slices": [6]})
    assert {k: int(read_final(studies)[5, 5, k]) for k in (3, 4, 6)} == {3: LIVER, 4: LIVER, 6: SPLEEN}


def test_a_file_that_contradicts_itself_can_be_replaced(store: SafeLocalDatastore, studies: Path):
    affine = nibabel.load(studies / "one.nii.gz").affine
    array = np.zeros(SHAPE, np.uint8)
    array[4:7, 4:7, 3] = 1
    final = studies / "labels" / "final"
    final.mkdir(parents=True, exist_ok=True)
    write_seg_nrrd(final / "one.nrrd", array, [("liver", 1)], affine, ["SCT^78961009^Spleen~^^"])
    store.refresh()
    with pytest.raises(ImageError, match="cannot be joined with this one"):
        store.save_annotated("one", write_label(studies, "a", {6: SPLEEN}), "final", {"slices": [6]})
    store.save_annotated("one", write_label(studies, "b", {6: SPLEEN}), "final", {})
    assert set(np.unique(read_final(studies))) == {0, SPLEEN}
