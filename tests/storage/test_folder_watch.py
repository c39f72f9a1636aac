"""A folder that is as it was is not read again, whoever changed it is noticed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from progidiff.storage.folder_watch import FolderWatch

SECOND = 1_000_000_000
START = 1_700_000_000 * SECOND + 1


class Clock:
    def __init__(self) -> None:
        self.now = START + 10 * SECOND

    def __call__(self) -> int:
        return self.now


def change(folder: Path, at: int) -> None:
    """The folder's time, as a file that appears there at that moment would leave it."""
    os.utime(folder, ns=(at, at))


def look(watch: FolderWatch) -> None:
    with watch.look():
        pass


def test_a_change_of_somebody_else_is_seen(tmp_path: Path):
    change(tmp_path, START)
    watch = FolderWatch(tmp_path, Clock())
    assert not watch.is_as_seen()
    look(watch)
    assert watch.is_as_seen()
    change(tmp_path, START + SECOND + 5)
    assert not watch.is_as_seen()
    look(watch)
    assert watch.is_as_seen()


def test_own_changes_need_no_look_until_somebody_else_changes_something(tmp_path: Path):
    clock = Clock()
    change(tmp_path, START)
    watch = FolderWatch(tmp_path, clock)
    look(watch)
    for number in range(1, 4):
        with watch.own_change():
            change(tmp_path, START + number * SECOND + 1)
        assert watch.is_as_seen()
    change(tmp_path, START + 5 * SECOND + 1)
    with watch.own_change():  # Beside one of somebody else, which it must not hide.
        change(tmp_path, START + 6 * SECOND + 1)
    assert not watch.is_as_seen()


def test_what_came_in_the_moment_of_an_own_change_is_found_later(tmp_path: Path):
    clock = Clock()
    change(tmp_path, START)
    watch = FolderWatch(tmp_path, clock)
    look(watch)
    with watch.own_change():
        change(tmp_path, START + 1)
    assert watch.is_as_seen()
    clock.now += 31 * SECOND
    assert not watch.is_as_seen()
    look(watch)
    clock.now += 31 * SECOND
    assert watch.is_as_seen()


@pytest.mark.parametrize(("modified", "sure_after"), [(START, SECOND // 5), (START // SECOND * SECOND, 4 * SECOND)])
def test_a_folder_that_has_just_changed_is_looked_at_again(tmp_path: Path, modified: int, sure_after: int):
    """Its time may not tell two changes apart; on some disks it has whole seconds only."""
    clock = Clock()
    clock.now = modified + 1000
    change(tmp_path, modified)
    watch = FolderWatch(tmp_path, clock)
    look(watch)
    assert not watch.is_as_seen()
    clock.now = modified + sure_after
    look(watch)
    assert watch.is_as_seen()


def test_a_folder_that_is_not_there_has_not_changed_until_it_is(tmp_path: Path):
    folder = tmp_path / "later"
    watch = FolderWatch(folder, Clock())
    look(watch)
    assert watch.is_as_seen()
    folder.mkdir()
    assert not watch.is_as_seen()
    with pytest.raises(OSError, match="broken"), watch.look():
        raise OSError("broken")
    assert not watch.is_as_seen()
