"""The simulated person, and the random walker that clicks are compared with."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from progidiff.images.close_up import WindowRules, window_at
from progidiff.images.working_grid import WorkingGrid
from progidiff.proposals.close_ups import Subject
from support.servers import load_script

SHAPE, SPACING = (3, 80, 80), (3.0, 1.0, 1.5)


@pytest.fixture(scope="module")
def interactive() -> ModuleType:
    return load_script("interactive")


def make_scene(interactive: ModuleType, noise: float, is_found: bool = True):
    """A bright disc on a dark ground, in millimetres round, off the middle."""
    y, x = np.mgrid[:80, :80]
    disc = ((y - 30) * 1.0) ** 2 + ((x - 35) * 1.5) ** 2 < 14**2
    truth = np.repeat(disc[None], 3, 0)
    shades = (0.3 + 0.4 * truth + np.random.default_rng(0).normal(0, noise, SHAPE)).clip(0, 1).astype(np.float32)
    grid = WorkingGrid(SHAPE, SPACING, (40.0, 60.0), 2.0, 40, 60)
    subject = Subject(
        shades, (0.0, 1.0), np.zeros((3, 40, 60), np.uint8), grid, torch.zeros(4), torch.zeros(1, 4), None
    )
    known = SimpleNamespace(rules=WindowRules())
    windows = (window_at((1, 30.0, 52.0), 86.0, SHAPE, SPACING, reach_mm=9.0),) if is_found else ()
    return interactive.Scene(known, "disc", truth, shades, subject, windows)


@pytest.mark.parametrize("is_found", [True, False])
def test_a_random_walker_finds_what_stands_out_from_one_click(interactive: ModuleType, is_found: bool):
    scene = make_scene(interactive, 0.03, is_found)
    scores = interactive.correct(scene.truth[1], interactive.answer_by_walker(scene, 1, 130.0, 0.0))
    assert len(scores) == 11
    assert scores[0] == 0
    assert scores[1] > 0.95


def test_smoothing_helps_a_random_walker_where_the_image_is_noisy(interactive: ModuleType):
    scene = make_scene(interactive, 0.15)
    raw, smooth = (
        interactive.correct(scene.truth[1], interactive.answer_by_walker(scene, 1, 500.0, sigma))
        for sigma in (0.0, 1.0)
    )
    assert np.mean(smooth[1:]) > np.mean(raw[1:])


def test_a_person_clicks_the_largest_wrong_piece_until_nothing_is_wrong(interactive: ModuleType):
    large, small = np.zeros((2, 20, 20), bool)
    large[2:12, 2:12] = small[15:18, 15:18] = True
    truth, asked = large | small, list[list[tuple[int, int, bool]]]()

    def answer(clicks):
        asked.append(list(clicks))
        drawn = np.zeros_like(truth)
        drawn[:, 18:] = not clicks  # too much, until somebody says anything
        for y, x, inside in clicks:
            assert inside
            drawn |= large if large[y, x] else small
        return drawn

    scores = interactive.correct(truth, answer)
    assert [large[y, x] for y, x, _ in asked[-1]] == [True, False]
    assert scores[0] == 0
    assert scores[1] == pytest.approx(200 / 209)
    assert scores[2:] == [1.0] * 9
    assert interactive.summarise([scores])["clicks to 0.90"] == 1


def test_what_is_clicked_is_what_the_consensus_shows(interactive: ModuleType):
    drawn = interactive.agree(np.array([[[0.9, 0.1]], [[0.8, 0.7]]], np.float32), [(0, 0, False), (0, 1, True)])
    assert drawn.tolist() == [[False, True]]
