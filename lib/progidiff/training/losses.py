"""Losses as plain functions of tensors; recipes choose and weigh them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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


def compute_evidence_loss(logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> tuple[Tensor, dict[str, float]]:
    """Cross-entropy + Dice of the text-query head, all structures at once.

    Args:
        logits: (N, P, H, W).
        targets: (N, P, H, W) in {0, 1}.
        weight: (N, P), 0 where nobody said whether the structure is there.
    """
    logits = logits.float()
    if weight is None:
        weight = torch.ones(logits.shape[:2], device=logits.device)
    keep = weight[:, :, None, None]
    cross_entropy = (F.binary_cross_entropy_with_logits(logits, targets, reduction="none") * keep).mean()
    dice = compute_dice_loss(logits.sigmoid() * keep, targets * keep, (0, 2, 3), smooth=10.0)
    # Pixels are mostly background: the cross-entropy of one structure is small, so it needs weight beside the Dice.
    loss = 10 * cross_entropy + dice
    return loss, {"cross_entropy": float(cross_entropy.detach()), "dice_loss": float(dice.detach())}


def compute_mask_loss(probabilities: Tensor, targets: Tensor) -> Tensor:
    """Dice + cross-entropy on decoded masks: (M, H, W) probabilities in [0, 1] against {0, 1}.

    Dice is taken per mask; an absent structure has only its false positives to answer for.
    """
    clipped = probabilities.float().clamp(1e-4, 1 - 1e-4)
    cross_entropy = F.binary_cross_entropy(clipped, targets)
    return compute_dice_loss(clipped, targets, (1, 2), smooth=20.0) + 5 * cross_entropy
