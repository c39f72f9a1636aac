"""What a slice covers, on points that can be counted."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.active_learning.coverage import ENDS, OTHER_IMAGE, Cover, Sketches, sketch_slices


def make(*points: float, owners: list[int] | None = None) -> Sketches:
    return Sketches(np.array(points, np.float32)[:, None], np.array(owners or [0] * len(points)))


def test_distance_is_that_of_points_and_one_for_being_of_another_image():
    squared = make(0.0, 1.0).measure(make(0.0, 3.0, owners=[0, 1]))
    np.testing.assert_allclose(squared, [[0, 9 + OTHER_IMAGE**2], [1, 4 + OTHER_IMAGE**2]], atol=1e-5)


def test_sizes_count_by_their_root_and_a_structure_that_is_nowhere_by_nothing():
    found = sketch_slices(np.float32([[0.01, 0.04], [0, 0]]), np.float32([0.04, 0]), np.float32([0, 1]))
    np.testing.assert_allclose(found, [[0.5, 0, 0], [1, 0, ENDS]])


def test_the_middle_of_a_crowd_is_chosen_and_then_the_next_crowd():
    known = [100.0] * 7  # half a unit from what is annotated: the radius
    points = make(0.0, 0.1, 0.2, 5.0, 5.1, 20.0, *known)
    choices = list(Cover(points, np.float32([1] * 6 + [0.01] * 7), make(100.5)).pick(points))
    assert choices[0].position == 1
    assert choices[1].position in (3, 4)
    assert sorted(choice.position for choice in choices) == list(range(13))
    gains = [choice.gain for choice in choices]
    assert gains == sorted(gains, reverse=True)
    assert choices[0].stands_for.tolist() == [True] * 3 + [False] * 10


def test_lazy_gains_are_those_of_looking_at_everything_each_time():
    rng = np.random.default_rng(0)
    points = Sketches(rng.normal(size=(40, 3)).astype(np.float32), rng.integers(0, 5, 40))
    weights, done = rng.random(40).astype(np.float32), Sketches(points.points[:3], points.owners[:3])
    lazy = [choice.position for choice in Cover(points, weights, done).pick(points)][:10]
    squared = points.measure(done).min(axis=1)
    near = np.exp(-points.measure(points) / np.median(squared))
    covered, plain = np.exp(-squared / np.median(squared)), []
    for _ in range(10):
        gains = np.maximum(near - covered[:, None], 0).T @ weights
        gains[plain] = -1
        plain.append(int(np.argmax(gains)))
        covered = np.maximum(covered, near[:, plain[-1]])
    assert lazy == plain


def test_without_annotations_half_of_all_pairs_are_near():
    points = make(0.0, 1.0, 2.0)
    (first, *_) = Cover(points, np.ones(3, np.float32), make()).pick(points)
    assert first.position == 1
    assert first.gain == pytest.approx(1 / 3 + 2 / 3 * np.exp(-1), abs=1e-5)
