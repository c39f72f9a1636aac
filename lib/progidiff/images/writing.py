"""Writing masks, label maps and real-valued maps on the grid of an image."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import RequestError, StoreError
from progidiff.images.formats import find_writer, list_written
from progidiff.images.geometry import Affine, Grid
from progidiff.storage.atomic import atomic_file


def save_mask(mask: NDArray[Any], like: Grid, path: str | os.PathLike[str]) -> Path:
    """Write a mask, label map or real-valued map on the grid of an image.

    The file appears complete or not at all: it is written in a temporary folder beside its place and then renamed.

    Args:
        mask: Shape (I, J, K) in file order; booleans are written as uint8, floats as float32, integers as they are.
        like: The grid of the image.
        path: Ends in .nii.gz, .nii, .nrrd or .mha; for a picture also .png.

    Returns:
        The path written.

    Raises:
        GeometryError: if the mask is not on the image's grid.
        RequestError: if the suffix is none of these.
        StoreError: if the disk refuses.
    """
    like.check_shape(mask.shape)
    if mask.dtype == np.bool_:
        mask = mask.astype(np.uint8)
    elif np.issubdtype(mask.dtype, np.floating):
        mask = mask.astype(np.float32, copy=False)
    elif mask.dtype in (np.int64, np.uint64):
        mask = mask.astype(np.int32)
    return _save(mask, like, Path(path))


def save_array(array: NDArray[Any], affine: Affine, path: str | os.PathLike[str]) -> Path:
    """Write an array in file order (I, J, K) with its affine (voxel index -> RAS mm); see `save_mask`."""
    size_i, size_j, size_k = array.shape
    return _save(array, Grid((size_i, size_j, size_k), affine), Path(path))


def _save(array: NDArray[Any], grid: Grid, path: Path) -> Path:
    row = find_writer(path)
    if row is None or row.write is None or (row.kind == "picture" and array.shape[2] != 1):
        raise RequestError(
            f"Cannot write '{path.name}': its suffix must be one of {', '.join(list_written('volume'))}."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, suffix=row.suffix) as scratch:
            row.write(array, grid, scratch)
    except (OSError, RuntimeError) as err:
        raise StoreError(f"'{path}' could not be written ({err}). Free some space or choose another folder.") from err
    return path
