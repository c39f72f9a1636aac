"""NIfTI, with nibabel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.geometry import Affine
from progidiff.images.raw import Raw, check_size


def read_nifti(path: Path) -> Raw:
    """Voxels, scaled where the header says so, and affine.

    Raises:
        ImageError: if it is another format.
    """
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Pair):
        raise ImageError(f"'{path.name}' is named as NIfTI and is a {type(image).__name__}; convert it to NIfTI.")
    check_size(image.shape, path)
    proxy: Any = image.dataobj
    if getattr(proxy, "slope", 1.0) == 1.0 and getattr(proxy, "inter", 0.0) == 0.0:
        return Raw(np.asanyarray(proxy), image.affine)
    return Raw(np.asanyarray(proxy, dtype=np.float32), image.affine)


def read_nifti_grid(path: Path) -> tuple[tuple[int, ...], Affine]:
    """Shape and affine from the header."""
    image = nibabel.load(path)
    return tuple(image.shape), np.asarray(image.affine, dtype=np.float64)


def write_nifti(array: NDArray[Any], affine: Affine, path: Path) -> None:
    """Write an array (I, J, K)."""
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    if not np.allclose(image.get_qform(), affine, atol=1e-3):
        image.set_qform(
            None, code=0
        )  # A quaternion cannot say shear (gantry tilt); no answer is better than a wrong one.
    nibabel.save(image, path)
