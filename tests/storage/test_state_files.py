"""The loader of state files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from progidiff.storage.state_files import DamagedStateError, list_damage, load_state, read_state


def load(path: Path) -> dict[str, int]:
    return load_state(path, lambda content: {k: int(v) for k, v in json.loads(content).items()}, dict, "Count again.")


def test_a_missing_file_is_the_default_and_nothing_is_said(tmp_path: Path):
    before = list_damage()
    assert load(tmp_path / "x.json") == {}
    assert list_damage() == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b'{"a": []}', b'{"a": null}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_kept_beside_and_said_and_another_can_take_its_place(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert load(path) == {}
    (kept,) = os.listdir(tmp_path)
    assert kept.startswith("x.json.damaged-")
    assert (tmp_path / kept).read_bytes() == content
    found = list_damage()[-1]
    assert (found.file, found.kept_as, found.meaning) == (str(path), kept, "Count again.")
    assert "Count again." in caplog.text
    path.write_text('{"a": 1}', encoding="utf-8")
    assert load(path) == {"a": 1}


def test_a_file_that_cannot_be_read_stays_where_it_is_and_is_said_once(tmp_path: Path):
    (tmp_path / "x.json").mkdir()
    before = len(list_damage())
    assert load(tmp_path / "x.json") == load(tmp_path / "x.json") == {}
    assert os.listdir(tmp_path) == ["x.json"]
    assert len(list_damage()) == before + 1


def test_who_decides_for_himself_gets_the_reason(tmp_path: Path):
    (tmp_path / "x.json").write_bytes(b"{")
    with pytest.raises(DamagedStateError, match="Expecting property name"):
        read_state(tmp_path / "x.json", json.loads)
    assert os.listdir(tmp_path) == ["x.json"]
