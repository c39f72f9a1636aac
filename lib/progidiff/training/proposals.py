"""Recipe 2 of `progidiff train`: the denoiser learns to propose masks from noise, evidence and image features.

Per step: slices are encoded once (no gradient), several (slice, structure) pairs share the encoding, present and absent
structures alike. The evidence is *worn down* at random before the denoiser sees it: on training patients it is better than it
will ever be on new ones, and a denoiser that trusted it blindly would propose one mask K times.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.codec import MaskCodec
from progidiff.pipeline import ProposalPipeline
from progidiff.proposals import compute_disagreement
from progidiff.training.data import SliceCache, augment
from progidiff.training.evidence import PhraseTable
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.losses import compute_mask_loss
from progidiff.training.scores import DiceTally, one_hot


def wear_down_evidence(logits: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Random, smooth errors on evidence logits, like those of a new patient.

    A low-frequency field shifts the logits (false and missing parts), a random temperature changes the confidence, and now and
    then the evidence is blurred or goes missing altogether.

    Args:
        logits: (M, H, W).

    Returns:
        Evidence (M, H, W) in [0, 1].
    """
    count, height, width = logits.shape

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, 1, 1, generator=generator) * (high - low) + low

    coarse = torch.randn(count, 1, 8, 10, generator=generator)
    fine = torch.randn(count, 1, 16, 20, generator=generator)
    field = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[:, 0]
    field = field + F.interpolate(fine, size=(height, width), mode="bicubic", align_corners=False)[:, 0]
    noisy = logits * torch.exp(uniform(-0.5, 0.2) * strength) + field * uniform(0.0, 2.0) * strength + uniform(-0.7, 0.7) * strength
    blurred = F.avg_pool2d(noisy[:, None], 5, stride=1, padding=2)[:, 0]
    noisy = torch.where(uniform(0, 1) < 0.25 * strength, blurred, noisy)
    evidence = noisy.sigmoid()
    return torch.where(uniform(0, 1) < 0.05 * strength, torch.full_like(evidence, 0.5), evidence)


def draw_pairs(labels: Tensor, spoken: Tensor, present_per_slice: int, absent_per_slice: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """(slice, structure) pairs: structures that are there, and some that are not.

    Args:
        labels: (N, H, W) label ids.
        spoken: (N, P), 0 where the label does not say whether the structure is there: such pairs are not drawn.

    Returns:
        rows (M,) and structures (M,), indices from 0.
    """
    rows, structures = [], []
    for n in range(len(labels)):
        known = {s for s in range(spoken.shape[1]) if spoken[n, s] > 0}
        there = {int(v) - 1 for v in torch.unique(labels[n]) if v > 0} & known
        gone = sorted(known - there)
        picked = list(rng.permutation(sorted(there))[:present_per_slice]) + list(rng.permutation(gone)[:absent_per_slice])
        rows += [n] * len(picked)
        structures += [int(s) for s in picked]
    return torch.tensor(rows), torch.tensor(structures)


def train_proposals(
    pipeline: ProposalPipeline,
    training: SliceCache,
    validation: SliceCache | None,
    config: LoopConfig,
    folder: Path,
    slices: int = 6,
    present_per_slice: int = 3,
    absent_per_slice: int = 1,
    text_dropout: float = 0.1,
    decode_share: float = 0.5,
    evidence_wear: float = 1.0,
    freeze_denoiser: bool = False,
    trained: Mapping[str, torch.nn.Module] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, float]]:
    """Train denoiser and injection jointly; encoder, query head and codec stay as they are.

    Loss: v-prediction MSE + L1 of the implied clean latent + Dice and cross-entropy of some decoded masks.

    Args:
        decode_share: Share of the pairs whose mask is decoded for the mask loss.
        evidence_wear: Strength of `wear_down_evidence`.
        freeze_denoiser: Train the injection only.
        trained: Train those parameters of these networks that require gradients, instead; how adapters are trained.
        is_cancelled, report: See `run_loop`.
    """
    branch, unet, codec = pipeline.branch, pipeline.unet, pipeline.codec
    phrases = PhraseTable(pipeline.backbone, training.structures)
    alphas = pipeline.scheduler.alphas_cumprod
    injection = torch.nn.ModuleDict(
        {n: getattr(branch, n) for n in ("evidence_in", "image_in", "evidence_down", "mix", "zero")},
    )
    modules: dict[str, torch.nn.Module] = {"injection": injection} if freeze_denoiser else {"unet": unet, "injection": injection}
    if trained is None:
        for module in (branch.encoder, branch.query_head, codec):
            module.requires_grad_(False)
        unet.requires_grad_(not freeze_denoiser)
    else:
        modules = dict(trained)
    structures = len(training.structures)
    device = pipeline.device

    def compute_loss(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        chosen = training.draw_balanced(slices, rng)
        images, labels = training.read(chosen)
        images, labels = augment(images, labels, generator)
        rows, picked = draw_pairs(labels, training.weigh(chosen), present_per_slice, absent_per_slice, rng)
        masks = one_hot(labels, structures)[rows, picked]
        texts = phrases.draw(generator)[picked]
        with torch.no_grad():
            branch.encoder.eval()
            features = branch.encode_slices(images.to(device))
            logits = branch.predict_evidence(features, phrases.pooled[phrases.draw(generator)])[rows, picked].float()
            clean = codec.encode_masks(masks.to(device)).float()
        # Random numbers are drawn on the CPU, so that a run does not depend on the device.
        evidence = wear_down_evidence(logits.cpu(), generator, evidence_wear).to(device)
        down, middle = branch.compute_residuals(features[rows], evidence[:, None])

        noise = torch.randn(clean.shape, generator=generator).to(device)
        # Half of the steps start from pure noise: with few inference steps that is where most of the work is done.
        timesteps = torch.randint(0, len(alphas), (len(clean),), generator=generator)
        timesteps = torch.where(torch.rand(len(clean), generator=generator) < 0.4, torch.full_like(timesteps, len(alphas) - 1), timesteps)
        alpha = alphas[timesteps].view(-1, 1, 1, 1).to(device)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

        tokens, mask = phrases.tokens[texts], None if phrases.mask is None else phrases.mask[texts]
        dropped = torch.rand(len(clean), generator=generator) < text_dropout
        tokens, mask = drop_text(tokens, mask, dropped.to(device), phrases)
        predicted = unet(
            noisy,
            timesteps.to(device),
            tokens,
            encoder_attention_mask=mask,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        ).sample.float()
        implied = alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted
        diffusion = F.mse_loss(predicted, target)
        latent = F.l1_loss(implied, clean)
        decoded = torch.randperm(len(clean), generator=generator)[: max(1, round(decode_share * len(clean)))]
        mask_loss = compute_mask_loss(*decode_crops(codec, implied[decoded], masks[decoded], rng))
        loss = diffusion + 0.5 * latent + 0.3 * mask_loss
        return loss, {"diffusion": float(diffusion.detach()), "latent": float(latent.detach()), "mask": float(mask_loss.detach())}

    def validate() -> dict[str, float]:
        assert validation is not None
        return validate_proposals(pipeline, validation, phrases)

    return run_loop(modules, compute_loss, config, folder, None if validation is None else validate, is_cancelled, report)


def decode_crops(codec: MaskCodec, latents: Tensor, masks: Tensor, rng: np.random.Generator, size: int = 8) -> tuple[Tensor, Tensor]:
    """Decode a square of each latent, placed on the mask's foreground if there is any: a fifth of the work of the whole.

    Args:
        latents: (M, c, h, w) standardised.
        masks: (M, H, W) truth.
        size: Latent pixels of the square.

    Returns:
        Soft masks and truth, (M, size * stride, size * stride); whole slices if the codec is not local.
    """
    height, width = latents.shape[-2:]
    if not codec.is_local or height <= size or width <= size:
        return codec.decode_soft(latents), masks.to(latents.device)
    stride = masks.shape[-1] // width
    parts, truths = [], []
    for latent, mask in zip(latents, masks, strict=True):
        inside = mask.nonzero()
        y, x = (inside[rng.integers(len(inside))] // stride).tolist() if len(inside) else (rng.integers(height), rng.integers(width))
        top, left = int(np.clip(y - rng.integers(size), 0, height - size)), int(np.clip(x - rng.integers(size), 0, width - size))
        parts.append(latent[:, top : top + size, left : left + size])
        truths.append(mask[top * stride : (top + size) * stride, left * stride : (left + size) * stride])
    return codec.decode_soft(torch.stack(parts)), torch.stack(truths).to(latents.device)


def drop_text(tokens: Tensor, mask: Tensor | None, dropped: Tensor, phrases: PhraseTable) -> tuple[Tensor, Tensor | None]:
    """Replace the text of some samples by the empty one, padded to the same length."""
    length = tokens.shape[1]
    empty = F.pad(phrases.empty_tokens, (0, 0, 0, length - phrases.empty_tokens.shape[1]))
    tokens = torch.where(dropped[:, None, None], empty, tokens)
    if mask is not None and phrases.empty_mask is not None:
        mask = torch.where(dropped[:, None], F.pad(phrases.empty_mask, (0, length - phrases.empty_mask.shape[1])), mask)
    return tokens, mask


@torch.no_grad()
def validate_proposals(
    pipeline: ProposalPipeline,
    cache: SliceCache,
    phrases: PhraseTable,
    every: int = 6,
    num_proposals: int = 4,
    num_inference_steps: int = 2,
    gate: float = 0.2,
) -> dict[str, float]:
    """Dice of evidence, single proposals, consensus and best of K on every n-th slice, pooled per volume, averaged over volumes."""
    branch, structures = pipeline.branch, len(cache.structures)
    branch.eval()
    prompts = phrases.pick_canonical()
    noise = pipeline.draw_noise(num_proposals, seed=0)
    tally = DiceTally(cache)
    spread: list[float] = []
    chosen = list(range(0, len(cache), every))
    for start in range(0, len(chosen), 8):
        batch = chosen[start : start + 8]
        images, labels = cache.read(batch)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        drawn = torch.zeros(len(batch), structures, num_proposals, *labels.shape[-2:], dtype=torch.bool)
        pairs = [(n, p) for n in range(len(batch)) for p in range(structures) if float(evidence[n, p].max()) >= gate]
        for at in range(0, len(pairs), 16):
            part = pairs[at : at + 16]
            result = pipeline.propose(features, evidence, prompts, part, noise, num_inference_steps) >= 0.5
            for (n, p), masks in zip(part, result, strict=True):
                drawn[n, p] = masks
                if num_proposals > 1 and masks.any():
                    spread.append(compute_disagreement(masks))
        masks_of = {f"proposal {k}": drawn[:, :, k] for k in range(num_proposals)}
        tally.add(batch, labels, {"evidence": evidence.cpu() >= 0.5, "consensus": drawn.float().mean(2) >= 0.5, **masks_of})
    # A structure that the volume has but none of the chosen slices shows counts as 0 for every kind alike: choose enough slices.
    present = np.stack([p.sum(0) for p in cache.pixels]) > 0
    evidence_dice, consensus = tally.compute_dice("evidence", present), tally.compute_dice("consensus", present)
    singles = np.stack([tally.compute_dice(f"proposal {k}", present) for k in range(num_proposals)])
    figures = {
        "evidence": float(np.nanmean(evidence_dice)),
        "single": float(np.nanmean(singles)),
        "consensus": float(np.nanmean(consensus)),
        "best": float(np.nanmean(singles.max(0))),
        "disagreement": float(np.mean(spread)) if spread else 0.0,
    }
    return {**figures, **{f"consensus {s}": float(d) for s, d in zip(cache.structures, np.nanmean(consensus, 0), strict=True)}}
