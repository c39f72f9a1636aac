"""Frozen diffusion features: noise a picture a little, let a denoiser look at it, keep what its decoder saw.

After Baranchuk et al. (arXiv 2112.03126) and TextDiff (arXiv 2407.05323): activations of some decoder blocks at some
small timesteps, the timesteps of a block concatenated on channels. The noise is one fixed tensor per draw, repeated
over space, so that what a pixel's features are does not depend on the size of the picture it lies in.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from torch import Tensor, nn

from progidiff.errors import GeometryError, ModelError, RequestError
from progidiff.model.backbone import Backbone, pick_device
from progidiff.textdiff.weights import compute_digest, find_folder, read_json
from progidiff.training.loop import derive_seed, find_autocast_dtype
from progidiff.training.settings import Range, check_config, to_values

logger = logging.getLogger(__name__)

NOISE_SIDE = 256
"""Side of the noise that is repeated over space, in pixels of the denoiser's input."""

REVISION = 1
"""Of how features are computed; part of their key."""

PATTERNS = (
    "*.json",
    "*.safetensors",
    *(f"{part}/*.{kind}" for part in ("unet", "vae", "text_encoder") for kind in ("json", "safetensors")),
)
PATTERNS += ("scheduler/*", "tokenizer/*")
"""Files of a hub's repository that are fetched."""


HISTOLOGY_TONE = (0.23, -0.16, 0.16, 0.40, 0.38, 0.30)
"""Mean of red, green, blue in -1..1, then their standard deviations: averages over the 24 training pictures of
MoNuSeg.
"""


@dataclass(frozen=True)
class FeatureOptions:
    """Which activations are features.

    Attributes:
        timesteps: How much noise; small ones keep the picture. 0..999 for the usual 1000 steps.
        blocks: Decoder blocks, 0 is the coarsest.
        draws: Noises that serving averages over (and training sees).
        jitter: Draws after the first shift each timestep by up to this share of it, so that they differ in timestep
            too.
        seed: Of the noise.
        scale: Working pixels per picture pixel along a side; None to fit the longest side to `size`.
        size: Longest side of the working picture if `scale` is None.
        picture: Add the working picture itself to the finest block's features: the denoiser sees a noised one.
        tone: Mean of each channel, then standard deviation of each, that every picture is brought to: staining, lamps
            and scanners differ more than tissue does. None leaves pictures as they are.
        mirror: Draws after the first look at the picture mirrored, and so do the views of a training; sentences are
            mirrored with it. For pictures where left and right, or top and bottom, could be exchanged.
        own_scale: Standardise every feature over the picture itself (a tile of it, if it is large), as instance
            normalisation does, so that a picture of another tint than those of the training is not all unusual. How
            much of it a feature covers is lost.
    """

    timesteps: tuple[int, ...] = (50, 150, 250)
    blocks: tuple[int, ...] = (0, 1, 2, 3)
    draws: Annotated[int, Range(1, 64)] = 1
    jitter: Annotated[float, Range(0, 0.5)] = 0.0
    seed: Annotated[int, Range(0, 2**62)] = 0
    scale: Annotated[float | None, Range(0.01, 8)] = 0.5
    size: Annotated[int | None, Range(16, 16384)] = None
    picture: bool = False
    tone: tuple[float, ...] | None = HISTOLOGY_TONE
    mirror: bool = True
    own_scale: bool = False

    def check(self) -> None:
        """Check what must fit together.

        Raises:
            RequestError: if there is nothing to extract, or neither or both of `scale` and `size` are given.
        """
        if (
            not self.timesteps
            or not self.blocks
            or len(set(self.blocks)) < len(self.blocks)
            or list(self.blocks) != sorted(self.blocks)
        ):
            raise RequestError(
                "features.timesteps and features.blocks need at least one number each, "
                "blocks ascending without repetition."
            )
        if min(self.timesteps) < 0:
            raise RequestError(f"features.timesteps must not be negative, got {min(self.timesteps)}.")
        if (self.scale is None) == (self.size is None):
            raise RequestError(
                "Give one of features.scale (working pixels per picture pixel) and "
                "features.size (longest side); the other is null."
            )
        if self.tone is not None and (len(self.tone) != 6 or min(self.tone[3:]) <= 0 or max(map(abs, self.tone)) > 1):
            raise RequestError(
                "features.tone must be three means in -1..1 and three standard deviations above 0, or null."
            )


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
        """(N, 3, H, W) floats in -1..1, H and W multiples of the largest stride -> (N, C_b, H / s_b, W / s_b) each,
        coarse first.
        """
        ...


class DiffusionFeatures:
    """Features of a diffusers denoiser: `UNet2DModel` in pixel space, or `UNet2DConditionModel` with a VAE in latent
    space.

    Attributes:
        folder: Where the weights lie.
        source: Folder or hub id as it was given.
        channels, strides, options, key: See `FeatureExtractor`.
        digest: Of the weights alone.
        device: Where it computes.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        unet: nn.Module,
        scheduler: Any,
        options: FeatureOptions,
        digest: str,
        latent: _Latent | None,
    ) -> None:
        config: Any = unet.config
        levels = len(config.block_out_channels)
        if max(options.blocks) >= levels:
            raise RequestError(
                f"features.blocks asks for block {max(options.blocks)}; the decoder of "
                f"'{source}' has blocks 0 to {levels - 1}."
            )
        steps = int(scheduler.config.num_train_timesteps)
        if max(options.timesteps) >= steps:
            raise RequestError(
                f"features.timesteps asks for {max(options.timesteps)}; '{source}' was "
                f"trained with timesteps 0 to {steps - 1}."
            )
        self.folder, self.source, self.options, self.digest = folder, source, options, digest
        self.device = next(unet.parameters()).device
        # Twice as fast in bf16 on a CPU, and no slower elsewhere.
        self._unet, self._scheduler, self._latent = unet.to(memory_format=torch.channels_last), scheduler, latent  # type: ignore[call-overload]
        base = latent.stride if latent else 1
        self._multiple = base * 2 ** (levels - 1)
        widths = list(reversed(config.block_out_channels))
        self.channels = tuple(widths[b] * len(options.timesteps) for b in options.blocks)
        self.strides = tuple(base * 2 ** (levels - 1 - b) for b in options.blocks)
        if options.picture and self.strides[-1] == 1:
            self.channels = (*self.channels[:-1], self.channels[-1] + 3)
        elif options.picture:
            self.channels, self.strides = (*self.channels, 3), (*self.strides, 1)
        self._dtype = find_autocast_dtype("auto", self.device)
        # Resolution, tone and the like decide what is asked for, not what an answer is.
        ignored = ("scale", "size", "draws", "tone", "mirror", *(() if options.own_scale else ("own_scale",)))
        asked = {k: v for k, v in to_values(options).items() if k not in ignored}
        identity = [REVISION, digest, asked, str(self._dtype), self.device.type]
        self.key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self._noises: dict[int, Tensor] = {}

    @classmethod
    def load(
        cls, source: str | Path, options: FeatureOptions | None = None, device: str | None = None
    ) -> DiffusionFeatures:
        """Load a diffusers folder or hub id.

        Read are folders with ``unet/`` and ``scheduler/`` (and for latent diffusion ``vae/``, ``text_encoder/``,
        ``tokenizer/``), and those of a `UNet2DModel` alone. Weights are read from safetensors only.

        Raises:
            ModelError: if it is no denoiser this can read, or a file is missing or damaged.
            RequestError: if a block or timestep of the options does not exist in it.
        """
        import diffusers

        options = options or FeatureOptions()
        check_config(options, "features.")
        place = pick_device(device)
        folder = find_folder(source, "denoiser", PATTERNS)
        part = folder / "unet" if (folder / "unet").is_dir() else folder
        config = read_json(part / "config.json")
        kind = config.get("_class_name")
        if kind not in ("UNet2DModel", "UNet2DConditionModel"):
            raise ModelError(
                f"'{source}' holds a {kind or 'model without a name'}; features come from "
                "a diffusers UNet2DModel or UNet2DConditionModel. `progidiff textdiff "
                "convert` makes one of a guided-diffusion checkpoint."
            )
        if config.get("class_embed_type") or config.get("num_class_embeds"):
            raise ModelError(
                f"The denoiser '{source}' wants a class label with each picture; give one "
                "that was trained without classes."
            )
        files = sorted(part.glob("*.safetensors"))
        if not files:
            pickled = (
                " There is a .bin: convert it with `save_pretrained(..., safe_serialization=True)`."
                if any(part.glob("*.bin"))
                else ""
            )
            raise ModelError(f"'{part}' holds no *.safetensors, and nothing else is loaded.{pickled}")
        try:
            unet = getattr(diffusers, kind).from_pretrained(
                part, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
            )
        except Exception as err:  # diffusers and safetensors raise their own untyped errors for damaged files
            raise ModelError(
                f"The denoiser in '{part}' cannot be loaded ({err}); restore it from where it came."
            ) from err
        unet = unet.to(place).eval().requires_grad_(False)
        scheduler = _load_scheduler(folder, source)
        latent = _Latent.load(folder, str(place)) if kind == "UNet2DConditionModel" else None
        if latent:
            files += sorted((folder / "vae").glob("*.safetensors"))
        channels = config.get("in_channels")
        if channels != (latent.channels if latent else 3):
            raise ModelError(
                f"The denoiser '{source}' takes {channels} channels; one of "
                f"{latent.channels if latent else '3 (RGB)'} is needed."
            )
        # fp16 weights under other names are the same weights: contents and settings count.
        digest = compute_digest([*files, part / "config.json"])
        return cls(folder, str(source), unet, scheduler, options, digest, latent)

    @torch.no_grad()
    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`.

        Raises:
            GeometryError: if a side is no multiple of what the network halves; `pictures.pad` helps.
        """
        height, width = pictures.shape[2:]
        if height % self._multiple or width % self._multiple:
            raise GeometryError(f"Pictures of {height} x {width} do not divide by {self._multiple}; pad them first.")
        pictures = pictures.to(self.device, torch.float32, memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None):
            clean = self._latent.encode(pictures) if self._latent else pictures
            noise = self._tile_noise(draw, clean)
            found: list[list[Tensor]] = [[] for _ in self.options.blocks]
            with _watch(self._unet, self.options.blocks) as seen:
                for time in self.pick_timesteps(draw):
                    times = torch.full((len(clean),), time, dtype=torch.long, device=self.device)
                    noised = self._scheduler.add_noise(clean, noise, times)
                    if self._latent:
                        self._unet(noised, times, encoder_hidden_states=self._latent.context.expand(len(clean), -1, -1))
                    else:
                        self._unet(noised, times)
                    for block, maps in zip(self.options.blocks, found, strict=True):
                        maps.append(seen.pop(block).float())
        features = [torch.cat(maps, dim=1) for maps in found]
        if self.options.picture and self.strides[-1] == 1 and len(features) == len(self.strides):
            features[-1] = torch.cat([features[-1], pictures], dim=1)
        elif self.options.picture:
            features.append(pictures)
        return standardise(features) if self.options.own_scale else features

    def pick_timesteps(self, draw: int) -> list[int]:
        """The timesteps of a draw: those of the options, shifted a little from the second draw on if `jitter` says
        so.
        """
        options, last = self.options, int(self._scheduler.config.num_train_timesteps) - 1
        if draw == 0 or not options.jitter:
            return list(options.timesteps)
        generator = torch.Generator().manual_seed(derive_seed(options.seed, draw, "timesteps"))
        shifts = 1 + options.jitter * (2 * torch.rand(len(options.timesteps), generator=generator) - 1)
        return [min(last, max(0, round(t * float(s)))) for t, s in zip(options.timesteps, shifts, strict=True)]

    def _tile_noise(self, draw: int, like: Tensor) -> Tensor:
        """The noise of a draw over the size of `like`, the same for every picture of a batch."""
        if draw not in self._noises:
            generator = torch.Generator().manual_seed(derive_seed(self.options.seed, draw, "noise"))
            self._noises[draw] = torch.randn((like.shape[1], NOISE_SIDE, NOISE_SIDE), generator=generator).to(
                self.device
            )
        height, width = like.shape[2:]
        repeats = (1, -(-height // NOISE_SIDE), -(-width // NOISE_SIDE))
        return self._noises[draw].repeat(repeats)[None, :, :height, :width].expand_as(like).to(like.dtype)


def standardise(features: Sequence[Tensor]) -> list[Tensor]:
    """Features with mean 0 and standard deviation 1 over each picture; what is the same everywhere becomes 0.

    Args:
        features: (N, C_b, H_b, W_b) each.
    """
    found = []
    for maps in features:
        deviation, mean = torch.std_mean(maps.float(), dim=(2, 3), keepdim=True)
        found.append((maps - mean) / deviation.clamp_min(1e-3))
    return found


class _Latent:
    """Autoencoder and empty prompt of a latent diffusion model."""

    def __init__(self, vae: Any, context: Tensor, stride: int) -> None:
        self._vae, self.context, self.stride = vae, context, stride
        self.channels = int(vae.config.latent_channels)

    @classmethod
    def load(cls, folder: Path, device: str) -> _Latent:
        backbone = Backbone(folder, device, dtype="fp32")
        tokens, mask, _ = backbone.encode_text([""])
        return cls(backbone.vae, tokens if mask is None else tokens[:, mask[0]], backbone.latent_stride)

    def encode(self, pictures: Tensor) -> Tensor:
        """(N, 3, H, W) in -1..1 -> (N, C, H / stride, W / stride), scaled as the denoiser knows them."""
        # Stable Diffusion's autoencoders overflow in half precision.
        with torch.autocast(pictures.device.type, enabled=False):
            encoded = self._vae.encode(pictures)
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        shift = getattr(self._vae.config, "shift_factor", None) or 0.0
        found: Tensor = (latents - shift) * self._vae.config.scaling_factor
        return found


@contextlib.contextmanager
def _watch(unet: Any, blocks: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Decoder blocks' activations, before the upsampler of those that have one: smaller, and nothing is lost."""
    seen: dict[int, Tensor] = {}
    handles = []
    for number in blocks:
        block = unet.up_blocks[number]
        if getattr(block, "upsamplers", None):

            def keep_input(_: nn.Module, arguments: Any, number: int = number) -> None:
                seen[number] = arguments[0]

            handles.append(block.upsamplers[0].register_forward_pre_hook(keep_input))
        else:

            def keep_output(_: nn.Module, __: Any, output: Any, number: int = number) -> None:
                seen[number] = output[0] if isinstance(output, tuple) else output

            handles.append(block.register_forward_hook(keep_output))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _load_scheduler(folder: Path, source: str | Path) -> Any:
    """The noise that the denoiser knows; only its betas are used."""
    from diffusers import DDPMScheduler

    path = next(
        (p for p in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json") if p.is_file()),
        None,
    )
    if path is None:
        raise ModelError(
            f"'{source}' has no scheduler/scheduler_config.json, so how it was noised is "
            "unknown; add the one it was trained with."
        )
    config = {k: v for k, v in read_json(path).items() if not k.startswith("_")}
    return DDPMScheduler.from_config(config)
