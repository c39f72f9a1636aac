"""Agreement, disagreement, ranking and merging of K proposals: pure functions on tensors.

Proposals come first: axis 0 is K, everything after it is the picture, ``(K, H, W)`` or ``(K, Z, H, W)``. The agreement
map is the share of proposals that draw a pixel. It is *not* a calibrated probability: ten proposals of an overconfident
model agree and are wrong together.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float32, Shaped, UInt8
from torch import Tensor

from progidiff.errors import GeometryError, RequestError

MergeRule = Literal["union", "intersection", "majority", "threshold"]


def compute_agreement(masks: Shaped[Tensor, K * picture]) -> Float32[Tensor, "*picture"]:
    """Share of proposals that draw each pixel.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 1.

    Returns:
        float32 of shape (...), in multiples of 1 / K from 0 to 1.

    Raises:
        GeometryError: if there is no proposal axis or it is empty.

    Example:
        >>> compute_agreement(torch.tensor([[True, True], [True, False]])).tolist()
        [1.0, 0.5]
    """
    _check_masks(masks, 1)
    return masks.bool().float().mean(0)


def compute_consensus(masks: Shaped[Tensor, K * picture]) -> Bool[Tensor, "*picture"]:
    """What at least half of the proposals draw; ties count.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 1.

    Returns:
        bool of shape (...).

    Example:
        >>> compute_consensus(torch.tensor([[True, True], [True, False], [True, False]])).tolist()
        [True, False]
    """
    _check_masks(masks, 1)
    return masks.bool().sum(0) * 2 >= len(masks)


def compute_pairwise_dice(masks: Shaped[Tensor, K * picture]) -> Float32[Tensor, "K K"]:
    """Dice of every proposal with every other; two empty proposals have Dice 1.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 1.

    Returns:
        float32 of shape (K, K), symmetric, ones on the diagonal.
    """
    _check_masks(masks, 1)
    return _pairwise_dice(masks.reshape(1, len(masks), -1))[0]


def compute_disagreement(masks: Shaped[Tensor, K * picture]) -> float:
    """One number to rank slices by: 1 - mean pairwise Dice over distinct pairs.

    0 when all proposals are identical, towards 1 when none overlap; 0 when all are empty.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 2.

    Raises:
        GeometryError: if K < 2.

    Example:
        >>> compute_disagreement(torch.ones(3, 4, 4, dtype=torch.bool))
        0.0
    """
    _check_masks(masks, 2)
    return float(_mean_of_pairs(1 - _pairwise_dice(masks.reshape(1, len(masks), -1)))[0])


def compute_disagreement_per_slice(masks: Shaped[Tensor, "K Z *slice"]) -> Float32[Tensor, " Z"]:
    """`compute_disagreement` of every slice at once.

    Args:
        masks: Binary proposals of a volume, shape (K, Z, H, W), K >= 2.

    Returns:
        float32 of shape (Z,), from 0 to 1.

    Raises:
        GeometryError: if K < 2 or the shape has other than four axes.
    """
    _check_masks(masks, 2)
    if masks.ndim != 4:
        raise GeometryError(
            "Disagreement per slice needs masks of shape (K, Z, H, W), got "
            f"{tuple(masks.shape)}; use compute_disagreement for one slice."
        )
    num_proposals, depth = masks.shape[:2]
    per_slice = masks.transpose(0, 1).reshape(depth, num_proposals, -1)
    return _mean_of_pairs(1 - _pairwise_dice(per_slice))


def rank_proposals(masks: Shaped[Tensor, K * picture]) -> list[int]:
    """Order proposals by their mean Dice to the others, the most central (the medoid) first; ties keep their order.

    The first one is what "best" means when there is no ground truth: the proposal that the others agree with most, not
    the one that is closest to the truth.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 1.

    Returns:
        Indices 0..K-1, best first.

    Example:
        >>> rank_proposals(torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool))
        [1, 2, 0]
    """
    dice = compute_pairwise_dice(masks)
    count = len(dice)
    if count == 1:
        return [0]
    mean = (dice.double().sum(1) - dice.double().diagonal()) / (count - 1)
    # Rounded, so that equal means in another summation order stay ties.
    return sorted(range(count), key=lambda index: (-round(float(mean[index]), 6), index))


def resolve_overlaps(
    agreement: Shaped[Tensor, P * picture], mean_probability: Shaped[Tensor, ...] | None = None
) -> UInt8[Tensor, "*picture"]:
    """One structure per pixel: the one that most proposals draw, then the more probable one, then the one asked first.

    Args:
        agreement: Share of proposals per structure, shape (P, ...), in [0, 1].
        mean_probability: Mean probability over proposals, same shape, in [0, 1]; breaks ties.

    Returns:
        uint8 of shape (...): p + 1 for structure p, 0 where no structure has an agreement of at least 0.5.

    Raises:
        GeometryError: if the shapes differ or P > 255.

    Example:
        >>> resolve_overlaps(torch.tensor([[1.0, 0.5, 0.25], [0.5, 1.0, 0.25]])).tolist()
        [1, 2, 0]
    """
    if agreement.ndim < 1 or not 1 <= len(agreement) <= 255:
        raise GeometryError(
            "Between 1 and 255 structures fit a label map, got agreement of shape "
            f"{tuple(agreement.shape)}; ask for fewer at a time."
        )
    if mean_probability is not None and mean_probability.shape != agreement.shape:
        raise GeometryError(
            f"Agreement has shape {tuple(agreement.shape)} and mean probability {tuple(mean_probability.shape)}; both "
            "need one map per structure."
        )
    best_agreement = torch.zeros(agreement.shape[1:], dtype=agreement.dtype, device=agreement.device)
    best_probability = torch.zeros_like(best_agreement)
    labels = torch.zeros(agreement.shape[1:], dtype=torch.uint8, device=agreement.device)
    for index in range(len(agreement)):
        share = agreement[index]
        probability = (
            best_probability.new_zeros(())
            if mean_probability is None
            else mean_probability[index].to(best_probability.dtype)
        )
        wins = (share >= 0.5) & (
            (share > best_agreement) | ((share == best_agreement) & (probability > best_probability))
        )
        labels[wins] = index + 1
        best_agreement = torch.where(wins, share, best_agreement)
        best_probability = torch.where(wins, probability, best_probability)
    return labels


def merge_masks(
    masks: Shaped[Tensor, K * picture], how: MergeRule = "majority", threshold: float = 0.5
) -> Bool[Tensor, "*picture"]:
    """Make one mask of several proposals.

    Args:
        masks: Binary proposals, shape (K, ...), K >= 1.
        how: "union" (any), "intersection" (all), "majority" (at least half) or "threshold".
        threshold: With "threshold": the smallest agreement that counts, in (0, 1].

    Returns:
        bool of shape (...).

    Raises:
        RequestError: if `how` is none of these or the threshold is out of range.

    Example:
        >>> merge_masks(torch.tensor([[True, True], [True, False]]), "intersection").tolist()
        [True, False]
    """
    _check_masks(masks, 1)
    if how == "union":
        return masks.bool().any(0)
    if how == "intersection":
        return masks.bool().all(0)
    if how == "majority":
        return compute_consensus(masks)
    if how == "threshold":
        if not 0 < threshold <= 1:
            raise RequestError(f"A threshold of {threshold} is no share of proposals; choose one above 0 and up to 1.")
        # 0.3 of 10 proposals are 3 of them, whatever floating point says.
        return masks.bool().sum(0) >= threshold * len(masks) - 1e-6
    raise RequestError(f"Masks cannot be merged by '{how}'; choose union, intersection, majority or threshold.")


def _check_masks(masks: Tensor, at_least: int) -> None:
    if masks.ndim < 2:
        raise GeometryError(
            f"Proposals need the shape (K, ...), got {tuple(masks.shape)}; put the proposals on the first axis."
        )
    if len(masks) < at_least:
        raise GeometryError(
            f"{len(masks)} proposals are too few, at least {at_least} are needed here. Raise num_proposals."
        )


def _pairwise_dice(masks: Tensor) -> Tensor:
    """(N, K, pixels) -> (N, K, K)."""
    pixels = masks.bool().float()  # counts are exact in float32 up to 2 ** 24 pixels; larger pictures go in pieces
    if pixels.shape[-1] > 1 << 24:
        overlap = (
            torch.stack([piece @ piece.transpose(1, 2) for piece in pixels.split(1 << 24, dim=-1)]).double().sum(0)
        )
    else:
        overlap = pixels @ pixels.transpose(1, 2)
    size = overlap.diagonal(dim1=1, dim2=2)
    total = size[:, :, None] + size[:, None, :]
    return torch.where(total > 0, 2 * overlap / total.clamp(min=1), 1.0).float()


def _mean_of_pairs(values: Tensor) -> Tensor:
    """(N, K, K) symmetric -> (N,), the mean above the diagonal."""
    count = values.shape[-1]
    rows, cols = torch.triu_indices(count, count, offset=1)
    return values[:, rows, cols].mean(1)
