"""A simulated person: clicks go where the error is, and say what it is."""

from __future__ import annotations

import numpy as np

from progidiff.training.simulated_edits import (
    EditHabits,
    find_wrong_piece,
    place_click,
    simulate_edits,
    simulate_frame,
    simulate_strokes,
)

SIZE = 48


def square(top: int, left: int, side: int) -> np.ndarray:
    mask = np.zeros((SIZE, SIZE), bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_the_largest_wrong_piece_is_found_and_named():
    truth, drawn = square(5, 5, 12), square(5, 5, 6) | square(30, 30, 4)
    found = find_wrong_piece(truth, drawn)
    assert found is not None
    piece, is_missing = found
    assert is_missing
    assert piece.sum() == 12 * 12 - 6 * 6
    found = find_wrong_piece(square(5, 5, 6), drawn)
    assert found is not None
    assert not found[1]
    assert found[0].sum() == 16
    assert find_wrong_piece(truth, truth) is None
    assert find_wrong_piece(truth, truth ^ square(5, 5, 1), smallest=2) is None


def test_a_click_lies_in_the_middle_of_its_piece_and_never_outside():
    piece = square(10, 20, 9)
    assert place_click(piece) == (14, 24)
    rng = np.random.default_rng(0)
    places = {place_click(piece, rng, off_center=1.0) for _ in range(50)}
    assert len(places) > 5
    assert all(piece[place] for place in places)


def test_clicks_say_inside_where_something_is_missing_and_outside_where_there_is_too_much():
    rng, habits = np.random.default_rng(0), EditHabits(clicks=4, scribbles=0.5)
    for _ in range(20):
        truth, drawn = square(8, 8, 14), square(14, 14, 16)
        wanted, unwanted = simulate_strokes(truth, drawn, rng, habits)
        assert wanted.any() or unwanted.any()
        assert not (wanted & ~(truth & ~drawn)).any()
        assert not (unwanted & ~(drawn & ~truth)).any()


def test_a_person_who_sees_nothing_wrong_clicks_nowhere():
    truth = square(8, 8, 14)
    assert not any(part.any() for part in simulate_strokes(truth, truth, np.random.default_rng(0), EditHabits()))
    maps = simulate_edits(truth, truth, np.random.default_rng(0), EditHabits(frames=0))
    assert not maps.any()


def test_a_person_without_clicks_does_none():
    strokes = simulate_strokes(square(8, 8, 14), square(0, 0, 4), np.random.default_rng(0), EditHabits(clicks=0))
    assert not any(part.any() for part in strokes)


def test_a_box_is_about_as_large_as_the_truth():
    rng = np.random.default_rng(1)
    for _ in range(20):
        frame = simulate_frame(square(10, 12, 10), rng)
        assert frame is not None
        assert 49 <= frame.sum() <= 200
        assert frame[15, 17]
    assert simulate_frame(np.zeros((SIZE, SIZE), bool), rng) is None
