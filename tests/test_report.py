"""What annotating has brought: from the label history and the versions on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from progidiff.adapters import AdapterStore
from progidiff.annotations import AnnotationStore, Source
from progidiff.cli import app
from progidiff.lora import LoraSettings
from progidiff.report import build_report, format_html, list_queue
from progidiff.slice_scores import SliceScoreStore
from test_slice_scores import make_entry


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
        store.record("a", folder / "a.nii.gz", slices=slices, structures=("liver",), source=source, edited=edited, seconds=seconds)
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
            "ct", "lora", {"branch.x": torch.zeros(1)}, modality="CT", structures=("liver",), base="b", base_name="t@1", run=run,
            readme=lambda c: "", lora=LoraSettings(),
        )  # fmt: skip
    store.publish("ct", card.version)
    return store


def test_the_report_counts_slices_dice_changes_and_minutes(studies: Path, adapters: AdapterStore):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    report = build_report(annotations, adapters, [], batch=20)
    assert report["annotated"] == {"images": 1, "whole_images": 0, "slices": 3}
    assert [(v["version"], v["slices"], v["mean"], v["dice"], v["served"]) for v in report["versions"]] == [
        ("ct@1", 10, 0.5, {"liver": pytest.approx(0.6)}, False),
        ("ct@2", 20, 0.7, {"liver": pytest.approx(0.8)}, True),
    ]
    (entry,) = report["saves"]["by_version"]
    assert entry == {"version": "ct-base@1", "saves": 2, "known": 2, "unchanged": 0.5, "minutes_per_slice": 1.0}
    assert report["advice"]["expected_gain"] == pytest.approx(0.2)
    assert report["problems"] == []
    json.dumps(report, allow_nan=False)


def test_the_queue_leaves_out_annotated_slices_and_images_that_are_gone(studies: Path):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    queue = list_queue(SliceScoreStore(studies / ".progidiff" / "scores"), annotations, ["a", "b"])
    assert sorted(entry["image"] for entry in queue) == ["a", "b"]
    of_a = next(entry for entry in queue if entry["image"] == "a")
    assert {item["index"] for item in of_a["slices"]} == {0, 3, 5, 6}
    assert of_a["scores_from"] == "ct-base@1"
    assert "disagree" in of_a["reason"]


def test_a_damaged_version_is_named_and_the_rest_is_told(studies: Path, adapters: AdapterStore):
    (adapters.root / "ct" / "1" / "run.json").chmod(0o644)
    (adapters.root / "ct" / "1" / "run.json").unlink()
    report = build_report(AnnotationStore(studies / ".progidiff" / "annotations"), adapters, [])
    assert [version["version"] for version in report["versions"]] == ["ct@2"]
    assert "run.json is missing" in report["problems"][0]


def test_the_page_shows_everything_and_escapes_it(studies: Path, adapters: AdapterStore):
    annotations = AnnotationStore(studies / ".progidiff" / "annotations")
    queue = list_queue(SliceScoreStore(studies / ".progidiff" / "scores"), annotations, ["a", "b"])
    page = format_html(build_report(annotations, adapters, queue))
    assert "&lt;better&gt;" in page
    assert "<better>" not in page
    assert "<polyline" in page
    assert "ct@2 (served)" in page
    assert "50%" in page
    assert "http" not in page  # nothing from elsewhere


def test_the_command_reports_an_empty_folder_and_writes_both_forms(tmp_path: Path, studies: Path, adapters: AdapterStore, tiny_model: Path):
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
