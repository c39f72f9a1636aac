"""Labelling a folder ahead of time: resumable, never over other people's labels, on several processes and on a Ray
cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from progidiff.active_learning.scores import SliceScoreStore
from progidiff.cli.main import app
from progidiff.errors import ModelError, PromptError, RequestError
from progidiff.evaluation.prelabel import (
    ImageOutcome,
    Prelabeller,
    PrelabelSettings,
    build_report,
    list_images,
    run_here,
    write_report,
)
from progidiff.proposals.engine import Engine
from progidiff.proposals.store import ProposalStore
from support.servers import free_port

SETTINGS = PrelabelSettings(prompt="liver", num_proposals=2, steps=1)
OPTIONS = ("--prompt", "liver", "-k", "2", "--steps", "1")


@pytest.fixture
def studies(tmp_path: Path, phantom_writer: Callable[..., Path]) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        phantom_writer(folder / f"{name}.nii.gz", shape=(32, 32, 4), seed=seed)
    return folder


def label_all(studies: Path, model: Path, settings: PrelabelSettings = SETTINGS) -> dict[str, ImageOutcome]:
    make = lambda: Prelabeller(Engine(model, device="cpu"), studies, settings)  # noqa: E731
    return {outcome.image: outcome for outcome in run_here(list_images(studies), make)}


def states(outcomes: dict[str, ImageOutcome]) -> dict[str, str]:
    return {image: outcome.state for image, outcome in outcomes.items()}


def test_every_image_gets_a_label_on_its_grid_and_proposals_for_the_server(studies: Path, tiny_model: Path):
    assert states(label_all(studies, tiny_model)) == dict.fromkeys("abc", "made")
    for name in "abc":
        label, image = (
            nibabel.load(studies / "labels" / "original" / f"{name}.nii.gz"),
            nibabel.load(studies / f"{name}.nii.gz"),
        )
        assert label.shape == image.shape
        np.testing.assert_allclose(label.affine, image.affine, atol=1e-5)
        assert set(np.unique(np.asarray(label.dataobj))) <= {0, 6}
    assert sorted(entry.image_id for entry in ProposalStore(studies / ".progidiff").list()) == ["a", "b", "c"]
    assert SliceScoreStore(studies / ".progidiff" / "scores").load_all() == []
    assert not list(studies.rglob(".*.nii.gz"))


def test_the_same_command_continues_and_redoes_only_what_changed(
    studies: Path, tiny_model: Path, phantom_writer: Callable[..., Path]
):
    label_all(studies, tiny_model)
    before = (studies / "labels" / "original" / "b.nii.gz").stat().st_mtime_ns
    assert states(label_all(studies, tiny_model)) == dict.fromkeys("abc", "there")
    phantom_writer(studies / "a.nii.gz", shape=(32, 32, 5), seed=9)
    (studies / "labels" / "original" / "c.nii.gz").unlink()
    assert states(label_all(studies, tiny_model)) == {"a": "made", "b": "there", "c": "made"}
    assert (studies / "labels" / "original" / "b.nii.gz").stat().st_mtime_ns == before
    assert nibabel.load(studies / "labels" / "original" / "a.nii.gz").shape == (32, 32, 5)
    assert states(
        label_all(studies, tiny_model, PrelabelSettings(prompt="spleen", num_proposals=2, steps=1))
    ) == dict.fromkeys("abc", "made")


def test_a_label_that_somebody_else_made_or_changed_stays_unless_asked(studies: Path, tiny_model: Path):
    label_all(studies, tiny_model)
    changed = studies / "labels" / "original" / "a.nii.gz"
    image = nibabel.load(changed)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 0, image.affine), changed)
    content = changed.read_bytes()
    outcomes = label_all(studies, tiny_model)
    assert states(outcomes) == {"a": "kept", "b": "there", "c": "there"}
    assert "--overwrite replaces it" in outcomes["a"].reason
    assert changed.read_bytes() == content
    assert (
        states(label_all(studies, tiny_model, PrelabelSettings("liver", "original", 2, 1, overwrite=True)))["a"]
        == "made"
    )


def test_an_image_that_cannot_be_read_is_reported_and_the_others_are_labelled(studies: Path, tiny_model: Path):
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    outcomes = label_all(studies, tiny_model)
    assert states(outcomes) == {"a": "made", "b": "made", "broken": "failed", "c": "made"}
    report = build_report(list(outcomes.values()), SETTINGS, "tiny@1", 1.0)
    assert report["counts"] == {"made": 3, "there": 0, "kept": 0, "failed": 1}
    assert "broken" in report["failed"]["broken"]


def test_what_would_fail_for_every_image_ends_the_run(studies: Path, tiny_model: Path, tmp_path: Path):
    with pytest.raises(PromptError):
        Prelabeller(Engine(tiny_model), studies, PrelabelSettings(prompt="spline"))
    with pytest.raises(ModelError):
        Prelabeller(Engine(tmp_path / "nothing"), studies, SETTINGS)
    for tag, message in (("final", "a person accepted"), ("../x", "letters, digits"), ("", "letters, digits")):
        with pytest.raises(RequestError, match=message):
            PrelabelSettings(tag=tag).check()
    with pytest.raises(RequestError, match="no folder"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="holds no images"):
        list_images(tmp_path / "empty")


def test_each_of_several_processes_writes_its_own_report(tmp_path: Path):
    assert [write_report({}, tmp_path / "r.json", index, 2).name for index in range(2)] == [
        "r.0-of-2.json",
        "r.1-of-2.json",
    ]


def test_the_command_says_what_failed_by_its_exit_code(studies: Path, tiny_model: Path):
    arguments = ["prelabel", "--studies", str(studies), *OPTIONS, "--model", str(tiny_model), "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    report = json.loads((studies / ".progidiff" / "prelabel.json").read_text())
    assert report["counts"] == {"made": 0, "there": 3, "kept": 0, "failed": 1}
    assert CliRunner().invoke(app, [*arguments, "--out-tag", "final"]).exit_code == 2


def test_two_processes_of_accelerate_label_the_folder_together(studies: Path, tiny_model: Path):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += [
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        str(free_port()),
        "--module",
        "progidiff.cli",
    ]
    command += ["prelabel", "--studies", str(studies), *OPTIONS, "--model", str(tiny_model), "--device", "cpu"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((studies / ".progidiff" / f"prelabel.{index}-of-2.json").read_text()) for index in range(2)]
    # Whoever is free takes the next one: which process has which is not said, but each image has one.
    assert sorted(image for report in reports for image in report["images"]) == ["a", "b", "c"]
    assert {entry["state"] for report in reports for entry in report["images"].values()} == {"made"}
    [parquet] = (studies / ".progidiff" / "prelabel-reports").iterdir()
    assert sorted(pyarrow.parquet.read_table(parquet)["image"].to_pylist()) == ["a", "b", "c"]
    assert all(state == "there" for state in states(label_all(studies, tiny_model)).values())


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_labels_the_folder(studies: Path, tiny_model: Path):
    pytest.importorskip("ray", reason="ray is not installed; pip install 'progidiff[ray]'")
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    command = [
        sys.executable,
        "-m",
        "progidiff.cli",
        "prelabel",
        "--studies",
        str(studies),
        *OPTIONS,
        "--model",
        str(tiny_model),
    ]
    command += ["--device", "cpu", "--ray", "--workers", "2"]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=600, env=environment, check=False
    )
    assert done.returncode == 1, done.stderr[-3000:]
    report = json.loads((studies / ".progidiff" / "prelabel.json").read_text())
    assert report["counts"] == {"made": 3, "there": 0, "kept": 0, "failed": 1}
    assert states(label_all(studies, tiny_model)) == {"a": "there", "b": "there", "broken": "failed", "c": "there"}
