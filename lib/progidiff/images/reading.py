"""Reading images and label maps: the three entry points, for every format of the table."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, NotFoundError, ProGiDiffError
from progidiff.images import dicom
from progidiff.images.decoding import apart, is_apart
from progidiff.images.formats import find_format, is_picture, strip_suffix
from progidiff.images.geometry import Grid, times
from progidiff.images.intensities import guess_modality
from progidiff.images.known_files import KnownFiles
from progidiff.images.modality import check_modality
from progidiff.images.raw import Place, Raw, check_affine, check_extent, check_voxels, squeeze
from progidiff.images.sidecars import find_stated_modality
from progidiff.images.text_headers import DETACHED_SUFFIXES, detached_data, is_detached_allowed, read_header
from progidiff.images.volume import Volume
from progidiff.storage.atomic import check_regular

DECODED_PER_VOXEL = 16
"""Bytes of a label file per voxel of its image, at most: eight bytes a number, or layers of fewer. Empty labels pack to
a thousandth, so that it is the image which says what is too much.
"""

_grids: KnownFiles[Grid] = KnownFiles()


def load_volume(
    path: str | os.PathLike[str],
    modality: str | None = None,
    info: Mapping[str, Any] | None = None,
    detached: bool | None = None,
) -> Volume:
    """Read an image: NIfTI, NRRD, MetaImage, a folder with one DICOM series, or one file of such a series.

    The modality is the `modality` argument if given, else the DICOM tag (of the file, or "Modality" in `info`), else
    the entry "modality" of `info` or of the file `<name>.json` next to the image, else a guess from the intensities.

    Args:
        path: File or folder.
        modality: "CT" or "MR" (any case); None, "" or "auto" to find out.
        info: What a datastore knows about the image.
        detached: Whether the voxels of a .nhdr or .mhd may lie in a file beside it; None for what the server was
            started with.

    Raises:
        NotFoundError: if there is no such path.
        RequestError: if `modality` is none that is known.
        ImageError: if it is no three-dimensional image, is empty, constant, or holds values that are not finite.
    """
    path = Path(path)
    option = check_modality(modality, "Option modality")
    if is_picture(path):
        raise ImageError(
            f"'{path.name}' is a picture, and structures are found in CT and MR volumes. Ask the model textdiff for it."
        )
    with detached_data(detached):
        raw = apart(_read, reads=_list_files(path))(path, is_detached_allowed())
    return _build_volume(raw, path, option, info)


def load_series(files: Sequence[Path], name: str, modality: str | None = None) -> Volume:
    """Read the files of one DICOM series, which may lie in several folders.

    Args:
        files: All of them, in any order.
        name: What to call the image.
        modality: As for `load_volume`.

    Raises:
        ImageError: if they are no complete stack of slices, or cannot be read.
    """
    files = [file.resolve() for file in files]  # Another process stands in another folder.
    path = files[0].parent / name
    raw = apart(_read_series, reads=sorted({file.parent for file in files}))([str(file) for file in files], path)
    return _build_volume(raw, path, check_modality(modality, "Option modality"), None)


def _read_series(files: list[str], path: Path) -> Raw:
    """`load_series`, where it is read."""
    try:
        for file in files:
            check_regular(file)
        raw = dicom.read_series_files(files, path)
    except ProGiDiffError:
        raise
    except Exception as err:  # As in `_read`.
        raise _unreadable(path, err) from err
    return replace(raw, array=squeeze(raw.array, path), affine=np.asarray(raw.affine, dtype=np.float64))


def _build_volume(raw: Raw, path: Path, option: str | None, info: Mapping[str, Any] | None) -> Volume:
    """Voxels as read, checked, with their modality."""
    array = check_voxels(raw.array, path)
    grid = _make_grid(array.shape, raw, path)
    if min(grid.stack_shape[1:]) < 2:
        raise ImageError(
            f"'{path.name}' is a single sagittal or coronal slice ({times(array.shape)} "
            "voxels), and structures are found on axial slices; send the whole volume."
        )
    if array.min() == array.max():
        raise ImageError(
            f"All voxels of '{path.name}' have the value {array.flat[0]}; there is "
            "nothing to see in it. Check the export."
        )
    found, source = _find_modality(option, raw, path, info, array)
    return Volume(
        array=array, affine=grid.affine, modality=found, modality_source=source, name=grid.name, header=raw.header
    )


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Where the voxels of an image lie, from its header alone where the format has one, as `load_volume` gives it.

    Raises:
        NotFoundError: if there is no such path.
        ImageError: if it is no three-dimensional image.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    row = None if path.is_dir() else find_format(path)
    if row is None or row.read_place is None:
        return load_volume(path).grid
    read = partial(apart(_read_grid, reads=_list_files(path)), path, is_detached_allowed())
    try:
        return _grids.find(path, read) if is_apart() else read()
    except OSError as err:
        raise _unreadable(path, err) from err


def _read_grid(path: Path, detached: bool) -> Grid:
    """`read_grid`, of a format whose header tells."""
    row = find_format(path)
    assert row is not None
    assert row.read_place is not None
    try:
        check_regular(path)
        with detached_data(detached):
            place = row.read_place(path)
    except ProGiDiffError:
        raise
    except Exception as err:  # Whatever a reader raises on bytes that somebody sent, the file is at fault.
        raise _unreadable(path, err) from err
    shape = place.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]) or min(shape) < 1:
        raise ImageError(f"'{path.name}' has {times(shape)} voxels; a single volume of slices is needed.")
    return _make_grid(shape[:3], place, path)


def load_label(path: str | os.PathLike[str], like: Grid | None = None) -> NDArray[Any]:
    """Read a label map.

    Args:
        path: NIfTI, NRRD or MetaImage file, or the label of a picture as PNG or TIFF.
        like: The grid of its image, which it must share.

    Returns:
        Label ids, shape (I, J, K) in file order, in the smallest unsigned integer type that holds them.

    Raises:
        NotFoundError: if there is no such path.
        ImageError: if it is no three-dimensional image of whole, non-negative numbers.
        GeometryError: if its grid is not that of `like`.
    """
    path = Path(path)
    decoded = 0 if like is None else DECODED_PER_VOXEL * math.prod(like.shape)
    return apart(_load_label, reads=_list_files(path), decoded=decoded)(path, like, is_detached_allowed())


def _load_label(path: Path, like: Grid | None, detached: bool) -> NDArray[Any]:
    raw = _read(path, detached)
    array = raw.array
    if np.issubdtype(array.dtype, np.floating) and not np.array_equal(array, np.rint(array)):
        raise ImageError(
            f"'{path.name}' holds fractions or values that are not numbers, so it is no "
            "label map; save it with whole numbers."
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high > np.iinfo(np.uint32).max:
        raise ImageError(f"'{path.name}' holds the values {low} to {high}; label ids are whole numbers from 0.")
    if like is not None:
        size_i, size_j, size_k = array.shape
        like.check_same(Grid((size_i, size_j, size_k), raw.affine, path.name, raw.header))
    return array.astype(np.min_scalar_type(high), copy=False)


def _make_grid(shape: tuple[int, ...], read: Place | Raw, path: Path) -> Grid:
    size_i, size_j, size_k = (int(size) for size in shape)
    if not is_picture(path):
        check_extent(check_affine(read.affine, path), shape, path)
    return Grid((size_i, size_j, size_k), check_affine(read.affine, path), strip_suffix(path), read.header)


def _list_files(path: Path) -> list[Path]:
    """The files and folders that reading an image opens.

    Raises:
        NotFoundError: if there is no such image.
        ImageError: if it cannot be looked at.
    """
    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    if not is_apart():
        return []
    try:
        check_regular(path)
        if not path.is_dir() and _find_reader(path) is dicom.read_dicom_file:
            return [path.parent]
        if path.suffix.lower() in DETACHED_SUFFIXES and is_detached_allowed():
            header = read_header(path, layered=True)
            return [path] if header.data is None else [path, path.with_name(header.data)]
    except ProGiDiffError:
        raise
    except Exception as err:  # As below.
        raise _unreadable(path, err) from err
    return [path]


def _read(path: Path, detached: bool) -> Raw:
    """Voxels and affine of a file or DICOM folder, three-dimensional."""
    try:
        check_regular(path)
        with detached_data(detached):
            raw = _find_reader(path)(path)
    except ProGiDiffError:
        raise
    except Exception as err:  # Whatever a reader raises on bytes that somebody sent, the file is at fault.
        raise _unreadable(path, err) from err
    return replace(raw, array=squeeze(raw.array, path), affine=np.asarray(raw.affine, dtype=np.float64))


def _find_reader(path: Path) -> Callable[[Path], Raw]:
    if path.is_dir():
        return dicom.read_dicom_folder
    row = find_format(path)
    if row is not None:
        return row.read
    if dicom.is_dicom(path):
        return dicom.read_dicom_file
    raise ImageError(
        f"'{path.name}' is no image format that can be read here; send NIfTI (.nii, .nii.gz), NRRD (.nrrd), "
        "MetaImage (.mha) or a folder with one DICOM series."
    )


def _unreadable(path: Path, err: Exception) -> ImageError:
    reason = _explain(err, path)
    return ImageError(
        f"'{path.name}' cannot be read as an image ({reason}). It may be cut off or of another format; export it again."
    )


def _find_modality(
    option: str | None, raw: Raw, path: Path, info: Mapping[str, Any] | None, array: NDArray[Any]
) -> tuple[str, str]:
    if option is not None:
        return option, "option"
    return find_stated_modality(path, info, raw.modality) or (guess_modality(array), "guessed")


def _explain(err: Exception, path: Path) -> str:
    """What a reader says, without the folder: whoever sent an image need not learn where it lies on the server."""
    text = " ".join(str(err).split())
    for folder in {str(path.parent), str(path.resolve().parent)} - {".", os.sep}:
        text = text.replace(folder + os.sep, "")
    return text[-300:] or type(err).__name__
