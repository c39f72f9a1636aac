"""Slices that stand for others: uncertainty herding (arXiv 2412.20644) on what proposals say of a slice.

Two slices are alike if structures are about as large on them, at about the same place of the volume; slices of one
image are more alike than those of two. A slice *covers* what is like it, by a Gaussian of their distance. What is
best to annotate covers most of what is uncertain and not covered yet; so an outlier, which covers nobody, is not
chosen for being uncertain, and a second slice of a kind is not chosen while another kind is open. The radius of the
Gaussian is the median distance to the nearest annotated slice: with few annotated slices it is large and typical
slices win; it shrinks as they become more.

Shape letters: L slices that are to be covered (landmarks), M that may be chosen, E numbers of a sketch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

OTHER_IMAGE = 0.5
"""Distance of two slices for being of two images; from absent to as large as it gets is 1 for one structure."""

ENDS = 2.0
"""Distance of the two ends of a volume."""

ALIKE = 0.5
"""So much must a slice cover another one for the two to be called alike."""


@dataclass(frozen=True, eq=False)
class Sketches:
    """What slices are compared by.

    Attributes:
        points: float32 (n, E), see `sketch_slices`.
        owners: int (n,): the image of each.
    """

    points: NDArray[np.float32]
    owners: NDArray[np.int64]

    def measure(self, other: Sketches) -> NDArray[np.float32]:
        """Squared distances, (n, m)."""
        own, its = ((points**2).sum(axis=1) for points in (self.points, other.points))
        squared = own[:, None] + its[None] - 2 * self.points @ other.points.T
        squared += np.float32(OTHER_IMAGE**2) * (self.owners[:, None] != other.owners[None])
        found: NDArray[np.float32] = np.maximum(squared, 0)
        return found


def sketch_slices(
    foreground: NDArray[np.float32], largest: NDArray[np.float32], places: NDArray[np.float32]
) -> NDArray[np.float32]:
    """A slice in a few numbers: the root of the size of every structure, and where in the volume it is.

    Args:
        foreground: (P, n), shares of the slice.
        largest: (P,), of each structure in the whole pool.
        places: (n,), from 0 at one end of the volume to 1 at the other.

    Returns:
        (n, P + 1).

    Example:
        >>> sketch_slices(np.float32([[0.0, 0.04]]), np.float32([0.16]), np.float32([0, 1])).tolist()
        [[0.0, 0.0], [0.5, 2.0]]
    """
    sizes = np.sqrt(foreground / np.maximum(largest, np.float32(1e-9))[:, None])
    return np.concatenate([sizes, ENDS * places[None]]).T.astype(np.float32)


@dataclass(frozen=True)
class Choice:
    """A slice that was chosen.

    Attributes:
        position: Among those that could be, 0..M - 1.
        gain: Share of the uncertainty of the pool that it covers and nothing did before, 0..1.
        stands_for: bool (L,): what is like it and was like nothing annotated.
    """

    position: int
    gain: float
    stands_for: NDArray[np.bool_]


class Cover:
    """What is covered so far.

    Args:
        landmarks: What is to be covered.
        weights: float (L,), how uncertain each is.
        annotated: What is annotated; may be none.
    """

    def __init__(self, landmarks: Sketches, weights: NDArray[np.float32], annotated: Sketches) -> None:
        self._landmarks, self._weights = landmarks, weights / max(float(weights.sum()), 1e-30)
        if len(annotated.owners):
            nearest = landmarks.measure(annotated).min(axis=1)
        else:  # nothing to be far from: half of all pairs are nearer than this
            nearest = landmarks.measure(landmarks).ravel()
        self._reach = max(float(np.median(nearest)), 1e-12)
        self._covered = np.exp(-nearest / self._reach) if len(annotated.owners) else np.zeros(len(weights), np.float32)

    def pick(self, offered: Sketches) -> Iterator[Choice]:
        """Those offered, each once, the best of the rest first.

        A gain never grows as others are chosen, so only those are computed again that could still be the best.
        """
        near = np.exp(-self._landmarks.measure(offered) / self._reach).T  # M, L
        heap = [(-float(gain), m) for m, gain in enumerate(np.maximum(near - self._covered, 0) @ self._weights)]
        heapq.heapify(heap)
        while heap:
            _, best = heapq.heappop(heap)
            added = np.maximum(near[best] - self._covered, 0)
            gain = float(added @ self._weights)
            if heap and (-gain, best) > heap[0]:
                heapq.heappush(heap, (-gain, best))
                continue
            alike = (near[best] >= ALIKE) & (self._covered < ALIKE)
            before = self._covered
            self._covered = np.maximum(before, near[best])
            yield Choice(best, gain, alike)
