"""What a person drew, as the maps that a close-up reads (`progidiff.model.close_up.EDIT_CHANNELS`)."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from progidiff.images.close_up import compute_fineness
from progidiff.model.close_up import EDIT_CHANNELS

NEAR_PX = 2.0
"""Radius of the disc around what was clicked, in pixels of a window of usual size (`compute_fineness`)."""

AROUND_PX = 12.0
"""Distance over which a click is still felt, in the same pixels."""

NEARNESS_MM = 10.0
"""Distance at which a neighbouring slice counts 1 / e of what it says next door."""


def draw_edit_maps(
    size: int,
    wanted: NDArray[np.bool_] | None = None,
    unwanted: NDArray[np.bool_] | None = None,
    frame: NDArray[np.bool_] | None = None,
    neighbour: NDArray[np.float32] | Tensor | None = None,
    neighbour_mm: float = 0.0,
) -> Tensor:
    """The maps of one window.

    Args:
        size: Pixels along both axes, S.
        wanted, unwanted: (S, S) pixels that somebody clicked or drew over as inside and as outside.
        frame: (S, S) the inside of a box or a lasso.
        neighbour: (S, S) in [0, 1], the mask of the nearest slice that is known to be right.
        neighbour_mm: How far away that slice is.

    Returns:
        float32 (D, S, S); zeros where nothing was drawn.
    """
    maps, fineness = torch.zeros(len(EDIT_CHANNELS), size, size), compute_fineness(size)
    for row, drawn in enumerate((wanted, unwanted)):
        if drawn is not None and drawn.any():
            distance = torch.from_numpy(ndimage.distance_transform_edt(~drawn).astype(np.float32)) / fineness
            maps[row] = torch.exp(-((distance / NEAR_PX) ** 2))
            maps[2 + row] = torch.exp(-distance / AROUND_PX)
    if frame is not None:
        maps[4] = torch.from_numpy(frame.astype(np.float32)) * 2 - 1
    if neighbour is not None:
        nearness = float(np.exp(-abs(neighbour_mm) / NEARNESS_MM))
        maps[5] = (torch.as_tensor(neighbour).float() * 2 - 1) * nearness
        maps[6] = nearness
    return maps
