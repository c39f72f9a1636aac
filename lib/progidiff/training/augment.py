"""Augmentation in named parts; each draws its parameters, one set per sample, and applies them.

Never mirrors: left and right are part of the question. The parts draw one after the other from the same generator, so
that the same state gives the same augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def augment(
    images: Tensor, labels: Tensor, generator: torch.Generator, strength: float = 1.0, bias_field: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Random affine, intensity, blur, noise and shading.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N, s H, s W) label ids, s pixels per pixel of the image.
        generator: Source of randomness; the same state gives the same augmentation.
        strength: 0 changes nothing, 1 is the default recipe.
        bias_field: See `simulate_bias_field`.

    Returns:
        Images and labels of the same shapes.
    """
    shape = images.shape
    warp = Warp.draw(generator, shape, strength)
    unit = (warp.move_images(images + 1) / 2).clamp(0, 1)
    unit = Contrast.draw(generator, shape, strength).apply(unit)
    unit = Blur.draw(generator, shape, strength).apply(unit)
    unit = Noise.draw(generator, shape, strength).apply(unit)
    return simulate_bias_field(unit.clamp(0, 1) * 2 - 1, generator, bias_field), warp.move_labels(labels)


def simulate_bias_field(images: Tensor, generator: torch.Generator, strength: float) -> Tensor:
    """Smooth multiplicative shading, as receive coils and field inhomogeneity cause in MR.

    Args:
        images: (N, C, H, W) in [-1, 1]; the channels of a sample share one field.
        generator: Source of randomness.
        strength: Standard deviation of the field's logarithm at its strongest; 0 changes nothing and draws nothing.
    """
    if strength == 0:
        return images
    return Shading.draw(generator, images.shape, strength).apply((images + 1) / 2).clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class Warp:
    """Rotation, scale, shear, shift and a smooth deformation.

    Attributes:
        grid: (N, H, W, 2) where every pixel comes from, x and y in -1..1.
    """

    grid: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, shape: torch.Size, strength: float) -> Warp:
        """Up to 15 degrees, a quarter in size, a tenth in aspect and 15 % of half the picture at strength 1."""
        n, _, height, width = shape
        angle = _draw(generator, n, -0.26, 0.26) * strength
        scale_y = torch.exp(_draw(generator, n, -0.22, 0.22) * strength)
        scale_x = torch.exp(_draw(generator, n, -0.12, 0.12) * strength) * scale_y
        shear = _draw(generator, n, -0.08, 0.08) * strength
        aspect = width / height
        cos, sin = angle.cos(), angle.sin()
        theta = torch.zeros(n, 2, 3)
        theta[:, 0, 0], theta[:, 0, 1] = cos * scale_x, (-sin / aspect + shear) * scale_x
        theta[:, 1, 0], theta[:, 1, 1] = sin * aspect * scale_y, cos * scale_y
        theta[:, 0, 2] = _draw(generator, n, -0.15, 0.15) * strength
        theta[:, 1, 2] = _draw(generator, n, -0.15, 0.15) * strength
        grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
        # A coarse field of displacements, at most a few pixels.
        field = torch.randn(n, 2, 5, 6, generator=generator) * 0.022 * strength
        smooth = F.interpolate(field, size=(height, width), mode="bicubic", align_corners=True)
        return cls(grid + smooth.permute(0, 2, 3, 1))

    def move_images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of floats; what comes from outside is 0."""
        return F.grid_sample(images, self.grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def move_labels(self, labels: Tensor) -> Tensor:
        """(N, s H, s W) label ids, s pixels per pixel of the image; what comes from outside is background."""
        grid = self.grid
        if labels.shape[-1] != grid.shape[2]:
            finer = F.interpolate(
                grid.permute(0, 3, 1, 2), size=labels.shape[-2:], mode="bilinear", align_corners=False
            )
            grid = finer.permute(0, 2, 3, 1)
        moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
        return moved[:, 0].long()


@dataclass(frozen=True)
class Contrast:
    """Contrast and brightness of the foreground.

    Attributes:
        gamma, gain, offset: (N, 1, 1, 1).
    """

    gamma: Tensor
    gain: Tensor
    offset: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, shape: torch.Size, strength: float) -> Contrast:
        """Gamma 0.67 to 1.5, gain within 18 % and offset within 9 % of the window at strength 1."""
        n = shape[0]
        gamma = torch.exp(_draw(generator, n, -0.4, 0.4) * strength)
        gain = 1 + _draw(generator, n, -0.18, 0.18)[:, None, None, None] * strength
        offset = _draw(generator, n, -0.09, 0.09)[:, None, None, None] * strength
        return cls(gamma[:, None, None, None], gain, offset)

    def apply(self, unit: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1]; black stays black."""
        return (unit.clamp_min(1e-4) ** self.gamma) * self.gain + self.offset * (unit > 0.02)


@dataclass(frozen=True)
class Blur:
    """A mean over 3 x 3 pixels of some samples.

    Attributes:
        chosen: (N, 1, 1, 1) bool.
    """

    chosen: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, shape: torch.Size, strength: float) -> Blur:
        """15 % of the samples at strength 1."""
        return cls((_draw(generator, shape[0], 0, 1) < 0.15 * strength)[:, None, None, None])

    def apply(self, unit: Tensor) -> Tensor:
        """(N, C, H, W)."""
        return torch.where(self.chosen, F.avg_pool2d(unit, 3, stride=1, padding=1), unit)


@dataclass(frozen=True)
class Noise:
    """White noise, of another level in each sample.

    Attributes:
        values: (N, C, H, W).
    """

    values: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, shape: torch.Size, strength: float) -> Noise:
        """A standard deviation of up to 5 % of the window at strength 1."""
        white = torch.randn(shape, generator=generator)
        return cls(white * (_draw(generator, shape[0], 0, 0.05) * strength)[:, None, None, None])

    def apply(self, unit: Tensor) -> Tensor:
        """(N, C, H, W)."""
        return unit + self.values


@dataclass(frozen=True)
class Shading:
    """A smooth gain.

    Attributes:
        gain: (N, 1, H, W).
    """

    gain: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, shape: torch.Size, strength: float) -> Shading:
        """`strength` is the largest standard deviation of the gain's logarithm."""
        n, _, height, width = shape
        coarse = torch.randn(n, 1, 3, 4, generator=generator)
        field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        amount = torch.rand(n, 1, 1, 1, generator=generator) * strength
        return cls(torch.exp(field * amount))

    def apply(self, unit: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1]."""
        return unit * self.gain


def _draw(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """(count,) uniform numbers."""
    return torch.rand(count, generator=generator) * (high - low) + low
