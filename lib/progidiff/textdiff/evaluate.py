"""Dice and IoU per image at the label's own resolution, with the controls that a claim about text needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from progidiff.textdiff.data import Case
from progidiff.textdiff.model import TextDiffModel

Control = Literal["none", "empty", "shuffled", "no-text"]
CONTROLS: tuple[Control, ...] = ("none", "empty", "shuffled", "no-text")


def evaluate(
    model: TextDiffModel,
    cases: Sequence[Case],
    control: Control = "none",
    *,
    draws: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Measure a model on labelled pictures.

    Args:
        model: What answers.
        cases: With labels.
        control: "none": each image with its own sentence; "empty": without one; "shuffled": with the sentence of another image that
            says something else where there is one (a derangement); "no-text": the text's contribution left out of the network.
        draws: Noises to average over; None for the model's.
        seed: Of the shuffling.
        on_progress: (images done, images in all).
        is_cancelled: Asked before every image.

    Returns:
        {"summary": {"dice", "iou", "images", "per_class"}, "images": [{"name", "dice", "iou", "sentence", "empty_label"}], "control",
        "model", "settings", "notes"}. An image whose label and answer are both empty counts 1; empty label and non-empty answer 0.

    Raises:
        RequestError: if there is no labelled case, or "shuffled" has fewer than two sentences.
    """
    raise NotImplementedError


def compute_scores(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Dice and IoU of two binary masks; 1 where both are empty."""
    raise NotImplementedError


def shuffle_sentences(sentences: Sequence[str | None], seed: int = 0) -> list[str | None]:
    """A derangement: every image gets another one's sentence, one with other words where that is possible.

    Raises:
        RequestError: if there are fewer than two sentences.
    """
    raise NotImplementedError
