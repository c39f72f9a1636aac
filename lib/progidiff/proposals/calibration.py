"""From the proposals' mean to a probability: how often voxels like this one belong to the structure.

Proposals of a confident network agree and are wrong together, so that their mean is no probability. On cases that
neither network saw, the share of structure voxels is counted for every value of the mean; the nearest rising curve
through these shares (isotonic regression, Zadrozny and Elkan 2002) turns means into probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from progidiff.errors import ModelError

BINS = 256
"""Values of the mean that are told apart, those of uint8."""
LEAST = 5
"""Means below it (2 %) are background that nobody asks about; they are left out of the error."""


@dataclass(frozen=True)
class Reliability:
    """What was counted: voxels of every mean, and those of them that are in the structure.

    Attributes:
        count: (256,) voxels.
        positive: (256,) of them inside.
    """

    count: NDArray[np.int64]
    positive: NDArray[np.int64]

    @classmethod
    def tally(cls, mean: NDArray[np.uint8], truth: NDArray[np.bool_]) -> Reliability:
        """Count the voxels of maps of any shape.

        Args:
            mean: Of the proposals' probabilities, 0..255.
            truth: Of the same shape.
        """
        return cls(np.bincount(mean.ravel(), minlength=BINS), np.bincount(mean[truth], minlength=BINS))

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.count + other.count, self.positive + other.positive)

    def compute_error(self, calibration: Calibration | None = None, num_bins: int = 15) -> float:
        """Expected calibration error: mean |predicted - observed share| over bins of equal width, weighted by voxels,
        over the means of at least 2 % (Guo et al. 2017, equation 3).

        Args:
            calibration: What turns means into probabilities; None for the means themselves.
            num_bins: Of [0, 1].
        """
        values = np.arange(BINS) / (BINS - 1)
        predicted = values if calibration is None else calibration.apply(values)
        kept = np.arange(BINS) >= LEAST
        bins = np.minimum((predicted[kept] * num_bins).astype(int), num_bins - 1)
        count, positive = self.count[kept], self.positive[kept]
        expected = np.bincount(bins, predicted[kept] * count, num_bins)
        observed = np.bincount(bins, positive, num_bins)
        return float(np.abs(expected - observed).sum() / max(1, count.sum()))


@dataclass(frozen=True)
class Calibration:
    """A rising curve from means to probabilities, linear between its knots.

    Attributes:
        means: Rising, from 0 to 1.
        probabilities: Of the same length, never falling, in [0, 1].
    """

    means: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        means, probabilities = np.asarray(self.means), np.asarray(self.probabilities)
        if (
            len(means) != len(probabilities)
            or len(means) < 2
            or (np.diff(means) <= 0).any()
            or (np.diff(probabilities) < 0).any()
            or not (means[0] == 0 and means[-1] == 1 and probabilities[0] >= 0 and probabilities[-1] <= 1)
        ):
            raise ModelError(
                "A calibration needs rising means from 0 to 1 and as many probabilities that never fall, in [0, 1]."
            )

    @classmethod
    def fit(cls, counted: Reliability, num_knots: int = 33) -> Calibration:
        """The nearest rising curve through what was counted.

        Args:
            counted: On cases that the networks did not see.
            num_knots: Means that are kept, 0 and 1 among them.

        Raises:
            ModelError: if nothing was counted.
        """
        if not counted.count.sum():
            raise ModelError("A calibration needs voxels; count some cases first.")
        seen = counted.count > 0
        shares = counted.positive[seen] / counted.count[seen]
        rising = isotonic_regression(shares, weights=counted.count[seen]).x
        values = np.arange(BINS) / (BINS - 1)
        knots = np.linspace(0, 1, num_knots)
        curve = np.interp(knots, values[seen], rising)
        return cls(tuple(knots.tolist()), tuple(np.maximum.accumulate(curve.clip(0, 1)).round(5).tolist()))

    def apply(self, means: ArrayLike) -> NDArray[np.float32]:
        """Probabilities of means in [0, 1], float32 of their shape."""
        return np.interp(np.asarray(means), self.means, self.probabilities).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"means": list(self.means), "probabilities": list(self.probabilities)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        return cls(tuple(map(float, values["means"])), tuple(map(float, values["probabilities"])))
