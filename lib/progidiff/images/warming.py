"""Use every reader once, in a process that will soon not be able to open a library any more."""

from __future__ import annotations

import codecs
import contextlib
import shutil
from pathlib import Path

import numpy as np

from progidiff.errors import ProGiDiffError
from progidiff.images.archives import extract_archive
from progidiff.images.formats import FORMATS
from progidiff.images.geometry import Grid
from progidiff.images.reading import load_label, load_volume, read_grid


def warm_up(folder: Path) -> None:
    """Write and read a small file of every format.

    Args:
        folder: Empty; files stay in it.
    """
    from PIL import Image
    from pydicom.charset import python_encoding

    for name in ("cp437", "utf-8", "utf-16", "utf-32", "latin-1", "ascii", "idna", *python_encoding.values()):
        with contextlib.suppress(LookupError):
            codecs.lookup(name)
    voxels = np.arange(24, dtype=np.int16).reshape(4, 3, 2)
    for row in FORMATS:
        if row.write is not None:
            path = folder / f"warm{row.suffix}"
            array = voxels if row.kind == "volume" else voxels[:, :, :1].astype(np.uint8)
            size_i, size_j, size_k = array.shape
            row.write(array, Grid((size_i, size_j, size_k), np.diag([1.0, 1.0, 1.0, 1.0])), path)
            _read(path)
    for suffix in (".jpg", ".tif"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"warm{suffix}")
        _read(folder / f"warm{suffix}")
    _write_series(folder / "series")
    _read(folder / "series")
    for kind in ("zip", "tar", "gztar", "bztar", "xztar"):
        target = folder / kind
        target.mkdir()
        extract_archive(Path(shutil.make_archive(str(folder / "warm"), kind, folder / "series")), target)


def touch(folder: Path) -> None:
    """Read the commonest of the files that `warm_up` has left: what of the decoders is shared is then at hand."""
    for suffix in (".nii.gz", ".nrrd", ".png"):
        _read(folder / f"warm{suffix}")


def _read(path: Path) -> None:
    for read in (read_grid, load_label, load_volume):
        with contextlib.suppress(ProGiDiffError):
            read(path)


def _write_series(folder: Path) -> None:
    """Two slices."""
    import SimpleITK as sitk

    folder.mkdir()
    for index in range(2):
        image = sitk.GetImageFromArray(np.arange(16, dtype=np.int16).reshape(1, 4, 4) + index)
        tags = {
            "0008|0060": "CT",
            "0020|000d": "1.2.3",
            "0020|000e": "1.2.3.4",
            "0020|0032": f"0\\0\\{index}",
            "0020|0037": "1\\0\\0\\0\\1\\0",
        }
        for key, value in tags.items():
            image.SetMetaData(key, value)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(folder / f"{index}.dcm"))
        writer.Execute(image)
