"""Choosing images of a large pool by chance: how many slices each still offers, as a table that changes image by image,
and draws from it that cost the same in a pool of a thousand images and of a hundred thousand.

A draw is the very one that `strategies.pick_slices` makes with one slice per image, for as long as the same slices are
free; the slices themselves are looked at when an image was drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from progidiff.active_learning.strategies import ImageScores

_BLOCK = 256
"""Images that are counted together."""


class ImageTable:
    """Free slices by image.

    Args:
        structures: P names.
        images: V.

    Attributes:
        structures: As given.
        counts: int32 (P + 1, V): slices that are free and show a structure; the last row has all that are free.
    """

    def __init__(self, structures: tuple[str, ...], images: int) -> None:
        self.structures = structures
        self.counts = np.zeros((len(structures) + 1, images), np.int32)
        self._rows = {name: number for number, name in enumerate(structures)}

    def put(self, position: int, scores: ImageScores | None, annotated: Collection[int] | None) -> None:
        """Count the slices of an image.

        Args:
            position: Of the image, 0..V - 1.
            scores: None if it has none; its slices are no part of the pool then.
            annotated: Its annotated slices; None for all.
        """
        column = self.counts[:, position]
        column[:] = 0
        if scores is None or annotated is None:
            return
        free = np.ones(scores.num_slices, bool)
        free[[z for z in annotated if 0 <= z < scores.num_slices]] = False
        shown = (scores.foreground > 0)[:, free].sum(axis=1)
        for name, count in zip(scores.structures, shown, strict=True):
            if name in self._rows:
                column[self._rows[name]] = count
        column[-1] = free.sum()

    def draw(self, allowed: NDArray[np.bool_], foreground_share: float, rng: np.random.Generator) -> Iterator[int]:
        """Positions of images, each once: of a slice drawn among those that are free, or for a share of the draws among
        those that show a structure, drawn before.

        Args:
            allowed: bool (V,), which images may be drawn.
            foreground_share: 0..1.
            rng: Is used as far as somebody asks on.
        """
        counts = np.zeros((len(self.counts), -(-self.counts.shape[1] // _BLOCK) * _BLOCK), np.int32)
        counts[:, : self.counts.shape[1]] = self.counts * allowed
        blocks = counts.reshape(len(counts), -1, _BLOCK).sum(axis=2, dtype=np.int64)
        left = blocks.sum(axis=1)
        while left[-1] > 0:
            row = -1
            if rng.random() < foreground_share:
                shown = [int(p) for p in np.flatnonzero(left[:-1])]
                row = int(rng.choice(shown)) if shown else -1
            position = _find_owner(counts[row], blocks[row], int(rng.integers(0, left[row])))
            yield position
            blocks[:, position // _BLOCK] -= counts[:, position]
            left -= counts[:, position]
            counts[:, position] = 0


def _find_owner(counts: NDArray[np.int32], blocks: NDArray[np.int64], slice_number: int) -> int:
    """Whose a slice is, of all slices counted through."""
    upto = np.cumsum(blocks)
    block = int(np.searchsorted(upto, slice_number, side="right"))
    inside = slice_number - int(upto[block] - blocks[block])
    own = np.cumsum(counts[block * _BLOCK : (block + 1) * _BLOCK])
    return block * _BLOCK + int(np.searchsorted(own, inside, side="right"))


def shuffle_keys(images: Sequence[str]) -> NDArray[np.uint64]:
    """A number for each image that only its id decides, uint64 (V,)."""
    names = (image.encode(errors="surrogatepass") for image in images)
    return np.frombuffer(b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names), np.uint64)


def shuffle_images(
    keys: NDArray[np.uint64], positions: NDArray[np.intp], seed: int, least_first: NDArray[np.int64] | None = None
) -> Iterator[int]:
    """Positions in an order that a seed gives.

    Args:
        keys: Of all images, see `shuffle_keys`.
        positions: Of those that are ordered. Which others there are does not change their order.
        seed: Of the order.
        least_first: By position; smaller ones come before all others.
    """
    ranks = _mix(keys[positions] ^ _mix(np.array([seed], np.uint64)))
    amounts = np.zeros(len(positions), np.int64) if least_first is None else least_first[positions]
    if len(positions) == 0:
        return
    # Mostly one is asked for, and the smallest is found without putting all in order.
    least = np.flatnonzero(amounts == amounts.min())
    first = int(least[np.argmin(ranks[least])])
    yield int(positions[first])
    for index in np.lexsort((ranks, amounts)):
        if index != first:
            yield int(positions[index])


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each bit of a number depends on all of them: the finalizer of splitmix64."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
