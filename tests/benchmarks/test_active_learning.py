"""The benchmark of slice choice at a size of seconds: it runs, goes on where it was stopped, and its arithmetic is
right. Its figures mean nothing here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from progidiff.active_learning.strategies import ImageScores, build_pool
from support.servers import ROOT, load_script

PATIENTS = 6


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield load_script("active_learning")
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hearts of boxes: six patients of seven slices, empty at both ends."""
    folder = tmp_path_factory.mktemp("data") / "heart"
    (folder / "labels" / "final").mkdir(parents=True)
    for number in range(PATIENTS):
        rng = np.random.default_rng(number)
        label = np.zeros((40, 48, 7), np.uint8)
        left = 14 + number
        label[left : left + 6, 14:26, 1:6] = 1
        label[left + 6 : left + 16, 14:26, 1:5] = 2
        label[left + 9 : left + 13, 17:23, 1:4] = 3
        image = label * 60.0 + rng.normal(0, 10, label.shape)
        for path, array in ((folder, image.astype(np.float32)), (folder / "labels" / "final", label)):
            header = nib.Nifti1Image(array, np.diag([1.5, 1.5, 10, 1]))
            nib.save(header, path / f"patient{number}.nii.gz")
    return folder.parent


@pytest.fixture
def small(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark with pools of two patients."""
    sizes = {"canvas": (32, 64), "view": 1.0, "patients": 2, "groups": 2, "test_patients": 2}
    sizes |= {"repetitions": 1, "measured_patients": 4, "pilot_patients": 2}
    task = replace(benchmark.TASKS["heart"], **sizes)
    monkeypatch.setitem(benchmark.TASKS, "heart", task)
    monkeypatch.setattr(benchmark, "ITERATIONS", 20)
    return benchmark


def test_the_small_size_runs_with_all_strategies_and_a_second_run_computes_nothing(
    small: ModuleType, data: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, picture = tmp_path / "out.json", tmp_path / "picture.png"
    arguments = ["--data", str(data), "--tasks", "heart", "--model", str(tiny_model), "--work", str(tmp_path / "work")]
    arguments += ["--budget", "10"]
    small.main([*arguments, "--pairs", "1", "--out", str(out), "--picture", str(picture)])
    told = capsys.readouterr()
    assert told.err.startswith(f"heart 0: {small.BASELINE} 0.")
    assert f"**{small.PRIMARY}**" in told.out
    assert picture.stat().st_size > 1000
    (pair,) = json.loads(out.read_text())["results"]["heart"]
    assert set(pair["curves"]) == set(small.STRATEGIES)
    starts = {json.dumps(curve["points"][0]) for curve in pair["curves"].values()}
    assert len(starts) == 1  # the same start set and the same first head for every strategy
    assert all([p["slices"] for p in curve["points"]] == [5, 10] for curve in pair["curves"].values())
    small.main([*arguments, "--pairs", "2", "--out", str(out)])  # goes on
    assert capsys.readouterr().err.startswith("heart 1: ")
    again = json.loads(out.read_text())["results"]["heart"]
    assert again[0] == pair
    small.main([*arguments, "--pairs", "2"])
    assert capsys.readouterr().err == ""


def test_the_head_does_not_depend_on_where_it_starts(benchmark: ModuleType):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 400).astype(np.uint8)
    pixels = rng.normal(size=(400, 5)).astype(np.float32)
    pixels[:, :3] += 1.5 * np.eye(3, dtype=np.float32)[labels]
    pixels[:, -1] = 1
    weights = rng.uniform(1, 5, 400).astype(np.float32)
    heads = [
        benchmark.fit_head(pixels, labels, weights, 3, start)
        for start in (None, rng.normal(size=(5, 3)).astype(np.float32))
    ]
    one, other = (benchmark.predict(pixels, head) for head in heads)
    assert np.abs(one - other).max() < 0.02
    assert (one.argmax(1) == labels).mean() > 0.7


def test_a_thing_apart_from_the_main_run_of_its_structure_is_an_island(benchmark: ModuleType):
    area = np.array([[0, 0.1, 0.2, 0, 0.05, 0, 0.3, 0]], np.float32)
    nothing = np.zeros((1, 4), np.float32)
    images = [ImageScores(f"{v}", ("a",), nothing, nothing, area[:, 4 * v : 4 * v + 4], 5.0) for v in range(2)]
    # Volume 0 has one run; of volume 1, slice 0 is away from the larger one on slice 2.
    assert benchmark.find_islands(build_pool(images)).tolist() == pytest.approx([0, 0, 0, 0, 0.05, 0, 0, 0])


def test_signs_of_whole_repetitions_are_flipped(benchmark: ModuleType):
    assert benchmark.flip_signs(np.ones(12), 3) == pytest.approx(2 / 16)
    assert benchmark.flip_signs(np.array([1.0, 1.0, -1.0, -1.0]), 1) == 1.0


def make_curve(*dice: float, contour: float = 10.0) -> dict[str, Any]:
    points = [
        {"slices": 5 * (n + 1), "dice": value, "validation": value, "contour": contour * (n + 1)}
        for n, value in enumerate(dice)
    ]
    return {"points": points}


def test_areas_and_slices_needed_are_read_off_the_curves(benchmark: ModuleType):
    curve = make_curve(0.2, 0.6, 0.8)
    assert benchmark.compute_area(curve) == pytest.approx(0.55)
    assert benchmark.find_slices_for(curve, 0.4) == pytest.approx(7.5)
    assert benchmark.find_slices_for(curve, 0.1) == 5
    assert benchmark.find_slices_for(curve, 0.9) is None
    # The same Dice for twice the outline is worse: over the outline that both drew, 10 to 30 pixels.
    assert benchmark.compare_by_contour(curve, make_curve(0.2, 0.6, 0.8, contour=10.0)) == 0
    dear = make_curve(0.2, 0.6, 0.8, contour=20.0)
    dear["points"][0]["contour"] = 10.0
    assert benchmark.compare_by_contour(dear, curve) < -0.1


def test_the_summary_pairs_every_strategy_with_the_baseline(benchmark: ModuleType):
    pairs = [
        {
            "pool_slices": 100,
            "ceiling": 0.9,
            "curves": {
                "uniform random": make_curve(0.1, 0.3, 0.5),
                benchmark.BASELINE: make_curve(0.1, 0.4, 0.5),
                benchmark.PRIMARY: make_curve(0.1, 0.5 + n / 100, 0.6),
            },
        }
        for n in range(9)
    ]
    summary = benchmark.summarise_task(benchmark.TASKS["heart"], pairs)
    row = summary["strategies"][benchmark.PRIMARY]
    assert row["gap"] == pytest.approx(0.095)
    assert row["wins"] == 9
    assert row["p"] < 0.01
    assert row["p_by_repetition"] == 0.25  # three repetitions have eight ways
    assert row["uniform_end_at"] == pytest.approx((5 + 5 * 0.4 / 0.44) / 15, abs=0.02)
    assert summary["advice"]["predictions"] == 0 or summary["advice"]["mean_error"] >= 0
    assert "9 of 9" in benchmark.format_table([summary])
