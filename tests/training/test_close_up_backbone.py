"""`progidiff train --backbone` with the stage close_up: encoder and injection learn, the backbone stays as it is."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from progidiff.errors import ModelError, RequestError
from progidiff.images.close_up import WindowRules
from progidiff.images.reading import load_volume
from progidiff.model.backbone import Backbone
from progidiff.model.close_up_backbone import create_network_on, recomputing
from progidiff.model.close_up_folder import load_close_up, load_close_up_card
from progidiff.model.folder import compute_backbone_digest
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import TOY_WIDTHS
from progidiff.training.build_model import create_backbone
from progidiff.training.close_up_stage import CloseUpObjective, CloseUpOptions
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.reader_masks import ReaderSource, load_reader_masks
from progidiff.training.recipe_settings import CloseUpStage, EvidenceStage, GridSettings, TrainConfig
from progidiff.training.recipes import run_train
from progidiff.training.settings import load_config
from progidiff.training.window_pool import PooledVolume, VolumeSource, WindowPool
from support.labelled_phantoms import write_case, write_reader_crops, write_table
from support.toy_stable_diffusion import write_toy_stable_diffusion

CPU = torch.device("cpu")
TRAIN = TrainConfig(
    stages=("evidence", "close_up"),
    structures=("liver", "aorta"),
    grid=GridSettings(64, 64, (2.0, 6.0)),
    evidence=EvidenceStage(steps=2),
    close_up=CloseUpStage(steps=2, warmup=0, folds=2, windows_per_step=1, proposed=1, denoising_share=0.0),
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_stable_diffusion(tmp_path_factory.mktemp("sd") / "backbone")


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_table(folder, {6: "liver", 8: "aorta"})
    for shift, name in enumerate(("one", "two")):
        write_case(folder, name, {6: np.s_[6:16, 6 + shift : 20, 1:5], 8: np.s_[24:28, 10:16, shift:5]}, slices=6)
    return folder


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reader_crops(tmp_path_factory.mktemp("readers") / "crops.npz", 2)


@pytest.fixture(scope="module")
def trained(studies: Path, readers: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    settings = {"also": [studies], "readers": readers, "backbone_source": str(backbone)}
    run_train(studies, folder / "model", folder / "work", TRAIN, **settings)  # type: ignore[arg-type]
    return folder


def run(studies: Path, folder: Path, config: TrainConfig, told: list[dict[str, Any]], **options: Any) -> None:
    run_train(studies, folder / "model", folder / "work", config, report=told.append, **options)


def test_a_model_comes_out_whose_close_up_belongs_to_the_backbone(trained: Path, backbone: Path):
    card = load_close_up_card(trained / "model")
    assert card.denoiser == "backbone"
    assert card.backbone_digest == compute_backbone_digest(backbone)
    assert card.rules == WindowRules().at_size(64)
    assert card.network.native_size == 64
    assert not (trained / "model" / "close_up" / "unet").exists()
    assert not (trained / "model" / "backbone").exists()
    _, network = load_close_up(trained / "model", CPU, Backbone(backbone, "cpu"))
    assert any(conv.get_parameter("weight").any() for conv in network.zero)


def test_it_answers(trained: Path, backbone: Path, studies: Path):
    volume = load_volume(studies / "two.nii.gz", modality="CT")
    request = ProposalRequest(queries=[Query("liver", "liver")], num_proposals=2)
    result = Engine(trained / "model", backbone, device="cpu").propose(request, volume)
    assert result.mask(volume.grid, "liver", 1).shape == volume.array.shape


@pytest.mark.parametrize("recomputes", [False, True])
def test_two_steps_change_encoder_and_injection_and_nothing_of_the_backbone(backbone: Path, recomputes: bool):
    parts = Backbone(backbone, "cpu", "fp32")
    network = create_network_on(parts, channels=(8, 8, 16, 16, 16), condition_width=16, injection_width=8)
    labels = np.zeros((3, 60, 60), np.uint8)
    labels[:, 20:40, 20:40] = 1
    volume = PooledVolume("a", "a", labels * 90 + 30, labels, (4.0, 1.5, 1.5), (1,))
    pool = WindowPool([VolumeSource([volume], 64, rules=WindowRules().at_size(64))])
    prompts = PhraseTable(parts, ["liver"]).pick_canonical()
    objective = CloseUpObjective(network, pool, prompts, CloseUpOptions(1, 1, denoising_share=0.0))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    frozen = [{n: v.clone() for n, v in part.state_dict().items()} for part in (parts.unet, parts.vae)]
    config = LoopConfig(steps=2, warmup=0, precision="fp32", tensorboard=False)
    if recomputes:
        with recomputing(network):
            run_loop({"network": network}, objective, config, backbone.parent / "recomputed")
    else:
        run_loop({"network": network}, objective, config, backbone.parent / "plain")
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert {f"zero.{n}.weight" for n in range(len(network.zero))} <= changed
    assert any(name.startswith("encoder.") for name in changed)
    for part, kept in zip((parts.unet, parts.vae), frozen, strict=True):
        assert all(torch.equal(value, kept[name]) for name, value in part.state_dict().items())


def test_a_close_up_that_is_continued_keeps_its_denoiser(trained: Path, studies: Path, backbone: Path, tmp_path: Path):
    start = TrainConfig(stages=("close_up",), version="2", close_up=replace(TRAIN.close_up, steps=1))
    shutil.copytree(trained / "work" / "oof", tmp_path / "work" / "oof")
    options: dict[str, Any] = {"continue_from": trained / "model", "backbone_source": str(backbone)}
    for changes, why in (({"denoiser": "own"}, "denoiser backbone"), ({"pixels": 128}, "pixels 64")):
        told: list[dict[str, Any]] = []
        with pytest.raises(RequestError, match=f"was trained with {why} and keeps it"):
            other = replace(start, close_up=replace(start.close_up, **changes))  # type: ignore[arg-type]
            run(studies, tmp_path, other, told, **options)
        assert not told
    run(studies, tmp_path, start, [], **options)
    assert load_close_up_card(tmp_path / "model").denoiser == "backbone"


def test_the_small_denoiser_is_still_to_be_had_beside_a_named_backbone(studies: Path, backbone: Path, tmp_path: Path):
    config = replace(TRAIN, close_up=replace(TRAIN.close_up, steps=1, denoiser="own"))
    run(studies, tmp_path, config, [], backbone_source=str(backbone))
    assert load_close_up_card(tmp_path / "model").denoiser == "own"
    assert (tmp_path / "model" / "close_up" / "unet").is_dir()


def test_an_embedded_backbone_draws_close_ups_where_a_size_is_set(studies: Path, tmp_path: Path):
    create_backbone(tmp_path / "model" / "backbone", TOY_WIDTHS)
    told: list[dict[str, Any]] = []
    config = replace(TRAIN, close_up=replace(TRAIN.close_up, steps=1, denoiser="backbone"))
    with pytest.raises(RequestError, match="names no sample_size"):
        run(studies, tmp_path, config, told)
    assert not told, "Refused before anything is trained."
    run(studies, tmp_path, replace(config, close_up=replace(config.close_up, pixels=32)), told)
    card = load_close_up_card(tmp_path / "model")
    assert (card.denoiser, card.network.native_size) == ("backbone", 32)
    volume = load_volume(studies / "two.nii.gz", modality="CT")
    request = ProposalRequest(queries=[Query("liver", "liver")], num_proposals=2)
    assert Engine(tmp_path / "model", device="cpu").propose(request, volume).num_proposals == 2


def test_a_backbone_that_close_ups_cannot_be_drawn_with_is_refused_before_anything_is_trained(
    studies: Path, tmp_path: Path
):
    told: list[dict[str, Any]] = []
    inpainting = write_toy_stable_diffusion(tmp_path / "sd", in_channels=9)
    with pytest.raises(ModelError, match=r"reads 9 channels.* set close_up.denoiser=own"):
        run(studies, tmp_path, TRAIN, told, backbone_source=str(inpainting))
    assert not told


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(RequestError, match=r"close_up.pixels is for windows of the backbone's denoiser"):
        replace(TRAIN, close_up=replace(TRAIN.close_up, denoiser="own", pixels=512)).check()
    for change in ("close_up.pixels=16", "close_up.denoiser=mine", "close_up.recompute=perhaps"):
        with pytest.raises(RequestError, match=change.split("=")[0]):
            load_config(TrainConfig, changes=[change])
    found = load_config(TrainConfig, changes=["close_up.denoiser=backbone", "close_up.pixels=256"]).close_up
    assert (found.denoiser, found.pixels) == ("backbone", 256)


def test_crops_of_readers_show_as_much_in_any_number_of_pixels(readers: Path):
    masks = load_reader_masks(readers)
    plain = ReaderSource(masks, 1)
    fine = ReaderSource(masks, 1, size=512, shown_mm=0.7 * 96 / 512)
    one, other = (source.look(np.random.default_rng(0)) for source in (plain, fine))
    assert other["truth"].shape == (4, 512, 512)
    assert float(other["truth"].mean()) == pytest.approx(float(one["truth"].mean()), rel=0.05)
