"""Adapters: low-rank updates on real networks of toy width, immutable versions, the pointer, and the engine that
follows it.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import ModelError, NotFoundError, RequestError, StoreError
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.model.adapters import AdapterCard, AdapterStore, build_networks, compute_base_digest
from progidiff.model.lora import (
    LoraSettings,
    collect_full,
    collect_tensors,
    inject_lora,
    load_tensors,
    merge_lora,
    named_adapter_parameters,
)
from progidiff.model.pipeline import ProposalPipeline
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest

LIVER = Query("liver", "liver")
ALL_TARGETS = LoraSettings(rank=2, alpha=4, target_modules=("encoder", "query_head", "injection", "denoiser"))
SMALL = LoraSettings(rank=2, alpha=4)
FILES = ("adapter_model.safetensors", "adapter_config.json", "adapter.json", "run.json", "README.md")


@lru_cache
def load_once(model: Path) -> ProposalPipeline:
    return Engine(model, device="cpu", dtype="fp32").load()


def copy_networks(model: Path) -> ProposalPipeline:
    """Networks of a model that a test may change."""
    base = load_once(model)
    return ProposalPipeline(base.backbone, copy.deepcopy(base.branch), base.codec, unet=copy.deepcopy(base.unet))


@pytest.fixture
def pipeline(tiny_model: Path) -> ProposalPipeline:
    return copy_networks(tiny_model)


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    return replace(
        load_volume(
            phantom_writer(tmp_path_factory.mktemp("adapters") / "phantom.nii.gz", shape=(40, 30, 4)), modality="CT"
        ),
        modality="MR",
    )


def slices(branch: Any, count: int = 2) -> torch.Tensor:
    config = branch.config
    return torch.rand(count, 3, config.height, config.width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def stir(networks: dict[str, torch.nn.Module], seed: int = 0, scale: float = 0.3) -> None:
    """What training would do, at random: every adapter parameter moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for network in networks.values():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def trained_tensors(model: Path, settings: LoraSettings = SMALL, seed: int = 0) -> dict[str, torch.Tensor]:
    pipeline = copy_networks(model)
    stir(inject_lora(pipeline.branch, pipeline.unet, settings), seed)
    return collect_tensors(pipeline.branch, pipeline.unet, settings)


def add(
    store: AdapterStore,
    model: Path,
    name: str = "mr",
    tensors: dict[str, torch.Tensor] | None = None,
    settings: LoraSettings = SMALL,
    **changes: Any,
) -> AdapterCard:
    tensors = trained_tensors(model, settings) if tensors is None else tensors
    values: dict[str, Any] = {
        "modality": "MR",
        "structures": ("liver", "spleen"),
        "base": compute_base_digest(model),
        "base_name": "tiny@1",
        "run": {"note": "random"},
        "readme": lambda card: f"# {card.full_name}\n",
        "lora": settings,
    }
    return store.add(name, "lora", tensors, **{**values, **changes})


@pytest.fixture(scope="module")
def tensors(tiny_model: Path) -> dict[str, torch.Tensor]:
    return trained_tensors(tiny_model)


# --- low-rank updates ---


@pytest.mark.parametrize("settings", [SMALL, ALL_TARGETS], ids=["default", "all"])
def test_a_fresh_adapter_changes_nothing(pipeline: ProposalPipeline, settings: LoraSettings):
    inputs = slices(pipeline.branch)
    before = pipeline.encode_slices(inputs)
    residuals = pipeline.branch.compute_residuals(
        before, torch.rand(2, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    )
    inject_lora(pipeline.branch, pipeline.unet, settings)
    after = pipeline.encode_slices(inputs)
    again = pipeline.branch.compute_residuals(
        after, torch.rand(2, 1, 32, 64, generator=torch.Generator().manual_seed(0))
    )
    assert torch.equal(before.fine, after.fine)
    assert torch.equal(before.coarse, after.coarse)
    assert all(torch.equal(a, b) for a, b in zip(residuals[0], again[0], strict=True))


def test_only_the_adapter_and_the_norms_are_trained(pipeline: ProposalPipeline):
    networks = inject_lora(pipeline.branch, pipeline.unet, SMALL)
    assert set(networks) == {"branch"}
    trained = {n for n, p in pipeline.branch.named_parameters() if p.requires_grad}
    assert all(".lora_" in n or ".norm" in n for n in trained)
    assert {n.split(".")[0] for n in trained} == {"encoder", "query_head"}
    assert len(trained) == len(named_adapter_parameters(pipeline.branch, None, SMALL))


def test_without_norms_only_the_low_rank_factors_are_trained(pipeline: ProposalPipeline):
    settings = replace(SMALL, norms=False)
    inject_lora(pipeline.branch, None, settings)
    assert all(".lora_" in n for n in named_adapter_parameters(pipeline.branch, None, settings))


def test_the_denoiser_is_adapted_only_on_request(pipeline: ProposalPipeline):
    networks = inject_lora(pipeline.branch, pipeline.unet, ALL_TARGETS)
    assert set(networks) == {"branch", "unet"}
    names = named_adapter_parameters(pipeline.branch, pipeline.unet, ALL_TARGETS)
    assert any(n.startswith("unet.") and "to_q.lora_A" in n for n in names)
    assert any(n.startswith("branch.zero.") for n in names)


def test_loading_an_adapter_loads_every_tensor(tiny_model: Path, pipeline: ProposalPipeline):
    saved = trained_tensors(tiny_model, ALL_TARGETS)
    inject_lora(pipeline.branch, pipeline.unet, ALL_TARGETS, seed=9)
    load_tensors(saved, pipeline.branch, pipeline.unet, ALL_TARGETS, Path("x"))
    loaded = collect_tensors(pipeline.branch, pipeline.unet, ALL_TARGETS)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[n], saved[n]) for n in saved)


@pytest.mark.parametrize("damage", ["missing", "unknown", "of another shape"])
def test_a_tensor_that_does_not_fit_is_named(tensors: dict[str, torch.Tensor], pipeline: ProposalPipeline, damage: str):
    changed = dict(tensors)
    name = next(iter(changed))
    if damage == "unknown":
        changed["branch.nobody.lora_A.weight"] = torch.zeros(1)
    elif damage == "missing":
        del changed[name]
    else:
        changed[name] = changed[name][:1]
    with pytest.raises(ModelError, match=damage):
        merge_lora(changed, pipeline.branch, None, SMALL, Path("x"))


def test_numbers_that_are_not_finite_are_refused(tensors: dict[str, torch.Tensor], pipeline: ProposalPipeline):
    name = next(iter(tensors))
    with pytest.raises(ModelError, match="not finite"):
        merge_lora(
            {**tensors, name: torch.full_like(tensors[name], float("nan"))}, pipeline.branch, None, SMALL, Path("x")
        )


def test_merged_weights_answer_as_the_adapter_beside_them_does(pipeline: ProposalPipeline, tiny_model: Path):
    saved = trained_tensors(tiny_model, ALL_TARGETS)
    merged, unet = merge_lora(saved, pipeline.branch, pipeline.unet, ALL_TARGETS, Path("x"))
    kept = copy_networks(tiny_model)
    inject_lora(kept.branch, kept.unet, ALL_TARGETS)
    load_tensors(saved, kept.branch, kept.unet, ALL_TARGETS, Path("x"))
    inputs = slices(merged)
    with torch.no_grad():
        torch.testing.assert_close(
            merged.encode_slices(inputs).fine, kept.branch.encode_slices(inputs).fine, rtol=1e-3, atol=1e-4
        )
        assert unet is not None
        noise, text = torch.randn(1, 4, 4, 8), torch.randn(1, 5, 384)
        torch.testing.assert_close(unet(noise, 5, text).sample, kept.unet(noise, 5, text).sample, rtol=1e-3, atol=1e-4)
    assert merged.state_dict().keys() == copy_networks(tiny_model).branch.state_dict().keys()


def test_merging_leaves_the_base_bit_for_bit_as_it_was(pipeline: ProposalPipeline, tensors: dict[str, torch.Tensor]):
    before = {n: t.clone() for n, t in pipeline.branch.state_dict().items()}
    merged, _ = merge_lora(tensors, pipeline.branch, pipeline.unet, SMALL, Path("x"))
    assert all(torch.equal(t, before[n]) for n, t in pipeline.branch.state_dict().items())
    assert any(not torch.equal(t, before[n]) for n, t in merged.state_dict().items())


def test_a_full_version_replaces_all_weights(store: AdapterStore, tiny_model: Path, pipeline: ProposalPipeline):
    other = copy_networks(tiny_model)
    other.branch.requires_grad_(True)
    stir({"branch": other.branch}, scale=0.1)
    card = store.add(
        "all", "full", collect_full(other.branch), modality="CT", structures=("liver",),
        base=compute_base_digest(tiny_model), base_name="tiny@1",
        run={}, readme=lambda c: c.full_name, shapes=other.branch.shapes,
    )  # fmt: skip
    branch, unet = build_networks(card, store.load(card, card.base), pipeline.branch, pipeline.unet, Path("x"))
    assert unet is pipeline.unet
    wanted = other.branch.state_dict()
    assert all(torch.equal(t, wanted[n].half().float()) for n, t in branch.state_dict().items())


def test_a_full_version_of_more_than_the_branch_is_refused(store: AdapterStore, tiny_model: Path):
    tensors = {"branch.x": torch.zeros(1), "unet.x": torch.zeros(1)}
    about = {"modality": "CT", "structures": ("liver",), "base": "b", "base_name": "tiny@1", "run": {}}
    with pytest.raises(RequestError, match="holds the conditioning branch alone"):
        store.add("all", "full", tensors, **about, readme=str, shapes=load_once(tiny_model).branch.shapes)
    with pytest.raises(ModelError, match="holds tensors of branch and unet, got other"):
        store.add("all", "lora", {"other.x": torch.zeros(1)}, **about, readme=str, lora=SMALL)
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must lie in 1..128"),
        ({"alpha": 0.0}, "alpha must"),
        ({"target_modules": ("vae",)}, "Targets vae"),
    ],
)
def test_settings_out_of_range_are_refused(pipeline: ProposalPipeline, changes: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        inject_lora(pipeline.branch, None, replace(SMALL, **changes))


# --- versions ---


def test_a_version_comes_back_as_it_was_written(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    card = add(store, tiny_model, tensors=tensors)
    again = AdapterStore(store.root).find("mr@1")
    assert again == card
    assert (again.full_name, again.lora, again.structures) == ("mr@1", SMALL, ("liver", "spleen"))
    loaded = store.load(again, compute_base_digest(tiny_model))
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)
    assert store.run(again) == {"note": "random"}
    assert (store.folder(again) / "README.md").read_text() == "# mr@1\n"


def test_a_new_version_is_not_served_before_it_is_published(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    add(store, tiny_model, tensors=tensors)
    assert store.current("mr") is None
    with pytest.raises(NotFoundError, match="no published version. Ask for one by number \\(mr@1\\)"):
        store.find("mr")
    store.publish("mr", 1)
    assert store.find("mr").version == 1


def test_version_numbers_are_never_given_twice(store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]):
    assert [add(store, tiny_model, tensors=tensors).version for _ in range(2)] == [1, 2]
    shutil.rmtree(store.root / "mr" / "2")
    assert add(store, tiny_model, tensors=tensors).version == 3


def test_rollback_goes_back_through_what_was_served(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    for _ in range(3):
        add(store, tiny_model, tensors=tensors)
    for version in (1, 3, 2):
        store.publish("mr", version)
    assert [store.rollback("mr"), store.rollback("mr"), store.rollback("mr")] == [3, 1, None]
    assert store.current("mr") is None
    with pytest.raises(NotFoundError, match="no earlier version"):
        store.rollback("mr")
    assert [(e["event"], e["version"]) for e in store.history("mr")] == [
        ("added", 1), ("added", 2), ("added", 3), ("published", 1), ("published", 3), ("published", 2),
        ("rolled back", 3), ("rolled back", 1), ("rolled back", None),
    ]  # fmt: skip


def test_publishing_again_what_is_served_adds_nothing_to_go_back_through(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    add(store, tiny_model, tensors=tensors)
    store.publish("mr", 1)
    store.publish("mr", 1)
    assert store.rollback("mr") is None


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "mr 2", "mr@2", "auto", "None", "x" * 65])
def test_a_name_that_would_not_do_is_refused(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], name: str
):
    with pytest.raises(RequestError, match="cannot name an adapter"):
        add(store, tiny_model, name=name, tensors=tensors)
    assert not store.root.exists()


@pytest.mark.parametrize("reference", ["mr@", "mr@0", "mr@x", "../mr", "mr@1@2", ""])
def test_a_reference_that_is_none_is_refused(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], reference: str
):
    add(store, tiny_model, tensors=tensors)
    with pytest.raises(NotFoundError, match="names no adapter; write name or name@version.*There are: mr"):
        store.find(reference)


def test_an_unknown_name_or_version_is_answered_with_those_there_are(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    with pytest.raises(NotFoundError, match="no adapter 'mr'.*holds none yet; `progidiff adapt` trains one"):
        store.find("mr")
    add(store, tiny_model, tensors=tensors)
    with pytest.raises(NotFoundError, match="no adapter 'pet'. There are: mr"):
        store.find("pet")
    with pytest.raises(NotFoundError, match="no version 7; there are: 1"):
        store.publish("mr", 7)
    with pytest.raises(NotFoundError, match="no adapter 'pet'"):
        store.rollback("pet")
    assert not (store.root / "pet").exists()


@pytest.mark.parametrize("file", FILES)
def test_a_version_without_one_of_its_files_is_refused_and_listed_as_such(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], file: str
):
    card = add(store, tiny_model, tensors=tensors)
    store.publish("mr", 1)
    (store.folder(card) / file).unlink()
    with pytest.raises(ModelError, match=f"{file} is missing.*progidiff adapters rollback mr"):
        store.find("mr")
    assert "is missing" in store.entries()[0].problem


def test_a_damaged_file_is_refused_and_not_published(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    for _ in range(2):
        card = add(store, tiny_model, tensors=tensors)
    store.publish("mr", 1)
    path = store.folder(card) / "adapter_model.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ModelError, match="is damaged.*rollback"):
        store.publish("mr", 2)
    assert store.current("mr") == 1
    with pytest.raises(ModelError, match="is damaged"):
        store.load(card, card.base)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}'])
def test_an_unreadable_card_is_refused(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], content: str
):
    card = add(store, tiny_model, tensors=tensors)
    path = store.folder(card) / "adapter.json"
    path.chmod(0o644)
    path.write_text(content)
    with pytest.raises(ModelError, match=r"adapter.json' cannot be read"):
        AdapterStore(store.root).find("mr@1")


def test_an_unreadable_pointer_is_an_error_that_publishing_cures(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    add(store, tiny_model, tensors=tensors)
    (store.root / "mr" / "CURRENT").write_text("nonsense")
    with pytest.raises(ModelError, match="progidiff adapters use mr@VERSION"):
        store.current("mr")
    assert "cannot be read" in store.entries()[0].problem
    store.publish("mr", 1)
    assert store.current("mr") == 1


def test_an_adapter_of_another_base_is_refused(store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]):
    card = add(store, tiny_model, tensors=tensors, base="0" * 64, base_name="other@7")
    with pytest.raises(ModelError, match="another base \\(other@7.*progidiff adapt --name mr"):
        store.load(card, compute_base_digest(tiny_model))


def test_a_full_disk_leaves_nothing_behind_and_no_number_twice(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    add(store, tiny_model, tensors=tensors)
    store.publish("mr", 1)

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progidiff.storage.versions.atomic_folder", refuse)
    with pytest.raises(StoreError, match="No space left.*Free some disk space"):
        add(store, tiny_model, tensors=tensors)
    monkeypatch.undo()
    assert sorted(p.name for p in (store.root / "mr").iterdir()) == [".lock", "1", "CURRENT", "history.jsonl"]
    assert store.current("mr") == 1
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="could not be written"):
        add(store, tiny_model, tensors=tensors)
    monkeypatch.undo()
    assert add(store, tiny_model, tensors=tensors).version == 3


def test_the_files_of_a_version_cannot_be_written_by_accident(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    card = add(store, tiny_model, tensors=tensors)
    assert sorted(p.name for p in store.folder(card).iterdir()) == sorted(FILES)
    assert {os.stat(p).st_mode & 0o777 for p in store.folder(card).iterdir()} == {0o444}


def _add_and_publish(root: str, count: int) -> None:
    store = AdapterStore(root)
    for _ in range(count):
        card = store.add(
            "mr", "lora", {"branch.x": torch.zeros(1)}, modality="MR", structures=("liver",), base="b",
            base_name="t@1", run={},
            readme=lambda c: "", lora=SMALL,
        )  # fmt: skip
        store.publish("mr", card.version)


def test_processes_that_publish_at_the_same_time_lose_nothing(store: AdapterStore):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_and_publish, args=(str(store.root), 4)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert store.entries()[0].versions == tuple(range(1, 13))
    published = [e["version"] for e in store.history("mr") if e["event"] == "published"]
    assert sorted(published) == list(range(1, 13))
    assert store.current("mr") == published[-1]
    assert [store.rollback("mr") for _ in range(12)] == [*published[-2::-1], None]


# --- the engine ---


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model folder of its own, for its adapters."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def run(engine: Engine, volume: Volume, adapter: str | None = None) -> tuple[str, np.ndarray]:
    result = engine.propose(
        ProposalRequest(queries=[LIVER], num_proposals=1, num_inference_steps=1, adapter=adapter), volume
    )
    return result.adapter, result.probabilities


def test_the_engine_picks_up_a_new_version_between_two_requests(model: Path, volume: Volume):
    engine = Engine(model, device="cpu", dtype="fp32")
    name, base = run(engine, volume)
    assert name == ""
    for seed in (1, 2):
        add(engine.adapters, model, tensors=trained_tensors(model, seed=seed))
    assert run(engine, volume)[0] == ""
    other_process = AdapterStore(model / "adapters")
    answers = [base]
    for version in (1, 2):
        other_process.publish("mr", version)
        name, answer = run(engine, volume)
        assert name == f"mr@{version}"
        assert all((answer != earlier).any() for earlier in answers)
        answers.append(answer)
    other_process.rollback("mr")
    name, answer = run(engine, volume)
    assert name == "mr@1"
    assert (answer == answers[1]).all()
    name, answer = run(engine, volume, "none")
    assert name == ""
    assert (answer == base).all()
    assert engine.info()["adapters"] == ["mr"]


def test_the_adapter_is_chosen_by_the_modality_of_the_image(model: Path, volume: Volume):
    engine = Engine(model, device="cpu", dtype="fp32")
    add(engine.adapters, model, tensors=trained_tensors(model))
    engine.adapters.publish("mr", 1)
    assert run(engine, replace(volume, modality="CT"))[0] == ""
    assert run(engine, volume, "auto")[0] == "mr@1"
    assert run(engine, replace(volume, modality="CT"), "mr")[0] == "mr@1"


def test_of_several_adapters_for_a_modality_the_one_published_last_is_chosen(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]
):
    base = compute_base_digest(tiny_model)
    for name in ("b", "a", "c"):
        add(store, tiny_model, name=name, tensors=tensors)
        store.publish(name, 1)
    chosen = store.pick_for("MR", base)
    assert chosen is not None
    assert chosen.full_name == "c@1"
    store.rollback("c")
    chosen = store.pick_for("MR", base)
    assert chosen is not None
    assert chosen.full_name == "a@1"
    assert store.pick_for("CT", base) is None


def test_the_adapter_published_last_is_chosen_also_when_the_clock_was_set_back(
    store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
):
    base = compute_base_digest(tiny_model)
    for name, now in (("one", 5000.0), ("two", 1000.0)):
        add(store, tiny_model, name, tensors)
        monkeypatch.setattr("progidiff.storage.versions.time.time", lambda now=now: now)
        store.publish(name, 1)
        assert store.pick_for("MR", base) == store.card(name, 1)
    (store.root / "one" / "CURRENT").write_text("damaged")
    add(store, tiny_model, "three", tensors)
    assert store.publish("three", 1).name == "three"


def test_an_unpublished_version_can_be_asked_for_by_number(model: Path, volume: Volume):
    engine = Engine(model, device="cpu", dtype="fp32")
    add(engine.adapters, model, tensors=trained_tensors(model))
    assert run(engine, volume, "mr@1")[0] == "mr@1"
    assert engine.info()["adapters"] == []


def test_an_adapter_of_another_base_is_passed_over_unless_it_is_named(
    model: Path, volume: Volume, tensors: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
):
    engine = Engine(model, device="cpu", dtype="fp32")
    add(engine.adapters, model, tensors=tensors, base="0" * 64, base_name="other@7")
    engine.adapters.publish("mr", 1)
    assert run(engine, volume)[0] == ""
    assert "was trained for another base (other@7)" in caplog.text
    with pytest.raises(ModelError, match="another base"):
        run(engine, volume, "mr")


def test_an_adapter_for_other_widths_is_refused_even_if_its_digest_fits(
    model: Path, volume: Volume, tensors: dict[str, torch.Tensor]
):
    engine = Engine(model, device="cpu", dtype="fp32")
    add(engine.adapters, model, tensors={n: t for n, t in tensors.items() if "norm" not in n})
    with pytest.raises(ModelError, match="missing: branch.encoder.*norm"):
        run(engine, volume, "mr@1")


def test_a_second_prompt_reuses_the_features_of_the_same_version_only(model: Path, volume: Volume):
    engine = Engine(model, device="cpu", dtype="fp32")
    for seed in (1, 2):
        add(engine.adapters, model, tensors=trained_tensors(model, seed=seed))
    for version in (1, 2):
        engine.adapters.publish("mr", version)
        first, second = run(engine, volume)[1], run(engine, volume)[1]
        assert (first == second).all()
    assert {key[0] for key in engine._features} == {"mr@1", "mr@2"}


def test_versions_that_are_no_longer_used_leave_the_memory(model: Path, volume: Volume):
    engine = Engine(model, device="cpu", dtype="fp32")
    for seed in range(3):
        add(engine.adapters, model, tensors=trained_tensors(model, seed=seed))
    for version in (1, 2, 3):
        run(engine, volume, f"mr@{version}")
    assert list(engine._adapted) == ["mr@2", "mr@3"]
    assert {key[0] for key in engine._features} == {"mr@2", "mr@3"}


def test_a_damaged_served_version_is_an_error_with_its_cure_and_info_still_answers(
    model: Path, volume: Volume, tensors: dict[str, torch.Tensor]
):
    engine = Engine(model, device="cpu", dtype="fp32")
    card = add(engine.adapters, model, tensors=tensors)
    engine.adapters.publish("mr", 1)
    (engine.adapters.folder(card) / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="progidiff adapters rollback mr"):
        run(engine, volume)
    assert engine.info()["error"] == ""
    assert run(engine, volume, "none")[0] == ""


def test_a_card_comes_back_from_its_file(store: AdapterStore, tiny_model: Path, tensors: dict[str, torch.Tensor]):
    card = add(store, tiny_model, tensors=tensors)
    values = json.loads((store.folder(card) / "adapter.json").read_text())
    assert AdapterCard.from_dict(values) == card
    assert values["lora"] == {"rank": 2, "alpha": 4, "target_modules": ["encoder", "query_head"], "norms": True}


# --- the server's task ---


@pytest.fixture
def ask(model: Path, tmp_path: Path, phantom_writer: Callable[..., Path]) -> Callable[..., dict[str, Any]]:
    """One request to the infer task of the app, as the host makes it."""
    from progidiff.server.options import ServerOptions
    from progidiff.server.tasks.volumes import build_task

    conf = {
        "model_dir": str(model),
        "store": str(tmp_path / "store"),
        "adapters": str(tmp_path / "elsewhere"),
        "device": "cpu",
    }
    task = build_task(ServerOptions.from_conf(conf, str(tmp_path)), model, lambda: None)
    image = phantom_writer(tmp_path / "phantom.nii.gz", shape=(40, 30, 4))

    def send(**params: Any) -> dict[str, Any]:
        request = {"prompt": "liver", "num_proposals": 1, "steps": 1, "modality": "MR", **params}
        file, result = task({"image": str(image), "image_id": "phantom", "image_info": {}, "params": request})
        Path(file).unlink()
        return {**result, "choices": task.config()["adapter"]}

    return send


def test_a_kept_result_of_an_older_version_is_not_shown_as_new(
    ask: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
):
    store = AdapterStore(tmp_path / "elsewhere")
    assert (ask()["adapter"], ask()["cached"]) == ("", True)
    assert ask()["choices"] == ["auto", "none"]
    for seed in (1, 2):
        version = add(store, model, tensors=trained_tensors(model, seed=seed)).version
        assert (ask()["adapter"], ask()["cached"]) == ("" if version == 1 else "mr@1", True)
        store.publish("mr", version)
        first, second = ask(), ask()
        assert (first["adapter"], first["cached"], second["cached"]) == (f"mr@{version}", False, True)
    assert first["choices"] == ["auto", "none", "mr"]
    store.rollback("mr")
    assert (ask()["adapter"], ask()["cached"]) == ("mr@1", True)
    assert (ask(adapter="none")["adapter"], ask(adapter="mr@2")["adapter"]) == ("", "mr@2")


def test_warnings_are_about_the_version_that_answered(ask: Callable[..., dict[str, Any]], model: Path, tmp_path: Path):
    assert any("tiny@1 was trained on CT" in w for w in ask()["warnings"])
    store = AdapterStore(tmp_path / "elsewhere")
    add(store, model, tensors=trained_tensors(model))
    store.publish("mr", 1)
    assert ask()["warnings"] == []
    assert ask(prompt="aorta")["warnings"] == ["mr@1 was trained on liver, spleen, not on aorta."]


@pytest.mark.parametrize("adapter", ["nobody", "nobody@1", "mr@9", "mr@", "../mr"])
def test_a_request_for_an_adapter_that_is_not_there_is_answered_with_those_that_are(
    ask: Callable[..., dict[str, Any]], model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], adapter: str
):
    store = AdapterStore(tmp_path / "elsewhere")
    add(store, model, tensors=tensors)
    store.publish("mr", 1)
    with pytest.raises(RequestError, match="one of auto, none, mr|there are: 1|There are: mr"):
        ask(adapter=adapter)
