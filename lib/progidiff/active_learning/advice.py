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
class Advice:
    """Whether to go on.

    Attributes:
        stop: True if both signs say that more slices hardly help.
        message: Why, with the numbers.
        unchanged_before, unchanged_now: Rate of masks accepted without a change in the earlier and the later half of
            the saves; None if too few are known.
        expected_gain: Validation Dice that as many slices again are expected to bring; None if there are fewer than two
            versions.
    """

    stop: bool
    message: str
    unchanged_before: float | None
    unchanged_now: float | None
    expected_gain: float | None


def advise(edited: Sequence[bool], curve: Sequence[CurvePoint], more: int) -> Advice:
    """Weigh up what annotators do with the proposals and what the last versions gained.

    Args:
        edited: Of every save of which it is known, oldest first: whether the mask was changed.
        curve: Versions in the order in which they were trained.
        more: Slices that the expectation is about, the next batch.

    Example:
        >>> points = [CurvePoint("mr@1", 20, 0.70), CurvePoint("mr@2", 40, 0.80)]
        >>> advise([True] * 10, points, 20).message.partition("before. ")[2]
        '20 more slices are expected to bring 0.058 Dice. Go on.'
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
    return Advice(stop, " ".join(told), before, now, gain)


def estimate_gain(curve: Sequence[CurvePoint], more: int) -> float | None:
    """What `more` slices are expected to add to the validation Dice: a line through the last four versions over the
    logarithm of the slices, at least 0. None if fewer than two versions differ in slices.
    """
    points = [(math.log(point.slices), point.dice) for point in curve if point.slices > 0][-4:]
    if len({x for x, _ in points}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    last = max(point.slices for point in curve)
    found: float | None = max(0.0, slope * (math.log(last + more) - math.log(last)))
    return found


def _rate(edited: Sequence[bool]) -> float:
    return sum(not changed for changed in edited) / len(edited)
