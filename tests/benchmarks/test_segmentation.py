"""The segmentation benchmark at a size of seconds: rivals train and continue, tables come out, the arithmetic is right.
Figures mean nothing here.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from support.labelled_phantoms import write_case, write_table
from support.servers import ROOT

BOXES = {
    1: (slice(8, 18), slice(6, 14), slice(1, 5)),
    2: (slice(22, 30), slice(6, 14), slice(3, 7)),
}


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("segmentation")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def baselines(benchmark: ModuleType) -> ModuleType:
    return sys.modules["baselines"]


def test_the_smoke_size_trains_measures_prints_and_a_second_run_computes_nothing(
    benchmark: ModuleType, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    studies, out, work = tmp_path / "studies", tmp_path / "out.json", tmp_path / "work"
    for name in ("one", "two"):
        write_case(studies, name, BOXES, slices=8)
    write_table(studies, {1: "liver", 2: "spleen"})
    common = [
        "--studies",
        str(studies),
        "--cases",
        "two",
        "--model",
        str(tiny_model),
        "--work",
        str(work),
        "--out",
        str(out),
        "--smoke",
    ]
    for what in ("unet", "gms"):
        benchmark.main([what, *common])
    benchmark.main(["slices", *common, "--every", "2"])
    benchmark.main(["volumes", *common, "--keep", str(tmp_path / "kept")])
    assert (tmp_path / "kept" / "two" / "proposals.json").is_file()
    capsys.readouterr()
    benchmark.main(["tables", *common])
    tables = capsys.readouterr().out
    for row in (
        "| U-Net | 0 |",
        "| evidence alone | 1 |",
        "| 2 steps | 2 |",
        "| U-Net, MC dropout | 2 |",
        "| GMS | 1 |",
        "| 8 steps, guidance 2 | 2 |",
    ):
        assert row in tables
    assert "shipped: Dice" in tables

    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["unet"]["training"] == ["one"]
    assert report["unet"]["held_out"] == report["slices"]["cases"] == ["two"]
    assert report["slices"]["slices"] == 4
    assert len(report["slices"]["methods"]) == 13
    drawn = report["volumes"]["networks"]["shipped"]["as drawn"]["cases"][0]["structures"]["liver"]
    cleaned = report["volumes"]["networks"]["shipped"]["largest component"]["cases"][0]["structures"]["liver"]
    assert 0 < cleaned["consensus"]["voxels"] <= drawn["consensus"]["voxels"]

    counted = {file: file.stat().st_mtime_ns for file in work.rglob("*.npz")}
    assert len(counted) == 13
    benchmark.main(["slices", *common, "--every", "2"])
    benchmark.main(["volumes", *common])
    assert {file: file.stat().st_mtime_ns for file in work.rglob("*.npz")} == counted
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["slices"]["methods"] == report["slices"]["methods"]
    assert again["volumes"]["networks"] == report["volumes"]["networks"]


def test_counts_give_single_consensus_and_best_of_every_k(benchmark: ModuleType, tmp_path: Path):
    """Two answers, one structure, two slices of one volume: answer 0 is right on the first slice, answer 1 on the
    second.
    """
    counts = benchmark.Counts(
        volume=np.array([0, 0, 0]),
        truth=np.array([[10], [30], [0]]),
        sizes=np.array([[[10, 10]], [[10, 30]], [[0, 5]]]),
        overlaps=np.array([[[10, 0]], [[0, 30]], [[0, 0]]]),
        agreed_sizes={1: np.array([[10], [10], [0]]), 2: np.array([[20], [40], [5]])},
        agreed_overlaps={1: np.array([[10], [0], [0]]), 2: np.array([[10], [30], [0]])},
    )
    one, two = (benchmark.score_counts(counts, ["liver"], k) for k in (1, 2))
    assert one["single"]["all"] == one["best"]["all"] == pytest.approx(20 / 60)
    assert two["single"]["all"] == pytest.approx((20 / 60 + 60 / 85) / 2)
    assert two["best"]["all"] == pytest.approx(60 / 85)
    assert two["consensus"]["all"] == pytest.approx(80 / 105)
    assert two["best per slice"]["all"] == pytest.approx(1.0)  # answer 0 on the empty slice, as it draws nothing there
    assert one["drawn where absent"]["consensus"]["all"] == 0
    assert two["drawn where absent"]["consensus"]["all"] == 1
    assert two["drawn where absent"]["single"]["all"] == pytest.approx(0.5)


def test_a_class_is_at_least_one_half_exactly_where_it_is_the_most_probable(baselines: ModuleType):
    logits = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0))
    rated = baselines.rate_classes(logits)
    assert rated.shape == (2, 4, 6, 7)
    assert torch.equal(rated >= 0.5, torch.stack([logits.argmax(1) == p for p in range(1, 5)], dim=1))


def test_mc_dropout_answers_differ_repeat_and_do_not_depend_on_the_batch(baselines: ModuleType):
    torch.manual_seed(0)
    network = baselines.UNet(1, 2, features=(8, 8, 8, 8, 16), dropout=0.3).eval()
    images = torch.randn(3, 1, 32, 32)
    first = network.sample(images, 0)
    assert not torch.allclose(first, network.sample(images, 1))
    torch.testing.assert_close(first, network.sample(images, 0))
    torch.testing.assert_close(first[1:2], network.sample(images[1:2], 0), atol=0.02, rtol=0)
    assert not torch.allclose(first, network.predict(images))
    torch.testing.assert_close(network.predict(images), network.predict(images))
    torch.testing.assert_close(network.sample(images, 0, share=0.0), network.predict(images))


def test_training_learns_and_goes_on_where_it_stopped(baselines: ModuleType, tmp_path: Path):
    def build() -> torch.nn.Linear:
        torch.manual_seed(0)
        return torch.nn.Linear(4, 1)

    def train(minutes: float) -> tuple[torch.nn.Linear, list[dict]]:
        network = build()

        def compute_loss(step: int, generator: torch.Generator) -> torch.Tensor:
            x = torch.randn(16, 4, generator=generator)
            return (network(x).float()[:, 0] - x.sum(1)).square().mean()

        budget = baselines.Budget(minutes=minutes, validate_minutes=0.005, learning_rate=0.02, anneal_minutes=0.002)
        return network, baselines.train_for(
            network, compute_loss, lambda: {"bias": float(network.bias.detach())}, budget, tmp_path
        )

    _, short = train(0.005)
    network, longer = train(0.01)
    assert longer[0] == short[0]
    assert longer[1]["step"] > longer[0]["step"]
    assert longer[1]["minutes"] >= 0.01
    assert float((network.weight - 1).abs().max()) < 0.1
    assert longer[1]["bias"] == pytest.approx(
        float(network.bias.detach())
    )  # the averaged weights are validated, and kept
