"""The branch: a fresh one changes nothing, features are per slice, shapes are checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from progidiff.errors import GeometryError
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig, SliceFeatures
from progidiff.training.build_model import create_branch


@pytest.fixture(scope="module")
def backbone(tiny_model: Path) -> Backbone:
    return Backbone(tiny_model / "backbone", device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def fresh(backbone: Backbone) -> ConditioningBranch:
    return create_branch(backbone, 32, 64, (4.0, 12.0), channels=(8, 8, 16, 16, 16), evidence_channels=16).eval()


def draw_slices(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def test_a_fresh_branch_changes_nothing_bit_exact(backbone: Backbone, fresh: ConditioningBranch):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 4, 8, generator=generator)
    tokens, mask, _ = backbone.encode_text(["mask of the liver", "mask of the left kidney"])
    down, middle = fresh.compute_residuals(
        fresh.encode_slices(draw_slices(2)), torch.rand(2, 1, 32, 64, generator=generator)
    )
    plain = backbone.unet(latents, 500, tokens, encoder_attention_mask=mask).sample
    conditioned = backbone.unet(
        latents,
        500,
        tokens,
        encoder_attention_mask=mask,
        down_block_additional_residuals=tuple(down),
        mid_block_additional_residual=middle,
    ).sample
    assert torch.equal(plain, conditioned)


def test_a_fresh_branch_learns_although_its_residuals_are_zero(fresh: ConditioningBranch):
    down, middle = fresh.compute_residuals(fresh.encode_slices(draw_slices(1)), torch.full((1, 1, 32, 64), 0.5))
    (sum(r.sum() for r in down) + middle.sum()).backward()
    assert all(conv.weight.grad.abs().max() > 0 for conv in fresh.zero)
    fresh.zero_grad()


@torch.no_grad()
def test_residuals_have_the_shape_of_the_denoisers_slots(backbone: Backbone, fresh: ConditioningBranch):
    down, middle = fresh.compute_residuals(fresh.encode_slices(draw_slices(2)), torch.rand(2, 1, 32, 64))
    channels, strides = backbone.residual_slots()
    assert [tuple(r.shape) for r in [*down, middle]] == [
        (2, c, 32 // s, 64 // s) for c, s in zip(channels, strides, strict=True)
    ]


@torch.no_grad()
def test_a_fresh_query_head_finds_every_structure_absent(backbone: Backbone, fresh: ConditioningBranch):
    _, _, pooled = backbone.encode_text(["mask of the liver", "mask of the aorta"])
    evidence = fresh.predict_evidence(fresh.encode_slices(draw_slices(3)), pooled).sigmoid()
    assert evidence.shape == (3, 2, 32, 64)
    assert float(evidence.mean()) < 0.2


@torch.no_grad()
def test_a_prompt_is_answered_the_same_whatever_else_is_asked(backbone: Backbone, fresh: ConditioningBranch):
    _, _, pooled = backbone.encode_text(["mask of the liver", "mask of the aorta", "mask of the spleen"])
    features = fresh.encode_slices(draw_slices(2))
    together = fresh.predict_evidence(features, pooled)
    torch.testing.assert_close(fresh.predict_evidence(features, pooled[1:2])[:, 0], together[:, 1], atol=1e-5, rtol=0)
    per_slice = fresh.predict_evidence(features, pooled.expand(2, -1, -1))
    torch.testing.assert_close(per_slice, together, atol=1e-5, rtol=0)


@torch.no_grad()
def test_features_of_a_slice_do_not_depend_on_the_other_slices_of_the_batch(fresh: ConditioningBranch):
    slices = draw_slices(4)
    together = fresh.encode_slices(slices)
    alone = SliceFeatures.concatenate([fresh.encode_slices(slices[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(together.fine, alone.fine, atol=1e-5, rtol=0)
    torch.testing.assert_close(together.coarse, alone.coarse, atol=1e-5, rtol=0)
    for stride, level in together.levels.items():
        torch.testing.assert_close(level, alone.levels[stride], atol=1e-5, rtol=0)


@torch.no_grad()
def test_slots_coarser_than_the_encoder_read_its_average(fresh: ConditioningBranch):
    deep = replace(
        fresh.config, slot_channels=(8, 8, 8), slot_strides=(8, 16, 32), height=32, width=64, channels=(8, 8, 16, 16)
    )
    branch = ConditioningBranch(deep).eval()
    features = branch.encode_slices(draw_slices(1))
    assert {s: tuple(f.shape[-2:]) for s, f in features.levels.items()} == {8: (4, 8), 16: (2, 4), 32: (1, 2)}
    down, middle = branch.compute_residuals(features, torch.rand(1, 1, 32, 64))
    assert [tuple(r.shape[-2:]) for r in [*down, middle]] == [(4, 8), (2, 4), (1, 2)]


def test_slices_of_another_shape_are_refused_with_both_shapes(fresh: ConditioningBranch):
    with pytest.raises(GeometryError, match=r"\(3, 64, 64\) do not fit this branch, which was built for \(3, 32, 64\)"):
        fresh.encode_slices(torch.zeros(1, 3, 64, 64))


def test_a_working_grid_that_the_encoder_cannot_halve_is_refused(fresh: ConditioningBranch):
    with pytest.raises(GeometryError, match="40 x 64 does not divide by 16; use multiples of 16"):
        ConditioningBranch(replace(fresh.config, height=40))


def test_a_configuration_survives_its_json(fresh: ConditioningBranch):
    import json

    assert ConditioningConfig.from_dict(json.loads(json.dumps(fresh.config.to_dict()))) == fresh.config
