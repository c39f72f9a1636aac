"""The close-up network: what starts as no change, what edits may do, and what depends on what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from progidiff.errors import ModelError
from progidiff.model.close_up import (
    EDIT_CHANNELS,
    CloseUpNetwork,
    DenoiserWidths,
    ShuffleCodec,
    WindowBatch,
    create_network,
)
from progidiff.model.close_up_folder import CloseUpCard, has_close_up, load_close_up, save_close_up
from progidiff.model.close_up_pipeline import CloseUpPipeline
from support.networks import fill_zeros

SIZE = 32
WIDTHS = DenoiserWidths(channels=(16, 16), heads=2, text_features=24)


@pytest.fixture
def fresh() -> CloseUpNetwork:
    return create_network(24, WIDTHS, channels=(8, 8, 16), condition_width=16, injection_width=8).eval()


@pytest.fixture
def trained(fresh: CloseUpNetwork) -> CloseUpNetwork:
    return fill_zeros(fresh)


def make_batch(count: int = 2, seed: int = 0, edits: bool = False) -> WindowBatch:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(count, len(EDIT_CHANNELS), SIZE, SIZE)
    if edits:
        drawn[:, 0, 10:14, 10:14] = 1
    return WindowBatch(
        images=torch.rand(count, 5, SIZE, SIZE, generator=generator) * 2 - 1,
        evidence=torch.rand(count, 3, SIZE, SIZE, generator=generator),
        is_found=torch.ones(count),
        edits=drawn if edits else None,
        pooled=nn.functional.normalize(torch.randn(count, 24, generator=generator), dim=1),
        spacing=torch.tensor([[1.3, 3.0]]).expand(count, 2),
    )


def propose(network: CloseUpNetwork, batch: WindowBatch, count: int = 3, steps: int = 1, seed: int = 0) -> torch.Tensor:
    pipeline = CloseUpPipeline(network)
    tokens = torch.ones(len(batch), 4, 24)
    noise, levels = pipeline.draw_noise(count, seed), pipeline.draw_levels(count, seed)
    return pipeline.propose(batch, tokens, None, noise, levels, steps)[1]


def test_the_codec_loses_nothing() -> None:
    masks = torch.rand(3, 32, 48)
    codec = ShuffleCodec(4)
    latents = codec.encode_masks(masks)
    assert latents.shape == (3, 16, 8, 12)
    assert torch.allclose((codec.decode_signed(latents) + 1) / 2, masks, atol=1e-6)


def test_a_fresh_network_answers_with_the_level_sets_of_the_evidence(fresh: CloseUpNetwork) -> None:
    batch = make_batch()
    levels = CloseUpPipeline(fresh).draw_levels(3, 0)
    expected = (torch.logit(batch.evidence[:, 1], eps=5e-3)[:, None] + levels[None, :, None, None]).sigmoid()
    for steps in (1, 4):
        assert torch.allclose(propose(fresh, batch, steps=steps), expected, atol=1e-5)


def test_the_injection_of_a_fresh_network_is_exactly_zero(fresh: CloseUpNetwork) -> None:
    down, middle = fresh.compute_residuals(fresh.encode(make_batch()))
    assert all(not residual.any() for residual in (*down, middle))


def test_edits_that_say_nothing_change_nothing_bit_for_bit(trained: CloseUpNetwork) -> None:
    batch = make_batch()
    blank = replace(batch, edits=torch.zeros(2, len(EDIT_CHANNELS), SIZE, SIZE))
    assert torch.equal(propose(trained, batch), propose(trained, blank))
    assert not torch.equal(propose(trained, batch), propose(trained, make_batch(edits=True)))


def test_edits_reach_a_fresh_network_by_training_alone(fresh: CloseUpNetwork) -> None:
    assert torch.equal(propose(fresh, make_batch()), propose(fresh, make_batch(edits=True)))
    fresh.requires_grad_(True)
    with torch.no_grad():
        fresh.query.weight.normal_(std=0.1)
    fresh.encode(make_batch(edits=True)).logits.sum().backward()
    assert all(conv.weight.grad is not None and conv.weight.grad.any() for conv in fresh.encoder.edits_in)


def test_proposal_k_is_the_same_whatever_k_and_in_any_batch(trained: CloseUpNetwork) -> None:
    batch = make_batch(3)
    three, five = propose(trained, batch, 3), propose(trained, batch, 5)
    assert torch.allclose(three, five[:, :3], atol=1e-5)
    alone = WindowBatch(
        batch.images[1:2], batch.evidence[1:2], batch.is_found[1:2], None, batch.pooled[1:2], batch.spacing[1:2]
    )
    assert torch.allclose(propose(trained, alone), three[1:2], atol=1e-5)
    assert not torch.allclose(three, propose(trained, batch, 3, seed=1), atol=1e-2)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_what_half_of_the_proposals_draw_is_what_the_sharpened_evidence_draws(
    trained: CloseUpNetwork, count: int
) -> None:
    batch, pipeline = make_batch(3), CloseUpPipeline(trained)
    noise, levels = pipeline.draw_noise(count, 0), pipeline.draw_levels(count, 0)
    sharpened, drawn = pipeline.propose(batch, torch.ones(3, 4, 24), None, noise, levels, 2)
    assert torch.equal(drawn[:, 0], sharpened)
    assert torch.equal((drawn >= 0.5).float().mean(1) >= 0.5, sharpened >= 0.5)
    assert (drawn[:, 1::2] <= sharpened[:, None]).all()  # cautious
    assert (drawn[:, 2::2] >= sharpened[:, None]).all()  # generous
    if count > 1:
        level_sets = (torch.logit(sharpened)[:, None] + levels[None, :, None, None]).sigmoid()
        assert not torch.allclose(drawn, level_sets, atol=1e-3)


def test_where_presence_is_in_doubt_only_generous_proposals_draw(trained: CloseUpNetwork) -> None:
    batch = make_batch(3)
    plain = CloseUpPipeline(trained)
    noise, levels = plain.draw_noise(5, 0), plain.draw_levels(5, 0)
    tokens = torch.ones(3, 4, 24)
    sharpened, drawn = plain.propose(batch, tokens, None, noise, levels)
    peaks = sharpened.amax(dim=(1, 2))
    doubtful = int(peaks.argmin())
    asking = CloseUpPipeline(trained, presence=float(peaks.sort().values[:2].mean()))
    same, gated = asking.propose(batch, tokens, None, noise, levels)
    assert torch.equal(same, sharpened)
    expected = drawn.clone()
    expected[doubtful, levels <= 0] = 0
    assert torch.equal(gated, expected)
    assert (gated[doubtful] >= 0.5).float().mean(0).max() < 0.5


@pytest.mark.parametrize("kind", ["drawn", "not looked for"])
def test_presence_is_not_asked_where_a_person_drew_or_nothing_looked_before(trained: CloseUpNetwork, kind: str) -> None:
    batch = make_batch(2, edits=kind == "drawn")
    batch = batch if kind == "drawn" else replace(batch, is_found=torch.zeros(2))
    plain, asking = CloseUpPipeline(trained), CloseUpPipeline(trained, presence=1.0)
    rest = torch.ones(2, 4, 24), None, plain.draw_noise(3, 0), plain.draw_levels(3, 0)
    assert torch.equal(asking.propose(batch, *rest)[1], plain.propose(batch, *rest)[1])
    if batch.edits is not None:
        batch.edits[1] = 0
        assert not asking.propose(batch, *rest)[1][1, 0].any()


def test_without_evidence_the_image_decides(trained: CloseUpNetwork) -> None:
    batch = replace(make_batch(), is_found=torch.zeros(2))
    other = replace(batch, evidence=torch.rand(2, 3, SIZE, SIZE))
    assert torch.equal(propose(trained, batch), propose(trained, other))


def test_text_pixel_size_and_slice_distance_are_heard(trained: CloseUpNetwork) -> None:
    batch = make_batch()
    for changed in (
        replace(batch, pooled=batch.pooled.flip(0)),
        replace(batch, spacing=batch.spacing * torch.tensor([2.0, 1.0])),
        replace(batch, spacing=batch.spacing * torch.tensor([1.0, 2.0])),
    ):
        assert not torch.allclose(propose(trained, batch), propose(trained, changed), atol=1e-4)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "epsilon"])
def test_every_kind_of_prediction_comes_to_the_same_clean_latents(fresh: CloseUpNetwork, kind: str) -> None:
    class Answers(nn.Module):
        dtype = torch.float32
        answer: torch.Tensor

        def forward(self, latents: torch.Tensor, *_: object, **__: object) -> object:
            return type("Output", (), {"sample": self.answer})

    fresh.scheduler.register_to_config(prediction_type=kind)
    clean, noise, time = torch.randn(2, 16, 8, 8), torch.randn(2, 16, 8, 8), 400
    signal, strength = fresh.noise_level(time)
    fresh.unet = Answers()
    fresh.unet.answer = {"sample": clean, "v_prediction": signal * noise - strength * clean, "epsilon": noise}[kind]
    found = fresh.predict(signal * clean + strength * noise, time, torch.ones(2, 4, 24), None, ([], torch.zeros(1)))
    assert torch.allclose(found, clean, atol=1e-4)


def test_guidance_one_is_no_guidance_and_others_move_away_from_the_empty_text(trained: CloseUpNetwork) -> None:
    pipeline, batch = CloseUpPipeline(trained), make_batch()
    tokens, empty = torch.ones(2, 4, 24), (torch.zeros(1, 1, 24), None)
    noise, levels = pipeline.draw_noise(2, 0), pipeline.draw_levels(2, 0)
    plain = pipeline.propose(batch, tokens, None, noise, levels)[1]
    assert torch.equal(plain, pipeline.propose(batch, tokens, None, noise, levels, 1, 1.0, empty)[1])
    assert not torch.allclose(plain, pipeline.propose(batch, tokens, None, noise, levels, 1, 4.0, empty)[1], atol=1e-6)


def test_levels_hold_cautious_and_generous_readings(fresh: CloseUpNetwork) -> None:
    levels = CloseUpPipeline(fresh).draw_levels(4, 0)
    assert levels.min() < -0.3
    assert levels.max() > 0.3
    assert torch.equal(levels, CloseUpPipeline(fresh).draw_levels(16, 0)[:4])


@pytest.mark.parametrize("count", range(1, 17))
def test_what_half_of_the_level_sets_hold_is_the_plain_answer(fresh: CloseUpNetwork, count: int) -> None:
    levels = CloseUpPipeline(fresh).draw_levels(count, 3)
    logits = torch.linspace(-4, 4, 41)
    votes = (logits[None] + levels[:, None] > 0).float().mean(0)
    assert torch.equal(votes >= 0.5, logits > 0)


def test_a_close_up_is_what_it_was_after_a_round_through_the_disk(trained: CloseUpNetwork, tmp_path: Path) -> None:
    assert not has_close_up(tmp_path)
    card = CloseUpCard(trained.config, finder="abc", structures=("liver",), facts={"note": "random"})
    save_close_up(tmp_path, card, trained, half=False)
    found, network = load_close_up(tmp_path, torch.device("cpu"))
    assert found == card
    assert torch.equal(propose(trained, make_batch()), propose(network, make_batch()))
    assert has_close_up(tmp_path)


def test_a_damaged_close_up_is_refused_with_the_cure(trained: CloseUpNetwork, tmp_path: Path) -> None:
    save_close_up(tmp_path, CloseUpCard(trained.config), trained)
    path = tmp_path / "close_up" / "branch.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ModelError, match="restore it from the version"):
        load_close_up(tmp_path, torch.device("cpu"))
    (tmp_path / "close_up" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="format None"):
        load_close_up(tmp_path, torch.device("cpu"))
