"""Label maps with several values per voxel, as 3D Slicer writes overlapping segments: one layer each."""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import Grid
from progidiff.images.raw import MAX_VOXELS
from progidiff.images.reading import read_grid
from progidiff.images.text_headers import read_header, read_voxels

MAX_LAYERS = 255


def read_layers(path: str | os.PathLike[str], like: Grid) -> NDArray[Any]:
    """The layers of an NRRD segmentation.

    Args:
        path: An NRRD file with an axis of several values per voxel.
        like: The grid of its image, which it must share.

    Returns:
        Numbers as stored, shape (L, I, J, K).

    Raises:
        ImageError: if it cannot be read, or holds anything but whole, non-negative numbers.
        GeometryError: if its grid is not that of `like`.
    """
    path = Path(path)
    try:
        header = read_header(path, layered=True)
        like.check_same(read_grid(path))
        if not 1 < header.layers <= MAX_LAYERS or header.layers * math.prod(header.shape) > MAX_VOXELS:
            raise ImageError(
                f"'{path.name}' has {header.layers} layers; at most {MAX_LAYERS} and {MAX_VOXELS} voxels are read."
            )
        array = read_voxels(header)
    except (OSError, ValueError, zlib.error) as err:
        raise ImageError(f"'{path.name}' cannot be read ({err}); it may be cut off. Save it again.") from err
    if not np.issubdtype(array.dtype, np.integer) or int(array.min()) < 0:
        raise ImageError(f"'{path.name}' holds values that are no label ids; save it with whole numbers from 0.")
    return array.astype(array.dtype.newbyteorder("="), copy=False)
