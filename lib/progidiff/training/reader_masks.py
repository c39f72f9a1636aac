"""Pictures that several readers outlined, each in their own way: what variety of proposals is learned from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.errors import ImageError
from progidiff.training.window_pool import LABEL_LOOKS, Jitter, jitter_window, sample_window


@dataclass(frozen=True)
class ReaderMasks:
    """Crops around one finding each.

    Attributes:
        images: uint8 (N, Y, X).
        masks: uint8 (N, R, Y, X / 8), packed bits; a reader who drew nothing has an empty mask.
        patients: (N,) who it is of: crops of one patient stay on one side of a split.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    patients: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.images)

    def unpack(self, index: int) -> NDArray[np.uint8]:
        """(R, Y, X) of 0 and 1."""
        return np.unpackbits(self.masks[index], axis=-1)

    def pick(self, chosen: NDArray[np.bool_]) -> ReaderMasks:
        """Some of them."""
        return ReaderMasks(self.images[chosen], self.masks[chosen], self.patients[chosen])


def load_reader_masks(path: Path) -> ReaderMasks:
    """Read `images`, `masks_packed` and `key` (patient, finding, slice) of an npz file.

    Raises:
        ImageError: if it cannot be read or its parts do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            images, masks, key = file["images"], file["masks_packed"], file["key"]
    except (OSError, KeyError, ValueError) as err:
        raise ImageError(f"'{path}' cannot be read as images with readers' masks ({err}).") from err
    if (
        masks.ndim != 4
        or len(images) != len(masks)
        or masks.shape[-1] * 8 != images.shape[-1]
        or len(key) != len(images)
    ):
        raise ImageError(f"'{path}' is inconsistent: images {images.shape}, masks {masks.shape}, key {key.shape}.")
    return ReaderMasks(images, masks, key[:, 0].astype(str))


def split_patients(patients: NDArray[np.str_], shares: Sequence[float], seed: int = 0) -> list[NDArray[np.bool_]]:
    """Which crops belong to each part of a split by patient.

    Args:
        patients: (N,).
        shares: Of the patients, in the order of the parts; they add up to 1.
        seed: Of the order.
    """
    names = np.unique(patients)
    np.random.default_rng(seed).shuffle(names)
    ends = np.round(np.cumsum(shares) * len(names)).astype(int)
    return [np.isin(patients, part) for part in np.split(names, ends[:-1])]


@dataclass
class ReaderSource:
    """Windows from readers' masks, for `WindowPool`.

    Attributes:
        masks: What is drawn from.
        label: Its id, for the prompt.
        pixel_mm: Size of its pixels.
        size: Pixels of a window.
        shown_mm: Size of these; None for that of the crops.
        num_neighbours, evidence_neighbours: Slices on each side; a crop has none, so its only slice is repeated.
        jitter: How windows are off the middle.
    """

    masks: ReaderMasks
    label: int
    pixel_mm: float = 0.7
    size: int = 96
    num_neighbours: int = 2
    evidence_neighbours: int = 1
    jitter: Jitter = field(default_factory=Jitter)
    shown_mm: float | None = None

    def look(self, rng: np.random.Generator) -> dict[str, Any]:
        """One crop, warped, with all its readers."""
        index = int(rng.integers(len(self.masks)))
        image = self.masks.images[index]
        middle = (image.shape[0] / 2 * self.pixel_mm, image.shape[1] / 2 * self.pixel_mm)
        center, axes = jitter_window(middle, self.shown_mm or self.pixel_mm, self.size, self.size, self.jitter, rng)
        bend, plane = torch.zeros(2, self.size, self.size), (self.pixel_mm, self.pixel_mm)
        shown = sample_window(image[None], center, axes, bend, self.size, plane, 1, padding="border")[0] / 255
        truth = sample_window(
            self.masks.unpack(index), center, axes, bend, self.size, plane, LABEL_LOOKS, mode="nearest"
        )
        return {
            "images": shown.expand(2 * self.num_neighbours + 1, -1, -1),
            "evidence": torch.zeros(2 * self.evidence_neighbours + 1, self.size, self.size),
            "is_found": 0.0,
            "truth": truth,
            "neighbour": torch.zeros(self.size, self.size),
            "neighbour_mm": 0.0,
            "label": self.label,
            "spacing": (float(axes.norm(dim=0).mean()), 3.0),
        }
