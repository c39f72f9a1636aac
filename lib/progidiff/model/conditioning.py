"""What the networks see of an image: the ControlNet-style branch with its own image encoder and text-query head.

After ControlNet (arXiv 2302.05543) and ProGiDiff (arXiv 2601.16060), with two differences that make proposals cheap:

* The branch is not a copy of the denoiser that runs at every step. A U-shaped encoder runs **once per slice**, and its
  features enter the denoiser's skip connections through zero-initialised 1 x 1 convolutions, the same contract as
  ControlNet's (`down_block_additional_residuals`, `mid_block_additional_residual`). Every prompt, proposal and step
  reuses them.
* A **text-query head** turns a prompt into query vectors and compares them with the pixel features. Its map, the
  *evidence*, is supervised directly, so it learns as fast as a plain U-Net; the denoiser receives it as one more
  condition and spends itself on the plausible alternatives. The evidence is also the presence gate: what is plainly
  absent is not denoised.

Shape letters: N slices, P prompts, C channels, H W pixels, h w latent pixels, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.errors import GeometryError


@dataclass(frozen=True)
class ConditioningConfig:
    """Everything that decides the shapes of `ConditioningBranch`, and how slices reach it.

    Attributes:
        height, width: Working grid in pixels; multiples of ``2 ** (len(channels) - 1)`` and of the codec's factor.
        spacing_range: Smallest and largest pixel size of the working grid in mm.
        num_neighbours: Neighbouring slices on each side that enter as channels.
        neighbour_mm: Distance between these channels in mm.
        mr_headroom: Where the brightest of an MR lie: its 99th percentile at 1 / mr_headroom of the range that the
            networks see. A model of CT knows organs in the middle of that range, not at its end.
        channels: Features of the encoder's levels; level i has stride 2**i.
        query_level: The coarse level that the query head reads in addition to full resolution.
        text_features: D of the text encoder.
        slot_channels, slot_strides: Channels and image stride of each of the denoiser's residual slots (skips, then
            mid).
        evidence_channels: Width of the path that carries the evidence into the denoiser.
        latent_stride: Image pixels per latent pixel (the codec's factor).
    """

    height: int
    width: int
    spacing_range: tuple[float, float]
    text_features: int
    slot_channels: tuple[int, ...]
    slot_strides: tuple[int, ...]
    latent_stride: int = 8
    num_neighbours: int = 1
    neighbour_mm: float = 4.0
    mr_headroom: float = 1.0
    channels: tuple[int, ...] = (16, 32, 64, 128, 256, 256)
    query_level: int = 2
    evidence_channels: int = 96

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Of its attributes."""
        return tuple(cls.__dataclass_fields__)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConditioningConfig:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in cls.__dataclass_fields__
        }
        return cls(**known)


class ConvBlock(nn.Module):
    """Two 3 x 3 convolutions with group normalisation and leaky ReLU, the block of a plain 2-D U-Net."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        groups = min(8, out_channels // 2)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, out_channels, H, W)."""
        x = F.leaky_relu(self.norm1(self.conv1(x)), 0.1, inplace=True)
        x = self.dropout(x)
        return F.leaky_relu(self.norm2(self.conv2(x)), 0.1, inplace=True)


class ImageEncoder(nn.Module):
    """U-shaped encoder: strong where it is coarse, thin at full resolution. Runs once per slice.

    Args:
        in_channels: Slices per sample (the slice and its neighbours).
        channels: Features per level, full resolution first.
        dropout: Channel dropout of the two coarsest levels.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], dropout: float = 0.1) -> None:
        super().__init__()
        levels = len(channels)
        inputs = [in_channels, *channels[:-1]]
        self.down = nn.ModuleList(
            ConvBlock(inputs[i], channels[i], dropout if i >= levels - 2 else 0.0) for i in range(levels)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels[i + 1], channels[i], 2, stride=2) for i in range(levels - 1)
        )
        self.merge = nn.ModuleList(ConvBlock(2 * channels[i], channels[i]) for i in range(levels - 1))

    def forward(self, slices: Tensor) -> list[Tensor]:
        """(N, C, H, W) -> one feature map per level, level i of shape (N, channels[i], H / 2**i, W / 2**i)."""
        skips = []
        x = slices
        for i, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        pyramid = [x]
        for i in reversed(range(len(self.up))):
            x = self.merge[i](torch.cat([self.up[i](x), skips[i]], dim=1))
            pyramid.insert(0, x)
        return pyramid


class QueryHead(nn.Module):
    """Compares a prompt with every pixel: free text works, and a further prompt costs a dot product.

    The logit of a pixel is ``q_fine . f_fine + up(q_coarse . f_coarse) + b`` with q and b predicted from the pooled
    text.
    """

    def __init__(self, text_features: int, fine: int, coarse: int, hidden: int = 256) -> None:
        super().__init__()
        self.fine, self.coarse = fine, coarse
        first, last = nn.Linear(text_features, hidden), nn.Linear(hidden, fine + coarse + 1)
        self.text = nn.Sequential(nn.LayerNorm(text_features), first, nn.GELU(), last)
        self.project_fine = nn.Conv2d(fine, fine, 1)
        self.project_coarse = nn.Conv2d(coarse, coarse, 1)
        # A structure covers few pixels: start from "absent" instead of unlearning "everywhere".
        nn.init.constant_(last.bias[-1:], -3.0)

    def forward(
        self, fine: Float[Tensor, "N D H W"], coarse: Float[Tensor, "N E h w"], pooled: Float[Tensor, "*N P T"]
    ) -> Float[Tensor, "N P H W"]:
        """Evidence logits.

        Args:
            fine: (N, D, H, W) full-resolution features.
            coarse: (N, E, H / s, W / s) features of the coarse level.
            pooled: (P, T) one vector per prompt, or (N, P, T) prompts per slice.

        Returns:
            (N, P, H, W) logits.
        """
        query = self.text(pooled)
        if query.dim() == 2:
            query = query.expand(len(fine), -1, -1)
        q_fine, q_coarse, bias = query.split([self.fine, self.coarse, 1], dim=-1)
        low = torch.einsum("npd,ndhw->nphw", q_coarse / self.coarse**0.5, self.project_coarse(coarse))
        low = F.interpolate(low, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        high = torch.einsum("npd,ndhw->nphw", q_fine / self.fine**0.5, self.project_fine(fine))
        found: Tensor = high + low + bias[..., None]
        return found


def zero_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1 x 1 convolution that starts as "no change" (ControlNet, equation 2)."""
    conv = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


@dataclass
class SliceFeatures:
    """What the encoder keeps of N slices.

    Attributes:
        fine: (N, D, H, W) for the query head.
        coarse: (N, E, H / s, W / s) for the query head.
        levels: stride -> (N, C, H / stride, W / stride), what the denoiser's slots read.
    """

    fine: Tensor
    coarse: Tensor
    levels: dict[int, Tensor]

    def __getitem__(self, index: Any) -> SliceFeatures:
        """The same for some of the slices (a slice object or an index tensor)."""
        return SliceFeatures(self.fine[index], self.coarse[index], {s: f[index] for s, f in self.levels.items()})

    @staticmethod
    def concatenate(parts: Sequence[SliceFeatures]) -> SliceFeatures:
        """Join batches along N."""
        return SliceFeatures(
            torch.cat([p.fine for p in parts]),
            torch.cat([p.coarse for p in parts]),
            {s: torch.cat([p.levels[s] for p in parts]) for s in parts[0].levels},
        )

    def to(self, dtype: torch.dtype) -> SliceFeatures:
        """The same in another precision."""
        return SliceFeatures(
            self.fine.to(dtype), self.coarse.to(dtype), {s: f.to(dtype) for s, f in self.levels.items()}
        )


class ConditioningBranch(nn.Module):
    """Image encoder + text-query head + zero-initialised injection into a denoiser's residual slots.

    `progidiff.model.conditioning_model.ConditioningModel` is the same as a model of diffusers.
    """

    def __init__(self, config: ConditioningConfig) -> None:
        super().__init__()
        self.shapes = config
        channels = config.channels
        stride = 2 ** (len(channels) - 1)
        if config.height % stride or config.width % stride:
            raise GeometryError(
                f"A working grid of {config.height} x {config.width} does not divide by "
                f"{stride}; use multiples of {stride}."
            )
        self.encoder = ImageEncoder(2 * config.num_neighbours + 1, channels)
        self.query_head = QueryHead(config.text_features, channels[0], channels[config.query_level])
        self.slot_levels = tuple(sorted(set(config.slot_strides)))
        width = config.evidence_channels
        self.evidence_in = nn.Conv2d(config.latent_stride**2, width, 3, padding=1)
        self.image_in = nn.ModuleDict(
            {str(s): nn.Conv2d(channels[self._encoder_level(s)], width, 1) for s in self.slot_levels}
        )
        self.evidence_down = nn.ModuleDict({str(s): nn.Conv2d(width, width, 3, padding=1) for s in self.slot_levels})
        self.mix = nn.ModuleDict({str(s): nn.Conv2d(width, width, 3, padding=1) for s in self.slot_levels})
        self.zero = nn.ModuleList(zero_conv(width, c) for c in config.slot_channels)

    @property
    def config(self) -> ConditioningConfig:
        """What it was made from."""
        return self.shapes

    def _encoder_level(self, stride: int) -> int:
        """The encoder level nearest to `stride` from below; coarser slots read its average."""
        return min(stride.bit_length() - 1, len(self.shapes.channels) - 1)

    def encode_slices(self, slices: Float[Tensor, "N C H W"]) -> SliceFeatures:
        """Run the image encoder, once per slice.

        Args:
            slices: (N, C, H, W) in [-1, 1], C = 2 * num_neighbours + 1.

        Raises:
            GeometryError: if the shape is not the configured one.
        """
        wanted = (2 * self.shapes.num_neighbours + 1, self.shapes.height, self.shapes.width)
        if tuple(slices.shape[1:]) != wanted:
            raise GeometryError(
                f"Slices of shape {tuple(slices.shape[1:])} do not fit this branch, which was built for {wanted}."
            )
        pyramid = self.encoder(slices)
        levels = {}
        for s in self.slot_levels:
            level = self._encoder_level(s)
            features = pyramid[level]
            extra = s // 2**level
            levels[s] = F.avg_pool2d(features, extra) if extra > 1 else features
        return SliceFeatures(pyramid[0], pyramid[self.shapes.query_level], levels)

    def predict_evidence(self, features: SliceFeatures, pooled: Float[Tensor, "*N P T"]) -> Float[Tensor, "N P H W"]:
        """Text-query logits.

        Args:
            features: of N slices.
            pooled: (P, T) text vectors, or (N, P, T).

        Returns:
            (N, P, H, W) logits; sigmoid gives the evidence.
        """
        found: Tensor = self.query_head(features.fine, features.coarse, pooled)
        return found

    def compute_residuals(
        self, features: SliceFeatures, evidence: Float[Tensor, "M 1 H W"]
    ) -> tuple[list[Tensor], Tensor]:
        """What is added to the denoiser's skips and middle, for M (slice, prompt) pairs.

        Args:
            features: Slice features, already gathered to M pairs.
            evidence: (M, 1, H, W) in [0, 1].

        Returns:
            Residuals of the down slots and of the middle slot, as diffusers' U-Net takes them. Exactly zero for a fresh
            branch.
        """
        signal = self.evidence_in(F.pixel_unshuffle(evidence * 2 - 1, self.shapes.latent_stride))
        mixed = {}
        for s in self.slot_levels:
            factor = s // self.shapes.latent_stride
            pooled = F.avg_pool2d(signal, factor) if factor > 1 else signal
            x = F.silu(self.image_in[str(s)](features.levels[s]) + self.evidence_down[str(s)](F.silu(pooled)))
            mixed[s] = F.silu(self.mix[str(s)](x))
        residuals = [conv(mixed[s]) for conv, s in zip(self.zero, self.shapes.slot_strides, strict=True)]
        return residuals[:-1], residuals[-1]
