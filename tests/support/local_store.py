"""A folder of studies with two images, and its datastore in this process, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from support.phantoms import write_phantom

SHAPE = (32, 24, 8)
LIVER, SPLEEN = 6, 1


def make_studies(folder: Path) -> Path:
    folder.mkdir()
    for name in ("one", "two"):
        write_phantom(folder / f"{name}.nii.gz", shape=SHAPE)
    return folder


def open_store(studies: Path, serves: bool = False) -> SafeLocalDatastore:
    state = studies / ".progidiff"
    return SafeLocalDatastore(str(studies), state, open_annotations(state, str(studies)), serves=serves)


def open_as_server(studies: Path) -> SafeLocalDatastore:
    """As the server opens it, without the claim on the folder, which belongs to the process and not to a test."""
    opened = open_store(studies)
    opened._serves, opened._is_settled = True, False
    opened.refresh()
    return opened


def write_label(
    studies: Path, name: str, values: dict[int, int], image: str = "one", dtype: Any = np.uint8, suffix: str = ".nii.gz"
) -> Path:
    """A label with a 3 x 3 square of `value` on file slices k; the phantom's k runs from inferior to superior."""
    affine = nibabel.load(studies / f"{image}.nii.gz").affine
    array = np.zeros(SHAPE, dtype)
    for k, value in values.items():
        array[4:7, 4:7, k] = value
    path = studies.parent / f"{name}{suffix}"
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


def read_final(studies: Path, image: str = "one", tag: str = "final") -> np.ndarray:
    return np.asarray(nibabel.load(studies / "labels" / tag / f"{image}.nii.gz").dataobj)
