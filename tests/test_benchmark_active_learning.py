"""The active-learning benchmark at a size of seconds: it runs, resumes, and its arithmetic is right. Its figures mean nothing here."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conftest import ROOT
from training.labelled_phantoms import write_case, write_table

BOXES = {
    1: (slice(8, 18), slice(6, 14), slice(2, 10)),
    2: (slice(22, 30), slice(6, 14), slice(4, 12)),
    3: (slice(8, 16), slice(15, 21), slice(8, 16)),
    4: (slice(22, 30), slice(15, 21), slice(10, 18)),
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("active_learning", ROOT / "benchmarks" / "active_learning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    for name in ("one", "two"):
        write_case(folder, name, BOXES)
    write_table(folder, {1: "liver", 2: "spleen", 3: "right kidney", 4: "left kidney"})
    return folder


@pytest.mark.parametrize("task", ["mr", "ct"])
def test_the_smoke_size_runs_and_a_second_run_computes_nothing(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]
):
    out, picture = tmp_path / "out.json", tmp_path / "curve.png"
    arguments = [
        "--task",
        task,
        "--studies",
        str(studies),
        "--model",
        str(tiny_model),
        "--work",
        str(tmp_path / "work"),
        "--smoke",
        "--seeds",
        "0",
        "1",
    ]
    arguments += ["--out", str(out), "--picture", str(picture), "--strategies", "ours", "uniform random", "foreground random 66 %", "entropy"]
    benchmark.main(arguments)
    first = json.loads(out.read_text())
    told = capsys.readouterr()
    assert told.err.count("round 1") == 8
    assert "| ours |" in told.out
    assert picture.stat().st_size > 1000
    for curves in first["curves"].values():
        starts = {json.dumps({k: v for k, v in curve[0].items() if k != "seconds"}) for curve in curves.values()}
        assert len(starts) == 1  # the same start set and the same first model for every strategy
        assert all([point["slices"] for point in curve] == [4, 8] for curve in curves.values())
    benchmark.main(arguments)
    assert "round" not in capsys.readouterr().err
    assert json.loads(out.read_text())["curves"] == first["curves"]


def test_area_and_slices_needed_are_read_off_the_curve(benchmark: ModuleType):
    curve = [{"slices": 10, "dice": 0.2}, {"slices": 20, "dice": 0.6}, {"slices": 40, "dice": 0.8}]
    assert benchmark.compute_area(curve) == pytest.approx((0.4 * 10 + 0.7 * 20) / 30)
    assert benchmark.find_slices_for(curve, 0.4) == pytest.approx(15)
    assert benchmark.find_slices_for(curve, 0.8) == 40
    assert benchmark.find_slices_for(curve, 0.1) == 10
    assert benchmark.find_slices_for(curve, 0.9) is None


def test_the_summary_pairs_ours_with_every_rival(benchmark: ModuleType):
    def make(dice: float) -> list[dict]:
        point = {"contour": 5.0, "structures": {"liver": dice}}
        return [{"slices": 10, "dice": 0.1, **point}, {"slices": 20, "dice": dice, **point}]

    curves = {str(seed): {"ours": make(0.8 + seed / 100), "uniform random": make(0.6)} for seed in range(3)}
    summary = benchmark.summarise([{"setup": {"task": "mr"}, "curves": curves}])
    row = summary["strategies"]["uniform random"]
    assert row["ours_wins"] == "3 of 3"
    assert row["ours_minus_this"] == pytest.approx(0.105)
    assert row["p_paired_t"] < 0.01
    assert summary["strategies"]["ours"]["slices_for_dice_of_uniform"]["share"] < 1
    assert "uniform random" in benchmark.format_table(summary)
