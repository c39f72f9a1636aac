"""Axial slices of volumes as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.images.intensities import compute_window
from progidiff.images.volume import Volume


def render_slice(volume: Volume, z: int) -> NDArray[Any]:
    """An axial slice through the usual window (`volume.compute_window`), as a radiologist sees it.

    Args:
        volume: CT or MR.
        z: Axial index from inferior to superior.

    Returns:
        uint8 (Y, X), 0 at the lower end of the window and below.
    """
    low, high = compute_window(volume)
    pixels = (volume.to_stack()[0][z].astype(np.float32) - low) / max(high - low, 1e-6)
    return np.asarray(np.rint(pixels.clip(0, 1) * 255), dtype=np.uint8)
