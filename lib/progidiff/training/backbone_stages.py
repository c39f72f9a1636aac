"""`progidiff pretrain`: an embedded backbone from scratch, in two stages.

1. *codec*: the autoencoder, on masks and on slices. Its encode-decode Dice is the ceiling of everything that follows.
2. *denoiser*: the U-Net as a text-to-image model of slices ("axial CT slice showing liver and spleen") and of their
   masks ("mask of the left kidney"), v-prediction, zero-terminal-SNR betas (arXiv 2305.08891).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.model.backbone import PROMPT_TEMPLATE, Backbone
from progidiff.model.codec import MaskCodec, encode_pictures
from progidiff.training.augment import augment
from progidiff.training.loop import LoopConfig, Report, run_loop
from progidiff.training.losses import CodecLosses, compute_dice_loss
from progidiff.training.objective import Figures
from progidiff.training.processes import Team, find_team
from progidiff.training.settings import Range
from progidiff.training.slice_cache import SliceCache


@dataclass(frozen=True)
class CodecOptions:
    """What a step of the mask codec sees.

    Attributes:
        slices_per_step: Slices of a micro-batch, each a crop.
        masks_per_slice: Masks of each slice, each a crop.
        crop: Pixels of a crop's side.
        latent_noise: Noise on the latents before decoding, in their standard deviations: the decoder learns to forgive
            what a denoiser leaves over.
        augmentation: Strength of affine and intensity augmentation.
        bias_field: Strength of simulated shading.
        losses: Their weights.
    """

    slices_per_step: Annotated[int, Range(1, 1024)] = 10
    masks_per_slice: Annotated[int, Range(1, 64)] = 3
    crop: Annotated[int, Range(8, 1024)] = 64
    latent_noise: Annotated[float, Range(0, 10)] = 0.1
    augmentation: Annotated[float, Range(0, 3)] = 1.3
    bias_field: Annotated[float, Range(0, 2)] = 0.0
    losses: CodecLosses = field(default_factory=CodecLosses)


@dataclass(frozen=True)
class TextToImageOptions:
    """What a step of the text-to-image denoiser sees.

    Attributes:
        slices_per_step: Slices of a micro-batch; a mask of each comes on top.
        text_dropout: Share of the captions replaced by the empty text.
        augmentation: Strength of affine and intensity augmentation.
        bias_field: Strength of simulated shading.
    """

    slices_per_step: Annotated[int, Range(1, 1024)] = 12
    text_dropout: Annotated[float, Range(0, 1)] = 0.1
    augmentation: Annotated[float, Range(0, 3)] = 1.0
    bias_field: Annotated[float, Range(0, 2)] = 0.0


def draw_masks(
    cache: SliceCache, images: Tensor, labels: Tensor, per_slice: int, rng: np.random.Generator, smallest: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks of structures that are on the slices: drawn at random, or the smallest of each slice.

    Returns:
        rows (M,) of the slice, structure (M,) indices from 0, masks (M, H, W) floats.
    """
    rows, structures, masks = [], [], []
    for n in range(len(labels)):
        present = [int(v) - 1 for v in torch.unique(labels[n]) if v > 0]
        if not present:
            continue
        if smallest:
            picked = sorted(present, key=lambda s: int((labels[n] == s + 1).sum()))[:per_slice]
        else:
            picked = rng.choice(present, size=min(per_slice, len(present)), replace=False).tolist()
        for s in picked:
            rows.append(n)
            structures.append(int(s))
            masks.append(labels[n] == int(s) + 1)
    if not rows:
        height, width = labels.shape[-2:]
        return torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0, height, width)
    return torch.tensor(rows), torch.tensor(structures), torch.stack(masks).float()


@torch.no_grad()
def compute_codec_ceiling(
    vae: Any, cache: SliceCache, every: int = 1, per_structure: int = 400, team: Team | None = None
) -> dict[str, float]:
    """Encode-decode Dice of ground-truth masks at the working resolution, per structure (voxels pooled over all
    slices).

    Args:
        every: Slices of which one is measured.
        per_structure: Measured slices at most.
        team: The processes that share the slices, all of which call this; None for this one alone.
    """
    team = team or Team()
    codec = MaskCodec(vae)
    device = codec.mean.device
    ceiling = {}
    for s, structure in enumerate(cache.structures):
        chosen = cache.by_structure[s][::every][:per_structure]
        overlap = total = 0.0
        for start in team.share(range(0, len(chosen), 32)):
            _, labels = cache.read([int(i) for i in chosen[start : start + 32]])
            masks = (labels == s + 1).float().to(device)
            with torch.autocast(device.type, torch.bfloat16):
                decoded = codec.decode_signed(codec.encode_masks(masks)) > 0
            overlap += float((decoded & masks.bool()).sum())
            total += float(decoded.sum() + masks.sum())
        overlap, total = (sum(part) for part in zip(*team.gather((overlap, total)), strict=True))
        if total:
            ceiling[structure] = 2 * overlap / total
    return ceiling


def crop_around(stack: Tensor, masks: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """A square of `size` pixels of each of M pictures, placed so that it meets the mask's foreground if there is any.

    Args:
        stack: (M, H, W) pictures or masks to crop.
        masks: (M, H, W) that decide where.
    """
    height, width = stack.shape[-2:]
    crops = []
    for picture, mask in zip(stack, masks, strict=True):
        inside = mask.nonzero()
        y, x = (
            inside[rng.integers(len(inside))].tolist() if len(inside) else (rng.integers(height), rng.integers(width))
        )
        top = int(np.clip(y - rng.integers(size), 0, height - size))
        left = int(np.clip(x - rng.integers(size), 0, width - size))
        crops.append(picture[top : top + size, left : left + size])
    return torch.stack(crops)


def train_codec(
    vae: Any,
    training: SliceCache,
    validation: SliceCache | None,
    config: LoopConfig,
    folder: Path,
    options: CodecOptions | None = None,
    refine: bool = False,
    settings: Mapping[str, Any] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> list[dict[str, float]]:
    """Train the autoencoder on crops of masks (Dice + cross-entropy + L1) and of slices (L1 + gradients).

    With `refine` the encoder stays as it is, so that latents keep their meaning, and the decoder sees the smallest
    structures most.

    Args:
        options: What a step sees.
        is_cancelled, report, settings: See `run_loop`.

    Returns:
        The validation history.
    """
    options = options or CodecOptions()
    crop, weights = options.crop, options.losses
    vae.requires_grad_(True).train()
    vae.encoder.requires_grad_(not refine)
    device = next(vae.parameters()).device

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        images, labels = training.read_bytes(training.draw_balanced(options.slices_per_step, rng, random_share=0.0))
        images, labels = augment(images, labels, generator, options.augmentation, options.bias_field)
        _, _, masks = draw_masks(training, images, labels, options.masks_per_slice, rng, smallest=refine)
        masks = crop_around(masks, masks, crop, rng).to(device)
        pictures = (
            crop_around(images[:, images.shape[1] // 2], labels, crop, rng)[:, None].expand(-1, 3, -1, -1).to(device)
        )
        inputs = torch.cat([(masks * 2 - 1)[:, None].expand(-1, 3, -1, -1), pictures])
        latents = vae.encode(inputs).latents
        noisy = latents + options.latent_noise * latents.detach().float().std() * torch.randn_like(latents)
        decoded = vae.decode(noisy).sample.float()
        logits = 8 * decoded[: len(masks)].mean(dim=1)
        cross_entropy = F.binary_cross_entropy_with_logits(logits, masks)
        dice = compute_dice_loss(logits.sigmoid(), masks, (1, 2), smooth=2.0)
        signed = F.l1_loss(decoded[: len(masks)], inputs[: len(masks)])
        drawn = decoded[len(masks) :]
        picture = (
            F.l1_loss(drawn, pictures)
            + F.l1_loss(drawn.diff(dim=-1), pictures.diff(dim=-1))
            + F.l1_loss(drawn.diff(dim=-2), pictures.diff(dim=-2))
        )
        size = latents.float().square().mean()
        loss = (
            weights.dice * dice
            + weights.cross_entropy * cross_entropy
            + weights.mask * signed
            + weights.picture * picture
            + weights.size * size
        )
        return loss, {
            "dice": dice.detach(),
            "ce": cross_entropy.detach(),
            "picture": picture.detach(),
            "size": size.detach(),
        }

    def validate() -> dict[str, float]:
        assert validation is not None
        ceiling = compute_codec_ceiling(vae, validation, every=3, team=find_team())
        return {"lowest": min(ceiling.values()), **ceiling}

    check = None if validation is None else validate
    return run_loop({"vae": vae}, compute_loss, config, folder, check, is_cancelled, report, settings=settings)


def compute_picture_scale(vae: Any, cache: SliceCache, count: int = 128) -> float:
    """1 / standard deviation of raw latents over slices: the `scaling_factor` of the Stable-Diffusion format."""
    rng = np.random.default_rng(0)
    images, _ = cache.read(cache.draw_balanced(count, rng))
    pictures = images[:, images.shape[1] // 2][:, None].expand(-1, 3, -1, -1).to(next(vae.parameters()).device)
    with torch.no_grad():
        latents = torch.cat([encode_pictures(vae, part) for part in pictures.split(16)])
    return float(1 / latents.std())


def describe_slice(structures: list[str], modality: str) -> str:
    """The caption of a slice, e.g. ``axial CT slice showing liver and spleen``."""
    if not structures:
        return f"axial {modality} slice"
    listed = structures[0] if len(structures) == 1 else ", ".join(structures[:-1]) + " and " + structures[-1]
    return f"axial {modality} slice showing {listed}"


def train_text_to_image(
    backbone: Backbone,
    unet: Any,
    training: SliceCache,
    modality: str,
    config: LoopConfig,
    folder: Path,
    options: TextToImageOptions | None = None,
    settings: Mapping[str, Any] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> None:
    """Train the denoiser as a text-to-image model: half slices, half masks, v-prediction.

    Args:
        options: What a step sees.
        is_cancelled, report, settings: See `run_loop`.
    """
    from diffusers import DDIMScheduler

    options = options or TextToImageOptions()
    slices = options.slices_per_step
    scheduler = DDIMScheduler.from_config(backbone.scheduler_config)
    scale = float(backbone.vae.config.scaling_factor)
    unet.requires_grad_(True).train()
    alphas = scheduler.alphas_cumprod

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        images, labels = training.read_bytes(training.draw_balanced(slices, rng))
        images, labels = augment(images, labels, generator, options.augmentation, options.bias_field)
        _, picked, masks = draw_masks(training, images, labels, 1, rng)
        captions = []
        for n in range(slices):
            present = [training.structures[int(v) - 1] for v in torch.unique(labels[n]) if v > 0]
            captions.append(
                describe_slice(list(rng.permutation(present)[: rng.integers(1, 5)]) if present else [], modality)
            )
        captions += [PROMPT_TEMPLATE.format(training.structures[int(s)]) for s in picked]
        captions = ["" if rng.random() < options.text_dropout else c for c in captions]
        pictures = torch.cat([images[:, images.shape[1] // 2], masks * 2 - 1])[:, None].expand(-1, 3, -1, -1)
        with torch.no_grad():
            clean = encode_pictures(backbone.vae, pictures.to(backbone.device)) * scale
        tokens, mask, _ = backbone.encode_text(captions)
        noise = torch.randn(clean.shape, generator=generator).to(backbone.device)
        timesteps = torch.randint(0, len(alphas), (len(clean),), generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1).to(backbone.device)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
        predicted = unet(noisy, timesteps.to(backbone.device), tokens, encoder_attention_mask=mask).sample
        loss = F.mse_loss(predicted.float(), target)
        return loss, {}

    run_loop({"unet": unet}, compute_loss, config, folder, None, is_cancelled, report, settings=settings)
