"""Scores that no network made."""

from __future__ import annotations

import numpy as np

from progidiff.active_learning.scores import ScoredImage
from progidiff.active_learning.strategies import ImageScores


def make_entry(
    image: str = "a", version: str = "base@1", created: float = 1.0, modality: str = "CT", seed: int = 0
) -> ScoredImage:
    arrays = np.random.default_rng(seed).random((3, 2, 7)).astype(np.float32)
    return ScoredImage(
        ImageScores(image, ("liver", "spleen"), *arrays, slice_mm=5.0, version=version), "f00", modality, created
    )
