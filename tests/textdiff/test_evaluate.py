"""Figures at the masks' own resolution, and what each control does to the sentences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.metrics import DiceMetric, MeanIoU
from PIL import Image

from progidiff.errors import CancelledError, RequestError
from progidiff.textdiff.data import PictureCase
from progidiff.textdiff.evaluate import compute_scores, evaluate, shuffle_sentences
from progidiff.textdiff.model import TextDiffModel
from progidiff.textdiff.pictures import read_label


class Listening(TextDiffModel):
    """Keeps what it was asked."""

    def __init__(self, model: TextDiffModel) -> None:
        super().__init__(model.extractor, model.encoder, model.head, model.card)
        self.heard: list[tuple[str | None, bool]] = []

    def predict(self, picture, sentence=None, draws=None, **options):
        self.heard.append((sentence, options["attend"]))
        return super().predict(picture, sentence, draws, **options)


def test_scores_are_those_of_monai():
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        found, truth = rng.random((2, 20, 30)) < share
        dice, iou = compute_scores(found, truth)
        pair = [torch.from_numpy(m)[None, None].float() for m in (found, truth)]
        assert dice == pytest.approx(float(DiceMetric()(*pair)), abs=1e-6)
        assert iou == pytest.approx(float(MeanIoU()(*pair)), abs=1e-6)


def test_both_empty_counts_one_and_one_empty_zero():
    none, some = np.zeros((3, 3), bool), np.ones((3, 3), bool)
    assert compute_scores(none, none) == (1.0, 1.0)
    assert compute_scores(some, none) == compute_scores(none, some) == (0.0, 0.0)


def test_a_report_has_every_image_and_their_means(model: TextDiffModel, cases: list[PictureCase]):
    seen = []
    report = evaluate(model, cases, on_progress=lambda done, total: seen.append((done, total)))
    assert [entry["name"] for entry in report["images"]] == ["a0", "a1", "a2", "a3"]
    assert seen == [(k, 4) for k in range(1, 5)]
    assert report["summary"]["dice"] == pytest.approx(np.mean([e["dice"] for e in report["images"]]))
    assert report["summary"]["iou"] == pytest.approx(np.mean([e["iou"] for e in report["images"]]))
    assert report["summary"]["per_class"]["blob"] == pytest.approx(report["summary"]["dice"])
    mask = model.predict(np.asarray(Image.open(cases[2].image)), cases[2].sentence).mask
    assert cases[2].label is not None
    assert report["images"][2]["dice"] == pytest.approx(compute_scores(mask > 0, read_label(cases[2].label)[0] > 0)[0])
    assert report["notes"] == []


def test_controls_change_the_sentences_and_nothing_else(model: TextDiffModel, cases: list[PictureCase]):
    heard = {}
    for control in ("none", "empty", "shuffled", "no-text"):
        listening = Listening(model)
        assert evaluate(listening, cases, control)["control"] == control
        heard[control] = listening.heard
    own = [case.sentence for case in cases]
    assert heard["none"] == [(s, True) for s in own]
    assert heard["empty"] == [(None, True)] * 4
    assert heard["no-text"] == [(None, False)] * 4
    assert sorted(str(s) for s, _ in heard["shuffled"]) == sorted(map(str, own))
    assert all(s != mine for (s, _), mine in zip(heard["shuffled"], own, strict=True))


def test_an_unknown_control_or_no_labels_are_refused(model: TextDiffModel, cases: list[PictureCase]):
    with pytest.raises(RequestError, match="'other' is unknown"):
        evaluate(model, cases, "other")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="no labelled picture"):
        evaluate(model, [replace(c, label=None) for c in cases])
    with pytest.raises(RequestError, match="at least two pictures"):
        evaluate(model, cases[:1], "shuffled")


def test_pictures_without_a_label_are_left_out_and_said(model: TextDiffModel, cases: list[PictureCase]):
    report = evaluate(model, [replace(cases[0], label=None), cases[1]])
    assert report["summary"]["images"] == 1
    assert report["notes"][0] == "a0 has no label and was left out."


def test_an_empty_mask_is_marked(model: TextDiffModel, cases: list[PictureCase], tmp_path: Path):
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "a0.png")
    entry = evaluate(model, [replace(cases[0], label=tmp_path / "a0.png")])["images"][0]
    assert entry["empty_label"]
    assert entry["dice"] == 0.0  # the picture shows blobs, and they are drawn


def test_an_evaluation_can_be_cancelled(model: TextDiffModel, cases: list[PictureCase]):
    with pytest.raises(CancelledError, match="after 0 of 4"):
        evaluate(model, cases, is_cancelled=lambda: True)


@pytest.mark.parametrize("seed", range(5))
def test_a_derangement_gives_nobody_its_own_sentence_and_other_words_where_possible(seed: int):
    sentences = ["even", "left", "even", None, "right", "even", "left"]
    shuffled = shuffle_sentences(sentences, seed)
    assert shuffled[3] is None
    assert sorted(filter(None, shuffled)) == sorted(filter(None, sentences))
    assert all(a != b for a, b in zip(sentences, shuffled, strict=True) if a)


def test_where_words_repeat_too_often_most_still_change():
    sentences = ["even"] * 4 + ["left"]
    shuffled = shuffle_sentences(sentences)
    assert sorted(map(str, shuffled)) == sorted(sentences)
    assert sum(a != b for a, b in zip(sentences, shuffled, strict=True)) == 2


@dataclass
class Drawing:
    """Answers every picture with one mask, as a head of two classes without a text branch."""

    mask: np.ndarray
    text_features: int = 0

    @property
    def card(self) -> SimpleNamespace:
        head, features = SimpleNamespace(text_features=self.text_features), SimpleNamespace(draws=1)
        told = {"full_name": "toy@1", "threshold": 0.5, "phrases": ()}
        return SimpleNamespace(classes=("one", "two"), head=head, features=features, **told)

    def predict(self, picture, sentence=None, draws=None, **options):
        return SimpleNamespace(mask=self.mask, disagreement=0.0, seconds=0.0, notes=())


@pytest.fixture
def halves(tmp_path: Path) -> PictureCase:
    """A picture whose left half is labelled as the first class."""
    label = np.zeros((8, 8), np.uint8)
    label[:, :4] = 1
    for name, values in (("a.png", np.zeros((8, 8, 3), np.uint8)), ("l.png", label)):
        Image.fromarray(values).save(tmp_path / name)
    return PictureCase("a", tmp_path / "a.png", tmp_path / "l.png", "Dense.")


def test_classes_that_a_label_does_not_speak_about_do_not_count(halves: PictureCase):
    mask = np.full((8, 8), 2, np.uint8)
    mask[:, :4] = 1
    assert evaluate(Drawing(mask), [halves])["summary"]["dice"] == pytest.approx(2 / 3)
    report = evaluate(Drawing(mask), [replace(halves, unknown=(2,))])
    assert report["summary"]["dice"] == 1.0
    assert report["summary"]["per_class"] == {"one": 1.0}


def test_a_control_asked_of_a_head_that_reads_no_text_is_said(halves: PictureCase):
    mask = np.ones((8, 8), np.uint8)
    deaf = {control: evaluate(Drawing(mask), [halves], control) for control in ("none", "empty", "no-text")}
    assert not any(report["reads_text"] for report in deaf.values())
    assert deaf["none"]["notes"] == []
    for control in ("empty", "no-text"):
        assert f"reads no text, so control {control} gives the figures of control none" in deaf[control]["notes"][0]
        assert "nuclei@1" in deaf[control]["notes"][0]
    hearing = evaluate(Drawing(mask, text_features=384), [halves], "empty")
    assert (hearing["reads_text"], hearing["notes"]) == (True, [])
