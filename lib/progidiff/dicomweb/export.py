"""A volume as a folder of DICOM files."""

from __future__ import annotations

import os
from pathlib import Path

from progidiff.dicomweb.frames import Series
from progidiff.errors import RequestError, StoreError
from progidiff.storage.atomic import atomic_folder


def export_series(series: Series, folder: str | os.PathLike[str]) -> list[Path]:
    """Write one DICOM file per slice.

    Args:
        series: Of `Series.of`.
        folder: New, or empty; it appears complete or not at all.

    Returns:
        The files, from the lowest slice up.

    Raises:
        RequestError: if the folder holds anything.
        StoreError: if the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RequestError(
            f"'{folder}' is not empty. Name a new folder: files of another series among "
            "these would make both unreadable."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as scratch:
            names = [f"{index + 1:04d}.dcm" for index in range(series.grid.shape[0])]
            for index, name in enumerate(names):
                series.dataset(index).save_as(scratch / name, enforce_file_format=True)
    except OSError as err:
        raise StoreError(
            f"The DICOM files could not be written to '{folder}' ({err}). Free some space or choose another folder."
        ) from err
    return [folder / name for name in names]
