"""Augmentation of a batch where it is computed on: parameters are drawn on the CPU, pictures are changed on the device.

What is drawn is one small set of numbers per sample (`Augmentation.draw`), so that a run is the same wherever it is
computed and drawing can be done ahead; only the white noise is made on the device, from a seed that is drawn. Applying
it makes two passes of `grid_sample` over bytes, images and labels, and waits for nothing. A displacement is a product
of three small matrices, rows x coefficients x columns: rotation, scale, shear, shift and the smooth field at once.

Never mirrors: left and right are part of the question.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.training.device_batches import move

BENDS = (5, 6)
"""Rows and columns of the coarse field of displacements."""

SHADES = (3, 4)
"""Rows and columns of the coarse field of a bias field."""

BLACK = 0.02
"""Intensities up to this one are background, whose brightness does not change."""


def augment(
    images: Tensor, labels: Tensor, generator: torch.Generator, strength: float = 1.0, bias_field: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Random affine, intensity, blur, noise and shading, of a batch that lies ready.

    Args:
        images: (N, C, H, W), bytes or floats in [-1, 1].
        labels: (N, s H, s W) label ids, s pixels per pixel of the image.
        generator: Source of randomness, on the CPU; the same state gives the same augmentation.
        strength: 0 changes nothing, 1 is the default recipe.
        bias_field: See `Tones.draw`.

    Returns:
        Images as floats in [-1, 1], and labels, of the same shapes.
    """
    height, width = images.shape[-2:]
    drawn = move(Augmentation.draw(generator, len(images), width / height, strength, bias_field), images.device)
    return drawn.apply_to_images(images), drawn.warp.move_labels(labels, height, width)


@dataclass(frozen=True)
class Warp:
    """Rotation, scale, shear, shift and a smooth deformation of N samples.

    Attributes:
        coefficients: (N, 2, 7, 8), where pixels come from, x and y in -1..1, as coefficients of the rows' and the
            columns' functions, see `_find_places`.
    """

    coefficients: Tensor

    @classmethod
    def draw(cls, generator: torch.Generator, count: int, aspect: float, strength: float) -> Warp:
        """Up to 15 degrees, a quarter in size, a tenth in aspect and 15 % of half the picture at strength 1.

        Args:
            generator: Source of randomness.
            count: N.
            aspect: Width over height of the pictures.
            strength: 0 moves nothing.
        """
        angle = _draw(generator, count, -0.26, 0.26) * strength
        scale_y = torch.exp(_draw(generator, count, -0.22, 0.22) * strength)
        scale_x = torch.exp(_draw(generator, count, -0.12, 0.12) * strength) * scale_y
        shear = _draw(generator, count, -0.08, 0.08) * strength
        cos, sin = angle.cos(), angle.sin()
        # Last row: as x or y of where a pixel goes; last column: a constant along x.
        found = torch.zeros(count, 2, BENDS[0] + 2, BENDS[1] + 2)
        found[:, 0, -1, -2], found[:, 0, -2, -1] = cos * scale_x, (-sin / aspect + shear) * scale_x
        found[:, 1, -1, -2], found[:, 1, -2, -1] = sin * aspect * scale_y, cos * scale_y
        found[:, 0, -1, -1] = _draw(generator, count, -0.15, 0.15) * strength
        found[:, 1, -1, -1] = _draw(generator, count, -0.15, 0.15) * strength
        # A coarse field of displacements, at most a few pixels.
        found[:, :, : BENDS[0], : BENDS[1]] = torch.randn(count, 2, *BENDS, generator=generator) * 0.022 * strength
        return cls(found)

    def find_places(self, height: int, width: int, supersampling: int = 1, part: slice = slice(None)) -> Tensor:
        """Where the pixels of a picture come from: (N, s H, s W, 2), x and y in -1..1.

        Args:
            height, width: Of the picture.
            supersampling: s; finer pixels lie between the others, along straight lines.
            part: Of the samples.
        """
        rows = _tabulate(height, BENDS[0], supersampling, self.coefficients.device)
        columns = _tabulate(width, BENDS[1], supersampling, self.coefficients.device)
        # `grid_sample` is fastest where x and y are planes of their own.
        return _combine(rows, self.coefficients[part], columns).permute(0, 2, 3, 1)

    def move_images(self, images: Tensor) -> Tensor:
        """(N, C, H, W) of floats or bytes -> floats on the same scale; what comes from outside is 0."""
        moved = torch.empty(images.shape, device=images.device)
        for part in _split(images):
            places = self.find_places(images.shape[-2], images.shape[-1], 1, part)
            moved[part] = F.grid_sample(images[part].float(), places, "bilinear", "zeros", align_corners=False)
        return moved

    def move_labels(self, labels: Tensor, height: int, width: int) -> Tensor:
        """(N, s H, s W) label ids, s pixels per pixel of an image of (H, W); what comes from outside is background."""
        moved = torch.empty_like(labels)
        for part in _split(labels):
            places = self.find_places(height, width, labels.shape[-1] // width, part)
            # Ids are whole numbers below 2**24, which floats hold exactly.
            pixels = labels[part, None].float()
            moved[part] = F.grid_sample(pixels, places, "nearest", "zeros", align_corners=False)[:, 0]
        return moved


@dataclass(frozen=True)
class Tones:
    """Contrast and brightness of the foreground, blur, white noise and smooth shading of N samples.

    Attributes:
        gamma, gain, offset: (N, 1, 1, 1).
        blurred: (B,) which samples are blurred.
        noise: (N, 1, 1, 1) standard deviation.
        noise_seed: Of the white noise.
        shade: (N, 1, 3, 4) logarithm of the gain on a coarse field; None for no shading.
    """

    gamma: Tensor
    gain: Tensor
    offset: Tensor
    blurred: Tensor
    noise: Tensor
    noise_seed: int
    shade: Tensor | None = None

    @classmethod
    def draw(cls, generator: torch.Generator, count: int, strength: float, bias_field: float = 0.0) -> Tones:
        """Parameters of N samples.

        At strength 1: gamma 0.67 to 1.5, gain within 18 % and offset within 9 % of the window, a mean over 3 x 3 pixels
        in 15 % of the samples, noise with a standard deviation of up to 5 % of the window.

        Args:
            generator: Source of randomness.
            count: N.
            strength: 0 changes nothing.
            bias_field: Standard deviation of a smooth gain's logarithm at its strongest, as receive coils and field
                inhomogeneity cause in MR; 0 changes nothing and draws nothing.
        """
        gamma = torch.exp(_draw(generator, count, -0.4, 0.4) * strength)
        gain = 1 + _draw(generator, count, -0.18, 0.18) * strength
        offset = _draw(generator, count, -0.09, 0.09) * strength
        blurred = (_draw(generator, count, 0, 1) < 0.15 * strength).nonzero()[:, 0]
        noise = _draw(generator, count, 0, 0.05) * strength
        seed = int(torch.randint(2**62, (1,), generator=generator))
        shade = None
        if bias_field:
            field = torch.randn(count, 1, *SHADES, generator=generator)
            shade = field * torch.rand(count, 1, 1, 1, generator=generator) * bias_field
        gamma, gain, offset, noise = (values[:, None, None, None] for values in (gamma, gain, offset, noise))
        return cls(gamma, gain, offset, blurred, noise, seed, shade)

    def apply(self, unit: Tensor) -> Tensor:
        """(N, C, H, W) in [0, 1] -> in [-1, 1]; black stays black. The channels of a sample share all but the noise."""
        toned = (unit.clamp_min(1e-4) ** self.gamma).mul_(self.gain).add_((unit > BLACK) * self.offset)
        if len(self.blurred):
            toned[self.blurred] = F.avg_pool2d(toned[self.blurred], 3, stride=1, padding=1)
        seeded = torch.Generator(unit.device).manual_seed(self.noise_seed)
        toned.addcmul_(torch.empty_like(toned).normal_(generator=seeded), self.noise).clamp_(0, 1)
        if self.shade is not None:
            toned.mul_(self.find_gain(*toned.shape[-2:])).clamp_(0, 1)
        return toned.mul_(2).sub_(1)

    def find_gain(self, height: int, width: int) -> Tensor:
        """The smooth gain of the shading, (N, 1, H, W)."""
        if self.shade is None:
            return torch.ones(len(self.gamma), 1, height, width, device=self.gamma.device)
        rows = _tabulate(height, SHADES[0], 1, self.shade.device)[:, : SHADES[0]]
        columns = _tabulate(width, SHADES[1], 1, self.shade.device)[:, : SHADES[1]]
        return torch.exp(_combine(rows, self.shade, columns))


@dataclass(frozen=True)
class Augmentation:
    """What is done to the N samples of a batch: first moved, then toned.

    Attributes:
        warp: How they move.
        tones: How their intensities change.
    """

    warp: Warp
    tones: Tones

    @classmethod
    def draw(
        cls, generator: torch.Generator, count: int, aspect: float, strength: float, bias_field: float = 0.0
    ) -> Augmentation:
        """Parameters of N samples, see `Warp.draw` and `Tones.draw`."""
        warp = Warp.draw(generator, count, aspect, strength)
        return cls(warp, Tones.draw(generator, count, strength, bias_field))

    def apply_to_images(self, images: Tensor) -> Tensor:
        """(N, C, H, W), bytes or floats in [-1, 1] -> floats in [-1, 1], where the parameters are."""
        if images.dtype == torch.uint8:
            return self.tones.apply(self.warp.move_images(images).div_(255))
        return self.tones.apply(self.warp.move_images(images + 1).div_(2))


def _combine(rows: Tensor, coefficients: Tensor, columns: Tensor) -> Tensor:
    """rows x coefficients x columns, in full precision: a place in bf16 would be off by a pixel."""
    with torch.autocast(coefficients.device.type, enabled=False):
        return rows @ coefficients @ columns.T


def _split(batch: Tensor) -> list[slice]:
    """A batch in one piece on a device; sample by sample on a CPU, whose caches hold a slice but no batch."""
    return [slice(None)] if batch.device.type != "cpu" else [slice(n, n + 1) for n in range(len(batch))]


@lru_cache(maxsize=64)
def _tabulate(count: int, bends: int, supersampling: int, device: torch.device) -> Tensor:
    """The functions along one axis that displacements are made of: supporting points, the place itself, a constant.

    Returns:
        (supersampling * count, bends + 2).
    """
    points = F.interpolate(torch.eye(bends)[None, :, :, None], size=(count, 1), mode="bicubic", align_corners=True)[
        0, :, :, 0
    ].T
    place = (2 * torch.arange(count) + 1) / count - 1
    table = torch.cat([points, place[:, None], torch.ones(count, 1)], dim=1)
    if supersampling > 1:
        table = F.interpolate(
            table.T[None, :, :, None], size=(supersampling * count, 1), mode="bilinear", align_corners=False
        )[0, :, :, 0].T
    return table.contiguous().to(device)


def _draw(generator: torch.Generator, count: int, low: float, high: float) -> Tensor:
    """(count,) uniform numbers."""
    return torch.rand(count, generator=generator) * (high - low) + low
