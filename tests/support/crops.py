"""Crops of real images for the tests in a browser."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

from support.phantoms import write_phantom
from support.servers import ROOT

SWITCH_MS = 300
"""Another proposal is on the screen after this time."""


def write_crop(path: Path) -> Path:
    """The upper abdomen of the sample CT at half its resolution, turned so that files and slices run differently; else
    a phantom.
    """
    source = ROOT / "sample_datastore" / "sample_ct_abdomen.nii.gz"
    if not source.is_file():
        return write_phantom(path, shape=(96, 96, 24))
    image = nibabel.as_closest_canonical(nibabel.load(source))
    crop = image.slicer[::2, ::2, -60::2]
    turned = crop.as_reoriented(nibabel.orientations.axcodes2ornt(("P", "S", "R")))
    nibabel.save(nibabel.Nifti1Image(np.asarray(turned.dataobj).astype(np.int16), turned.affine), path)
    return path
