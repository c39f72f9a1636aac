"""Labelled pictures in the layouts people have them in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Case:
    """A picture with what is known of it.

    Attributes:
        name: File name without suffix.
        image: Where it lies.
        label: Its mask; None if there is none.
        sentence: What a report says of it; None if there is none.
    """

    name: str
    image: Path
    label: Path | None = None
    sentence: str | None = None


def find_cases(images: Path, labels: Path | None = None, text: Path | None = None) -> list[Case]:
    """Find pictures, their masks and sentences.

    Layouts, recognised by what is there:

    * ``images/ labels/ text.csv`` (MoNuSeg): give `images` and, if they lie elsewhere, `labels` and `text`;
    * ``Images/ Masks/`` or ``Images/ Ground-truths/mask_<name>.png`` with a table of "Image" and "Description" (QaTa-COVID19);
    * a MONAI Label local datastore: pictures at the top, ``labels/final/``, ``text.csv`` beside them.

    `images` may be the folder of the pictures or the folder above it. Labels are matched by name without suffix, ``mask_`` before it
    or ``_mask`` after it allowed.

    Raises:
        RequestError: if a folder or table does not exist, there are no pictures, no label or sentence matches, or two files claim one name.
    """
    raise NotImplementedError


def pick_cases(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """Cases by name, with or without suffix, in the order of `names`.

    Raises:
        RequestError: naming those there are not.
    """
    raise NotImplementedError


def read_classes(case: Case, size: tuple[int, int], classes: int) -> np.ndarray:
    """The mask of a case as class numbers.

    0 stays background. With one class everything above 0 is it (masks of 0 and 255); with more, values are class numbers.

    Args:
        case: With a label.
        size: (H, W) of its picture.
        classes: Foreground classes.

    Returns:
        (H, W) uint8.

    Raises:
        GeometryError: if picture and mask differ in size.
        ImageError: if the mask cannot be read or holds a number above `classes`.
    """
    raise NotImplementedError
