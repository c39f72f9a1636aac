"""Intensities in 16 bits.

Whole numbers that fit are kept as they are, so Hounsfield units survive. Everything else is scaled onto 65 536 steps
over its range; the largest error is half a step, `Rescale.slope` / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEPS = 65535


@dataclass(frozen=True)
class Rescale:
    """How stored numbers become intensities: stored * slope + intercept.

    Attributes:
        slope: Intensity of one step; has at most 16 characters, as DICOM wants it.
        intercept: Intensity of a stored 0; the same.
        signed: Whether the stored numbers are int16; else uint16.
    """

    slope: float
    intercept: float
    signed: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored numbers, little endian."""
        return np.dtype("<i2" if self.signed else "<u2")

    @property
    def is_exact(self) -> bool:
        """Whether stored numbers are the intensities themselves."""
        return self.slope == 1.0 and self.intercept == 0.0

    @classmethod
    def of(cls, array: NDArray[Any]) -> Rescale:
        """What keeps the most of an array.

        Example:
            >>> Rescale.of(np.array([-1024, 3071]))
            Rescale(slope=1.0, intercept=0.0, signed=True)
            >>> Rescale.of(np.array([0.0, 0.5, 1.0])).slope
            1.52590219e-05
        """
        low, high = float(array.min()), float(array.max())
        whole = np.issubdtype(array.dtype, np.integer) or all(np.array_equal(part, np.rint(part)) for part in array)
        if whole and low >= -32768 and high <= 32767:
            return cls(1.0, 0.0, True)
        if whole and low >= 0 and high <= _STEPS:
            return cls(1.0, 0.0, False)
        # Rounded outwards: what the header says is then exactly what was used.
        intercept = _round_down(low)
        slope = -_round_down(-(high - intercept) / _STEPS)
        return cls(slope if slope > 0 else 1.0, intercept, False)

    def store(self, array: NDArray[Any]) -> NDArray[Any]:
        """Intensities -> stored numbers, the nearest ones."""
        if self.is_exact:
            return array.astype(self.dtype)
        steps: NDArray[Any] = np.rint((array.astype(np.float64) - self.intercept) / self.slope)
        return steps.clip(0, _STEPS).astype(self.dtype)

    def read(self, stored: NDArray[Any]) -> NDArray[Any]:
        """Stored numbers -> intensities, float64."""
        return stored.astype(np.float64) * self.slope + self.intercept


def _round_down(value: float) -> float:
    """The next number below with ten significant digits, which are the 16 characters of a decimal string in DICOM."""
    rounded = float(f"{value:.9e}")
    if rounded <= value:
        return rounded
    return float(f"{value - 10.0 ** (math.floor(math.log10(abs(value))) - 9):.9e}")


def to_gray(stored: NDArray[Any], rescale: Rescale, center: float, width: float) -> NDArray[Any]:
    """A slice through a window as 8-bit gray, for pictures; the shape of `stored`."""
    values = rescale.read(stored)
    return np.clip((values - (center - width / 2)) / max(width, 1e-12) * 255, 0, 255).astype(np.uint8)
