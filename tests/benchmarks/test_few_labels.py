"""The script on few labels: averaged features, and the table of what is done."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from progidiff.textdiff.features import FeatureOptions
from support.servers import ROOT, load_script


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("few_labels")


class CountingFeatures:
    """Features that are the number of the draw."""

    channels, strides, options, key = (1,), (1,), FeatureOptions(), "counting"

    def __call__(self, pictures: torch.Tensor, draw: int = 0) -> list[torch.Tensor]:
        return [torch.full((len(pictures), 1, *pictures.shape[2:]), float(draw))]


def test_each_draw_averages_noises_of_its_own(benchmark: ModuleType):
    averaged = benchmark.AveragedFeatures(CountingFeatures(), 4)
    pictures = torch.zeros(1, 3, 2, 2)
    assert [float(averaged(pictures, draw)[0].mean()) for draw in (0, 1)] == [1.5, 5.5]
    assert averaged.key != benchmark.AveragedFeatures(CountingFeatures(), 8).key


def test_the_table_has_the_mean_over_seeds_and_the_forms_that_are_there(benchmark: ModuleType):
    cells = [
        {"arm": "recipe", "seed": seed, "scores": {"1": {"dice": dice, "best threshold": dice + 0.01}}}
        for seed, dice in ((0, 0.7), (1, 0.8))
    ]
    summary = benchmark.summarise(cells)
    assert summary["recipe"]["1"]["dice"] == pytest.approx(0.75)
    assert summary["recipe"]["1"]["seeds"] == {"0": 0.7, "1": 0.8}
    assert "| recipe | 0.750 |  |  | 0.760 | 0.700, 0.800 |" in benchmark.format_table(summary)
