"""Islands: parts of a proposal that hang together with nothing, far from the organ. Found in three dimensions, dropped
on request.

A slice alone cannot say what is an island: the top of a kidney is a spot that touches the rest on the next slice only.
So proposals are cleaned once all slices of a volume are there, each proposal by itself, before anything is derived from
them: masks, consensus, agreement, disagreement and millilitres then tell the same story.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray

from progidiff.errors import RequestError

OFF = "off"
SMALL = "small"
LARGEST = "largest"
CLEAN_UPS: tuple[str, ...] = (OFF, SMALL, LARGEST)
"""Keep everything; drop small parts that lie apart (`SMALL_SHARE`, `APART_MM`); keep the largest part only."""

SMALL_SHARE = 0.1
"""Small: fewer voxels than this share of the largest part's."""

APART_MM = 10.0
"""Apart: farther than this from every part that is not small. A piece of a vessel beyond a slice that the model missed
is nearer.
"""

DRAWN = 128
"""Probability, of 255, from which a voxel of the working grid is drawn."""

_HALO = 2
"""Pixels around a dropped part whose probability goes with it."""


def check_clean_up(clean_up: str) -> str:
    """One of `CLEAN_UPS`.

    Raises:
        RequestError: if it is none.

    Example:
        >>> check_clean_up("small")
        'small'
    """
    if clean_up not in CLEAN_UPS:
        raise RequestError(f"clean_up is {clean_up!r}; it must be one of {', '.join(CLEAN_UPS)}.")
    return clean_up


def find_islands(
    mask: Bool[NDArray[Any], "Z H W"],
    clean_up: str,
    spacing: Sequence[float],
    share: float = SMALL_SHARE,
    apart_mm: float = APART_MM,
) -> Bool[NDArray[Any], "Z H W"]:
    """The parts of a 3-D mask that a clean-up drops.

    Parts hang together by faces, edges or corners, so that a thin vessel is not torn where it runs aslant through
    slices.

    Args:
        mask: bool of shape (Z, H, W).
        clean_up: One of `CLEAN_UPS`.
        spacing: (dz, dy, dx) in mm.
        share: With "small": only parts of fewer voxels than this share of the largest part go. In (0, 1].
        apart_mm: With "small": only parts farther than this from the others go; 0 for any distance.

    Returns:
        bool of the same shape. Of several largest parts the first one found stays.

    Example:
        >>> mask = np.zeros((1, 4, 40), dtype=bool)
        >>> mask[0, 0, :30] = mask[0, 2, :5] = mask[0, 2, 10] = True
        >>> [int(find_islands(mask, clean_up, (1, 7, 7)).sum()) for clean_up in CLEAN_UPS]
        [0, 1, 6]
    """
    from scipy import ndimage
    from scipy.spatial import cKDTree

    check_clean_up(clean_up)
    dropped = np.zeros(mask.shape, dtype=bool)
    if clean_up == OFF or not mask.any():
        return dropped
    parts, count = ndimage.label(mask, structure=np.ones((3, 3, 3), dtype=bool))
    if count < 2:
        return dropped
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    largest = int(sizes.argmax())
    islands = sizes < share * sizes[largest] if clean_up == SMALL else np.arange(len(sizes)) != largest
    islands[0] = False
    if clean_up == SMALL and apart_mm > 0 and islands.any():
        stays = mask & ~islands[parts]
        scale = np.asarray(spacing, dtype=np.float64)
        surface = cKDTree(np.argwhere(stays & ~ndimage.binary_erosion(stays)) * scale)
        boxes = ndimage.find_objects(parts)
        for number in np.flatnonzero(islands):
            box = boxes[number - 1]
            voxels = np.argwhere(parts[box] == number) + [axis.start for axis in box]
            nearest, _ = surface.query(voxels * scale, distance_upper_bound=apart_mm * (1 + 1e-6))
            islands[number] = bool(np.isinf(nearest).all())
    found: NDArray[Any] = islands[parts]
    return found


def drop_islands(
    probabilities: UInt8[NDArray[Any], "P K Z H W"],
    clean_up: str,
    spacing: Sequence[float],
    covered: Bool[NDArray[Any], "H W"] | None = None,
    share: float = SMALL_SHARE,
    apart_mm: float = APART_MM,
) -> None:
    """Clean the proposals of a volume in place; every proposal of every structure by itself.

    Args:
        probabilities: uint8 of shape (P, K, Z, h, w), all slices there; 255 is probability 1.
        clean_up: One of `CLEAN_UPS`.
        spacing: (dz, dy, dx) of the working grid in mm.
        covered: bool of shape (h, w): the part of the working grid that lies in the image. What is drawn beyond it
            counts for nothing.
        share, apart_mm: See `find_islands`.

    Raises:
        RequestError: if `clean_up` is unknown.
    """
    from scipy import ndimage

    if check_clean_up(clean_up) == OFF:
        return
    around = np.ones((1, 3, 3), dtype=bool)
    for structure in probabilities:
        for proposal in structure:
            # The slices and the box that hold anything: absent structures are most of a volume and cost one look.
            slices = np.flatnonzero(proposal.reshape(len(proposal), -1).any(axis=1))
            if len(slices) == 0:
                continue
            part = proposal[slices[0] : slices[-1] + 1]
            plane = part.any(axis=0)
            rows, cols = (np.flatnonzero(plane.any(axis=axis)) for axis in (1, 0))
            box = (slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1))
            part = part[:, box[0], box[1]]
            drawn = part >= DRAWN
            if covered is not None:
                drawn &= covered[box]
            islands = find_islands(drawn, clean_up, spacing, share, apart_mm)
            if not islands.any():
                continue
            # The soft edge goes too, or an empty place would keep a probability. What stays is drawn exactly as before.
            part[ndimage.binary_dilation(islands, around, iterations=_HALO) & ~(drawn & ~islands)] = 0
            # As the engine has it: a proposal that draws nothing on a slice is exact zeros there.
            part *= (part >= DRAWN).any(axis=(1, 2), keepdims=True)
