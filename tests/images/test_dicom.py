"""DICOM series whose slices differ in how they store intensities, against the numbers that each file states itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from progidiff.images.reading import load_volume
from support.images import write_slice

SHAPE = (5, 24, 20)
"""Slices, rows, columns."""


@pytest.mark.parametrize("modality", ["PT", "MR", "CT"])
@pytest.mark.parametrize(
    ("slopes", "intercepts", "types"),
    [
        ((1, 0.37, 2.0913, 0.00051, 7), (0,) * 5, "HHHHH"),
        ((1, 1, 1, 1, 1), (0, -0.5, 3, 1000, -1024), "HHHHH"),
        ((1, 1, 1, 1, 1), (0,) * 5, "BHhHB"),
        ((2, 1, 3, 1, 1), (-1024, 0, 70_000, 5, -5), "hHBhH"),
        ((0.25, 1, 1, 1, 1.5), (0, 0, -1024, 0, 0), "HhHBH"),
    ],
    ids=["slopes", "intercepts", "types", "whole numbers", "mixed"],
)
def test_every_slice_has_its_own_slope_intercept_and_type(
    tmp_path: Path, modality: str, slopes: tuple[float, ...], intercepts: tuple[float, ...], types: str
) -> None:
    random = np.random.default_rng(3)
    for z, kind in enumerate(types):
        limits = np.iinfo(kind)
        stored = random.integers(limits.min, limits.max, SHAPE[1:], dtype=np.dtype(kind), endpoint=True)
        write_slice(tmp_path / "series" / f"{z}.dcm", z, stored, modality, slopes[z], intercepts[z])
    volume = load_volume(tmp_path / "series", "MR")
    stack, _ = volume.to_stack()
    for z, slope in enumerate(slopes):
        file: Any = pydicom.dcmread(tmp_path / "series" / f"{z}.dcm")
        wanted = file.pixel_array.astype(np.float64) * float(file.RescaleSlope) + float(file.RescaleIntercept)
        assert np.abs(stack[z] - wanted).max() < slope, (z, volume.array.dtype)
        assert len(np.unique(stack[z])) == len(np.unique(file.pixel_array))
