"""Settings: the shipped files are the defaults, later wins, and nothing that does not exist or fit is taken."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from typer.testing import CliRunner

from progidiff.cli import main
from progidiff.errors import RequestError
from progidiff.training.loop import LoopConfig, RunConfig, Schedule
from progidiff.training.recipe_settings import AdaptConfig, EvidenceStage, PretrainConfig, ProposalStage, TrainConfig
from progidiff.training.settings import Range, flatten, load_config, read_template, render_config, to_values

RECIPES: dict[str, Any] = {"pretrain": PretrainConfig, "train": TrainConfig, "adapt": AdaptConfig}


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Range(0, 1)] = 0.5
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Outer:
    count: Annotated[int, Range(1, 9)] = 3
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    active: bool = True
    share: Annotated[float, Range(0, 1)] | None = None
    pair: tuple[float, float] = (1.0, 2.0)
    inner: Inner = field(default_factory=Inner)


def write(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shipped_file_holds_every_setting_with_the_default_of_the_code(recipe: str):
    shipped = flatten(yaml.safe_load(read_template(recipe)))
    assert shipped == flatten(to_values(RECIPES[recipe]()))
    assert read_template(recipe).count("#") > 15


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_show_config_prints_is_read_back_as_the_same_settings(recipe: str, tmp_path: Path):
    kind = RECIPES[recipe]
    assert render_config(kind(), recipe) == read_template(recipe)
    config = load_config(kind, changes=["seed=5"])
    assert load_config(kind, write(tmp_path, render_config(config, recipe))) == config != kind()


def test_flags_win_over_changes_over_the_file_over_defaults(tmp_path: Path):
    file = write(tmp_path, "count: 4\nname: file\ninner:\n  rate: 0.1\n")
    assert load_config(Outer, file) == Outer(4, "file", inner=Inner(0.1))
    assert load_config(Outer, file, ["name=set", "inner.rate=0.2"]) == Outer(4, "set", inner=Inner(0.2))
    assert load_config(Outer, file, ["name=set", "inner.rate=0.2"], {"name": "flag", "count": None}) == Outer(
        4, "flag", inner=Inner(0.2)
    )


@pytest.mark.parametrize(
    "change, wanted",
    [
        ("inner.rate=1e-3", Outer(inner=Inner(0.001))),
        ("inner.rate=1", Outer(inner=Inner(1.0))),
        ("inner.sizes=[3, 4, 5]", Outer(inner=Inner(sizes=(3, 4, 5)))),
        ("pair=[0, 1.5]", Outer(pair=(0.0, 1.5))),
        ("name=1.10", Outer(name="1.10")),
        ("share=null", Outer()),
        ("share=0.5", Outer(share=0.5)),
        ("active=false", Outer(active=False)),
        ("kind=y", Outer(kind="y")),
    ],
)
def test_values_are_read_as_their_type(change: str, wanted: Outer):
    assert load_config(Outer, changes=[change]) == wanted


@pytest.mark.parametrize(
    "text, message",
    [
        ("cuont: 4", r"no setting 'cuont' \(in '.*settings.yaml'\); did you mean 'count'\?"),
        ("inner:\n  rat: 0.1", "no setting 'inner.rat' .*did you mean 'inner.rate'"),
        ("rate: 0.1", "no setting 'rate' .*did you mean 'inner.rate'"),
        ("inner: 3", "inner in .* is a group of settings .*set one of inner.rate, inner.sizes"),
        ("inner:", "inner in .* is a group of settings"),
        ("count:\n  deeper: 1", "no setting 'count.deeper' .*did you mean 'count'"),
        ("count: 1.5", r"count must be a whole number, got 1.5 \(float\)"),
        ("count: true", r"count must be a whole number, got true \(bool\)"),
        ("count: '3'", r"count must be a whole number, got '3' \(str\)"),
        ("active: 1", r"active must be true or false, got 1 \(int\)"),
        ("name: 2", r"name must be text \(in quotes if it looks like a number\), got 2"),
        ("kind: z", "kind must be one of x, y, got z"),
        ("inner:\n  rate: fast", "inner.rate must be a number, got fast"),
        ("inner:\n  rate: .nan", "inner.rate must be a number, got .nan"),
        ("inner:\n  rate: 1.5", "inner.rate must lie in 0..1, got 1.5"),
        ("share: 2", "share must lie in 0..1, got 2"),
        ("count: 0", "count must lie in 1..9, got 0"),
        ("pair: [1]", "pair must be a list of 2, .*got"),
        ("pair: [1, a]", r"pair\[1\] must be a number, got a"),
        ("inner:\n  sizes: 3", "inner.sizes must be a list, .*got 3"),
        ("- 1", "must hold names with values"),
        ("a: [", "is no YAML"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused_with_what_would(tmp_path: Path, text: str, message: str):
    with pytest.raises(RequestError, match=message):
        load_config(Outer, write(tmp_path, text))


def test_an_empty_file_changes_nothing(tmp_path: Path):
    assert load_config(Outer, write(tmp_path, "# nothing\n")) == Outer()


def test_a_missing_file_and_a_change_without_value_are_refused(tmp_path: Path):
    with pytest.raises(RequestError, match="cannot be read .*check its path"):
        load_config(Outer, tmp_path / "none.yaml")
    with pytest.raises(RequestError, match=r"'--set count' is no setting; write --set name=value"):
        load_config(Outer, changes=["count"])
    with pytest.raises(RequestError, match=r"The value of --set count=\[ cannot be read"):
        load_config(Outer, changes=["count=["])


@pytest.mark.parametrize(
    "changes, message",
    [
        (["stages=[]"], "stages must be"),
        (["stages=[proposals, evidence]"], "stages must be"),
        (["stages=[all]"], r"stages\[0\] must be one of evidence, proposals"),
        (["structures=[]"], "structures is empty"),
        (["grid.spacing_range=[3, 2]"], "grid.spacing_range must be two rising numbers"),
        (["proposals.absent_per_slice=0"], "proposals.absent_per_slice must lie in 1..64"),
        (["precision=fp8"], "precision must be one of auto, bf16, fp16, fp32"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: list[str], message: str):
    with pytest.raises(RequestError, match=message):
        load_config(TrainConfig, changes=changes)


def test_a_stage_is_its_schedule_with_what_all_stages_share():
    config = TrainConfig(seed=4, accumulate=2, precision="fp32")
    loop = LoopConfig.of(config.evidence, config)
    assert loop == LoopConfig(3000, 2e-3, validate_every=500, seed=4, accumulate=2, precision="fp32")
    assert isinstance(config.evidence, Schedule)
    assert isinstance(config, RunConfig)


def test_the_command_line_prints_settings_without_any_folder():
    runner = CliRunner()
    shown = runner.invoke(
        main.app, ["train", "--show-config", "--proposal-steps", "7", "--set", "evidence.steps=9", "--version", "2"]
    )
    assert shown.exit_code == 0, shown.output
    config = load_config(TrainConfig, flags=flatten(yaml.safe_load(shown.stdout)))
    assert config == replace(
        TrainConfig(version="2"),
        evidence=replace(TrainConfig().evidence, steps=9),
        proposals=replace(TrainConfig().proposals, steps=7),
    )
    assert isinstance(config.evidence, EvidenceStage)
    assert isinstance(config.proposals, ProposalStage)


def test_the_rank_flag_alone_keeps_alpha_at_twice_the_rank():
    shown = CliRunner().invoke(
        main.app, ["adapt", "--show-config", "--rank", "4", "--targets", "encoder,injection", "--no-norms"]
    )
    lora = yaml.safe_load(shown.stdout)["lora"]
    assert lora == {"rank": 4, "alpha": 8.0, "target_modules": ["encoder", "injection"], "norms": False}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--set", "evidence.stpes=3"], "did you mean 'evidence.steps'?"),
        (["train", "--model", "m"], "Option --studies is missing"),
        (["pretrain", "--studies", "s"], "Option --model is missing"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments: list[str], message: str):
    shown = CliRunner().invoke(main.app, arguments)
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert "Traceback" not in shown.output
