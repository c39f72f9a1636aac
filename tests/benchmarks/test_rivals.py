"""`benchmarks/rivals.py` from end to end on small phantoms; the figures mean nothing, their shape and places do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from progidiff.training.out_of_fold import find_evidence
from progidiff.training.recipe_settings import TrainConfig
from support.labelled_phantoms import write_case, write_table
from support.servers import ROOT, load_script

SLICES = 6


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("rivals")


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    studies, work = tmp_path / "studies", tmp_path / "work"
    studies.mkdir()
    write_table(studies, {6: "liver", 8: "aorta"})
    grid, count = TrainConfig().grid, len(TrainConfig().structures)
    for shift, name in enumerate(("one", "three", "two")):
        parts = {6: np.s_[6:16, 6 + shift : 20, 2:5], 8: np.s_[24:28, 10:16, 1:5]}
        write_case(studies, name, parts, slices=SLICES)
        find_evidence(work, name).parent.mkdir(parents=True, exist_ok=True)
        np.save(find_evidence(work, name), np.zeros((SLICES, count, grid.height, grid.width), np.uint8))
    return argparse.Namespace(
        studies=studies, work=work, folds=[1], num_folds=3, minutes=0.01, seed=0, num_proposals=3, name="unet"
    )


def test_a_fold_is_trained_on_the_others_and_measured_as_ours_is(rivals: ModuleType, options: argparse.Namespace):
    rivals.run_fold(options, 1)
    assert [path.name for path in (options.work / "unet1").glob("*.json")] == ["three.json"]
    rows = json.loads((options.work / "unet1" / "three.json").read_text(encoding="utf-8"))
    assert set(rows) == {"liver", "aorta"}
    for row in rows.values():
        assert row["evidence"] == row["sharpened"] <= row["best_level"]
        assert row["single"] <= row["best"]
        assert len(row["slices"]["dice"]) == len(row["slices"]["disagreement"]) <= SLICES
    table = load_script("folds").make_table(options)
    assert table["patients"] == ["three"]
    assert table["structures"]["liver"]["evidence"] == pytest.approx(rows["liver"]["evidence"])


def test_what_is_finished_is_not_repeated(rivals: ModuleType, options: argparse.Namespace):
    rivals.run_fold(options, 1)
    weights, rows = options.work / "unet1" / "unet.safetensors", options.work / "unet1" / "three.json"
    before = weights.read_bytes()
    rows.unlink()
    rivals.run_fold(options, 1)
    assert weights.read_bytes() == before
    assert rows.is_file()
