"""The close-up: a window of fine pixels around what the evidence found, drawn by a small diffusion model.

The denoiser of a whole slice sees an eighth of coarse pixels and cannot know more than the evidence. Here a window
holds what is asked for in pixels as fine as it fits (`progidiff.images.close_up`), and

1. encode   window (N, C, S, S), evidence (N, E, S, S), edits (N, D, S, S), text  -> features, once per window
2. sharpen  features, evidence                                 -> logits (N, S, S): evidence, corrected at fine pixels
3. start    level sets of these logits, one level per proposal -> latents (M, c, S/4, S/4), noised to `start_time`
4. denoise  latents, T = 1 to 4 steps                          -> clean latents
5. draw     sharpened logits + level + decoded latents         -> probabilities (N, K, S, S)

So diffusion starts near an answer and not from pure noise (truncated diffusion, arXiv 2202.09671). Proposal 0 is the
sharpened evidence itself; the others are cautious (a part of it) and generous (all of it, and more) by turns. So what
at least half of any number of proposals draw is what the sharpened evidence draws, exactly: the majority is the best
single answer, and how readers may differ from it is what the denoiser has learned. A fresh denoiser, whose last layer
is zero, gives the level sets of one network (p > u_k): the baseline that it must beat.

The branch that conditions the denoiser keeps ControlNet's contract (arXiv 2302.05543): features enter its skips and
its middle through zero-initialised convolutions. So do edits (clicks, scribbles, boxes, a neighbouring slice that is
right): without any, nothing changes, bit for bit.

The latents are those of a codec with stride 4 that loses nothing (`ShuffleCodec`), or those of the autoencoder of a
Stable-Diffusion folder, whose windows then have as many pixels as its denoiser is made for
(`progidiff.model.close_up_backbone`). That denoiser is frozen and stays the backbone's; encoder and injection are the
close-up's own.

Shape letters: N windows, K proposals, M = N (K - 1), S pixels along both sides, c latent channels, T time steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.model.backbone import list_residual_slots
from progidiff.model.conditioning import ConvBlock, zero_conv
from progidiff.model.sampling import guide

EDIT_CHANNELS = (
    "near a click for",
    "near a click against",
    "around clicks for",
    "around clicks against",
    "frame",
    "neighbour",
    "nearness",
)
"""What a person drew, as maps: see `progidiff.proposals.edit_maps`."""


@dataclass(frozen=True)
class CloseUpConfig:
    """Everything that decides the shapes of `CloseUpNetwork`, and how windows reach it.

    Attributes:
        text_features: D of the text encoder.
        slot_channels, slot_strides: Channels and image stride of the denoiser's residual slots (skips, then middle).
        latent_channels, latent_stride: Of the codec.
        num_neighbours: Slices on each side of the middle one that enter as channels.
        neighbour_mm: Distance between these channels in mm.
        evidence_neighbours: Slices on each side whose evidence enters.
        channels: Features of the encoder's levels; level i has stride 2**i.
        condition_width: Features of text and pixel size together.
        injection_width: Width of the path into the denoiser.
        start_time: Timestep of 0..999 that latents are noised to at first.
        level_spread: Standard deviation of the proposals' levels in logits, see `draw_balanced_levels`.
        noise_scale: Weight of the decoded latents in logits.
        native_size: Pixels along both axes that windows have, where the denoiser is made for one size; 0 where it draws
            any.
    """

    text_features: int
    slot_channels: tuple[int, ...]
    slot_strides: tuple[int, ...]
    latent_channels: int = 16
    latent_stride: int = 4
    num_neighbours: int = 2
    neighbour_mm: float = 3.0
    evidence_neighbours: int = 1
    channels: tuple[int, ...] = (16, 32, 64, 128, 192)
    condition_width: int = 128
    injection_width: int = 64
    start_time: int = 600
    level_spread: float = 1.5
    noise_scale: float = 4.0
    native_size: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CloseUpConfig:
        """The inverse of `to_dict`."""
        known: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in cls.__dataclass_fields__
        }
        return cls(**known)


class WindowCodec(Protocol):
    """Masks of windows as latents, and back."""

    def encode_masks(self, masks: Tensor) -> Tensor:
        """(M, S, S) in [0, 1] -> latents (M, c, s, s) of about unit size."""
        ...

    def decode_signed(self, latents: Tensor) -> Tensor:
        """Latents (M, c, s, s) -> (M, S, S), about -1 outside and +1 inside."""
        ...


class ShuffleCodec:
    """A codec that loses nothing: the pixels of a block become channels.

    Masks have no texture to compress, and at stride 4 a block is 16 channels, as many as the codec of whole slices has
    at stride 8. Its encode-decode Dice is 1; what a close-up loses, it loses to resampling.

    Args:
        stride: Pixels of a block along both axes.
    """

    def __init__(self, stride: int = 4) -> None:
        self.stride = stride

    def encode_masks(self, masks: Float[Tensor, "M S S"]) -> Float[Tensor, "M c s s"]:
        """(M, S, S) in [0, 1] -> (M, stride**2, S / stride, S / stride) in [-1, 1]."""
        return F.pixel_unshuffle((masks * 2 - 1)[:, None], self.stride)

    def decode_signed(self, latents: Float[Tensor, "M c s s"]) -> Float[Tensor, "M S S"]:
        """The inverse; not clipped."""
        return F.pixel_shuffle(latents, self.stride)[:, 0]


@dataclass
class WindowBatch:
    """N windows as the network reads them.

    Attributes:
        images: (N, C, S, S) in [-1, 1], C = 2 * num_neighbours + 1 slices from inferior to superior.
        evidence: (N, E, S, S) in [0, 1], the same for E = 2 * evidence_neighbours + 1 slices.
        is_found: (N,) 1 where there is evidence; 0 where nothing looked for it before, as with clicks alone.
        edits: (N, D, S, S) with the D maps of `EDIT_CHANNELS`; None without edits.
        pooled: (N, T) text vectors; zeros for no prompt.
        spacing: (N, 2) pixel size and distance of the slices in mm.
    """

    images: Tensor
    evidence: Tensor
    is_found: Tensor
    edits: Tensor | None
    pooled: Tensor
    spacing: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @staticmethod
    def concatenate(parts: Sequence[WindowBatch]) -> WindowBatch:
        """Join batches of windows of one size, all with edits or all without."""
        edits = [part.edits for part in parts if part.edits is not None]
        return WindowBatch(
            images=torch.cat([part.images for part in parts]),
            evidence=torch.cat([part.evidence for part in parts]),
            is_found=torch.cat([part.is_found for part in parts]),
            edits=torch.cat(edits) if edits else None,
            pooled=torch.cat([part.pooled for part in parts]),
            spacing=torch.cat([part.spacing for part in parts]),
        )

    @property
    def condition(self) -> Tensor:
        """(N, T + 4): text, sizes, and whether there is evidence and text."""
        sizes = torch.stack([(self.spacing[:, 0] / 1.3).log(), (self.spacing[:, 1] / 4).log()], dim=1)
        is_named = (self.pooled.abs().amax(dim=1, keepdim=True) > 0).to(sizes.dtype)
        # Text vectors have length 1: scaled so that each number is about 1, like those beside it.
        text = self.pooled * self.pooled.shape[1] ** 0.5
        return torch.cat([text, sizes, self.is_found[:, None].to(sizes.dtype), is_named], dim=1)


@dataclass
class WindowFeatures:
    """What the encoder keeps of N windows: every proposal and step reuses it.

    Attributes:
        logits: (N, S, S), the evidence, sharpened.
        levels: stride -> (N, C, S / stride, S / stride), what the denoiser's slots read.
    """

    logits: Tensor
    levels: dict[int, Tensor]

    def first(self, count: int) -> WindowFeatures:
        """Those of some of the windows."""
        return WindowFeatures(self.logits[:count], {s: f[:count] for s, f in self.levels.items()})


class Modulation(nn.Module):
    """Scales and shifts features by the condition; changes nothing at first (FiLM, arXiv 1709.07871)."""

    def __init__(self, condition: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(condition, 2 * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(N, C, H, W), (N, condition) -> (N, C, H, W)."""
        scale, shift = self.linear(condition)[:, :, None, None].chunk(2, dim=1)
        result: Tensor = x * (1 + scale) + shift
        return result


def _silent_conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1 x 1 convolution that starts as "no change" and has no bias: nothing in, nothing out."""
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    nn.init.zeros_(conv.weight)
    return conv


class WindowEncoder(nn.Module):
    """U-shaped encoder of a window that is told what is asked for.

    Args:
        in_channels: Slices and evidence.
        channels: Features per level, full resolution first.
        condition: Features of the condition.
        dropout: Channel dropout of the two coarsest levels.
    """

    def __init__(self, in_channels: int, channels: Sequence[int], condition: int, dropout: float = 0.1) -> None:
        super().__init__()
        levels = len(channels)
        drawn = len(EDIT_CHANNELS)
        self.edits_mix = nn.Conv2d(drawn, drawn, 3, padding=1, bias=False)
        self.edits_in = nn.ModuleList(_silent_conv(drawn, c) for c in channels)
        inputs = [in_channels, *channels[:-1]]
        self.down = nn.ModuleList(
            ConvBlock(inputs[i], channels[i], dropout if i >= levels - 2 else 0.0) for i in range(levels)
        )
        self.told_down = nn.ModuleList(Modulation(condition, c) for c in channels)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(channels[i + 1], channels[i], 2, stride=2) for i in range(levels - 1)
        )
        self.merge = nn.ModuleList(ConvBlock(2 * channels[i], channels[i]) for i in range(levels - 1))
        self.told_up = nn.ModuleList(Modulation(condition, channels[i]) for i in range(levels - 1))

    def forward(self, x: Tensor, edits: Tensor | None, condition: Tensor) -> list[Tensor]:
        """(N, C, S, S) -> one feature map per level, level i of shape (N, channels[i], S / 2**i, S / 2**i)."""
        skips = []
        for i, block in enumerate(self.down):
            x = self.told_down[i](block(F.max_pool2d(x, 2) if i else x), condition)
            if edits is not None:
                x = x + self._read_edits(edits, i)
            skips.append(x)
        pyramid = [x]
        for i in reversed(range(len(self.up))):
            x = self.told_up[i](self.merge[i](torch.cat([self.up[i](x), skips[i]], dim=1)), condition)
            pyramid.insert(0, x)
        return pyramid

    def _read_edits(self, edits: Tensor, level: int) -> Tensor:
        """What the edits add at a level: exactly zero in a fresh network, and always where nothing was drawn."""
        seen = edits + self.edits_mix(edits) if level == 0 else F.avg_pool2d(edits, 2**level)
        found: Tensor = self.edits_in[level](seen)
        return found


class CloseUpNetwork(nn.Module):
    """Encoder of windows, sharpened evidence, and the denoiser with its zero-initialised injection.

    Args:
        config: Shapes.
        unet: A `diffusers.UNet2DConditionModel` over the codec's latents.
        codec: Of the latents.
        scheduler: Of diffusers, for its noise levels and its kind of prediction.
        shares_denoiser: The denoiser is a backbone's. It is used where it lies, and no part of this module: moving,
            training and saving the network leave it alone, and there is no second copy of it.
    """

    unet: Any
    codec: WindowCodec

    def __init__(
        self, config: CloseUpConfig, unet: Any, codec: WindowCodec, scheduler: Any, shares_denoiser: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.shares_denoiser = shares_denoiser
        channels = config.channels
        slices = 2 * config.num_neighbours + 1 + 2 * config.evidence_neighbours + 1
        width = config.injection_width
        self.condition = nn.Sequential(
            nn.Linear(config.text_features + 4, config.condition_width),
            nn.SiLU(),
            nn.Linear(config.condition_width, config.condition_width),
            nn.SiLU(),
        )
        self.encoder = WindowEncoder(slices, channels, config.condition_width)
        self.query = nn.Linear(config.condition_width, channels[0] + 1)
        self.sharpen = nn.Conv2d(channels[0], channels[0], 1)
        self.slot_levels = tuple(sorted(set(config.slot_strides)))
        self.image_in = nn.ModuleDict({str(s): nn.Conv2d(channels[self._level(s)], width, 1) for s in self.slot_levels})
        self.logits_in = nn.Conv2d(config.latent_stride**2, width, 3, padding=1)
        self.mix = nn.ModuleDict({str(s): nn.Conv2d(width, width, 3, padding=1) for s in self.slot_levels})
        self.zero = nn.ModuleList(zero_conv(width, c) for c in config.slot_channels)
        if shares_denoiser:
            self.lend(unet, codec)
        else:
            self.unet, self.codec = unet, codec
        self.scheduler = scheduler
        nn.init.zeros_(self.query.weight)
        nn.init.zeros_(self.query.bias)

    @property
    def encoding_parts(self) -> tuple[nn.Module, ...]:
        """What `encode` runs; the other parts draw."""
        return self.condition, self.encoder, self.query, self.sharpen

    def lend(self, unet: Any, codec: WindowCodec) -> None:
        """Use a denoiser and a codec where they lie: past the registration of submodules."""
        object.__setattr__(self, "unet", unet)
        object.__setattr__(self, "codec", codec)

    def _level(self, stride: int) -> int:
        """The encoder level nearest to `stride` from below; coarser slots read its average."""
        return min(stride.bit_length() - 1, len(self.config.channels) - 1)

    def encode(self, batch: WindowBatch) -> WindowFeatures:
        """Run the encoder, once per window, and sharpen the evidence."""
        condition = self.condition(batch.condition)
        found = batch.is_found[:, None, None]
        known = (batch.evidence * 2 - 1) * found[..., None]
        base = torch.logit(batch.evidence[:, self.config.evidence_neighbours].float(), eps=5e-3) * found
        pyramid = self.encoder(torch.cat([batch.images, known], dim=1), batch.edits, condition)
        weights, bias = self.query(condition).split([self.config.channels[0], 1], dim=1)
        change = torch.einsum("nchw,nc->nhw", self.sharpen(pyramid[0]), weights) + bias[:, :, None]
        levels = {}
        for s in self.slot_levels:
            level = self._level(s)
            extra = s // 2**level
            levels[s] = F.avg_pool2d(pyramid[level], extra) if extra > 1 else pyramid[level]
        return WindowFeatures(base + change.float(), levels)

    def compute_residuals(self, features: WindowFeatures) -> tuple[list[Tensor], Tensor]:
        """What is added to the denoiser's skips and middle; exactly zero for a fresh branch."""
        stride = self.config.latent_stride
        signal = self.logits_in(F.pixel_unshuffle((features.logits / 4).tanh()[:, None], stride))
        mixed = {}
        for s in self.slot_levels:
            pooled = F.avg_pool2d(signal, s // stride) if s > stride else signal
            x = F.silu(self.image_in[str(s)](features.levels[s]) + pooled)
            mixed[s] = F.silu(self.mix[str(s)](x))
        residuals = [conv(mixed[s]) for conv, s in zip(self.zero, self.config.slot_strides, strict=True)]
        return residuals[:-1], residuals[-1]

    def draw(
        self,
        base: Float[Tensor, "N S S"],
        tokens: Tensor,
        token_mask: Tensor | None,
        noise: Float[Tensor, "M c s s"],
        levels: Float[Tensor, " M"],
        residuals: tuple[list[Tensor], Tensor],
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        empty: tuple[Tensor, Tensor | None] | None = None,
    ) -> Float[Tensor, "M S S"]:
        """Draw one proposal per row: a generous one adds to what the sharpened evidence draws, a cautious one takes
        away.

        Where the denoiser would do the opposite it is not followed, so that most proposals keep to the sharpened
        evidence wherever that decides: this holds whatever the denoiser answers. One that answers nothing, as a fresh
        denoiser of a close-up does, draws level sets to the bit. One that gives back what it was shown (signs that the
        codec decodes right) draws the masks of the level sets, with steeper edges. A backbone's denoiser that nobody
        trained for masks does neither before the injection is trained, and can still only add, or only take away.

        Args:
            base: Sharpened logits of N windows.
            tokens, token_mask: (N, L, D) and (N, L), for cross-attention.
            noise: Of the proposals, M / N in a row for each window.
            levels: What is added to the logits: positive for a generous reading.
            residuals: Of `compute_residuals`.
            num_inference_steps: T, 1 to 4 are useful.
            guidance_scale: Strength of the text; 1 costs nothing, other values double the work.
            empty: Tokens (1, L', D) and mask of the empty text, for guidance.

        Returns:
            Logits (M, S, S); the mask is where they are positive.
        """
        repeat = partial(torch.repeat_interleave, repeats=len(noise) // len(base), dim=0)
        base, tokens = repeat(base), repeat(tokens)
        token_mask = None if token_mask is None else repeat(token_mask)
        residuals = ([repeat(skip) for skip in residuals[0]], repeat(residuals[1]))
        blank, blank_mask = (tokens, token_mask) if empty is None else empty
        blank = blank.expand(len(noise), -1, -1)
        blank_mask = None if blank_mask is None else blank_mask.expand(len(noise), -1)
        denoise = guide(
            partial(self.predict, tokens=tokens, token_mask=token_mask, residuals=residuals),
            partial(self.predict, tokens=blank, token_mask=blank_mask, residuals=residuals),
            guidance_scale,
        )
        level = levels[:, None, None]
        logits = base + level
        for i in range(num_inference_steps):
            # Steps after the first start where the one before came to.
            clean = self.codec.encode_masks((logits > 0).to(base.dtype) if i == 0 else logits.sigmoid())
            time = round(self.config.start_time * (num_inference_steps - i) / num_inference_steps)
            signal, strength = self.noise_level(time)
            predicted = denoise(signal * clean + strength * noise, torch.full((), time, device=clean.device))
            change = level + self.config.noise_scale * self.codec.decode_signed(predicted).to(base.dtype)
            logits = base + torch.where(level >= 0, change.clamp(min=0), change.clamp(max=0))
        return logits

    def predict(
        self,
        latents: Tensor,
        time: int | Tensor,
        tokens: Tensor,
        token_mask: Tensor | None,
        residuals: tuple[list[Tensor], Tensor],
    ) -> Tensor:
        """Clean latents (M, c, s, s) as the denoiser predicts them, whatever its kind of prediction."""
        dtype = self.unet.dtype
        down, middle = residuals
        times = torch.as_tensor(time, device=latents.device)
        found: Tensor = self.unet(
            latents.to(dtype),
            times,
            tokens.to(dtype),
            encoder_attention_mask=token_mask,
            down_block_additional_residuals=tuple(r.to(dtype) for r in down),
            mid_block_additional_residual=middle.to(dtype),
        ).sample.float()
        kind = self.scheduler.config.prediction_type
        if kind == "sample":
            return found
        signal, strength = self.noise_level(times)
        if kind == "v_prediction":
            found = signal * latents - strength * found
        else:
            found = (latents - strength * found) / signal
        return found

    def noise_level(self, time: int | Tensor) -> tuple[Any, Any]:
        """Signal and noise at a timestep (square roots of alpha-bar and of 1 - alpha-bar)."""
        if isinstance(time, Tensor):
            # As an index with one axis, so that nobody waits for a device to say which.
            kept = self.scheduler.alphas_cumprod.to(time.device, non_blocking=True)[time.reshape(-1)]
            return kept.sqrt()[:, None, None, None], (1 - kept).sqrt()[:, None, None, None]
        kept = self.scheduler.alphas_cumprod[time]
        return float(kept.sqrt()), float((1 - kept).sqrt())


@dataclass(frozen=True)
class DenoiserWidths:
    """Sizes of the embedded denoiser of close-ups."""

    channels: tuple[int, ...] = (32, 64, 96)
    layers: int = 1
    heads: int = 4
    text_features: int = 384


def create_denoiser(widths: DenoiserWidths | None = None, latent_channels: int = 16) -> Any:
    """A fresh `UNet2DConditionModel` whose answer is zero: its last layer starts as "no change"."""
    from diffusers import UNet2DConditionModel

    widths = widths or DenoiserWidths()
    deep = len(widths.channels)
    unet = UNet2DConditionModel(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=widths.channels,
        layers_per_block=widths.layers,
        # Attention is for the coarsest level: finer ones have hundreds of tokens a window.
        down_block_types=("DownBlock2D",) * (deep - 1) + ("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",) + ("UpBlock2D",) * (deep - 1),
        cross_attention_dim=widths.text_features,
        attention_head_dim=widths.heads,
        norm_num_groups=16,
    )
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    return unet


def create_network(
    text_features: int, widths: DenoiserWidths | None = None, seed: int = 0, **changes: object
) -> CloseUpNetwork:
    """A fresh close-up network with its own small denoiser; `changes` are further fields of `CloseUpConfig`."""
    torch.manual_seed(seed)
    widths = widths or DenoiserWidths(text_features=text_features)
    codec = ShuffleCodec(4)
    unet = create_denoiser(widths, codec.stride**2)
    channels, strides = list_residual_slots(dict(unet.config), codec.stride)
    values: dict[str, Any] = {
        "text_features": text_features,
        "slot_channels": channels,
        "slot_strides": strides,
        "latent_channels": codec.stride**2,
        "latent_stride": codec.stride,
        **changes,
    }
    return CloseUpNetwork(CloseUpConfig.from_dict(values), unet, codec, create_scheduler())


def create_scheduler() -> Any:
    """Noise levels of the embedded close-up: Stable Diffusion's, ending in pure noise, with clean latents predicted."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    )
