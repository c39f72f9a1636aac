"""Volumes as DICOM series, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from hypothesis import strategies as st

from progidiff.dicomweb.export import export_series
from progidiff.dicomweb.frames import Series
from progidiff.dicomweb.headers import Identity
from progidiff.images.volume import Volume

AXIAL = np.diag([-0.8, -0.8, 5.0, 1.0])


SAGITTAL = np.array([[0, 0, 4.0, -60], [-0.9, 0, 0, 80], [0, -0.9, 0, 70], [0, 0, 0, 1.0]])


CORONAL = np.array([[-0.7, 0, 0, 90], [0, 0, 3.0, -100], [0, -0.7, 0, 120], [0, 0, 0, 1.0]])


def make_volume(
    affine: np.ndarray, shape: tuple[int, int, int] = (5, 6, 4), dtype: type = np.int16, name: str = "case"
) -> Volume:
    """Every voxel has another value, so that any mix-up shows."""
    array = (np.arange(np.prod(shape)) * 7 - 1024).astype(dtype).reshape(shape)
    return Volume(array, affine, "CT", "option", name)


def write_series(
    folder: Path, affine: np.ndarray = AXIAL, name: str = "a", shape: tuple[int, int, int] = (5, 6, 4)
) -> Path:
    """A volume as a folder of DICOM files, one per axial slice; another name is another patient and series."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    export_series(Series.of(Identity(name, name * 8, "CT"), make_volume(affine, shape)), folder)
    return folder


def rebuild(datasets: list[pydicom.Dataset]) -> tuple[np.ndarray, np.ndarray]:
    """What a reader makes of files in any order: intensities (Z, Y, X) sorted by position, and index (x, y, z) -> LPS
    mm.

    From the standard's words (PS3.3 C.7.6.2.1.1), with nothing of the code under test.
    """
    orientation = np.array(datasets[0].ImageOrientationPatient, dtype=float)
    row, column = orientation[:3], orientation[3:]
    normal = np.cross(row, column)
    datasets = sorted(datasets, key=lambda ds: float(np.dot(normal, np.array(ds.ImagePositionPatient, dtype=float))))
    stack = np.stack([ds.pixel_array * float(ds.RescaleSlope) + float(ds.RescaleIntercept) for ds in datasets])
    positions = np.array([ds.ImagePositionPatient for ds in datasets], dtype=float)
    affine = np.eye(4)
    affine[:3, 0] = row * float(datasets[0].PixelSpacing[1])
    affine[:3, 1] = column * float(datasets[0].PixelSpacing[0])
    affine[:3, 2] = (positions[-1] - positions[0]) / max(1, len(positions) - 1)
    affine[:3, 3] = positions[0]
    return stack, affine


@st.composite
def affines(draw: st.DrawFn) -> np.ndarray:
    """Any rotation or reflection, any voxel size, any origin."""
    numbers = st.floats(-1, 1, allow_nan=False)
    matrix = np.array([[draw(numbers) for _ in range(3)] for _ in range(3)]) + 1e-3 * np.eye(3)
    rotation, triangular = np.linalg.qr(matrix)
    affine = np.eye(4)
    affine[:3, :3] = rotation * np.where(np.diag(triangular) < 0, -1, 1) * [draw(st.floats(0.3, 6)) for _ in range(3)]
    affine[:3, 3] = [draw(st.floats(-500, 500)) for _ in range(3)]
    if draw(st.booleans()):
        affine[:3, draw(st.integers(0, 2))] *= -1
    return affine[:, [*draw(st.permutations(range(3))), 3]]
