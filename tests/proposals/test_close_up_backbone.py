"""The engine with a close-up on a Stable-Diffusion folder, end to end: prompts, edits, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from progidiff.errors import BackboneError, ModelError
from progidiff.images.close_up import WindowRules
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.model.adapters import AdapterStore
from progidiff.model.backbone import Backbone
from progidiff.model.close_up_folder import load_close_up
from progidiff.model.folder import load_pipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline
from progidiff.proposals.edits import Edit
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from support.pretend_cuda import CUDA, PretendCuda
from support.toy_stable_diffusion import write_toy_model, write_toy_stable_diffusion

LIVER, SPLEEN = Query("liver", "liver"), Query("spleen", "spleen")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_stable_diffusion(tmp_path_factory.mktemp("sd") / "backbone")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, backbone: Path) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("sd-model") / "model", backbone)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Path:
    return phantom_writer(tmp_path_factory.mktemp("sd-image") / "phantom.nii.gz", shape=(64, 48, 3))


@pytest.fixture(scope="module")
def volume(image: Path) -> Volume:
    return load_volume(image, modality="CT")


@pytest.fixture(scope="module")
def engine(model: Path, backbone: Path) -> Engine:
    return Engine(model, backbone, device="cpu", dtype="fp32")


def ask(engine: Engine, volume: Volume, count: int = 3, edits: tuple[Edit, ...] = ()) -> VolumeProposals:
    request = ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=count, seed=7, edits=edits)
    return engine.propose(request, volume)


def test_a_prompt_gets_proposals_on_the_grid_of_the_input(engine: Engine, volume: Volume):
    result = ask(engine, volume)
    masks = [result.mask(volume.grid, "liver", k) for k in (1, 2, 3)]
    assert [mask.shape for mask in masks] == [volume.array.shape] * 3
    assert masks[0].any()
    assert not np.array_equal(masks[1], masks[2])
    assert result.mask(volume.grid, "liver", "consensus").any()


def test_a_seed_gives_the_same_proposals_again_and_with_fewer(
    engine: Engine, volume: Volume, model: Path, backbone: Path
):
    first = ask(engine, volume).probabilities
    assert np.array_equal(ask(Engine(model, backbone, "cpu", "fp32"), volume).probabilities, first)
    two = ask(engine, volume, 2).probabilities
    assert np.abs(two.astype(int) - first[:, :2].astype(int)).max() <= 1


def test_edits_are_drawn_by_and_kept(engine: Engine, volume: Volume):
    edits = (
        Edit(kind="click", points=((30, 24, 1),), structure="liver"),
        Edit(kind="click", points=((12, 20, 1),), positive=False, structure="liver"),
    )
    result, plain = ask(engine, volume, edits=edits), ask(engine, volume)
    for k in (1, 2, 3):
        mask = result.mask(volume.grid, "liver", k)
        assert mask[30, 24, 1]
        assert not mask[12, 20, 1]
    assert not np.array_equal(result.probabilities[0], plain.probabilities[0])
    assert np.array_equal(result.probabilities[1], plain.probabilities[1])


def test_the_networks_warm_up_and_half_precision_answers_too(model: Path, backbone: Path, volume: Volume):
    engine = Engine(model, backbone, device="cpu", dtype="bf16")
    engine.warm_up()
    assert ask(engine, volume).probabilities.any()


def test_without_its_backbone_or_with_another_one_it_is_refused(model: Path, volume: Volume, tmp_path: Path):
    with pytest.raises(BackboneError, match="does not exist"):
        ask(Engine(model, device="cpu"), volume)
    other = write_toy_stable_diffusion(tmp_path / "other", seed=1)
    with pytest.raises(ModelError, match="was trained with another backbone"):
        ask(Engine(model, other, device="cpu"), volume)


def test_a_batch_holds_fewer_windows_of_more_pixels(engine: Engine):
    engine.load()
    tools = engine._close_up
    assert tools is not None
    assert tools.count_windows(64, 4) == 16
    large = replace(tools, rules=WindowRules().at_size(512))
    assert [large.count_windows(samples, 4) for samples in (64, 256)] == [1, 4]


def test_the_pipeline_of_diffusers_says_what_the_engine_says_and_so_does_its_copy(
    model: Path, backbone: Path, image: Path, volume: Volume, tmp_path: Path
):
    pipe = ProGiDiffPipeline.from_pretrained(model, backbone=backbone)
    pipe.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved" / "close_up").glob("unet*"))
    again = ProGiDiffPipeline.from_pretrained(tmp_path / "saved")
    assert again._close_up is not None
    assert again._close_up[1].unet is again.unet
    # The pipeline's own scheduler is that of whole slices; the close-up keeps the denoiser's.
    assert again._close_up[1].scheduler.config.prediction_type == "epsilon"
    wanted = ask(Engine(model, backbone, "cpu"), volume, 2).probabilities
    for one in (pipe, again):
        generator = torch.Generator().manual_seed(7)
        found = one(image, "liver and spleen", num_proposals=2, generator=generator, modality="CT").details
        assert np.array_equal(found.probabilities, wanted)
    assert np.array_equal(ask(Engine(tmp_path / "saved", device="cpu"), volume, 2).probabilities, wanted)


def test_a_request_on_a_device_mixes_no_places_and_waits_as_often_for_more_steps(
    model: Path, backbone: Path, volume: Volume
):
    device, parts = PretendCuda(), Backbone(backbone, "cpu", "fp32")
    card, pipeline = load_pipeline(model, parts)
    drawing = load_close_up(model, torch.device("cpu"), parts)
    for network in (pipeline.branch, parts.unet, parts.text_encoder, pipeline.codec, drawing[1]):
        device.move(network)
    _ = parts.tokenizer
    parts.device = CUDA
    waits = []
    with device:
        engine = Engine.from_networks(card, pipeline, AdapterStore(model / "none"), "", drawing)
        for steps in (1, 1, 3):
            device.waits.clear()
            request = ProposalRequest(queries=[LIVER], num_proposals=2, num_inference_steps=steps, guidance_scale=3.0)
            assert engine.propose(request, volume).probabilities.any()
            waits.append(+device.waits)
    # The first request also encodes prompts and slices.
    assert waits[2] == waits[1]
