"""Dice during training: voxels pooled over the slices of a volume, so that a slice with three pixels does not weigh as
much as a full one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from progidiff.training.processes import Team
from progidiff.training.slice_cache import SliceCache


def one_hot(labels: Tensor, count: int) -> Tensor:
    """(N, H, W) label ids -> (N, count, H, W) floats, background left out."""
    return (labels[:, None] == torch.arange(1, count + 1, device=labels.device)[None, :, None, None]).float()


def compute_area_shares(labels: Tensor, count: int, supersampling: int = 1) -> Tensor:
    """How much of each pixel a structure covers.

    Args:
        labels: (N, s H, s W) label ids.
        count: Structures; all ids are in 0..count.
        supersampling: s.

    Returns:
        (N, count, H, W) in [0, 1], in steps of 1 / s**2.
    """
    n, height, width = labels.shape[0], labels.shape[1] // supersampling, labels.shape[2] // supersampling
    shares = torch.zeros(n, count + 1, height, width, device=labels.device)
    # Every fine pixel adds its part to one structure; one plane of fine pixels per structure would be many times that.
    part = torch.full((n, 1, height, width), 1 / supersampling**2, device=labels.device)
    for row in range(supersampling):
        for column in range(supersampling):
            ids = labels[:, None, row::supersampling, column::supersampling].long()
            shares.scatter_add_(1, ids, part)
    return shares[:, 1:]


class DiceTally:
    """Adds up overlaps of several kinds of masks with the truth, batch by batch.

    Args:
        cache: The slices that the masks belong to.
    """

    def __init__(self, cache: SliceCache) -> None:
        self.cache = cache
        self._shape = (len(cache.images), len(cache.structures))
        self._overlap: dict[str, NDArray[Any]] = {}
        self._total: dict[str, NDArray[Any]] = {}
        self.truth = np.zeros(self._shape)

    def add(self, batch: list[int], labels: Tensor, masks: dict[str, Tensor]) -> None:
        """Count a batch.

        Args:
            batch: N positions in the cache.
            labels: (N, H, W) label ids.
            masks: kind -> (N, P, H, W) bool, on the CPU.
        """
        # A structure that the label does not speak about on a slice is neither right nor wrong there.
        spoken = self.cache.weigh(batch).bool()[:, :, None, None]
        target = one_hot(labels, self._shape[1]).bool() & spoken
        for n, i in enumerate(batch):
            v = self.cache.index[i][0]
            self.truth[v] += target[n].sum((1, 2)).numpy()
            for kind, mask in masks.items():
                overlap = self._overlap.setdefault(kind, np.zeros(self._shape))
                total = self._total.setdefault(kind, np.zeros(self._shape))
                overlap[v] += (mask[n] & target[n]).sum((1, 2)).numpy()
                total[v] += ((mask[n] & spoken[n]).sum((1, 2)) + target[n].sum((1, 2))).numpy()

    def sum_over(self, team: Team) -> None:
        """Add up what the processes of a team have counted, each its part of the batches."""
        counted = team.gather((self._overlap, self._total, self.truth))
        zero = np.zeros(self._shape)
        kinds = {kind for overlap, _, _ in counted for kind in overlap}
        self._overlap = {kind: sum((one[0].get(kind, zero) for one in counted), zero) for kind in kinds}
        self._total = {kind: sum((one[1].get(kind, zero) for one in counted), zero) for kind in kinds}
        self.truth = sum((one[2] for one in counted), zero)

    def compute_dice(self, kind: str, present: NDArray[Any] | None = None) -> NDArray[Any]:
        """Dice per volume and structure, (V, P); NaN where the structure is not there.

        Args:
            kind: As given to `add`.
            present: (V, P) where a structure counts as there; None for where a slice that was added shows it.
        """
        there = self.truth > 0 if present is None else present
        return np.where(there, 2 * self._overlap[kind] / np.maximum(self._total[kind], 1), np.nan)


def average_volumes(dice: NDArray[Any], structures: Sequence[str]) -> dict[str, float]:
    """Mean over volumes per structure, of those that any volume shows.

    Args:
        dice: (V, P), NaN where a structure is not there.
        structures: P names.
    """
    return {s: float(np.nanmean(dice[:, p])) for p, s in enumerate(structures) if not np.isnan(dice[:, p]).all()}
