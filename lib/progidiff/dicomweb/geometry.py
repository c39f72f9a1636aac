"""Where the slices of a volume lie in the patient, in DICOM's words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from progidiff.errors import GeometryError
from progidiff.images.volume import Volume

SHEAR_TOLERANCE = 0.02
"""Share of the smallest voxel edge by which a voxel may lie elsewhere than DICOM's rectangular slices say."""

_RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def compute_lps_affine(volume: Volume) -> np.ndarray:
    """Index (x, y, z, 1) into the axial stack -> LPS mm, shape (4, 4)."""
    return _RAS_TO_LPS @ volume.stack_affine


@dataclass(frozen=True, eq=False)
class ServedGrid:
    """A stack of parallel rectangular slices.

    Attributes:
        shape: (Z, Y, X), slices, rows and columns.
        affine: Index (x, y, z, 1) -> LPS mm, shape (4, 4); column, row, slice.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    @classmethod
    def of(cls, volume: Volume) -> ServedGrid:
        """The grid that a volume is served on: its axial stack, voxel by voxel, nothing interpolated.

        Raises:
            GeometryError: if the axes of the volume are not at right angles, which DICOM slices cannot say.
        """
        stack, _ = volume.to_stack()
        grid = cls((stack.shape[0], stack.shape[1], stack.shape[2]), compute_lps_affine(volume))
        grid._check_angles(volume.name)
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
    def orientation(self) -> np.ndarray:
        """ImageOrientationPatient: unit vectors along a row and along a column, at right angles, shape (6,)."""
        row = self.affine[:3, 0] / self.spacing[0]
        column = self.affine[:3, 1] / self.spacing[1]
        column = column - row * (row @ column)
        return np.concatenate([row, column / np.linalg.norm(column)])

    def position(self, index: int) -> np.ndarray:
        """ImagePositionPatient of a slice: the centre of its first voxel, LPS mm, shape (3,)."""
        return self.affine[:3, 3] + index * self.affine[:3, 2]

    def file_order(self, stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """An axial stack as an array in the file order (X, Y, Z) of an image file of its own, and its affine to RAS
        mm.
        """
        return stack.transpose(2, 1, 0), _RAS_TO_LPS @ self.affine
