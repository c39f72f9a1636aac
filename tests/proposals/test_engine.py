"""The engine on a real model of toy width: reuse, determinism, absence, progress, cancelling, refusals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, ImageError, MemoryFullError, ModelError, RequestError
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.prompts.parser import Query
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals.batches import is_out_of_memory
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.testing import build_tiny_model

LIVER, SPLEEN, AORTA = (Query(name, name) for name in ("liver", "spleen", "aorta"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    return load_volume(phantom_writer(tmp_path_factory.mktemp("engine") / "phantom.nii.gz"), modality="CT")


@pytest.fixture(scope="module")
def long_volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    return load_volume(
        phantom_writer(tmp_path_factory.mktemp("engine") / "long.nii.gz", shape=(40, 30, 37)), modality="CT"
    )


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    return Engine(tiny_model, device="cpu", dtype="fp32")


@pytest.fixture
def fast(tiny_model: Path) -> Engine:
    """In the precision that the engine picks by itself."""
    return Engine(tiny_model, device="cpu")


def count_calls(module: Any) -> list[int]:
    """Batch sizes that a network is called with."""
    calls: list[int] = []
    module.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls


def assert_same(first: VolumeProposals, second: VolumeProposals, tolerance: int = 0) -> None:
    assert np.abs(first.probabilities.astype(int) - second.probabilities.astype(int)).max() <= tolerance


def test_proposals_lie_on_the_working_grid_and_come_back_on_the_grid_of_the_input(engine: Engine, volume: Volume):
    result = engine.propose(ProposalRequest(queries=[LIVER, AORTA], num_proposals=3, seed=7), volume)
    assert result.probabilities.shape == (2, 3, 8, 32, 64)
    assert result.probabilities.any()
    assert result.structures == ("liver", "aorta")
    assert (result.seed, result.num_inference_steps, result.model_version) == (7, 2, "tiny@1")
    assert result.mask(volume.grid, "liver", "consensus").shape == volume.array.shape


def test_each_slice_is_encoded_once_for_all_prompts_proposals_and_steps(engine: Engine, volume: Volume):
    encoder, denoiser = count_calls(engine.load().branch.encoder), count_calls(engine.load().unet)
    engine.propose(ProposalRequest(queries=[LIVER, SPLEEN, AORTA], num_proposals=4, num_inference_steps=3), volume)
    assert sum(encoder) == 8
    assert sum(denoiser) == 8 * 3 * 4 * 3


def test_a_second_prompt_on_the_same_volume_reuses_the_features(engine: Engine, volume: Volume):
    encoder = count_calls(engine.load().branch.encoder)
    engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), volume)
    engine.propose(ProposalRequest(queries=[SPLEEN], num_proposals=2, seed=5), volume)
    assert sum(encoder) == 8


def test_another_volume_under_the_same_name_does_not_reuse_them(engine: Engine, volume: Volume):
    encoder = count_calls(engine.load().branch.encoder)
    engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), volume)
    engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), replace(volume, array=volume.array + 1))
    assert sum(encoder) == 16


def test_features_are_forgotten_when_they_would_outgrow_the_memory_limit(
    engine: Engine, volume: Volume, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("progidiff.proposals.engine.FEATURE_CACHE_BYTES", 1000)
    encoder = count_calls(engine.load().branch.encoder)
    first = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), volume)
    assert_same(first, engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), volume))
    assert sum(encoder) == 16


@pytest.mark.parametrize("kind", ["engine", "fast"])
def test_remembered_features_give_exactly_the_proposals_of_fresh_ones(
    kind: str, request: pytest.FixtureRequest, volume: Volume
):
    engine = request.getfixturevalue(kind)
    encoder = count_calls(engine.load().branch.encoder)
    first = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=2), volume)
    second = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=2), volume)
    assert sum(encoder) == 8
    assert_same(first, second)


def test_the_same_seed_gives_the_same_proposals_from_a_new_engine(tiny_model: Path, engine: Engine, volume: Volume):
    again = Engine(tiny_model, device="cpu", dtype="fp32")
    assert_same(
        engine.propose(ProposalRequest(queries=[LIVER], seed=3), volume),
        again.propose(ProposalRequest(queries=[LIVER], seed=3), volume),
    )


@pytest.mark.parametrize("seed", [1, 2**63 - 1])
def test_another_seed_gives_other_proposals(engine: Engine, volume: Volume, seed: int):
    first, second = (
        engine.propose(ProposalRequest(queries=[LIVER], seed=0), volume),
        engine.propose(ProposalRequest(queries=[LIVER], seed=seed), volume),
    )
    assert (first.probabilities != second.probabilities).any()


def test_a_structure_is_proposed_the_same_alone_and_among_others(engine: Engine, volume: Volume):
    together = engine.propose(ProposalRequest(queries=[AORTA, LIVER, SPLEEN], num_proposals=3), volume)
    alone = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=3), volume)
    assert np.abs(together.probabilities[1].astype(int) - alone.probabilities[0]).max() <= 1


def test_proposal_k_is_the_same_for_any_number_of_proposals(engine: Engine, volume: Volume):
    many = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=5), volume)
    few = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), volume)
    assert np.abs(many.probabilities[:, :2].astype(int) - few.probabilities).max() <= 1


def test_only_the_slices_asked_for_are_computed_and_they_are_the_same(engine: Engine, long_volume: Volume):
    whole = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), long_volume).probabilities
    part = engine.propose(
        ProposalRequest(queries=[LIVER], num_proposals=2, slices=[30, 3, 3, 17]), long_volume
    ).probabilities
    chosen = [3, 17, 30]
    assert np.abs(whole[:, :, chosen].astype(int) - part[:, :, chosen]).max() <= 1
    assert not np.delete(part, chosen, axis=2).any()


def test_slices_come_first_where_somebody_looks_and_are_the_same_in_any_order(engine: Engine, long_volume: Volume):
    straight = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), long_volume)
    come: list[int] = []
    early: list[np.ndarray] = []

    def look(part: VolumeProposals, slices: Sequence[int]) -> None:
        early.append(part.slice_masks("liver", slices[0]))
        come.append(slices[0])

    result = engine.propose(
        ProposalRequest(queries=[LIVER], num_proposals=2), long_volume, Work(first=36, on_slices=look)
    )
    assert come == [32, 16, 0]
    assert np.array_equal(result.probabilities, straight.probabilities)
    assert all(np.array_equal(masks, result.slice_masks("liver", z)) for z, masks in zip(come, early, strict=True))


@pytest.mark.parametrize("slices", [[], [-1], [8]])
def test_slices_outside_the_volume_are_refused_with_the_range(engine: Engine, volume: Volume, slices: list[int]):
    with pytest.raises(RequestError, match=r"0\.\.7, the axial indices of 'phantom'"):
        engine.propose(ProposalRequest(queries=[LIVER], slices=slices), volume)


def test_an_absent_structure_gives_exact_zeros_and_is_not_denoised(tmp_path: Path, volume: Volume):
    engine = Engine(build_tiny_model(tmp_path / "model", evidence_bias=-30.0), device="cpu", dtype="fp32")
    denoiser = count_calls(engine.load().unet)
    result = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=2), volume)
    assert not result.probabilities.any()
    assert denoiser == []
    assert result.present() == ()
    assert not result.mask(volume.grid, "liver", "consensus").any()


def test_proposals_that_draw_nothing_are_stored_as_exact_zeros(engine: Engine, volume: Volume):
    probabilities = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN, AORTA]), volume).probabilities
    silent = (probabilities < 128).all(axis=(-2, -1))
    assert not probabilities[silent].any()


def test_progress_never_goes_back_and_ends_at_the_total(engine: Engine, long_volume: Volume):
    told: list[tuple[int, int]] = []
    engine.propose(
        ProposalRequest(queries=[LIVER, SPLEEN]),
        long_volume,
        Work(on_progress=lambda done, total: told.append((done, total))),
    )
    done = [d for d, _ in told]
    assert {t for _, t in told} == {37}
    assert done == sorted(done)
    assert len(set(done)) > 3
    assert done[-1] == 37


def test_progress_ends_at_the_total_when_everything_is_absent(tmp_path: Path, volume: Volume):
    engine = Engine(build_tiny_model(tmp_path / "model", evidence_bias=-30.0), device="cpu", dtype="fp32")
    told: list[tuple[int, int]] = []
    engine.propose(
        ProposalRequest(queries=[LIVER], slices=[1, 2]),
        volume,
        Work(on_progress=lambda done, total: told.append((done, total))),
    )
    assert told[-1] == (2, 2)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_cancelling_raises_and_keeps_nothing(engine: Engine, long_volume: Volume, after: int):
    asked = iter(range(1000))
    with pytest.raises(CancelledError, match=r"Stopped on request after \d+ of 37 slices of 'long'; nothing was kept"):
        engine.propose(
            ProposalRequest(queries=[LIVER, SPLEEN]), long_volume, Work(is_cancelled=lambda: next(asked) >= after)
        )
    encoder = count_calls(engine.load().branch.encoder)
    result = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=1), long_volume)
    assert sum(encoder) == 37
    assert result.probabilities.any()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_proposals": 0}, r"num_proposals must lie in 1\.\.64, got 0"),
        ({"num_proposals": 65}, r"num_proposals must lie in 1\.\.64, got 65"),
        ({"num_inference_steps": 0}, r"num_inference_steps must lie in 1\.\.50, got 0"),
        ({"num_inference_steps": 51}, r"num_inference_steps must lie in 1\.\.50, got 51"),
        ({"seed": -1}, "seed must lie in .*, got -1"),
        ({"seed": 2**63}, "seed must lie in"),
        ({"guidance_scale": -0.5}, r"guidance_scale must lie in 0\.\.20, got -0.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must lie in"),
        ({"adapter": "mr"}, "There is no adapter 'mr'"),
    ],
)
def test_options_out_of_range_are_refused_by_name_before_anything_is_loaded(
    tiny_model: Path, volume: Volume, options: dict[str, Any], message: str
):
    engine = Engine(tiny_model, device="cpu")
    with pytest.raises(RequestError, match=message):
        engine.propose(ProposalRequest(queries=[LIVER], **options), volume)
    assert not engine.info()["loaded"]


def test_no_prompt_is_refused(engine: Engine, volume: Volume):
    with pytest.raises(RequestError, match="give at least one prompt"):
        engine.propose(ProposalRequest(queries=[]), volume)


def test_a_volume_with_holes_in_its_values_is_refused(engine: Engine, volume: Volume):
    array = volume.array.astype(np.float32)
    array[30:34, 20:24, 4] = np.nan
    with pytest.raises(ImageError, match="'phantom' holds values that are not finite"):
        engine.propose(ProposalRequest(queries=[LIVER]), replace(volume, array=array))


def test_guidance_changes_the_proposals_and_one_does_not(engine: Engine, volume: Volume):
    plain = engine.propose(ProposalRequest(queries=[LIVER]), volume)
    assert_same(plain, engine.propose(ProposalRequest(queries=[LIVER], guidance_scale=1.0), volume))
    assert (
        engine.propose(ProposalRequest(queries=[LIVER], guidance_scale=4.0), volume).probabilities
        != plain.probabilities
    ).any()


def test_info_is_cheap_and_says_what_the_model_knows(tiny_model: Path):
    info = Engine(tiny_model).info()
    assert info["model_version"] == "tiny@1"
    assert info["structures"] == list(STRUCTURES)
    assert info["loaded"] is False
    assert info["error"] == ""


def test_info_of_a_folder_without_weights_gives_the_reason_instead_of_raising(tmp_path: Path):
    info = Engine(tmp_path).info()
    assert "progidiff train" in info["error"]
    assert info["structures"] == []


def test_a_folder_without_weights_is_refused_on_use_with_the_cure(tmp_path: Path, volume: Volume):
    with pytest.raises(ModelError, match=r"Missing: vae/config\.json|train one with `progidiff train`|does not exist"):
        Engine(tmp_path, device="cpu").propose(ProposalRequest(queries=[LIVER]), volume)


class SmallDevice:
    """A device whose memory holds so many slices while they are encoded, and so many latents while they are
    denoised.
    """

    def __init__(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, slices: int, latents: int, error: Exception | None = None
    ) -> None:
        pipeline = engine.load()
        encode, propose = pipeline.encode_slices, pipeline.propose
        self.refused: list[tuple[int, int]] = []
        self.slices, self.latents = slices, latents
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nsecond line")

        def encode_or_fail(inputs: torch.Tensor) -> Any:
            self.check(len(inputs), 0)
            return encode(inputs)

        def propose_or_fail(features: Any, evidence: Any, prompts: Any, pairs: Any, noise: Any, *rest: Any) -> Any:
            self.check(0, len(pairs) * len(noise))
            return propose(features, evidence, prompts, pairs, noise, *rest)

        monkeypatch.setattr(pipeline, "encode_slices", encode_or_fail)
        monkeypatch.setattr(pipeline, "propose", propose_or_fail)

    def check(self, slices: int, latents: int) -> None:
        if slices > self.slices or latents > self.latents:
            self.refused.append((slices, latents))
            raise self.error


@pytest.mark.parametrize(("slices", "latents"), [(16, 20), (5, 64), (1, 64), (16, 1), (1, 1)])
def test_a_device_with_little_memory_gets_smaller_batches_and_gives_the_same_answer(
    engine: Engine, tiny_model: Path, long_volume: Volume, monkeypatch: pytest.MonkeyPatch, slices: int, latents: int
):
    device = SmallDevice(engine, monkeypatch, slices, latents)
    told: list[tuple[int, int]] = []
    seen: list[int] = []
    options: dict[str, Any] = {"num_proposals": 3, "num_inference_steps": 1, "seed": 3}
    result = engine.propose(
        ProposalRequest(queries=[LIVER, SPLEEN], **options),
        long_volume,
        Work(on_progress=lambda *now: told.append(now), on_slices=lambda _, batch: seen.extend(batch)),
    )
    assert_same(
        result,
        Engine(tiny_model, device="cpu", dtype="fp32").propose(
            ProposalRequest(queries=[LIVER, SPLEEN], **options), long_volume
        ),
        tolerance=1,
    )
    assert sorted(seen) == list(range(37))
    assert told[-1] == (37, 37)
    assert 1 <= len(device.refused) <= 8

    # What did not fit once may fit later: the next request begins with whole batches, and remembers its features again.
    device.slices = device.latents = 10**6
    device.refused.clear()
    engine.propose(ProposalRequest(queries=[LIVER], **options), long_volume)
    calls = count_calls(engine.load().branch.encoder)
    engine.propose(ProposalRequest(queries=[SPLEEN], **options), long_volume)
    assert device.refused == []
    assert calls == []


def test_what_is_remembered_makes_room_first(engine: Engine, volume: Volume, monkeypatch: pytest.MonkeyPatch):
    engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, num_inference_steps=1), volume)
    assert engine._features
    device = SmallDevice(engine, monkeypatch, 16, 4)
    engine.propose(ProposalRequest(queries=[SPLEEN], num_proposals=2, num_inference_steps=1), volume)
    assert device.refused
    assert not engine._features


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("MPS backend out of memory (1 GB)")],
)
def test_a_device_without_memory_for_one_slice_refuses_with_when_to_come_back(
    engine: Engine, volume: Volume, monkeypatch: pytest.MonkeyPatch, error: Exception
):
    device = SmallDevice(engine, monkeypatch, 0, 0, error)
    with pytest.raises(
        MemoryFullError, match=r"not enough memory on cpu for one proposal of one slice.*--conf cpu_fallback true"
    ) as refusal:
        engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2), volume)
    assert (refusal.value.status, refusal.value.retry_after) == (503, 30)
    assert device.refused[-1] == (1, 0)
    device.slices = device.latents = 64
    assert engine.propose(
        ProposalRequest(queries=[LIVER], num_proposals=1, num_inference_steps=1), volume
    ).probabilities.any()


def test_other_errors_are_no_reason_to_try_again(engine: Engine, volume: Volume, monkeypatch: pytest.MonkeyPatch):
    device = SmallDevice(engine, monkeypatch, 0, 0, RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot"):
        engine.propose(ProposalRequest(queries=[LIVER]), volume)
    assert len(device.refused) == 1
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("full", ["while loading", "while computing"])
def test_the_processor_answers_for_a_full_device_if_that_is_allowed(
    tiny_model: Path, volume: Volume, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, full: str
):
    options: dict[str, Any] = {"num_proposals": 2, "num_inference_steps": 1, "adapter": "none"}
    expected = Engine(tiny_model, device="cpu").propose(ProposalRequest(queries=[LIVER], **options), volume)
    engine = Engine(tiny_model, device="cpu", cpu_fallback=True)
    device = SmallDevice(engine, monkeypatch, 0, 0)
    monkeypatch.setattr("progidiff.proposals.engine.pick_device", lambda name: torch.device("cuda:3"))
    if full == "while loading":
        monkeypatch.setattr(engine, "load", lambda: device.check(1, 1))
    assert_same(engine.propose(ProposalRequest(queries=[LIVER], **options), volume), expected)
    assert "does not fit into the memory of cuda:3 (CUDA out of memory. Tried to allocate 2 GiB)" in caplog.text
    before = len(device.refused)
    engine.propose(ProposalRequest(queries=[LIVER], **options), volume)
    assert len(device.refused) > before  # The device is asked first, every time.
