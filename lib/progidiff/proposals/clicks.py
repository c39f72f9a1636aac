"""Which proposals agree with a person's clicks: pure arithmetic on one slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError

Pixel = tuple[int, int]
"""(y, x) on an axial slice."""


@dataclass(frozen=True)
class Choice:
    """What clicks make of K proposals.

    Attributes:
        mask: bool of shape (Y, X): what at least half of the kept proposals draw. If they fit, so does the mask: all of
            them draw every foreground click and none draws a background click.
        kept: Indices of the proposals it was made from: all that fit, or, if none does, the one that fits best.
        missed: Clicks that the mask contradicts.
    """

    mask: NDArray[Any]
    kept: tuple[int, ...]
    missed: int

    @property
    def fits(self) -> bool:
        """Whether the mask contains all foreground clicks and avoids all background clicks."""
        return self.missed == 0


def choose_by_clicks(
    probabilities: NDArray[Any], masks: NDArray[Any], foreground: Sequence[Pixel], background: Sequence[Pixel]
) -> Choice:
    """Keep the proposals that contain the foreground clicks and avoid the background clicks.

    If none does, the one that contradicts the fewest clicks is kept; among several of those the one whose probabilities
    are nearest to what the clicks say.

    Args:
        probabilities: uint8 of shape (K, Y, X), 255 is probability 1.
        masks: bool of shape (K, Y, X).
        foreground: Pixels that belong to the structure.
        background: Pixels that do not.

    Raises:
        GeometryError: if the shapes differ or there is no proposal.

    Example:
        >>> maps = np.array([[[230, 25]], [[200, 180]]], np.uint8)
        >>> choice = choose_by_clicks(maps, maps >= 128, [(0, 0)], [(0, 1)])
        >>> choice.kept, choice.mask.tolist(), choice.fits
        ((0,), [[True, False]], True)
    """
    if masks.ndim != 3 or len(masks) < 1 or masks.shape != probabilities.shape:
        raise GeometryError(
            "Masks and probabilities need one shape (K, Y, X) with K >= 1, got "
            f"{masks.shape} and {probabilities.shape}."
        )
    missed = np.zeros(len(masks), dtype=np.int64)
    doubt = np.zeros(len(masks))
    for clicks, wanted in ((foreground, True), (background, False)):
        for y, x in clicks:
            missed += masks[:, y, x] != wanted
            doubt += np.abs(255.0 * wanted - probabilities[:, y, x])
    fitting = np.flatnonzero(missed == 0)
    if len(fitting):
        drawn = masks[fitting]
        return Choice(drawn.sum(axis=0) * 2 >= len(drawn), tuple(fitting.tolist()), 0)
    best = int(np.lexsort((doubt, missed))[0])
    return Choice(masks[best].copy(), (best,), int(missed[best]))
