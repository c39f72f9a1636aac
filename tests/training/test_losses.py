"""Losses against hand-made cases and MONAI's."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss

from progidiff.training.losses import compute_dice_loss, compute_evidence_loss, compute_mask_loss


def draw(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(shape, generator=generator), (torch.rand(shape, generator=generator) > 0.7).float()


@pytest.mark.parametrize("batch", [False, True])
def test_dice_loss_is_monais(batch: bool):
    probabilities, targets = draw(3, 4, 8, 8)
    reference = DiceLoss(smooth_nr=2.0, smooth_dr=2.0, batch=batch)(probabilities, targets)
    torch.testing.assert_close(
        compute_dice_loss(probabilities, targets, (0, 2, 3) if batch else (2, 3), smooth=2.0), reference
    )


def test_a_perfect_mask_costs_nothing_and_its_opposite_costs_most():
    targets = draw(2, 8, 8)[1]
    assert float(compute_dice_loss(targets, targets, (1, 2))) == pytest.approx(0, abs=1e-6)
    assert float(compute_dice_loss(1 - targets, targets, (1, 2), smooth=0.0)) == pytest.approx(1)
    assert float(compute_mask_loss(targets, targets)) < 0.01
    assert float(compute_mask_loss(1 - targets, targets)) > 10


def test_false_positives_on_an_absent_structure_cost_more_the_larger_they_are():
    empty = torch.zeros(1, 16, 16)
    costs = []
    for size in (0, 2, 6, 16):
        drawn = torch.zeros(1, 16, 16)
        drawn[:, :size, :size] = 1
        costs.append(float(compute_mask_loss(drawn, empty)))
    assert costs == sorted(costs)
    assert costs[0] < 0.01


def test_structures_that_nobody_annotated_do_not_count():
    logits, targets = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), draw(2, 3, 8, 8)[1]
    weight = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    changed = targets.clone()
    changed[:, 1] = 1 - changed[:, 1]
    logits.requires_grad_(True)
    loss, figures = compute_evidence_loss(logits, targets, weight)
    assert float(loss.detach()) == float(compute_evidence_loss(logits.detach(), changed, weight)[0])
    loss.backward()
    assert not logits.grad[:, 1].any()
    assert logits.grad[:, 0].any()
    assert set(figures) == {"cross_entropy", "dice_loss"}


def test_extreme_probabilities_keep_loss_and_gradient_finite():
    probabilities = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], requires_grad=True)
    loss = compute_mask_loss(probabilities, 1 - probabilities.detach())
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(probabilities.grad).all()
