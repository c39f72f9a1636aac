"""The script for a CUDA box, on the processor at toy size: what fails is recorded, and the rest runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from support.servers import load_script

COMPILED = ("compiled", "compiled_stable_diffusion")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load_script("gpu")


def run(benchmark: ModuleType, out: Path, *sections: str) -> dict[str, Any]:
    arguments = ["--device", "cpu", "--size", "small", "--one-process", "--out", str(out), "--sections", *sections]
    benchmark.main(arguments)
    report: dict[str, Any] = json.loads(out.read_text())
    assert list(report["sections"]) == list(sections)
    assert {name: found["error"] for name, found in report["sections"].items() if "error" in found} == {}
    return report


def test_every_section_but_the_compilers_runs_at_small_size(benchmark: ModuleType, tmp_path: Path):
    sections = [name for name in benchmark.SECTIONS if name not in COMPILED]
    report = run(benchmark, tmp_path / "gpu.json", *sections)
    assert report["card"] == "none"
    found = report["sections"]
    assert found["answers"]["fp32"]["holds"]
    assert found["answers"]["fp32"]["mask_pixels"] > 0
    ladder = found["ladder"]
    assert ladder["0.08 GB"]["tried"] == ["Not enough memory on cpu: going on with 1 slices and 6 samples at once"]
    assert [line.split("with ")[1] for line in ladder["0.02 GB"]["tried"]][-1] == "1 slices and 1 samples at once"
    assert ladder["0.02 GB"]["holds"]
    assert "not enough memory" in ladder["0.0 GB"]["refused"]
    assert ladder["afterwards"]["dice"] == 1.0
    assert found["volume"]["pairs"] == 2 * 3
    assert found["volume"]["4 at once"]["share_of_matmul_peak"] > 0
    assert found["waiting"]["times_faster"] > 0
    assert found["waiting"]["largest_difference"] < 0.2  # In bf16, of random weights.
    assert found["stable_diffusion"]["pairs_per_slice"] == 2
    assert found["stock_controlnet"]["no guidance"]["times_as_long_as_ours"] > 0
    close_up = found["close_up_stable_diffusion"]
    assert close_up["window"] == 64
    assert close_up["training"]["slices_per_second"] > 0
    for name in ("train_evidence", "train_close_up", "train_lora"):
        assert found[name]["slices_per_second"] > 0
        assert found[name]["busy"] + found[name]["idle"] == pytest.approx(1)


@pytest.mark.slow
def test_the_sections_with_the_compiler_run_too_and_answer_the_same(benchmark: ModuleType, tmp_path: Path):
    report = run(benchmark, tmp_path / "gpu.json", *COMPILED)
    for name in COMPILED:
        assert report["sections"][name]["eager"]["holds"]


def test_a_section_that_fails_keeps_what_it_had_found(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch):
    def fail(bench: Any) -> dict[str, Any]:
        bench.note({"half": 1})
        raise RuntimeError("first line\n\nsecond line")

    monkeypatch.setitem(benchmark.SECTIONS, "matmul", benchmark.Section(fail, 5))
    bench = benchmark.Bench(torch.device("cpu"), benchmark.SMALL, "small", Path())
    found = benchmark.run_section(bench, "matmul", 5)
    assert (found["half"], found["error"]) == (1, "RuntimeError: first line second line")
    assert benchmark.run_section(bench, "machine", 5)["card"] == "none"


WORKER = """
import json, os, sys, time
events, names = sys.argv[2], sys.argv[4:]
def tell(**line):
    with open(events, "a") as file:
        file.write(json.dumps(line) + "\\n")
for name in names:
    tell(kind="begins", name=name)
    if name == "hangs":
        tell(kind="partial", name=name, found={"first": 1})
        time.sleep(60)
    if name == "dies":
        os._exit(7)
    found = {"error": "AcceleratorError: CUDA error: misaligned"} if name == "breaks" else {"process": os.getpid()}
    tell(kind="ended", name=name, found=found)
    if name == "breaks":
        break
"""


def test_what_hangs_dies_or_breaks_the_device_is_recorded_and_the_rest_runs_in_another_process(
    benchmark: ModuleType, tmp_path: Path
):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    report = benchmark.Report(tmp_path / "out.json", {"command": "here"})
    names = ["a", "hangs", "b", "dies", "breaks", "c"]
    budgets = {**dict.fromkeys(names, 30.0), "hangs": 0.3}
    benchmark.watch([sys.executable, str(script)], names, budgets, 120, report.keep)
    found = json.loads((tmp_path / "out.json").read_text())["sections"]
    assert list(found) == names
    assert found["hangs"] == {"first": 1, "error": "Not done: its seconds were over."}
    assert found["dies"] == {"error": "Not done: its process ended with 7."}
    assert "CUDA error" in found["breaks"]["error"]
    assert len({found[name]["process"] for name in "abc"}) == 3


def test_sections_that_the_budget_has_no_time_for_are_named(benchmark: ModuleType):
    found: dict[str, Any] = {}
    benchmark.watch([sys.executable, "-c", ""], ["a", "b"], {"a": 5.0, "b": 5.0}, 4, found.__setitem__)
    assert {entry["error"] for entry in found.values()} == {"There was no time left: the 4 s of --budget were over."}


def test_the_sections_fit_into_six_minutes_with_the_tests(benchmark: ModuleType):
    last = ("close_up_stable_diffusion", "compiled_stable_diffusion")
    named = [section.seconds for name, section in benchmark.SECTIONS.items() if name not in last]
    assert sum(named) <= 300  # Few use all of it; --budget ends the last one.


def test_a_larger_budget_gives_each_section_more_and_a_smaller_one_none_less(benchmark: ModuleType):
    own = {name: section.seconds for name, section in benchmark.SECTIONS.items()}
    assert benchmark.plan_budgets(benchmark.BUDGET) == own
    assert benchmark.plan_budgets(60) == own
    assert benchmark.plan_budgets(2 * benchmark.BUDGET) == {name: 2 * seconds for name, seconds in own.items()}
    for nonsense in ("0", "nan", "inf"):
        with pytest.raises(SystemExit, match="must be seconds, more than 0"):
            benchmark.main(["--device", "cpu", "--size", "small", "--budget", nonsense])


def test_the_covered_time_counts_overlaps_once(benchmark: ModuleType):
    assert benchmark.compute_covered([(0, 2), (1, 3), (5, 6), (5.2, 5.5)]) == 4
    assert benchmark.compute_covered([]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "add --size small"),
        (["--device", "cuda:7"], "torch sees no CUDA device, so there is no cuda:7"),
        ([], "There is no CUDA device here"),
    ],
)
def test_a_box_without_the_device_is_told_what_to_do(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        benchmark.main(arguments)
