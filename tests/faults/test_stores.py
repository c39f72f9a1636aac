"""SIGKILL of a process that drives the stores, without the web server: cheap rounds, many of them; see `store_rounds`.

About 20 seconds for 40 rounds on a quiet machine. `make test-faults` runs more, from a seed that it prints.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROUNDS = int(os.environ.get("FAULT_ROUNDS", "40"))
SEED = os.environ.get("FAULT_SEED", "1")


@pytest.mark.skipif(sys.platform != "linux", reason="needs processes that start as copies, and SIGKILL")
def test_whatever_was_acknowledged_is_there_after_a_kill_at_any_step(tmp_path: Path):
    command = [
        sys.executable,
        str(Path(__file__).parent / "store_rounds.py"),
        str(tmp_path / "work"),
        SEED,
        str(ROUNDS),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=120 + 20 * ROUNDS, check=False
    )
    print(done.stdout)
    assert done.stdout, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["problems"] == [], f"FAULT_SEED={SEED}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert (done.returncode, result["rounds"]) == (0, ROUNDS)
    assert result["acknowledged"]["label"] >= ROUNDS / 4
