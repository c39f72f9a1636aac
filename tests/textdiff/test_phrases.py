"""Phrases that select: the table, what it refuses, and a head that draws what it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from progidiff.cli import main
from progidiff.errors import GeometryError, RequestError
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.evaluate import evaluate
from progidiff.textdiff.features import DiffusionFeatures
from progidiff.textdiff.model import TextDiffCard, load_textdiff
from progidiff.textdiff.network import HeadConfig, TextDiffHead, close_gates
from progidiff.textdiff.phrases import Phrase, compose_phrases, find_asked, keep_classes, read_phrases
from progidiff.textdiff.pictures import read_picture
from progidiff.textdiff.sentences import SentenceEncoder
from progidiff.textdiff.teach import read_asked
from progidiff.textdiff.train import TextDiffTraining, list_questions, move_picture, train_textdiff
from support.chests import CLASSES, PHRASES, write_chests
from support.toy_textdiff import toy

ROOT = Path(__file__).resolve().parents[2]


def write_table(folder: Path, text: str) -> Path:
    path = folder / "phrases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_table_says_what_each_sentence_asks_for(tmp_path: Path):
    path = write_table(
        tmp_path,
        "text,structures\nleft lung,left lung\nBoth  lungs,left lung; right lung\nthe heart,\nright lung,right lung\n",
    )
    assert read_phrases(path, CLASSES) == (
        Phrase("left lung", (2,)),
        Phrase("Both lungs", (1, 2)),
        Phrase("the heart", ()),
        Phrase("right lung", (1,)),
    )


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("text,asked\nleft lung,left lung", "needs the columns 'text' and 'structures'"),
        ("text,structures\nleft lung,lung left", r"asks for 'lung left' \(row 2\)"),
        ("text,structures\nleft lung,left lung\nLEFT lung,right lung", r"says two things of 'LEFT lung' \(row 3\)"),
        ("text,structures\nleft lung,left lung", "no phrase that asks for right lung"),
    ],
)
def test_a_table_that_cannot_be_taught_is_refused(tmp_path: Path, rows: str, said: str):
    with pytest.raises(RequestError, match=said):
        read_phrases(write_table(tmp_path, rows), CLASSES)


def test_names_and_synonyms_are_phrases_and_unseen_synonyms_are_not():
    phrases = compose_phrases(["liver", "left kidney"])
    assert phrases[0] == Phrase("liver", (1,))
    assert find_asked(phrases, "Kidney on the LEFT") == (2,)
    assert find_asked(phrases, "hepar") is None


def test_closed_gates_leave_background_and_open_ones_what_was_there():
    logits = torch.randn(2, 3, 4, 4)
    probabilities = logits.softmax(dim=1)
    opened = close_gates(logits, torch.full((2, 2), 20.0)).softmax(dim=1)
    torch.testing.assert_close(opened, probabilities, atol=1e-5, rtol=0)
    one = close_gates(logits, torch.tensor([[20.0, -20.0]] * 2)).softmax(dim=1)
    torch.testing.assert_close(one[:, 1], probabilities[:, 1], atol=1e-5, rtol=0)
    torch.testing.assert_close(one[:, 0], probabilities[:, 0] + probabilities[:, 2], atol=1e-5, rtol=0)


def test_a_head_with_a_gate_draws_nothing_without_a_sentence_and_all_with_the_text_left_out():
    head = TextDiffHead(HeadConfig((8,), (1,), classes=2, text_features=6, width=8, base=8, heads=2, gate=True)).eval()
    features = [torch.randn(1, 8, 8, 8)]
    head.requires_grad_(False)
    silent = head(features).softmax(dim=1)[:, 1:]
    assert float(silent.max()) < 1e-6
    mask = torch.zeros(1, 3, dtype=torch.bool)
    assert float(head(features, torch.randn(1, 3, 6), mask).softmax(dim=1)[:, 1:].max()) < 1e-6
    assert float(head(features, attend=False).softmax(dim=1)[:, 1:].max()) > 0.1
    with pytest.raises(GeometryError, match="has no gate"):
        TextDiffHead(replace(head.config, gate=False)).weigh(None, None, 1)


def test_a_picture_and_its_target_are_moved_together_and_never_mirrored():
    target = torch.zeros(2, 32, 32)
    target[1, 4:12, 20:28] = 1
    target[0] = 1 - target[1]
    for seed in range(4):
        picture, moved = move_picture(target[1:].expand(3, -1, -1), target, 0.12, seed)
        torch.testing.assert_close(picture[0], moved[1])
        torch.testing.assert_close(moved.sum(dim=0), torch.ones(32, 32))
        rows, columns = torch.nonzero(moved[1] > 0.5, as_tuple=True)
        assert rows.float().mean() < 16 < columns.float().mean()


@pytest.fixture(scope="module")
def chests(tmp_path_factory: pytest.TempPathFactory) -> list[PictureCase]:
    return write_chests(tmp_path_factory.mktemp("chests"), 6)


@pytest.fixture(scope="module")
def selecting(
    chests: list[PictureCase],
    extractor: DiffusionFeatures,
    encoder: SentenceEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> TextDiffTraining:
    """A head that learned to select from four pictures; two held out."""
    folder = tmp_path_factory.mktemp("selecting")
    config = toy(
        classes=CLASSES,
        steps=80,
        features=replace(extractor.options, mirror=False),
        move=0.1,
        head=replace(toy().head, gate=True),
    )
    return train_textdiff(
        chests[:4],
        chests[4:],
        denoiser=DiffusionFeatures.load(extractor.folder, config.features, "cpu"),
        encoder=encoder,
        phrases=PHRASES,
        out=folder / "model",
        work=folder / "work",
        config=config,
        device="cpu",
    )


def test_the_sentence_decides_which_lung_is_drawn(selecting: TextDiffTraining, chests: list[PictureCase]):
    model = selecting.model
    picture = read_picture(chests[4].image)
    truth = np.asarray(Image.open(chests[4].label))

    def dice(sentence: str, classes: tuple[int, ...]) -> float:
        mask, wanted = model.predict(picture, sentence).mask, keep_classes(truth, classes)
        return float(2 * ((mask == wanted) & (wanted > 0)).sum() / ((mask > 0).sum() + (wanted > 0).sum()))

    assert dice("right lung", (1,)) > 0.7
    assert dice("opacity in the left lower zone", (2,)) > 0.7
    assert dice("both lungs", (1, 2)) > 0.7
    assert dice("left lung", (1,)) < 0.1
    silent = model.predict(picture, "the heart")
    assert not silent.mask.any()
    assert "found nothing in the sentence that it knows (right lung, left lung)" in " ".join(silent.notes)
    assert not any("Nothing is drawn" in note for note in model.predict(picture, "left lung").notes)
    empty = model.predict(picture, None)
    assert not empty.mask.any()
    assert "draws nothing; write one, for example 'right lung'" in " ".join(empty.notes)


def test_what_was_taught_is_in_the_card_and_comes_back_from_disk(selecting: TextDiffTraining):
    assert selecting.model.folder is not None
    loaded = load_textdiff(selecting.model.folder, "cpu")
    assert loaded.card.phrases == PHRASES
    assert loaded.head.gate is not None
    assert selecting.figures["dice"] > 0.7


def test_a_card_from_before_phrases_is_read_as_it_was(model):
    values = model.card.to_dict()
    assert "phrases" not in values
    del values["head"]["gate"]
    assert TextDiffCard.from_dict(values) == model.card


def test_a_selecting_head_is_measured_against_what_each_sentence_asks_for(
    selecting: TextDiffTraining, chests: list[PictureCase]
):
    cases = [replace(chests[4], sentence="left lung"), replace(chests[5], sentence="Right Lung")]
    right, swapped = (evaluate(selecting.model, cases, control)["summary"]["dice"] for control in ("none", "shuffled"))
    assert right > 0.7
    assert swapped < 0.1
    assert evaluate(selecting.model, cases, "empty")["summary"]["dice"] == 0
    with pytest.raises(RequestError, match="what 'the spleen' of 'chest_4' asks for is not known"):
        evaluate(selecting.model, [replace(chests[4], sentence="the spleen")])


def test_questions_leave_out_what_a_label_says_nothing_about(selecting: TextDiffTraining, chests: list[PictureCase]):
    card = selecting.model.card
    assert list_questions(card, chests[4]) == [("right lung", (1,)), ("left lung", (2,)), ("both lungs", (1, 2))]
    assert list_questions(card, replace(chests[4], unknown=(2,))) == [("right lung", (1,))]


@pytest.mark.parametrize(
    ("changes", "phrases", "said"),
    [
        ({"use_text": False}, PHRASES, "must read"),
        ({"mirror": True}, PHRASES, "set features.mirror to false"),
        ({}, (Phrase("spleen", (3,)),), "asks for a class there is not; there are 2"),
        ({}, (), "needs phrases to learn from"),
    ],
)
def test_a_selection_that_cannot_be_taught_is_refused(
    changes, phrases, said: str, chests: list[PictureCase], denoiser: Path, tmp_path: Path
):
    mirror = changes.pop("mirror", False)
    config = toy(
        classes=CLASSES,
        features=replace(toy().features, mirror=mirror),
        head=replace(toy().head, gate=True),
        **changes,
    )
    with pytest.raises(RequestError, match=said):
        train_textdiff(
            chests[:1], denoiser=denoiser, phrases=phrases, work=tmp_path / "work", config=config, device="cpu"
        )


def test_the_phrases_for_chests_and_those_that_are_only_measured_share_none():
    kinds = ("", "_unseen", "_two_sided", "_last")
    tables = [read_phrases(ROOT / "benchmarks" / f"chest_phrases{kind}.csv", CLASSES) for kind in kinds]
    known, *measured = ({phrase.text.casefold() for phrase in table} for table in tables)
    assert not any(known & unseen for unseen in measured)
    assert len(known) > 1000
    assert {phrase.classes for phrase in tables[0]} == {(), (1,), (2,), (1, 2)}


def test_a_head_is_taught_more_phrases_on_the_command_line(
    selecting: TextDiffTraining, chests: list[PictureCase], tmp_path: Path
):
    rows = [f'"{phrase.text}",{"; ".join(CLASSES[value - 1] for value in phrase.classes)}' for phrase in PHRASES]
    rows += ['"right lung clear, left lung opaque",left lung', '"left lung clear, right lung opaque",right lung']
    table = write_table(tmp_path, "\n".join(["text,structures", *rows, "right femur,", "left femur,"]) + "\n")
    arguments = [
        "textdiff",
        "teach",
        "--model",
        selecting.model.folder,
        "--phrases",
        table,
        "--out",
        tmp_path / "taught",
    ]
    arguments += ["--validation", chests[0].image.parent, "--work", tmp_path, "--steps", 150, "--device", "cpu"]
    made = CliRunner().invoke(main.app, list(map(str, arguments)))
    assert made.exit_code == 0, made.output
    said = json.loads(made.stdout)
    assert said["misread"] == []
    assert said["figures"]["dice"] > 0.7
    taught = load_textdiff(tmp_path / "taught", "cpu")
    asked = read_asked(
        taught, ["right lung clear, left lung opaque", "Left lung clear, right lung opaque", "left femur"]
    )
    assert asked == [(2,), (1,), ()]
    run = json.loads((tmp_path / "taught" / "run.json").read_text(encoding="utf-8"))
    assert run["taught_from"]["model"] == selecting.model.card.full_name
    assert run["training_cases"] == [case.name for case in chests[:4]]
    silent = taught.predict(read_picture(chests[4].image), "left femur")
    assert not silent.mask.any()
