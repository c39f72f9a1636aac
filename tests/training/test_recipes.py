"""`progidiff pretrain` and `progidiff train` from labelled volumes to a model that proposes, at toy width and for a few steps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_phantoms import write_case, write_table

from progidiff.backbone import Backbone
from progidiff.engine import Engine
from progidiff.errors import RequestError
from progidiff.model_files import compute_backbone_digest
from progidiff.prompts import Query
from progidiff.testing import TOY_WIDTHS
from progidiff.training.config_recipes import CodecStage, EvidenceStage, GridSettings, PretrainConfig, ProposalStage, TextToImageStage, TrainConfig
from progidiff.training.evidence import PhraseTable, one_hot
from progidiff.training.pretrain import crop_around, describe_slice, draw_masks
from progidiff.training.proposals import draw_pairs, drop_text, wear_down_evidence
from progidiff.training.recipes import run_pretrain, run_train
from progidiff.volume import load_volume

STRUCTURES = ("liver", "aorta")
GRID = GridSettings(64, 64, (2.0, 6.0))
PRETRAIN = PretrainConfig(
    structures=STRUCTURES, grid=GRID, widths=TOY_WIDTHS, codec=CodecStage(steps=2), refine=CodecStage(steps=2), denoiser=TextToImageStage(steps=2)
)
TRAIN = TrainConfig(
    structures=STRUCTURES, grid=GRID, evidence=EvidenceStage(steps=2, validate_every=2), proposals=ProposalStage(steps=2, validate_every=2)
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_table(folder, {6: "liver", 8: "aorta"})
    for shift, name in enumerate(("one", "two")):
        write_case(folder, name, {6: np.s_[6:16, 6 + shift : 20, 2:8], 8: np.s_[24:28, 10:16, 1 + shift : 9]}, slices=10)
    return folder


@pytest.fixture(scope="module")
def pretrained(studies: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, run_pretrain(studies, folder / "model", folder / "work", PRETRAIN, held_out=["two"])


def train(studies: Path, folder: Path, config: TrainConfig = TRAIN, **options: Any) -> Any:
    return run_train(studies, folder / "model", folder / "work", config, **{"held_out": ["two"], **options})


@pytest.fixture
def folder(pretrained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A pretrained model of its own for each test."""
    shutil.copytree(pretrained[0] / "model", tmp_path / "model")
    return tmp_path


def test_pretraining_and_training_give_a_model_that_proposes(studies: Path, pretrained: tuple[Path, dict[str, Any]], folder: Path):
    assert set(pretrained[1]["ceiling"]) == set(STRUCTURES)
    card = train(studies, folder, replace(TRAIN, name="toy", version="7"))
    assert card.full_name == "toy@7"
    assert card.structures == STRUCTURES
    assert card.backbone_digest == compute_backbone_digest(folder / "model" / "backbone")
    engine = Engine(folder / "model", device="cpu")
    volume = load_volume(studies / "two.nii.gz", modality="CT")
    result = engine.propose(volume, [Query("liver", "liver"), Query("aorta", "aorta")], num_proposals=2)
    assert result.probabilities.shape == (2, 2, 10, 64, 64)
    assert result.model_version == "toy@7"

    run = json.loads((folder / "model" / "conditioning" / "run.json").read_text())
    assert run["training_cases"] == ["one"]
    assert run["held_out_cases"] == ["two"]
    assert set(run["data_sha256"]) == {"one"}
    assert {"single", "consensus", "best"} <= set(run["validation"]["proposals"][-1])
    text = (folder / "model" / "conditioning" / "README.md").read_text()
    assert "toy@7" in text
    assert "Never trained on: two" in text


def test_a_frozen_denoiser_stays_as_it_is_and_its_branch_is_trained(studies: Path, pretrained: tuple[Path, dict[str, Any]], tmp_path: Path):
    source = pretrained[0] / "model" / "backbone"
    before = compute_backbone_digest(source)
    card = train(studies, tmp_path, backbone_source=str(source), held_out=[])
    assert compute_backbone_digest(source) == before == card.backbone_digest
    assert not (tmp_path / "model" / "backbone").exists()
    pipeline = Engine(tmp_path / "model", backbone=source, device="cpu").load()
    assert any(conv.weight.abs().max() > 0 for conv in pipeline.branch.zero)


def test_a_stage_that_is_finished_is_loaded_and_gives_the_same_model(studies: Path, pretrained: tuple[Path, dict[str, Any]], tmp_path: Path):
    source = str(pretrained[0] / "model" / "backbone")
    train(studies, tmp_path, backbone_source=source, held_out=[])
    weights = (tmp_path / "model" / "conditioning" / "branch.safetensors").read_bytes()
    train(studies, tmp_path, backbone_source=source, held_out=[])
    assert (tmp_path / "model" / "conditioning" / "branch.safetensors").read_bytes() == weights
    assert (tmp_path / "model" / ".conditioning.previous").is_dir()


def test_a_pretrained_backbone_holds_no_traces_of_its_making(pretrained: tuple[Path, dict[str, Any]]):
    backbone = pretrained[0] / "model" / "backbone"
    assert sorted(p.name for p in backbone.iterdir()) == ["model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae"]
    assert Backbone(backbone, device="cpu").vae.config.scaling_factor != 1.0


def test_pretraining_never_replaces_a_backbone(studies: Path, folder: Path):
    with pytest.raises(RequestError, match="exists; pretraining starts from scratch"):
        run_pretrain(studies, folder / "model", folder / "work", PRETRAIN)


def test_holding_out_everything_or_a_stranger_is_refused(studies: Path, folder: Path):
    with pytest.raises(RequestError, match="All labelled cases are held out"):
        train(studies, folder, held_out=["one", "two"])
    with pytest.raises(RequestError, match="three cannot be held out: the labelled cases are one, two"):
        train(studies, folder, held_out=["three"])


def test_every_synonym_has_a_text_vector_and_half_of_the_draws_are_the_own_name(tiny_model: Path):
    phrases = PhraseTable(Backbone(tiny_model / "backbone", device="cpu"), STRUCTURES)
    assert phrases.texts[phrases.rows[1][0]] == "mask of the aorta"
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([phrases.draw(generator) for _ in range(400)])
    assert all(set(drawn[:, s].tolist()) == set(rows) for s, rows in enumerate(phrases.rows))
    own = (drawn == phrases.canonical()).float().mean(0)
    assert ((own > 0.5) & (own < 0.85)).all()


def test_masks_are_drawn_from_what_a_slice_shows():
    labels = torch.zeros(3, 8, 8, dtype=torch.long)
    labels[0, :2] = 1
    labels[0, 4:] = 3
    labels[2, 3, 3] = 2
    rows, structures, masks = draw_masks(None, torch.zeros(3, 3, 8, 8), labels, 3, np.random.default_rng(0))  # type: ignore[arg-type]
    assert sorted(zip(rows.tolist(), structures.tolist(), strict=True)) == [(0, 0), (0, 2), (2, 1)]
    assert all(torch.equal(mask, (labels[n] == s + 1).float()) for n, s, mask in zip(rows, structures, masks, strict=True))
    empty = draw_masks(None, torch.zeros(1, 3, 8, 8), labels[1:2], 3, np.random.default_rng(0))  # type: ignore[arg-type]
    assert [len(e) for e in empty] == [0, 0, 0]


def test_pairs_hold_present_and_absent_structures():
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[0, 0, 0], labels[0, 1, 1] = 1, 4
    rows, structures = draw_pairs(labels, torch.ones(2, 5), 2, 1, np.random.default_rng(0))
    assert rows.tolist() == [0, 0, 0, 1]
    assert set(structures[:2].tolist()) == {0, 3}
    assert int(structures[2]) in {1, 2, 4}


def test_pairs_hold_nothing_that_the_label_does_not_speak_about():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    labels[0, 0, 0], labels[0, 1, 1] = 1, 4
    spoken = torch.tensor([[0.0, 1, 0, 1, 0]])
    rows, structures = draw_pairs(labels, spoken, 3, 3, np.random.default_rng(0))
    assert rows.tolist() == [0, 0]
    assert structures.tolist() == [3, 1]


def test_crops_meet_the_foreground():
    masks = torch.zeros(40, 40, 60)
    masks[:, 30, 50] = 1
    crops = crop_around(masks, masks, 16, np.random.default_rng(0))
    assert crops.shape == (40, 16, 16)
    assert (crops.amax(dim=(1, 2)) == 1).all()


def test_worn_down_evidence_is_evidence_and_no_strength_leaves_it():
    logits = torch.randn(6, 32, 40, generator=torch.Generator().manual_seed(0)) * 4
    worn = wear_down_evidence(logits, torch.Generator().manual_seed(1))
    assert worn.shape == logits.shape
    assert 0 <= float(worn.min()) <= float(worn.max()) <= 1
    assert not torch.allclose(worn, logits.sigmoid(), atol=0.05)
    assert torch.equal(worn, wear_down_evidence(logits, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(wear_down_evidence(logits, torch.Generator().manual_seed(1), 0.0), logits.sigmoid())


def test_dropped_text_is_the_empty_one_padded(tiny_model: Path):
    phrases = PhraseTable(Backbone(tiny_model / "backbone", device="cpu"), STRUCTURES)
    chosen = phrases.canonical()
    tokens, mask = drop_text(phrases.tokens[chosen], phrases.mask[chosen], torch.tensor([True, False]), phrases)
    assert torch.equal(tokens[1], phrases.tokens[chosen[1]])
    assert torch.equal(tokens[0, :2], phrases.empty_tokens[0])
    assert mask.sum(1).tolist() == [2, int(phrases.mask[chosen[1]].sum())]


def test_captions_name_what_is_there():
    assert describe_slice(["liver", "spleen", "aorta"], "CT") == "axial CT slice showing liver, spleen and aorta"
    assert describe_slice(["liver"], "MR") == "axial MR slice showing liver"
    assert describe_slice([], "CT") == "axial CT slice"


def test_one_hot_leaves_the_background_out():
    assert one_hot(torch.tensor([[[0, 2, 1]]]), 2).tolist() == [[[[0, 0, 1]], [[0, 1, 0]]]]
