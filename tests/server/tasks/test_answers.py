"""What a mask of an answer shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from progidiff.errors import RequestError
from progidiff.images.geometry import Grid
from progidiff.images.working_grid import plan_working_grid
from progidiff.model.calibration import Calibration
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.tasks.answers import Summary, draw_shown

SHAPE = (64, 64, 4)


@pytest.fixture
def half_sure() -> tuple[VolumeProposals, Grid]:
    """Two of four proposals draw the whole of two slices."""
    grid = Grid(SHAPE, np.diag([-2.0, -2.0, 5.0, 1.0]))
    working = plan_working_grid(np.full(SHAPE[::-1], 255, np.uint8), (5.0, 2.0, 2.0), 1.0, 64, 64, (1.0, 4.0))
    probabilities = np.zeros((1, 4, 4, 64, 64), np.uint8)
    probabilities[0, :2, 1:3] = 255
    result = VolumeProposals(("liver",), probabilities, working, 0, 1, 1.0, "toy@1", "", "CT", "given", 0.0)
    return result, grid


def test_a_probability_is_shown_in_four_bands(half_sure: tuple[VolumeProposals, Grid]) -> None:
    result, grid = half_sure
    calibrated = replace(result, calibration=Calibration((0.0, 0.5, 1.0), (0.0, 0.7, 0.9)))

    labels, names, counts = draw_shown(calibrated, grid, {"liver": 1}, "probability")

    assert list(names.values()) == [3]  # 70 % lies between 51 and 75
    assert next(iter(names)).startswith("probability")
    assert counts[3] == (labels == 3).sum() == (result.agreement(grid) == 0.5).sum() > 0


def test_an_answer_says_what_makes_its_agreement_a_probability(half_sure: tuple[VolumeProposals, Grid]) -> None:
    result, _ = half_sure
    calibrated = replace(result, calibration=Calibration((0.0, 0.5, 1.0), (0.0, 0.7, 0.9)))
    told = Summary(**calibrated.summary()).calibration
    assert told is not None
    assert (told.agreements, told.probabilities) == ([0.0, 0.5, 1.0], [0.0, 0.7, 0.9])
    assert Summary(**result.summary()).calibration is None


def test_without_a_calibration_it_is_refused(half_sure: tuple[VolumeProposals, Grid]) -> None:
    result, grid = half_sure
    with pytest.raises(RequestError, match="show agreement instead"):
        draw_shown(result, grid, {"liver": 1}, "probability")
