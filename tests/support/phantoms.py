"""Generated images that look a little like scans."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_phantom(
    path: Path, shape: tuple[int, int, int] = (64, 48, 8), seed: int = 0, affine: np.ndarray | None = None
) -> Path:
    """A CT-like NIfTI in HU: air, an elliptic body with fat and soft tissue, a bright and a dim ball, noise. 5 mm
    slices by default.
    """
    import nibabel

    rng = np.random.default_rng(seed)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    image = np.full(shape, -1000.0)
    image[(i / 0.9) ** 2 + (j / 0.85) ** 2 < 1] = -90
    image[(i / 0.8) ** 2 + (j / 0.75) ** 2 < 1] = 40
    image[(i + 0.35) ** 2 + (j * 1.1) ** 2 + (k / 1.5) ** 2 < 0.12] = 110
    image[(i - 0.4) ** 2 + j**2 + (k / 1.5) ** 2 < 0.05] = 180
    image += rng.normal(0, 8, shape)
    if affine is None:
        affine = np.array([[-5.5, 0, 0, 170], [0, 6.5, 0, -160], [0, 0, 5.0, 300], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(image.astype(np.int16), affine), path)
    return path
