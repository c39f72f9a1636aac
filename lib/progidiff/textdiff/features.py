"""Frozen diffusion features: noise a picture a little, let a denoiser look at it, keep what its decoder saw.

After Baranchuk et al. (arXiv 2112.03126) and TextDiff (arXiv 2407.05323): activations of some decoder blocks at some small
timesteps, the timesteps of a block concatenated on channels. The noise is one fixed tensor per draw, repeated over space, so that
what a pixel's features are does not depend on the size of the picture it lies in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

from torch import Tensor, nn

from progidiff.errors import RequestError
from progidiff.training.config import Range

logger = logging.getLogger(__name__)

NOISE_SIDE = 256
"""Side of the noise that is repeated over space, in pixels of the denoiser's input."""


@dataclass(frozen=True)
class FeatureOptions:
    """Which activations are features.

    Attributes:
        timesteps: How much noise; small ones keep the picture. 0..999 for the usual 1000 steps.
        blocks: Decoder blocks, 0 is the coarsest.
        draws: Noises that serving averages over (and training sees).
        jitter: Draws after the first shift each timestep by up to this share of it, so that they differ in timestep too.
        seed: Of the noise.
        scale: Working pixels per picture pixel along a side; None to fit the longest side to `size`.
        size: Longest side of the working picture if `scale` is None.
        picture: Add the working picture itself to the finest block's features: the denoiser sees a noised one.
    """

    timesteps: tuple[int, ...] = (50, 150, 250)
    blocks: tuple[int, ...] = (0, 1, 2, 3)
    draws: Annotated[int, Range(1, 64)] = 1
    jitter: Annotated[float, Range(0, 0.5)] = 0.0
    seed: Annotated[int, Range(0, 2**62)] = 0
    scale: Annotated[float | None, Range(0.01, 8)] = 0.5
    size: Annotated[int | None, Range(16, 16384)] = None
    picture: bool = False

    def check(self) -> None:
        """Check what must fit together.

        Raises:
            RequestError: if there is nothing to extract, or neither or both of `scale` and `size` are given.
        """
        if not self.timesteps or not self.blocks or len(set(self.blocks)) < len(self.blocks) or list(self.blocks) != sorted(self.blocks):
            raise RequestError("features.timesteps and features.blocks need at least one number each, blocks ascending without repetition.")
        if min(self.timesteps) < 0:
            raise RequestError(f"features.timesteps must not be negative, got {min(self.timesteps)}.")
        if (self.scale is None) == (self.size is None):
            raise RequestError("Give one of features.scale (working pixels per picture pixel) and features.size (longest side); the other is null.")


class FeatureExtractor(Protocol):
    """Anything that turns pictures into feature maps, coarse first.

    Attributes:
        channels: C of each map.
        strides: Picture pixels per feature, of each map; every one a multiple of the next.
        options: Resolution and noise.
        key: Hash of weights and options: equal keys give equal features.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    options: FeatureOptions
    key: str

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """(N, 3, H, W) floats in -1..1, H and W multiples of the largest stride -> (N, C_b, H / s_b, W / s_b) each, coarse first."""
        ...


class DiffusionFeatures:
    """Features of a diffusers denoiser: `UNet2DModel` in pixel space, or `UNet2DConditionModel` with a VAE in latent space.

    Attributes:
        folder: Where the weights lie.
        source: Folder or hub id as it was given.
        channels, strides, options, key: See `FeatureExtractor`.
        digest: Of the weights and configurations alone.
    """

    def __init__(
        self, unet: nn.Module, scheduler: Any, options: FeatureOptions, *, vae: Any = None, context: Tensor | None = None, digest: str
    ) -> None:
        raise NotImplementedError

    @classmethod
    def load(cls, source: str | Path, options: FeatureOptions | None = None, device: str | None = None) -> DiffusionFeatures:
        """Load a diffusers folder or hub id.

        Raises:
            ModelError: if it is no denoiser this can read, or a file is missing or damaged.
            RequestError: if a block or timestep of the options does not exist in it.
        """
        raise NotImplementedError

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`; computed without gradients."""
        raise NotImplementedError
