"""The script for true widths, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from support.servers import ROOT, load_script


def test_both_kinds_answer_on_the_grid_and_leave_the_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "widths.json"
    load_script("true_widths").main(["--size", "small", "--here", "--out", str(out)])
    kinds = json.loads(out.read_text())["kinds"]
    assert list(kinds) == ["embedded", "stable_diffusion"]
    for found in kinds.values():
        assert found["fresh_branch_changes_nothing"]
        assert found["request"]["is_on_the_grid_of_the_image"]
        assert found["request"]["proposals"] == "2 x 32 x 24 x 1"
        assert found["step"]["changes_the_encoder"]
        assert not found["step"]["changes_the_backbone"]
    assert kinds["stable_diffusion"]["step"]["changes_the_injection"]
    assert kinds["stable_diffusion"]["window"] == "64 x 64"
