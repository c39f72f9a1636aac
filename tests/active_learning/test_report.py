"""What annotating has brought: from the label history and the versions on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from progidiff.active_learning.answers import SuggestedImage
from progidiff.active_learning.report import (
    build_report,
    count_rounds,
    find_served,
    format_html,
    list_queue,
    list_versions,
)
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.active_learning.settings import AcquisitionConfig
from progidiff.cli.main import app
from progidiff.errors import RequestError
from progidiff.labels.history import AnnotationStore, Source
from progidiff.model.adapters import AdapterStore
from progidiff.model.lora import LoraSettings
from progidiff.textdiff.features import FeatureOptions
from progidiff.textdiff.model import TextDiffCard
from progidiff.textdiff.network import HeadConfig
from progidiff.textdiff.versions import TextDiffStore
from support.scores import make_entry

by_disagreement = partial(list_queue, strategy="proposal_disagreement")


@pytest.fixture
def studies(tmp_path: Path, phantom_writer: Callable[..., Path]) -> Path:
    """Two images; of `a` two saves from proposals of ct-base@1, one of them changed."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for name in ("a", "b"):
        phantom_writer(folder / f"{name}.nii.gz", shape=(16, 16, 7))
    store = AnnotationStore(folder / ".progidiff" / "annotations")
    source = Source("0" * 64, "consensus", "ct-base@1", "", 0)
    for slices, edited, seconds in (((1, 2), False, 60.0), ((4,), True, 120.0)):
        store.record(
            "a",
            folder / "a.nii.gz",
            slices=slices,
            structures=("liver",),
            source=source,
            edited=edited,
            seconds=seconds,
        )
    scores = SliceScoreStore(folder / ".progidiff" / "scores")
    scores.save(make_entry("a", "ct-base@1"))
    scores.save(make_entry("b", "ct-base@1", seed=1))
    scores.save(make_entry("gone", "ct-base@1", seed=2))
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "adapters")
    for slices, dice in ((10, 0.5), (20, 0.7)):
        run = {
            "training_slices": {"a": list(range(slices))},
            "validation": {"base": {"consensus": 0.3}, "adapted": {"consensus": dice, "consensus liver": dice + 0.1}},
            "verdict": f"Dice {dice} <better>.",
        }
        card = store.add(
            "ct", "lora", {"branch.x": torch.zeros(1)}, modality="CT", structures=("liver",), base="b",
            base_name="t@1", run=run,
            readme=lambda c: "", lora=LoraSettings(),
        )  # fmt: skip
    store.publish("ct", card.version)
    return store


def test_the_report_counts_slices_dice_changes_and_minutes(studies: Path, adapters: AdapterStore):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    report = build_report(annotations, adapters, [], batch=20)
    assert report.annotated.model_dump() == {"images": 1, "whole_images": 0, "slices": 3}
    assert [(v.version, v.slices, v.mean, v.dice, v.served) for v in report.versions] == [
        ("ct@1", 10, 0.5, {"liver": pytest.approx(0.6)}, False),
        ("ct@2", 20, 0.7, {"liver": pytest.approx(0.8)}, True),
    ]
    (entry,) = report.saves.by_version
    assert entry.model_dump() == {
        "version": "ct-base@1",
        "saves": 2,
        "known": 2,
        "unchanged": 0.5,
        "minutes_per_slice": 1.0,
    }
    assert report.advice.expected_gain == pytest.approx(0.2)
    assert report.problems == []
    json.dumps(report.model_dump(), allow_nan=False)


def test_the_queue_leaves_out_annotated_slices_and_images_that_are_gone(studies: Path):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    queue = by_disagreement(SliceScoreStore(studies / ".progidiff" / "scores"), annotations, ["a", "b"])
    assert sorted(entry.image for entry in queue) == ["a", "b"]
    of_a = next(entry for entry in queue if entry.image == "a")
    assert {item.index for item in of_a.slices} == {0, 3, 5, 6}
    assert of_a.scores_from == "ct-base@1"
    assert "disagree" in of_a.reason


def train(
    store: AdapterStore, name: str, cases: list[str], dice: float, modality: str = "CT", accepted: bool = True
) -> None:
    run = {
        "training_cases": cases, "training_slices": {case: list(range(round(100 * dice))) for case in cases},
        "accepted": accepted,
        "validation": {"adapted": {"consensus": dice}},
    }  # fmt: skip
    card = store.add(
        name, "lora", {"branch.x": torch.zeros(1)}, modality=modality, structures=("liver",), base="b",
        base_name="t@1", run=run,
        readme=lambda c: "", lora=LoraSettings(),
    )  # fmt: skip
    store.publish(name, card.version)


def test_the_advice_is_about_what_was_trained_on_these_labels_and_not_about_what_came_along(
    studies: Path, adapters: AdapterStore
):
    train(adapters, "mr", ["t2spir13"], 0.9, "MR")  # shipped, and last by name
    report = build_report(AnnotationStore(studies / ".progidiff" / "annotations"), adapters, [])
    assert report.advice_about == "ct"
    assert report.advice.expected_gain == pytest.approx(0.2)
    assert list(report.advice_by_model) == ["ct"]
    assert [(v.version, v.here) for v in report.versions] == [("ct@1", True), ("ct@2", True), ("mr@1", False)]


def test_every_model_has_its_own_curve_and_the_one_trained_last_comes_first(studies: Path, adapters: AdapterStore):
    time.sleep(1.1)  # versions know the second they were made in
    for dice in (0.4, 0.8):
        train(adapters, "bones", ["a"], dice)
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    report = build_report(annotations, adapters, [])
    assert report.advice_about == "bones"
    gains = {name: advice.expected_gain for name, advice in report.advice_by_model.items()}
    assert gains == {"ct": pytest.approx(0.2), "bones": pytest.approx(0.4 * math.log(100 / 80) / math.log(2))}
    page = format_html(report)
    assert "bones: Of 2 saves" in page
    assert "ct: Of 2 saves" in page


class Heads(TextDiffStore):
    """Models for pictures as the report sees them: cards without weights."""

    def train(self, cases: list[str], dice: float, accepted: bool) -> None:
        run = {
            "training_cases": cases,
            "validation": {"current": {"dice": 0.1}, "adapted": {"dice": dice, "iou": 0.1}},
            "accepted": accepted,
        }

        def make_card(version: int, created: str, sha256: str) -> TextDiffCard:
            return TextDiffCard(
                name="nuclei",
                version=version,
                classes=("nuclei",),
                denoiser="denoiser",
                denoiser_digest="",
                encoder="",
                encoder_digest="",
                features=FeatureOptions(),
                head=HeadConfig(channels=(4,), strides=(1,), classes=1, text_features=0),
                created=created,
                sha256=sha256,
            )

        card = self._add("nuclei", {self.weights_file: b""}, make_card, run, lambda card: "")
        self.publish("nuclei", card.version)


def test_a_folder_of_pictures_has_a_curve_and_an_advice(tmp_path: Path):
    annotations = AnnotationStore(tmp_path / "annotations")
    (tmp_path / "label.png").write_bytes(b"label")
    source = Source("0" * 64, "consensus", "nuclei@1", "", 0)
    for number in range(12):
        annotations.record(
            f"tissue{number}", tmp_path / "label.png", num_slices=1, source=source, edited=number % 2 == 0
        )
    heads = Heads(tmp_path / "heads")
    heads.train(["tissue0", "tissue1"], 0.5, accepted=True)
    heads.train([f"tissue{number}" for number in range(4)], 0.7, accepted=True)
    heads.train(["tissue0"], 0.2, accepted=False)
    adapters = AdapterStore(tmp_path / "adapters")
    report = build_report(annotations, adapters, [], batch=4, textdiff=heads)
    assert [(v.version, v.slices, v.mean, v.base_mean) for v in report.versions[:2]] == [
        ("nuclei@1", 2, 0.5, 0.1),
        ("nuclei@2", 4, 0.7, 0.1),
    ]
    assert report.advice_about == "nuclei"
    assert report.advice.unchanged_now == 0.5
    assert report.advice.expected_gain > 0.1
    assert count_rounds(list_versions(adapters, heads, []), annotations.annotated_images()) == {"picture": 2}
    assert "nuclei@3 (served)" in format_html(report)
    assert find_served(tmp_path, adapters, heads)("picture") == "nuclei@3"


def test_the_queue_follows_the_served_version_the_strategy_and_its_settings(studies: Path):
    annotations, scores = (
        AnnotationStore(studies / ".progidiff" / "annotations"),
        SliceScoreStore(studies / ".progidiff" / "scores"),
    )
    scores.save(make_entry("a", "ct-base@1+ct@1", created=2.0, seed=5))  # made by a version that is not served any more
    versions = {
        entry.image: entry.scores_from
        for entry in by_disagreement(scores, annotations, ["a", "b"], wanted=lambda modality: "ct-base@1")
    }
    assert versions == {"a": "ct-base@1", "b": "ct-base@1"}
    settled, by_score = AcquisitionConfig(cover=False, noise=False), AcquisitionConfig(cover=False)
    plain = list_queue(scores, annotations, ["a", "b"], strategy="entropy", config=settled)
    assert all(entry.slices[0].score == round(float(by_entropy(scores, entry)), 4) for entry in plain)
    with pytest.raises(RequestError, match="no strategy"):
        list_queue(scores, annotations, ["a"], strategy="best")
    many = [f"image{number}" for number in range(30)]
    for number, image in enumerate(many):
        scores.save(make_entry(image, "ct-base@1", seed=number))
    noisy, later, without = (
        [entry.image for entry in by_disagreement(scores, annotations, many, 30, config=config, rounds=rounds)]
        for config, rounds in ((by_score, None), (by_score, {"CT": 50}), (settled, None))
    )
    assert noisy != without
    assert sum(a == b for a, b in zip(later, without, strict=True)) > sum(
        a == b for a, b in zip(noisy, without, strict=True)
    )


def by_entropy(scores: SliceScoreStore, entry: SuggestedImage) -> float:
    """The mean entropy over the structures of the first slice of a queue's entry."""
    found = scores.load(entry.image, entry.scores_from)
    assert found is not None
    return float(found.scores.entropy[:, entry.slices[0].index].mean())


def test_what_a_crash_left_is_told_and_is_no_damage(studies: Path, adapters: AdapterStore):
    log = studies / ".progidiff" / "annotations" / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"format": 1, "sequ')
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    annotations.record("b", studies / "b.nii.gz", slices=[0])
    report = build_report(annotations, adapters, [])
    assert report.problems == []
    (told,) = report.set_aside
    assert "19 bytes" in told
    assert "never acknowledged" in told
    assert "never acknowledged" in format_html(report)


def test_the_command_lists_pictures_too(tmp_path: Path, tiny_model: Path):
    studies = tmp_path / "pictures"
    studies.mkdir()
    (studies / "tissue.png").write_bytes(b"")
    SliceScoreStore(studies / ".progidiff" / "scores").save(make_entry("tissue", "nuclei@1", modality="picture"))
    arguments = ["report", "--studies", str(studies), "--model", str(tiny_model)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert [entry["image"] for entry in json.loads(told.stdout)["queue"]] == ["tissue"]
    assert CliRunner().invoke(app, [*arguments, "--next-strategy", "best"]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--acquisition", "noise=maybe"]).exit_code == 2


def test_a_damaged_version_is_named_and_the_rest_is_told(studies: Path, adapters: AdapterStore):
    (adapters.root / "ct" / "1" / "run.json").chmod(0o644)
    (adapters.root / "ct" / "1" / "run.json").unlink()
    report = build_report(AnnotationStore(studies / ".progidiff" / "annotations"), adapters, [])
    assert [version.version for version in report.versions] == ["ct@2"]
    assert "run.json is missing" in report.problems[0]


def test_the_page_shows_everything_and_escapes_it(studies: Path, adapters: AdapterStore):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    queue = by_disagreement(SliceScoreStore(studies / ".progidiff" / "scores"), annotations, ["a", "b"])
    page = format_html(build_report(annotations, adapters, queue))
    assert "&lt;better&gt;" in page
    assert "<better>" not in page
    assert "<polyline" in page
    assert "ct@2 (served)" in page
    assert "50%" in page
    assert "http" not in page  # nothing from elsewhere


def test_the_command_reports_an_empty_folder_and_writes_both_forms(
    tmp_path: Path, studies: Path, adapters: AdapterStore, tiny_model: Path
):
    arguments = ["report", "--studies", str(studies), "--model", str(tiny_model), "--adapters", str(adapters.root)]
    told = CliRunner().invoke(app, arguments)
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["annotated"]["slices"] == 3
    for name in ("report.html", "report.json"):
        assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / name)]).exit_code == 0
        assert (tmp_path / name).stat().st_size > 500
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "report.pdf")]).exit_code == 2
    empty = AnnotationStore(tmp_path / "nothing")
    page = format_html(build_report(empty, AdapterStore(tmp_path / "none"), []))
    assert "No version was trained yet" in page
    assert "Nothing is queued" in page


def test_a_person_s_work_is_told_by_structure(tmp_path: Path):
    file = tmp_path / "a.nii.gz"
    file.write_bytes(b"label")
    store = AnnotationStore(tmp_path / "annotations")
    for slices, effort in (
        ((1, 2), [("liver", 30.0, 8)]),
        ((4, 5), [("liver", 10.0, 4), ("spleen", 90.0, 2)]),
        ((7,), []),
    ):
        store.record("a", file, slices=slices, structures=("liver",), effort=effort)
    told = build_report(store, AdapterStore(tmp_path / "adapters"), [])
    assert [(entry.structure, entry.slices, entry.seconds, entry.clicks) for entry in told.effort] == [
        ("spleen", 2, 90, 2),
        ("liver", 4, 40, 12),
    ]
    assert (told.effort[1].seconds_per_slice, told.effort[1].clicks_per_slice) == (10, 3)
    assert "<td>liver<td>4<td>10.0<td>3.0" in format_html(told)
