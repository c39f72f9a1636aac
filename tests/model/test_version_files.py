"""Versions as others read them: PEFT loads an adapter and gets the numbers that we get."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from progidiff.errors import ModelError
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning_model import ConditioningModel
from progidiff.model.folder import find_backbone, load_pipeline
from progidiff.model.lora import LoraSettings, collect_full, collect_tensors, inject_lora
from progidiff.model.pipeline import ProposalPipeline
from progidiff.model.version_files import pack_weights, unpack_weights

FORMER = Path(__file__).parents[1] / "data" / "former_0_1_0" / "model"
SHIPPED = Path(__file__).parents[2] / "apps" / "progidiff" / "model"
ALL_TARGETS = LoraSettings(rank=2, alpha=4, target_modules=("encoder", "query_head", "injection", "denoiser"))


def load(model: Path) -> ProposalPipeline:
    return load_pipeline(model, Backbone(find_backbone(model), device="cpu", dtype="fp32"))[1]


def add(store: AdapterStore, model: Path, kind: Any, settings: LoraSettings | None) -> AdapterCard:
    """A version with random weights."""
    pipeline = load(model)
    branch, unet = copy.deepcopy(pipeline.branch), copy.deepcopy(pipeline.unet)
    if settings is None:
        networks: dict[str, torch.nn.Module] = {"branch": branch.requires_grad_(True)}
    else:
        networks = inject_lora(branch, unet, settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for network in networks.values():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    tensors = collect_full(branch) if settings is None else collect_tensors(branch, unet, settings)
    return store.add(
        "mr", kind, tensors, modality="MR", structures=("liver",), base=compute_base_digest(model), base_name="tiny@1",
        run={}, readme=lambda card: card.full_name, lora=settings, shapes=branch.shapes,
    )  # fmt: skip


def is_same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize(
    "settings",
    [LoraSettings(rank=2, alpha=4), LoraSettings(rank=2, alpha=4, norms=False), ALL_TARGETS],
    ids=["default", "no norms", "all"],
)
def test_peft_loads_an_adapter_and_merges_it_to_the_weights_that_serve(
    tiny_model: Path, tmp_path: Path, settings: LoraSettings
):
    store = AdapterStore(tmp_path)
    card = add(store, tiny_model, "lora", settings)
    pipeline = load(tiny_model)
    ours, unet = build_networks(card, store.load(card, card.base), pipeline.branch, pipeline.unet, store.folder(card))

    base = ConditioningModel.from_pretrained(tiny_model / "conditioning")
    beside = PeftModel.from_pretrained(base, store.folder(card))
    slices = torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        found, wanted = beside.encode_slices(slices).fine, ours.encode_slices(slices).fine
        assert not torch.equal(wanted, pipeline.encode_slices(slices).fine)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert is_same(ours, beside.merge_and_unload())
    if "denoiser" in settings.target_modules:
        adapted = PeftModel.from_pretrained(copy.deepcopy(pipeline.unet), store.folder(card), subfolder="unet")
        assert is_same(unet, adapted.merge_and_unload())
    else:
        assert unet is pipeline.unet
        assert not (store.folder(card) / "unet").exists()


def test_the_shipped_adapter_is_a_peft_folder():
    store = AdapterStore(SHIPPED / "adapters")
    card = store.card("mr", 2)
    assert card.format == 2
    base = ConditioningModel.from_pretrained(SHIPPED, subfolder="conditioning")
    tensors = store.load(card, compute_base_digest(SHIPPED))
    ours, _ = build_networks(card, tensors, base, torch.nn.Identity(), store.folder(card))
    assert is_same(ours, PeftModel.from_pretrained(base, store.folder(card)).merge_and_unload())


def test_diffusers_loads_a_version_whose_weights_were_all_trained(tiny_model: Path, tmp_path: Path):
    store = AdapterStore(tmp_path)
    card = add(store, tiny_model, "full", None)
    pipeline = load(tiny_model)
    ours, _ = build_networks(card, store.load(card, card.base), pipeline.branch, pipeline.unet, store.folder(card))
    assert is_same(ours, ConditioningModel.from_pretrained(store.folder(card)))


def test_a_version_of_a_former_one_is_read_as_it_is():
    store = AdapterStore(FORMER / "adapters")
    for number in (1, 2):
        card = store.card("mr", number)
        assert (card.format, card.networks) == (1, ("branch",))
        tensors = store.load(card, compute_base_digest(FORMER))
        kept = load_file(store.folder(card) / "adapter.safetensors")
        assert tensors.keys() == kept.keys()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in tensors.items())
        again = unpack_weights("lora", ("branch",), pack_weights("lora", tensors))
        assert again.keys() == kept.keys()
        assert all(torch.equal(tensor, kept[name]) for name, tensor in again.items())


def test_a_damaged_part_of_two_is_noticed(tiny_model: Path, tmp_path: Path):
    store = AdapterStore(tmp_path)
    card = add(store, tiny_model, "lora", ALL_TARGETS)
    path = store.folder(card) / "unet" / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match="is damaged"):
        store.load(card, card.base)
    path.unlink()
    with pytest.raises(ModelError, match=r"unet/adapter_model.safetensors is missing"):
        AdapterStore(tmp_path).find("mr@1")


def test_tensors_that_are_not_named_as_peft_names_them_are_refused():
    contents = pack_weights("full", {"branch.x": torch.zeros(1)})
    with pytest.raises(ModelError, match="'x', which is no tensor of a PEFT adapter"):
        unpack_weights("lora", ("branch",), {"adapter_model.safetensors": next(iter(contents.values()))})
