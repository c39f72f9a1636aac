"""Anatomy from masks alone: label volumes without images, painted in tones that tell little.

What a gland looks like beside its organ can be learned from outlines that come without a picture. Every window gets
tones by lot, for each structure another and often nearly that of its surroundings, so that evidence and knowledge of
shapes have to decide where the picture does not (as SynthSeg learns from synthetic contrasts, Billot et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from progidiff.errors import RequestError
from progidiff.images.formats import find_kind, strip_suffix
from progidiff.images.reading import load_volume
from progidiff.labels.cases import load_label_names
from progidiff.training.window_pool import PooledVolume, VolumeSource, draw_smooth

LARGEST_ID = 255
"""Label ids are kept in a byte."""


@dataclass
class ShapeSource(VolumeSource):
    """Windows of label volumes without images; their evidence is the truth, worn down."""

    worn_share: float = 1.0

    def take_picture(
        self, stack: NDArray[np.uint8], sample: Callable[[NDArray[np.uint8]], Tensor], rng: np.random.Generator
    ) -> Tensor:
        """Paint label ids; see `VolumeSource.take_picture`."""
        around, contrast = rng.uniform(0.2, 0.8), rng.uniform(0.0, 0.3)
        tones = np.clip(around + contrast * rng.standard_normal(LARGEST_ID + 1), 0, 1)
        tones[0] = around
        flat = sample((tones * 255).round().astype(np.uint8)[stack])
        blurred = gaussian_filter(flat.numpy(), (0, *[rng.uniform(0.3, 1.5)] * 2))
        shading = draw_smooth(rng, rng.uniform(0, 0.1), (len(stack), 6, 6), self.size)
        grain = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.06), blurred.shape)).float()
        return (torch.from_numpy(blurred) + shading + grain).clamp(0, 1)


def load_shapes(folder: Path, structures: Sequence[str]) -> list[PooledVolume]:
    """Label volumes without images.

    Args:
        folder: Label volumes side by side, and labels.json (label id -> structure).
        structures: Names, ids 1.. in this order; others are background, but keep tones of their own.

    Returns:
        Volumes whose "image" are the ids of the folder, for `ShapeSource`.

    Raises:
        RequestError: if there is no label volume, none shows a structure, or one holds what is no label id.
        ImageError: if a file cannot be read.
    """
    names = load_label_names(folder)
    files = [path for path in sorted(folder.iterdir()) if find_kind(path) == "volume"]
    if not files:
        raise RequestError(f"'{folder}' has no label volumes beside its labels.json; name the folder that holds them.")
    volumes = []
    for path in files:
        volume = load_volume(path, modality="CT")
        stack, spacing = volume.to_stack()
        ids = np.rint(stack)
        if ids.min() < 0 or ids.max() > LARGEST_ID or not np.array_equal(ids, stack):
            raise RequestError(
                f"'{path}' holds values that are no label ids of 0..{LARGEST_ID} ({stack.min():g} to {stack.max():g}): "
                "these folders hold labels alone; labelled images are for --also."
            )
        table = np.zeros(LARGEST_ID + 1, np.uint8)
        for value, name in names.items():
            if name in structures and value <= LARGEST_ID:
                table[value] = structures.index(name) + 1
        raw = ids.astype(np.uint8)
        labels = np.ascontiguousarray(table[raw])
        shown = tuple(int(value) for value in np.unique(labels) if value)
        case = strip_suffix(path.name)
        volumes.append(PooledVolume(case, case, np.ascontiguousarray(raw), labels, spacing, shown))
    if not any(volume.known for volume in volumes):
        raise RequestError(
            f"No label volume of '{folder}' shows one of {', '.join(structures)}; check the names in its labels.json."
        )
    return volumes
