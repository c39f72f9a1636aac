"""Small labelled volumes in the layout of a local datastore."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np

AFFINE = np.array([[-5.5, 0, 0, 100], [0, 6.5, 0, -80], [0, 0, 5.0, 0], [0, 0, 0, 1.0]])


def write_case(
    studies: Path,
    name: str,
    boxes: dict[int, tuple[slice, slice, slice]],
    slices: int = 20,
    affine: np.ndarray = AFFINE,
) -> None:
    """A CT-like body; `boxes` are label id -> (i, j, k) in file order, bright in the image."""
    (studies / "labels" / "final").mkdir(parents=True, exist_ok=True)
    image = np.full((40, 28, slices), -1000, np.int16)
    image[4:36, 4:24] = 20
    label = np.zeros(image.shape, np.uint8)
    for value, box in boxes.items():
        image[box] = 150
        label[box] = value
    nibabel.save(nibabel.Nifti1Image(image, affine), studies / f"{name}.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label, affine), studies / "labels" / "final" / f"{name}.nii.gz")


def write_table(studies: Path, table: dict[int, str]) -> None:
    (studies / "labels.json").write_text(json.dumps(table))


def write_reader_crops(path: Path, count: int) -> Path:
    """Crops of one patient each with a square that three of four readers drew."""
    masks = np.zeros((count, 4, 96, 96), np.uint8)
    masks[:, :3, 40:52, 40:52] = 1
    key = np.array([[f"p{n}", "0", "0"] for n in range(count)])
    np.savez(path, images=masks.mean(1).astype(np.uint8) * 200, masks_packed=np.packbits(masks, axis=-1), key=key)
    return path
