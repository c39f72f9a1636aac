"""A picture as the review page shows it: what the model sees in 8 bits, and its brightness as a volume of one slice.

The brightness is what window and level, the threshold brush and the grid of labels go by, so that everything that is
written for slices works on pictures too. Of a grey picture it is the numbers of the file (16 bits of an X-ray can be
windowed), of one in colour the luma of ITU-R BT.601.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.images.formats import strip_suffix
from progidiff.images.pictures import PICTURE, PICTURE_AFFINE, read_pixels
from progidiff.images.reading import read_grid
from progidiff.images.volume import Volume

MOST_PIXELS = 1 << 24
"""Largest picture that a browser is asked to draw: 4096 x 4096 pixels."""

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class PictureView:
    """A picture that was read.

    Attributes:
        volume: Its brightness, shape (W, H, 1), on the grid of its labels.
        pixels: What the model sees, uint8 (H, W, 3).
        notes: What was done to get there, one sentence each; empty for plain RGB.
    """

    volume: Volume
    pixels: NDArray[np.uint8]
    notes: tuple[str, ...]

    @cached_property
    def is_coloured(self) -> bool:
        """Whether its channels differ anywhere."""
        return bool((self.pixels != self.pixels[..., :1]).any())

    @cached_property
    def png(self) -> bytes:
        """`pixels` as a file."""
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(self.pixels).save(file, format="PNG", compress_level=1)
        return file.getvalue()


def open_view(path: Path) -> PictureView:
    """Read a picture.

    Raises:
        NotFoundError, ImageError: if it is none, damaged, or larger than `MOST_PIXELS`.
    """
    from progidiff.textdiff.pictures import to_picture

    width, height, _ = read_grid(path).shape
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"'{path.name}' has {width} x {height} pixels, more than a browser can draw quickly ({MOST_PIXELS:,}). Cut "
            "it into smaller pictures, or label it in another program and save the label here."
        )
    array, notes = read_pixels(path)
    picture = to_picture(array, path.name)
    pixels = np.ascontiguousarray(picture.pixels.numpy().transpose(1, 2, 0))
    volume = Volume(
        array=np.ascontiguousarray(_find_brightness(array, pixels).T[:, :, None]),
        affine=PICTURE_AFFINE.copy(),
        modality=PICTURE,
        modality_source="file",
        name=strip_suffix(path),
    )
    return PictureView(volume, pixels, (*notes, *picture.notes))


def _find_brightness(array: NDArray[np.generic], pixels: NDArray[np.uint8]) -> NDArray[np.generic]:
    if array.ndim == 2 and array.dtype != np.bool_:
        return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
    brightness: NDArray[np.generic] = np.rint(pixels @ np.array(_LUMA)).astype(np.uint8)
    return brightness
