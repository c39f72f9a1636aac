"""Augmentation as it was in version 0.1: what `benchmarks/augmentation.py` compares with, and tests take for the truth.

One picture after the other would give the same; the pictures of a batch share nothing but the pass over them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def draw_warp(generator: torch.Generator, shape: torch.Size, strength: float) -> Tensor:
    """(N, H, W, 2) where every pixel comes from, x and y in -1..1."""
    n, _, height, width = shape
    angle = draw(generator, n, -0.26, 0.26) * strength
    scale_y = torch.exp(draw(generator, n, -0.22, 0.22) * strength)
    scale_x = torch.exp(draw(generator, n, -0.12, 0.12) * strength) * scale_y
    shear = draw(generator, n, -0.08, 0.08) * strength
    aspect = width / height
    cos, sin = angle.cos(), angle.sin()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cos * scale_x, (-sin / aspect + shear) * scale_x
    theta[:, 1, 0], theta[:, 1, 1] = sin * aspect * scale_y, cos * scale_y
    theta[:, 0, 2] = draw(generator, n, -0.15, 0.15) * strength
    theta[:, 1, 2] = draw(generator, n, -0.15, 0.15) * strength
    grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
    field = torch.randn(n, 2, 5, 6, generator=generator) * 0.022 * strength
    smooth = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
    return grid + smooth.permute(0, 2, 3, 1)


def move_images(images: Tensor, grid: Tensor) -> Tensor:
    """(N, C, H, W) of floats; what comes from outside is 0."""
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def move_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """(N, s H, s W) label ids, s pixels per pixel of the image; what comes from outside is background."""
    if labels.shape[-1] != grid.shape[2]:
        finer = F.interpolate(grid.permute(0, 3, 1, 2), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        grid = finer.permute(0, 2, 3, 1)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved[:, 0].long()


def change_contrast(unit: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Gamma, gain and offset of the foreground, (N, C, H, W) in [0, 1]."""
    n = len(unit)
    gamma = torch.exp(draw(generator, n, -0.4, 0.4) * strength)
    gain = 1 + draw(generator, n, -0.18, 0.18)[:, None, None, None] * strength
    offset = draw(generator, n, -0.09, 0.09)[:, None, None, None] * strength
    return (unit.clamp_min(1e-4) ** gamma[:, None, None, None]) * gain + offset * (unit > 0.02)


def blur(unit: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """A mean over 3 x 3 pixels of some samples."""
    chosen = (draw(generator, len(unit), 0, 1) < 0.15 * strength)[:, None, None, None]
    return torch.where(chosen, F.avg_pool2d(unit, 3, stride=1, padding=1), unit)


def add_noise(unit: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """White noise, of another level in each sample."""
    white = torch.randn(unit.shape, generator=generator)
    return unit + white * (draw(generator, len(unit), 0, 0.05) * strength)[:, None, None, None]


def simulate_bias_field(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Smooth multiplicative shading, (N, C, H, W) in [-1, 1]."""
    if strength == 0:
        return images
    n, _, height, width = images.shape
    coarse = torch.randn(n, 1, 3, 4, generator=generator)
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
    amount = torch.rand(n, 1, 1, 1, generator=generator) * strength
    return ((images + 1) / 2 * torch.exp(field * amount)).clamp(0, 1) * 2 - 1


def augment(
    images: Tensor, labels: Tensor, generator: torch.Generator, strength: float = 1.0, bias_field: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Images (N, C, H, W) in [-1, 1] and labels (N, s H, s W), augmented."""
    grid = draw_warp(generator, images.shape, strength)
    unit = (move_images(images + 1, grid) / 2).clamp(0, 1)
    unit = add_noise(blur(change_contrast(unit, generator, strength), generator, strength), generator, strength)
    return simulate_bias_field(unit.clamp(0, 1) * 2 - 1, generator, bias_field), move_labels(labels, grid)


def compute_area_shares(labels: Tensor, count: int, supersampling: int) -> Tensor:
    """(N, s H, s W) label ids -> (N, count, H, W) shares of each pixel that a structure covers."""
    ids = torch.arange(1, count + 1)[None, :, None, None]
    return F.avg_pool2d((labels[:, None] == ids).float(), supersampling)


def draw(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """(count,) uniform numbers."""
    return torch.rand(count, generator=generator) * (high - low) + low
