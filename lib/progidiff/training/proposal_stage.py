"""Recipe 2 of `progidiff train`: the denoiser learns to propose masks from noise, evidence and image features.

Per step: slices are encoded once (no gradient), several (slice, structure) pairs share the encoding, present and absent
structures alike. The evidence is *worn down* at random before the denoiser sees it: on training patients it is better
than it will ever be on new ones, and a denoiser that trusted it blindly would propose one mask K times.
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

from progidiff.model.codec import MaskCodec
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.lora import INJECTION
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline, draw_smooth_field
from progidiff.proposals.agreement import compute_disagreement
from progidiff.training.augment import Augmentation
from progidiff.training.device_batches import move
from progidiff.training.dice_tally import DiceTally, average_volumes
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.logged_pictures import draw_answers
from progidiff.training.loop import LoopConfig, Report, run_loop
from progidiff.training.losses import ProposalLosses, compute_mask_loss
from progidiff.training.objective import Figures, Objective
from progidiff.training.processes import Team, find_team
from progidiff.training.settings import Range
from progidiff.training.slice_cache import SliceCache


def wear_down_evidence(logits: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Random, smooth errors on evidence logits, like those of a new patient.

    A low-frequency field shifts the logits (false and missing parts), a random temperature changes the confidence, and
    now and then the evidence is blurred or goes missing altogether.

    Args:
        logits: (M, H, W).

    Returns:
        Evidence (M, H, W) in [0, 1].
    """
    count, height, width = logits.shape

    def uniform(low: float, high: float) -> Tensor:
        return move(torch.rand(count, 1, 1, generator=generator) * (high - low) + low, logits.device)

    # Random numbers are drawn on the CPU, so that a run does not depend on the device.
    field = move(draw_smooth_field(count, height, width, generator), logits.device)
    noisy = (
        logits * torch.exp(uniform(-0.5, 0.2) * strength)
        + field * uniform(0.0, 2.0) * strength
        + uniform(-0.7, 0.7) * strength
    )
    blurred = F.avg_pool2d(noisy[:, None], 5, stride=1, padding=2)[:, 0]
    noisy = torch.where(uniform(0, 1) < 0.25 * strength, blurred, noisy)
    evidence = noisy.sigmoid()
    return torch.where(uniform(0, 1) < 0.05 * strength, torch.full_like(evidence, 0.5), evidence)


def draw_pairs(
    labels: Tensor, spoken: Tensor, present_per_slice: int, absent_per_slice: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
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
        picked = list(rng.permutation(sorted(there))[:present_per_slice]) + list(
            rng.permutation(gone)[:absent_per_slice]
        )
        rows += [n] * len(picked)
        structures += [int(s) for s in picked]
    return torch.tensor(rows), torch.tensor(structures)


@dataclass(frozen=True)
class ProposalOptions:
    """What a step of this recipe sees.

    Attributes:
        slices_per_step: Slices of a micro-batch, each encoded once.
        present_per_slice, absent_per_slice: Structures asked for per slice: that are there, and that are not.
        text_dropout: Share of the prompts replaced by the empty text, for classifier-free guidance.
        noise_share: Share of the pairs that start from pure noise: with few inference steps that is where most of the
            work is done.
        decode_share: Share of the pairs whose mask is decoded for the mask loss.
        evidence_wear: Strength of `wear_down_evidence`.
        augmentation: Strength of affine and intensity augmentation.
        bias_field: Strength of simulated shading.
        losses: Their weights.
    """

    slices_per_step: Annotated[int, Range(1, 1024)] = 6
    present_per_slice: Annotated[int, Range(1, 64)] = 3
    absent_per_slice: Annotated[int, Range(1, 64)] = 1
    text_dropout: Annotated[float, Range(0, 1)] = 0.1
    noise_share: Annotated[float, Range(0, 1)] = 0.4
    decode_share: Annotated[float, Range(0, 1)] = 0.5
    evidence_wear: Annotated[float, Range(0, 3)] = 1.0
    augmentation: Annotated[float, Range(0, 3)] = 1.0
    bias_field: Annotated[float, Range(0, 2)] = 0.0
    losses: ProposalLosses = field(default_factory=ProposalLosses)


@dataclass(frozen=True)
class ProposalDraw:
    """N slices as they are kept and M (slice, structure) pairs, on the CPU.

    Attributes:
        images: uint8 (N, C, H, W), not augmented yet.
        augmentation: What will be done to the images, and was done to the labels.
        rows, picked: (M,) slice and structure of every pair.
        masks: uint8 (M, H, W) truth.
        rng: Goes on where drawing stopped.
    """

    images: Tensor
    augmentation: Augmentation
    rows: Tensor
    picked: Tensor
    masks: Tensor
    rng: np.random.Generator


@dataclass(frozen=True)
class ProposalBatch:
    """N augmented slices and M (slice, structure) pairs where the networks are.

    Attributes:
        images: (N, C, H, W) in [-1, 1].
        rows, picked: (M,) slice and structure of every pair.
        masks: (M, H, W) truth.
        shown: The same masks on the CPU, for what is decided by looking at them.
        rng: Goes on where drawing the batch stopped.
    """

    images: Tensor
    rows: Tensor
    picked: Tensor
    masks: Tensor
    shown: Tensor
    rng: np.random.Generator


class ProposalObjective(Objective):
    """Loss of denoiser and injection on a batch: v-prediction MSE, L1 of the implied clean latent, Dice and
    cross-entropy of some masks.

    Args:
        pipeline: The networks.
        phrases: Of the structures of `training`.
        training: Slices to draw from.
        options: What a step sees.
    """

    def __init__(
        self, pipeline: ProposalPipeline, phrases: PhraseTable, training: SliceCache, options: ProposalOptions
    ) -> None:
        self.pipeline, self.phrases, self.training, self.options = pipeline, phrases, training, options

    def draw(self, generator: torch.Generator) -> ProposalDraw:
        """Draw and read slices, and choose what is asked of them: labels are augmented here, for that needs a look."""
        options, training = self.options, self.training
        height, width = training.config.height, training.config.width
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        chosen = training.draw_balanced(options.slices_per_step, rng)
        images, labels = training.read_bytes(chosen)
        augmentation = Augmentation.draw(
            generator, len(chosen), width / height, options.augmentation, options.bias_field
        )
        labels = augmentation.warp.move_labels(labels, height, width)
        rows, picked = draw_pairs(
            labels, training.weigh(chosen), options.present_per_slice, options.absent_per_slice, rng
        )
        masks = (labels[rows] == picked[:, None, None] + 1).to(torch.uint8)
        return ProposalDraw(images, augmentation, rows, picked, masks, rng)

    def prepare(self, drawn: ProposalDraw) -> ProposalBatch:
        """Augment the images on the device."""
        there = move(drawn, self.pipeline.device)
        images = there.augmentation.apply_to_images(there.images)
        return ProposalBatch(images, there.rows, there.picked, there.masks.float(), drawn.masks, drawn.rng)

    def draw_batch(self, generator: torch.Generator) -> ProposalBatch:
        """Draw, read and augment slices, and choose what is asked of them."""
        return self.prepare(self.draw(generator))

    def compute(self, drawn: ProposalDraw, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of what was drawn, for `run_loop`."""
        return self.compute_loss(self.prepare(drawn), generator)

    def compute_loss(self, batch: ProposalBatch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Run the networks on a batch."""
        options, phrases = self.options, self.phrases
        branch, unet, codec, device = (
            self.pipeline.branch,
            self.pipeline.unet,
            self.pipeline.codec,
            self.pipeline.device,
        )
        alphas = self.pipeline.scheduler.alphas_cumprod
        rows, picked, masks = batch.rows, batch.picked, batch.masks
        texts = move(phrases.draw(generator), device)[picked]
        with torch.no_grad():
            branch.encoder.eval()
            features = branch.encode_slices(batch.images)
            words = phrases.pooled[move(phrases.draw(generator), device)]
            logits = branch.predict_evidence(features, words)[rows, picked].float()
            clean = codec.encode_masks(masks).float()
        evidence = wear_down_evidence(logits, generator, options.evidence_wear)
        down, middle = branch.compute_residuals(features[rows], evidence[:, None])

        noise = move(torch.randn(clean.shape, generator=generator), device)
        timesteps = torch.randint(0, len(alphas), (len(clean),), generator=generator)
        from_noise = torch.rand(len(clean), generator=generator) < options.noise_share
        timesteps = torch.where(from_noise, torch.full_like(timesteps, len(alphas) - 1), timesteps)
        alpha = move(alphas[timesteps].view(-1, 1, 1, 1), device)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

        tokens, mask = phrases.tokens[texts], None if phrases.mask is None else phrases.mask[texts]
        dropped = torch.rand(len(clean), generator=generator) < options.text_dropout
        tokens, mask = drop_text(tokens, mask, move(dropped, device), phrases)
        predicted = unet(
            noisy,
            move(timesteps, device),
            tokens,
            encoder_attention_mask=mask,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        ).sample.float()
        implied = alpha.sqrt() * noisy - (1 - alpha).sqrt() * predicted
        diffusion = F.mse_loss(predicted, target)
        latent = F.l1_loss(implied, clean)
        decoded = torch.randperm(len(clean), generator=generator)[: max(1, round(options.decode_share * len(clean)))]
        crops = decode_crops(codec, implied[move(decoded, device)], batch.shown[decoded].float(), batch.rng)
        mask_loss = compute_mask_loss(*crops, options.losses.cross_entropy)
        weights = options.losses
        loss = weights.diffusion * diffusion + weights.latent * latent + weights.mask * mask_loss
        return loss, {
            "diffusion": diffusion.detach(),
            "latent": latent.detach(),
            "mask": mask_loss.detach(),
        }


def train_proposals(
    pipeline: ProposalPipeline,
    training: SliceCache,
    validation: SliceCache | None,
    config: LoopConfig,
    folder: Path,
    options: ProposalOptions | None = None,
    freeze_denoiser: bool = False,
    trained: Mapping[str, torch.nn.Module] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    settings: Mapping[str, Any] | None = None,
) -> list[dict[str, float]]:
    """Train denoiser and injection jointly; encoder, query head and codec stay as they are.

    Args:
        options: What a step sees.
        freeze_denoiser: Train the injection only.
        trained: Train those parameters of these networks that require gradients, instead; how adapters are trained.
        is_cancelled, report, settings: See `run_loop`.

    Returns:
        The validation history; on return the networks hold the averaged weights.
    """
    branch, unet = pipeline.branch, pipeline.unet
    phrases = PhraseTable(pipeline.backbone, training.structures)
    if trained is None:
        for module in (branch.encoder, branch.query_head, pipeline.codec):
            module.requires_grad_(False)
        unet.requires_grad_(not freeze_denoiser)
        injection = torch.nn.ModuleDict({n: getattr(branch, n) for n in INJECTION})
        trained = (
            {"injection": injection.requires_grad_(True)}
            if freeze_denoiser
            else {"unet": unet, "injection": injection.requires_grad_(True)}
        )
    objective = ProposalObjective(pipeline, phrases, training, options or ProposalOptions())
    if validation is None:
        return run_loop(trained, objective, config, folder, None, is_cancelled, report, settings=settings)
    held_out = validation
    return run_loop(
        trained,
        objective,
        config,
        folder,
        lambda: validate_proposals(pipeline, held_out, phrases, team=find_team()),
        is_cancelled,
        report,
        lambda: draw_answers(held_out, lambda images: _propose(pipeline, images, phrases)),
        settings,
    )


class ProposalSampler:
    """Draws K proposals for every structure of a slice whose evidence is above a gate.

    Args:
        pipeline: The networks.
        num_proposals: K.
        gate: Smallest evidence of a pixel for which anything is drawn.
        num_inference_steps, guidance_scale: Of the sampling.
    """

    def __init__(
        self,
        pipeline: ProposalPipeline,
        num_proposals: int = 4,
        gate: float = 0.2,
        num_inference_steps: int = 2,
        guidance_scale: float = 1.0,
    ) -> None:
        self._pipeline, self._gate = pipeline, gate
        self._steps, self._guidance = num_inference_steps, guidance_scale
        self._noise = pipeline.draw_noise(num_proposals, seed=0)
        self._offsets = pipeline.draw_offsets(num_proposals, seed=0)

    def draw(self, features: SliceFeatures, evidence: Tensor, prompts: EncodedPrompts) -> Tensor:
        """Masks of N slices and P prompts.

        Args:
            features: Of the slices.
            evidence: (N, P, H, W).
            prompts: P.

        Returns:
            (N, P, K, H, W) bool on the CPU; nothing where the evidence is below the gate.
        """
        drawn = torch.zeros(*evidence.shape[:2], len(self._noise), *evidence.shape[2:], dtype=torch.bool)
        pairs = [(n, p) for n, p in np.ndindex(*evidence.shape[:2]) if float(evidence[n, p].max()) >= self._gate]
        for at in range(0, len(pairs), 16):
            part = pairs[at : at + 16]
            soft = self._pipeline.propose(
                features, evidence, prompts, part, self._noise, self._steps, self._guidance, self._offsets
            )
            for (n, p), masks in zip(part, soft >= 0.5, strict=True):
                drawn[n, p] = masks
        return drawn


def _propose(pipeline: ProposalPipeline, images: Tensor, phrases: PhraseTable) -> list[Tensor]:
    """Evidence, one proposal and the consensus of some slices, each (N, P, H, W) bool."""
    prompts = phrases.pick_canonical()
    features = pipeline.encode_slices(images)
    evidence = pipeline.predict_evidence(features, prompts)
    drawn = ProposalSampler(pipeline).draw(features, evidence, prompts)
    return [evidence >= 0.5, drawn[:, :, 0], drawn.float().mean(2) >= 0.5]


def decode_crops(
    codec: MaskCodec, latents: Tensor, masks: Tensor, rng: np.random.Generator, size: int = 8
) -> tuple[Tensor, Tensor]:
    """Decode a square of each latent, placed on the mask's foreground if there is any: a fifth of the work of the
    whole.

    Args:
        latents: (M, c, h, w) standardised.
        masks: (M, H, W) truth.
        size: Latent pixels of the square.

    Returns:
        Soft masks and truth, (M, size * stride, size * stride); whole slices if the codec is not local.
    """
    height, width = latents.shape[-2:]
    if not codec.is_local or height <= size or width <= size:
        return codec.decode_soft(latents), move(masks, latents.device)
    stride = masks.shape[-1] // width
    parts, truths = [], []
    for latent, mask in zip(latents, masks, strict=True):
        inside = mask.nonzero()
        y, x = (
            (inside[rng.integers(len(inside))] // stride).tolist()
            if len(inside)
            else (rng.integers(height), rng.integers(width))
        )
        top, left = (
            int(np.clip(y - rng.integers(size), 0, height - size)),
            int(np.clip(x - rng.integers(size), 0, width - size)),
        )
        parts.append(latent[:, top : top + size, left : left + size])
        truths.append(mask[top * stride : (top + size) * stride, left * stride : (left + size) * stride])
    return codec.decode_soft(torch.stack(parts)), move(torch.stack(truths), latents.device)


def drop_text(
    tokens: Tensor, mask: Tensor | None, dropped: Tensor, phrases: PhraseTable
) -> tuple[Tensor, Tensor | None]:
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
    team: Team | None = None,
) -> dict[str, float]:
    """Dice of evidence, single proposals, consensus and best of K on every n-th slice, pooled per volume, averaged over
    volumes.

    Args:
        team: The processes that share the slices, all of which call this; None for this one alone.
    """
    team = team or Team()
    pipeline.branch.eval()
    prompts = phrases.pick_canonical()
    sampler = ProposalSampler(pipeline, num_proposals, gate, num_inference_steps)
    tally = DiceTally(cache)
    spread: list[float] = []
    chosen = list(range(0, len(cache), every))
    for start in team.share(range(0, len(chosen), 8)):
        batch = chosen[start : start + 8]
        images, labels = cache.read(batch)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        drawn = sampler.draw(features, evidence, prompts)
        if num_proposals > 1:
            spread += [compute_disagreement(masks) for masks in drawn.flatten(0, 1) if masks.any()]
        masks_of = {f"proposal {k}": drawn[:, :, k] for k in range(num_proposals)}
        tally.add(
            batch, labels, {"evidence": evidence.cpu() >= 0.5, "consensus": drawn.float().mean(2) >= 0.5, **masks_of}
        )
    tally.sum_over(team)
    spread = [one for part in team.gather(spread) for one in part]
    # A structure that the volume has but none of the chosen slices shows counts as 0 for every kind alike: choose
    # enough slices.
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
    return {**figures, **{f"consensus {s}": d for s, d in average_volumes(consensus, cache.structures).items()}}
