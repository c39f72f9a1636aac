"""The command line, from pictures to figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from progidiff.cli import main
from progidiff.cli.textdiff import ControlName
from progidiff.textdiff.evaluate import CONTROLS
from progidiff.textdiff.model import load_textdiff_card
from progidiff.textdiff.pretrain import DenoiserConfig
from progidiff.textdiff.train import TextDiffTrainConfig, TextDiffTraining
from progidiff.textdiff.versions import TextDiffStore
from progidiff.training.settings import flatten, load_config, read_template, render_config, to_values

RECIPES = {"textdiff_pretrain": DenoiserConfig, "textdiff_train": TextDiffTrainConfig}
SETTINGS = """
features: {timesteps: [50], scale: 1.0}
head: {width: 16, base: 8, heads: 2}
schedule: {warmup: 1}
precision: fp32
crop: 16
batch_size: 2
views: 1
tensorboard: false
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main.app, ["textdiff", *map(str, arguments)])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_file_holds_every_setting_with_the_default_of_the_code(recipe: str, tmp_path: Path):
    kind = RECIPES[recipe]
    assert flatten(yaml.safe_load(read_template(recipe))) == flatten(to_values(kind()))
    assert render_config(kind(), recipe) == read_template(recipe)
    assert read_template(recipe).count("#") > 15
    shown = run(recipe.removeprefix("textdiff_"), "--show-config", "--set", "seed=7")
    assert shown.exit_code == 0, shown.output
    (tmp_path / "mine.yaml").write_text(shown.stdout, encoding="utf-8")
    assert load_config(kind, tmp_path / "mine.yaml").seed == 7


def test_controls_are_those_of_the_evaluation():
    assert tuple(name.value for name in ControlName) == CONTROLS


def test_from_pictures_without_labels_to_figures(blobs: Path, tmp_path: Path):
    widths = [
        "--set",
        "widths.channels=[8,8,8,8]",
        "--set",
        "crops.size=16",
        "--set",
        "crops.scale=1.0",
        "--set",
        "crops.per_step=2",
    ]
    made = run(
        "pretrain",
        "--images",
        blobs,
        "--out",
        tmp_path / "den",
        "--work",
        tmp_path / "pw",
        "--steps",
        2,
        "--device",
        "cpu",
        *widths,
    )
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["steps"] == 2
    (tmp_path / "mine.yaml").write_text(SETTINGS, encoding="utf-8")
    options = [
        "--images",
        blobs / "images",
        "--labels",
        blobs / "labels",
        "--text",
        blobs / "text.csv",
        "--device",
        "cpu",
    ]
    trained = run(
        "train", *options, "--out", tmp_path / "m", "--work", tmp_path / "w", "--config", tmp_path / "mine.yaml",
        "--steps", 3,
        "--denoiser", tmp_path / "den", "--hold-out", "a2,a3", "--name", "blobs", "--classes", "blob",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert set(json.loads(trained.stdout)["figures"]) == {"dice", "iou", "threshold"}
    card = load_textdiff_card(tmp_path / "m")
    assert (card.name, card.classes, card.denoiser) == ("blobs", ("blob",), "../den")
    measured = run(
        "evaluate", *options, "--model", tmp_path / "m", "--control", "shuffled", "--out", tmp_path / "report.json"
    )
    assert measured.exit_code == 0, measured.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report["control"] == "shuffled"
    assert len(report["images"]) == report["summary"]["images"] == 4
    assert 0 <= report["summary"]["iou"] <= report["summary"]["dice"] <= 1
    assert "mean Dice" in measured.stdout


def test_a_picture_is_segmented_into_a_folder(training: TextDiffTraining, blobs: Path, tmp_path: Path):
    picture = blobs / "images" / "a3.png"
    found = run(
        "predict",
        picture,
        "--text",
        blobs / "text.csv",
        "--model",
        training.model.folder,
        "--out",
        tmp_path,
        "--draws",
        2,
        "--device",
        "cpu",
    )
    assert found.exit_code == 0, found.output
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "disagreement.png",
        "mask.png",
        "probability.png",
        "result.json",
    ]
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    assert mask.shape == (48, 48)
    assert set(np.unique(mask)) == {0, 255}
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert result["sentence"] == "The density in the lower right is high."
    assert result["share"]["blob"] == pytest.approx((mask > 0).mean())
    assert result["draws"] == 2
    bare = run("predict", picture, "--model", training.model.folder, "--out", tmp_path / "bare", "--device", "cpu")
    assert bare.exit_code == 0
    assert "no sentence" in bare.stderr


def test_held_back_pictures_may_lie_in_a_folder_of_their_own(blobs: Path, denoiser: Path, tmp_path: Path):
    (tmp_path / "mine.yaml").write_text(SETTINGS, encoding="utf-8")
    for part in ("images", "labels"):
        (tmp_path / "val" / part).mkdir(parents=True)
        shutil.copy(blobs / part / "a0.png", tmp_path / "val" / part / "v.png")
    trained = run(
        "train", "--images", blobs, "--case", "a1", "--validation", tmp_path / "val", "--out", tmp_path / "m",
        "--work", tmp_path / "w",
        "--config", tmp_path / "mine.yaml", "--steps", 1, "--denoiser", denoiser, "--without-text", "--device", "cpu",
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    record = json.loads((tmp_path / "m" / "run.json").read_text(encoding="utf-8"))
    assert (record["training_cases"], record["held_out_cases"]) == (["a1"], ["v"])
    assert load_textdiff_card(tmp_path / "m").head.text_features == 0


def test_versions_are_listed_shown_used_and_rolled_back(training: TextDiffTraining, tmp_path: Path):
    store = TextDiffStore(tmp_path)
    for _ in range(2):
        store.add("nuclei", training.model, training.run)
    assert "none is served" in run("versions", "list", "--store", tmp_path).stdout
    assert run("versions", "use", "nuclei", "--store", tmp_path).exit_code == 2
    for number in (1, 2):
        assert run("versions", "use", f"nuclei@{number}", "--store", tmp_path).exit_code == 0
    assert "nuclei: 1 2*" in run("versions", "list", "--store", tmp_path).stdout
    assert json.loads(run("versions", "list", "--json", "--store", tmp_path).stdout)[0]["current"] == 2
    assert run("versions", "show", "nuclei", "--store", tmp_path).stdout.startswith("# nuclei@2")
    assert (
        json.loads(run("versions", "show", "nuclei@1", "--json", "--store", tmp_path).stdout)["model"]["version"] == 1
    )
    assert "nuclei@1 is served" in run("versions", "rollback", "nuclei", "--store", tmp_path).stdout


def test_a_trained_model_becomes_the_next_version(training: TextDiffTraining, tmp_path: Path):
    (tmp_path / "card.md").write_text("# Blobs\n", encoding="utf-8")
    store = ["--store", tmp_path / "store"]
    added = run(
        "versions",
        "add",
        training.model.folder,
        "--name",
        "blobs",
        "--data",
        "Toys.",
        "--readme",
        tmp_path / "card.md",
        *store,
    )
    assert added.exit_code == 0, added.output
    assert "blobs@1 is in" in added.stdout
    card = load_textdiff_card(tmp_path / "store" / "blobs")
    assert (card.full_name, card.data) == ("blobs@1", "Toys.")
    assert run("versions", "show", "blobs", *store).stdout == "# Blobs\n\n"
    assert "none is served" not in run("versions", "list", *store).stdout
    assert run("versions", "add", training.model.folder, "--no-publish", *store).exit_code == 0
    assert "toy: 1 (none is served)" in run("versions", "list", *store).stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train"], "Option --images is missing"),
        (["train", "--images", "nowhere", "--out", "x"], "'nowhere' does not exist"),
        (["train", "--set", "stepz=1"], "There is no setting 'stepz'"),
        (["evaluate", "--images", "."], "Option --out is missing"),
        (["predict", "none.png", "--out", "x"], "does not exist"),
        (["predict", "none.png", "--out", "x", "--sentence", "a", "--text", "b"], "not both"),
        (["pretrain", "--out", "x"], "Option --images is missing"),
    ],
)
def test_errors_are_one_line_with_a_cure(arguments: list[str], told: str):
    found = run(*arguments)
    assert found.exit_code == 2
    assert told in found.stderr
    assert found.stderr.startswith("Error: ")
    assert found.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_refused(blobs: Path, tmp_path: Path):
    found = run("predict", blobs / "images" / "a0.png", "--out", tmp_path / "x", "--model", tmp_path)
    assert found.exit_code == 2
    assert "holds no model" in found.stderr
    assert not (tmp_path / "x").exists()
