"""Decisions of the review page become voxels: picks, plans, and the label on the grid of the image."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import GeometryError, RequestError
from progidiff.labels.decisions import Plan, compose_label
from progidiff.proposals.agreement import compute_agreement, merge_masks
from progidiff.proposals.volume_proposals import VolumeProposals
from support.proposals import AFFINES, DEPTH, make_proposals, make_volume

IDS = {"liver": 6, "spleen": 1, "pancreas": 11}


@pytest.fixture(scope="module")
def proposals() -> VolumeProposals:
    return make_proposals()


def draw(proposals: VolumeProposals, params: dict[str, Any], orientation: str = "LPS") -> np.ndarray:
    volume = make_volume(orientation)
    return volume.arrange(compose_label(proposals, volume.grid, Plan.from_params(params, proposals), IDS))


@pytest.mark.parametrize("orientation", AFFINES)
@pytest.mark.parametrize(
    "pick, shown",
    [({"rule": "consensus"}, "consensus"), ({"rule": "proposal", "members": [3]}, 3), ({"rule": "best"}, "best")],
)
def test_an_accepted_volume_is_what_was_shown(
    proposals: VolumeProposals, orientation: str, pick: dict[str, Any], shown: str | int
):
    volume = make_volume(orientation)
    plan = Plan.from_params({"volume": dict.fromkeys(proposals.structures, pick)}, proposals)
    label = compose_label(proposals, volume.grid, plan, IDS)
    assert np.array_equal(label, proposals.label_map(volume.grid, shown, IDS))
    assert plan.shown == str(shown)
    assert plan.decided_slices is None
    assert plan.structures == proposals.structures


@pytest.mark.parametrize("rule", ["union", "intersection", "majority", "threshold"])
@pytest.mark.parametrize("members", [[], [1, 4], [2, 3, 4]])
def test_merging_follows_the_rule_on_its_slice_alone(proposals: VolumeProposals, rule: Any, members: list[int]):
    label = draw(proposals, {"slices": {"3": {"liver": {"rule": rule, "members": members, "threshold": 0.75}}}})
    masks = proposals.slice_masks("liver", 3)
    chosen = masks[[member - 1 for member in members]] if members else masks
    assert np.array_equal(label[3] == 6, merge_masks(torch.from_numpy(chosen), rule, 0.75).numpy())
    assert not np.delete(label, 3, axis=0).any()


def test_a_pick_of_a_slice_wins_over_that_of_the_volume(proposals: VolumeProposals):
    label = draw(
        proposals,
        {
            "volume": {"liver": {"rule": "consensus"}},
            "slices": {"2": {"liver": {"rule": "nothing"}}, "4": {"liver": {"rule": "union"}}},
        },
    )
    assert not label[2].any()
    assert np.array_equal(label[4] > 0, proposals.slice_masks("liver", 4).any(axis=0))
    assert np.array_equal(label[3] > 0, proposals.slice_masks("liver", 3).sum(axis=0) >= 2)


def test_overlaps_go_to_the_structure_with_the_higher_agreement(proposals: VolumeProposals):
    union = {"rule": "union"}
    label = draw(proposals, {"slices": {"4": {"liver": union, "spleen": union}}})[4]
    liver, spleen = (
        compute_agreement(torch.from_numpy(proposals.slice_masks(name, 4))).numpy() for name in ("liver", "spleen")
    )
    both = (liver > 0) & (spleen > 0)
    assert both.any()
    assert (label[both & (liver > spleen)] == 6).all()
    assert (label[both & (spleen > liver)] == 1).all()
    assert (label[(liver > 0) & (spleen == 0)] == 6).all()


def test_what_is_picked_differently_is_called_merged(proposals: VolumeProposals):
    one, two = {"rule": "proposal", "members": [1]}, {"rule": "proposal", "members": [2]}
    assert Plan.from_params({"slices": {"1": {"liver": one}, "2": {"liver": one}}}, proposals).shown == "1"
    plan = Plan.from_params({"slices": {"2": {"liver": two}, "1": {"liver": one}}}, proposals)
    assert (plan.shown, plan.decided_slices, plan.structures) == ("merged", (1, 2), ("liver",))


@pytest.mark.parametrize(
    "params, reason",
    [
        ({}, "Nothing is decided"),
        ({"slices": {"3": {}}}, "Nothing is decided"),
        ({"slices": {str(DEPTH): {"liver": {"rule": "union"}}}}, f"from 0 to {DEPTH - 1}"),
        ({"slices": {"x": {"liver": {"rule": "union"}}}}, "slices is 'x'"),
        ({"slices": [3]}, "slices must be an object"),
        ({"volume": ["liver"]}, "Picks are an object"),
        ({"volume": {"aorta": {"rule": "union"}}}, "hold no 'aorta'; they hold liver, spleen, pancreas"),
        ({"volume": {"liver": {"rule": "guess"}}}, "one of consensus, best"),
        ({"volume": {"liver": "union"}}, "one of consensus, best"),
        ({"volume": {"liver": {"rule": "proposal"}}}, "exactly one member"),
        ({"volume": {"liver": {"rule": "union", "members": [5]}}}, "from 1 to 4"),
        ({"volume": {"liver": {"rule": "union", "members": 3}}}, "a list of proposals"),
        ({"volume": {"liver": {"rule": "threshold", "threshold": 0}}}, "threshold is 0"),
    ],
)
def test_a_senseless_plan_is_refused_with_what_it_may_be(
    proposals: VolumeProposals, params: dict[str, Any], reason: str
):
    with pytest.raises(RequestError, match=reason):
        Plan.from_params(params, proposals)


def test_a_plan_for_another_image_is_refused(proposals: VolumeProposals):

    volume = make_volume()
    other = replace(volume, array=volume.array[:, :, :5])
    with pytest.raises(GeometryError, match="axial stack"):
        compose_label(proposals, other.grid, Plan.from_params({"volume": {"liver": {"rule": "union"}}}, proposals), IDS)
