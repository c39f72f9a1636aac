"""Label maps with several values per voxel, as 3D Slicer writes overlapping segments: one layer each."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import Grid
from progidiff.images.raw import MAX_VOXELS
from progidiff.images.reading import read_grid

MAX_LAYERS = 255


def read_layers(path: str | os.PathLike[str], like: Grid, count: int) -> NDArray[Any]:
    """The layers of an NRRD segmentation.

    The caller has read the header and found the voxels to follow it: nothing else is opened.

    Args:
        path: An NRRD file with an axis of `count` values per voxel.
        like: The grid of its image, which it must share.
        count: Layers that its header states.

    Returns:
        Numbers as stored, shape (L, I, J, K).

    Raises:
        ImageError: if it cannot be read, or holds anything but whole, non-negative numbers.
        GeometryError: if its grid is not that of `like`.
    """
    import SimpleITK as sitk

    path = Path(path)
    grid = read_grid(path)
    like.check_same(grid)
    if not 1 < count <= MAX_LAYERS or count * math.prod(grid.shape) > MAX_VOXELS:
        raise ImageError(f"'{path.name}' has {count} layers; at most {MAX_LAYERS} and {MAX_VOXELS} voxels are read.")
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as err:
        raise ImageError(f"'{path.name}' cannot be read; it may be cut off. Save it again.") from err
    array = sitk.GetArrayFromImage(image)
    if array.ndim != 4 or array.shape[3] != count:
        raise ImageError(f"'{path.name}' does not hold the {count} layers that its header states. Save it again.")
    if not np.issubdtype(array.dtype, np.integer) or int(array.min()) < 0:
        raise ImageError(f"'{path.name}' holds values that are no label ids; save it with whole numbers from 0.")
    return cast(NDArray[Any], array.transpose(3, 2, 1, 0))
