"""What a disk refuses, a kill cuts off, or somebody does to the folders: history and folder agree, nothing that was
acknowledged is lost, and nothing that was refused counts.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monailabel.datastore.local import LocalDatastore

from progidiff.errors import ConflictError, StoreError
from progidiff.images.reading import read_grid
from progidiff.images.writing import save_array
from progidiff.server.datastores import local as module
from progidiff.server.datastores.index import DatastoreIndex
from progidiff.server.datastores.local import SafeLocalDatastore
from progidiff.storage.json_text import write_json
from progidiff.storage.state_files import list_damage
from support.local_store import LIVER, SHAPE, SPLEEN, make_studies, open_as_server, open_store, read_final, write_label

Change = Callable[[SafeLocalDatastore, Path], object]


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return make_studies(tmp_path / "studies")


@pytest.fixture
def store(studies: Path) -> SafeLocalDatastore:
    """With two saves of one image."""
    opened = open_as_server(studies)
    opened.save_annotated("one", write_label(studies, "a", {1: LIVER}), "final", {})
    opened.save_annotated("one", write_label(studies, "b", {2: LIVER}), "final", {})
    return opened


CHANGES: dict[str, Change] = {
    "save": lambda store, studies: store.save_annotated("one", write_label(studies, "c", {3: SPLEEN}), "final", {}),
    "undo": lambda store, studies: store.undo("one"),
    "restore": lambda store, studies: store.restore("one", 1),
    "delete": lambda store, studies: store.remove_label("one", "final"),
}


def final_of(studies: Path, image: str = "one") -> bytes | None:
    path = studies / "labels" / "final" / f"{image}.nii.gz"
    return path.read_bytes() if path.exists() else None


def kept_of(store: SafeLocalDatastore, image: str = "one") -> bytes | None:
    current = store.annotations.current(image)
    return None if current is None else store.annotations.label_file(current).read_bytes()


def check_agreement(studies: Path) -> SafeLocalDatastore:
    """Open the folder as the next server does, and compare."""
    again = open_as_server(studies)
    for image in ("one", "two"):
        assert final_of(studies, image) == kept_of(again, image)
        assert ("final" in again.get_labels_by_image_id(image)) == (kept_of(again, image) is not None)
    assert again.annotations.verify() == []
    assert again.annotations.find_losses() == []
    return again


def refuse(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def refuse_final(real: Callable[..., Any]) -> Callable[..., Any]:
    """Only what changes the folder of final labels itself."""

    def wrapper(*arguments: Any, **options: Any) -> Any:
        target = Path(arguments[1] if len(arguments) > 1 else arguments[0])
        return (
            refuse() if target.name == "one.nii.gz" and target.parent.name == "final" else real(*arguments, **options)
        )

    return wrapper


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("where", ["copy", "log", "place"])
def test_a_refused_change_has_changed_nothing(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch, change: str, where: str
):
    before = final_of(studies)
    with monkeypatch.context() as patch:
        if where == "copy":
            patch.setattr(module.shutil, "copyfile", refuse)
        elif where == "log":
            patch.setattr("progidiff.labels.history.os.write", refuse)
        else:
            patch.setattr(os, "replace", refuse_final(os.replace))
            patch.setattr(Path, "unlink", refuse_final(Path.unlink))
        if (change, where) == ("delete", "copy"):
            CHANGES[change](store, studies)  # Needs no copy.
            return
        with pytest.raises(StoreError, match=r"could not be (written|removed|kept)"):
            CHANGES[change](store, studies)
    assert final_of(studies) == before == kept_of(store)
    assert list((studies / "labels" / "final").iterdir()) == [studies / "labels" / "final" / "one.nii.gz"]
    again = check_agreement(studies)
    assert final_of(studies) == before
    versions = len(again.annotations.list("one"))
    CHANGES[change](again, studies)
    assert final_of(studies) != before
    assert len(again.annotations.list("one")) == versions + (change == "save")
    check_agreement(studies)


def test_a_file_in_the_place_of_the_folder_is_a_refusal_that_says_so(store: SafeLocalDatastore, studies: Path):
    folder = studies / "labels" / "extra"
    folder.write_text("no folder")
    with pytest.raises(StoreError, match="could not be written"):
        store.save_annotated("two", write_label(studies, "d", {1: LIVER}, "two"), "extra", {})
    assert store.annotations.list("two") == []
    check_agreement(studies)


@pytest.mark.parametrize("change", CHANGES)
def test_what_could_not_be_taken_back_either_is_finished_before_somebody_reads_it(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    before = final_of(studies)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse_final(os.replace))
        patch.setattr(Path, "unlink", refuse_final(Path.unlink))
        patch.setattr(store.annotations, "take_back", lambda *_: (_ for _ in ()).throw(StoreError("full")))
        with pytest.raises(StoreError, match="it will count when the disk takes it"):
            CHANGES[change](store, studies)
        assert store.datalist() != []
        assert final_of(studies) == before != kept_of(store)
    store.get_label_uri("one", "final")
    assert final_of(studies) == kept_of(store) != before
    check_agreement(studies)


def test_an_index_that_is_full_refuses_no_label_and_catches_up(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        patch.setattr(DatastoreIndex, "save", lambda *_: (_ for _ in ()).throw(StoreError("full")))
        saved = CHANGES["save"](store, studies)
        with pytest.raises(StoreError, match="full"):
            store.update_image_info("two", {"note": "lost"})
    assert "note" not in store.get_image_info("two")
    assert store.get_label_info("one", "final")["annotation"] == saved.annotation.sequence
    store.update_image_info("two", {"note": "kept"})
    again = open_store(studies)
    assert again.get_label_info("one", "final")["annotation"] == saved.annotation.sequence
    assert again.get_image_info("two")["note"] == "kept"
    check_agreement(studies)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root on Linux")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_at_any_byte_never_lets_a_refused_save_count(small_disk: Path, tmp_path: Path):
    studies = make_studies(small_disk / "studies")
    store = open_as_server(studies)
    files = [shutil.move(write_label(studies, f"x{k}", {k: LIVER}), tmp_path) for k in range(1, 6)]
    acknowledged = store.save_annotated("one", files[0], "final", {}).annotation.sequence
    filler = small_disk / "filler"
    refused = 0
    for number, blocks in enumerate((0, 1, 2, 3, 4, 5, 6, 8, 10, 14)):
        space = os.statvfs(small_disk)
        filler.write_bytes(bytes(max(0, space.f_bavail - blocks) * space.f_bsize))
        try:
            acknowledged = store.save_annotated("one", files[1 + number % 4], "final", {}).annotation.sequence
        except StoreError:
            refused += 1
        current = store.annotations.current("one")
        assert current is not None
        assert current.sequence == acknowledged
        assert final_of(studies) == kept_of(store)
        filler.unlink()
    assert refused
    check_agreement(studies)


def change_and_crash(studies: Path, change: str, step: int) -> bool:
    """Change in a child process that ends before or within its n-th step on the disk; whether it came to its end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        store = open_store(studies)
        steps = iter(range(1, 10**6))

        def counted(function: Any) -> Any:
            def wrapper(*arguments: Any, **options: Any) -> Any:
                if next(steps) == step:
                    os._exit(9)
                return function(*arguments, **options)

            return wrapper

        places = ((os, "replace"), (os, "write"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (shutil, "copyfile"))
        for owner, name in (*places, (Path, "unlink"), (Path, "mkdir"), (DatastoreIndex, "save")):
            setattr(owner, name, counted(getattr(owner, name)))
        CHANGES[change](store, studies)
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that start as copies")
@pytest.mark.parametrize("change", ["save", *(pytest.param(name, marks=pytest.mark.slow) for name in [*CHANGES][1:])])
def test_a_kill_between_any_two_steps_leaves_the_state_before_or_after(
    store: SafeLocalDatastore, studies: Path, monkeypatch: pytest.MonkeyPatch, change: str
):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # A kill is no power cut.
    store.save_annotated("two", write_label(studies, "t", {1: LIVER}, "two"), "final", {})
    CHANGES["save"](store, studies)  # Makes the file that the child sends, too.
    store.undo("one")
    before, first = final_of(studies), store.annotations.label_file(store.annotations.get("one", 1)).read_bytes()
    pristine = studies.with_name("pristine")
    shutil.copytree(studies, pristine)
    outcomes: list[bytes | None] = []
    is_done = False
    while not is_done:
        shutil.rmtree(studies)
        shutil.copytree(pristine, studies)
        is_done = change_and_crash(studies, change, len(outcomes) + 1)
        # Another image is saved before the next start: not the last event alone may be half done.
        open_store(studies).undo("two")
        again = check_agreement(studies)
        outcomes.append(final_of(studies))
        assert again.annotations.label_file(again.annotations.get("one", 1)).read_bytes() == first
        if change == "save":
            assert CHANGES["save"](again, studies).repeated is (outcomes[-1] != before)
        assert not list((studies / "labels").rglob(".writing-*"))
    after = outcomes[-1]
    assert after != before
    assert outcomes[0] == before
    assert len(outcomes) > 10
    assert set(outcomes) == {before, after}
    assert sorted(outcomes, key=lambda found: found == after) == outcomes  # First the old one, then the new one.


def test_a_label_that_is_put_back_or_replaced_after_it_was_taken_out_counts(store: SafeLocalDatastore, studies: Path):
    path = studies / "labels" / "final" / "one.nii.gz"
    content = path.read_bytes()
    for others in (content, write_label(studies, "x", {5: SPLEEN}).read_bytes(), content):
        path.unlink()
        store.refresh()
        assert store.annotations.annotated_images() == {}
        assert store.get_labeled_images() == []
        path.write_bytes(others)
        store.refresh()
        assert store.annotations.annotated_images() == {"one": None}
        assert store.get_labeled_images() == ["one"]
        assert kept_of(store) == others
    check_agreement(studies)


@pytest.mark.parametrize("suffix", [".seg.nrrd", ".SEG.NRRD", ".NII.GZ", ".mha"])
def test_a_label_under_another_suffix_is_not_taken_out(store: SafeLocalDatastore, studies: Path, suffix: str):
    final = studies / "labels" / "final"
    (final / "one.nii.gz").unlink()
    if suffix == ".NII.GZ":
        shutil.copy(write_label(studies, "x", {5: SPLEEN}), final / "one.NII.GZ")
    else:
        grid = read_grid(studies / "one.nii.gz")
        array = np.zeros(SHAPE, np.uint8)
        array[4:7, 4:7, 5] = SPLEEN
        shutil.copy(
            save_array(array, grid.affine, studies.parent / f"made{suffix.lower()[suffix.rindex('.') :]}"),
            final / f"one{suffix}",
        )
    store.refresh()
    assert store.get_labeled_images() == ["one"]
    assert store.annotations.annotated_images() == {"one": None}
    assert [event.kind for event in store.annotations.events("one")] == ["label"] * 3
    assert Path(store.get_label_uri("one", "final")).name == f"one{suffix}"
    store.save_annotated("one", write_label(studies, "y", {6: LIVER}), "final", {})
    assert sorted(path.name for path in final.iterdir()) == ["one.nii.gz"]
    check_agreement(studies)


def test_a_label_that_was_cut_off_is_noticed_and_gives_way_to_the_one_in_force(
    store: SafeLocalDatastore, studies: Path
):
    path = studies / "labels" / "final" / "one.nii.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    again = open_as_server(studies)
    assert path.read_bytes() == whole
    assert [event.kind for event in again.annotations.events("one")] == ["label"] * 2
    damage = next(damage for damage in reversed(list_damage()) if damage.file == str(path))
    assert "is in its place again" in damage.meaning
    assert (studies / ".progidiff" / "trash" / damage.kept_as).read_bytes() == whole[: len(whole) // 2]


def test_a_lost_log_is_said_at_the_next_start(store: SafeLocalDatastore, studies: Path):
    (store.annotations.root / "log.jsonl").write_bytes(b"")
    open_as_server(studies)
    assert any("it went to event 2 and ends with 0" in damage.problem for damage in list_damage())


def test_text_that_no_answer_can_hold_never_reaches_the_list(store: SafeLocalDatastore, studies: Path):
    store.update_image_info("one", {"note": "a\ud800", "score": float("nan"), "when": Path("x")})
    assert store.get_image_info("one")["note"] == "a\ufffd"
    store.write_host_file()
    again = open_store(studies)
    assert {key: again.get_image_info("one")[key] for key in ("note", "score", "when")} == {
        "note": "a\ufffd",
        "score": None,
        "when": "x",
    }
    write_json(again.get_image_info("one"))


def test_a_list_of_an_older_version_that_holds_such_text_is_mended_and_loses_nothing(studies: Path):
    objects = {"one": {"image": {"ext": ".nii.gz", "info": {"note": "a\ud800", "other": "kept"}}, "labels": {}}}
    text = json.dumps({"name": "n", "description": "d", "objects": objects})
    for name in ("datastore_v2.json", "datastore_v2.json.bak"):
        (studies / name).write_text(text, encoding="utf-8")
    opened = open_as_server(studies)
    assert (opened.get_image_info("one")["note"], opened.get_image_info("one")["other"]) == ("a\ufffd", "kept")
    assert opened.list_images() == ["one", "two"]


def test_a_name_that_is_not_text_is_left_out_with_a_warning(
    store: SafeLocalDatastore, studies: Path, caplog: pytest.LogCaptureFixture
):
    name = os.fsdecode(b"caf\xe9.nii.gz")
    try:
        shutil.copy(studies / "two.nii.gz", studies / name)
    except OSError:
        pytest.skip("this disk takes no such name")
    shutil.copy(studies / "labels" / "final" / "one.nii.gz", studies / "labels" / "final" / name)
    store.refresh()
    assert store.list_images() == ["one", "two"]
    assert "has a name that is not UTF-8" in caplog.text
    assert set(store.annotations.annotated_images()) == {"one"}
    write_json(store.list_images())


def test_the_host_finds_its_list_as_it_is_at_the_end_and_an_older_version_is_believed(
    store: SafeLocalDatastore, studies: Path
):
    path = studies / "datastore_v2.json"
    written = path.read_bytes()
    store.update_image_info("one", {"note": "new"})
    assert path.read_bytes() == written  # A change writes its own rows.
    store.write_host_file_if_idle(idle_seconds=60)
    assert path.read_bytes() == written
    store.write_host_file_if_idle(idle_seconds=0)
    host = LocalDatastore(str(studies), extensions=("*.nii.gz",))
    assert host.get_image_info("one")["note"] == "new"
    assert host.get_labeled_images() == ["one"]
    store.update_image_info("one", {"other": "by us"})
    host.update_image_info("one", {"note": "by the host"})
    info = open_store(studies).get_image_info("one")
    assert (info["note"], info["other"]) == ("by the host", "by us")
    store.refresh()
    assert store.get_image_info("one")["note"] == "by the host"
    store.close()
    assert json.loads(path.read_bytes())["objects"]["one"]["image"]["info"]["other"] == "by us"


def test_what_was_changed_before_a_kill_is_known_without_the_hosts_list(store: SafeLocalDatastore, studies: Path):
    store.update_image_info("one", {"note": "kept"})
    (studies / "datastore_v2.json").unlink()
    (studies / "datastore_v2.json.bak").unlink(missing_ok=True)
    again = open_as_server(studies)
    assert again.get_image_info("one")["note"] == "kept"
    assert again.get_label_info("one", "final")["annotation"] == 2
    assert (studies / "datastore_v2.json").is_file()


def test_a_save_upon_an_older_label_than_the_one_in_force_is_a_conflict(store: SafeLocalDatastore, studies: Path):
    label = write_label(studies, "x", {3: SPLEEN})
    with pytest.raises(ConflictError, match=r"Save 2 of this image was made at .* Open the image again"):
        store.save_annotated("one", label, "final", {}, replaces=1)
    with pytest.raises(ConflictError, match="Save 2"):
        store.save_annotated("one", label, "final", {}, replaces=0)
    assert store.annotations.last_sequence() == 2
    assert store.save_annotated("one", label, "final", {}, replaces=2).annotation.sequence == 3
    store.remove_label("one", "final")
    with pytest.raises(ConflictError, match="was deleted meanwhile"):
        store.save_annotated("one", label, "final", {}, replaces=3)
    store.save_annotated("one", label, "final", {}, replaces=0)
    assert set(read_final(studies).ravel()) == {0, SPLEEN}
