"""Images that are in memory already: a nibabel image, an array with its affine, or a single axial slice as it is shown.

`GivenImage` remembers how the array came, so that what is drawn on it goes back in the same shape and order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from progidiff.errors import ImageError, RequestError
from progidiff.images.intensities import guess_modality
from progidiff.images.modality import check_modality
from progidiff.images.raw import check_affine, check_extent, check_size, check_voxels, squeeze
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume

SLICE_THICKNESS = 4.0
"""In mm, of a single slice whose thickness is not given; nothing but millilitres depends on it."""

_NAME = Path("the image")


@dataclass(frozen=True, eq=False)
class GivenImage:
    """An image as a volume, and the way back.

    Attributes:
        volume: The image.
        shape: As it was given: (I, J, K), (I, J, K, 1), (I, J), or (rows, columns) of a slice as shown.
        is_shown: Whether it is a slice as shown: rows run down, columns to the right.
    """

    volume: Volume
    shape: tuple[int, ...]
    is_shown: bool = False

    def restore(self, array: NDArray[Any]) -> NDArray[Any]:
        """What lies on the volume's grid, (..., I, J, K), in the shape that was given, (..., *shape)."""
        if self.is_shown:
            array = np.swapaxes(array[..., 0], -1, -2)
        return array.reshape(*array.shape[: array.ndim - (2 if self.is_shown else 3)], *self.shape)


def take_image(
    image: Any,
    affine: ArrayLike | None = None,
    spacing: Sequence[float] | None = None,
    modality: str | None = None,
) -> GivenImage:
    """An image that is in memory, or the path of one.

    Args:
        image: A path, read as `load_volume` does; a nibabel image; an array (I, J, K) with `affine`; one slice of it,
            (I, J), with `affine`; or an axial slice as a radiologist is shown it, (rows, columns), with `spacing`: the
            top is anterior, the left-hand side is the patient's right. Arrays are numpy's, or what numpy reads.
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), of an array.
        spacing: mm from row to row and from column to column, of a slice as it is shown.
        modality: "CT" or "MR"; None to guess from the intensities, or of a path as `load_volume` finds it.

    Raises:
        RequestError: if the array comes without a place, or with one too many.
        ImageError: if it cannot be segmented: not finite, constant, a colour picture, no axial slices.

    Example:
        >>> given = take_image(np.arange(12.0).reshape(3, 4), spacing=(0.8, 0.7), modality="CT")
        >>> given.volume.array.shape, given.volume.spacing
        ((4, 3, 1), (0.7, 0.8, 4.0))
        >>> np.array_equal(given.restore(given.volume.array), np.arange(12.0).reshape(3, 4))
        True
    """
    if isinstance(image, (str, os.PathLike)):
        _refuse_place(affine, spacing, "A file says")
        volume = load_volume(image, modality, detached=True)
        return GivenImage(volume, volume.array.shape)
    if hasattr(image, "dataobj") and hasattr(image, "affine"):
        _refuse_place(affine, spacing, "A nibabel image says")
        check_size(image.shape, _NAME)
        proxy, affine = image.dataobj, image.affine
        is_stored = getattr(proxy, "slope", 1.0) == 1.0 and getattr(proxy, "inter", 0.0) == 0.0
        array = np.asanyarray(proxy) if is_stored else np.asanyarray(proxy, dtype=np.float32)
    else:
        array = np.asarray(image)
    is_shown = affine is None
    if is_shown:
        place, array = _place_slice(array, spacing)
    elif spacing is not None:
        raise RequestError("Give the affine or the spacing of an array, not both: the affine says the spacing too.")
    else:
        place = np.asarray(affine, dtype=np.float64)
        if place.shape != (4, 4):
            raise RequestError(f"The affine must be of shape (4, 4), voxel index -> RAS mm, got {place.shape}.")
    shape = array.shape[::-1][1:] if is_shown else array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    check_size(array.shape, _NAME)
    return GivenImage(_make_volume(array, place, modality), tuple(map(int, shape)), is_shown)


def _refuse_place(affine: Any, spacing: Any, who: str) -> None:
    if affine is not None or spacing is not None:
        raise RequestError(f"{who} where its voxels lie; leave affine and spacing out, or give the plain array.")


def _place_slice(array: NDArray[Any], spacing: Sequence[float] | None) -> tuple[NDArray[np.float64], NDArray[Any]]:
    """A slice as shown, (rows, columns), as a volume (columns, rows, 1) and its affine."""
    if array.ndim != 2:
        raise RequestError(
            f"An array of shape {array.shape} needs its affine (voxel index -> RAS mm, as nibabel gives it): from it "
            "come the size of the voxels and which side is left. Only a single axial slice (rows, columns) may have "
            "its spacing instead."
        )
    if spacing is None or len(spacing) != 2 or not all(np.isfinite(spacing)) or min(spacing) <= 0:
        raise RequestError(
            "A single slice needs spacing=(mm from row to row, mm from column to column), or an affine; organs are "
            "known by their size."
        )
    down, right = map(float, spacing)
    return np.diag([-right, -down, SLICE_THICKNESS, 1.0]), array.T[:, :, None]


def _make_volume(array: NDArray[Any], affine: NDArray[np.float64], modality: str | None) -> Volume:
    array = check_voxels(squeeze(array, _NAME), _NAME)
    check_extent(check_affine(affine, _NAME), array.shape, _NAME)
    option = check_modality(modality, "Option modality")
    found, source = (guess_modality(array), "guessed") if option is None else (option, "option")
    volume = Volume(array, affine, found, source, str(_NAME))
    if min(volume.grid.stack_shape[1:]) < 2:
        raise ImageError("It is a single sagittal or coronal slice, and structures are found on axial ones.")
    if array.min() == array.max():
        raise ImageError(f"All voxels have the value {array.flat[0]}; there is nothing to see in it.")
    return volume
