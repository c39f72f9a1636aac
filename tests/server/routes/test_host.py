"""Uploaded images that wait for a while: names, folders, and what is cleaned up."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from monailabel.utils.sessions import Sessions

from progidiff.server.routes.host import _make_plain, _unwrap, remove_expired_sessions


@pytest.fixture
def app(tmp_path: Path) -> Any:
    sessions = Sessions(str(tmp_path / "sessions"), 3600)
    return SimpleNamespace(sessions=lambda: sessions)


def add(app: Any, tmp_path: Path, age: float) -> Path:
    image = tmp_path / "image.nii"
    image.write_bytes(b"x")
    session_id, info = app.sessions().add_session(str(image))
    meta = Path(info.path) / "meta.info"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "last_access_ts": int(time.time() - age)}))
    return Path(app.sessions().store_path) / session_id


def test_expired_sessions_go_also_those_of_an_earlier_run(app: Any, tmp_path: Path):
    old, young = add(app, tmp_path, 4000), add(app, tmp_path, 10)
    app.sessions().clear()  # What a restart remembers.
    assert remove_expired_sessions(app) == 1
    assert not old.exists()
    assert young.is_dir()


def test_a_session_that_was_never_finished_goes_with_time_and_a_broken_one_stops_nothing(app: Any, tmp_path: Path):
    root = tmp_path / "sessions"
    for name in ("half", "broken"):
        (root / name).mkdir(parents=True)
    (root / "broken" / "meta.info").write_text("{")
    old = add(app, tmp_path, 4000)
    app.sessions().clear()
    assert remove_expired_sessions(app) == 1
    assert not old.exists()
    assert (root / "half").is_dir()  # Young: perhaps it is being written.
    os.utime(root / "half", (1, 1))
    assert remove_expired_sessions(app) == 1
    assert (root / "broken").is_dir()


def test_without_sessions_there_is_nothing_to_do(tmp_path: Path):
    assert remove_expired_sessions(SimpleNamespace(sessions=lambda: None)) == 0
    assert remove_expired_sessions(SimpleNamespace(sessions=lambda: Sessions(str(tmp_path / "missing"), 3600))) == 0


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("scan.nii.gz", "scan.nii.gz"),
        ("../../evil.py", "evil.py"),
        ("C:\\images\\scan 1.nrrd", "scan_1.nrrd"),
        ("...", "image"),
        ("", "image"),
        (None, "image"),
        (".bashrc", "bashrc"),
        ("meta.info", "image"),
        ("a\0b\n.nii", "a_b_.nii"),
        ("x" * 300 + ".nii.gz", "x" * 93 + ".nii.gz"),
    ],
)
def test_names_of_uploads_are_plain_and_keep_their_suffix(sent: str | None, kept: str):
    assert _make_plain(sent, "image") == kept


@pytest.mark.parametrize(
    ("members", "name", "content"),
    [
        (["a.dcm", "b.dcm"], "image", ["a.dcm", "b.dcm"]),
        (["study/series/a.dcm", "study/series/b.dcm"], "unpacked", ["a.dcm", "b.dcm"]),
        (["scan 1.nii.gz"], "scan_1.nii.gz", None),
        (["folder/meta.info"], "file", None),
    ],
)
def test_the_folders_around_the_image_in_an_archive_are_left_out(
    members: list[str], name: str, content: list[str] | None, tmp_path: Path
):
    for member in members:
        (tmp_path / "image" / member).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "image" / member).write_bytes(b"x")
    inner = _unwrap(tmp_path / "image")
    assert inner.name == name
    assert (sorted(path.name for path in inner.iterdir()) if inner.is_dir() else None) == content
