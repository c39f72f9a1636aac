"""Masks as latents: the backbone's autoencoder, with statistics of masks instead of pictures.

A mask is encoded as a picture, -1 outside and +1 inside, in three equal channels, so that any Stable-Diffusion
autoencoder serves. Latents are standardised per channel by the statistics of *mask* latents: the 0.18215 of Stable
Diffusion is a constant of photographs and leaves mask latents far from unit variance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

ACTIVE = 0.5
"""Distance from the latents of an empty mask, in standard deviations, from which a latent pixel is decoded."""

MARGIN = 3
"""Latent pixels decoded around that box and thrown away, for the decoder's view."""

ROUNDING = 4
"""Crops are decoded at multiples of this many latent pixels."""

WINDOW_PIXELS = 2**19
"""Pixels that `AutoencoderCodec` decodes together, two windows of 512 x 512: decoders hold hundreds of maps of them."""


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
        self.register_buffer(
            "mean", torch.tensor(list(mean) if mean is not None else [0.0] * channels).view(1, -1, 1, 1)
        )
        self.register_buffer("std", torch.tensor(list(std) if std is not None else [1.0] * channels).view(1, -1, 1, 1))
        self.to(next(vae.parameters()).device)
        self._nothing: Tensor | None = None

    def encode_masks(self, masks: Float[Tensor, "N H W"]) -> Float[Tensor, "N c h w"]:
        """(M, H, W) in [0, 1] -> standardised latents (M, c, h, w), deterministic (the posterior's mode)."""
        return (encode_pictures(self.vae, paint_masks(masks)) - self.mean) / self.std

    def decode_signed(self, latents: Float[Tensor, "M c h w"]) -> Float[Tensor, "M H W"]:
        """Standardised latents (M, c, h, w) -> (M, H, W), about -1 outside and +1 inside, not clipped."""
        return decode_grey(self.vae, self._restore(latents))

    def decode_soft(self, latents: Float[Tensor, "M c h w"]) -> Float[Tensor, "M H W"]:
        """Like `decode_latents`, with a gradient everywhere: for losses."""
        return soften(self.decode_signed(latents))

    def decode_latents(self, latents: Float[Tensor, "M c h w"]) -> Float[Tensor, "M H W"]:
        """Standardised latents (M, c, h, w) -> membership (M, H, W) in [0, 1]; the mask is where it is at least 0.5.

        A codec without normalisation and attention (`AutoencoderTiny`) sees only a neighbourhood, so of each mask only
        the box is decoded in which its latents differ from those of an empty mask; most organs fill a small part of a
        slice. The box depends on that mask alone, so a mask comes out the same in any batch.
        """
        if not self.is_local:
            return ((self.decode_signed(latents) + 1) / 2).clamp(0, 1)
        count, _, height, width = latents.shape
        stride = 2 ** (len(self.vae.config.decoder_block_out_channels) - 1)
        result = torch.zeros(count, height * stride, width * stride, device=latents.device)
        active = ((latents - self._encode_nothing(height, width, stride)).abs().amax(dim=1) > ACTIVE).cpu()
        crops: dict[tuple[int, int], list[tuple[int, _Span, _Span]]] = {}
        for m in active.any(dim=(1, 2)).nonzero().flatten().tolist():
            rows, columns = _plan_crop(active[m].any(dim=1)), _plan_crop(active[m].any(dim=0))
            crops.setdefault((rows.size, columns.size), []).append((m, rows, columns))
        for group in crops.values():
            part = torch.stack(
                [latents[m, :, y.start : y.start + y.size, x.start : x.start + x.size] for m, y, x in group]
            )
            decoded = ((decode_grey(self.vae, self._restore(part)) + 1) / 2).clamp(0, 1)
            for picture, (m, y, x) in zip(decoded, group, strict=True):
                result[m, y.kept(stride), x.kept(stride)] = picture[y.kept(stride, y.start), x.kept(stride, x.start)]
        return result

    @property
    def is_local(self) -> bool:
        """Whether a crop of the latents decodes like the same place of the whole."""
        return type(self.vae).__name__ == "AutoencoderTiny"

    def _restore(self, latents: Tensor) -> Tensor:
        return (latents * self.std + self.mean).to(next(self.vae.parameters()).dtype)

    def _encode_nothing(self, height: int, width: int, stride: int) -> Tensor:
        """Latents of an empty mask, (1, c, height, width)."""
        if self._nothing is None or self._nothing.shape[-2:] != (height, width):
            with torch.no_grad():
                self._nothing = self.encode_masks(
                    torch.zeros(1, height * stride, width * stride, device=self.mean.device)
                )
        return self._nothing

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set mean and std from batches of masks (M, H, W)."""
        self._nothing = None
        self.mean.zero_()
        self.std.fill_(1.0)
        total, squares, count = torch.zeros_like(self.mean).double(), torch.zeros_like(self.mean).double(), 0
        for masks in batches:
            latents = self.encode_masks(masks.to(self.mean.device)).double()
            total += latents.sum(dim=(0, 2, 3), keepdim=True)
            squares += latents.square().sum(dim=(0, 2, 3), keepdim=True)
            count += latents.numel() // latents.shape[1]
        mean = total / count
        self.mean.copy_(mean)
        self.std.copy_((squares / count - mean.square()).clamp_min(1e-8).sqrt())
        self._nothing = None


class AutoencoderCodec:
    """Masks of windows as the latents that a backbone's own denoiser knows: raw latents times its `scaling_factor`.

    A denoiser that is not trained further wants latents of the size that it was trained on, so these are scaled as
    pictures are and not standardised as those of `MaskCodec`. It is no module: nothing of it is trained or saved, and
    it is wherever the autoencoder is.

    Args:
        vae: `diffusers.AutoencoderKL` or `AutoencoderTiny`.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self._scale = float(vae.config.scaling_factor)
        self._shift = float(getattr(vae.config, "shift_factor", None) or 0.0)

    def encode_masks(self, masks: Float[Tensor, "M S S"]) -> Float[Tensor, "M c s s"]:
        """(M, S, S) in [0, 1] -> latents (M, c, s, s), deterministic (the posterior's mode)."""
        with self._own_precision():
            return (encode_pictures(self.vae, paint_masks(masks)) - self._shift) * self._scale

    def decode_signed(self, latents: Float[Tensor, "M c s s"]) -> Float[Tensor, "M S S"]:
        """Latents (M, c, s, s) -> (M, S, S), about -1 outside and +1 inside, not clipped; gradients flow through it.

        A few windows at a time (`WINDOW_PIXELS`), so that memory does not grow with their number.
        """
        dtype = next(self.vae.parameters()).dtype
        raw = (latents / self._scale + self._shift).to(dtype)
        pixels = raw.shape[-1] * raw.shape[-2] * self.stride**2
        with self._own_precision():
            return torch.cat([decode_grey(self.vae, part) for part in raw.split(max(1, WINDOW_PIXELS // pixels))])

    @property
    def stride(self) -> int:
        """Pixels per latent pixel."""
        return find_stride(self.vae.config)

    def _own_precision(self) -> contextlib.AbstractContextManager[Any]:
        """Without autocast to fp16, in which Stable Diffusion's autoencoders overflow and decode to black."""
        kind = next(self.vae.parameters()).device.type
        overflows = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        return torch.autocast(kind, enabled=False) if overflows else contextlib.nullcontext()


def find_stride(config: Mapping[str, Any]) -> int:
    """Pixels per latent pixel of an autoencoder, from its configuration."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0] * 4
    return 1 << (len(levels) - 1)


def soften(signed: Float[Tensor, "*maps"]) -> Float[Tensor, "*maps"]:
    """About -1..1 -> 0..1 by a steep sigmoid.

    Steep, because a background of 0.02 instead of 0 would weigh as much in a Dice loss as a small organ.
    """
    return torch.sigmoid(8 * signed)


@dataclass(frozen=True)
class _Span:
    """What is decoded along one axis, in latent pixels: `size` from `start` on, of which ``first..last`` is kept."""

    start: int
    size: int
    first: int
    last: int

    def kept(self, stride: int, origin: int = 0) -> slice:
        """The kept part in pixels, counted from latent pixel `origin`."""
        return slice((self.first - origin) * stride, (self.last - origin) * stride)


def _plan_crop(active: Tensor) -> _Span:
    """Where to decode along one axis. Sizes are rounded up, so that many crops share a batch."""
    found = active.nonzero()
    first, last = max(0, int(found[0]) - 1), min(len(active), int(found[-1]) + 2)
    size = min(len(active), -(-(last - first + 2 * MARGIN) // ROUNDING) * ROUNDING)
    return _Span(min(max(0, first - MARGIN), len(active) - size), size, first, last)


def paint_masks(masks: Float[Tensor, "N H W"]) -> Float[Tensor, "N 3 H W"]:
    """Masks in [0, 1] as the pictures that an autoencoder reads: -1 outside, +1 inside, three equal channels."""
    return (masks * 2 - 1)[:, None].expand(-1, 3, -1, -1)


def decode_grey(vae: Any, latents: Float[Tensor, "M c h w"]) -> Float[Tensor, "M H W"]:
    """Raw latents -> the mean of a picture's channels, about -1 to +1, in fp32."""
    found: Tensor = vae.decode(latents).sample.float().mean(dim=1)
    return found


def encode_pictures(vae: Any, pictures: Float[Tensor, "N C H W"]) -> Float[Tensor, "N c h w"]:
    """(M, 3, H, W) in [-1, 1] -> raw latents (M, c, h, w), without noise."""
    encoded = vae.encode(pictures.to(next(vae.parameters()).dtype))
    found: Tensor = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()
    return found
