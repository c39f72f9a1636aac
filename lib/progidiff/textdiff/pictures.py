"""2-D pictures in, working resolution and tiles: everything between a file and the first tensor.

What is defined for pictures that are not plain 8-bit RGB (each is said in `Picture.notes`):

* an alpha channel is blended over white, the background of bright-field slides and of paper;
* 16-bit, 32-bit and floating-point values are scaled to 0..255 by the picture's own smallest and largest value;
* grayscale is repeated to three channels (`Picture.gray` says so); of a file with several pages the first one is read;
* a camera's orientation tag is followed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import GeometryError, ImageError, NotFoundError
from progidiff.images.pictures import read_pixels

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """A picture as the network gets it.

    Attributes:
        pixels: (3, H, W) uint8.
        notes: What was done to get there, one sentence each; empty for plain RGB.
        name: For messages.
        gray: It came with one channel.
    """

    pixels: Tensor
    notes: tuple[str, ...] = ()
    name: str = ""
    gray: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    @property
    def is_coloured(self) -> bool:
        """Whether its channels differ anywhere."""
        return bool((self.pixels != self.pixels[:1]).any())


@dataclass(frozen=True)
class Tile:
    """A half-open box of the working picture.

    Attributes:
        top, left, bottom, right: Working pixels.
    """

    top: int
    left: int
    bottom: int
    right: int

    def crop(self, tensor: Tensor) -> Tensor:
        """The part of a (..., H, W) tensor that lies in the box."""
        return tensor[..., self.top : self.bottom, self.left : self.right]

    def place(self, height: int, width: int) -> tuple[float, float, float, float]:
        """Top, left, bottom, right as shares of a picture of this size."""
        return self.top / height, self.left / width, self.bottom / height, self.right / width


def read_picture(path: str | os.PathLike[str]) -> Picture:
    """Read a PNG, JPEG or TIFF.

    Raises:
        ImageError: if it is no picture, damaged or empty.
        TooLargeError: if it has more than `progidiff.images.pictures.MAX_PIXELS`.
    """
    path = Path(path)
    array, notes = _read(path)
    picture = to_picture(array, path.name)
    return replace(picture, notes=(*notes, *picture.notes))


def to_picture(array: NDArray[Any], name: str = "the picture") -> Picture:
    """An array as a picture.

    Args:
        array: (H, W), (H, W, 1) gray; (H, W, 2) gray with alpha; (H, W, 3) RGB; (H, W, 4) RGB with alpha. bool, integer
            or float.
        name: For messages.

    Raises:
        GeometryError: if the shape is none of these.
        ImageError: if it holds values that are not finite.
    """
    array = np.asarray(array)
    notes: list[str] = []
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or 0 in array.shape:
        raise GeometryError(
            f"{name} has shape {tuple(array.shape)}; a picture is (H, W) or (H, W, "
            "channels) with 1 to 4 channels. Send one slice or one page of it."
        )
    alpha = None
    if array.shape[2] in (2, 4):
        array, alpha = array[..., :-1], array[..., -1]
        full = _full_scale(alpha)
        alpha = np.clip(alpha.astype(np.float32) / full, 0, 1)[..., None]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        kind = array.dtype.name
        array, low, high = _scale_range(array, name)
        notes.append(f"The picture is {kind}; its values from {low:g} to {high:g} were scaled to 0..255.")
    if alpha is not None:
        transparent = float((alpha < 1).mean())
        array = np.round(array * alpha + 255 * (1 - alpha)).astype(np.uint8)
        notes.append(f"The alpha channel was blended over white ({transparent:.0%} of the pixels were not opaque).")
    gray = array.shape[2] == 1
    if gray:
        array = np.repeat(array, 3, axis=2)
    return Picture(torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1))), tuple(notes), name, gray)


def read_label(path: str | os.PathLike[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Read a mask as it is stored.

    Returns:
        (H, W) integer values; notes. A colour picture must be gray in colour (all channels equal).

    Raises:
        ImageError: if it is no picture or its channels differ.
    """
    path = Path(path)
    array, notes = _read(path)
    if array.ndim == 3:
        channels = array[..., :-1] if array.shape[2] in (2, 4) else array
        if bool((channels != channels[..., :1]).any()):
            raise ImageError(
                f"The label '{path.name}' is a colour picture; write class numbers (or 0 and 255) as a gray PNG."
            )
        array = channels[..., 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if not np.issubdtype(array.dtype, np.integer):
        whole = np.round(array)
        if not bool(np.isfinite(array).all()) or bool((whole != array).any()):
            raise ImageError(
                f"The label '{path.name}' holds values that are no whole numbers; write class numbers (or 0 and 255)."
            )
        array = whole
    return array.astype(np.int64), tuple(notes)


def compute_working_size(height: int, width: int, scale: float | None, size: int | None) -> tuple[int, int]:
    """Height and width at the working resolution, at least 1 each.

    Args:
        height, width: Of the picture.
        scale: Working pixels per picture pixel; None to fit.
        size: Longest side if `scale` is None.

    Example:
        >>> compute_working_size(1000, 500, 0.5, None), compute_working_size(1000, 500, None, 100)
        ((500, 250), (100, 50))
    """
    factor = scale if scale is not None else (size or max(height, width)) / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def to_working(pixels: Tensor, scale: float | None, size: int | None, tone: Sequence[float] | None = None) -> Tensor:
    """A picture at the working resolution.

    Args:
        pixels: (3, H, W) uint8.
        scale, size: See `compute_working_size`.
        tone: Mean and then standard deviation of each channel that the picture is brought to; None for its own. A
            channel of one value gets the mean.

    Returns:
        (3, h, w) floats, -1..1.
    """
    target = compute_working_size(int(pixels.shape[1]), int(pixels.shape[2]), scale, size)
    working = resize(pixels[None].float(), target)[0].clamp(0, 255) / 127.5 - 1
    if tone is None:
        return working
    mean, std = torch.tensor(tone).view(2, 3, 1, 1)
    found = working.std(dim=(1, 2), correction=0, keepdim=True)
    # Nearly empty pictures must not become noise: contrast is raised four times at most.
    factor = (std / found.clamp_min(1e-3)).clamp_max(4.0)
    result: Tensor = ((working - working.mean(dim=(1, 2), keepdim=True)) * factor + mean).clamp(-1, 1)
    return result


def resize(tensor: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, C, H, W) -> (N, C, *size), bilinear, smoothed where it shrinks."""
    if tuple(tensor.shape[2:]) == tuple(size):
        return tensor
    return F.interpolate(tensor, size=size, mode="bilinear", antialias=True, align_corners=False)


def pad(picture: Tensor, multiple: int, least: int = 1) -> Tensor:
    """Grow a picture at its bottom and right edges, mirroring what is there; a side too short to mirror repeats its
    last pixel.

    Args:
        picture: (..., H, W) floats.
        multiple: Both sides become multiples of it.
        least: And no smaller than this.
    """
    height, width = picture.shape[-2:]
    down, right = (-(-max(side, least) // multiple) * multiple - side for side in (height, width))
    if not down and not right:
        return picture
    mode = "reflect" if down < height and right < width else "replicate"
    flat = picture.reshape(-1, 1, height, width)
    return F.pad(flat, (0, right, 0, down), mode=mode).reshape(*picture.shape[:-2], height + down, width + right)


def list_tiles(height: int, width: int, largest: int, overlap: int) -> list[Tile]:
    """Tiles of nearly equal size that cover a picture.

    Args:
        height, width: Of the working picture.
        largest: Longest side of a tile.
        overlap: Pixels that neighbours share at least.

    Example:
        >>> [(t.left, t.right) for t in list_tiles(10, 500, 300, 32)]
        [(0, 266), (234, 500)]
    """
    return [
        Tile(top, left, bottom, right)
        for top, bottom in _cut(height, largest, overlap)
        for left, right in _cut(width, largest, overlap)
    ]


def compute_blend(tile: Tile, height: int, width: int, overlap: int) -> Tensor:
    """(h, w) weights of a tile's pixels: 1 inside, falling towards those edges that a neighbour overlaps."""

    def ramp(start: int, stop: int, end: int) -> Tensor:
        weight = torch.ones(stop - start)
        rise = (torch.arange(overlap) + 0.5) / overlap if overlap else torch.ones(0)
        rise = rise[: stop - start]
        if start > 0:
            weight[: len(rise)] *= rise
        if stop < end:
            weight[len(weight) - len(rise) :] *= rise.flip(0)
        return weight

    return ramp(tile.top, tile.bottom, height)[:, None] * ramp(tile.left, tile.right, width)[None]


def _cut(length: int, largest: int, overlap: int) -> Iterator[tuple[int, int]]:
    if length <= largest:
        yield 0, length
        return
    count = -(-(length - overlap) // (largest - overlap))
    side = -(-(length + (count - 1) * overlap) // count)
    for k in range(count):
        start = round(k * (length - side) / (count - 1))
        yield start, start + side


def _read(path: Path) -> tuple[NDArray[Any], list[str]]:
    try:
        return read_pixels(path)
    except NotFoundError as err:
        raise ImageError(f"The picture '{path}' does not exist; check its path.") from err


def _full_scale(array: NDArray[Any]) -> float:
    """The value of an opaque pixel."""
    if array.dtype == np.bool_:
        return 1.0
    return float(np.iinfo(array.dtype).max) if np.issubdtype(array.dtype, np.integer) else max(1.0, float(array.max()))


def _scale_range(array: NDArray[Any], name: str) -> tuple[NDArray[Any], float, float]:
    if not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ImageError(f"{name} holds values of type {array.dtype}; a picture has whole or real numbers.")
    values = array.astype(np.float64)
    if not bool(np.isfinite(values).all()):
        raise ImageError(f"{name} holds values that are not finite; replace them before you send it.")
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return np.round(scaled * 255).astype(np.uint8), low, high
