"""From agreement to a probability: how often voxels that this share of the proposals draws belong to the structure.

Proposals of a confident network agree and are wrong together, so that their agreement is no probability. On cases that
no network saw, the voxels inside the structure are counted for every agreement; the nearest rising curve through what
was counted (isotonic regression, Zadrozny and Elkan 2002) turns agreement into a probability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from progidiff.errors import ModelError

BINS = 256
"""Values of the agreement that are told apart, those of uint8."""


@dataclass(frozen=True)
class Reliability:
    """What was counted: voxels of every agreement, and those of them that are in the structure.

    Attributes:
        count: (256,) voxels.
        positive: (256,) of them inside.
    """

    count: NDArray[np.int64]
    positive: NDArray[np.int64]

    @classmethod
    def tally(cls, drawn: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Reliability:
        """Count the voxels of a picture.

        Args:
            drawn: (K, ...) proposals.
            truth: (...).
        """
        agreement = np.rint(drawn.mean(0) * (BINS - 1)).astype(np.uint8)
        return cls(np.bincount(agreement.ravel(), minlength=BINS), np.bincount(agreement[truth], minlength=BINS))

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.count + other.count, self.positive + other.positive)

    def compute_error(self, calibration: Calibration | None = None, num_bins: int = 15) -> float:
        """Expected calibration error: mean |predicted - observed| over bins of equal width, weighted by voxels (Guo et
        al. 2017, equation 3). Voxels that no proposal draws are left out: there are so many that they would hide any
        error.

        Args:
            calibration: What turns agreement into a probability; None for the agreement itself.
            num_bins: Of [0, 1].
        """
        return compute_error(self.bin(calibration, num_bins))

    def bin(self, calibration: Calibration | None = None, num_bins: int = 15) -> NDArray[np.float64]:
        """Voxels that any proposal draws, by predicted probability: (3, num_bins) of predicted and observed positives,
        and voxels. Those of several cases, each after a curve of its own, add up.
        """
        values = np.arange(BINS) / (BINS - 1)
        predicted = values if calibration is None else calibration.apply(values)
        kept = np.arange(BINS) > 0
        bins = np.minimum((predicted[kept] * num_bins).astype(int), num_bins - 1)
        count, positive = self.count[kept], self.positive[kept]
        parts = (predicted[kept] * count, positive, count)
        return np.stack([np.bincount(bins, part, num_bins) for part in parts])


def compute_error(binned: NDArray[np.float64]) -> float:
    """Expected calibration error of what `Reliability.bin` gave, or of a sum of it."""
    expected, observed, count = binned
    return float(np.abs(expected - observed).sum() / max(1, count.sum()))


@dataclass(frozen=True)
class Calibration:
    """A rising curve from agreement to probability, linear between its knots.

    Attributes:
        agreements: Rising, from 0 to 1.
        probabilities: Of the same length, never falling, in [0, 1].
    """

    agreements: tuple[float, ...]
    probabilities: tuple[float, ...]

    def __post_init__(self) -> None:
        agreements, probabilities = np.asarray(self.agreements), np.asarray(self.probabilities)
        if (
            len(agreements) != len(probabilities)
            or len(agreements) < 2
            or (np.diff(agreements) <= 0).any()
            or (np.diff(probabilities) < 0).any()
            or not (agreements[0] == 0 and agreements[-1] == 1 and probabilities[0] >= 0 and probabilities[-1] <= 1)
        ):
            raise ModelError(
                "A calibration needs rising agreements from 0 to 1 and as many probabilities in [0, 1] that never fall."
            )

    @classmethod
    def fit(cls, counted: Reliability, num_knots: int = 33) -> Calibration:
        """The nearest rising curve through what was counted.

        Args:
            counted: On cases that the networks did not see.
            num_knots: Agreements that are kept, 0 and 1 among them.

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

    def apply(self, agreement: ArrayLike) -> NDArray[np.float32]:
        """Probabilities of agreements in [0, 1], float32 of their shape."""
        return np.asarray(np.interp(np.asarray(agreement), self.agreements, self.probabilities), np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"agreements": list(self.agreements), "probabilities": list(self.probabilities)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The inverse of `to_dict`."""
        return cls(tuple(map(float, values["agreements"])), tuple(map(float, values["probabilities"])))
