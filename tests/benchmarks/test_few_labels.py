"""The script on few labels: averaged features, and the table of what is done."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from progidiff.textdiff.data import PictureCase
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


def test_a_teacher_labels_only_the_pictures_without_a_label(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def answer(model: object, case: PictureCase, draws: list[int]) -> dict[int, torch.Tensor]:
        return {1: torch.tensor([[0.2, 0.6]])}

    monkeypatch.setattr(benchmark, "predict", answer)
    own = PictureCase("a", tmp_path / "a.png", tmp_path / "a-label.png")
    other = PictureCase("b", tmp_path / "b.png", tmp_path / "b-label.png")
    found = benchmark.add_answers(None, [own], [other], tmp_path / "answers")
    assert [case.name for case in found] == ["a", "a+1", "a+2", "a+3", "b"]
    assert {case.label for case in found[:-1]} == {own.label}
    assert np.asarray(Image.open(found[-1].label)).tolist() == [[0, 255]]
