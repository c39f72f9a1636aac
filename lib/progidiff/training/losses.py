"""Losses as plain functions of tensors; recipes choose and weigh them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from progidiff.training.settings import Range

Weight = Annotated[float, Range(0, 1e4)]


@dataclass(frozen=True)
class EvidenceLosses:
    """Weights of the text-query head's losses.

    Attributes:
        cross_entropy: Pixels are mostly background: the cross-entropy of one structure is small, so it needs weight
            beside the Dice.
        dice: Of every structure, pooled over the batch.
    """

    cross_entropy: Weight = 10.0
    dice: Weight = 1.0


@dataclass(frozen=True)
class ProposalLosses:
    """Weights of the denoiser's losses.

    Attributes:
        diffusion: Mean squared error of the predicted v.
        latent: L1 of the clean latent that the prediction implies.
        mask: Of the mask decoded from that latent: Dice, and `cross_entropy` times its cross-entropy.
        cross_entropy: Within the mask loss.
    """

    diffusion: Weight = 1.0
    latent: Weight = 0.5
    mask: Weight = 0.3
    cross_entropy: Weight = 5.0


@dataclass(frozen=True)
class CodecLosses:
    """Weights of the mask codec's losses.

    Attributes:
        dice, cross_entropy: Of decoded masks.
        mask: L1 of decoded masks in [-1, 1].
        picture: L1 of decoded slices and of their differences between neighbouring pixels.
        size: Mean square of the latents; the decoder squashes latents beyond 3, this keeps them well inside.
    """

    dice: Weight = 1.0
    cross_entropy: Weight = 10.0
    mask: Weight = 1.0
    picture: Weight = 0.5
    size: Weight = 0.01


def compute_dice_loss(probabilities: Tensor, targets: Tensor, dims: tuple[int, ...], smooth: float = 1.0) -> Tensor:
    """1 - soft Dice, pooled over `dims` before the ratio, averaged over the rest.

    Args:
        probabilities: in [0, 1] (never logits), any shape.
        targets: 0 or 1, the same shape.
        dims: Axes pooled, e.g. batch and pixels for a Dice per structure that absent slices do not blow up.
        smooth: Added to both parts of the ratio, in pixels.
    """
    overlap = (probabilities * targets).sum(dims)
    total = probabilities.sum(dims) + targets.sum(dims)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def compute_evidence_loss(
    logits: Tensor, targets: Tensor, weight: Tensor | None = None, losses: EvidenceLosses | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy + Dice of the text-query head, all structures at once.

    Args:
        logits: (N, P, H, W).
        targets: (N, P, H, W) in {0, 1}.
        weight: (N, P), 0 where nobody said whether the structure is there.
        losses: How much its parts count.
    """
    losses = losses or EvidenceLosses()
    logits = logits.float()
    if weight is None:
        weight = torch.ones(logits.shape[:2], device=logits.device)
    keep = weight[:, :, None, None]
    cross_entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * keep).mean()
    dice = compute_dice_loss(logits.sigmoid() * keep, targets * keep, (0, 2, 3), smooth=10.0)
    loss = losses.cross_entropy * cross_entropy + losses.dice * dice
    return loss, {"cross_entropy": cross_entropy.detach(), "dice_loss": dice.detach()}


def compute_mask_loss(probabilities: Tensor, targets: Tensor, cross_entropy_weight: float = 5.0) -> Tensor:
    """Dice + cross-entropy on decoded masks: (M, H, W) probabilities in [0, 1] against {0, 1}.

    Dice is taken per mask; an absent structure has only its false positives to answer for.
    """
    clipped = probabilities.float().clamp(1e-4, 1 - 1e-4)
    cross_entropy = F.binary_cross_entropy(clipped, targets)
    return compute_dice_loss(clipped, targets, (1, 2), smooth=20.0) + cross_entropy_weight * cross_entropy
