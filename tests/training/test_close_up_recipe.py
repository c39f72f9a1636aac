"""`progidiff train` with the stage close_up: every case is answered by a network that did not see it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import CancelledError, RequestError
from progidiff.images.reading import load_volume
from progidiff.model.close_up import CloseUpConfig, CloseUpNetwork
from progidiff.model.close_up_folder import compute_close_up_digest, load_close_up, load_close_up_card
from progidiff.model.folder import compute_conditioning_digest
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import TOY_WIDTHS
from progidiff.training import close_up_recipe
from progidiff.training.build_model import create_backbone
from progidiff.training.close_up_stage import CloseUpObjective
from progidiff.training.loop import LoopConfig
from progidiff.training.out_of_fold import find_evidence, split_by_patient
from progidiff.training.recipe_settings import CloseUpStage, EvidenceStage, GridSettings, TrainConfig
from progidiff.training.recipes import run_train
from progidiff.training.settings import check_config, load_config
from progidiff.training.slice_cache import list_cases
from support.labelled_phantoms import write_case, write_reader_crops, write_table

CPU = torch.device("cpu")
TRAIN = TrainConfig(
    stages=("evidence", "close_up"),
    structures=("liver", "aorta"),
    grid=GridSettings(64, 64, (2.0, 6.0)),
    evidence=EvidenceStage(steps=2),
    close_up=CloseUpStage(steps=2, folds=3, windows_per_step=2, proposed=2, denoising_share=0.0),
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_table(folder, {6: "liver", 8: "aorta"})
    for shift, name in enumerate(("one", "two", "three")):
        write_case(
            folder, name, {6: np.s_[6:16, 6 + shift : 20, 2:8], 8: np.s_[24:28, 10:16, 1 + shift : 9]}, slices=10
        )
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader_crops(tmp_path_factory.mktemp("readers") / "crops.npz", 4)


@pytest.fixture(scope="module")
def trained(studies: Path, readers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    create_backbone(folder / "model" / "backbone", TOY_WIDTHS)
    shapes = folder / "shapes"
    shapes.mkdir()
    for part in ("labels.json", "labels/final/one.nii.gz"):
        shutil.copy(studies / part, shapes)
    run_train(studies, folder / "model", folder / "work", TRAIN, also=[studies], shapes=shapes, readers=readers)
    return folder


def test_a_model_with_a_close_up_comes_out_and_draws(trained: Path, studies: Path):
    card = load_close_up_card(trained / "model")
    assert card.finder == compute_conditioning_digest(trained / "model")
    assert card.structures == ("liver", "aorta", "lung nodule")
    assert card.facts["cases"] == ["one", "three", "two"]
    assert card.facts["shapes"] == "shapes"
    volume = load_volume(studies / "two.nii.gz", modality="CT")
    result = Engine(trained / "model", device="cpu").propose(
        ProposalRequest(queries=[Query("liver", "liver")], num_proposals=2), volume
    )
    assert result.probabilities.shape[-2:] == (128, 128)


def test_every_case_has_evidence_of_a_network_that_did_not_see_it(trained: Path, studies: Path):
    folds = split_by_patient(list_cases(studies), 3)
    assert sorted(case.name for part in folds for case in part) == ["one", "three", "two"]
    for part in folds:
        for case in part:
            assert np.load(find_evidence(trained / "work", case.name)).shape == (10, 2, 64, 64)
    answers = [np.load(find_evidence(trained / "work", case.name)) for case in list_cases(studies)]
    assert not all((one == answers[0]).all() for one in answers[1:])


def test_the_same_command_goes_on_where_it_was_stopped(studies: Path, tmp_path: Path):
    create_backbone(tmp_path / "model" / "backbone", TOY_WIDTHS)
    told: list[dict[str, Any]] = []

    def stop() -> bool:
        return any(entry["stage"] == "folds" for entry in told)

    with pytest.raises(CancelledError):
        run_train(studies, tmp_path / "model", tmp_path / "work", TRAIN, is_cancelled=stop, report=told.append)
    run_train(studies, tmp_path / "model", tmp_path / "work", TRAIN, report=told.append)
    assert {entry["stage"] for entry in told} == {"evidence", "folds", "close_up"}
    assert (tmp_path / "model" / "close_up" / "config.json").is_file()


def test_a_model_that_is_continued_hands_its_close_up_down(trained: Path, studies: Path, tmp_path: Path):
    start = TrainConfig(
        stages=("close_up",), version="2", close_up=replace(TRAIN.close_up, steps=1, warmup=0, learning_rate=1e-8)
    )
    shutil.copytree(trained / "work" / "oof", tmp_path / "work" / "oof")
    run_train(studies, tmp_path / "model", tmp_path / "work", start, continue_from=trained / "model")
    before, after = (load_close_up(folder / "model", CPU)[1].state_dict() for folder in (trained, tmp_path))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, atol=1e-4, rtol=1e-2)
    digest = compute_close_up_digest(trained / "model")
    assert load_close_up_card(tmp_path / "model").facts["continued"] == digest


def test_proposals_may_be_spread_otherwise_than_they_are_trained_and_stay_so(
    trained: Path, studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[float, float]] = []

    def run_nothing(modules: dict[str, CloseUpNetwork], *args: Any, **kwargs: Any) -> None:
        config = modules["network"].config
        seen.append((config.level_spread, config.noise_scale))

    monkeypatch.setattr(close_up_recipe, "run_loop", run_nothing)
    spread = replace(TRAIN.close_up, level_spread=2.5, noise_scale=0.5, presence=0.7)
    source = trained / "model"
    for name, stage in (("spread", spread), ("further", TRAIN.close_up)):
        work = tmp_path / name / "work"
        shutil.copytree(trained / "work" / "oof", work / "oof")
        config = TrainConfig(stages=("close_up",), version=name, close_up=stage)
        run_train(studies, tmp_path / name / "model", work, config, continue_from=source)
        source = tmp_path / name / "model"
        card = load_close_up_card(source)
        assert (card.network.level_spread, card.network.noise_scale, card.presence) == (2.5, 0.5, 0.7)
    assert seen == [(CloseUpConfig.level_spread, CloseUpConfig.noise_scale)] * 2


def test_one_file_holds_several_trainings_that_follow_each_other(
    trained: Path, studies: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ran: list[tuple[str, int, float, float, int]] = []

    def run_nothing(
        modules: Any, objective: CloseUpObjective, loop: LoopConfig, folder: Path, *args: Any, **kwargs: Any
    ) -> None:
        options = objective.options
        ran.append((folder.name, loop.steps, loop.learning_rate, options.edit_share, loop.seed))

    monkeypatch.setattr(close_up_recipe, "run_loop", run_nothing)
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "seed: 5\nversion: further\nstages: [close_up]\nclose_up:\n  steps: 3\n  folds: 3\n  learning_rate: 0.002\n"
        "  then: [steps=2 learning_rate=1e-3, steps=1 edit_share=0.5]\n"
    )
    config = load_config(TrainConfig, file)
    shutil.copytree(trained / "work" / "oof", tmp_path / "work" / "oof")
    run_train(studies, tmp_path / "model", tmp_path / "work", config, continue_from=trained / "model")
    usual = CloseUpStage().edit_share
    assert ran == [
        ("close_up", 3, 0.002, usual, 5),
        ("close_up_2", 2, 0.001, usual, 6),
        ("close_up_3", 1, 0.001, 0.5, 7),
    ]
    assert load_close_up_card(tmp_path / "model").facts["settings"]["then"] == list(config.close_up.then)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("stepz=3", r"no setting 'stepz' \(in close_up.then\[0\]\); did you mean 'steps'"),
        ("steps", r"'steps' is no setting \(close_up.then\[0\]\); write name=value"),
        ("edit_share=2", "edit_share must lie in 0..1"),
        ("level_spread=1", "close_up.level_spread holds for all parts"),
    ],
)
def test_a_further_training_that_makes_no_sense_is_refused(entry: str, message: str):
    with pytest.raises(RequestError, match=message):
        check_config(replace(TRAIN, close_up=replace(TRAIN.close_up, then=(entry,))))


def test_too_few_cases_for_the_folds_are_refused(studies: Path, tmp_path: Path):
    create_backbone(tmp_path / "model" / "backbone", TOY_WIDTHS)
    with pytest.raises(RequestError, match="2 labelled cases cannot be split into 3 folds"):
        run_train(studies, tmp_path / "model", tmp_path / "work", TRAIN, held_out=["two"])


def test_an_encoder_that_nobody_trained_is_not_kept(studies: Path, tmp_path: Path):
    create_backbone(tmp_path / "model" / "backbone", TOY_WIDTHS)
    config = replace(TRAIN, close_up=replace(TRAIN.close_up, keep_encoder=True))
    with pytest.raises(RequestError, match="keep_encoder needs a close-up .*--continue-from"):
        run_train(studies, tmp_path / "model", tmp_path / "work", config)
    assert not (tmp_path / "model" / "conditioning").exists()


def test_the_denoiser_alone_is_trained_further_and_the_consensus_stays(trained: Path, studies: Path, tmp_path: Path):
    close_up = replace(TRAIN.close_up, keep_encoder=True, steepness=4.0)
    config = replace(TRAIN, stages=("close_up",), version="2", close_up=close_up)
    create_backbone(tmp_path / "model" / "backbone", TOY_WIDTHS)
    run_train(studies, tmp_path / "model", tmp_path / "work", config, continue_from=trained / "model")
    (_, before), (_, after) = (load_close_up(folder / "model", CPU) for folder in (trained, tmp_path))
    old, new = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name, value in new.items() if not torch.equal(value, old[name])}
    assert changed
    assert not changed & {"condition", "encoder", "query", "sharpen"}
