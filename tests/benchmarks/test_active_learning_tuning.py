"""The active-learning benchmark at a size of seconds: it runs, resumes, and its arithmetic is right. Its figures mean
nothing here.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.func import functional_call

from progidiff.model.backbone import Backbone
from progidiff.model.folder import load_pipeline
from progidiff.model.lora import LoraSettings, inject_lora
from support.labelled_phantoms import write_case, write_table
from support.servers import load_script

BOXES = {
    1: (slice(8, 18), slice(6, 14), slice(2, 10)),
    2: (slice(22, 30), slice(6, 14), slice(4, 12)),
    3: (slice(8, 16), slice(15, 21), slice(8, 16)),
    4: (slice(22, 30), slice(15, 21), slice(10, 18)),
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("active_learning_tuning")


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    folder = tmp_path / "studies"
    for name in ("one", "two"):
        write_case(folder, name, BOXES)
    write_table(folder, {1: "liver", 2: "spleen", 3: "right kidney", 4: "left kidney"})
    return folder


@pytest.mark.parametrize("task", ["mr", "contrast", "ct"])
def test_the_smoke_size_runs_and_a_second_run_computes_nothing(
    benchmark: ModuleType,
    studies: Path,
    tiny_model: Path,
    tmp_path: Path,
    task: str,
    capsys: pytest.CaptureFixture[str],
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
    arguments += [
        "--out",
        str(out),
        "--picture",
        str(picture),
        "--strategies",
        "ours",
        "uniform random",
        "foreground random 66 %",
        "entropy",
    ]
    benchmark.main(arguments)
    first = json.loads(out.read_text())
    told = capsys.readouterr()
    assert told.err.count("round 1") == 8
    assert "| ours |" in told.out
    assert picture.stat().st_size > 1000
    for curves in first["curves"].values():
        starts = {json.dumps(curve[0]) for curve in curves.values()}
        assert len(starts) == 1  # the same start set and the same first model for every strategy
        assert all([point["slices"] for point in curve] == [4, 8] for curve in curves.values())
    assert all(
        "consensus" in point for curves in first["curves"].values() for curve in curves.values() for point in curve
    )
    benchmark.main(arguments)
    assert "round" not in capsys.readouterr().err
    assert json.loads(out.read_text())["curves"] == first["curves"]


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def run(work: str, *more: str) -> dict:
        paths = [
            "--studies",
            str(studies),
            "--model",
            str(tiny_model),
            "--work",
            str(tmp_path / work),
            "--out",
            str(tmp_path / f"{work}.json"),
        ]
        benchmark.main(
            ["--task", "mr", *paths, "--smoke", "--rounds", "2", "--seeds", "3", "--strategies", "ours", *more]
        )
        return json.loads((tmp_path / f"{work}.json").read_text())["curves"]

    def strip(curves: dict) -> list[dict]:
        return [{k: v for k, v in point.items() if k != "processor_seconds"} for point in curves["3"]["ours"]]

    whole = run("whole")
    run("stopped")
    capsys.readouterr()
    (file,) = [path for path in (tmp_path / "stopped").glob("mr-*/seed3/*.json") if path.name != "start.json"]
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({**kept, "points": kept["points"][:1], "annotated": kept["annotated"][:1]}))
    assert run("stopped", "--collect") == {}  # half a curve is not reported
    assert strip(run("stopped")) == strip(whole)
    assert capsys.readouterr().err.count("round") == 1  # only what was missing was computed


def test_folded_updates_compute_what_updates_beside_the_weights_compute(benchmark: ModuleType, tiny_model: Path):
    backbone = Backbone(tiny_model / "backbone", "cpu")
    _, pipeline = load_pipeline(tiny_model, backbone, None)
    plain = copy.deepcopy(pipeline.branch).eval()
    branch = copy.deepcopy(pipeline.branch)
    inject_lora(branch, None, LoraSettings(4, 8.0, ("encoder", "query_head"), True), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in branch.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    branch.eval()
    config = plain.config
    slices = torch.randn(2, 2 * config.num_neighbours + 1, config.height, config.width, generator=generator)
    pooled = torch.randn(3, config.text_features, generator=generator)
    beside = benchmark.EvidencePath(branch)(slices, pooled)
    weights = {f"branch.{name}": weight for name, weight in benchmark.fold_weights(branch).items()}
    path = benchmark.EvidencePath(plain)
    folded = functional_call(path, weights, (slices, pooled))
    assert (beside - path(slices, pooled)).abs().max() > 0.01
    torch.testing.assert_close(folded, beside, rtol=1e-4, atol=1e-4)
    trained = [p for p in branch.parameters() if p.requires_grad]
    for one, other in zip(
        torch.autograd.grad(beside.sum(), trained), torch.autograd.grad(folded.sum(), trained), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-5)


def test_candidates_of_a_round_are_the_same_for_all_and_never_annotated(
    benchmark: ModuleType, studies: Path, tiny_model: Path, tmp_path: Path
):
    setup = replace(benchmark.SETUPS["mr"], pool_volumes=1, query=4, num_proposals=2, candidates=6)
    world = benchmark.World(setup, studies, tiny_model, tmp_path / "work", 0)
    name = world.pool.names[0]
    first = world.draw_candidates({name: set()}, 0)
    taken = {z for _, z in list(first)[:2]}
    second = world.draw_candidates({name: taken}, 0)
    assert len(first) == len(second) == 6
    assert not {(0, z) for z in taken} & second
    assert first - second == {(0, z) for z in taken}  # the others stay; two more come
    assert world.draw_candidates({name: set()}, 1) != first
    # What nobody looked at has no score, what is annotated has its true size and no disagreement.
    scores = benchmark.score_pool(world, world.base, "evidence", {name: taken}, 0)[0]
    rows = world.candidates[name]
    unseen = [i for i, z in enumerate(rows) if (0, z) not in second and z not in taken]
    assert scores.foreground[:, unseen].sum() == scores.disagreement.sum() == 0
    area = setup_area(world)
    for z in taken:
        np.testing.assert_allclose(scores.foreground[:, rows.index(z)], world.pool.pixels[0][z] / area, rtol=1e-5)


def setup_area(world: Any) -> int:
    """Pixels of the working grid."""
    return int(world.card.conditioning.height * world.card.conditioning.width)


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
    assert summary["strategies"]["ours"]["slices_for_dice_of_uniform"]["median_share"] < 1
    assert "uniform random" in benchmark.format_table(summary)


def test_a_partial_table_compares_where_both_strategies_are_complete(benchmark: ModuleType, tmp_path: Path):
    def make(dice: float) -> list[dict]:
        point = {"contour": 5.0, "structures": {"liver": dice}}
        return [{"slices": 10, "dice": 0.1, **point}, {"slices": 20, "dice": dice, **point}]

    curves = {"0": {"ours": make(0.8), "entropy": make(0.9)}, "1": {"ours": make(0.4)}, "2": {"entropy": make(0.2)}}
    results = [{"setup": {"task": "mr"}, "curves": curves}]
    rows = benchmark.summarise(results)["strategies"]
    assert rows["ours"]["runs"] == rows["entropy"]["runs"] == 2
    assert rows["entropy"]["ours_wins"] == "0 of 1"
    assert rows["entropy"]["ours_minus_this"] == pytest.approx(-0.05)
    assert "uniform random" not in rows
    benchmark.draw(results, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


def test_turning_the_contrast_around_twice_changes_little_and_air_stays(benchmark: ModuleType):
    images = torch.tensor([-1.0, -0.97, -0.9, 0.0, 0.9])
    turned = benchmark.invert_contrast(images)
    assert turned.tolist() == pytest.approx([-1.0, -0.97, 0.9, 0.0, -0.9])
    torch.testing.assert_close(benchmark.invert_contrast(turned), images)
