"""Writing NRRD and MetaImage, with SimpleITK; reading them is for `text_headers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.images.geometry import LPS_TO_RAS, Affine, Grid
from progidiff.images.raw import Place


def read_itk_place(path: Path) -> Place:
    """Shape and affine from the header of a file that was made here: what others send, ITK does not open."""
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
