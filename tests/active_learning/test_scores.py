"""Scores on disk: whole or not at all, per version, fast for many images."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from progidiff.active_learning.scores import KEPT_VERSIONS, ScoredImage, SliceScoreStore, name_version
from progidiff.errors import StoreError
from support.scores import make_entry


def assert_same(first: ScoredImage | None, second: ScoredImage) -> None:
    assert first is not None
    for name in ("disagreement", "entropy", "foreground"):
        np.testing.assert_array_equal(getattr(first.scores, name), getattr(second.scores, name))
    assert (first.scores.image, first.scores.structures, first.scores.slice_mm) == (
        second.scores.image,
        second.scores.structures,
        second.scores.slice_mm,
    )
    assert (first.scores.version, first.fingerprint, first.modality, first.created) == (
        second.scores.version,
        second.fingerprint,
        second.modality,
        second.created,
    )


def test_scores_survive_a_restart_whatever_the_image_is_called(tmp_path: Path):
    names = ["a", "../../etc", "x" * 250, "Ω 1", "1.2.840"]
    store = SliceScoreStore(tmp_path / "scores")
    for number, name in enumerate(names):
        store.save(make_entry(name, seed=number))
    again = SliceScoreStore(tmp_path / "scores")
    for number, name in enumerate(names):
        assert_same(again.load(name, "base@1"), make_entry(name, seed=number))
    assert again.load("a", "base@2") is None
    assert sorted(entry.scores.image for entry in again.load_all()) == sorted(names)
    assert not list(tmp_path.rglob(".writing-*"))
    assert [path.parent.parent for path in tmp_path.rglob("*.safetensors")] == [tmp_path / "scores"] * len(names)


def test_an_empty_store_has_no_scores_and_makes_no_folder(tmp_path: Path):
    store = SliceScoreStore(tmp_path / "scores")
    assert store.load_all() == []
    assert store.pick_newest(lambda modality: "") == {}
    assert not (tmp_path / "scores").exists()


def test_the_version_that_is_served_wins_over_a_newer_one_and_any_over_none(tmp_path: Path):
    store = SliceScoreStore(tmp_path)
    store.save(make_entry("a", name_version("base@1"), created=1.0))
    store.save(make_entry("a", name_version("base@1", "ct@1"), created=2.0))
    store.save(make_entry("b", name_version("base@1", "ct@1"), created=3.0))
    assert {k: v.scores.version for k, v in store.pick_newest(lambda modality: "base@1").items()} == {
        "a": "base@1",
        "b": "base@1+ct@1",
    }
    assert {v.scores.version for v in store.pick_newest(lambda modality: "base@2").values()} == {"base@1+ct@1"}


@pytest.mark.parametrize("damage", ["truncated", "empty", "other"])
def test_a_damaged_file_is_moved_aside_and_the_rest_is_read(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    store = SliceScoreStore(tmp_path)
    store.save(make_entry("a"))
    store.save(make_entry("b"))
    path = next(
        path for path in tmp_path.rglob("*.safetensors") if SliceScoreStore(tmp_path)._read(path).scores.image == "a"
    )  # type: ignore[union-attr]
    path.write_bytes({"truncated": path.read_bytes()[:-9], "empty": b"", "other": b"this is no score file"}[damage])
    again = SliceScoreStore(tmp_path)
    assert [entry.scores.image for entry in again.load_all()] == ["b"]
    assert "scored again" in caplog.text
    assert again.load("a", "base@1") is None
    again.save(make_entry("a"))
    assert len(again.load_all()) == 2


def test_a_file_written_by_another_process_is_seen(tmp_path: Path):
    reader, writer = SliceScoreStore(tmp_path), SliceScoreStore(tmp_path)
    writer.save(make_entry("a", seed=1))
    assert_same(reader.load("a", "base@1"), make_entry("a", seed=1))
    writer.save(make_entry("a", seed=2))
    assert_same(reader.load("a", "base@1"), make_entry("a", seed=2))
    writer.remove("a")
    assert reader.load("a", "base@1") is None


def test_scores_of_long_gone_versions_are_removed(tmp_path: Path):
    store = SliceScoreStore(tmp_path)
    for number in range(KEPT_VERSIONS + 3):
        store.save(make_entry("a", f"base@{number}", created=number))
        for age, folder in enumerate(
            sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        ):
            os.utime(folder, ns=(0, time.time_ns() - age * 10**9))
    assert sorted(entry.scores.version for entry in store.load_all()) == [
        f"base@{n}" for n in range(3, KEPT_VERSIONS + 3)
    ]


def test_a_model_that_is_trained_often_does_not_push_out_the_scores_of_another_modality(tmp_path: Path):
    store = SliceScoreStore(tmp_path)
    store.save(make_entry("ct", "base@1", modality="CT"))
    store.save(make_entry("picture", "nuclei@1", modality="picture"))
    for number in range(1, KEPT_VERSIONS + 4):
        store.save(make_entry("mr", name_version("base@1", f"mr@{number}"), modality="MR", created=number))
        for age, folder in enumerate(
            sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        ):
            os.utime(folder, ns=(0, time.time_ns() - age * 10**9))
    kept = sorted(entry.scores.version for entry in SliceScoreStore(tmp_path).load_all())
    assert kept == ["base@1", *(f"base@1+mr@{number}" for number in range(4, KEPT_VERSIONS + 4)), "nuclei@1"]


def test_a_disk_that_refuses_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be kept"):
        SliceScoreStore(tmp_path / "file").save(make_entry())


def test_two_threads_that_go_through_the_pool_at_once_read_no_file_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for number, name in enumerate(("a", "b")):
        SliceScoreStore(tmp_path).save(make_entry(name, seed=number))
    store = SliceScoreStore(tmp_path)
    read: list[Path] = []
    another = threading.Event()

    def open_slowly(path: Path, **options: Any) -> Any:
        read.append(path)
        if len(read) > 1:
            another.set()
        another.wait(0.5)  # the other thread's chance to open the same file
        return safe_open(path, **options)

    monkeypatch.setattr("progidiff.active_learning.scores.safe_open", open_slowly)
    found: list[list[ScoredImage]] = []
    threads = [threading.Thread(target=lambda: found.append(store.load_all())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(read) == sorted(tmp_path.rglob("*.safetensors"))
    assert {id(entry) for entry in found[0]} == {id(entry) for entry in found[1]}
