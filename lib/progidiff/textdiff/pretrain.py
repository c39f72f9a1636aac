"""`progidiff textdiff pretrain`: a small pixel-space denoiser, trained without labels on pictures like those to be
segmented.

It is a `diffusers.UNet2DModel` beside a `DDPMScheduler`, the folder format of any unconditional diffusion model. What
is wanted of it are its decoder's activations at small timesteps (Baranchuk et al., arXiv 2112.03126), so that is where
most of its training goes; it was not made for drawing pictures from noise. Without attention it takes any size, so it
learns on small crops.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import RequestError
from progidiff.images.pictures import PICTURE_FORMATS
from progidiff.storage.atomic import atomic_folder
from progidiff.training.loop import LoopConfig, Report, RunConfig, Schedule, run_loop
from progidiff.training.settings import Range

SHARD_SIZE = "15MB"
"""Largest file of the weights; several hosts of source code refuse larger ones."""


@dataclass(frozen=True)
class DenoiserWidths:
    """Sizes of a fresh denoiser.

    Attributes:
        channels: Features per level, full resolution first.
        layers: Residual blocks per level (the decoder has one more).
        norm_groups: Of the group normalisation.
    """

    channels: tuple[int, ...] = (32, 64, 128, 256)
    layers: Annotated[int, Range(1, 8)] = 1
    norm_groups: Annotated[int, Range(1, 64)] = 8


@dataclass(frozen=True)
class CropOptions:
    """What a step sees.

    Attributes:
        scale: Working resolution: pixels of the denoiser per pixel of the picture, along a side.
        size: Side of a crop at the working resolution; a multiple of 2 to the power of (levels - 1).
        per_step: Crops of a micro-batch.
        zoom: Crops are taken 1/zoom to zoom times as large, and resized.
        color: Strength of random gains and offsets per colour channel: staining and lamps differ.
        low_timesteps: Timesteps below this one count as small.
        low_share: Share of the crops noised to a small timestep.
    """

    scale: Annotated[float, Range(0.01, 4)] = 0.5
    size: Annotated[int, Range(8, 1024)] = 64
    per_step: Annotated[int, Range(1, 4096)] = 16
    zoom: Annotated[float, Range(1, 4)] = 1.3
    color: Annotated[float, Range(0, 1)] = 0.15
    low_timesteps: Annotated[int, Range(1, 1000)] = 400
    low_share: Annotated[float, Range(0, 1)] = 0.8


@dataclass(frozen=True)
class DenoiserConfig(RunConfig):
    """A pre-training: its length, its crops and the network.

    Attributes:
        schedule: Length and rate.
        crops: What a step sees.
        widths: The network.
    """

    schedule: Schedule = field(
        default_factory=lambda: Schedule(steps=4000, learning_rate=5e-4, warmup=200, checkpoint_every=200)
    )
    crops: CropOptions = field(default_factory=CropOptions)
    widths: DenoiserWidths = field(default_factory=DenoiserWidths)

    def check(self) -> None:
        """Check what must fit together.

        Raises:
            RequestError: if a crop cannot be halved as often as the network has levels, or its widths do not divide
                into groups.
        """
        halved = 2 ** (len(self.widths.channels) - 1)
        if self.crops.size % halved:
            raise RequestError(
                f"crops.size must be a multiple of {halved} for "
                f"{len(self.widths.channels)} levels, got {self.crops.size}."
            )
        uneven = [c for c in self.widths.channels if c % self.widths.norm_groups]
        if uneven:
            raise RequestError(
                f"widths.channels must be multiples of widths.norm_groups ({self.widths.norm_groups}), got {uneven[0]}."
            )


def run_pretrain(
    pictures: Sequence[Path],
    target: Path,
    work: Path,
    config: DenoiserConfig | None = None,
    device: str = "cpu",
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train a denoiser and write it as a diffusers folder.

    Args:
        pictures: RGB images (other modes are converted), all of the same scale; labels are not looked at.
        target: Folder to make; it must not exist.
        work: Checkpoints and curves; the same call continues a run that was stopped.
        config: Settings.
        device: Of the training.
        is_cancelled: Asked before every step.
        report: Receives the log entries.

    Returns:
        {"loss": last smoothed loss, "steps": ..., "pictures": count, "parameters": count}.

    Raises:
        RequestError: if there are no pictures, one is smaller than a crop, or `target` exists.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or DenoiserConfig()
    if target.exists():
        raise RequestError(f"'{target}' exists; give a folder that does not, nothing is overwritten.")
    images = _read_large_enough(pictures, config.crops)
    unet, scheduler = _build_denoiser(config, device)
    settings = {"crops": asdict(config.crops), "widths": asdict(config.widths), "pictures": [p.name for p in pictures]}
    last: dict[str, Any] = {}

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        crops = config.crops
        clean = draw_crops(images, crops, generator).to(device)
        times = draw_timesteps(len(clean), crops, generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        found = unet(scheduler.add_noise(clean, noise, times), times).sample
        errors = (found.float() - noise).square().mean(dim=(1, 2, 3))
        low = times < crops.low_timesteps
        figures = {"error_low": float(errors.detach()[low].mean())} if bool(low.any()) else {}
        return errors.mean(), figures

    def keep(entry: dict[str, Any]) -> None:
        last.update(entry)
        if report is not None:
            report(entry)

    loop = LoopConfig.of(config.schedule, config)
    run_loop({"unet": unet}, compute_loss, loop, work, is_cancelled=is_cancelled, report=keep, settings=settings)
    write_denoiser(unet, scheduler, target)
    return {
        "loss": last.get("loss"),
        "error_low": last.get("error_low"),
        "steps": config.schedule.steps,
        "pictures": len(images),
        "parameters": sum(p.numel() for p in unet.parameters()),
    }


def _read_large_enough(pictures: Sequence[Path], crops: CropOptions) -> list[Tensor]:
    """The pictures, each at least as large as the largest crop."""
    largest = int(np.ceil(crops.size * crops.zoom / crops.scale))
    images = [read_rgb(p) for p in pictures]
    small = [p for p, image in zip(pictures, images, strict=True) if min(image.shape[1:]) < largest]
    if not images or small:
        what = (
            f"'{small[0]}' is smaller than the largest crop, {largest} pixels"
            if small
            else "There are no pictures to learn from"
        )
        raise RequestError(f"{what}; give larger ones, or set crops.size, crops.zoom or crops.scale.")
    return images


def _build_denoiser(config: DenoiserConfig, device: str) -> tuple[Any, Any]:
    """A fresh `UNet2DModel` and its `DDPMScheduler`."""
    from diffusers import DDPMScheduler, UNet2DModel

    torch.manual_seed(config.seed)
    widths = config.widths
    unet = UNet2DModel(
        sample_size=config.crops.size,
        in_channels=3,
        out_channels=3,
        block_out_channels=widths.channels,
        layers_per_block=widths.layers,
        down_block_types=("DownBlock2D",) * len(widths.channels),
        up_block_types=("UpBlock2D",) * len(widths.channels),
        norm_num_groups=widths.norm_groups,
        add_attention=False,
    ).to(device)
    return unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")


def read_rgb(path: Path) -> Tensor:
    """A picture as (3, H, W) uint8.

    Raises:
        RequestError: if it is no picture.
    """
    try:
        with Image.open(path, formats=PICTURE_FORMATS) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except OSError as err:
        raise RequestError(f"'{path}' cannot be read as a picture ({err}); PNG, JPEG and TIFF can.") from err


def draw_crops(images: Sequence[Tensor], options: CropOptions, generator: torch.Generator) -> Tensor:
    """Crops of random pictures, turned, mirrored, zoomed and tinted.

    Args:
        images: (3, H, W) uint8 each.
        options: Sizes and strengths.
        generator: Source of all randomness.

    Returns:
        (N, 3, size, size) floats, about -1..1.
    """
    crops = []
    for _ in range(options.per_step):
        image = images[int(torch.randint(len(images), (), generator=generator))]
        zoom = options.zoom ** (2 * float(torch.rand((), generator=generator)) - 1)
        side = max(1, round(options.size * zoom / options.scale))
        top, left = (int(torch.randint(n - side + 1, (), generator=generator)) for n in image.shape[1:])
        crop = image[:, top : top + side, left : left + side].float()[None] / 127.5 - 1
        crop = F.interpolate(
            crop, size=(options.size, options.size), mode="bilinear", antialias=True, align_corners=False
        )[0]
        turns, mirrored = (int(v) for v in torch.randint(4, (2,), generator=generator))
        crop = torch.rot90(crop, turns, (1, 2))
        crops.append(crop.flip(2) if mirrored % 2 else crop)
    batch = torch.stack(crops)
    gain, offset = (options.color * (2 * torch.rand((2, len(batch), 3, 1, 1), generator=generator) - 1)).unbind(0)
    return batch * (1 + gain) + offset


def draw_timesteps(count: int, options: CropOptions, generator: torch.Generator) -> Tensor:
    """(count,) timesteps of 0..999, `low_share` of them below `low_timesteps`."""
    low = torch.rand(count, generator=generator) < options.low_share
    drawn = torch.rand(count, generator=generator)
    return torch.where(low, drawn * options.low_timesteps, drawn * 1000).long()


def write_denoiser(
    unet: Any, scheduler: Any, target: Path, half: bool = True, extra: Mapping[str, str] | None = None
) -> None:
    """Write the folder, in half precision if `half`, by one rename; `extra` are texts by file name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as scratch:
        (unet.half() if half else unet).save_pretrained(scratch / "unet", max_shard_size=SHARD_SIZE)
        scheduler.save_pretrained(scratch / "scheduler")
        index = {
            "_class_name": "DDPMPipeline",
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        }
        (scratch / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        for name, text in (extra or {}).items():
            (scratch / name).write_text(text, encoding="utf-8")
