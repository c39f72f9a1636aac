"""Figures of readers' variety, and `benchmarks/readers.py` from end to end on a few small nodules."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from progidiff.training.reader_masks import load_reader_masks
from support.servers import ROOT, load_script


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("readers")


def disc(radius: float, center: tuple[float, float] = (48, 48)) -> np.ndarray:
    y, x = np.mgrid[:96, :96]
    return np.hypot(y - center[0], x - center[1]) < radius


DRAWN = np.stack([disc(8), disc(10), disc(12), np.zeros((96, 96), bool)])


def test_answers_that_are_the_readers_own_are_at_distance_nothing(readers: ModuleType):
    assert readers.score(DRAWN, DRAWN) == pytest.approx({"ged": 0, "matched_iou": 1, "consensus_dice": 1})


def test_each_reader_is_matched_as_often_as_any_other(readers: ModuleType):
    twice = np.concatenate([DRAWN, DRAWN])
    assert readers.compute_matched_iou(twice, DRAWN) == 1
    assert readers.compute_matched_iou(np.repeat(DRAWN[:1], 8, 0), DRAWN) == pytest.approx(
        readers.compute_iou(DRAWN[:1], DRAWN).mean()
    )


def test_without_variety_the_distance_is_larger(readers: ModuleType):
    majority = np.repeat((DRAWN.mean(0) >= 0.5)[None], 4, 0)
    assert readers.compute_ged(majority, DRAWN) > 0.2
    assert readers.compute_consensus_dice(majority, DRAWN) == 1


def test_what_is_outlined_beyond_the_middle_counts_as_missed(readers: ModuleType):
    network = readers.create(0)
    sets, proposals = readers.draw(network, np.zeros((2, 96, 96), np.uint8), 4, 1)
    assert sets.shape == proposals.shape == (2, 4, 96, 96)
    outside = np.ones((96, 96), bool)
    outside[16:80, 16:80] = False
    assert not sets[..., outside].any()
    assert not proposals[..., outside].any()


@pytest.fixture
def nodules(tmp_path: Path) -> Path:
    """Ten patients with two slices each, four readers of growing courage."""
    rng = np.random.default_rng(0)
    images, masks, key = [], [], []
    for patient in range(10):
        for z in range(2):
            radius = float(rng.uniform(6, 12))
            images.append(np.clip(disc(radius) * 120 + rng.normal(60, 8, (96, 96)), 0, 255).astype(np.uint8))
            masks.append(np.stack([disc(radius + r - 1) for r in range(4)]))
            key.append((f"p{patient}", "0", str(z)))
    path = tmp_path / "nodules.npz"
    np.savez(path, images=np.stack(images), masks_packed=np.packbits(np.stack(masks), axis=-1), key=np.array(key))
    return path


def test_a_seed_is_trained_once_and_shown(
    readers: ModuleType, nodules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, picture = tmp_path / "out.json", tmp_path / "picture.png"
    command = ["readers.py", "--readers", str(nodules), "--work", str(tmp_path / "work"), "--out", str(out)]
    command += ["--picture", str(picture), "--seeds", "0", "--encoder-steps", "2", "--denoiser-steps", "2"]
    monkeypatch.setattr(sys, "argv", [*command, "--windows", "2", "--samples", "2", "--num-proposals", "4"])
    readers.main()
    report = json.loads(out.read_text())
    assert [run["answer"] for run in report["runs"]] == ["level sets, start", "proposals", "level sets, longer"]
    assert report["patients"] == {"training": 7, "test": 2}
    assert report["floors"]["readers' majority"]["consensus_dice"] == 1
    assert picture.stat().st_size > 1000
    weights = sorted((tmp_path / "work").glob("*/network.safetensors"))
    times = [path.stat().st_mtime_ns for path in weights]
    readers.main()
    assert [path.stat().st_mtime_ns for path in weights] == times
    assert json.loads(out.read_text())["runs"] == report["runs"]


def test_the_denoiser_alone_is_trained_after_the_encoder(readers: ModuleType, nodules: Path, tmp_path: Path):
    masks = load_reader_masks(nodules)
    options = argparse.Namespace(encoder_steps=2, denoiser_steps=2, work=tmp_path, windows=2, samples=2, steepness=4.0)
    found = readers.train_seed(0, masks, options)
    start, proposals = (dict(found[name][0].named_parameters()) for name in ("start", "proposals"))
    changed = {name.split(".")[0] for name in start if not (start[name] == proposals[name]).all()}
    assert changed & {"unet", "zero"}
    assert not changed & {"condition", "encoder", "query", "sharpen"}
