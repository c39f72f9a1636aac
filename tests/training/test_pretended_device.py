"""A training step on a device of its own, without one: every tensor is where it must be, and nothing waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.model.backbone import Backbone
from progidiff.model.close_up import DenoiserWidths, create_network
from progidiff.model.close_up_backbone import create_network_on
from progidiff.model.folder import load_pipeline
from progidiff.model.pipeline import EncodedPrompts
from progidiff.training.adapt_stages import KeepingObjective
from progidiff.training.close_up_stage import CloseUpObjective, CloseUpOptions
from progidiff.training.evidence_stage import EvidenceObjective, EvidenceOptions, PhraseTable
from progidiff.training.objective import Objective
from progidiff.training.proposal_stage import ProposalObjective, ProposalOptions
from progidiff.training.reader_masks import ReaderMasks, ReaderSource
from progidiff.training.slice_cache import SliceCache, list_cases
from progidiff.training.window_pool import WindowPool
from support.labelled_phantoms import write_case, write_table
from support.pretend_cuda import CUDA, PretendCuda, place
from support.toy_stable_diffusion import write_toy_stable_diffusion

_Generator = torch.Generator


class PretendedGenerator(torch.Generator):
    """Numbers of the processor, for tensors on the device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


def make_generator(where: Any = "cpu") -> torch.Generator:
    return PretendedGenerator() if torch.device(where).type == "cuda" else _Generator(where)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretended")
    write_table(folder, {6: "liver", 8: "aorta"})
    write_case(folder, "one", {6: np.s_[6:16, 6:20, 1:7], 8: np.s_[24:28, 10:16, 1:7]}, slices=8)
    return folder


def make_stages(device: PretendCuda, tiny_model: Path, studies: Path) -> dict[str, Objective]:
    backbone = Backbone(tiny_model / "backbone", "cpu", dtype="fp32")
    card, pipeline = load_pipeline(tiny_model, backbone)
    for network in (pipeline.branch, pipeline.unet, backbone.text_encoder, pipeline.codec):
        device.move(network)
    for network in (pipeline.branch, pipeline.unet):
        network.requires_grad_(True)
    _ = backbone.tokenizer
    backbone.device = CUDA
    with device:
        phrases = PhraseTable(backbone, card.structures)
        others = backbone.encode_text(["spleen", "pancreas"])[2]
    fine, whole = (
        SliceCache(list_cases(studies), card.structures, card.conditioning, studies / "cache", n) for n in (2, 1)
    )
    evidence = EvidenceObjective(pipeline.branch, phrases, fine, EvidenceOptions(slices_per_step=2, bias_field=0.3))
    return {
        "evidence": evidence,
        "adapt": KeepingObjective(evidence, pipeline.branch, others, 1.0),
        "proposals": ProposalObjective(pipeline, phrases, whole, ProposalOptions(slices_per_step=2)),
    }


def check_steps(device: PretendCuda, objective: Objective) -> None:
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        with device, pytest.MonkeyPatch.context() as patched:
            drawn = objective.draw(generator)
            device.waits.clear()
            patched.setattr(torch, "Generator", make_generator)
            loss, figures = objective.compute(drawn, step, generator)
            assert place(loss) == CUDA
            assert all(place(value) == CUDA for value in figures.values() if isinstance(value, torch.Tensor))
        assert not +device.waits  # what is counted as zero is left out
        loss.backward()


@pytest.mark.parametrize("stage", ["evidence", "adapt", "proposals"])
def test_a_step_mixes_no_devices_and_waits_for_nothing(tiny_model: Path, studies: Path, stage: str):
    device = PretendCuda()
    check_steps(device, make_stages(device, tiny_model, studies)[stage])


@pytest.mark.parametrize("denoising_share", [0.0, 1.0])
def test_a_step_of_the_close_up_mixes_no_devices_and_waits_for_nothing(denoising_share: float):
    device = PretendCuda()
    widths = DenoiserWidths(channels=(16, 16), heads=2, text_features=24)
    network = create_network(24, widths, channels=(8, 16, 16), condition_width=16, injection_width=8)
    device.move(network)
    rng = np.random.default_rng(0)
    masks = ReaderMasks(
        rng.integers(0, 255, (3, 32, 32), dtype=np.uint8),
        rng.integers(0, 255, (3, 2, 32, 4), dtype=np.uint8),
        np.array(["a", "b", "c"]),
    )
    with device:
        shapes = ((1, 4, 24), (1, 4), (1, 24), (1, 2, 24), (1, 2))
        prompts = EncodedPrompts(*(torch.ones(shape, device="cuda") for shape in shapes))
    options = CloseUpOptions(windows_per_step=4, proposed=2, denoising_share=denoising_share, bias_field=0.2)
    pool = WindowPool([ReaderSource(masks, 1, size=32)])
    check_steps(device, CloseUpObjective(network, pool, prompts, options))


def test_a_step_of_a_close_up_on_a_backbone_mixes_no_devices_and_waits_for_nothing(tmp_path: Path):
    device = PretendCuda()
    backbone = Backbone(write_toy_stable_diffusion(tmp_path / "sd"), "cpu", "fp32")
    network = create_network_on(backbone, channels=(8, 8, 16, 16, 16), condition_width=16, injection_width=8)
    for part in (network, backbone.unet, backbone.vae):
        device.move(part)
    masks = ReaderMasks(np.zeros((2, 64, 64), np.uint8), np.full((2, 2, 64, 8), 15, np.uint8), np.array(["a", "b"]))
    with device:
        shapes = ((1, 4, 32), (1, 4), (1, 32), (1, 2, 32), (1, 2))
        prompts = EncodedPrompts(*(torch.ones(shape, device="cuda") for shape in shapes))
    pool = WindowPool([ReaderSource(masks, 1, size=64)])
    options = CloseUpOptions(windows_per_step=2, proposed=1, denoising_share=0.5)
    check_steps(device, CloseUpObjective(network, pool, prompts, options))
