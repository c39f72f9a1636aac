"""Scores and choices on made-up proposals; whether a strategy is worth anything is measured by
benchmarks/active_learning.py.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from progidiff.active_learning.settings import STRATEGIES, AcquisitionConfig
from progidiff.active_learning.strategies import (
    ImageScores,
    build_pool,
    compute_scores,
    compute_uncertainty,
    pick_slices,
    space_evenly,
    summarise_reasons,
)
from progidiff.errors import GeometryError, RequestError

QUIET = AcquisitionConfig(cover=False, noise=False)


def make_scores(image: str = "a", depth: int = 40, seed: int = 0, slice_mm: float = 5.0) -> ImageScores:
    """A large liver on slices 10-29 that is nearly certain, a small pancreas on 15-20 that is not, and noise on slice
    35.
    """
    rng = np.random.default_rng(seed)
    disagreement, foreground = np.zeros((2, depth), np.float32), np.zeros((2, depth), np.float32)
    disagreement[0, 10:30], foreground[0, 10:30] = 0.1, 0.2
    disagreement[1, 15:21], foreground[1, 15:21] = 0.6, 0.01
    disagreement[1, 35], foreground[1, 35] = 1.0, 1e-5
    disagreement[0, 10:30] += rng.random(20).astype(np.float32) * 0.02
    return ImageScores(image, ("liver", "pancreas"), disagreement, foreground * 0.5, foreground, slice_mm)


def test_identical_proposals_disagree_nowhere_and_disjoint_ones_everywhere():
    probabilities = np.zeros((1, 2, 3, 4, 4), np.uint8)
    probabilities[0, :, 0, :2] = 255
    probabilities[0, 0, 1, 0] = 255
    probabilities[0, 1, 1, 1] = 255
    scores = compute_scores("a", ["liver"], probabilities, 5.0)
    assert scores.disagreement.tolist() == [[0.0, 1.0, 0.0]]
    assert scores.foreground.tolist() == [[0.5, 0.25, 0.0]]
    assert scores.entropy.tolist() == [[0.0, 0.5, 0.0]]  # one bit on half of the pixels
    assert scores.num_slices == 3


def test_what_lies_beyond_the_edge_of_the_image_does_not_count():
    probabilities = np.zeros((1, 2, 1, 4, 4), np.uint8)
    probabilities[0, 0, 0, :, :2] = 255
    covered = np.zeros((4, 4), bool)
    covered[:, 2:] = True
    scores = compute_scores("a", ["liver"], probabilities, 5.0, covered=covered)
    assert not scores.disagreement.any()
    assert not scores.foreground.any()


def test_scores_of_one_proposal_are_an_error_that_says_what_to_do():
    with pytest.raises(GeometryError, match="Raise num_proposals"):
        compute_scores("a", ["liver"], np.full((1, 1, 2, 4, 4), 255, np.uint8), 5.0)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(GeometryError, match="uint8 probabilities of shape"):
        compute_scores("a", ["liver"], np.zeros((2, 2, 2, 4, 4), np.uint8), 5.0)
    with pytest.raises(GeometryError, match="must all have the shape"):
        ImageScores("a", ("liver",), np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 4)), 5.0)


def test_a_noisy_empty_slice_is_not_informative():
    pool = build_pool([make_scores()])
    assert int(pool.values(QUIET)[1].argmax()) in range(15, 21)
    # The part switched off, the noise wins: that is what it is for.
    assert int(pool.values(replace(QUIET, foreground_weight=False))[1].argmax()) == 35


def test_the_structure_that_is_worst_everywhere_does_not_take_all_choices():
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(6)])
    spread = pick_slices(pool, 12, config=replace(QUIET, stratified_share=1.0))
    assert [pick.structures[0] for pick in spread].count("liver") == 6
    plain = pick_slices(pool, 12, config=replace(QUIET, stratified_share=0.0, min_distance_mm=0.0))
    assert {pick.structures[0] for pick in plain} == {"pancreas"}


def test_annotated_structures_give_way_to_those_that_are_not():
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(3)])
    picks = pick_slices(pool, 3, config=replace(QUIET, stratified_share=1.0), annotated={"image0": [11, 13, 25, 27]})
    assert [pick.structures[0] for pick in picks] == ["pancreas"] * 3


def test_images_with_little_done_come_first_while_they_show_anything():
    empty = replace(
        make_scores("empty"), disagreement=np.zeros((2, 40), np.float32), foreground=np.zeros((2, 40), np.float32)
    )
    pool = build_pool([*(make_scores(f"image{n}", seed=n) for n in range(3)), empty])
    annotated = {"image0": [12, 20]}
    spread = [pick.image for pick in pick_slices(pool, 7, config=QUIET, annotated=annotated)]
    assert sorted(spread[:4]) == ["image1", "image1", "image2", "image2"]
    assert sorted(spread[4:]) == ["image0", "image1", "image2"]
    greedy = replace(QUIET, spread_over_images=False)
    favoured = build_pool(
        [replace(make_scores("image0"), disagreement=make_scores("image0").disagreement * 1.5), make_scores("image1")]
    )
    assert {
        pick.image
        for pick in pick_slices(favoured, 3, config=replace(greedy, stratified_share=0.0, min_distance_mm=0.0))
    } == {"image0"}


def test_a_power_of_zero_leaves_the_size_to_decide():
    pool = build_pool([make_scores()])
    values = pool.values(replace(QUIET, score_power=0.0))
    np.testing.assert_array_equal(values > 0, pool.foreground > 0)
    assert (values[0, 10:30] == 1).all()


@pytest.mark.parametrize("slice_mm", [2.0, 5.0, 20.0])
def test_slices_of_a_volume_keep_their_distance_also_from_annotated_ones(slice_mm: float):
    pool = build_pool([make_scores(slice_mm=slice_mm)])
    picks = pick_slices(pool, 2, config=QUIET, annotated={"a": [12]})
    places = sorted([12, *(pick.index for pick in picks)])
    assert all((b - a) * slice_mm >= 15.0 for a, b in pairwise(places))


def test_the_distance_yields_when_the_budget_asks_for_more():
    pool = build_pool([make_scores(slice_mm=5.0)])
    picks = pick_slices(pool, 30, config=QUIET)
    assert len({pick.index for pick in picks}) == 30
    drawn = {*range(10, 30), 35}
    assert {pick.index for pick in picks[:21]} == drawn  # what shows something comes before what is empty
    assert picks[-1].reason == "nothing is predicted here; drawn at random"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_same_seed_gives_the_same_slices_and_no_slice_twice(strategy: str):
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(4)])
    annotated = {"image0": None, "image1": [17]}
    first, again = (pick_slices(pool, 20, strategy, annotated=annotated, seed=3) for _ in range(2))
    assert first == again
    assert len({(pick.image, pick.index) for pick in first}) == 20
    assert all(pick.image != "image0" and (pick.image, pick.index) != ("image1", 17) for pick in first)
    assert all(pick.reason and 0 <= pick.index < 40 for pick in first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pool_that_is_used_up_gives_what_is_left(strategy: str):
    pool = build_pool([make_scores(depth=36)])
    assert len(pick_slices(pool, 10, strategy, annotated={"a": range(30)})) == 6
    assert pick_slices(pool, 10, strategy, annotated={"a": None}) == []
    assert pick_slices(build_pool([]), 10, strategy) == []


def test_noise_is_strong_first_and_faint_last_and_does_not_depend_on_the_rest_of_the_pool():
    scores = [make_scores(f"image{n}", seed=n) for n in range(4)]
    pool = build_pool(scores)
    annealed = AcquisitionConfig(cover=False, beta_first=0.1, beta_last=1e6, spread_over_images=False)
    quiet = {(p.image, p.index) for p in pick_slices(pool, 8, config=replace(annealed, noise=False))}
    shared = [
        len(quiet & {(p.image, p.index) for p in pick_slices(pool, 8, config=annealed, round_index=r, seed=1)})
        for r in (0, 4)
    ]
    assert shared[0] < shared[1]
    alone = build_pool([scores[2]]).gumbel(1, 0)
    np.testing.assert_array_equal(alone, pool.gumbel(1, 0)[:, pool.rows("image2")])


def test_a_kind_of_slice_that_is_everywhere_comes_before_an_outlier_that_is_more_uncertain():
    pool = build_pool(
        [
            *(make_scores(f"image{n}", seed=n) for n in range(6)),
            replace(make_scores("outlier"), entropy=make_scores("outlier").entropy * 2, foreground=np.ones((2, 40))),
        ]
    )
    first = pick_slices(pool, 1)[0]
    assert first.image != "outlier"
    assert first.index in range(10, 30)
    assert "pick" not in first.reason
    assert first.reason.endswith("are like it and like nothing annotated")
    assert "disagree on slice" in first.reason
    former = pick_slices(pool, 1, "entropy", annotated={})[0]
    assert former.image == "outlier"


def test_a_kind_of_slice_that_is_annotated_is_not_chosen_again():
    scores = [make_scores(f"image{n}", seed=n) for n in range(4)]
    low = [replace(s, foreground=np.where(np.arange(40) < 20, s.foreground, 0).astype(np.float32)) for s in scores]
    low = [replace(s, entropy=s.foreground * 0.5) for s in low]
    pool = build_pool(low)
    kinds = {"liver alone": range(10, 15), "both": range(15, 20)}
    chosen = pick_slices(pool, 1, annotated={f"image{n}": list(kinds["both"]) for n in range(4)})
    assert chosen[0].index in kinds["liver alone"]
    chosen = pick_slices(pool, 1, annotated={f"image{n}": list(kinds["liver alone"]) for n in range(4)})
    assert chosen[0].index in kinds["both"]
    assert 0 < chosen[0].score <= 1


def test_slices_of_one_image_are_chosen_by_what_they_stand_for_in_the_pool():
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(3)])
    inside = pick_slices(pool, 4, within="image1", annotated={"image0": range(10, 20)})
    assert {pick.image for pick in inside} == {"image1"}
    assert inside[0].index not in range(10, 15)  # those that image0 shows are annotated


def test_a_large_pool_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("progidiff.active_learning.strategies.LANDMARKS", 16)
    monkeypatch.setattr("progidiff.active_learning.strategies.OFFERED", 3)
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(8)])
    order = pick_slices(pool, 8, one_per_image=True)
    assert sorted(pick.image for pick in order) == [f"image{n}" for n in range(8)]
    assert len({(pick.image, pick.index) for pick in pick_slices(pool, 40)}) == 40


def test_an_order_of_images_has_every_image_once():
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(5)])
    picks = pick_slices(pool, 10, one_per_image=True, excluded=["image3"])
    assert sorted(pick.image for pick in picks) == ["image0", "image1", "image2", "image4"]
    inside = pick_slices(pool, 3, within="image2")
    assert {pick.image for pick in inside} == {"image2"}


def test_foreground_random_keeps_to_its_share():
    pool = build_pool([make_scores(f"image{n}", depth=400, seed=n) for n in range(2)])
    for share in (0.33, 0.66):
        picks = pick_slices(pool, 300, "foreground_random", AcquisitionConfig(foreground_share=share))
        assert sum(bool(pick.structures) for pick in picks[:40]) / 40 == pytest.approx(share, abs=0.2)
    assert not any(pick.structures for pick in pick_slices(pool, 20, "uniform_random"))


def test_evenly_spaced_takes_turns_between_images_and_fills_the_largest_gap():
    pool = build_pool([make_scores("a"), make_scores("b")])
    picks = pick_slices(pool, 6, "evenly_spaced")
    assert sorted(pick.index for pick in picks if pick.image == "a") == [0, 19, 39]
    assert sum(pick.image == "b" for pick in picks) == 3
    assert space_evenly(10, 2, annotated=[0]) == [9, 4]
    assert space_evenly(3, 8) == [1, 0, 2]


def test_images_that_were_asked_for_different_structures_share_a_pool():
    other = ImageScores("b", ("spleen",), *(np.full((1, 4), 0.5, np.float32) for _ in range(3)), slice_mm=5.0)
    pool = build_pool([other, make_scores("a")])
    assert pool.structures == ("liver", "pancreas", "spleen")
    assert pool.rows("b") == slice(40, 44)
    assert pool.disagreement[:, 41].tolist() == [0.0, 0.0, 0.5]
    assert pool.rows("absent") == slice(0, 0)


def test_reasons_name_structures_and_slices():
    pool = build_pool([make_scores()])
    picks = pick_slices(pool, 4, config=QUIET)
    text = summarise_reasons(picks)
    assert "proposals for pancreas disagree on slices 16-21 (by 0.60 of 1)" in text.replace("Proposals", "proposals")
    assert "liver" in text
    assert text.endswith(".")
    assert summarise_reasons([]) == ""


def test_an_image_is_as_uncertain_as_its_worst_slices():
    certain = make_scores()
    certain = replace(certain, disagreement=certain.disagreement * 0.1)
    assert compute_uncertainty(make_scores()) == pytest.approx(0.6**0.5, abs=0.02)
    assert compute_uncertainty(certain) < compute_uncertainty(make_scores())


def test_settings_and_names_out_of_range_are_refused():
    pool = build_pool([make_scores()])
    with pytest.raises(RequestError, match="There is no strategy 'best'"):
        pick_slices(pool, 1, "best")
    with pytest.raises(RequestError, match="stratified_share must lie in 0..1"):
        pick_slices(pool, 1, config=AcquisitionConfig(stratified_share=2))
    with pytest.raises(RequestError, match="score is 'chance'"):
        pick_slices(pool, 1, config=AcquisitionConfig(score="chance"))  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="twice"):
        build_pool([make_scores(), make_scores()])


def test_slices_that_an_image_does_not_have_are_ignored():
    pool = build_pool([make_scores("a", depth=36), make_scores("b", depth=36)])
    assert len(pick_slices(pool, 99, "uniform_random", annotated={"a": [-1, 36, 500], "gone": [3]})) == 72


def test_settings_are_read_from_text():
    config = AcquisitionConfig.from_text("score=entropy, noise=off,rounds=3,min_distance_mm=0")
    assert (config.score, config.noise, config.rounds, config.min_distance_mm) == ("entropy", False, 3, 0.0)
    assert AcquisitionConfig.from_text("") == AcquisitionConfig()
    for text, message in (
        ("speed=1", "no setting"),
        ("noise", "no setting"),
        ("noise=loud", "on or off"),
        ("rounds=x", "number"),
        ("rounds=0", "rounds"),
    ):
        with pytest.raises(RequestError, match=message):
            AcquisitionConfig.from_text(text)


def test_an_image_alone_is_worth_what_it_is_worth_in_the_pool():
    pool = build_pool([make_scores(f"image{n}", seed=n) for n in range(3)])
    part = pool.only("image1", QUIET)
    np.testing.assert_array_equal(part.values(QUIET), pool.values(QUIET)[:, 40:80])
    np.testing.assert_array_equal(part.gumbel(5, 2), pool.gumbel(5, 2)[:, 40:80])
    assert len(pool.only("gone", QUIET)) == 0
    assert pick_slices(pool, 3, within="gone") == []
