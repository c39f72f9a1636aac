"""Images drawn from a table are those that are drawn from all slices."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import numpy as np
import pytest

from progidiff.active_learning.image_choice import ImageTable, shuffle_images, shuffle_keys
from progidiff.active_learning.settings import AcquisitionConfig
from progidiff.active_learning.strategies import ImageScores, build_pool, pick_slices

STRUCTURES = ("liver", "spleen", "pancreas")


def make_scores(images: int, seed: int) -> list[ImageScores]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(images):
        names = STRUCTURES if number % 3 else STRUCTURES[:2]
        shape = (len(names), int(rng.integers(1, 9)))
        drawn = rng.random(shape) < 0.3
        arrays = [(rng.random(shape) * drawn).astype(np.float32) for _ in range(3)]
        found.append(ImageScores(f"image{number:04}", names, *arrays, slice_mm=3.0))
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("images", [7, 300])
def test_images_are_drawn_as_slices_of_all_images_are(images: int, seed: int):
    scores = make_scores(images, seed)
    pool = build_pool(scores)
    annotated: Mapping[str, frozenset[int] | None] = {
        scores[0].image: None,
        scores[2].image: frozenset({0}),
        scores[4].image: frozenset(range(scores[4].num_slices)),
        scores[5].image: frozenset({-1, 99}),
    }
    excluded = [scores[3].image]
    share = AcquisitionConfig().foreground_share
    picks = pick_slices(
        pool, images, "foreground_random", annotated=annotated, excluded=excluded, one_per_image=True, seed=seed
    )
    table = ImageTable(pool.structures, images)
    for position, entry in enumerate(scores):
        table.put(position, entry, annotated.get(entry.image, frozenset()))
    allowed = np.array([entry.image not in excluded for entry in scores])
    rng = np.random.default_rng([seed, 0, *b"foreground_random"])
    drawn = [scores[position].image for position in table.draw(allowed, share, rng)]
    assert drawn == [pick.image for pick in picks]
    assert len(set(drawn)) == images - 3


def test_an_image_that_changes_is_counted_anew():
    (scores,) = make_scores(1, 3)
    table = ImageTable(STRUCTURES, 1)
    table.put(0, scores, frozenset())
    assert table.counts[-1].tolist() == [scores.num_slices]
    table.put(0, scores, {0})
    assert table.counts[-1].tolist() == [scores.num_slices - 1]
    assert table.counts[0, 0] == (scores.foreground[0, 1:] > 0).sum()
    table.put(0, None, frozenset())
    assert table.counts.sum() == 0
    assert list(table.draw(np.ones(1, bool), 0.5, np.random.default_rng(0))) == []


def test_the_order_by_chance_is_the_seeds_whichever_others_are_free_and_the_least_annotated_come_first():
    keys = shuffle_keys([f"image{number}" for number in range(50)])
    everything = np.arange(50)
    order = list(shuffle_images(keys, everything, 7))
    assert sorted(order) == list(range(50))
    assert order != list(shuffle_images(keys, everything, 8))
    some = everything[::3]
    assert list(shuffle_images(keys, some, 7)) == [position for position in order if position % 3 == 0]
    done = np.zeros(50, np.int64)
    done[order[:10]] = 2
    assert list(shuffle_images(keys, everything, 7, done)) == [*order[10:], *order[:10]]
    assert list(islice(shuffle_images(keys, everything[:0], 7), 3)) == []
