"""The grid of an image: how many voxels, where they lie in the patient, and how its axes become an axial stack.

Arrays are either in *file order* (I, J, K), exactly as the file stores its voxels, or an *axial stack* (Z, Y, X): z
towards Superior, y towards Posterior, x towards the patient's Left. `Grid.arrange` and `Grid.from_stack` swap and flip
axes; they never interpolate, so a mask that leaves through `from_stack` is on the input's grid voxel by voxel. An
oblique grid takes the nearest of the 48 orientations and is not rotated.

Affines map voxel indices to RAS millimetres, as in NIfTI. NRRD, MetaImage and DICOM speak LPS; `LPS_TO_RAS` is applied
where they are read and written, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from progidiff.errors import GeometryError

GRID_TOLERANCE = 0.1
"""Two grids are the same if no corner differs by more than this share of the smallest voxel edge."""

LPS_TO_RAS: NDArray[np.float64] = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns millimetres of DICOM, NRRD and MetaImage into those of NIfTI, and back."""

Affine = NDArray[np.float64]
"""Index (i, j, k, 1) -> mm, shape (4, 4)."""

Shape = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class HeaderReading:
    """How a header that says more than one thing about the place of the voxels was read.

    Attributes:
        taken: What was taken: "sform", "qform", "both" if they agree, or "none" if the header gives no orientation.
        others: What other programs make of the same header, each voxel index -> RAS mm, shape (4, 4). A label that lies
            there lies on the image.
        warnings: What people should know, one sentence each.
        stated: The fields of the header that say where the voxels lie, for the files that answer.
    """

    taken: str
    others: tuple[Affine, ...]
    warnings: tuple[str, ...]
    stated: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the voxels of an image lie.

    Attributes:
        shape: (I, J, K) in file order.
        affine: Voxel index (i, j, k, 1) -> RAS mm, shape (4, 4), float64.
        name: What to call the image in messages.
        header: How its header was read, where there is a choice (NIfTI).

    Example:
        >>> grid = Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]), "example")
        >>> grid.stack_shape, grid.stack_spacing
        ((6, 5, 4), (3.0, 2.0, 1.0))
    """

    shape: Shape
    affine: Affine
    name: str = "the image"
    header: HeaderReading | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What people should know about the place of the voxels, one sentence each; mostly nothing."""
        return () if self.header is None else self.header.warnings

    def describe(self) -> dict[str, Any]:
        """For the parameters of an answer: `reading`, what of the header was taken (see `HeaderReading.taken`; "file"
        where there is no choice), and `warnings`.
        """
        return {"reading": "file" if self.header is None else self.header.taken, "warnings": list(self.warnings)}

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel edges along i, j, k in mm."""
        edges = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(edges[0]), float(edges[1]), float(edges[2])

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000.0

    @property
    def axial_axis(self) -> int:
        """Which axis of the file (0, 1 or 2) runs from slice to axial slice."""
        return self._orientation[0][2]

    @property
    def num_slices(self) -> int:
        """Axial slices."""
        return self.stack_shape[0]

    @property
    def stack_shape(self) -> Shape:
        """(Z, Y, X) of the axial stack."""
        order = self._orientation[0]
        return self.shape[order[2]], self.shape[order[1]], self.shape[order[0]]

    @property
    def stack_spacing(self) -> tuple[float, float, float]:
        """(dz, dy, dx) of the axial stack in mm."""
        order, edges = self._orientation[0], self.spacing
        return edges[order[2]], edges[order[1]], edges[order[0]]

    @property
    def stack_affine(self) -> Affine:
        """Index (x, y, z, 1) into the axial stack -> RAS mm, shape (4, 4); mind that the stack's axes are (z, y, x).

        Example:
            >>> grid = Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0]))
            >>> grid.stack_affine @ (0, 0, 0, 1)  # the stack begins at the right, front and bottom
            array([3., 8., 0., 1.])
        """
        order, flipped = self._orientation
        affine = self.affine[:, [*order, 3]]
        for axis, flip in enumerate(flipped):
            if flip:
                affine[:, 3] += affine[:, axis] * (self.shape[order[axis]] - 1)
                affine[:, axis] *= -1
        return affine

    def arrange(self, array: NDArray[Any]) -> NDArray[Any]:
        """Any array on this grid as an axial stack (a view): (I, J, K) -> (Z, Y, X).

        Raises:
            GeometryError: if its shape is not the grid's.
        """
        self.check_shape(array.shape)
        order, flipped = self._orientation
        lps = array.transpose(order)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flipped)]
        return lps.transpose(2, 1, 0)

    def from_stack(self, stack: NDArray[Any]) -> NDArray[Any]:
        """The exact inverse of `arrange`: (Z, Y, X) -> (I, J, K), a view.

        Raises:
            GeometryError: if the shape is not that of this grid's axial stack.
        """
        self._check(stack.shape, self.stack_shape, "as an axial stack")
        order, flipped = self._orientation
        lps = stack.transpose(2, 1, 0)[tuple(slice(None, None, -1) if flip else slice(None) for flip in flipped)]
        return lps.transpose(tuple(int(axis) for axis in np.argsort(order)))

    def locate(self, index: Shape) -> Shape:
        """Where a voxel of the file lies in the axial stack: (i, j, k) -> (z, y, x).

        Raises:
            GeometryError: if it is outside of the grid.

        Example:
            >>> Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0])).locate((0, 0, 5))
            (5, 4, 3)
        """
        if not all(0 <= place < size for place, size in zip(index, self.shape, strict=True)):
            raise GeometryError(
                f"The voxel {tuple(index)} is outside of '{self.name}', which has "
                f"{times(self.shape)} voxels counted from 0."
            )
        order, flipped = self._orientation
        x, y, z = (
            self.shape[axis] - 1 - index[axis] if flip else index[axis]
            for axis, flip in zip(order, flipped, strict=True)
        )
        return z, y, x

    def find_voxel(self, place: Shape) -> Shape:
        """The inverse of `locate`: (z, y, x) -> (i, j, k).

        Raises:
            GeometryError: if it is outside of the axial stack.

        Example:
            >>> Grid((4, 5, 6), np.diag([1.0, 2.0, 3.0, 1.0])).find_voxel((5, 4, 3))
            (0, 0, 5)
        """
        if not all(0 <= at < size for at, size in zip(place, self.stack_shape, strict=True)):
            z, y, x = place
            raise GeometryError(
                f"Row {y} and column {x} of slice {z} are outside of '{self.name}', which has {self.stack_shape[0]} "
                f"axial slices of {times(self.stack_shape[1:])} pixels, counted from 0."
            )
        order, flipped = self._orientation
        voxel = [0, 0, 0]
        for axis, flip, at in zip(order, flipped, reversed(place), strict=True):
            voxel[axis] = self.shape[axis] - 1 - at if flip else at
        return voxel[0], voxel[1], voxel[2]

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse an array that has not this shape, in file order.

        Raises:
            GeometryError: if it has another.
        """
        self._check(shape, self.shape, "in file order")

    def check_same(self, other: Grid) -> None:
        """Refuse another grid. Where a header can be read in several ways, one that fits is enough: programs differ in
        what they take, and all of them mean the same voxels.

        Raises:
            GeometryError: if the shapes differ, or any corner by more than `GRID_TOLERANCE` of the smallest voxel edge.
        """
        if other.shape != self.shape:
            raise GeometryError(
                f"'{other.name}' has {times(other.shape)} voxels and the image '{self.name}' {times(self.shape)}; "
                "resample it to the image's grid, or save it uncropped."
            )
        if not any(is_same_place(self.shape, mine, theirs) for mine in self._readings for theirs in other._readings):
            distance = find_distance(self.shape, self.affine, other.affine)
            raise GeometryError(
                f"'{other.name}' lies up to {distance:.2f} mm away from the image '{self.name}' although both have "
                f"{times(self.shape)} voxels (another origin, spacing or orientation); resample it to the image's grid."
            )

    @property
    def _readings(self) -> tuple[Affine, ...]:
        return (self.affine, *(() if self.header is None else self.header.others))

    def _check(self, given: tuple[int, ...], wanted: tuple[int, ...], kind: str) -> None:
        if tuple(given) != tuple(wanted):
            raise GeometryError(
                f"An array of shape {tuple(given)} is not on the grid of '{self.name}', "
                f"which is {tuple(wanted)} {kind}; resample it to the image first."
            )

    @cached_property
    def _orientation(self) -> tuple[Shape, tuple[bool, bool, bool]]:
        """Which file axis runs along x (Left), y (Posterior), z (Superior), and which of the three must be flipped."""
        transform = ornt_transform(io_orientation(self.affine), axcodes2ornt(("L", "P", "S")))
        order = np.argsort(transform[:, 0])
        flips = transform[order, 1] < 0
        return (int(order[0]), int(order[1]), int(order[2])), (bool(flips[0]), bool(flips[1]), bool(flips[2]))


def find_distance(shape: Shape, one: Affine, other: Affine) -> float:
    """By how many mm, along any axis of the patient, the corner that moves most lies elsewhere with another affine."""
    last = np.asarray(shape, dtype=np.float64) - 1
    corners = np.array([[i, j, k, 1.0] for i in (0, last[0]) for j in (0, last[1]) for k in (0, last[2])])
    return float(np.abs(corners @ (np.asarray(other, dtype=np.float64) - one).T).max())


def is_same_place(shape: Shape, one: Affine, other: Affine) -> bool:
    """Whether no corner differs by more than `GRID_TOLERANCE` of the smallest voxel edge of the first."""
    edges = np.linalg.norm(one[:3, :3], axis=0)
    return find_distance(shape, one, other) <= GRID_TOLERANCE * float(edges.min())


def times(shape: Iterable[int]) -> str:
    """A shape as people write it.

    Example:
        >>> times((512, 512, 90))
        '512 x 512 x 90'
    """
    return " x ".join(str(int(size)) for size in shape)
