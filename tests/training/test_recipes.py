"""`progidiff pretrain` and `progidiff train` from labelled volumes to a model that proposes, at toy width and for a few
steps.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from progidiff.errors import ModelError, RequestError
from progidiff.images.reading import load_volume
from progidiff.model.backbone import Backbone
from progidiff.model.folder import WEIGHTS, compute_backbone_digest, load_card, load_pipeline
from progidiff.model.lora import INJECTION
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import TOY_WIDTHS
from progidiff.training.backbone_stages import crop_around, describe_slice, draw_masks
from progidiff.training.dice_tally import one_hot
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.losses import ProposalLosses
from progidiff.training.proposal_stage import (
    ProposalObjective,
    ProposalOptions,
    draw_pairs,
    drop_text,
    wear_down_evidence,
)
from progidiff.training.recipe_settings import (
    CodecStage,
    EvidenceStage,
    GridSettings,
    PretrainConfig,
    ProposalStage,
    TextToImageStage,
    TrainConfig,
)
from progidiff.training.recipes import run_pretrain, run_train
from progidiff.training.slice_cache import SliceCache, list_cases
from support.cards import read_hub_card
from support.labelled_phantoms import write_case, write_table

STRUCTURES = ("liver", "aorta")
GRID = GridSettings(64, 64, (2.0, 6.0))
PRETRAIN = PretrainConfig(
    structures=STRUCTURES,
    grid=GRID,
    widths=TOY_WIDTHS,
    codec=CodecStage(steps=2),
    refine=CodecStage(steps=2),
    denoiser=TextToImageStage(steps=2),
)
TRAIN = TrainConfig(
    structures=STRUCTURES,
    grid=GRID,
    evidence=EvidenceStage(steps=2, validate_every=2),
    proposals=ProposalStage(steps=2, validate_every=2),
)


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_table(folder, {6: "liver", 8: "aorta"})
    for shift, name in enumerate(("one", "two")):
        write_case(
            folder, name, {6: np.s_[6:16, 6 + shift : 20, 2:8], 8: np.s_[24:28, 10:16, 1 + shift : 9]}, slices=10
        )
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


def test_pretraining_and_training_give_a_model_that_proposes(
    studies: Path, pretrained: tuple[Path, dict[str, Any]], folder: Path
):
    assert set(pretrained[1]["ceiling"]) == set(STRUCTURES)
    card = train(studies, folder, replace(TRAIN, name="toy", version="7"))
    assert card.full_name == "toy@7"
    assert card.structures == STRUCTURES
    assert card.backbone_digest == compute_backbone_digest(folder / "model" / "backbone")
    engine = Engine(folder / "model", device="cpu")
    volume = load_volume(studies / "two.nii.gz", modality="CT")
    result = engine.propose(
        ProposalRequest(queries=[Query("liver", "liver"), Query("aorta", "aorta")], num_proposals=2), volume
    )
    assert result.probabilities.shape == (2, 2, 10, 64, 64)
    assert result.model_version == "toy@7"

    run = json.loads((folder / "model" / "conditioning" / "run.json").read_text())
    assert run["training_cases"] == ["one"]
    assert run["held_out_cases"] == ["two"]
    assert set(run["data_sha256"]) == {"one"}
    assert {"single", "consensus", "best"} <= set(run["validation"]["proposals"][-1])
    board = EventAccumulator(str(folder / "work" / "proposals" / "tensorboard")).Reload()
    assert {"training/loss", "training/mask", "validation/consensus"} <= set(board.Tags()["scalars"])
    shown = board.Tags()["images"]
    assert len(shown) == 4
    # Truth, evidence, one proposal, consensus.
    assert {(board.Images(name)[0].height, board.Images(name)[0].width) for name in shown} == {(64, 4 * 64)}
    text = (folder / "model" / "conditioning" / "README.md").read_text()
    assert "toy@7" in text
    assert "Never trained on: two" in text
    data = read_hub_card(folder / "model" / "conditioning" / "README.md")
    assert (data.model_name, data.license_name) == ("toy@7", "as-the-training-data")


def test_a_frozen_denoiser_stays_as_it_is_and_its_branch_is_trained(
    studies: Path, pretrained: tuple[Path, dict[str, Any]], tmp_path: Path
):
    source = pretrained[0] / "model" / "backbone"
    before = compute_backbone_digest(source)
    card = train(studies, tmp_path, backbone_source=str(source), held_out=[])
    assert compute_backbone_digest(source) == before == card.backbone_digest
    assert not (tmp_path / "model" / "backbone").exists()
    pipeline = Engine(tmp_path / "model", backbone=source, device="cpu").load()
    assert any(conv.weight.abs().max() > 0 for conv in pipeline.branch.zero)


def test_a_model_is_continued_into_another_folder_and_stays_as_it_is(studies: Path, tiny_model: Path, tmp_path: Path):
    before = {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")}
    told: list[dict[str, Any]] = []
    config = replace(TRAIN, name="tiny", version="2", precision="fp32")
    card = train(studies, tmp_path, config, continue_from=tiny_model, report=told.append)
    assert {path: path.stat().st_mtime_ns for path in tiny_model.rglob("*")} == before
    start = load_card(tiny_model)
    assert card == replace(start, version="2", backbone_digest=card.backbone_digest)
    assert card.backbone_digest != start.backbone_digest
    backbone, other = tmp_path / "model" / "backbone", tiny_model / "backbone"
    assert all((backbone / "vae" / p.name).read_bytes() == p.read_bytes() for p in (other / "vae").iterdir())
    # A step at the start of the warm-up moves the weights a little, it does not throw them away.
    first, second = (load_file(f / "conditioning" / WEIGHTS) for f in (tiny_model, tmp_path / "model"))
    assert first.keys() == second.keys()
    assert 0 < max(float((first[n].float() - second[n].float()).abs().max()) for n in first) < 0.02
    assert [(e["stage"], e["step"]) for e in told] == [("evidence", 2), ("proposals", 2)]
    run = json.loads((tmp_path / "model" / "conditioning" / "run.json").read_text())
    assert run["continued_from"] == "tiny@1"
    # Of structures that no validation volume shows there is nothing to say.
    assert set(run["validation"]["evidence"][-1]) == {"step", "dice_all", "liver", "aorta"}
    assert run["config"]["version"] == "2"
    Engine(tmp_path / "model", device="cpu").load()

    # The same call is done; other weights losses, or another start, are another run.
    again = train(studies, tmp_path, config, continue_from=tiny_model)
    assert again == card
    changed = replace(config, proposals=replace(config.proposals, losses=ProposalLosses(mask=0.5)))
    with pytest.raises(RequestError, match=r"other settings \(losses.mask differ\)"):
        train(studies, tmp_path, changed, continue_from=tiny_model)


def test_only_the_stages_that_were_chosen_are_trained(studies: Path, tiny_model: Path, tmp_path: Path):
    start = load_file(tiny_model / "conditioning" / WEIGHTS)
    for stage, trained in (("evidence", ("encoder.", "query_head.")), ("proposals", INJECTION)):
        folder = tmp_path / stage
        config = replace(TRAIN, version="2", stages=(stage,), freeze_denoiser=True)
        card = train(studies, folder, config, continue_from=tiny_model, held_out=[])
        changed = {
            n
            for n, t in load_file(folder / "model" / "conditioning" / WEIGHTS).items()
            if not torch.equal(t, start[n].half())
        }
        assert changed
        assert all(name.startswith(trained) for name in changed), stage
        assert card.backbone_digest == load_card(tiny_model).backbone_digest
        assert not (folder / "work" / ("proposals" if stage == "evidence" else "evidence")).exists()


def test_what_makes_no_sense_together_is_refused_before_anything_is_read(
    studies: Path, tiny_model: Path, tmp_path: Path
):
    with pytest.raises(RequestError, match="Proposals are trained on top of evidence"):
        train(studies, tmp_path, replace(TRAIN, stages=("proposals",)), backbone_source=str(tiny_model / "backbone"))
    with pytest.raises(RequestError, match=r"its denoiser cannot be trained: set freeze_denoiser=true, or copy it"):
        train(studies, tmp_path, replace(TRAIN, freeze_denoiser=False), backbone_source=str(tiny_model / "backbone"))
    with pytest.raises(
        RequestError,
        match=r"'tiny@1' is what is continued; give the new weights another name, for example --version 1\.1",
    ):
        train(studies, tmp_path, replace(TRAIN, name="tiny"), continue_from=tiny_model)
    with pytest.raises(RequestError, match="would be continued and overwritten at once"):
        run_train(studies, tiny_model, tmp_path, TRAIN, continue_from=tiny_model)
    with pytest.raises(ModelError, match="holds no trained conditioning"):
        train(studies, tmp_path, continue_from=tmp_path)
    with pytest.raises(RequestError, match="evidence.slices_per_step must lie in 1..1024, got 0"):
        train(studies, tmp_path, replace(TRAIN, evidence=EvidenceStage(slices_per_step=0)))
    assert not (tmp_path / "model").exists()


def test_every_batch_asks_for_something_present_and_something_absent(tiny_model: Path, tmp_path: Path):
    # The gallbladder has a name in the table and is nowhere: it is absent. Of structures without a name nothing is
    # known.
    write_table(tmp_path, {6: "liver", 8: "aorta", 4: "gallbladder"})
    write_case(tmp_path, "one", {6: np.s_[6:16, 6:20, 1:9], 8: np.s_[24:28, 10:16, 1:9]}, slices=10)
    backbone = Backbone(tiny_model / "backbone", device="cpu", dtype="fp32")
    card, pipeline = load_pipeline(tiny_model, backbone)
    cache = SliceCache(list_cases(tmp_path), card.structures, card.conditioning, tmp_path / "cache")
    objective = ProposalObjective(
        pipeline, PhraseTable(backbone, card.structures), cache, ProposalOptions(slices_per_step=4)
    )
    asked = set()
    for seed in range(30):
        batch = objective.draw_batch(torch.Generator().manual_seed(seed))
        shown = batch.masks.flatten(1).any(1)
        assert shown.any()
        assert not shown.all()
        asked |= {card.structures[int(s)] for s in batch.picked}
    assert asked == {"liver", "aorta", "gallbladder"}
    loss, figures = objective.compute_loss(batch, torch.Generator().manual_seed(0))
    weights = ProposalLosses()
    parts = (
        weights.diffusion * figures["diffusion"] + weights.latent * figures["latent"] + weights.mask * figures["mask"]
    )
    assert float(loss.detach()) == pytest.approx(float(parts), rel=1e-4)


def test_a_stage_that_is_finished_is_loaded_and_gives_the_same_model(
    studies: Path, pretrained: tuple[Path, dict[str, Any]], tmp_path: Path
):
    source = str(pretrained[0] / "model" / "backbone")
    train(studies, tmp_path, backbone_source=source, held_out=[])
    weights = (tmp_path / "model" / "conditioning" / WEIGHTS).read_bytes()
    train(studies, tmp_path, backbone_source=source, held_out=[])
    assert (tmp_path / "model" / "conditioning" / WEIGHTS).read_bytes() == weights
    assert (tmp_path / "model" / ".conditioning.previous").is_dir()


def test_a_pretrained_backbone_holds_no_traces_of_its_making(pretrained: tuple[Path, dict[str, Any]]):
    backbone = pretrained[0] / "model" / "backbone"
    assert sorted(p.name for p in backbone.iterdir()) == [
        "model_index.json",
        "scheduler",
        "text_encoder",
        "tokenizer",
        "unet",
        "vae",
    ]
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
    assert all(
        torch.equal(mask, (labels[n] == s + 1).float()) for n, s, mask in zip(rows, structures, masks, strict=True)
    )
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
