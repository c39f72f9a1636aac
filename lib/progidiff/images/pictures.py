"""A picture (PNG, JPEG, TIFF) as a volume of one axial slice: its grid, its label maps, and the way back to a file.

Labels, their history and the choice of what comes next are written for volumes. A picture of W x H pixels is one of
shape (W, H, 1) to them, 1 mm wide pixels, row y towards Posterior and column x towards the patient's Left: then slice 0
of the axial stack is the picture as everybody draws it, and a NIfTI or NRRD that 3D Slicer saves for a picture lies on
the same grid. Here are files, sizes and label maps; what a network sees of a picture is made in
`progidiff.textdiff.pictures`.

The size is that of the picture as it is shown: a turn that a camera notes in EXIF is followed. Of a file with several
pages the first counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, NotFoundError, ProGiDiffError, TooLargeError
from progidiff.images.decoding import apart
from progidiff.images.geometry import LPS_TO_RAS, Affine, Grid
from progidiff.images.raw import Place, Raw, check_size
from progidiff.storage.atomic import open_regular

PICTURE_FORMATS = ("PNG", "JPEG", "TIFF")
"""What Pillow may take a picture for. Left alone it goes by the content, and some of its formats start other programs
or name other files.
"""

PICTURE = "picture"
"""What stands where a volume has its modality, "CT" or "MR"."""

PICTURE_AFFINE: Affine = LPS_TO_RAS.copy()
"""Pixel (x, y, 0, 1) -> RAS mm."""

MAX_PIXELS = 16_000 * 16_000
"""Largest picture that is opened; a larger one would not fit into the memory of a usual machine."""

_MASK_VALUE = 255
T = TypeVar("T")
_ORIENTATION_TAG, _FIRST_TURNED = 0x0112, 5


def read_picture_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, int, int], Affine]:
    """The size of a picture from its header, as the table of formats wants it.

    Returns:
        (W, H, 1), and `PICTURE_AFFINE`.

    Raises:
        NotFoundError: if there is no such file.
        ImageError: if it is no picture.
    """
    return _look(_read_picture_grid, path)


def _read_picture_grid(path: Path) -> tuple[tuple[int, int, int], Affine]:
    with open_picture(path) as image:
        width, height = image.size
        # Asked for a note that is not in the header, the library reads all pixels of a PNG.
        has_exif = image.format != "PNG" or "exif" in image.info
        if has_exif and image.getexif().get(_ORIENTATION_TAG, 1) >= _FIRST_TURNED:
            width, height = height, width
    return (int(width), int(height), 1), PICTURE_AFFINE.copy()


def check_picture(path: str | os.PathLike[str]) -> None:
    """Read all of a picture.

    Raises:
        NotFoundError, ImageError: as `read_picture_grid`, and if it is cut off.
    """
    _look(_check_picture, path)


def _check_picture(path: Path) -> None:
    with open_picture(path) as image:
        check_size((image.width, image.height), path, len(image.getbands()))
        image.load()


def read_pixels(path: str | os.PathLike[str]) -> tuple[NDArray[Any], list[str]]:
    """The pixels of a picture as it is shown, of its first page.

    Returns:
        Numbers as stored, shape (H, W) or (H, W, channels) of grey, RGB, or either with alpha; and a sentence for what
        was left out.

    Raises:
        NotFoundError: if there is no such file.
        ImageError: if it is no picture, or damaged.
        TooLargeError: if it has more than `MAX_PIXELS`.
    """
    return _look(_read_pixels, path)


def _read_pixels(path: Path) -> tuple[NDArray[Any], list[str]]:
    from PIL import ImageOps

    notes: list[str] = []
    with open_picture(path) as image:
        check_size((image.width, image.height), path, len(image.getbands()))
        if getattr(image, "n_frames", 1) > 1:
            notes.append(f"The file has {image.n_frames} pages; the first one was read.")
        upright = ImageOps.exif_transpose(image)
        if upright.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "La", "RGBa") or (upright.mode == "1"):
            transparent = "transparency" in upright.info or upright.mode in ("PA", "La", "RGBa")
            upright = upright.convert("RGBA" if transparent else "L" if upright.mode == "1" else "RGB")
        return np.array(upright), notes


def _look(read: Callable[[Path], T], path: str | os.PathLike[str]) -> T:
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    return apart(read, reads=[path])(path)


def read_picture_label(path: str | os.PathLike[str]) -> NDArray[Any]:
    """A label map that was saved as a picture.

    The grey values, or the indices of a palette, are the label ids. Where 0 and 255 are the only values, 255 is read as
    1: so painting programs write the mask of one structure. An alpha channel is dropped.

    Returns:
        Unsigned integers of shape (W, H, 1).

    Raises:
        NotFoundError: if there is no such file.
        ImageError: if it cannot be read, is a JPEG (which changes values), or is in colour.
    """
    path = Path(path)
    with open_picture(path) as image:
        if image.format == "JPEG":
            raise ImageError(f"'{path.name}' cannot hold a label map: the format changes values. Save it as PNG.")
        check_size((image.width, image.height), path, len(image.getbands()))
        mode = image.mode
        array = np.asarray(image)
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.ndim == 3 and mode in ("LA", "PA"):
        array = array[..., 0]
    elif array.ndim == 3:
        if not (array[..., 0] == array[..., 1]).all() or not (array[..., 0] == array[..., 2]).all():
            raise ImageError(
                f"'{path.name}' is in colour, so its values are no label ids. Save the "
                "label map as a grey PNG whose values are the ids."
            )
        array = array[..., 0]
    if array.ndim != 2 or not (np.issubdtype(array.dtype, np.integer) or np.array_equal(array, np.rint(array))):
        raise ImageError(
            f"'{path.name}' holds fractions or several layers, so it is no label map; "
            "save it as a grey PNG with whole numbers."
        )
    if array.min() < 0:
        raise ImageError(f"'{path.name}' holds negative values; label ids are whole numbers from 0.")
    high = int(array.max())
    if high == _MASK_VALUE and not np.any((array != 0) & (array != _MASK_VALUE)):
        array = array == _MASK_VALUE
    return np.ascontiguousarray(array.T[:, :, None].astype(np.min_scalar_type(high), copy=False))


def read_picture_place(path: Path) -> Place:
    """`read_picture_grid`, as the table of formats wants it."""
    return Place(*_read_picture_grid(path))


def read_picture_map(path: Path) -> Raw:
    """`read_picture_label`, as the table of formats wants it."""
    return Raw(read_picture_label(path), PICTURE_AFFINE.copy())


def write_picture_map(array: NDArray[Any], grid: Grid, path: Path) -> None:
    """`write_picture_label`, as the table of formats wants it: a picture keeps no affine."""
    write_picture_label(array, path)


def write_picture_label(array: NDArray[Any], path: str | os.PathLike[str]) -> None:
    """Write a label map as a grey PNG, 8 bits if its ids fit, else 16.

    Args:
        array: Whole numbers from 0, shape (W, H, 1).
        path: Ends in .png; overwritten.

    Raises:
        ImageError: if the map has several slices, or values that a PNG does not take.
    """
    from PIL import Image

    if array.ndim != 3 or array.shape[2] != 1:
        raise ImageError(f"A label map of {array.shape[-1]} slices does not fit into a PNG; write it as .nii.gz.")
    if np.issubdtype(array.dtype, np.floating) or array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise ImageError("A PNG takes whole numbers from 0 to 65535; write this map as .nii.gz.")
    Image.fromarray(
        np.ascontiguousarray(array[:, :, 0].T).astype(np.uint8 if array.max() <= _MASK_VALUE else np.uint16)
    ).save(path, format="PNG")


@contextmanager
def open_picture(path: Path) -> Iterator[Any]:
    """A picture file as Pillow opens it, its pixels not yet read.

    Raises:
        NotFoundError: if there is no such file.
        ImageError: if it is no picture, or what is done with it finds it damaged.
        TooLargeError: if it has more than `MAX_PIXELS`.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        raise NotFoundError(f"There is no image at '{path}'. Check the path.")
    try:
        with open_regular(path) as file, Image.open(file, formats=PICTURE_FORMATS) as image:
            # The limit of the library only warns at first; ours is checked before a pixel is read.
            if image.width * image.height > MAX_PIXELS:
                raise TooLargeError(
                    f"'{path.name}' has {image.width} x {image.height} pixels; cut it "
                    f"into pictures of at most {MAX_PIXELS:,} pixels."
                )
            yield image
    except ProGiDiffError:
        raise
    except Exception as err:  # Whatever the decoders raise on bytes that somebody sent, the file is at fault.
        # Of what it does not know, the library tells how the file was opened.
        said = "its content is another" if isinstance(err, UnidentifiedImageError) else str(err)
        reason = " ".join(said.replace(str(path.parent) + os.sep, "").split())[-200:] or type(err).__name__
        raise ImageError(
            f"'{path.name}' cannot be read as a picture ({reason}); PNG, JPEG and TIFF can. It may be cut off or of "
            "another format; export it again."
        ) from err
