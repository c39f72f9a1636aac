"""A medical volume: voxels, grid and modality together."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.images.geometry import Affine, Grid, HeaderReading


@dataclass(frozen=True, eq=False)
class Volume:
    """One image, as read.

    Attributes:
        array: Intensities in file order, shape (I, J, K): integers as stored, floats as float32, rescaled (HU for CT).
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), float64.
        modality: "CT" or "MR".
        modality_source: Where the modality comes from: "dicom", "option", "sidecar" or "guessed".
        name: File name without its suffix, or the folder's name for a DICOM series.
        header: How its header was read, where there is a choice (NIfTI).
    """

    array: NDArray[Any]
    affine: Affine
    modality: str
    modality_source: str
    name: str
    header: HeaderReading | None = None

    @cached_property
    def grid(self) -> Grid:
        """Where the voxels lie. Whatever needs no intensities takes this instead of the volume."""
        size_i, size_j, size_k = self.array.shape
        return Grid((size_i, size_j, size_k), self.affine, self.name, self.header)

    @cached_property
    def digest(self) -> str:
        """Hexadecimal BLAKE2b of voxels, grid and modality: two volumes with the same digest get the same proposals."""
        state = hashlib.blake2b(digest_size=20)
        state.update(f"{self.array.shape} {self.array.dtype.str} {self.modality}".encode())
        state.update(np.ascontiguousarray(self.affine, dtype=np.float64).tobytes())
        state.update(np.ascontiguousarray(self.array.T).data)
        return state.hexdigest()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges along i, j, k in mm."""
        return self.grid.spacing

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return self.grid.voxel_ml

    def to_stack(self) -> tuple[NDArray[Any], tuple[float, float, float]]:
        """The axial stack, a view of `array`.

        Returns:
            The stack, shape (Z, Y, X) with z -> Superior, y -> Posterior, x -> Left, and its spacing (dz, dy, dx) in
            mm.

        Example:
            >>> ras = Volume(np.zeros((4, 5, 6), np.int16), np.diag([1.0, 2.0, 3.0, 1.0]), "CT", "option", "example")
            >>> stack, spacing = ras.to_stack()
            >>> stack.shape, spacing
            ((6, 5, 4), (3.0, 2.0, 1.0))
        """
        return self.grid.arrange(self.array), self.grid.stack_spacing

    def arrange(self, array: NDArray[Any]) -> NDArray[Any]:
        """See `Grid.arrange`."""
        return self.grid.arrange(array)

    def from_stack(self, stack: NDArray[Any]) -> NDArray[Any]:
        """See `Grid.from_stack`."""
        return self.grid.from_stack(stack)
