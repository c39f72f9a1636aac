"""Files by address: whole or not at all, whatever the place can do, and what is cut off is no image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.storage import addresses


@pytest.fixture
def memory() -> Iterator[Any]:
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def test_where_a_file_shows_while_it_is_written_it_is_renamed(memory: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(addresses, "_SINGLE_PUT", ())
    written: list[str] = []
    pipe = type(memory).pipe_file
    monkeypatch.setattr(
        type(memory), "pipe_file", lambda self, path, *rest: (written.append(path), pipe(self, path, *rest))
    )
    addresses.put_bytes("memory://folder/label.nii.gz", b"all of it")
    assert addresses.read_bytes("memory://folder/label.nii.gz") == b"all of it"
    assert [path.rpartition("/")[2].startswith(".writing-") for path in written] == [True]
    assert [file.name for file in addresses.find_files("memory://folder")] == ["label.nii.gz"]


def test_what_came_cut_off_is_tried_again_and_never_read(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    addresses.put_bytes("memory://scan.nii", b"0123456789")
    monkeypatch.setattr(type(memory), "get_file", lambda self, there, here: Path(here).write_bytes(b"01234"))
    with pytest.raises(OSError, match="5 of 10 bytes of '/scan.nii' came"):
        addresses.fetch("memory://scan.nii", tmp_path)


def test_a_stamp_changes_with_a_file_and_with_what_is_in_a_folder(tmp_path: Path):
    (tmp_path / "series").mkdir()
    (tmp_path / "series" / "1.dcm").write_bytes(b"1")
    before = addresses.describe(str(tmp_path / "series"))
    assert before[0]
    assert addresses.describe(str(tmp_path / "series")) == before
    (tmp_path / "series" / "2.dcm").write_bytes(b"2")
    assert addresses.describe(str(tmp_path / "series")) != before
    with pytest.raises(NotFoundError, match="nothing at"):
        addresses.describe(str(tmp_path / "none"))


def test_a_file_here_is_replaced_whole_and_a_place_that_refuses_is_named(tmp_path: Path):
    for content in (b"first", b"second"):
        addresses.put_bytes(f"file://{tmp_path}/a/b.txt", content)
    assert (tmp_path / "a" / "b.txt").read_bytes() == b"second"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.txt"]
    with pytest.raises(StoreError, match="cannot be written"):
        addresses.put_bytes(f"{tmp_path}/a/b.txt/c.txt", b"third")


def test_an_address_of_an_unknown_kind_is_refused():
    with pytest.raises(RequestError, match="'nosuch://x' cannot be reached from here"):
        addresses.open_address("nosuch://x")
