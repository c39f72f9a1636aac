"""The close-up on a Stable-Diffusion folder: what starts as no change, what is shared, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from progidiff.errors import ModelError, RequestError
from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.close_up import CloseUpNetwork, ShuffleCodec, WindowBatch
from progidiff.model.close_up_backbone import (
    create_network_on,
    find_native_size,
    lend_denoiser,
    plan_network_on,
    recomputing,
)
from progidiff.model.close_up_folder import CloseUpCard, load_close_up, load_close_up_card, save_close_up
from progidiff.model.close_up_pipeline import LATTICE, CloseUpPipeline
from progidiff.model.codec import WINDOW_PIXELS, AutoencoderCodec
from progidiff.model.folder import compute_backbone_digest
from support.networks import fill_zeros
from support.toy_stable_diffusion import TOY_VAE, write_toy_stable_diffusion

CPU = torch.device("cpu")
SIZE = 64
SMALL: dict[str, Any] = {"channels": (8, 8, 16, 16, 16), "condition_width": 16, "injection_width": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_stable_diffusion(tmp_path_factory.mktemp("sd") / "backbone")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone(folder, "cpu", "fp32")


@pytest.fixture
def fresh(backbone: Backbone) -> CloseUpNetwork:
    return create_network_on(backbone, **SMALL).eval()


@pytest.fixture
def trained(fresh: CloseUpNetwork) -> CloseUpNetwork:
    return fill_zeros(fresh)


def make_batch(count: int = 2) -> WindowBatch:
    generator = torch.Generator().manual_seed(0)
    return WindowBatch(
        images=torch.rand(count, 5, SIZE, SIZE, generator=generator) * 2 - 1,
        evidence=torch.rand(count, 3, SIZE, SIZE, generator=generator),
        is_found=torch.ones(count),
        edits=None,
        pooled=nn.functional.normalize(torch.randn(count, 32, generator=generator), dim=1),
        spacing=torch.tensor([[0.7, 3.0]]).expand(count, 2),
    )


def propose(network: CloseUpNetwork, backbone: Backbone, count: int = 4, steps: int = 1) -> tuple[Tensor, Tensor]:
    pipeline, batch = CloseUpPipeline(network), make_batch()
    tokens, mask, _ = backbone.encode_text(["liver", "spleen"])
    noise, levels = pipeline.draw_noise(count, 0), pipeline.draw_levels(count, 0)
    return pipeline.propose(batch, tokens, mask, noise, levels, steps)


def test_masks_become_the_latents_that_the_denoiser_was_trained_on(backbone: Backbone):
    codec, masks = AutoencoderCodec(backbone.vae), (torch.rand(2, SIZE, SIZE) > 0.5).float()
    with torch.no_grad():
        latents = codec.encode_masks(masks)
        mode = backbone.vae.encode((masks * 2 - 1)[:, None].repeat(1, 3, 1, 1)).latent_dist.mode()
        picture = backbone.vae.decode(mode).sample
    assert latents.shape == (2, 4, SIZE // 8, SIZE // 8)
    torch.testing.assert_close(latents, mode * 0.18215)
    torch.testing.assert_close(codec.decode_signed(latents), picture.mean(1), atol=1e-4, rtol=1e-3)
    assert torch.equal(latents, codec.encode_masks(masks))


def test_many_windows_are_decoded_a_few_at_a_time_and_come_out_the_same(backbone: Backbone):
    codec, side = AutoencoderCodec(backbone.vae), 256 // 8
    latents = torch.randn(WINDOW_PIXELS // 256**2 + 1, 4, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        apart = torch.cat([codec.decode_signed(one[None]) for one in latents])
        torch.testing.assert_close(codec.decode_signed(latents), apart, atol=1e-4, rtol=1e-3)


def test_the_autoencoder_keeps_its_precision_where_fp16_would_overflow():
    codec = AutoencoderCodec(AutoencoderKL(**TOY_VAE).eval())
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = codec.decode_signed(latents)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(codec.decode_signed(latents), plain)


def test_a_fresh_branch_leaves_the_denoiser_as_it_is_bit_for_bit(fresh: CloseUpNetwork, backbone: Backbone):
    features = fresh.encode(make_batch())
    tokens, mask, _ = backbone.encode_text(["liver", "spleen"])
    latents, answers = torch.randn(2, 4, SIZE // 8, SIZE // 8), []
    handle = backbone.unet.register_forward_hook(lambda module, given, answer: answers.append(answer.sample))
    with torch.no_grad():
        fresh.predict(latents, 600, tokens, mask, fresh.compute_residuals(features))
        handle.remove()
        assert torch.equal(answers[0], backbone.unet(latents, 600, tokens).sample)


def test_an_injection_that_is_no_longer_zero_steers_it(trained: CloseUpNetwork, backbone: Backbone):
    first = propose(trained, backbone)[1]
    with torch.no_grad():
        for conv in trained.zero:
            conv.get_parameter("weight").zero_()
            conv.get_parameter("bias").zero_()
    assert not torch.equal(propose(trained, backbone)[1], first)


def test_the_denoiser_is_shared_frozen_and_no_part_of_the_network(fresh: CloseUpNetwork, backbone: Backbone):
    assert fresh.unet is backbone.unet
    assert not [name for name in fresh.state_dict() if name.startswith(("unet", "codec"))]
    own = {id(parameter) for parameter in fresh.parameters()}
    assert not own & {id(parameter) for part in (backbone.unet, backbone.vae) for parameter in part.parameters()}
    fresh.train().requires_grad_(True)
    assert not backbone.unet.training
    assert not any(p.requires_grad for part in (backbone.unet, backbone.vae) for p in part.parameters())


@pytest.mark.parametrize("steps", [1, 3])
def test_whatever_the_denoiser_answers_a_proposal_only_adds_or_only_takes_away(
    trained: CloseUpNetwork, backbone: Backbone, steps: int
):
    sharpened, drawn = propose(trained, backbone, count=5, steps=steps)
    levels = CloseUpPipeline(trained).draw_levels(5, 0)
    assert torch.equal(drawn[:, 0], sharpened)
    for k, level in enumerate(levels.tolist()):
        assert ((drawn[:, k] >= sharpened) if level >= 0 else (drawn[:, k] <= sharpened)).all()
    most = (drawn >= 0.5).float().mean(dim=1) >= 0.5
    assert torch.equal(most, sharpened >= 0.5)


def test_a_denoiser_that_gives_back_what_it_is_shown_draws_level_sets(fresh: CloseUpNetwork):
    """With a codec that keeps signs; what the autoencoder loses comes on top."""

    class Kept(ShuffleCodec):
        def encode_masks(self, masks: Tensor) -> Tensor:
            self.last = super().encode_masks(masks)
            return self.last

    codec = Kept(8)
    fresh.lend(fresh.unet, codec)
    fresh.predict = lambda latents, time, **_: codec.last  # type: ignore[method-assign, assignment]
    base, levels = torch.randn(1, SIZE, SIZE) * 3, torch.tensor([1.5, -1.5, 0.4])
    tokens, noise = torch.zeros(1, 2, 32), torch.zeros(3, 64, 8, 8)
    empty = ([torch.zeros(1)], torch.zeros(1))
    drawn = fresh.draw(base, tokens, None, noise, levels, empty)
    assert torch.equal(drawn > 0, base + levels[:, None, None] > 0)


def test_proposal_k_is_the_same_whatever_k(trained: CloseUpNetwork, backbone: Backbone):
    torch.testing.assert_close(propose(trained, backbone, 2)[1], propose(trained, backbone, 4)[1][:, :2])


def test_the_noise_covers_a_window_of_the_native_size(backbone: Backbone):
    network = create_network_on(backbone, 512, **SMALL)
    assert CloseUpPipeline(network).draw_noise(2, 0).shape == (2, 4, 64, 64)
    network = create_network_on(backbone, **SMALL)
    assert CloseUpPipeline(network).draw_noise(2, 0).shape == (2, 4, LATTICE, LATTICE)


def test_gradients_flow_through_the_frozen_autoencoder_into_the_injection(fresh: CloseUpNetwork, backbone: Backbone):
    def find_gradients() -> list[Tensor]:
        fresh.zero_grad()
        features = fresh.encode(make_batch())
        tokens, mask, _ = backbone.encode_text(["liver", "spleen"])
        noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        drawn = fresh.draw(
            features.logits.detach(), tokens, mask, noise, torch.tensor([2.0, 2.0]), fresh.compute_residuals(features)
        )
        drawn.sigmoid().mean().backward()
        return [conv.get_parameter("weight").grad.clone() for conv in fresh.zero]  # type: ignore[union-attr]

    plain = find_gradients()
    assert all(gradient.any() for gradient in plain)
    with recomputing(fresh):
        again = find_gradients()
    for one, other in zip(again, plain, strict=True):
        torch.testing.assert_close(one, other)
    assert not backbone.unet.is_gradient_checkpointing


def test_the_native_size_is_what_the_denoiser_says(backbone: Backbone, tmp_path: Path):
    assert find_native_size(backbone) == SIZE
    oblong = write_toy_stable_diffusion(tmp_path / "oblong", sample_size=(8, 16))
    assert find_native_size(Backbone(oblong, "cpu")) == SIZE
    assert plan_network_on(backbone).native_size == SIZE
    assert plan_network_on(backbone).channels == (16, 32, 64, 128, 192)


def test_slots_of_true_stable_diffusion_read_levels_of_their_own_stride(backbone: Backbone):
    wide = Backbone(backbone.folder, "cpu")
    wide.unet_config = {**backbone.unet_config, "block_out_channels": (320, 640, 1280, 1280), "sample_size": 64}
    config = plan_network_on(wide)
    assert config.native_size == 512
    assert len(config.channels) == 7
    assert max(config.slot_strides) == 64


def test_a_denoiser_without_a_size_needs_one_to_be_set(tiny_model: Path):
    backbone = Backbone(tiny_model / "backbone", "cpu")
    with pytest.raises(RequestError, match=r"names no sample_size.* set close_up.pixels"):
        plan_network_on(backbone)
    assert plan_network_on(backbone, 96).native_size == 96


@pytest.mark.parametrize("pixels", [8, 40, 4096])
def test_windows_that_the_denoiser_cannot_halve_are_refused(backbone: Backbone, pixels: int):
    with pytest.raises(RequestError, match="must be a multiple of 16 from 16 to 2048"):
        plan_network_on(backbone, pixels)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"in_channels": 9}, "reads 9 channels and the autoencoder makes 4"),
        ({"cross_attention_dim": 48}, "reads texts of 48 features and the text encoder makes 32"),
        ({"class_embed_type": "timestep"}, "wants more than text"),
    ],
)
def test_a_denoiser_that_wants_other_things_is_refused(tmp_path: Path, changes: dict[str, Any], why: str):
    backbone = Backbone(write_toy_stable_diffusion(tmp_path / "sd", **changes), "cpu")
    with pytest.raises(ModelError, match=f"{why}.*set close_up.denoiser=own"):
        create_network_on(backbone)


def test_a_schedule_that_is_too_short_is_refused(tmp_path: Path):
    folder = write_toy_stable_diffusion(tmp_path / "sd", scheduler={"num_train_timesteps": 100})
    with pytest.raises(ModelError, match="was trained with 100 timesteps, and close-ups name theirs of 1000"):
        create_network_on(Backbone(folder, "cpu"))


def describe(network: CloseUpNetwork, folder: Path) -> CloseUpCard:
    rules = WindowRules().at_size(SIZE)
    return CloseUpCard(network.config, rules, structures=("liver",), backbone_digest=compute_backbone_digest(folder))


def test_on_disk_there_is_no_second_copy_of_the_denoiser(trained: CloseUpNetwork, folder: Path, tmp_path: Path):
    save_close_up(tmp_path, describe(trained, folder), trained, half=False)
    files = {str(path.relative_to(tmp_path / "close_up")) for path in (tmp_path / "close_up").rglob("*.*")}
    assert files == {"config.json", "branch.safetensors", "scheduler/scheduler_config.json"}
    values = json.loads((tmp_path / "close_up" / "config.json").read_text())
    assert (values["format"], values["codec"], values["denoiser"]) == (2, "autoencoder", "backbone")


def test_it_is_what_it_was_after_a_round_through_the_disk(
    trained: CloseUpNetwork, backbone: Backbone, folder: Path, tmp_path: Path
):
    card = describe(trained, folder)
    save_close_up(tmp_path, card, trained, half=False)
    found, network = load_close_up(tmp_path, CPU, backbone)
    assert found == replace(card, denoiser="backbone")
    assert network.unet is backbone.unet
    for one, other in zip(propose(network, backbone), propose(trained, backbone), strict=True):
        assert torch.equal(one, other)


def test_the_noise_levels_are_those_of_the_training_whatever_lies_beside_the_backbone(
    trained: CloseUpNetwork, folder: Path, tmp_path: Path
):
    save_close_up(tmp_path, describe(trained, folder), trained)
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    settings = json.loads((copy / "scheduler" / "scheduler_config.json").read_text())
    (copy / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**settings, "prediction_type": "v_prediction"})
    )
    assert load_close_up(tmp_path, CPU, Backbone(copy, "cpu"))[1].scheduler.config.prediction_type == "epsilon"


def test_a_missing_or_another_backbone_is_refused_with_the_cure(trained: CloseUpNetwork, folder: Path, tmp_path: Path):
    save_close_up(tmp_path, describe(trained, folder), trained)
    with pytest.raises(ModelError, match=r"none is at hand. Name it with --backbone"):
        load_close_up(tmp_path, CPU)
    other = write_toy_stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match=r"was trained with another backbone.*progidiff train --backbone"):
        load_close_up(tmp_path, CPU, Backbone(other, "cpu"))
    card = load_close_up_card(tmp_path)
    wide = Backbone(write_toy_stable_diffusion(tmp_path / "wide", block_out_channels=(32, 32)), "cpu")
    save_close_up(tmp_path, replace(card, backbone_digest=compute_backbone_digest(wide.folder)), trained)
    with pytest.raises(ModelError, match="does not fit the backbone.*slot_channels"):
        load_close_up(tmp_path, CPU, wide)


def test_copies_of_the_backbone_in_another_precision_fit(trained: CloseUpNetwork, folder: Path, tmp_path: Path):
    other = write_toy_stable_diffusion(tmp_path / "other", seed=1)
    card = replace(describe(trained, folder), backbone_copies=(compute_backbone_digest(other),))
    save_close_up(tmp_path, card, trained)
    assert load_close_up(tmp_path, CPU, Backbone(other, "cpu"))[0].backbone_copies == card.backbone_copies


@pytest.mark.parametrize("values", [{"denoiser": "somebody"}, {"format": 1}, {"denoiser": ["backbone"]}, {"format": 3}])
def test_a_card_of_another_kind_is_refused(
    trained: CloseUpNetwork, folder: Path, tmp_path: Path, values: dict[str, Any]
):
    save_close_up(tmp_path, describe(trained, folder), trained)
    path = tmp_path / "close_up" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(ModelError, match=r"install the version that wrote it|cannot be read"):
        load_close_up_card(tmp_path)


def test_parts_that_were_exchanged_are_drawn_with(fresh: CloseUpNetwork, tmp_path: Path):
    other = Backbone(write_toy_stable_diffusion(tmp_path / "other", seed=1), "cpu")
    lend_denoiser(fresh, other)
    assert fresh.unet is other.unet
    assert "unet" not in dict(fresh.named_children())
