"""Agreement, disagreement, ranking and merging."""

import pytest
import torch

from progidiff.errors import GeometryError, RequestError
from progidiff.proposals.agreement import (
    compute_agreement,
    compute_consensus,
    compute_disagreement,
    compute_disagreement_per_slice,
    compute_pairwise_dice,
    merge_masks,
    rank_proposals,
    resolve_overlaps,
)


@pytest.fixture
def masks() -> torch.Tensor:
    """K=5 proposals of a volume: (5, 6, 9, 7), the first slice empty, the second empty in one proposal."""
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(5, 6, 9, 7, generator=generator) > 0.6
    masks[:, 0] = False
    masks[2, 1] = False
    return masks


def plain_dice(a: torch.Tensor, b: torch.Tensor) -> float:
    total = int(a.sum() + b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def test_agreement_is_the_share_of_proposals(masks):
    agreement = compute_agreement(masks)
    assert agreement.shape == (6, 9, 7)
    assert torch.equal((agreement * 5).round(), masks.sum(0).float())


def test_a_tie_belongs_to_the_consensus():
    masks = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert compute_consensus(masks).tolist() == [True, True, True, False]


def test_the_consensus_is_the_agreement_of_at_least_half(masks):
    assert torch.equal(compute_consensus(masks), compute_agreement(masks) >= 0.5)


def test_pairwise_dice_is_the_dice_of_each_pair(masks):
    dice = compute_pairwise_dice(masks)
    for first in range(5):
        for second in range(5):
            assert float(dice[first, second]) == pytest.approx(plain_dice(masks[first], masks[second]))


def test_identical_proposals_do_not_disagree_and_disjoint_ones_do_fully():
    same = torch.ones(4, 3, 3, dtype=torch.bool)
    disjoint = torch.eye(4, dtype=torch.bool).reshape(4, 2, 2)
    assert compute_disagreement(same) == 0
    assert compute_disagreement(disjoint) == 1


def test_empty_proposals_do_not_disagree_but_one_empty_proposal_does():
    masks = torch.zeros(2, 3, 3, dtype=torch.bool)
    assert compute_disagreement(masks) == 0
    masks[0, 0, 0] = True
    assert compute_disagreement(masks) == 1


def test_disagreement_per_slice_is_that_of_each_slice_alone(masks):
    per_slice = compute_disagreement_per_slice(masks)
    assert per_slice.tolist() == pytest.approx([compute_disagreement(masks[:, z]) for z in range(6)])
    assert per_slice[0] == 0


def test_disagreement_does_not_depend_on_the_order_of_proposals(masks):
    assert compute_disagreement(masks) == pytest.approx(compute_disagreement(masks.flip(0)))


def test_one_proposal_is_an_error_that_says_what_to_do():
    with pytest.raises(GeometryError, match="Raise num_proposals"):
        compute_disagreement(torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(GeometryError, match="Raise num_proposals"):
        compute_disagreement_per_slice(torch.ones(1, 2, 4, 4, dtype=torch.bool))
    with pytest.raises(GeometryError, match="Raise num_proposals"):
        compute_agreement(torch.ones(0, 4, 4, dtype=torch.bool))


def test_masks_without_a_slice_axis_have_no_disagreement_per_slice():
    with pytest.raises(GeometryError, match="use compute_disagreement for one slice"):
        compute_disagreement_per_slice(torch.ones(2, 4, 4, dtype=torch.bool))


def test_the_most_central_proposal_ranks_first_and_the_outlier_last():
    line = torch.arange(12)
    masks = torch.stack([line < 5, line < 6, line < 7, line > 9])
    assert rank_proposals(masks) == [1, 2, 0, 3]
    assert rank_proposals(masks[:1]) == [0]


def test_equal_proposals_keep_their_order():
    assert rank_proposals(torch.ones(4, 2, 2, dtype=torch.bool)) == [0, 1, 2, 3]


def test_an_overlap_goes_to_higher_agreement_then_probability_then_the_first_asked():
    agreement = torch.tensor([[1.0, 0.5, 0.75, 0.75, 0.25], [0.5, 1.0, 0.75, 0.75, 0.25]])
    probability = torch.tensor([[0.1, 0.9, 0.6, 0.7, 0.9], [0.9, 0.1, 0.7, 0.7, 0.9]])
    assert resolve_overlaps(agreement, probability).tolist() == [1, 2, 2, 1, 0]
    assert resolve_overlaps(agreement).tolist() == [1, 2, 1, 1, 0]


def test_a_structure_alone_comes_back_as_its_consensus(masks):
    assert torch.equal(resolve_overlaps(compute_agreement(masks)[None]) > 0, compute_consensus(masks))


def test_maps_of_different_shapes_cannot_be_resolved():
    with pytest.raises(GeometryError, match="one map per structure"):
        resolve_overlaps(torch.zeros(2, 3), torch.zeros(3, 2))


def test_merging_goes_from_intersection_over_majority_to_union(masks):
    union, majority, intersection = (merge_masks(masks, how) for how in ("union", "majority", "intersection"))
    assert (intersection <= majority).all()
    assert (majority <= union).all()
    assert torch.equal(union, masks.any(0))
    assert torch.equal(intersection, masks.all(0))


def test_a_threshold_of_three_tenths_is_three_of_ten_proposals():
    masks = (torch.arange(10)[:, None] < torch.arange(11)[None]).bool()  # pixel n is drawn by n proposals
    assert merge_masks(masks, "threshold", 0.3).nonzero()[0].item() == 3
    assert torch.equal(merge_masks(masks, "threshold", 1.0), masks.all(0))


def test_an_unknown_rule_or_threshold_is_refused():
    masks = torch.ones(2, 2, 2, dtype=torch.bool)
    with pytest.raises(RequestError, match="choose union, intersection, majority or threshold"):
        merge_masks(masks, "vote")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no share of proposals"):
        merge_masks(masks, "threshold", 0.0)
