"""Agreement as a probability."""

import json

import numpy as np
import pytest

from progidiff.errors import ModelError
from progidiff.model.calibration import Calibration, Reliability


def count_overconfident(seed: int, voxels: int = 40_000) -> Reliability:
    """Ten proposals; what a share a of them draws is right with probability 0.2 + 0.6 a."""
    rng = np.random.default_rng(seed)
    count = rng.integers(0, 11, voxels)
    return Reliability.tally(np.arange(10)[:, None] < count, rng.random(voxels) < 0.2 + 0.06 * count)


def test_a_calibration_fitted_on_some_cases_makes_others_reliable() -> None:
    held_out = count_overconfident(1)
    calibration = Calibration.fit(count_overconfident(0))

    assert held_out.compute_error() == pytest.approx(
        0.1, abs=0.01
    )  # the mean of |0.2 - 0.4 a| over a = 0.1, 0.2, ..., 1
    assert held_out.compute_error(calibration) < 0.02
    assert calibration.apply([0.5]) == pytest.approx(0.5, abs=0.03)


def test_rare_values_never_make_the_curve_fall() -> None:
    count = np.zeros(256, np.int64)
    positive = np.zeros(256, np.int64)
    count[[10, 100, 101, 255]] = 1000, 1000, 2, 1000
    positive[[10, 100, 101, 255]] = 50, 600, 0, 900

    curve = np.array(Calibration.fit(Reliability(count, positive)).probabilities)

    assert (np.diff(curve) >= 0).all()
    assert curve[0] == pytest.approx(0.05)
    assert curve[-1] == pytest.approx(0.9)


def test_counts_add_up() -> None:
    one, other = count_overconfident(0, 100), count_overconfident(1, 50)

    assert (one + other).count.sum() == 150
    assert (one + other).positive.sum() == one.positive.sum() + other.positive.sum()


def test_background_is_no_excuse_for_an_error() -> None:
    """A million empty voxels that nobody draws leave the error where it is."""
    counted = count_overconfident(0)
    counted.count[0] += 1_000_000

    assert counted.compute_error() == pytest.approx(0.1, abs=0.01)


def test_a_calibration_survives_json() -> None:
    calibration = Calibration.fit(count_overconfident(0))

    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


@pytest.mark.parametrize(
    ("means", "probabilities"),
    [((0.0, 1.0), (0.6, 0.5)), ((0.1, 1.0), (0.0, 1.0)), ((0.0, 1.0), (0.0, 1.2)), ((0.0,), (0.0,))],
)
def test_a_curve_that_is_none_is_refused(means: tuple[float, ...], probabilities: tuple[float, ...]) -> None:
    with pytest.raises(ModelError, match="calibration needs"):
        Calibration(means, probabilities)


def test_nothing_counted_is_refused() -> None:
    with pytest.raises(ModelError, match="needs voxels"):
        Calibration.fit(Reliability(np.zeros(256, np.int64), np.zeros(256, np.int64)))
