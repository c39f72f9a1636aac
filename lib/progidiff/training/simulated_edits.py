"""A simulated person: clicks, scribbles, boxes and neighbouring slices, from the truth and a model's errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import skeletonize
from torch import Tensor

from progidiff.images.close_up import compute_fineness
from progidiff.proposals.edit_maps import draw_edit_maps

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class EditHabits:
    """How often a simulated person does what.

    Attributes:
        clicks: Mean number of clicks and scribbles, at least 1; 0 for a person who does none.
        scribbles: Share of strokes among them; the others are clicks.
        frames: Share of windows with a box.
        off_center: Standard deviation of a click from the middle of the wrong piece, in its inner radius.
        smallest: Wrong pieces of fewer pixels are left alone; more of the finer pixels of a large window.
    """

    clicks: float = 2.0
    scribbles: float = 0.25
    frames: float = 0.12
    off_center: float = 0.35
    smallest: int = 4


def find_wrong_piece(truth: Mask, drawn: Mask, smallest: int = 1) -> tuple[Mask, bool] | None:
    """The largest connected piece where a mask is wrong.

    Returns:
        The piece (S, S), and whether it is missing (else it is too much); None if no piece has `smallest` pixels.
    """
    best: tuple[int, Mask, bool] | None = None
    for wrong, is_missing in ((truth & ~drawn, True), (drawn & ~truth, False)):
        numbered, count = ndimage.label(wrong)
        if count:
            sizes = np.bincount(numbered.ravel())[1:]
            largest = int(sizes.argmax())
            if sizes[largest] >= smallest and (best is None or sizes[largest] > best[0]):
                best = (int(sizes[largest]), numbered == largest + 1, is_missing)
    return None if best is None else best[1:]


def place_click(piece: Mask, rng: np.random.Generator | None = None, off_center: float = 0.0) -> tuple[int, int]:
    """The pixel of a piece that is farthest from its edge, or one near it."""
    depth = ndimage.distance_transform_edt(np.pad(piece, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    if rng is None or off_center == 0:
        return int(row), int(column)
    moved = np.array([row, column]) + rng.normal(0, off_center * float(depth.max()), 2)
    near, far = (int(np.clip(round(v), 0, n - 1)) for v, n in zip(moved, piece.shape, strict=True))
    return (near, far) if piece[near, far] else (int(row), int(column))


def simulate_strokes(truth: Mask, drawn: Mask, rng: np.random.Generator, habits: EditHabits) -> tuple[Mask, Mask]:
    """What a person clicks and draws over, wrong piece by wrong piece.

    Returns:
        (S, S) pixels that are said to be inside, and outside.
    """
    wanted, unwanted, left = np.zeros_like(truth), np.zeros_like(truth), drawn.copy()
    count = 1 + int(rng.poisson(max(0.0, habits.clicks - 1))) if habits.clicks > 0 else 0
    smallest = round(habits.smallest * compute_fineness(len(truth)) ** 2)
    for _ in range(count):
        found = find_wrong_piece(truth, left, smallest)
        if found is None:
            break
        piece, is_missing = found
        into = wanted if is_missing else unwanted
        if rng.random() < habits.scribbles:
            into |= skeletonize(piece)
        else:
            into[place_click(piece, rng, habits.off_center)] = True
        # Looked after: the next click goes elsewhere.
        left = (left | piece) if is_missing else (left & ~piece)
    return wanted, unwanted


def simulate_frame(truth: Mask, rng: np.random.Generator, loose: float = 0.1) -> Mask | None:
    """The inside of a box around the truth, drawn a little too large or too small; None if there is nothing."""
    if not truth.any():
        return None
    frame = np.zeros_like(truth)
    spans = []
    for axis in (0, 1):
        places = np.flatnonzero(truth.any(axis=1 - axis))
        low, high = int(places[0]), int(places[-1]) + 1
        slack = 1 + loose * (high - low)
        moved = [round(low - rng.uniform(-0.3, 1) * slack), round(high + rng.uniform(-0.3, 1) * slack)]
        spans.append(slice(max(0, moved[0]), max(1, moved[1])))
    frame[spans[0], spans[1]] = True
    return frame


def simulate_edits(
    truth: Mask,
    drawn: Mask,
    rng: np.random.Generator,
    habits: EditHabits | None = None,
    neighbour: Tensor | None = None,
    neighbour_mm: float = 0.0,
) -> Tensor:
    """The edit maps of a window, see `draw_edit_maps`.

    Args:
        truth: (S, S) what is right.
        drawn: (S, S) what the person sees.
        rng: Source of randomness.
        habits: How often what is done.
        neighbour: (S, S) mask of an accepted slice; None for none.
        neighbour_mm: Its distance.
    """
    habits = habits or EditHabits()
    wanted, unwanted = simulate_strokes(truth, drawn, rng, habits)
    frame = simulate_frame(truth, rng) if rng.random() < habits.frames else None
    return draw_edit_maps(len(truth), wanted, unwanted, frame, neighbour, neighbour_mm)
