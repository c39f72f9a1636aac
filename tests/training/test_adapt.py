"""`progidiff adapt` on real networks of toy width: splits, refusals, resuming, the gate, and the command line."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import CancelledError, GeometryError, ImageError, ModelError, RequestError, StoreError
from progidiff.images.reading import load_volume
from progidiff.model.adapters import AdapterStore, compute_base_digest
from progidiff.model.folder import load_card
from progidiff.model.lora import LoraSettings
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.training.adapt import AdaptResult, judge, run_adapt
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.split import pick_evenly, prepare_data, restrict_cache, split_slices
from support.cards import read_hub_card
from support.labelled_phantoms import write_case, write_table

QUICK = AdaptConfig(
    lora=LoraSettings(4, 8), steps=40, validate_every=10, batch_size=6, learning_rate=1e-2, num_proposals=2
)
BARELY = replace(QUICK, steps=2, validate_every=2, learning_rate=1e-7)
"""Trains nothing that shows: the version is as good as the base, which is not good enough."""


def write_study(folder: Path, names: tuple[str, ...] = ("one", "two", "three"), modality: str = "MR") -> Path:
    folder.mkdir(exist_ok=True)
    write_table(folder, {1: "liver", 2: "Left Kidney"})
    for shift, name in enumerate(names):
        write_case(folder, name, {1: np.s_[6:16, 6 + shift : 20, 2:8], 2: np.s_[24:30, 8:16, 1 + shift : 9]}, slices=12)
        (folder / f"{name}.json").write_text(json.dumps({"modality": modality}))
    return folder


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    return write_study(tmp_path / "studies")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AdaptResult]:
    """A folder with studies, model and the version that a whole run made."""
    folder = tmp_path_factory.mktemp("adapted")
    shutil.copytree(tiny_model, folder / "model")
    write_study(folder / "studies")
    return folder, run_adapt(folder / "studies", folder / "model", "mr", folder / "work", QUICK)


def relabel(studies: Path, name: str, change: Any, affine: np.ndarray | None = None) -> None:
    path = studies / "labels" / "final" / f"{name}.nii.gz"
    image = nibabel.load(path)
    values = change(np.asarray(image.dataobj).copy())
    nibabel.save(nibabel.Nifti1Image(values, image.affine if affine is None else affine), path)


def adapt(studies: Path, model: Path, config: AdaptConfig = BARELY, **options: Any) -> AdaptResult:
    return run_adapt(studies, model, "mr", model.parent / "work", config, **options)


# --- a whole run ---


def test_a_few_labels_make_a_published_version_that_is_better_on_held_back_volumes(
    adapted: tuple[Path, AdaptResult],
):
    folder, result = adapted
    assert result.published
    assert "mr@1 is published: Dice" in result.message
    assert result.figures["adapted"]["evidence"] > 0.5 > result.figures["base"]["evidence"]
    assert result.figures["adapted"]["consensus"] > result.figures["base"]["consensus"]
    assert (result.card.modality, result.card.structures, result.card.kind) == ("MR", ("left kidney", "liver"), "lora")
    assert result.card.base == compute_base_digest(folder / "model")


def test_a_version_says_how_it_was_made(adapted: tuple[Path, AdaptResult]):
    folder, result = adapted
    store = AdapterStore(folder / "model" / "adapters")
    run = store.run(result.card)
    assert {"config", "command", "commit", "packages", "data_sha256", "parent", "validation", "verdict"} <= set(run)
    assert run["parent"] is None
    assert len(run["held_out_cases"]) == 1
    assert set(run["data_sha256"]) == {"one", "two", "three"}
    assert set(run["training_cases"]).isdisjoint(run["held_out_cases"])
    readme = (store.folder(result.card) / "README.md").read_text()
    assert "# mr@1" in readme
    data = read_hub_card(store.folder(result.card) / "README.md")
    assert (data.base_model, data.library_name) == ("tiny", "peft")
    assert {"Dice, mean", "Dice, liver"} <= {figure.metric_name for figure in data.eval_results}
    assert all(structure in readme for structure in ("| liver |", "| left kidney |", "| mean |"))
    assert (store.folder(result.card) / "adapter_model.safetensors").stat().st_size < 5_000_000


def test_the_engine_serves_the_published_version_for_this_modality(adapted: tuple[Path, AdaptResult]):
    folder, _ = adapted
    engine = Engine(folder / "model", device="cpu")
    volume = load_volume(folder / "studies" / "one.nii.gz")
    assert engine.propose(ProposalRequest(queries=[Query("liver", "liver")], num_proposals=1), volume).adapter == "mr@1"


def test_the_same_command_again_trains_nothing_and_does_not_undo_a_rollback(
    adapted: tuple[Path, AdaptResult], tmp_path: Path
):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    again = run_adapt(folder / "studies", folder / "model", "mr", folder / "work", QUICK)
    assert "done before. mr@1 is published" in again.message
    assert again.figures == adapted[1].figures
    store = AdapterStore(folder / "model" / "adapters")
    store.rollback("mr")
    again = run_adapt(folder / "studies", folder / "model", "mr", folder / "work", QUICK)
    assert not again.published
    assert store.entries()[0].versions == (1,)
    assert store.current("mr") is None


def test_a_version_that_is_not_better_is_kept_but_not_published(adapted: tuple[Path, AdaptResult], tmp_path: Path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    result = run_adapt(folder / "studies", folder / "model", "mr", folder / "work", BARELY)
    assert not result.published
    assert "mr@2 is kept but not published: Dice" in result.message
    assert "mr@1 has" in result.message
    store = AdapterStore(folder / "model" / "adapters")
    assert store.current("mr") == 1
    assert store.run(store.card("mr", 2))["parent"] == "mr@1"
    assert "Not published." in (store.folder(result.card) / "README.md").read_text()


def test_a_better_version_is_left_unpublished_on_request(adapted: tuple[Path, AdaptResult], tmp_path: Path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    AdapterStore(folder / "model" / "adapters").rollback("mr")
    shutil.rmtree(folder / "model" / "adapters" / "mr" / "1")
    # The checkpoints are still there: the version is made again without training.
    result = run_adapt(folder / "studies", folder / "model", "mr", folder / "work", QUICK, publish=False)
    assert not result.published
    assert "mr@2 is kept and not published, as asked; `progidiff adapters use mr@2`" in result.message


def test_a_run_that_was_stopped_continues_as_if_it_had_not_been(adapted: tuple[Path, AdaptResult], tmp_path: Path):
    folder, whole = adapted
    model = Path(shutil.copytree(folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("adapters")))
    for stop_after in (13, 8):
        left = iter(range(stop_after))
        with pytest.raises(CancelledError, match="stopped on request at step"):
            adapt(folder / "studies", model, QUICK, is_cancelled=lambda left=left: next(left, None) is None)
    result = adapt(folder / "studies", model, QUICK)
    assert result.card.sha256 == whole.card.sha256
    assert result.figures == whole.figures


def test_training_stops_early_and_keeps_the_best_weights(studies: Path, model: Path):
    config = replace(QUICK, steps=60, validate_every=5, patience=1, learning_rate=3e-2)
    entries: list[dict[str, Any]] = []
    result = adapt(studies, model, config, report=entries.append)
    choice = AdapterStore(model / "adapters").run(result.card)["choice"]
    scores = {int(e["step"]): e["score"] for e in choice["history"]}
    assert choice["steps"] == max(scores, key=lambda s: (scores[s], -s))
    assert max(scores) < 60 or choice["steps"] >= 55
    assert {e["stage"] for e in entries} >= {"validation", "gate"}


def test_one_labelled_volume_is_enough_and_the_card_says_what_that_means(tmp_path: Path, model: Path):
    result = adapt(write_study(tmp_path / "single", ("only",)), model)
    store = AdapterStore(model / "adapters")
    run = store.run(result.card)
    assert run["same_patient"]
    assert run["held_out_cases"] == []
    assert "same patient" in (store.folder(result.card) / "README.md").read_text()


def test_the_proposals_are_trained_on_request_and_kept_only_if_they_gain(studies: Path, model: Path):
    lora = LoraSettings(2, 4, ("encoder", "query_head", "injection", "denoiser"))
    result = adapt(studies, model, replace(QUICK, lora=lora, steps=4, validate_every=2, proposal_steps=2))
    choice = AdapterStore(model / "adapters").run(result.card)["choice"]
    kept = choice["consensus_with_proposals"] > choice["consensus_without_proposals"]
    assert choice["proposals"] == kept
    assert result.card.lora is not None
    assert ("denoiser" in result.card.lora.target_modules) == kept
    assert Engine(model, device="cpu").propose(
        ProposalRequest(queries=[Query("liver", "liver")], num_proposals=1, adapter=result.card.full_name),
        load_volume(studies / "one.nii.gz"),
    )


def test_a_full_disk_publishes_nothing_and_the_training_is_kept(
    studies: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progidiff.storage.versions.atomic_folder", refuse)
    with pytest.raises(StoreError, match="No space left"):
        adapt(studies, model)
    monkeypatch.undo()
    assert AdapterStore(model / "adapters").entries() == []
    steps: list[dict[str, Any]] = []
    assert adapt(studies, model, report=steps.append).card.version == 1
    assert not [e for e in steps if e["stage"] == "evidence"]


def test_a_damaged_checkpoint_is_refused_with_its_cure(studies: Path, model: Path):
    adapt(studies, model)
    shutil.rmtree(model / "adapters")
    (state,) = (model.parent / "work").glob("mr-*/evidence/state.safetensors")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ModelError, match="is damaged.*remove it to start this run again"):
        adapt(studies, model)
    state.unlink()
    (best,) = (model.parent / "work").glob("mr-*/evidence/best.safetensors")
    best.write_bytes(b"")
    assert adapt(studies, model).card.version == 1


# --- kind full, names, modalities, and what is compared with ---


def test_a_version_of_kind_full_is_trained_published_and_served(studies: Path, model: Path):
    config = replace(QUICK, kind="full", learning_rate=3e-3)
    result = run_adapt(studies, model, None, model.parent / "work", config)
    assert result.card.full_name == "mr@1"  # Without a name it is the modality's.
    assert (result.card.kind, result.card.lora) == ("full", None)
    assert result.figures["adapted"]["evidence"] > 0.5 > result.figures["base"]["evidence"]
    store = AdapterStore(model / "adapters")
    assert store.run(result.card)["config"]["kind"] == "full"
    assert (
        "All weights of the conditioning branch (encoder, query_head trained)"
        in (store.folder(result.card) / "README.md").read_text()
    )
    volume = load_volume(studies / "one.nii.gz")
    store.publish("mr", 1)
    assert (
        Engine(model, device="cpu")
        .propose(ProposalRequest(queries=[Query("liver", "liver")], num_proposals=1), volume)
        .adapter
        == "mr@1"
    )


def test_structures_that_nobody_labelled_keep_the_answers_of_the_base(tmp_path: Path, model: Path):
    studies = write_study(tmp_path / "ct", modality="CT")
    write_table(studies, {1: "liver", 2: "spleen"})
    config = replace(QUICK, kind="full", learning_rate=3e-3, steps=30)
    kept, lost = (adapt(studies, model, replace(config, keep=keep), publish=False) for keep in (3.0, 0.0))
    assert kept.figures["adapted"]["kept"] > lost.figures["adapted"]["kept"]
    assert kept.figures["adapted"]["evidence"] > kept.figures["base"]["evidence"]
    assert "For the structures without labels it agrees with tiny@1 to" in kept.message
    assert "kept" not in kept.figures["base"]


def test_kind_full_trains_the_injection_on_request(studies: Path, model: Path):
    lora = LoraSettings(2, 4, ("encoder", "query_head", "injection"))
    result = adapt(studies, model, replace(BARELY, kind="full", lora=lora, proposal_steps=2))
    choice = AdapterStore(model / "adapters").run(result.card)["choice"]
    assert ("injection" in choice["targets"]) == (
        choice["consensus_with_proposals"] > choice["consensus_without_proposals"]
    )
    with pytest.raises(RequestError, match="kind full holds the conditioning branch, not the denoiser"):
        adapt(
            studies,
            model,
            replace(BARELY, kind="full", lora=LoraSettings(target_modules=("denoiser",)), proposal_steps=2),
        )


def test_one_volume_or_a_few_slices_are_enough_and_the_client_is_told(tmp_path: Path, model: Path):
    studies = write_study(tmp_path / "single", ("only",))
    result = adapt(studies, model, shots=1)
    assert "Only one volume is labelled" in result.message
    result = adapt(write_study(tmp_path / "three"), model, slices=3)
    run = AdapterStore(model / "adapters").run(result.card)
    assert sum(len(z) for z in run["training_slices"].values()) == 3


def test_a_version_is_compared_with_what_images_of_its_modality_get_now(
    adapted: tuple[Path, AdaptResult], tmp_path: Path
):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    result = run_adapt(folder / "studies", folder / "model", "other-site", folder / "work", BARELY)
    assert "other-site@1 is kept but not published" in result.message
    assert "mr@1 has" in result.message


def test_held_back_volumes_stay_held_back_as_labels_grow(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "studies", ("a", "b"))
    parent = {
        "held_out_cases": prepare(studies, tiny_model).held_out,
        "training_cases": prepare(studies, tiny_model).training.names,
    }
    for more in (("a", "b", "c"), ("a", "b", "c", "d")):
        write_study(studies, more)
        assert prepare(studies, tiny_model, parent=parent).held_out == parent["held_out_cases"]
    # A version that trained on a volume would look better on it than it is.
    lonely = {"held_out_cases": [], "training_cases": ["a", "b", "c"]}
    assert prepare(studies, tiny_model, parent=lonely).held_out == ["d"]


def test_one_modality_can_be_picked_out_of_several(studies: Path, model: Path):
    (studies / "two.json").write_text('{"modality": "CT"}')
    data = prepare(studies, model, modality="MR")
    assert (data.modality, data.unused) == ("MR", ["two"])
    os.utime(studies / "labels" / "final" / "two.nii.gz")
    assert prepare(studies, model, modality="newest").modality == "CT"
    (studies / "two.json").write_text('{"modality": "MR"}')
    with pytest.raises(RequestError, match="No labelled image is CT.*Leave the option modality out"):
        prepare(studies, model, modality="CT")


def test_a_name_stands_for_one_modality(adapted: tuple[Path, AdaptResult], tmp_path: Path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    studies = write_study(tmp_path / "ct", modality="CT")
    with pytest.raises(
        RequestError,
        match=r"Adapter 'mr' is for MR images \(mr@1\), but the labelled images are CT; choose another name",
    ):
        run_adapt(studies, folder / "model", "mr", folder / "work", BARELY)


def test_a_full_disk_during_training_is_told_and_the_run_continues_later(
    studies: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("progidiff.training.adapt_stages.save_file", refuse)
    with pytest.raises(
        StoreError, match="weights of step 2 cannot be written.*No space left.*continues from the last checkpoint"
    ):
        adapt(studies, model)
    monkeypatch.undo()
    assert not list((model.parent / "work").glob("mr-*/evidence/best.safetensors"))
    assert adapt(studies, model).card.version == 1


# --- what is trained on ---


def prepare(studies: Path, model: Path, **options: Any) -> Any:
    return prepare_data(studies, load_card(model), studies.parent / "cache", **options)


def test_held_back_volumes_are_chosen_by_patient_and_the_same_every_time(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "five", ("a", "b", "c", "d", "e"))
    first, second = prepare(studies, tiny_model), prepare(studies, tiny_model)
    assert first.held_out == second.held_out
    assert len(first.held_out) == 2
    assert set(first.training.names) | set(first.held_out) == {"a", "b", "c", "d", "e"}
    assert prepare(studies, tiny_model, shots=1).unused


def test_volumes_can_be_named(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "named", ("a", "b", "c", "d"))
    data = prepare(studies, tiny_model, cases=["a", "c.nii.gz"], held_out=["d"])
    assert (data.training.names, data.held_out, data.unused) == (["a", "c"], ["d"], ["b"])
    with pytest.raises(RequestError, match="trained on and held back at once"):
        prepare(studies, tiny_model, cases=["a"], held_out=["a"])


def test_slices_are_counted_over_all_training_volumes(studies: Path, tiny_model: Path):
    data = prepare(studies, tiny_model, slices=4)
    assert len(data.training) == 4
    assert len({v for v, _ in data.training.index}) == 2
    with pytest.raises(RequestError, match="only 1[0-9] of the training slices hold a structure"):
        prepare(studies, tiny_model, slices=40)


def test_only_slices_that_somebody_labelled_count(studies: Path, tiny_model: Path):
    data = prepare(studies, tiny_model, held_out=["three"], annotated={"one": [3, 4], "two": [], "three": [5]})
    assert [(data.training.names[v], z) for v, z in data.training.index] == [("one", 3), ("one", 4)]
    assert data.validation.index == [(0, 5)]


def test_a_restricted_cache_draws_only_what_is_left(studies: Path, tiny_model: Path):
    cache = restrict_cache(prepare(studies, tiny_model).training, [2, 5])
    drawn = cache.draw_balanced(50, np.random.default_rng(0))
    assert set(drawn) <= {0, 1}
    assert sum(int(p.any(axis=1).sum()) for p in cache.pixels) <= 2
    assert cache.read([0])[0].shape == (1, 3, 32, 64)


def test_one_volume_is_split_into_runs_of_slices(tmp_path: Path, tiny_model: Path):
    data = prepare(write_study(tmp_path / "single", ("only",)), tiny_model)
    held, kept = {z for _, z in data.validation.index}, {z for _, z in data.training.index}
    assert not held & kept
    assert held | kept == set(range(12))
    assert len(held) == 2
    assert data.same_patient


def test_too_few_labelled_slices_of_one_volume_are_refused(tmp_path: Path, tiny_model: Path):
    studies = write_study(tmp_path / "single", ("only",))

    def keep_two(label: np.ndarray) -> np.ndarray:
        label[:, :, :4] = label[:, :, 6:] = 0
        return label

    relabel(studies, "only", keep_two)
    with pytest.raises(ImageError, match="with 2 slices.*Label at least 4 slices.*or a second volume"):
        prepare(studies, tiny_model)


def test_slices_are_picked_evenly(studies: Path, tiny_model: Path):
    cache = prepare(studies, tiny_model).training
    picked = pick_evenly(cache, 3)
    assert len(set(picked)) == 3
    assert all(cache.pixels[v][z].any() for v, z in (cache.index[i] for i in picked))


def test_a_held_back_share_can_be_split_from_any_cache(studies: Path, tiny_model: Path):
    train, valid = split_slices(prepare(studies, tiny_model).training, share=0.5)
    assert set(train.index).isdisjoint(valid.index)


# --- something new ---


def test_a_structure_that_the_model_does_not_know_is_learned_and_picked_by_its_name(tiny_model: Path, tmp_path: Path):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    studies = write_study(tmp_path / "studies")
    write_table(studies, {1: "liver", 2: "myocardium"})
    result = run_adapt(studies, model, None, tmp_path / "work", QUICK)
    assert (result.card.full_name, result.card.structures) == ("mr-myocardium@1", ("liver", "myocardium"))
    assert result.published, result.message
    assert "for myocardium on the held-back slices" in result.message
    engine = Engine(model, device="cpu")
    assert engine.find_taught() == ("myocardium",)
    picked = engine.pick_adapter(None, "MR", ["myocardium"])
    assert picked is not None
    assert picked.full_name == "mr-myocardium@1"
    assert engine.pick_adapter(None, "CT", ["myocardium"]) is None
    known = CliRunner().invoke(app, ["prompts", "--model", str(model)])
    assert "myocardium" in known.output
    assert "liver" in known.output
    engine.adapters.rollback("mr-myocardium")
    assert engine.find_taught() == ()


def test_what_is_new_is_learned_in_as_many_steps_as_it_has_slices():
    config = AdaptConfig()
    assert [config.complete("MR", True, count).steps for count in (1, 20, 40, 500)] == [250, 250, 700, 1000]
    assert config.complete("MR", False, 500).steps == 200
    new, known = config.complete("MR", True, 10), config.complete("MR", False, 10)
    assert (new.augmentation, known.augmentation) == (2.0, 1.0)
    full = replace(config, kind="full")
    assert [full.complete("MR", is_new).learning_rate for is_new in (True, False)] == [2e-3, 3e-4]
    chosen = replace(config, steps=7, augmentation=0.0, learning_rate=0.1).complete("MR", True, 500)
    assert (chosen.steps, chosen.augmentation, chosen.learning_rate) == (7, 0.0, 0.1)


def test_what_is_new_may_cost_what_was_known_half_a_hundredth():
    def judge_liver(dice: float) -> tuple[bool, str]:
        figures = {
            "base": {"consensus": 0.45, "consensus liver": 0.9, "consensus cyst": 0.0},
            "adapted": {"consensus": 0.8, "consensus liver": dice, "consensus cyst": 0.7},
        }
        return judge(figures, None, "ct-base@1", ["cyst"])

    accepted, told = judge_liver(0.896)
    assert accepted
    assert told.endswith("For liver it has 0.896, at most 0.005 less than before.")
    accepted, told = judge_liver(0.89)
    assert accepted
    assert told.endswith(
        "For liver it has 0.890 where ct-base@1 has 0.900: it answers for cyst alone, all else is answered as before."
    )


def test_a_version_that_lost_what_was_known_answers_for_what_is_new_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    studies = write_study(tmp_path / "studies")
    write_table(studies, {1: "liver", 2: "myocardium"})
    monkeypatch.setattr("progidiff.training.adapt.MAX_LOSS", -1.0)  # Whatever it has, it lost.
    result = run_adapt(studies, model, None, tmp_path / "work", QUICK)
    assert result.published, result.message
    assert result.card.structures == ("myocardium",)
    assert "it answers for myocardium alone" in result.message
    engine = Engine(model, device="cpu")
    assert engine.pick_adapter(None, "MR", ["liver"]) is None
    picked = engine.pick_adapter(None, "MR", ["myocardium"])
    assert picked is not None
    assert picked.full_name == "mr-myocardium@1"
    # The next one is compared with who answers: for the liver that is the model itself.
    again = run_adapt(studies, model, None, tmp_path / "work", replace(QUICK, seed=1))
    assert again.figures["current"]["consensus liver"] == again.figures["base"]["consensus liver"]
    assert again.figures["current"]["consensus myocardium"] > again.figures["base"]["consensus myocardium"]


def test_what_nobody_learned_is_answered_by_who_knows_it(adapted: tuple[Path, AdaptResult], tmp_path: Path):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    store = AdapterStore(folder / "model" / "adapters")
    first = store.card("mr", 1)
    tensors = store.load(first, first.base)
    grid = {"spacing_range": (0.5, 3.0), "neighbour_mm": 1.0}
    card = store.add(
        "mr-cyst", "lora", tensors, modality="MR", structures=("cyst",), base=first.base, base_name="tiny", run={},
        readme=lambda new: "", lora=first.lora, grid=grid,
    )  # fmt: skip
    store.publish("mr-cyst", card.version)
    assert store.card("mr-cyst", 1).grid == grid
    engine = Engine(folder / "model", device="cpu")
    names = {"cyst": "mr-cyst@1", "liver": "mr@1", "spleen": "mr@1"}
    for asked, answers in names.items():
        picked = engine.pick_adapter(None, "MR", [asked])
        assert picked is not None
        assert picked.full_name == answers
    volume = load_volume(folder / "studies" / "one.nii.gz")
    answered = {
        query: engine.propose(ProposalRequest(queries=[Query(query, query)], num_proposals=1), volume)
        for query in ("cyst", "liver")
    }
    assert [found.adapter for found in answered.values()] == ["mr-cyst@1", "mr@1"]
    assert answered["cyst"].grid.spacing < answered["liver"].grid.spacing
    store.rollback("mr")
    assert engine.pick_adapter(None, "MR", ["liver"]) is None


def test_small_images_fill_the_working_grid(tiny_model: Path, tmp_path: Path):
    studies = tmp_path / "studies"
    small = np.diag([0.5, 0.5, 1.0, 1.0])
    for name in ("one", "two"):
        write_case(studies, name, {1: np.s_[10:20, 10:20, 2:8]}, slices=12, affine=small)
        (studies / f"{name}.json").write_text('{"modality": "MR"}')
    write_table(studies, {1: "hippocampus"})
    data = prepare(studies, tiny_model)
    shapes = load_card(tiny_model).conditioning
    assert data.new == ("hippocampus",)
    assert data.grid is not None
    low, high = data.grid["spacing_range"]
    assert low < shapes.spacing_range[0]
    assert high == shapes.spacing_range[1]
    assert data.grid["neighbour_mm"] < shapes.neighbour_mm
    widths = (data.training.read([3])[1][0] == 1).any(0).sum()
    assert widths > 0.2 * shapes.width  # 10 of 40 voxels


def test_a_new_structure_is_on_both_sides_of_the_split(tiny_model: Path, tmp_path: Path):
    studies = write_study(tmp_path / "studies")
    write_table(studies, {1: "liver", 2: "left kidney", 3: "cyst"})
    held = prepare(studies, tiny_model).held_out
    others = [name for name in ("one", "two", "three") if name not in held]
    # Drawn in what would be trained on alone: one of them is held back instead.
    for name in others:
        relabel(studies, name, lambda a: np.where(a == 2, 3, a))
    data = prepare(studies, tiny_model)
    assert len(data.held_out) == 2
    assert set(data.held_out) & set(others)
    # In one volume only: some of its slices are held back.
    relabel(studies, others[0], lambda a: np.where(a == 3, 2, a))
    data = prepare(studies, tiny_model)
    assert data.same_patient
    cyst = data.training.structures.index("cyst")
    assert len(data.training.by_structure[cyst]) > len(data.validation.by_structure[cyst]) > 0


def test_a_structure_on_one_slice_only_is_too_little_and_the_message_says_what_is_enough(
    tiny_model: Path, tmp_path: Path
):
    studies = write_study(tmp_path / "studies")
    write_table(studies, {1: "liver", 2: "left kidney", 3: "cyst"})

    def draw(labels: np.ndarray) -> np.ndarray:
        labels[24:26, 8:16, 5] = 3
        return labels

    relabel(studies, "one", draw)
    data = prepare(studies, tiny_model)
    assert data.training.structures == ("left kidney", "liver")  # One slice of something else stops nothing.
    assert data.notes == ("'cyst' has 1 labelled slice; train with at least 4, or label it in a second image.",)
    for name in ("one", "two", "three"):
        relabel(studies, name, lambda a: a * (a == 3))
    with pytest.raises(ImageError, match="empty|'cyst' has 1 labelled slice; train with at least 4"):
        prepare(studies, tiny_model)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda a: np.where(a == 2, 9, a),
            ImageError,
            "holds ids 9, which neither the label.s record .label_info. nor labels.json names",
        ),
        (lambda a: a * 0, ImageError, "is empty; label a structure, or remove"),
        (lambda a: a.astype(np.float32) + 0.5 * (a > 0), ImageError, "whole numbers|integer"),
        (lambda a: a[:, :, :-1], GeometryError, "grid|shape"),
    ],
    ids=["unknown ids", "empty", "floats", "another grid"],
)
def test_labels_that_cannot_be_trained_on_are_refused(
    studies: Path, model: Path, change: Any, error: type[Exception], message: str
):
    relabel(studies, "two", change)
    with pytest.raises(error, match=message):
        adapt(studies, model)
    assert not (model / "adapters").exists()


def test_a_label_in_another_place_is_refused(studies: Path, model: Path):
    relabel(studies, "two", lambda a: a, affine=np.diag([3.0, 3, 3, 1]))
    with pytest.raises(GeometryError, match="two"):
        adapt(studies, model)


@pytest.mark.parametrize("value", [np.nan, 7.0], ids=["not a number", "constant"])
def test_images_without_content_are_refused(studies: Path, model: Path, value: float):
    path = studies / "one.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, value, np.float32), image.affine), path)
    with pytest.raises(ImageError, match="one"):
        adapt(studies, model)


def test_a_structure_that_the_model_does_not_know_is_refused_with_the_nearest_name(studies: Path, model: Path):
    write_table(studies, {1: "lver", 2: "left kidney"})
    with pytest.raises(RequestError, match="is named 'lver'.*did you mean 'liver'.*Rename it in labels.json"):
        adapt(studies, model)


def test_unknown_structures_may_be_left_out(studies: Path, tiny_model: Path):
    write_table(studies, {1: "liver", 2: "femur"})
    data = prepare(studies, tiny_model, structures=["liver"])
    assert data.training.structures == ("liver",)
    assert int(data.training.read(range(len(data.training)))[1].max()) == 1


def test_volumes_of_two_modalities_are_refused(studies: Path, model: Path):
    (studies / "two.json").write_text('{"modality": "CT"}')
    with pytest.raises(ImageError, match="One adapter is for one modality.*CT: two"):
        adapt(studies, model)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (replace(QUICK, steps=0), "steps must lie in 1"),
        (replace(QUICK, lora=LoraSettings(0)), "rank must lie"),
        (replace(QUICK, proposal_steps=5), "neither is a target"),
        (replace(QUICK, lora=LoraSettings(target_modules=("injection",))), "Nothing would be trained"),
        (replace(QUICK, bias_field=-1.0), "bias_field must lie"),
    ],
)
def test_settings_out_of_range_are_refused(studies: Path, model: Path, config: AdaptConfig, message: str):
    with pytest.raises(RequestError, match=message):
        adapt(studies, model, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shots": 0}, "shots must be at least 1"),
        ({"shots": 9}, "9 volumes were asked for, but 2 are"),
        ({"held_out": ["one", "two", "three"]}, "All labelled volumes are held back"),
        ({"cases": ["nobody"]}, "there is no image nobody"),
        ({"structures": ["spline"]}, "spleen"),
        ({"structures": ["kidneys"]}, "means 2 structures"),
    ],
)
def test_data_that_make_no_sense_are_refused(studies: Path, model: Path, options: dict[str, Any], message: str):
    with pytest.raises(RequestError, match=message):
        adapt(studies, model, **options)


# --- parts ---


@pytest.mark.parametrize(("adapted_dice", "accepted"), [(0.9, True), (0.8, False), (0.6, False), (0.4, False)])
def test_a_version_must_beat_both_the_served_one_and_the_model_itself(adapted_dice: float, accepted: bool):
    figures = {"base": {"consensus": 0.5}, "current": {"consensus": 0.8}, "adapted": {"consensus": adapted_dice}}
    verdict = judge(figures, "mr@1", "ct@1")
    assert verdict[0] is accepted
    assert "mr@1 has 0.800 and ct@1 has 0.500" in verdict[1]


# --- the command line ---


@pytest.fixture
def runner() -> CliRunner:
    return CliRunner()


def test_the_commands_train_list_show_use_and_roll_back(
    adapted: tuple[Path, AdaptResult], tmp_path: Path, runner: CliRunner
):
    folder = Path(shutil.copytree(adapted[0], tmp_path / "copy"))
    model = ["--model", str(folder / "model")]
    small = [
        "--steps",
        "2",
        "--validate-every",
        "2",
        "--batch-size",
        "2",
        "--learning-rate",
        "1e-7",
        "--rank",
        "2",
        "--shots",
        "1",
    ]
    work = ["--studies", str(folder / "studies"), "--work", str(folder / "work"), "--name", "mr"]
    done = runner.invoke(app, ["adapt", *work, *model, *small])
    assert done.exit_code == 3
    assert "mr@2 is kept but not published" in done.output
    assert "mr: 1* 2" in runner.invoke(app, ["adapters", "list", *model]).output
    assert "mr@2 is served" in runner.invoke(app, ["adapters", "use", "mr@2", *model]).output
    assert "mr: 1 2*" in runner.invoke(app, ["adapters", "list", *model]).output
    assert "# mr@2" in runner.invoke(app, ["adapters", "show", "mr", *model]).output
    shown = json.loads(runner.invoke(app, ["adapters", "show", "mr@1", "--json", *model]).output)
    assert shown["adapter"]["version"] == 1
    assert "mr@1 is served" in runner.invoke(app, ["adapters", "rollback", "mr", *model]).output
    assert "the model itself answers" in runner.invoke(app, ["adapters", "rollback", "mr", *model]).output
    refused = runner.invoke(app, ["adapters", "rollback", "mr", *model])
    assert refused.exit_code == 2
    assert "no earlier version" in refused.output
    assert "Name the version too" in runner.invoke(app, ["adapters", "use", "mr", *model]).output
    assert json.loads(runner.invoke(app, ["adapters", "list", "--json", *model]).output)[0]["versions"] == [1, 2]


def test_without_adapters_the_list_says_how_to_make_one(model: Path, runner: CliRunner):
    result = runner.invoke(app, ["adapters", "list", "--model", str(model)])
    assert result.exit_code == 0
    assert "holds no adapters; `progidiff adapt` trains one" in result.output
