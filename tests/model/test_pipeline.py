"""Proposals for a batch of slices: determinism, independence, and a sampler that ends where it should."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from progidiff.errors import RequestError
from progidiff.model.backbone import Backbone
from progidiff.model.codec import MaskCodec
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import load_pipeline
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline, create_scheduler


@pytest.fixture(scope="module", params=[(0.0, 0.0), (1.2, 1.0)], ids=["noise-alone", "spread"])
def pipeline(tiny_model: Path, request: pytest.FixtureRequest) -> ProposalPipeline:
    loaded = load_pipeline(tiny_model, Backbone(tiny_model / "backbone", device="cpu", dtype="fp32"))[1]
    loaded.evidence_weight, loaded.evidence_spread = 2.0, request.param if any(request.param) else None
    return loaded


@pytest.fixture(scope="module")
def prompts(pipeline: ProposalPipeline) -> EncodedPrompts:
    return pipeline.encode_prompts(["liver", "left kidney", "inferior vena cava"])


@pytest.fixture(scope="module")
def features(pipeline: ProposalPipeline) -> SliceFeatures:
    return pipeline.encode_slices(torch.rand(3, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1)


def propose(
    pipeline: ProposalPipeline,
    features: SliceFeatures,
    prompts: EncodedPrompts,
    pairs: list[tuple[int, int]],
    **options: Any,
) -> Tensor:
    count, seed = options.pop("num_proposals", 2), options.pop("seed", 0)
    evidence = pipeline.predict_evidence(features, prompts)
    noise, offsets = pipeline.draw_noise(count, seed), pipeline.draw_offsets(count, seed)
    return pipeline.propose(
        features, evidence, prompts, pairs, noise, options.pop("num_inference_steps", 2), offsets=offsets, **options
    )


class ExactDenoiser(nn.Module):
    """Knows the clean latent and answers with the exact prediction for it: whatever the sampler then misses is the
    sampler's fault.
    """

    def __init__(self, unet: Any, scheduler: Any, clean: Tensor, prediction_type: str = "v_prediction") -> None:
        super().__init__()
        self.config, self.dtype = unet.config, torch.float32
        self.alphas, self.clean, self.prediction_type = scheduler.alphas_cumprod, clean, prediction_type
        self.calls: list[dict[str, Any]] = []

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor, **conditions: Any) -> SimpleNamespace:
        self.calls.append({"timestep": int(timestep), "tokens": tokens, **conditions})
        alpha = self.alphas[int(timestep)]
        noise = (latents - alpha.sqrt() * self.clean) / (1 - alpha).sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * self.clean
        return SimpleNamespace(sample=v if self.prediction_type == "v_prediction" else self.clean.expand_as(latents))


def with_exact_denoiser(
    pipeline: ProposalPipeline, prediction_type: str = "v_prediction"
) -> tuple[ProposalPipeline, Tensor]:
    mask = torch.zeros(1, 32, 64)
    mask[:, 8:24, 16:40] = 1
    clean = pipeline.codec.encode_masks(mask)
    overrides = {"prediction_type": prediction_type}
    scheduler = create_scheduler(pipeline.backbone, overrides)
    unet = ExactDenoiser(pipeline.unet, scheduler, clean, prediction_type)
    return ProposalPipeline(pipeline.backbone, pipeline.branch, pipeline.codec, overrides, unet=unet), clean


@pytest.mark.parametrize("steps", range(1, 9))
def test_with_an_exact_denoiser_1_to_8_steps_end_on_the_clean_latent(
    pipeline, features, prompts, steps: int, monkeypatch: pytest.MonkeyPatch
):
    exact, clean = with_exact_denoiser(pipeline)
    ends: list[Tensor] = []
    decode = MaskCodec.decode_latents
    monkeypatch.setattr(
        MaskCodec, "decode_latents", lambda codec, latents: ends.append(latents) or decode(codec, latents)
    )
    result = propose(exact, features, prompts, [(0, 0), (2, 1)], num_inference_steps=steps, num_proposals=3)
    torch.testing.assert_close(ends[0], clean.expand(6, -1, -1, -1), atol=1e-4, rtol=0)
    torch.testing.assert_close(result, decode(exact.codec, clean)[None].expand(2, 3, -1, -1), atol=1e-3, rtol=0)
    assert len(exact.unet.calls) == steps


def test_prediction_of_the_clean_latent_works_as_well(pipeline, features, prompts):
    exact, clean = with_exact_denoiser(pipeline, "sample")
    result = propose(exact, features, prompts, [(1, 1)], num_inference_steps=4)
    torch.testing.assert_close(result[0, 0], exact.codec.decode_latents(clean)[0], atol=1e-3, rtol=0)


def test_noise_prediction_is_refused_at_zero_terminal_snr(pipeline):
    with pytest.raises(RequestError, match="use 'v_prediction' or 'sample'"):
        create_scheduler(pipeline.backbone, {"prediction_type": "epsilon"})


def test_sampling_starts_from_pure_noise(pipeline):
    assert float(pipeline.scheduler.alphas_cumprod[-1]) == pytest.approx(0, abs=1e-12)
    pipeline.scheduler.set_timesteps(1)
    assert pipeline.scheduler.timesteps.tolist() == [999]


@pytest.mark.parametrize("steps", range(1, 9))
def test_1_to_8_steps_give_probabilities(pipeline, features, prompts, steps: int):
    result = propose(pipeline, features, prompts, [(0, 0)], num_inference_steps=steps)
    assert result.shape == (1, 2, 32, 64)
    assert 0 <= float(result.min()) <= float(result.max()) <= 1


def test_the_same_seed_gives_the_same_proposals_twice(pipeline, features, prompts):
    assert torch.equal(
        propose(pipeline, features, prompts, [(0, 0), (1, 2)]), propose(pipeline, features, prompts, [(0, 0), (1, 2)])
    )


def test_the_same_seed_gives_the_same_proposals_alone_and_in_a_batch(pipeline, features, prompts):
    pairs = [(0, 0), (1, 0), (1, 2), (2, 1)]
    together = propose(pipeline, features, prompts, pairs)
    for pair, masks in zip(pairs, together, strict=True):
        torch.testing.assert_close(propose(pipeline, features, prompts, [pair])[0], masks, atol=1e-4, rtol=0)


def test_proposal_k_is_the_same_for_any_number_of_proposals(pipeline, features, prompts):
    assert torch.equal(pipeline.draw_noise(8, 5)[:3], pipeline.draw_noise(3, 5))
    many = propose(pipeline, features, prompts, [(1, 1)], num_proposals=6)
    few = propose(pipeline, features, prompts, [(1, 1)], num_proposals=2)
    torch.testing.assert_close(many[:, :2], few, atol=1e-4, rtol=0)


def test_a_prompt_gives_the_same_proposals_alone_and_among_others(pipeline, features, prompts):
    alone = pipeline.encode_prompts(["left kidney"])
    torch.testing.assert_close(
        propose(pipeline, features, alone, [(1, 0)]), propose(pipeline, features, prompts, [(1, 1)]), atol=1e-4, rtol=0
    )


def test_the_noise_is_the_same_on_every_slice(pipeline, features, prompts):
    twins = features[torch.tensor([0, 0])]
    first, second = propose(pipeline, twins, prompts, [(0, 0), (1, 0)])
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


def test_another_seed_and_another_proposal_draw_other_noise(pipeline, features, prompts):
    noise = pipeline.draw_noise(3, 0)
    assert not torch.equal(noise[0], noise[1])
    assert not torch.equal(noise, pipeline.draw_noise(3, 1))
    # Neither is a shifted copy of the other, as it would be if seed + k made the noise.
    assert not torch.equal(noise[1], pipeline.draw_noise(1, 1)[0])
    assert not torch.equal(
        propose(pipeline, features, prompts, [(0, 0)], seed=0), propose(pipeline, features, prompts, [(0, 0)], seed=1)
    )


def test_offsets_belong_to_proposal_and_seed_and_are_stratified(pipeline):
    offsets = pipeline.draw_offsets(8, 5)
    if pipeline.evidence_spread is None:
        assert offsets is None
        return
    assert offsets.shape == (8, 32, 64)
    assert torch.equal(offsets[:3], pipeline.draw_offsets(3, 5))
    assert not torch.equal(offsets, pipeline.draw_offsets(8, 6))
    shifts = pipeline.draw_offsets(4, 5).mean((1, 2))
    fields_off = ProposalPipeline(
        pipeline.backbone, pipeline.branch, pipeline.codec, evidence_spread=(0.0, 1.0)
    ).draw_offsets(4, 5)
    assert torch.equal(fields_off.std((1, 2)), torch.zeros(4))  # a shift alone is the same everywhere
    assert (fields_off[:, 0, 0] > 0).sum() == 2  # four proposals: two generous, two cautious
    assert shifts.std() > 0


def test_a_generous_offset_draws_more_and_a_cautious_one_less(pipeline, features, prompts):
    evidence = pipeline.predict_evidence(features, prompts)
    noise = pipeline.draw_noise(1, 0).repeat(3, 1, 1, 1)
    offsets = torch.tensor([-2.0, 0.0, 2.0]).view(3, 1, 1).expand(3, 32, 64)
    cautious, plain, generous = pipeline.propose(features, evidence, prompts, [(0, 0)], noise, 2, offsets=offsets)[0]
    assert cautious.sum() < plain.sum() < generous.sum()
    # No offset is what an offset of nothing is.
    torch.testing.assert_close(
        plain, pipeline.propose(features, evidence, prompts, [(0, 0)], noise[:1], 2)[0, 0], atol=1e-3, rtol=0
    )


def test_other_networks_keep_the_settings(pipeline):
    other = pipeline.with_networks(pipeline.branch, pipeline.unet)
    assert (other.evidence_weight, other.evidence_spread) == (pipeline.evidence_weight, pipeline.evidence_spread)
    assert other.scheduler.config == pipeline.scheduler.config


def test_drawing_noise_leaves_the_global_random_state_alone(pipeline):
    before = torch.get_rng_state()
    pipeline.draw_noise(2, 0)
    pipeline.draw_offsets(2, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_guidance_drops_the_text_and_never_the_image_evidence(pipeline, features, prompts):
    exact, _ = with_exact_denoiser(pipeline)
    propose(exact, features, prompts, [(0, 1)], num_inference_steps=1, guidance_scale=3.0)
    full, dropped = exact.unet.calls
    assert torch.equal(dropped["tokens"], prompts.empty_tokens.expand(2, -1, -1))
    assert torch.equal(full["tokens"][0], prompts.tokens[1])
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            full["down_block_additional_residuals"], dropped["down_block_additional_residuals"], strict=True
        )
    )
    assert torch.equal(full["mid_block_additional_residual"], dropped["mid_block_additional_residual"])


def test_guidance_of_one_calls_the_denoiser_once_per_step(pipeline, features, prompts):
    exact, _ = with_exact_denoiser(pipeline)
    propose(exact, features, prompts, [(0, 1)], num_inference_steps=3, guidance_scale=1.0)
    assert len(exact.unet.calls) == 3


def test_no_pairs_give_no_proposals(pipeline, features, prompts):
    assert propose(pipeline, features, prompts, []).shape == (0, 2, 32, 64)


def test_bf16_weights_run_on_the_cpu(tiny_model: Path):
    pipeline = load_pipeline(tiny_model, Backbone(tiny_model / "backbone", device="cpu", dtype="bf16"))[1]
    features = pipeline.encode_slices(torch.zeros(1, 3, 32, 64))
    result = propose(pipeline, features, pipeline.encode_prompts(["liver"]), [(0, 0)])
    assert result.dtype == torch.float32
    assert torch.isfinite(result).all()
