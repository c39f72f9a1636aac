"""Generated pictures that look a little like stained tissue, their masks and sentences, and a denoiser of toy width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 96
SENTENCES = {"left": "The nuclei density in the left is high.", "right": "The nuclei density in the right is high."}


def draw_tissue(
    seed: int, side: str = "left", size: tuple[int, int] = (SIDE, SIDE), count: int = 14
) -> tuple[np.ndarray, np.ndarray]:
    """Dark ellipses on a bright pink ground, most of them on one side.

    Returns:
        uint8 (H, W, 3), and the mask as uint8 (H, W) of 0 and 1.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    picture = np.array([225.0, 170.0, 205.0]) + rng.normal(0, 8, (height, width, 3))
    mask = np.zeros((height, width), np.uint8)
    for _ in range(count):
        near = rng.random() < 0.85
        share = rng.uniform(0.05, 0.45) if near == (side == "left") else rng.uniform(0.55, 0.95)
        cy, cx = rng.uniform(0.08, 0.92) * height, share * width
        ry, rx = rng.uniform(4, 8, 2)
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        mask[inside] = 1
        picture[inside] = np.array([95.0, 60.0, 140.0]) + rng.normal(0, 12, (int(inside.sum()), 3))
    return picture.clip(0, 255).astype(np.uint8), mask


def write_tissue(folder: Path, names: dict[str, str], drawn: Path) -> None:
    """Pictures and ``text.csv`` into a folder, masks into another one.

    Args:
        folder: Of the pictures.
        names: File name -> the side where the nuclei are; "" for a picture without a sentence.
        drawn: Of the masks, ``<name>.png`` with 0 and 1.
    """
    drawn.mkdir(parents=True, exist_ok=True)
    lines = ["image,text"]
    for seed, (name, side) in enumerate(names.items()):
        picture, mask = draw_tissue(seed, side or "left")
        Image.fromarray(picture).save(folder / name)
        Image.fromarray(mask).save(drawn / f"{Path(name).stem}.png")
        if side:
            lines.append(f"{name},{SENTENCES[side]}")
    (folder / "text.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def build_denoiser(folder: Path, seed: int = 0) -> Path:
    """A diffusers folder with a pixel-space denoiser of toy width and random weights."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        norm_num_groups=4,
        add_attention=False,
    )
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=1000)).save_pretrained(folder)
    return folder
