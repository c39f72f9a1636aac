"""What intensities mean: the window that the networks see, what is body, and which modality an image looks like."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.images.modality import get_modality
from progidiff.images.volume import Volume


def _sample(array: NDArray[Any], count: int = 1 << 20) -> NDArray[Any]:
    """About `count` voxels on a regular lattice, float32, one axis: enough for percentiles."""
    step = max(1, int(np.ceil((array.size / count) ** (1 / 3))))
    return np.asarray(array[::step, ::step, ::step], dtype=np.float32).ravel()


def guess_modality(array: NDArray[Any]) -> str:
    """CT if the intensities look like Hounsfield units, else MR.

    Hounsfield units are the only common scale with a real share of voxels well below zero (air, lung, fat) and nothing
    beyond dense metal. MR intensities start at zero, or, once normalised, stay within a few units of it. A CT that was
    rescaled to 0..1 or kept its offset of 1024 cannot be told from MR: give the modality.

    Args:
        array: Intensities, any shape of three axes.
    """
    values = _sample(array)
    below = float((values < -40).mean())
    return (
        "CT" if below > 0.005 and float(np.percentile(values, 99.5)) <= 4096 and float(values.min()) >= -32768 else "MR"
    )


def compute_body_threshold(volume: Volume) -> float:
    """Intensity above which a voxel belongs to the body.

    That of the modality's row (CT); else (MR) between the background and the body by Otsu's criterion on the square
    roots of the intensities (noise near zero and bright fat are both far from normal), never above a tenth of the
    99th percentile.
    """
    row = get_modality(volume.modality)
    if row.body_above is not None:
        return float(max(row.body_above, float(volume.array.min()) + 1.0))
    values = _sample(volume.array)
    low, high = (float(v) for v in np.percentile(values, (0.5, 99)))
    if high <= low:
        return low
    scaled = np.sqrt(np.clip((values - low) / (high - low), 0, 1))
    split = _compute_otsu(scaled)
    return low + (high - low) * min(split**2, 0.1)


def _compute_otsu(values: NDArray[Any], bins: int = 128) -> float:
    """Otsu's threshold of values in 0..1: the split with the largest variance between the two sides."""
    counts, edges = np.histogram(values, bins=bins, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts).astype(np.float64)
    above = below[-1] - below
    sums = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][int(np.nanargmax(np.where(np.isfinite(between), between, -1)))])


def compute_window(volume: Volume, mr_headroom: float = 1.0) -> tuple[float, float]:
    """The intensities (low, high) that the network sees as -1 and 1.

    That of the modality's row (CT, in HU); else (MR) percentiles 1 and 99 of the body, so that a bright artefact or
    empty margins do not matter.

    Args:
        volume: The image.
        mr_headroom: How many times wider the window of an MR reaches, above its low end; see `ConditioningConfig`.
    """
    row = get_modality(volume.modality)
    if row.window is not None:
        return row.window
    values = _sample(volume.array)
    body = values[values > compute_body_threshold(volume)]
    low, high = (float(v) for v in np.percentile(body if body.size >= 64 else values, (1, 99)))
    if high <= low:
        return float(volume.array.min()), float(volume.array.max())
    return low, low + mr_headroom * (high - low)
