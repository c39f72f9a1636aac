"""Masks as latents: the backbone's autoencoder, with statistics of masks instead of pictures.

A mask is encoded as a picture, -1 outside and +1 inside, in three equal channels, so that any Stable-Diffusion autoencoder
serves. Latents are standardised per channel by the statistics of *mask* latents: the 0.18215 of Stable Diffusion is a
constant of photographs and leaves mask latents far from unit variance.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MaskCodec(nn.Module):
    """Encode masks to standardised latents and decode them to probabilities.

    Args:
        vae: `diffusers.AutoencoderKL` or `AutoencoderTiny`.
        mean, std: Per-channel statistics of mask latents, c values each; see `fit_statistics`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, mean: Iterable[float] | None = None, std: Iterable[float] | None = None) -> None:
        super().__init__()
        self.vae = vae
        channels = vae.config.latent_channels
        self.register_buffer("mean", torch.tensor(list(mean) if mean is not None else [0.0] * channels).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std) if std is not None else [1.0] * channels).view(1, -1, 1, 1))
        self.to(next(vae.parameters()).device)

    def encode_masks(self, masks: Tensor) -> Tensor:
        """(M, H, W) in [0, 1] -> standardised latents (M, c, h, w), deterministic (the posterior's mode)."""
        return (encode_pictures(self.vae, (masks * 2 - 1)[:, None].expand(-1, 3, -1, -1)) - self.mean) / self.std

    def decode_signed(self, latents: Tensor) -> Tensor:
        """Standardised latents (M, c, h, w) -> (M, H, W), about -1 outside and +1 inside, not clipped."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode((latents * self.std + self.mean).to(dtype)).sample.float().mean(dim=1)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Standardised latents (M, c, h, w) -> membership (M, H, W) in [0, 1]; the mask is where it is at least 0.5."""
        return ((self.decode_signed(latents) + 1) / 2).clamp(0, 1)

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set mean and std from batches of masks (M, H, W)."""
        self.mean.zero_()
        self.std.fill_(1.0)
        total, squares, count = torch.zeros_like(self.mean).double(), torch.zeros_like(self.mean).double(), 0
        for masks in batches:
            latents = self.encode_masks(masks).double()
            total += latents.sum(dim=(0, 2, 3), keepdim=True)
            squares += latents.square().sum(dim=(0, 2, 3), keepdim=True)
            count += latents.numel() // latents.shape[1]
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp_min(1e-8).sqrt())


def encode_pictures(vae: Any, pictures: Tensor) -> Tensor:
    """(M, 3, H, W) in [-1, 1] -> raw latents (M, c, h, w), without noise."""
    encoded = vae.encode(pictures.to(next(vae.parameters()).dtype))
    return (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()
