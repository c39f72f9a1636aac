"""The sampler is a function of its arguments, and shapes are checked while tests run."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from diffusers import DDIMScheduler

from progidiff.model.sampling import guide, sample


def halve(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return latents / 2


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(prediction_type="sample", timestep_spacing="trailing", clip_sample=False)


def test_what_is_sampled_does_not_depend_on_what_was_sampled_before():
    noise = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    scheduler = make_scheduler()
    first = sample(halve, scheduler, noise, 4)
    sample(halve, scheduler, noise, 7)
    assert torch.equal(sample(halve, scheduler, noise, 4), first)
    assert torch.equal(sample(halve, make_scheduler(), noise, 1), noise / 2)


def test_a_guidance_of_one_asks_the_network_once_and_others_go_beyond_the_text():
    def refuse(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        raise AssertionError("asked without the text")

    assert guide(halve, refuse, 1.0) is halve
    latents = torch.ones(1, 1, 1, 1)
    guided = guide(halve, lambda latents, timestep: latents * 0.25, 3.0)(latents, torch.tensor(0))
    assert guided.item() == pytest.approx(0.25 + 3 * 0.25)


def test_a_wrong_shape_is_noticed_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError, match="M c h w"):
        sample(halve, make_scheduler(), torch.zeros(4, 3, 5), 1)
