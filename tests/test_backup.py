"""Backups: what is in them while labels are saved, and that nothing damaged or half is ever restored."""

from __future__ import annotations

import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from progidiff import backup
from progidiff.backup import MANIFEST, Places, create_backup, restore_backup
from progidiff.errors import RequestError, StoreError
from progidiff.labels.history import FINAL, AnnotationStore
from support.local_store import LIVER, make_studies, open_as_server, read_final, write_label


def save(studies: Path, slices: list[int], image: str = "one") -> None:
    label = write_label(studies, f"label{len(slices)}", dict.fromkeys(slices, LIVER), image)
    open_as_server(studies).save_label(image, str(label), FINAL, {"label_info": [{"name": "liver", "idx": LIVER}]})


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A server's folders with one label, kept proposals, scores, an adapter and users."""
    studies = make_studies(tmp_path / "studies")
    save(studies, [2, 3])
    (studies / "text.csv").write_text("image,text\none.png,Dense.\n")
    store = studies / ".progidiff"
    received = "incoming/refused/1/object.dcm"
    for name in (f"{'a' * 64}/entry.json", "scores/one.json", "training/work/big", "training/runs/1/log.txt", received):
        (store / name).parent.mkdir(parents=True, exist_ok=True)
        (store / name).write_text(name)
    (store / "reservations.json").write_text("{}")
    version = tmp_path / "adapters" / "mr" / "1"
    version.mkdir(parents=True)
    (version / "adapter.safetensors").write_bytes(b"weights")
    (version.parent / "CURRENT").write_text("1")
    strange = studies / "labels" / "scores"  # A tag that is called as a cache is.
    strange.mkdir()
    (strange / "one.nii.gz").write_bytes(b"a label")
    users = tmp_path / "users.json"
    users.write_text("{}")
    return Places(store, studies, {"adapters": tmp_path / "adapters", "secrets/users.json": users})


def put_back(restored: Path, studies: Path) -> None:
    """As the page tells: the images are where they were, the rest is moved to its places."""
    shutil.rmtree(studies / ".progidiff")
    shutil.rmtree(studies / "labels")
    for name in ("labels", "labels.json", "datastore_v2.json"):
        if (restored / "studies" / name).exists():
            (studies / name).unlink(missing_ok=True)
            (restored / "studies" / name).rename(studies / name)
    (restored / "store").rename(studies / ".progidiff")


def test_labels_history_versions_users_and_state_come_back_and_what_is_computed_again_does_not(
    places: Places, tmp_path: Path
):
    studies = places.studies
    assert studies is not None
    before = AnnotationStore(places.store / "annotations").events()
    archive = tmp_path / "backup.tar"
    manifest = create_backup(places, archive)
    assert archive.stat().st_mode & 0o777 == 0o600
    assert not list(places.store.glob(".writing-*"))
    names = set(manifest.files)
    assert not [name for name in names if "incoming" in name]
    assert {"adapters/mr/1/adapter.safetensors", "adapters/mr/CURRENT", "secrets/users.json"} <= names
    assert {"store/reservations.json", "store/training/runs/1/log.txt", "store/annotations/log.jsonl"} <= names
    assert "studies/text.csv" in names
    assert {"studies/labels/final/one.nii.gz", "studies/labels/scores/one.nii.gz"} <= names
    for word in ("aaaa", "store/scores", "work", "sqlite", ".lock"):
        assert not [name for name in names if word in name]
    save(studies, [5])
    restored = tmp_path / "restored"
    assert restore_backup(archive, restored).files == manifest.files
    put_back(restored, studies)
    opened = open_as_server(studies)
    assert opened.annotations.events() == before, "the server takes the label for its own"
    assert sorted(np.unique(np.nonzero(read_final(studies))[2])) == [2, 3]
    assert opened.annotations.verify() == []
    save(studies, [1])
    assert len(AnnotationStore(studies / ".progidiff" / "annotations").events()) == len(before) + 1


def test_labels_that_are_saved_during_a_backup_are_in_it_whole_or_not_at_all(places: Places, tmp_path: Path):
    studies = places.studies
    assert studies is not None
    ended, saved = threading.Event(), []

    def keep_saving() -> None:
        while not ended.is_set():
            save(studies, [len(saved) % 8], "two")
            saved.append(1)

    worker = threading.Thread(target=keep_saving)
    worker.start()
    try:
        for number in range(4):
            create_backup(places, tmp_path / f"{number}.tar")
    finally:
        ended.set()
        worker.join(60)
    assert saved
    for number in range(4):
        restored = tmp_path / f"restored{number}"
        restore_backup(tmp_path / f"{number}.tar", restored)  # It verifies the history.
        history = AnnotationStore(restored / "store" / "annotations")
        for image in ("one", "two"):
            current, file = history.current(image), restored / "studies" / "labels" / "final" / f"{image}.nii.gz"
            assert (current is not None) == file.is_file()
            assert current is None or file.read_bytes() == history.label_file(current).read_bytes()


def test_an_interrupted_restore_leaves_nothing_and_can_be_begun_again(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    archive, target = tmp_path / "backup.tar", tmp_path / "restored"
    create_backup(places, archive)
    write, count = backup._write, []

    def interrupt(*arguments: object) -> str:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backup, "_write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        restore_backup(archive, target)
    assert not target.exists()
    assert not list(tmp_path.glob(".writing-*"))
    monkeypatch.undo()
    restore_backup(archive, target)

    def refuse(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(backup, "_write", refuse)
    with pytest.raises(StoreError, match="No space left .* Free some disk space"):
        restore_backup(archive, tmp_path / "another")
    assert not (tmp_path / "another").exists()


def test_a_damaged_backup_is_refused_wherever_it_is_damaged(places: Places, tmp_path: Path):
    archive, target = tmp_path / "backup.tar", tmp_path / "restored"
    create_backup(places, archive)
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        offsets = [(entry.offset_data, entry.size) for entry in tar if entry.size]
    for offset, size in offsets:
        damaged = bytearray(whole)
        damaged[offset + size // 2] ^= 0x01
        archive.write_bytes(damaged)
        with pytest.raises(RequestError, match="damaged"):
            restore_backup(archive, target)
    for length in (0, 700, len(whole) // 2, offsets[-1][0] + 10):
        archive.write_bytes(whole[:length])
        with pytest.raises(RequestError, match="damaged|missing|no backup"):
            restore_backup(archive, target)
    assert not target.exists()


def test_what_is_no_backup_or_would_be_overwritten_is_refused(places: Places, tmp_path: Path):
    archive = tmp_path / "backup.tar"
    create_backup(places, archive)
    with pytest.raises(RequestError, match="exists"):
        create_backup(places, archive)
    full = tmp_path / "full"
    full.mkdir()
    (full / "a").touch()
    with pytest.raises(RequestError, match="not empty"):
        restore_backup(archive, full)
    with pytest.raises(RequestError, match="There is no '.*gone.tar'"):
        restore_backup(tmp_path / "gone.tar", tmp_path / "new")
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as tar:
        tar.add(archive, "../outside")
    with pytest.raises(RequestError, match="which no backup does"):
        restore_backup(evil, tmp_path / "new")
    assert not (tmp_path.parent / "outside").exists()
    with pytest.raises(RequestError, match="There is no"):
        create_backup(Places(tmp_path / "nowhere", None, {}), tmp_path / "b.tar")
    assert MANIFEST not in create_backup(places, tmp_path / "second.tar").files
