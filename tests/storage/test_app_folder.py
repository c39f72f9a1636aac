"""The app of an installed package is laid out where it can be written; an upgrade takes nothing that was trained."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from progidiff.errors import ModelError, StoreError
from progidiff.storage import app_folder
from progidiff.storage.app_folder import MANIFEST, find_app, find_home, lay_out_app

FIRST = {
    "main.py": "first",
    "web/review/index.html": "first",
    "web/review/gone.js": "first",
    "model/conditioning/branch.safetensors": "first",
    "model/adapters/mr/1/adapter.json": "shipped",
    "model/adapters/mr/1/adapter.safetensors": "shipped",
    "model/adapters/mr/CURRENT": "1",
    "model/adapters/mr/history.jsonl": "1",
}
SECOND = {
    **{name: "second" for name in FIRST if not name.startswith("model/adapters") and not name.endswith("gone.js")},
    "model/adapters/mr/2/adapter.json": "shipped too",
    "model/adapters/mr/CURRENT": "2",
    "model/adapters/mr/history.jsonl": "1 2",
}


def package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items()}
    (folder / MANIFEST).write_text(json.dumps(digests))
    return folder


def read(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, ".lock")
    }


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Path, Path]:
    return package(tmp_path / "first", FIRST), package(tmp_path / "second", SECOND)


def test_the_first_start_lays_everything_out_and_the_next_does_nothing(packages: tuple[Path, Path], tmp_path: Path):
    assert lay_out_app(packages[0], tmp_path / "app")
    assert read(tmp_path / "app") == FIRST
    assert not lay_out_app(packages[0], tmp_path / "app")


def test_an_upgrade_brings_what_is_new_and_removes_what_is_gone(packages: tuple[Path, Path], tmp_path: Path):
    for source in packages:
        lay_out_app(source, tmp_path / "app")
    kept = {name: text for name, text in FIRST.items() if "/mr/1/" in name}  # proposals on disk name it
    assert read(tmp_path / "app") == {**kept, **SECOND}


def test_going_back_to_the_former_version_works_too(packages: tuple[Path, Path], tmp_path: Path):
    for source in (packages[0], packages[1], packages[0]):
        lay_out_app(source, tmp_path / "app")
    assert read(tmp_path / "app") == {**FIRST, "model/adapters/mr/2/adapter.json": "shipped too"}


def test_what_was_trained_and_published_stays(packages: tuple[Path, Path], tmp_path: Path):
    target = tmp_path / "app"
    lay_out_app(packages[0], target)
    trained = {
        "model/adapters/mr/2/adapter.json": "trained here",
        "model/adapters/mr/CURRENT": "2 of ours",
        "model/adapters/mr/history.jsonl": "1 2 of ours",
        "model/adapters/ct/1/adapter.json": "trained here",
        "logs/app.log": "line",
    }
    for name, text in trained.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)
    lay_out_app(packages[1], target)
    found = read(target)
    assert {name: found[name] for name in trained} == trained
    assert found["main.py"] == "second"


def test_a_start_that_was_killed_half_way_is_finished_by_the_next(packages: tuple[Path, Path], tmp_path: Path):
    target = tmp_path / "app"
    (target / "model/adapters/mr/1").mkdir(parents=True)
    (target / "model/adapters/mr/1/adapter.json").write_text("shipped")
    (target / "main.py").write_text("fir")
    lay_out_app(packages[0], target)
    assert read(target) == FIRST


def test_a_full_disk_is_refused_before_anything_is_written(
    packages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app_folder.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    with pytest.raises(StoreError, match=r"need 67 MB.*1 MB are free.*export PROGIDIFF_HOME="):
        lay_out_app(packages[0], tmp_path / "app")
    assert read(tmp_path / "app") == {}


def test_a_folder_that_cannot_be_made_is_refused_with_the_cure(packages: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be laid out in '.*app'.*export PROGIDIFF_HOME="):
        lay_out_app(packages[0], tmp_path / "file" / "app")


def test_an_installed_package_serves_from_the_folder_of_the_user(
    packages: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(app_folder, "CHECKOUT", tmp_path / "nowhere")
    monkeypatch.setattr(app_folder, "PACKAGED_APP", packages[0])
    monkeypatch.setenv("PROGIDIFF_HOME", str(tmp_path / "home"))
    assert find_app() == tmp_path / "home" / "app"
    assert (app_folder.find_model() / "conditioning" / "branch.safetensors").read_text() == "first"


def test_a_package_without_the_app_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app_folder, "CHECKOUT", tmp_path)
    monkeypatch.setattr(app_folder, "PACKAGED_APP", tmp_path)
    with pytest.raises(ModelError, match="carries no app, pages and weights.*make wheel"):
        find_app()


def test_the_folder_of_the_user_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("PROGIDIFF_HOME", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert find_home() == tmp_path / "progidiff"
    monkeypatch.delenv("XDG_DATA_HOME")
    assert find_home() == Path.home() / ".local" / "share" / "progidiff"
