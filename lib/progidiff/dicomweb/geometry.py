"""Where the slices of a volume lie in the patient, in DICOM's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError
from progidiff.images.geometry import LPS_TO_RAS, Affine, Grid

SHEAR_TOLERANCE = 0.02
"""Share of the smallest voxel edge by which a voxel may lie elsewhere than DICOM's rectangular slices say."""


def compute_lps_affine(grid: Grid) -> Affine:
    """Index (x, y, z, 1) into the axial stack -> LPS mm, shape (4, 4)."""
    return LPS_TO_RAS @ grid.stack_affine


@dataclass(frozen=True, eq=False)
class ServedGrid:
    """A stack of parallel rectangular slices.

    Attributes:
        shape: (Z, Y, X), slices, rows and columns.
        affine: Index (x, y, z, 1) -> LPS mm, shape (4, 4); column, row, slice.
    """

    shape: tuple[int, int, int]
    affine: NDArray[Any]

    @classmethod
    def of(cls, image: Grid) -> ServedGrid:
        """The grid that an image is served on: its axial stack, voxel by voxel, nothing interpolated.

        Raises:
            GeometryError: if the axes of the image are not at right angles, which DICOM slices cannot say.
        """
        grid = cls(image.stack_shape, compute_lps_affine(image))
        grid._check_angles(image.name)
        return grid

    def _check_angles(self, name: str) -> None:
        depth, height, width = self.shape
        row, column = self.orientation[:3], self.orientation[3:]
        wanted = self.affine.copy()
        wanted[:3, 1] = column * self.spacing[1]
        wanted[:3, 2] = np.cross(row, column) * self.spacing[2]
        corner = np.abs(self.affine - wanted) @ np.array([width - 1, height - 1, depth - 1, 0.0])
        if float(corner.max()) > SHEAR_TOLERANCE * min(self.spacing):
            raise GeometryError(
                f"The axes of '{name}' are not at right angles (a tilted gantry, or an "
                f"affine registration in the header): voxels lie up to {float(corner.max()):.2f} mm beside rectangular "
                "slices, so it cannot be shown as DICOM. Resample it onto a rectangular grid first."
            )

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges along x, y, z in mm."""
        edges = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(edges[0]), float(edges[1]), float(edges[2])

    @property
    def orientation(self) -> NDArray[Any]:
        """ImageOrientationPatient: unit vectors along a row and along a column, at right angles, shape (6,)."""
        row = self.affine[:3, 0] / self.spacing[0]
        column = self.affine[:3, 1] / self.spacing[1]
        column = column - row * (row @ column)
        return np.concatenate([row, column / np.linalg.norm(column)])

    def position(self, index: int) -> NDArray[Any]:
        """ImagePositionPatient of a slice: the centre of its first voxel, LPS mm, shape (3,)."""
        position: NDArray[Any] = self.affine[:3, 3] + index * self.affine[:3, 2]
        return position

    def to_file_grid(self, name: str) -> Grid:
        """The grid of an image file of its own, whose file order is (X, Y, Z): that of a stack transposed."""
        depth, height, width = self.shape
        return Grid((width, height, depth), LPS_TO_RAS @ self.affine, name)
