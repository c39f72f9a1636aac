"""What a training shows of its validation slices: truth and answer side by side, as TensorBoard's pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from progidiff.prompts.structures import pick_color
from progidiff.training.dice_tally import one_hot
from progidiff.training.slice_cache import SliceCache

COUNT = 4
"""Slices that are shown."""


def pick_telling_slices(cache: SliceCache, count: int = COUNT) -> list[int]:
    """Positions of slices that show many structures, spread evenly over the cache; the same ones at every
    validation.
    """
    shown = np.array([int((cache.pixels[v][z] > 0).sum()) for v, z in cache.index])
    parts = [part for part in np.array_split(np.arange(len(cache)), min(count, len(cache))) if len(part)]
    return [int(part[shown[part].argmax()]) for part in parts]


def draw_answers(cache: SliceCache, answer: Callable[[Tensor], Sequence[Tensor]]) -> dict[str, NDArray[Any]]:
    """Pictures of some slices: the labelled masks, then what `answer` gives.

    Args:
        cache: Validation slices.
        answer: images (N, C, H, W) -> sets of masks, each (N, P, H, W) bool.

    Returns:
        "slices/<case> <axial index>" -> (H, W * (1 + sets), 3) uint8.
    """
    chosen = pick_telling_slices(cache)
    images, labels = cache.read(chosen)
    sets = [one_hot(labels, len(cache.structures)).bool(), *(masks.cpu() for masks in answer(images))]
    pictures = {}
    for n, i in enumerate(chosen):
        v, z = cache.index[i]
        panels = [paint(images[n, images.shape[1] // 2], masks[n], cache.structures) for masks in sets]
        pictures[f"slices/{re.sub(r'[^A-Za-z0-9_.-]', '_', cache.names[v])} {z}"] = np.concatenate(panels, axis=1)
    return pictures


def paint(image: Tensor, masks: Tensor, structures: Sequence[str], strength: float = 0.5) -> NDArray[Any]:
    """A slice with tinted masks.

    Args:
        image: (H, W) in [-1, 1].
        masks: (P, H, W) bool.
        structures: P names; they decide the colours.
        strength: Of the tint, 0 to 1.

    Returns:
        (H, W, 3) uint8.
    """
    picture = ((image.float() + 1) * 127.5).clamp(0, 255)[..., None].expand(-1, -1, 3).clone()
    for p, structure in enumerate(structures):
        color = pick_color(structure, p + 1).removeprefix("#")
        tint = torch.tensor([int(color[i : i + 2], 16) for i in (0, 2, 4)], dtype=torch.float32)
        picture[masks[p]] = (1 - strength) * picture[masks[p]] + strength * tint
    return picture.round().to(torch.uint8).numpy()
