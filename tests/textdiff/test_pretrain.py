"""The denoiser's pre-training: crops, timesteps, the folder it writes, and a run that was stopped."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from progidiff.errors import CancelledError, RequestError
from progidiff.textdiff.pretrain import (
    CropOptions,
    DenoiserConfig,
    DenoiserWidths,
    draw_crops,
    draw_timesteps,
    read_rgb,
    run_pretrain,
)
from progidiff.training.loop import Schedule
from progidiff.training.settings import check_config

TINY = DenoiserConfig(
    schedule=Schedule(steps=4, warmup=1, checkpoint_every=1),
    crops=CropOptions(size=8, per_step=2),
    widths=DenoiserWidths(channels=(8, 16), norm_groups=4),
    precision="fp32",
    log_every=1,
    tensorboard=False,
)


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for n in range(2):
        paths.append(tmp_path / f"p{n}.png")
        Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_folder_is_one_that_diffusers_opens(pictures: list[Path], tmp_path: Path) -> None:
    from diffusers import DDPMPipeline

    figures = run_pretrain(pictures, tmp_path / "denoiser", tmp_path / "work", TINY)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "denoiser")
    assert figures["parameters"] == sum(p.numel() for p in pipeline.unet.parameters())
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    with torch.no_grad():
        found = pipeline.unet(torch.zeros(1, 3, 16, 24), 50).sample
    assert found.shape == (1, 3, 16, 24)
    assert float(found.abs().max()) > 0


def test_a_stopped_run_ends_as_the_one_that_was_not(pictures: list[Path], tmp_path: Path) -> None:
    whole = run_pretrain(pictures, tmp_path / "whole", tmp_path / "work1", TINY)
    asked = iter([False, False, True])
    with pytest.raises(CancelledError, match="at step 2 of 4"):
        run_pretrain(pictures, tmp_path / "stopped", tmp_path / "work2", TINY, is_cancelled=lambda: next(asked))
    assert not (tmp_path / "stopped").exists()
    run_pretrain(pictures, tmp_path / "stopped", tmp_path / "work2", TINY)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert np.isfinite(whole["loss"])


def test_crops_hold_the_picture_at_the_working_scale() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).repeat(3, 64, 1)  # brightness grows to the right, one per pixel
    options = CropOptions(size=16, scale=0.5, zoom=1.0, color=0.0, per_step=8)
    crops = draw_crops([ramp], options, torch.Generator().manual_seed(0))
    assert crops.shape == (8, 3, 16, 16)
    for crop in crops:
        across, down = (crop.mean(dim=(0, axis)).diff().abs().mean() * 127.5 for axis in (1, 2))
        # Turned or not, one axis is the ramp's, at half the resolution.
        assert max(float(across), float(down)) == pytest.approx(2.0, abs=0.1)
        assert min(float(across), float(down)) == pytest.approx(0.0, abs=1e-3)


def test_timesteps_are_mostly_small() -> None:
    options = CropOptions(low_timesteps=100, low_share=0.75)
    times = draw_timesteps(20_000, options, torch.Generator().manual_seed(0))
    assert int(times.min()) >= 0
    assert int(times.max()) < 1000
    assert float((times < 100).float().mean()) == pytest.approx(0.75 + 0.25 * 0.1, abs=0.02)


def test_bad_input_is_named(pictures: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "note.png"
    text.write_text("no picture", encoding="utf-8")
    with pytest.raises(RequestError, match="cannot be read as a picture"):
        read_rgb(text)
    with pytest.raises(RequestError, match="no pictures"):
        run_pretrain([], tmp_path / "d", tmp_path / "w", TINY)
    with pytest.raises(RequestError, match="smaller than the largest crop, 167 pixels"):
        run_pretrain(pictures, tmp_path / "d", tmp_path / "w", replace(TINY, crops=CropOptions(size=64)))
    (tmp_path / "d").mkdir()
    with pytest.raises(RequestError, match="exists"):
        run_pretrain(pictures, tmp_path / "d", tmp_path / "w", TINY)


def test_settings_that_do_not_fit_together_are_named() -> None:
    with pytest.raises(RequestError, match="multiple of 8 for 4 levels"):
        check_config(DenoiserConfig(crops=CropOptions(size=20)))
    with pytest.raises(RequestError, match="multiples of widths.norm_groups"):
        check_config(DenoiserConfig(widths=DenoiserWidths(channels=(12, 16))))
