"""The simulated cluster: what comes out where it can be reckoned by hand; nothing is lost, and nothing done twice."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.servers import load_script

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "cluster" / "figures.toml"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("simulate_cluster")


def set_figures(script: ModuleType, job: str, **values: float) -> Any:
    inputs = script.read_inputs(FIGURES)
    for name, value in values.items():
        inputs = script.replace_figure(inputs, f"{job}.{name}", value, "assumed", "test")
    return getattr(inputs, job)


SMOOTH = {"spread": 0, "slow_share": 0, "hours_between_failures": 0, "error_share": 0}
PLAIN = {**SMOOTH, "volumes": 2000, "nodes": 2, "gpus": 4, "actors": 1, "readers": 8, "writers": 4}


def test_without_trouble_the_narrowest_stage_sets_the_pace(script: ModuleType):
    cases = {
        "compute": ({"compute_seconds": 4.0}, 2000 * 4.0 / 8),
        "read": ({"compute_seconds": 0.1, "read_seconds": 8.0}, 2000 * 8.0 / 16),
        "write": ({"compute_seconds": 0.1, "write_seconds": 4.0}, 2000 * 4.0 / 8),
        "storage": ({"compute_seconds": 0.1, "storage_mb_per_second": 100.0}, 2000 * 81 / 100),
    }
    for bottleneck, (changed, seconds) in cases.items():
        found = script.simulate_prelabel(set_figures(script, "prelabel", **{**PLAIN, **changed}))
        assert found["bottleneck"] == bottleneck
        assert found["hours"] == pytest.approx(seconds / 3600, rel=0.03)
        assert found["least_hours"] == pytest.approx(seconds / 3600, rel=0.01)
        assert (found["done"], found["given_up"], found["begun_again"]) == (2000, 0, 0)


def test_every_volume_is_labelled_or_given_up_once_whatever_fails(script: ModuleType):
    trouble = {"hours_between_failures": 0.05, "restart_seconds": 60, "error_share": 0.3, "tries": 2, "slow_share": 0.5}
    for stealing in (0, 1):
        figures = set_figures(script, "prelabel", **{**PLAIN, "compute_seconds": 4.0, **trouble, "stealing": stealing})
        found = script.simulate_prelabel(figures)
        assert found["done"] + found["given_up"] == 2000
        # Two tries that fail, each with a chance of 0.3.
        assert found["given_up"] == pytest.approx(2000 * 0.09, rel=0.25)
        assert found["machine_failures"] > 0
        assert found["begun_again"] > 0
        assert found["hours"] > found["least_hours"]
        assert found == script.simulate_prelabel(figures)


def test_what_waits_between_two_stages_is_bounded(script: ModuleType, monkeypatch: pytest.MonkeyPatch):
    figures = set_figures(script, "prelabel", **{**PLAIN, "compute_seconds": 0.5, "write_seconds": 9.0, "waiting": 3})
    run = script.PrelabelRun(figures)
    most = {"compute": 0, "write": 0}
    feed = run._feed

    def watch(node: Any) -> None:
        feed(node)
        for stage, queue in node.waiting.items():
            most[stage] = max(most[stage], len(queue))

    monkeypatch.setattr(run, "_feed", watch)
    run.run()
    assert most["write"] <= 3 + 4
    assert most["compute"] <= 3 + 4
    assert most["write"] > 0


def test_a_slow_machine_costs_less_where_others_take_over(script: ModuleType):
    slow = {**PLAIN, "compute_seconds": 4.0, "slow_share": 0.5, "slow_times": 3}
    alone = script.simulate_prelabel(set_figures(script, "prelabel", **slow, stealing=0))["hours"]
    together = script.simulate_prelabel(set_figures(script, "prelabel", **slow, stealing=1))["hours"]
    assert alone == pytest.approx(1000 * 4.0 * 3 / 4 / 3600, rel=0.03)
    assert together == pytest.approx(2000 * 4.0 / (4 + 4 / 3) / 3600, rel=0.03)


STEADY = {"jitter": 0, "hours_between_failures": 0, "checkpoint_seconds": 0, "validate_seconds": 0}


def test_a_training_is_as_fast_as_what_each_step_waits_for(script: ModuleType):
    steps = 20_000_000 / (128 * 8)
    fast = {**STEADY, "hidden_share": 1, "data_slices_per_second": 0}
    found = script.simulate_training(set_figures(script, "training", **fast))
    assert found["hours"] == pytest.approx(steps * 0.1 / 3600, rel=0.01)
    assert (found["efficiency"], found["bottleneck"]) == (pytest.approx(1, abs=0.01), "compute")
    starved = script.simulate_training(set_figures(script, "training", **{**fast, "data_slices_per_second": 320}))
    assert starved["hours"] == pytest.approx(4 * found["hours"], rel=0.01)
    assert starved["bottleneck"] == "waiting for slices"
    slow = script.simulate_training(set_figures(script, "training", **{**fast, "slow_gpus": 1, "slow_times": 2}))
    assert slow["hours"] == pytest.approx(2 * found["hours"], rel=0.01)
    # A ring sends 2 * 7 / 8 of the gradients through the slowest link.
    shown = script.simulate_training(set_figures(script, "training", **{**fast, "hidden_share": 0}))
    assert shown["hours"] - found["hours"] == pytest.approx(steps * 2 * 7 / 8 * 0.012 / 20 / 3600, abs=0.002)


def test_failures_cost_what_was_done_since_the_last_checkpoint(script: ModuleType):
    often = {**STEADY, "hours_between_failures": 0.5, "restart_seconds": 30}
    found = script.simulate_training(set_figures(script, "training", **often))
    assert found["failures"] > 3
    lost = found["shares"]["failures"] * found["hours"] * 3600
    assert found["failures"] * 30 < lost < found["failures"] * (30 + 500 * 0.11)
    with pytest.raises(script.NeverEndsError, match="would never end"):
        script.simulate_training(set_figures(script, "training", **{**often, "hours_between_failures": 0.0001}))


def test_measured_figures_take_the_place_of_assumed_ones(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    report, measured = tmp_path / "report.parquet", tmp_path / "gpu.json"
    columns = {"read_seconds": [1.0, 3.0], "compute_seconds": [2.0, 4.0], "write_seconds": [0.5, 0.5]}
    parquet.write_table(table({**columns, "image": ["a", "b"]}), report)
    measured.write_text(json.dumps({"sections": {"training": {"embedded": {"slices_per_second": 900.0}}}}))
    script.main(
        [
            str(FIGURES), "--set", "prelabel.volumes=300", "training.slices=100000", "--report", str(report),
            "--take", str(measured), "training.data_slices_per_second=sections/training/embedded/slices_per_second",
        ]
    )  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    used = found["prelabel"]["figures"]
    assert (used["read_seconds"], used["compute_seconds"], used["write_seconds"]) == (2.0, 3.0, 0.5)
    assert used["spread"] == pytest.approx(0.3466, abs=1e-3)
    assert found["training"]["figures"]["data_slices_per_second"] == 900.0
    assert not {"prelabel.compute_seconds", "training.data_slices_per_second"} & set(found["assumed"])
    assert "prelabel.nodes" in found["assumed"]
    assert set(found["prelabel"]["hours_if"]) == set(script.VARIED["prelabel"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--set", "prelabel.nods=4"], "no figure 'prelabel.nods'"),
        (["--set", "prelabel.nodes"], "should be a figure and what it is"),
        (["--set", "prelabel.nodes=many"], "is no number"),
        (["--set", "prelabel.nodes=0"], "prelabel.nodes: 0 cannot be, it is a whole number of 1 or more"),
        (["--set", "prelabel.gpus=0.5"], "0.5 cannot be, it is a whole number of 1 or more"),
        (["--set", "prelabel.readers=0"], "prelabel.readers: 0 cannot be"),
        (["--set", "prelabel.error_share=7"], "7 cannot be, it is a number from 0 to 1"),
        (["--set", "prelabel.compute_seconds=nan"], "prelabel.compute_seconds: Input should be a finite number"),
        (["--set", "training.link_gb_per_second=0"], "0 cannot be, it is a number above 0"),
        (["--set", "training.validate_every_steps=0"], "training.validate_every_steps: 0 cannot be"),
        (["--set", "prelabel.volumes=300", "prelabel.hours_between_failures=0.0001"], "would never end"),
        (["--report", "absent.parquet"], "'absent.parquet' cannot be read"),
        (["--report", str(FIGURES)], "Name the report of a run of progidiff prelabel"),
        (["--set", "prelabel.volumes=300", "training.slices=9000", "--out", "absent/x.json"], "Name another file"),
        (["--take", str(ROOT / "benchmarks" / "results" / "decoding.json"), "prelabel.nodes=rows/x"], "no number at"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_sentence(script: ModuleType, arguments: list[str], told: str):
    with pytest.raises(SystemExit, match=re.escape(told)):
        script.main([str(FIGURES), *arguments])


def test_a_way_of_failing_that_never_ends_is_none_of_the_variations(script: ModuleType):
    figures = set_figures(script, "training", **{**STEADY, "hours_between_failures": 0.15, "restart_seconds": 30})
    found = script.vary("training", figures, script.simulate_training)["hours_between_failures"]
    assert found["0.075"] is None
    assert found["0.3"] == pytest.approx(0.83, abs=0.2)


def test_a_file_that_is_none_is_refused_with_the_place(script: ModuleType, tmp_path: Path):
    file = tmp_path / "mine.toml"
    for text, told in (
        ("x", "cannot be read"),
        ("title = 'x'", "neither"),
        ("[prelabel]\nvolumes = 3", "prelabel.volumes"),
    ):
        file.write_text(text)
        with pytest.raises(SystemExit, match=told):
            script.read_inputs(file)


def test_figures_say_that_nothing_was_measured_on_a_gpu(script: ModuleType):
    for file in sorted((ROOT / "benchmarks" / "cluster").glob("*.toml")):
        inputs = script.read_inputs(file)
        for job in script.VARIED:
            figures = getattr(inputs, job)
            for name in [] if figures is None else type(figures).model_fields:
                figure = getattr(figures, name)
                assert figure.note
                for named in re.findall(r"results/\w+\.json", figure.note):
                    assert (ROOT / "benchmarks" / named).is_file()
                if figure.origin == "measured":
                    assert re.search(r"results/|apps/", figure.note)
    assert script.read_inputs(FIGURES).prelabel.compute_seconds.origin == "assumed"
