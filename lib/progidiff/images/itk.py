"""NRRD and MetaImage, with SimpleITK."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import LPS_TO_RAS, Affine, Grid
from progidiff.images.raw import Place, Raw, check_size


def read_itk(path: Path) -> Raw:
    """Voxels and affine; beyond three the further axes are for the caller to drop.

    Raises:
        ImageError: if it has several values per voxel.
    """
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    check_size(reader.GetSize(), path)
    if reader.GetNumberOfComponents() > 1:
        raise ImageError(
            f"'{path.name}' has {reader.GetNumberOfComponents()} values per voxel "
            "(colour, several layers or time points); save a single one."
        )
    return Raw(sitk.GetArrayFromImage(reader.Execute()).T, _find_affine(reader))


def read_itk_place(path: Path) -> Place:
    """Shape and affine from the header."""
    import SimpleITK as sitk

    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.ReadImageInformation()
    return Place(tuple(reader.GetSize()), _find_affine(reader))


def write_itk(array: NDArray[Any], grid: Grid, path: Path) -> None:
    """Write an array (I, J, K), compressed."""
    import SimpleITK as sitk

    lps = LPS_TO_RAS @ grid.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


def _find_affine(image: Any) -> Affine:
    """Voxel index -> RAS mm of an image or reader of SimpleITK, of any dimension; of its first three axes."""
    rank = image.GetDimension()
    direction = np.asarray(image.GetDirection()).reshape(rank, rank)
    count = min(rank, 3)
    affine = np.eye(4)
    affine[:count, :count] = (direction * np.asarray(image.GetSpacing()))[:count, :count]
    affine[:count, 3] = image.GetOrigin()[:count]
    return LPS_TO_RAS @ affine
