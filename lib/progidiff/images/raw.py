"""What every reader returns, and the checks that all formats share."""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import Affine, HeaderReading, times

MAX_VOXELS = 1 << 30
"""Largest volume that is read: 1024 x 1024 x 1024."""

VOXEL_EDGES = (0.01, 100.0)
"""Smallest and largest edge of a voxel in mm: from microscopic CT to the slabs of a localiser."""

MAX_EXTENT = 10_000.0
"""Longest side of a volume in mm."""

MAX_HEADER_BYTES = 4 << 20
"""Of any header. 3D Slicer writes about half a kilobyte per segment."""

_decoded: ContextVar[int | None] = ContextVar("decoded", default=None)


@dataclass(frozen=True, eq=False)
class Place:
    """What a header alone says.

    Attributes:
        shape: Voxels per axis, of any number of axes.
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4).
        header: How the header was read, where there is a choice.
    """

    shape: tuple[int, ...]
    affine: Affine
    header: HeaderReading | None = None


@dataclass(frozen=True, eq=False)
class Raw:
    """What a reader returns.

    Attributes:
        array: Voxels in file order.
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4).
        modality: The tag, if the format has one.
        header: How the header was read, where there is a choice.
    """

    array: NDArray[Any]
    affine: Affine
    modality: str | None = None
    header: HeaderReading | None = None


def limit_decoded(size: int) -> None:
    """Have `check_size` refuse more bytes than this, for the rest of this process."""
    _decoded.set(size)


def check_size(shape: tuple[int, ...], path: Path, itemsize: int = 1) -> None:
    """Refuse a shape of more than `MAX_VOXELS` voxels, or of more bytes than `limit_decoded` has said.

    Args:
        shape: As a header states it.
        path: Of the file.
        itemsize: Bytes of a voxel.

    Raises:
        ImageError: if it is.
    """
    count, allowed = math.prod(map(int, shape)), _decoded.get()
    if allowed is not None and count <= MAX_VOXELS and count * itemsize > allowed:
        raise ImageError(
            f"'{path.name}' unpacks to {times(shape)} voxels of {itemsize} bytes, far more than files of its size "
            "hold. Save it uncompressed, or crop it."
        )
    if count > MAX_VOXELS:
        raise ImageError(
            f"'{path.name}' has {times(shape)} voxels, more than the {MAX_VOXELS} that are read; crop or resample it."
        )


def check_extent(affine: Affine, shape: tuple[int, ...], path: Path) -> None:
    """Refuse sizes that no image of a patient has: whoever resamples it would need any amount of memory.

    Args:
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4).
        shape: (I, J, K).
        path: Of the file.

    Raises:
        ImageError: if a voxel edge is not within `VOXEL_EDGES`, or the image longer than `MAX_EXTENT`.
    """
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    low, high = VOXEL_EDGES
    if edges.min() < low or edges.max() > high:
        given = " x ".join(f"{edge:g}" for edge in edges)
        raise ImageError(
            f"'{path.name}' has voxels of {given} mm; {low:g} to {high:g} mm are read. Correct the voxel size "
            "in its header, or its unit."
        )
    extent = edges * np.asarray(shape[:3])
    if extent.max() > MAX_EXTENT:
        raise ImageError(
            f"'{path.name}' is {extent.max():.0f} mm long, and at most {MAX_EXTENT:.0f} mm are read. Correct the voxel "
            "size in its header, or crop it."
        )


def check_affine(affine: Affine, path: Path) -> Affine:
    """Refuse an affine that gives no voxel a place of its own.

    Raises:
        ImageError: if it does.
    """
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise ImageError(
            f"The header of '{path.name}' gives no usable voxel size and orientation "
            f"(affine {np.round(affine[:3], 4).tolist()}); convert the original images again."
        )
    return affine


def squeeze(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Drop trailing axes of one frame; a native-endian real array of three axes, or an error that says how to get
    one.
    """
    if array.dtype.names is not None or np.issubdtype(array.dtype, np.complexfloating):
        raise ImageError(f"'{path.name}' is a colour or complex image; save a single real value per voxel.")
    if array.ndim < 3:
        raise ImageError(
            f"'{path.name}' has {array.ndim} axes; a volume of slices is needed, with its spacing and orientation."
        )
    frames = array.shape[3:]
    if any(size != 1 for size in frames):
        raise ImageError(
            f"'{path.name}' holds {times(frames)} volumes (time points, echoes or directions); save the one you want "
            "as its own file, for example with nibabel's four_to_three."
        )
    if min(array.shape) < 1:
        raise ImageError(f"'{path.name}' is empty ({times(array.shape)} voxels); export it again.")
    return array.reshape(array.shape[:3], order="A").astype(array.dtype.newbyteorder("="), copy=False)


def check_voxels(array: NDArray[Any], path: Path) -> NDArray[Any]:
    """Intensities as `Volume` has them.

    Raises:
        ImageError: if some are not finite.
    """
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32, copy=False)
        bad = int(array.size - np.count_nonzero(np.isfinite(array)))
        if bad:
            raise ImageError(
                f"{bad} of {array.size} voxels of '{path.name}' are not finite numbers "
                "(NaN or infinite); replace them by the value of air (for example numpy.nan_to_num) and send it again."
            )
    elif array.dtype == np.bool_:
        array = array.astype(np.uint8)
    return array
