"""Augmentation in batches: the transforms of version 0.1, images and labels alike, wherever it is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progidiff.training.augment import Augmentation, Tones, Warp, augment
from progidiff.training.dice_tally import compute_area_shares
from support.servers import load_script

former = load_script("former_augmentation")

HEIGHT, WIDTH = 48, 60


def draw_slices(count: int, fine: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes: a bright blob in each quarter on a grey body, labelled 1 to 4; fine pixels for the labels."""
    labels = torch.zeros(count, fine * HEIGHT, fine * WIDTH, dtype=torch.uint8)
    for n, (y, x) in enumerate(((12, 15), (12, 45), (36, 15), (36, 45)), start=1):
        labels[:, fine * (y - 5) : fine * (y + 5), fine * (x - 6) : fine * (x + 6)] = n
    images = (labels[:, ::fine, ::fine].float() * 50 + 30).to(torch.uint8)
    return images[:, None].expand(-1, 3, -1, -1).clone(), labels


def generators(seed: int = 0) -> tuple[torch.Generator, torch.Generator]:
    first, second = (torch.Generator().manual_seed(seed) for _ in range(2))
    return first, second


@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_the_same_numbers_move_images_and_labels_as_version_01_did(strength: float):
    images, labels = draw_slices(6)
    one, two = generators()
    grid = former.draw_warp(one, images.shape, strength)
    warp = Warp.draw(two, len(images), WIDTH / HEIGHT, strength)
    torch.testing.assert_close(warp.find_places(HEIGHT, WIDTH), grid, atol=1e-6, rtol=0)
    moved = former.move_images(images.float(), grid)
    torch.testing.assert_close(warp.move_images(images), moved, atol=0.05, rtol=0)  # of 255
    for fine in (1, 2, 3):
        labels = draw_slices(6, fine)[1]
        differ = warp.move_labels(labels, HEIGHT, WIDTH).long() != former.move_labels(labels.long(), grid)
        assert float(differ.float().mean()) < 1e-3  # a pixel that lies half-way
    assert float((moved - images).abs().mean()) > 1


def test_the_same_numbers_change_intensities_as_version_01_did():
    images, _ = draw_slices(40)
    one, two = generators(3)
    unit = images.float() / 255
    wanted = former.blur(former.change_contrast(unit, one, 1.0), one, 1.0).clamp(0, 1) * 2 - 1
    tones = Tones.draw(two, len(images), 1.0)
    assert 0 < len(tones.blurred) < 20
    quiet = Tones(tones.gamma, tones.gain, tones.offset, tones.blurred, torch.zeros_like(tones.noise), 0)
    torch.testing.assert_close(quiet.apply(unit), wanted, atol=1e-5, rtol=0)


def test_noise_is_white_normal_and_as_strong_as_was_drawn():
    unit = torch.full((64, 1, 64, 64), 0.5)
    tones = Tones.draw(torch.Generator().manual_seed(0), 64, 1.0)
    still = torch.ones(64, 1, 1, 1)
    noisy = Tones(still, still, still * 0, tones.blurred[:0], tones.noise, tones.noise_seed).apply(unit) / 2
    assert 0 < float(tones.noise.min()) < 0.01 < 0.04 < float(tones.noise.max()) <= 0.05
    torch.testing.assert_close(noisy.std((1, 2, 3)), tones.noise[:, 0, 0, 0], rtol=0.1, atol=1e-4)
    scaled = noisy / tones.noise
    assert abs(float(scaled.mean())) < 0.01
    assert float((scaled[..., 1:] * scaled[..., :-1]).mean()) == pytest.approx(0, abs=0.02)
    assert float((scaled.abs() > 2).float().mean()) == pytest.approx(0.0455, abs=0.005)


def test_the_noise_of_a_run_is_another_one_in_each_batch_and_the_same_when_it_is_drawn_again():
    generator = torch.Generator().manual_seed(5)
    first, second = (Tones.draw(generator, 2, 1.0) for _ in range(2))
    assert first.noise_seed != second.noise_seed
    assert Tones.draw(torch.Generator().manual_seed(5), 2, 1.0).noise_seed == first.noise_seed


def test_shading_is_that_of_version_01():
    images = torch.zeros(4, 2, HEIGHT, WIDTH)
    still = Tones.draw(torch.Generator().manual_seed(0), 4, 0.0)
    one, two = generators(4)
    wanted = former.simulate_bias_field(images, one, 0.4)
    field = torch.randn(4, 1, 3, 4, generator=two) * torch.rand(4, 1, 1, 1, generator=two) * 0.4
    shaded = Tones(still.gamma, still.gain, still.offset, still.blurred, still.noise, 0, field)
    torch.testing.assert_close(shaded.apply((images + 1) / 2), wanted, atol=1e-5, rtol=0)


def test_parameters_are_spread_as_in_version_01():
    """Means and spreads of what 4000 draws do to three places of a picture."""
    one, two = generators(6)
    shape = torch.Size((4000, 1, 3, 3))
    before = former.draw_warp(one, shape, 1.0).flatten(1)
    now = Warp.draw(two, 4000, 1.0, 1.0).find_places(3, 3).flatten(1)
    torch.testing.assert_close(now.mean(0), before.mean(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(now.std(0), before.std(0), atol=1e-5, rtol=0)
    tones = Tones.draw(torch.Generator().manual_seed(7), 4000, 1.0, 0.3)
    low, high = np.exp(-0.4), np.exp(0.4)
    assert float(tones.gamma.min()) == pytest.approx(low, abs=0.01)
    assert float(tones.gamma.max()) == pytest.approx(high, abs=0.01)
    assert len(tones.blurred) / 4000 == pytest.approx(0.15, abs=0.02)
    assert tones.shade is not None
    # A normal field times a uniform strength up to 0.3.
    assert float(tones.shade.std()) == pytest.approx(0.3 / 3**0.5, rel=0.05)


def test_area_shares_move_with_the_image():
    images, labels = draw_slices(12)
    drawn = Augmentation.draw(torch.Generator().manual_seed(0), 12, WIDTH / HEIGHT, 1.0)
    shares = compute_area_shares(drawn.warp.move_labels(labels, HEIGHT, WIDTH), 4, 2)
    for n in range(4):
        alone = torch.where(images == 30 + 50 * (n + 1), 255, 0).to(torch.uint8)
        moved = drawn.warp.move_images(alone)[:, 0] / 255
        overlap = torch.minimum(moved, shares[:, n]).sum() / torch.maximum(moved, shares[:, n]).sum()
        assert float(overlap) > 0.85


@pytest.mark.parametrize("supersampling", [1, 2, 3])
def test_area_shares_are_those_of_one_plane_per_structure(supersampling: int):
    labels = torch.randint(0, 6, (3, 12 * supersampling, 8 * supersampling), generator=torch.Generator().manual_seed(0))
    shares = compute_area_shares(labels.to(torch.uint8), 5, supersampling)
    torch.testing.assert_close(shares, former.compute_area_shares(labels, 5, supersampling))


def test_left_stays_left_in_bytes_as_in_floats():
    images, labels = draw_slices(200)
    moved = augment(images, labels, torch.Generator().manual_seed(0))[1]
    assert moved.dtype == torch.uint8
    for left, right in ((1, 2), (3, 4)):
        both = [n for n in range(200) if all((moved[n] == side).sum() > 20 for side in (left, right))]
        assert len(both) > 150
        places = [[float((moved[n] == side).nonzero()[:, 1].float().mean()) for side in (left, right)] for n in both]
        assert all(one < other for one, other in places)


def test_augmentation_is_as_exact_where_networks_compute_in_bf16():
    images, labels = draw_slices(5)
    one, two = generators(9)
    wanted = augment(images, labels, one, 1.0, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(images, labels, two, 1.0, 0.2)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])


def test_bytes_and_floats_give_the_same_pictures():
    images, labels = draw_slices(5)
    one, two = generators(8)
    first, second = augment(images, labels, one, 1.0, 0.2), augment(images / 127.5 - 1, labels.long(), two, 1.0, 0.2)
    torch.testing.assert_close(first[0], second[0], atol=1e-4, rtol=0)
    assert torch.equal(first[1].long(), second[1])
