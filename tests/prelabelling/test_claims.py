"""Images that several processes claim: each is taken once, a dead owner's come back, nobody waits for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from progidiff.errors import StoreError
from progidiff.evaluation.prelabel import Item
from progidiff.prelabelling.claims import Claims, Supply

ITEMS = [Item(name, f"/scans/{name}.nii.gz") for name in "abcdef"]


def test_every_image_is_claimed_once_and_nobody_has_a_fixed_share(tmp_path: Path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        fast, slow = Supply(ITEMS, first, 0, 2), Supply(ITEMS, second, 1, 2)
        held = slow.take()
        assert held is not None
        taken = []
        while (item := fast.take()) is not None:
            taken.append(item.image)
            first.finish([item.image])
        assert (held.image, taken) == ("d", ["a", "b", "c", "e", "f"])
        assert not fast.is_empty  # The one that the other has may come back.
        second.finish(["d"])
        assert fast.take() is None
        assert fast.is_empty
        assert slow.take() is None
        assert slow.is_empty


def test_whoever_waits_for_others_hands_in_what_they_wait_for(tmp_path: Path):
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        handed_in: list[str] = []
        supply = Supply(ITEMS[:1], first, on_idle=lambda: handed_in.append("report"))
        assert second.take("a")
        assert supply.take() is None
        assert handed_in == ["report"]


def test_what_a_killed_process_of_this_machine_had_is_free_at_once(tmp_path: Path):
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom progidiff.prelabelling.claims import Claims\n"
        "claims = Claims(Path(sys.argv[1]))\nassert claims.take('a')\nclaims.finish(['a'])\nassert claims.take('b')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    with Claims(tmp_path) as mine:
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path)], timeout=120, check=False)
        assert killed.returncode < 0
        assert mine.is_done("a")
        assert not mine.take("a")
        assert mine.take("b")


def test_what_a_silent_process_of_another_machine_had_is_free_after_a_while(tmp_path: Path):
    elsewhere = f"{'0' * 8}.1.1-{'0' * 12}"
    with Claims(tmp_path, expiry=60) as mine:
        assert mine.take("a")
        claim = next(tmp_path.glob("*.claim"))
        claim.write_text(elsewhere)
        alive = tmp_path / f"{elsewhere}.owner"
        alive.touch()
        with Claims(tmp_path, expiry=60) as other:
            assert not other.take("a")
            long_ago = alive.stat().st_mtime - 61
            os.utime(alive, (long_ago, long_ago))
            assert other.take("a")
        assert not list(tmp_path.glob("*.claim"))


def test_the_first_one_where_nobody_is_begins_anew(tmp_path: Path):
    with Claims(tmp_path) as earlier:
        assert earlier.take("a")
        earlier.fail("a")
        earlier.finish(["a"])
        earlier.stop("Too many failed.")
        with Claims(tmp_path) as joined:
            assert (joined.is_done("a"), joined.count_failed(), joined.find_stop()) == (True, 1, "Too many failed.")
            supply = Supply(ITEMS, joined)
            assert supply.take() is None
            assert supply.is_empty
    with Claims(tmp_path) as later:
        assert (later.is_done("a"), later.count_failed(), later.find_stop()) == (False, 0, "")
        assert later.take("a")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="--claims"):
        Claims(tmp_path / "file")
