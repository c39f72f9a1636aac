"""The conditioning branch as a model of diffusers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from progidiff.errors import ModelError
from progidiff.model.conditioning_model import ConditioningModel
from progidiff.model.folder import load_branch

FORMER = Path(__file__).parents[1] / "data" / "former_0_1_0" / "model"


def is_same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


def test_the_model_answers_bit_for_bit_as_the_branch(tiny_model: Path):
    branch = load_branch(tiny_model / "conditioning")
    model = ConditioningModel.from_pretrained(tiny_model, subfolder="conditioning")
    slices = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = torch.randn(3, 384, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = branch.encode_slices(slices), model.encode_slices(slices)
        assert torch.equal(branch.predict_evidence(ours, text), model.predict_evidence(theirs, text))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_saved_model_comes_back_with_its_config(tiny_model: Path, tmp_path: Path):
    model = ConditioningModel.from_pretrained(tiny_model / "conditioning")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    again = ConditioningModel.from_pretrained(tmp_path)
    assert is_same(model, again)
    assert again.shapes == model.shapes
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ConditioningModel"
    assert ConditioningModel.from_config(again.config).shapes == model.shapes


def test_a_folder_of_a_former_version_is_loaded_too(tmp_path: Path):
    model = ConditioningModel.from_pretrained(FORMER / "conditioning")
    assert is_same(model, load_branch(FORMER / "conditioning"))
    half = ConditioningModel.from_pretrained(FORMER, subfolder="conditioning", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_loading_tells_nothing_that_is_not_wrong(tiny_model: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        ConditioningModel.from_pretrained(tiny_model / "conditioning")
        ConditioningModel.from_pretrained(FORMER / "conditioning")
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("mix.8.bias"), r"missing.*mix\.8\.bias"),
        (lambda t: t.update(stray=torch.zeros(1)), "unexpected.*stray"),
        (lambda t: t.update({"mix.8.bias": torch.zeros(3)}), r"mix\.8\.bias expected shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
):
    folder = Path(shutil.copytree(tiny_model / "conditioning", tmp_path / "conditioning"))
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelError, match=message):
        ConditioningModel.from_pretrained(folder)
