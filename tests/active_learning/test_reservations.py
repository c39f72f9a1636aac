"""Reservations: one client per image, for a while, also after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from progidiff.active_learning.reservations import Reservations


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_two_clients_do_not_get_the_same_image_until_it_expires(tmp_path: Path):
    clock = Clock()
    held = Reservations(tmp_path / "r.json", minutes=30, clock=clock)
    assert held.reserve("a", "anna")
    assert not held.reserve("a", "ben")
    assert held.reserve("a", "anna")
    clock.now += 29 * 60
    assert held.owner("a") == "anna"
    clock.now += 61
    assert held.owner("a") is None
    assert held.reserve("a", "ben")
    assert held.held_by("ben") == ["a"]


def test_a_restart_forgets_nothing_and_a_release_is_final(tmp_path: Path):
    clock = Clock()
    held = Reservations(tmp_path / "deep" / "r.json", clock=clock)
    held.reserve("a", "anna")
    held.reserve("b", "ben")
    held.release("b")
    again = Reservations(tmp_path / "deep" / "r.json", clock=clock)
    assert again.all() == {"a": "anna"}


def test_a_clock_that_goes_back_does_not_lock_an_image_for_good(tmp_path: Path):
    clock = Clock()
    held = Reservations(tmp_path / "r.json", minutes=30, clock=clock)
    held.reserve("a", "anna")
    clock.now -= 365 * 86400
    assert held.owner("a") == "anna"
    clock.now += 31 * 60
    assert held.owner("a") is None


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": ["anna"]}'])
def test_a_damaged_file_frees_all_images(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture):
    (tmp_path / "r.json").write_text(content)
    held = Reservations(tmp_path / "r.json")
    assert held.all() == {}
    assert "cannot be read" in caplog.text
    assert held.reserve("a", "anna")


def test_a_disk_that_refuses_does_not_stop_the_annotator(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").write_text("")
    held = Reservations(tmp_path / "file" / "r.json")
    assert held.reserve("a", "anna")
    assert held.owner("a") == "anna"
    assert "not kept on disk" in caplog.text
