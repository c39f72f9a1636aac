"""The way of a request on a device of its own, without one: every tensor is where it must be, and no step waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.model.adapters import AdapterStore
from progidiff.model.backbone import Backbone
from progidiff.model.close_up_folder import load_close_up
from progidiff.model.folder import load_pipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.edits import Edit
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import add_tiny_close_up, build_tiny_model
from support.pretend_cuda import CUDA, PretendCuda, place

QUERIES = [Query(name, name) for name in ("liver", "aorta")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tiny_close_up(build_tiny_model(tmp_path_factory.mktemp("pretended") / "model"))


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    path = phantom_writer(tmp_path_factory.mktemp("pretended") / "phantom.nii.gz", shape=(32, 28, 3))
    return load_volume(path, modality="CT")


def open_engine(model: Path, device: PretendCuda, has_close_up: bool, dtype: str = "bf16") -> Engine:
    backbone = Backbone(model / "backbone", "cpu", dtype)
    card, pipeline = load_pipeline(model, backbone)
    close_up = load_close_up(model, torch.device("cpu")) if has_close_up else None
    networks = [pipeline.branch, pipeline.unet, backbone.text_encoder, pipeline.codec]
    for network in networks if close_up is None else [*networks, close_up[1]]:
        device.move(network)
    _ = backbone.tokenizer
    backbone.device = CUDA
    with device:
        return Engine.from_networks(card, pipeline, AdapterStore(model / "none"), "", close_up)


@pytest.mark.parametrize("has_close_up", [False, True])
def test_a_request_mixes_no_devices_and_more_steps_wait_no_more_often(model: Path, volume: Volume, has_close_up: bool):
    device = PretendCuda()
    # Under bf16 a close-up computes under autocast, which only a real device has.
    engine = open_engine(model, device, has_close_up, "fp32" if has_close_up else "bf16")
    edits = (Edit(kind="click", points=((14, 12, 1),)),) if has_close_up else ()
    waits: list[Counter[str]] = []
    with device:
        for steps in (1, 1, 3):
            request = ProposalRequest(
                queries=QUERIES, num_proposals=2, num_inference_steps=steps, guidance_scale=3.0, edits=edits
            )
            device.waits.clear()
            result = engine.propose(request, volume)
            waits.append(+device.waits)
            assert result.probabilities.any()
    # The first request also encodes prompts and slices.
    assert waits[2] == waits[1], waits


@pytest.mark.parametrize("has_close_up", [False, True])
def test_networks_warm_up_there(model: Path, has_close_up: bool):
    device = PretendCuda()
    engine = open_engine(model, device, has_close_up, "fp32")
    with device:
        engine.warm_up()
    assert engine.info()["loaded"]


def test_the_pretended_device_has_the_rules_of_a_real_one():
    with PretendCuda() as device:
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        assert (there.device.type, here.device.type, (there * 2 + torch.tensor(1.0)).device.type) == (
            "cuda",
            "cpu",
            "cuda",
        )
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(TypeError, match="can't convert cuda"):
            there.numpy()
        with pytest.raises(RuntimeError, match="indices should be"):
            here[torch.tensor([1], device="cuda")]
        with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
            torch.randn(2, device="cuda", generator=torch.Generator())
        assert place(there[torch.tensor([1])]) == CUDA
        assert not device.waits - Counter({"index": 0})
        assert float(there.sum()) == 3.0
        assert there.cpu().numpy().tolist() == [1.0, 1.0, 1.0]
        assert (device.waits["__float__"], device.waits["cpu"]) == (1, 1)
