"""Masks as latents: shapes, statistics, determinism, and independence of the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from progidiff.model.codec import MaskCodec, encode_pictures


@pytest.fixture
def tiny_vae(tiny_model: Path) -> AutoencoderTiny:
    return AutoencoderTiny.from_pretrained(tiny_model / "backbone" / "vae").eval().requires_grad_(False)


@pytest.fixture(scope="module")
def kl_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    block = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(
        down_block_types=block[0],
        up_block_types=block[1],
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        norm_num_groups=4,
    )
    return vae.eval().requires_grad_(False)


def draw_masks(count: int, seed: int = 0, height: int = 32, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    centres = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    return ((y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2 < 60).float()


@pytest.mark.parametrize("kind", ["tiny_vae", "kl_vae"])
def test_masks_become_latents_an_eighth_of_their_size_and_come_back_as_memberships(
    kind: str, request: pytest.FixtureRequest
):
    codec = MaskCodec(request.getfixturevalue(kind))
    latents = codec.encode_masks(draw_masks(3))
    assert latents.shape == (3, 4, 4, 8)
    assert codec.decode_signed(latents).shape == (3, 32, 64)
    membership = codec.decode_latents(latents)
    assert membership.shape == (3, 32, 64)
    assert membership.dtype == torch.float32
    assert 0 <= float(membership.min()) <= float(membership.max()) <= 1


@pytest.mark.parametrize("kind", ["tiny_vae", "kl_vae"])
def test_encoding_a_mask_twice_gives_the_same_latents(kind: str, request: pytest.FixtureRequest):
    codec = MaskCodec(request.getfixturevalue(kind))
    masks = draw_masks(2)
    assert torch.equal(codec.encode_masks(masks), codec.encode_masks(masks))


@pytest.mark.parametrize("kind", ["tiny_vae", "kl_vae"])
def test_fitted_statistics_make_mask_latents_unit_variance_in_every_channel(kind: str, request: pytest.FixtureRequest):
    codec = MaskCodec(request.getfixturevalue(kind))
    batches = [draw_masks(6, seed) for seed in range(3)]
    codec.fit_statistics(batches)
    latents = torch.cat([codec.encode_masks(b) for b in batches])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (latents.std(dim=(0, 2, 3), unbiased=False) - 1).abs().max() < 1e-3


def test_fitting_again_forgets_the_statistics_before(tiny_vae: AutoencoderTiny):
    once, twice = MaskCodec(tiny_vae), MaskCodec(tiny_vae)
    once.fit_statistics([draw_masks(4, 1)])
    twice.fit_statistics([draw_masks(4, 2)])
    twice.fit_statistics([draw_masks(4, 1)])
    assert torch.equal(once.mean, twice.mean)
    assert torch.equal(once.std, twice.std)


def test_statistics_given_to_the_constructor_are_the_ones_used(tiny_vae: AutoencoderTiny):
    fitted = MaskCodec(tiny_vae)
    fitted.fit_statistics([draw_masks(4)])
    restored = MaskCodec(tiny_vae, fitted.mean.flatten().tolist(), fitted.std.flatten().tolist())
    assert torch.equal(restored.encode_masks(draw_masks(2, 5)), fitted.encode_masks(draw_masks(2, 5)))


def test_a_codec_with_another_autoencoder_precision_still_takes_fp32_masks(tiny_vae: AutoencoderTiny):
    codec = MaskCodec(tiny_vae.to(torch.bfloat16))
    latents = codec.encode_masks(draw_masks(2))
    assert latents.dtype == torch.float32
    assert codec.decode_latents(latents).dtype == torch.float32


def test_what_a_mask_decodes_to_does_not_depend_on_its_companions_in_the_batch(tiny_vae: AutoencoderTiny):
    codec = MaskCodec(tiny_vae)
    masks = draw_masks(5, seed=3, height=128, width=128)
    codec.fit_statistics([masks, torch.zeros_like(masks)])
    latents = codec.encode_masks(masks)
    together = codec.decode_latents(latents)
    for one, alone in zip(together, latents, strict=True):
        torch.testing.assert_close(one, codec.decode_latents(alone[None])[0], atol=1e-5, rtol=0)


def test_a_mask_without_foreground_decodes_to_exact_zeros(tiny_vae: AutoencoderTiny):
    codec = MaskCodec(tiny_vae)
    masks = draw_masks(4, height=64)
    codec.fit_statistics([masks])
    masks[1] = 0
    assert not codec.decode_latents(codec.encode_masks(masks))[1].any()


def test_pictures_are_encoded_without_noise(kl_vae: AutoencoderKL):
    pictures = torch.rand(1, 3, 32, 32) * 2 - 1
    assert torch.equal(encode_pictures(kl_vae, pictures), encode_pictures(kl_vae, pictures))
