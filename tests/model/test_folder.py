"""Models on disk: exact round trips, and refusals that name what does not fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from progidiff.errors import ModelError, RequestError
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch
from progidiff.model.folder import (
    ModelCard,
    compute_backbone_digest,
    compute_conditioning_digest,
    copy_conditioning,
    load_branch,
    load_card,
    load_pipeline,
    save_backbone_part,
    save_conditioning,
)
from progidiff.proposals.engine import Engine
from progidiff.testing import TOY_WIDTHS, build_tiny_model
from progidiff.training.build_model import BackboneWidths, create_backbone, create_branch

FORMER = Path(__file__).parents[1] / "data" / "former_0_1_0" / "model"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def open_backbone(folder: Path) -> Backbone:
    return Backbone(folder / "backbone", device="cpu", dtype="fp32")


def fresh_branch(model: Path, seed: int) -> ConditioningBranch:
    return create_branch(
        open_backbone(model), 32, 64, (4.0, 12.0), seed, channels=(8, 8, 16, 16, 16), evidence_channels=16
    )


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def test_a_branch_comes_back_bit_exact_when_stored_in_fp32(model: Path):
    branch = fresh_branch(model, seed=5)
    card = load_card(model)
    save_conditioning(model, card, branch, {"seed": 5}, "# card\n", half=False)
    loaded_card, pipeline = load_pipeline(model, open_backbone(model))
    assert loaded_card == card
    restored = pipeline.branch.state_dict()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in branch.state_dict().items())
    assert pipeline.codec.mean.flatten().tolist() == pytest.approx(card.codec_mean)
    assert json.loads((model / "conditioning" / "run.json").read_text()) == {"seed": 5}


def test_a_branch_stored_in_half_precision_is_the_rounded_one(model: Path):
    branch = fresh_branch(model, seed=5)
    save_conditioning(model, load_card(model), branch, {}, "")
    restored = load_pipeline(model, open_backbone(model))[1].branch.state_dict()
    assert all(torch.equal(tensor.half().float(), restored[name]) for name, tensor in branch.state_dict().items())


def test_a_loaded_branch_is_ready_for_use_and_not_for_training(model: Path):
    branch = load_pipeline(model, open_backbone(model))[1].branch
    assert not branch.training
    assert not any(p.requires_grad for p in branch.parameters())


def test_a_card_survives_its_json(model: Path):
    card = replace(load_card(model), scheduler={"prediction_type": "sample"}, gate=0.3, guidance_scale=2.0)
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_replacing_a_conditioning_keeps_the_one_before_as_previous(model: Path):
    card = load_card(model)
    before = (model / "conditioning" / "diffusion_pytorch_model.safetensors").read_bytes()
    save_conditioning(model, replace(card, version="2"), fresh_branch(model, seed=9), {}, "")
    assert (model / ".conditioning.previous" / "diffusion_pytorch_model.safetensors").read_bytes() == before
    assert load_card(model).full_name == "tiny@2"
    save_conditioning(model, replace(card, version="3"), fresh_branch(model, seed=9), {}, "")
    assert json.loads((model / ".conditioning.previous" / "card.json").read_text())["version"] == "2"
    assert sorted(p.name for p in model.iterdir()) == [".conditioning.previous", "backbone", "conditioning"]


def test_a_conditioning_on_another_backbone_is_refused_with_both_digests(tiny_model: Path, tmp_path: Path):
    other = create_backbone(tmp_path / "other", TOY_WIDTHS, seed=1)
    trained_with, given = compute_backbone_digest(tiny_model / "backbone")[:12], compute_backbone_digest(other)[:12]
    with pytest.raises(
        ModelError, match=rf"content {trained_with}\) than '{other}' \(content {given}\).*progidiff train --backbone"
    ):
        Engine(tiny_model, backbone=other, device="cpu").load()


def test_the_same_backbone_in_another_place_is_accepted(tiny_model: Path, tmp_path: Path):
    moved = Path(shutil.copytree(tiny_model / "backbone", tmp_path / "moved"))
    assert compute_backbone_digest(moved) == compute_backbone_digest(tiny_model / "backbone")
    assert Engine(tiny_model, backbone=moved, device="cpu").load()


def test_a_changed_weight_changes_the_digest(model: Path):
    before = compute_backbone_digest(model / "backbone")
    path = model / "backbone" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).flatten()[0] += 1
    save_file(tensors, path)
    assert compute_backbone_digest(model / "backbone") != before


def test_a_truncated_weight_file_is_named(model: Path):
    path = model / "conditioning" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors' is damaged .*restore it"):
        load_pipeline(model, open_backbone(model))


def test_a_missing_weight_file_is_named(model: Path):
    (model / "conditioning" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors' is missing"):
        load_pipeline(model, open_backbone(model))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("mix.8.bias"), r"missing: mix\.8\.bias"),
        (lambda t: t.update(stray=torch.zeros(1)), "unknown: stray"),
        (lambda t: t.update({"mix.8.bias": torch.zeros(3)}), r"of another shape: mix\.8\.bias"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("encoder.")],
            r"missing: encoder\.\S+, \S+, \S+ and \d+ more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    model: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
):
    path = model / "conditioning" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=message):
        load_pipeline(model, open_backbone(model))


def test_a_folder_without_conditioning_says_how_to_train_one(tmp_path: Path):
    with pytest.raises(ModelError, match=r"holds no trained conditioning .*progidiff train"):
        load_card(tmp_path)


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("card.json", lambda v: v.update(format=99), "has format 99, this program reads 1 and 2"),
        ("card.json", lambda v: v.pop("structures"), "cannot be read: 'structures'"),
        ("config.json", lambda v: v.pop("height"), "cannot be read: .*height"),
    ],
)
def test_a_card_that_cannot_be_read_says_why(
    model: Path, file: str, change: Callable[[dict[str, Any]], None], message: str
):
    edit_json(model / "conditioning" / file, change)
    with pytest.raises(ModelError, match=message):
        load_card(model)


@pytest.mark.parametrize("file", ["config.json", "card.json"])
def test_a_card_that_is_no_json_says_so(model: Path, file: str):
    (model / "conditioning" / file).write_text("{")
    with pytest.raises(ModelError, match=rf"{re.escape(file)}' cannot be read: .*Restore it"):
        load_card(model)


def test_a_missing_card_is_named(model: Path):
    (model / "conditioning" / "card.json").unlink()
    with pytest.raises(ModelError, match=r"holds no trained conditioning \('card\.json' is missing"):
        load_card(model)


# The layout of versions up to 0.2


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of version 0.1.0 that nobody may write to."""
    folder = Path(shutil.copytree(FORMER, tmp_path_factory.mktemp("former") / "model"))
    for path in folder.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def test_a_former_folder_is_read_as_it_is(former: Path):
    before = {path: path.stat().st_mtime_ns for path in former.rglob("*")}
    card, pipeline = load_pipeline(former, open_backbone(former))
    assert card.full_name == "tiny@1"
    wanted = load_file(former / "conditioning" / "branch.safetensors")
    restored = pipeline.branch.state_dict()
    assert wanted.keys() == restored.keys()
    assert all(torch.equal(tensor.float(), restored[name]) for name, tensor in wanted.items())
    assert {path: path.stat().st_mtime_ns for path in former.rglob("*")} == before


def test_a_former_folder_is_converted_with_the_same_weights_and_digest(former: Path, tmp_path: Path):
    copy_conditioning(former, tmp_path / "model", load_card(former))
    assert sorted(p.name for p in (tmp_path / "model" / "conditioning").iterdir()) == [
        "README.md", "card.json", "config.json", "diffusion_pytorch_model.safetensors", "run.json",
    ]  # fmt: skip
    assert load_card(tmp_path / "model") == load_card(former)
    assert compute_conditioning_digest(tmp_path / "model") == compute_conditioning_digest(former)


def test_a_former_folder_that_is_continued_is_replaced_by_the_present_layout(former: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(former, folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    save_conditioning(folder, load_card(former), load_branch(former / "conditioning"), {}, "")
    assert not (folder / "conditioning" / "branch.safetensors").exists()
    assert load_card(folder) == load_card(former)


@pytest.mark.parametrize("damage", ["missing", "former of another format"])
def test_a_damaged_former_folder_says_what_is_wrong(former: Path, tmp_path: Path, damage: str):
    folder = tmp_path / "model" / "conditioning"
    folder.mkdir(parents=True)
    shutil.copyfile(former / "conditioning" / "config.json", folder / "config.json")
    if damage == "missing":
        with pytest.raises(ModelError, match="is missing; restore the model folder"):
            load_branch(folder)
    else:
        edit_json(folder / "config.json", lambda v: v.update(format=0))
        with pytest.raises(ModelError, match="has format 0, this program reads 1 and 2"):
            load_card(tmp_path / "model")


def test_a_backbone_part_is_replaced_in_shards_below_16_mb(tmp_path: Path):
    folder = create_backbone(tmp_path / "backbone", BackboneWidths(codec_channels=8, codec_blocks=(1, 1, 1, 1)))
    torch.manual_seed(1)
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    weights = {n: t.half().float() for n, t in unet.state_dict().items()}
    save_backbone_part(folder, "unet", unet)
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert max(s.stat().st_size for s in shards) < 16_000_000
    assert (folder / ".unet.previous").is_dir()
    assert next(unet.parameters()).dtype == torch.float32
    restored = Backbone(folder, device="cpu", dtype="fp32").unet.state_dict()
    assert all(torch.equal(tensor, restored[name]) for name, tensor in weights.items())


def test_a_toy_model_is_the_same_for_the_same_seed_only(tmp_path: Path):
    first, again, other = (
        build_tiny_model(tmp_path / name, seed) for name, seed in (("first", 3), ("again", 3), ("other", 4))
    )
    card = (first / "conditioning" / "card.json").read_text()
    assert (again / "conditioning" / "card.json").read_text() == card
    assert (other / "conditioning" / "card.json").read_text() != card


def test_a_backbone_is_never_created_over_another(tiny_model: Path):
    with pytest.raises(RequestError, match="exists; give a folder that does not, nothing is overwritten"):
        create_backbone(tiny_model / "backbone", TOY_WIDTHS)
