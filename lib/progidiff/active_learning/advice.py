"""When annotating more is hardly worth it: counting and arithmetic, no HTTP and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MIN_SAVES = 10
"""Saves of which it is known whether they were changed; fewer say nothing about a rate."""


FLAT_RATE = 0.05
"""A rate of unchanged masks that has moved by less between the earlier and the later half is flat."""


FLAT_GAIN = 0.005
"""A validation Dice expected to rise by less than this is flat."""


TEN = 10
"""Slices that an interval is told about."""


FOUR_IN_FIVE = 1.28
"""Standard deviations to both sides of the middle that hold 80 % of a normal distribution."""


KEPT = 0.5
"""Share of what the line through the last versions promises that then came, see docs/results.md: curves bend."""


ERROR_OF_A_VERSION = 0.04
"""Standard deviation of a version's validation Dice around its learning curve."""


STRAYING = 0.04
"""Standard deviation of what ten slices then brought around what was expected."""


def describe_countdown(slices: int, after: int) -> str:
    """How far the next training is, for the person who saved a label.

    Example:
        >>> describe_countdown(7, 20)
        '7 of 20 slices until the next training.'
    """
    return f"{slices} of {after} slices until the next training."


@dataclass(frozen=True)
class CurvePoint:
    """One trained version on the learning curve.

    Attributes:
        version: ``name@number``.
        slices: Annotated slices that it was trained on.
        dice: Of its consensus on the held-back slices, mean over the structures.
    """

    version: str
    slices: int
    dice: float


@dataclass(frozen=True)
class Gain:
    """What more slices are expected to add to the validation Dice.

    Attributes:
        expected: At least 0.
        low, high: It came to lie between these four times in five; a curve can also fall.
    """

    expected: float
    low: float
    high: float


@dataclass(frozen=True)
class Advice:
    """Whether to go on.

    Attributes:
        stop: True if both signs say that more slices hardly help.
        message: Why, with the numbers.
        unchanged_before, unchanged_now: Rate of masks accepted without a change in the earlier and the later half of
            the saves; None if too few are known.
        expected_gain: Validation Dice that the next batch brings if the line of the last versions goes on; None if
            there are fewer than two versions.
        next_ten: The same of the next `TEN` slices, with how sure that is.
    """

    stop: bool
    message: str
    unchanged_before: float | None
    unchanged_now: float | None
    expected_gain: float | None
    next_ten: Gain | None = None


def advise(edited: Sequence[bool], curve: Sequence[CurvePoint], more: int) -> Advice:
    """Weigh up what annotators do with the proposals and what the last versions gained.

    Args:
        edited: Of every save of which it is known, oldest first: whether the mask was changed.
        curve: Versions in the order in which they were trained.
        more: Slices that the expectation is about, the next batch.

    Example:
        >>> points = [CurvePoint("mr@1", 20, 0.70), CurvePoint("mr@2", 40, 0.80)]
        >>> advise([True] * 10, points, 20).message.partition("before. ")[2].partition(" Curves")[0]
        '20 more slices are expected to bring 0.058 Dice.'
    """
    half = len(edited) // 2
    before, now = (None, None) if len(edited) < MIN_SAVES else (_rate(edited[:half]), _rate(edited[half:]))
    gain = estimate_gain(curve, more)
    told = []
    if before is None or now is None:
        told.append(
            f"Of {len(edited)} saves it is known whether the mask was changed; {MIN_SAVES} are needed to judge by."
        )
    else:
        rates = f"{now:.0%} of the last {len(edited) - half} masks were accepted without a change, {before:.0%} before."
        told.append(rates.replace("%", " %"))
    if gain is None:
        told.append("Two trained versions are needed to expect a gain.")
    else:
        told.append(f"{more} more slices are expected to bring {gain:.3f} Dice.")
    ten = predict_gain(curve, TEN)
    if ten is not None:
        told.append(
            f"Curves bend: of the next {TEN}, {ten.expected:.3f} is likely, {ten.low:+.3f} to {ten.high:+.3f} four "
            "times in five."
        )
    stop = (
        before is not None
        and now is not None
        and gain is not None
        and abs(now - before) < FLAT_RATE
        and gain < FLAT_GAIN
    )
    if stop:
        told.append(
            "Both are flat: more slices of this kind hardly help. Review the least "
            "certain labels, or add images of another kind."
        )
    elif before is not None and gain is not None:
        told.append("Go on.")
    return Advice(stop, " ".join(told), before, now, gain, ten)


def estimate_gain(curve: Sequence[CurvePoint], more: int) -> float | None:
    """What `more` slices would add to the validation Dice by a line through the last four versions over the logarithm
    of the slices, at least 0. None if fewer than two versions differ in slices.

    Curves bend: see `predict_gain` for what is left of it.
    """
    line = _fit_line(curve)
    return None if line is None else max(0.0, line[0] * _further(curve, more))


def predict_gain(curve: Sequence[CurvePoint], more: int) -> Gain | None:
    """What `more` slices are expected to add to the validation Dice, with how sure that is. None if fewer than two
    versions differ in slices.

    The interval has two parts: how well so few versions, each measured with an error, fix the slope of their line, and
    how far a curve strays from what is expected whatever the slope.
    """
    line = _fit_line(curve)
    if line is None:
        return None
    slope, spread = line
    further = _further(curve, more)
    expected = KEPT * max(0.0, slope * further)
    reach = FOUR_IN_FIVE * math.sqrt((further * ERROR_OF_A_VERSION) ** 2 / spread + STRAYING**2)
    return Gain(expected, expected - reach, expected + reach)


def _fit_line(curve: Sequence[CurvePoint]) -> tuple[float, float] | None:
    """Slope of the last four versions over the logarithm of their slices, and the sum of squares of the latter."""
    points = [(math.log(point.slices), point.dice) for point in curve if point.slices > 0][-4:]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread, spread


def _further(curve: Sequence[CurvePoint], more: int) -> float:
    last = max(point.slices for point in curve)
    return math.log(last + more) - math.log(last)


def _rate(edited: Sequence[bool]) -> float:
    return sum(not changed for changed in edited) / len(edited)
