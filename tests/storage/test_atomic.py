"""Files and folders by rename, and what killed processes leave."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from progidiff.errors import BusyError, StoreError
from progidiff.storage.atomic import (
    WRITING,
    atomic_file,
    atomic_folder,
    locked,
    make_scratch_name,
    remove_leftovers,
    remove_scratch_folders,
    replace_bytes,
    replace_text,
    scratch_folder,
)


def test_a_file_is_the_old_one_until_the_block_ends(tmp_path: Path):
    path = tmp_path / "x.json"
    replace_text(path, "old")
    with atomic_file(path) as scratch:
        scratch.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
    assert path.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_an_exception_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "x.json"
    replace_text(path, "old")
    with pytest.raises(ZeroDivisionError, match="here"), atomic_file(path) as scratch:
        scratch.write_text("new", encoding="utf-8")
        raise ZeroDivisionError("here")
    assert (path.read_text(encoding="utf-8"), os.listdir(tmp_path)) == ("old", ["x.json"])


def test_a_private_file_is_private_before_it_has_content(tmp_path: Path):
    with atomic_file(tmp_path / "key", mode=0o600) as scratch:
        assert scratch.stat().st_mode & 0o777 == 0o600
    replace_bytes(tmp_path / "key", b"x", mode=0o600)
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600


def test_a_folder_replaces_one_that_holds_something_and_may_keep_it(tmp_path: Path):
    for content in ("one", "two", "three"):
        with atomic_folder(tmp_path / "x", existing="replace", previous=tmp_path / ".x.previous") as scratch:
            (scratch / "inner").mkdir()
            (scratch / "inner" / "file").write_text(content, encoding="utf-8")
    assert (tmp_path / "x" / "inner" / "file").read_text(encoding="utf-8") == "three"
    assert (tmp_path / ".x.previous" / "inner" / "file").read_text(encoding="utf-8") == "two"
    with atomic_folder(tmp_path / "x", existing="keep"):
        pass
    assert (tmp_path / "x" / "inner" / "file").read_text(encoding="utf-8") == "three"
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x" / "inner" / "file").read_text(encoding="utf-8") == "three"
    with atomic_folder(tmp_path / "x", existing="replace"):
        pass
    assert (sorted(os.listdir(tmp_path)), os.listdir(tmp_path / "x")) == ([".x.previous", "x"], [])


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("old", encoding="utf-8")
    real = os.replace

    def refuse(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if Path(target).name == "x" and (Path(source) / "file").read_text(encoding="utf-8") == "new":
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "x", existing="replace") as scratch:
        (scratch / "file").write_text("new", encoding="utf-8")
    assert (tmp_path / "x" / "file").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to know whether a process is alive")
def test_what_dead_processes_left_is_removed_at_once_and_what_is_being_written_is_not(tmp_path: Path):
    code = (
        "import os, pathlib, sys; from progidiff.storage.atomic import make_scratch_name as name; "
        "root = pathlib.Path(sys.argv[1]); (root / name()).write_text('half'); folder = root / name(); "
        "folder.mkdir(); (folder / 'x').write_text('half'); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    mine = tmp_path / make_scratch_name()
    mine.write_text("half", encoding="utf-8")
    os.utime(mine, (time.time() - 7200,) * 2)
    (tmp_path / f"{WRITING}of-an-older-version").write_text("half", encoding="utf-8")
    stale = tmp_path / f"{WRITING}0123abcd.1.1-0123456789ab"
    stale.write_text("half", encoding="utf-8")
    os.utime(stale, (time.time() - 7200,) * 2)
    (tmp_path / "other").mkdir()
    (tmp_path / f"{WRITING}link").symlink_to(tmp_path / "other")
    assert len(list(tmp_path.iterdir())) == 7
    assert remove_leftovers(tmp_path) == 3
    assert sorted(os.listdir(tmp_path)) == sorted(
        [mine.name, f"{WRITING}of-an-older-version", f"{WRITING}link", "other"]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc to know whether a process is alive")
def test_temporary_folders_of_dead_processes_go_and_nothing_else_that_is_called_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code = (
        "import os, sys, tempfile; tempfile.tempdir = sys.argv[1]; "
        "from progidiff.storage.atomic import scratch_folder; folder = scratch_folder('label'); "
        "folder.__enter__(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    kept = [tmp_path / "progidiff-label-x1y2z3", tmp_path / "progidiff-my-cases"]
    for folder in kept:
        folder.mkdir()
        os.utime(folder, (time.time() - 7200,) * 2)
    with scratch_folder("label") as mine:
        assert mine.stat().st_mode & 0o777 == 0o700
        assert len(os.listdir(tmp_path)) == 4
        assert remove_scratch_folders() == 1
        assert sorted(tmp_path.iterdir()) == sorted([mine, *kept])
    assert not mine.exists()


def test_a_lock_that_is_held_is_a_refusal_with_a_time_to_wait(tmp_path: Path):
    with (
        locked(tmp_path / "deep" / ".lock", "Somebody has been writing"),
        pytest.raises(BusyError, match=r"Somebody has been writing for 0 s\. Try again"),
        locked(tmp_path / "deep" / ".lock", "Somebody has been writing", seconds=0.05),
    ):
        pass
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(StoreError, match="cannot be locked"), locked(tmp_path / "file" / ".lock", "x"):
        pass
