"""Dice and surface distance of masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    pass


def compute_dice(prediction: NDArray[Any], truth: NDArray[Any]) -> float:
    """Dice of two masks, in [0, 1]; NaN if the truth is empty.

    Example:
        >>> compute_dice(np.array([True, True, False]), np.array([True, False, False]))
        0.6666666666666666
    """
    prediction, truth = prediction.astype(bool, copy=False), truth.astype(bool, copy=False)
    size = int(np.count_nonzero(truth))
    return (
        2 * int(np.count_nonzero(prediction & truth)) / (size + int(np.count_nonzero(prediction))) if size else math.nan
    )


def compute_hd95(prediction: NDArray[Any], truth: NDArray[Any], spacing: Sequence[float]) -> float:
    """95th percentile Hausdorff distance in mm; NaN if either mask is empty.

    The value of `monai.metrics.compute_hausdorff_distance(percentile=95)`: the larger of the two directed 95th
    percentiles of the distances between surface voxels. Nearest neighbours come from k-d trees of the surfaces, not
    from distance maps of the volume, which makes it many times faster for masks with stray voxels far away.

    Args:
        prediction: Mask of any number of axes.
        truth: Mask of the same shape.
        spacing: Edge of a voxel along each axis in mm.
    """
    from scipy.spatial import cKDTree

    surfaces = [_find_surface(mask) * np.asarray(spacing, dtype=np.float64) for mask in (prediction, truth)]
    if min(len(points) for points in surfaces) == 0:
        return math.nan
    trees = [cKDTree(points) for points in surfaces]
    there = trees[1].query(surfaces[0])[0]
    back = trees[0].query(surfaces[1])[0]
    return float(max(np.percentile(there, 95), np.percentile(back, 95)))


def _find_surface(mask: NDArray[Any]) -> NDArray[Any]:
    """Indices of the voxels of a mask that touch its outside (or the border) by a face, int64 of shape (N, axes)."""
    from scipy import ndimage

    mask = mask.astype(bool, copy=False)
    found = (
        ndimage.find_objects(mask.view(np.uint8))
        if mask.flags.c_contiguous
        else ndimage.find_objects(mask.astype(np.uint8))
    )
    if not found:
        return np.zeros((0, mask.ndim), dtype=np.int64)
    inside = mask[found[0]]
    result: NDArray[Any] = np.argwhere(inside & ~ndimage.binary_erosion(inside)) + np.array(
        [part.start for part in found[0]]
    )
    return result


def keep_largest_component(mask: NDArray[Any]) -> NDArray[Any]:
    """The largest part of a 3-D mask that hangs together by faces; an empty mask stays empty."""
    from scipy import ndimage

    parts, count = ndimage.label(mask)
    if count < 2:
        return mask.astype(bool)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    found: NDArray[Any] = parts == int(sizes.argmax())
    return found
