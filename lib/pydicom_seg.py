"""Stands where MONAI Label imports `pydicom_seg`, so that the host starts on today's libraries.

MONAI Label 0.8.5 imports pydicom-seg 0.4.1 at start (`monailabel.datastore.utils.convert`). That package has had no
release since 2022 and cannot be imported beside pydicom 3 (MONAILabel#1841), and it broke on numpy 2: one import kept
numpy, pydicom, dicomweb-client, monai and their security fixes back. The host's start needs the name of the module and
nothing of it.

The contract: `import pydicom_seg` works, and whoever asks it for a reader, a writer or a template is refused with what
to use instead. Two functions of the host ask: `dicom_seg_to_itk_image`, which reads a segmentation, and
`nifti_to_dicom_seg(use_itk=False)`, which writes one. This app calls neither: `progidiff.dicomweb` has `segmentation`,
which reads, and `segmentation_writer`. Should the true package be installed as well, it is imported in place of this
file, and the host no longer starts.
"""

from __future__ import annotations

from typing import Any

from progidiff.errors import ProGiDiffError


def __getattr__(name: str) -> Any:
    """Refuse what the true package offers; names with underscores are Python's own questions.

    Raises:
        AttributeError: if the name begins with an underscore.
        ProGiDiffError: for every other name.
    """
    if name.startswith("_"):
        raise AttributeError(f"module 'pydicom_seg' has no attribute '{name}'")
    raise ProGiDiffError(
        f"MONAI Label asked pydicom-seg for '{name}', and pydicom-seg does not run on today's pydicom: an empty module "
        "stands in its place. Read DICOM segmentations with progidiff.dicomweb.segmentation, or with highdicom."
    )
