"""Close-ups are trained from windows with edits; the energy score asks for as much variety as readers have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.images.close_up import WindowRules
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.close_up import EDIT_CHANNELS, CloseUpNetwork, DenoiserWidths, create_network
from progidiff.model.pipeline import EncodedPrompts
from progidiff.training.augment import Tones
from progidiff.training.close_up_stage import (
    CloseUpObjective,
    CloseUpOptions,
    compute_energy_score,
    compute_soft_distance,
)
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.window_pool import Jitter, PooledVolume, VolumeSource, WindowPool

SHAPE, SPACING = (12, 60, 72), (4.0, 2.0, 2.0)
GRID = WorkingGrid(SHAPE, SPACING, (60.0, 72.0), 4.0, 32, 48)


def ball(center: tuple[float, float, float], radius: float) -> np.ndarray:
    """In mm."""
    z, y, x = (((np.arange(n) + 0.5) * step) for n, step in zip(SHAPE, SPACING, strict=True))
    return (
        (z[:, None, None] - center[0]) ** 2 + (y[None, :, None] - center[1]) ** 2 + (x[None, None] - center[2]) ** 2
    ) < radius**2


def make_volume(name: str, shift: float = 0.0, has_evidence: bool = True) -> PooledVolume:
    labels = np.zeros(SHAPE, np.uint8)
    labels[ball((24, 50 + shift, 50), 18)] = 1
    labels[ball((24, 70, 110 + shift), 9)] = 2
    image = (labels * 90 + 30).astype(np.uint8)
    evidence = np.stack(
        [GRID.extract_labels((labels == p + 1).astype(np.uint8), np.arange(SHAPE[0]), 1).numpy() * 230 for p in (0, 1)],
        1,
    )
    return PooledVolume(
        name, name, image, labels, SPACING, (1, 2), evidence if has_evidence else None, GRID if has_evidence else None
    )


def make_pool(has_evidence: bool = True, **changes: object) -> WindowPool:
    volumes = [make_volume("a", has_evidence=has_evidence), make_volume("b", 6.0, has_evidence)]
    rules = WindowRules(size=32, large_size=32)
    return WindowPool([VolumeSource(volumes, size=32, rules=rules, **changes)])  # type: ignore[arg-type]


def make_prompts() -> EncodedPrompts:
    generator = torch.Generator().manual_seed(0)
    pooled = torch.nn.functional.normalize(torch.randn(2, 24, generator=generator), dim=1)
    return EncodedPrompts(
        torch.randn(2, 4, 24, generator=generator), torch.ones(2, 4), pooled, torch.zeros(1, 2, 24), torch.ones(1, 2)
    )


def make_network() -> CloseUpNetwork:
    widths = DenoiserWidths(channels=(16, 16), heads=2, text_features=24)
    return create_network(24, widths, channels=(8, 16, 16), condition_width=16, injection_width=8)


def test_windows_show_the_structure_with_its_truth_and_evidence():
    pool = make_pool(jitter=Jitter(0, 0, 0, 0, 0), off_share=0.0)
    sample = pool.draw(24, np.random.default_rng(0))
    assert sample.images.shape == (24, 5, 32, 32)
    assert set(sample.labels) == {1, 2}
    for n in range(24):
        truth = sample.truth[n, 0] > 0.5
        assert truth.any()
        shade = (sample.labels[n] * 90 + 30) / 255
        inside = sample.truth[n, 0] == 1
        if inside.any():
            assert sample.images[n, 2][inside].median() == pytest.approx(shade, abs=0.05)
        found = sample.evidence[n, 1] > 0.45
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.6


def test_both_structures_are_drawn_as_often_and_slices_without_them_too():
    sample = make_pool(off_share=0.5).draw(200, np.random.default_rng(0))
    assert 70 < sample.labels.count(1) < 130
    assert 0.03 < float((sample.truth.amax((1, 2, 3)) == 0).float().mean()) < 0.6


def test_area_shares_keep_the_area():
    pool = make_pool(jitter=Jitter(0, 0, 0, 0, 0), off_share=0.0)
    sample = pool.draw(40, np.random.default_rng(0))
    n = int(
        np.argmax(
            [float(share.sum()) * (label == 2) for share, label in zip(sample.truth[:, 0], sample.labels, strict=True)]
        )
    )
    area = float(sample.truth[n, 0].sum()) * float(sample.spacing[n, 0]) ** 2
    assert area == pytest.approx(np.pi * 81, rel=0.12)


def test_without_evidence_windows_come_from_the_truth_and_are_edited():
    pool = make_pool(has_evidence=False)
    objective = CloseUpObjective(make_network(), pool, make_prompts(), CloseUpOptions(windows_per_step=24))
    batch = objective.draw_batch(torch.Generator().manual_seed(0))
    assert not batch.windows.is_found.any()
    assert batch.windows.edits is not None
    shown = batch.truth[:, 0].amax((1, 2)) > 0.6
    edited = batch.windows.edits[:, :4].abs().amax((1, 2, 3)) > 0
    assert edited[shown].all()


def test_volumes_that_nothing_looked_at_show_evidence_that_is_nearly_right():
    sample = make_pool(has_evidence=False, worn_share=1.0, off_share=0.0).draw(60, np.random.default_rng(0))
    assert sample.is_found.all()
    assert sample.evidence.shape == (60, 3, 32, 32)
    found, truth = sample.evidence[:, 1] > 0.5, sample.truth[:, 0] > 0.5
    dice = 2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2))).clamp(1)
    assert 0.6 < float(dice.median()) < 0.97
    assert float(dice.std()) > 0.05
    assert 0 < float(make_pool(False, worn_share=0.5).draw(60, np.random.default_rng(0)).is_found.mean()) < 1


def test_the_same_generator_draws_the_same_batch():
    objective = CloseUpObjective(make_network(), make_pool(), make_prompts(), CloseUpOptions(windows_per_step=4))
    first, second = (objective.draw_batch(torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.windows.images, second.windows.images)
    assert first.windows.edits is not None
    assert second.windows.edits is not None
    assert torch.equal(first.windows.edits, second.windows.edits)


def test_text_is_dropped_here_and_there():
    options = CloseUpOptions(windows_per_step=64, text_dropout=0.5)
    batch = CloseUpObjective(make_network(), make_pool(), make_prompts(), options).draw_batch(torch.Generator())
    unnamed = batch.windows.pooled.abs().amax(1) == 0
    assert 15 < int(unnamed.sum()) < 50
    assert not batch.tokens[unnamed].any()


def test_training_lowers_the_loss_and_resumes(tmp_path: Path):
    network, options = make_network(), CloseUpOptions(windows_per_step=8, proposed=4, denoising_share=0.25)
    objective = CloseUpObjective(network, make_pool(), make_prompts(), options)

    def score() -> float:
        # Own generators: drop-out may not disturb the comparison.
        network.eval()
        with torch.no_grad():
            losses = [
                float(
                    objective.compute_loss(
                        objective.draw_batch(torch.Generator().manual_seed(s)), torch.Generator().manual_seed(s + 9)
                    )[0]
                )
                for s in range(6)
            ]
        return float(np.mean(losses))

    before = score()
    loop = LoopConfig(steps=30, learning_rate=3e-3, warmup=3, ema_decay=0.5, precision="fp32", tensorboard=False)
    run_loop({"network": network}, objective, loop, tmp_path)
    assert score() < before
    run_loop({"network": make_network()}, objective, loop, tmp_path)


def test_two_masks_are_as_far_apart_as_their_iou_says():
    a, b = torch.zeros(32, 32), torch.zeros(32, 32)
    a[:16], b[8:24] = 1, 1
    assert float(compute_soft_distance(a, b, smooth=0.0)) == pytest.approx(2 / 3)
    assert float(compute_soft_distance(a, a)) == 0
    assert float(compute_soft_distance(a * 0, b * 0)) == 0


def test_the_energy_score_is_best_for_proposals_that_vary_as_the_readers_do():
    small, large = torch.zeros(32, 32), torch.zeros(32, 32)
    small[8:16, 8:16], large[4:24, 4:24] = 1, 1
    readers, weight = torch.stack([small, small, large, large])[None], torch.ones(1, 4)

    def score(*drawn: torch.Tensor) -> float:
        # All ordered pairs, as many samples in the long run would draw them.
        pairs = [torch.stack([x, y])[None] for x in drawn for y in drawn]
        return float(np.mean([float(compute_energy_score(pair, readers, weight)) for pair in pairs]))

    varied = score(small, large)
    assert varied < score(small)
    assert varied < score(large)
    assert varied < score((small + large) / 2)


def test_readers_that_are_not_there_do_not_count():
    drawn, mask = torch.rand(2, 2, 16, 16), torch.rand(2, 1, 16, 16).round()
    alone = compute_energy_score(drawn, mask, torch.ones(2, 1))
    padded = torch.cat([mask, torch.zeros(2, 3, 16, 16)], 1)
    weight = torch.tensor([[1.0, 0, 0, 0]]).expand(2, 4)
    assert torch.allclose(alone, compute_energy_score(drawn, padded, weight))


def test_a_pool_with_readers_hands_out_all_of_them():
    pool = make_pool()
    sample = pool.draw(4, np.random.default_rng(0))
    more = replace(sample, truth=sample.truth.expand(-1, 3, -1, -1), weight=torch.ones(4, 3))
    objective = CloseUpObjective(make_network(), pool, make_prompts(), CloseUpOptions(windows_per_step=4))
    generator = torch.Generator().manual_seed(0)
    drawn = objective._dress(more, Tones.draw(generator, 4, 0.0), np.random.default_rng(0), generator)
    batch = objective.prepare(drawn)
    assert torch.allclose(batch.mean_truth, sample.truth[:, 0], atol=1e-6)
    assert batch.windows.edits is not None
    assert batch.windows.edits.shape[1] == len(EDIT_CHANNELS)


def test_steep_edges_compare_masks_and_not_probabilities():
    network, pool, prompts = make_network(), make_pool(), make_prompts()
    energies = []
    for steepness in (1.0, 1e2):
        objective = CloseUpObjective(network, pool, prompts, CloseUpOptions(windows_per_step=4, steepness=steepness))
        generator = torch.Generator().manual_seed(0)
        batch = objective.draw_batch(generator)
        with torch.no_grad():
            features = network.encode(batch.windows)
            state = generator.get_state()
            energies.append(float(objective.compute_energy(batch, features, generator)))
            generator.set_state(state)
            drawn = (objective._propose(batch, features, generator) > 0).float()
    masks = float(compute_energy_score(drawn, batch.truth, batch.weight).mean())
    assert abs(energies[1] - masks) < 0.02
    assert abs(energies[0] - masks) > 3 * abs(energies[1] - masks)


def test_the_encoder_and_with_it_the_consensus_may_stay_as_they_are(tmp_path: Path):
    network = make_network()
    options = CloseUpOptions(windows_per_step=4, proposed=4, keep_encoder=True, denoising_share=0.0)
    objective = CloseUpObjective(network, make_pool(), make_prompts(), options)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    loop = LoopConfig(steps=3, learning_rate=1e-2, warmup=1, ema_decay=0.5, seed=0, tensorboard=False)
    run_loop({"network": network}, objective, loop, tmp_path)
    changed = {name.split(".")[0] for name, value in network.state_dict().items() if not (value == before[name]).all()}
    assert "unet" in changed
    assert not changed & {"condition", "encoder", "query", "sharpen"}
