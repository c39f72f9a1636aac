"""The loop in real processes: several that share a step, and one that is killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from progidiff.model.folder import WEIGHTS
from progidiff.training.recipe_settings import TrainConfig
from progidiff.training.recipes import run_train
from progidiff.training.settings import load_config
from support.labelled_phantoms import write_case, write_table
from support.servers import free_port

SETTINGS: dict[str, Any] = {
    "precision": "fp32",
    "log_every": 1,
    "name": "tiny",
    "version": "2",
    "evidence": {"steps": 8, "checkpoint_every": 3, "validate_every": 8, "slices_per_step": 2, "warmup": 2},
    "proposals": {"steps": 8, "checkpoint_every": 3, "validate_every": 8, "slices_per_step": 2, "warmup": 2},
}

TOY = """
import logging
import os
import signal
import sys
from pathlib import Path
import torch
from torch import nn
from progidiff.training import processes
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.processes import find_team

logging.basicConfig(format="%(message)s")
processes.LOST_AFTER = 3.0
team, mode, folder = find_team(), sys.argv[1], Path(sys.argv[2])

def run(folder, gradients, validate, stop, report):
    torch.manual_seed(team.index)  # every process starts with other weights; those of the first count
    net = nn.ModuleDict({"first": nn.Linear(4, 8), "drop": nn.Dropout(0.3), "last": nn.Linear(8, 1)})
    net.update({"rare": nn.Linear(8, 1), "never": nn.Linear(8, 1)})
    micro = team.index

    def compute_loss(step, generator):
        nonlocal micro
        inputs = torch.randn(16, 4, generator=generator)
        hidden = net["drop"](net["first"](inputs).relu())
        answer = net["last"](hidden)[:, 0]
        if micro % 2 == 1:  # a part that only some micro-batches use
            answer = answer + net["rare"](hidden)[:, 0]
        micro += team.count
        error = (answer - inputs.sum(1)).square().mean()
        if mode == "breaks" and step == 3 and team.index == 1:
            error = error * float("nan")
        if mode in ("SIGKILL", "SIGSTOP") and step == 3 and team.index == 1:
            os.kill(os.getpid(), getattr(signal, mode))
        return error, {"error": float(error.detach())}

    config = LoopConfig(
        10, 0.05, warmup=2, ema_decay=0.9, seed=3, precision="fp32", accumulate=2 // team.count,
        checkpoint_every=4, validate_every=5, gradients=gradients,
    )
    return run_loop({"net": net}, compute_loss, config, folder, validate, stop, report)

asked = iter(range(100))
told = []
stop = (lambda: team.is_first and next(asked) >= 5) if mode == "stops" else None
# Every process validates: each brings its part, and all have the sum.
validate = lambda: {"dice": sum(team.gather(0.5 / team.count))}
try:
    history = run(folder, "exact", validate, stop, told.append)
    if mode == "whole" and team.count > 1:
        run(folder / "overlapped", "overlapped", None, None, None)
except Exception as err:
    print(f"process {team.index}: {type(err).__name__}: {err}", flush=True)
    raise SystemExit(0)
print(f"process {team.index}: {len(history)} validations, {len(told)} reports", flush=True)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def launch(count: int, *command: str) -> str:
    """Output of `count` processes started by ``accelerate launch``."""
    if count > 1:
        options = [
            "--multi_gpu",
            "--num_processes",
            str(count),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
        ]
        launcher = ["-m", "accelerate.commands.launch", *options, "--main_process_port", str(free_port())]
    else:
        launcher = []
    done = subprocess.run(
        [sys.executable, *launcher, *command],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment(),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("toy") / "toy.py"
    path.write_text(TOY)
    return path


@pytest.fixture(scope="module")
def alone(toy: Path) -> Path:
    """The whole run in one process."""
    folder = toy.parent / "alone"
    assert launch(1, str(toy), "whole", str(folder)) == "process 0: 2 validations, 1 reports\n"
    return folder


def test_two_processes_share_a_step_that_one_computes_in_two_micro_batches(toy: Path, alone: Path, tmp_path: Path):
    told = launch(2, str(toy), "whole", str(tmp_path))
    first, second = load_file(alone / "state.safetensors"), load_file(tmp_path / "state.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-5, atol=1e-6)
    assert "average.net.rare.weight" in first
    assert not [n for n in second if n.startswith("optimizer") and ".never." in n]
    # Overlapping the sum with the backward pass changes nothing but rounding, and what no process used has no moments.
    overlapped = load_file(tmp_path / "overlapped" / "state.safetensors")
    assert first.keys() == overlapped.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, overlapped[name], rtol=1e-5, atol=1e-6)
    # The first process speaks for both.
    said = re.findall(r"process \d: \d+ validations, \d+ reports", told)  # their line ends may come in any order
    assert sorted(said) == ["process 0: 2 validations, 1 reports", "process 1: 0 validations, 0 reports"]
    entries = [
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (alone, tmp_path)
    ]
    assert [e["validation"]["dice"] for e in entries[1] if "validation" in e] == [0.5, 0.5]
    assert entries[0][1]["loss"] == pytest.approx(entries[1][1]["loss"], rel=1e-4)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_lost_process_ends_the_others_within_a_minute_with_a_message(toy: Path, tmp_path: Path, how: str):
    """Killed, so that its connections break, or stopped, as behind a network that is gone: then nothing breaks."""
    shared = {**environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # Without a launcher, which would end the other one itself.
    started = [
        subprocess.Popen(
            [sys.executable, str(toy), how, str(tmp_path)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        for rank in (0, 1)
    ]
    try:
        told, _ = started[0].communicate(timeout=300)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert "Process 1 of 2 has not been heard of for" in told
    assert "so process 0 ends too" in told
    assert "the same command continues the training at its last checkpoint" in told


def test_a_run_stopped_in_two_processes_is_continued_by_one(toy: Path, alone: Path, tmp_path: Path):
    told = launch(2, str(toy), "stops", str(tmp_path))
    assert sorted(line.split(":")[1].strip() for line in told.splitlines()) == ["CancelledError", "CancelledError"]
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        assert file.metadata()["step"] == "5"
    launch(1, str(toy), "whole", str(tmp_path))
    whole = load_file(alone / "state.safetensors")
    for name, tensor in load_file(tmp_path / "state.safetensors").items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


def test_a_loss_that_breaks_in_one_process_ends_all_of_them(toy: Path, tmp_path: Path):
    told = launch(2, str(toy), "breaks", str(tmp_path))
    assert told.count("ModelError: The loss became nan at step 3") == 2


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies")
    write_table(folder, {6: "liver", 8: "aorta"})
    for shift, name in enumerate(("one", "two")):
        write_case(
            folder, name, {6: np.s_[6:16, 6 + shift : 20, 2:8], 8: np.s_[24:28, 10:16, 1 + shift : 9]}, slices=10
        )
    return folder


def write_settings(folder: Path, **changes: Any) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def train_command(studies: Path, tiny_model: Path, folder: Path, settings: Path) -> list[str]:
    options = {
        "--studies": studies,
        "--model": folder / "model",
        "--work": folder / "work",
        "--continue-from": tiny_model,
    }
    words = [
        str(word)
        for pair in {**options, "--config": settings, "--hold-out": "two", "--threads": 1}.items()
        for word in pair
    ]
    return ["-m", "progidiff.cli", "train", *words]


def load_states(folder: Path) -> dict[str, torch.Tensor]:
    stages = ("evidence", "proposals")
    return {f"{s} {n}": t for s in stages for n, t in load_file(folder / "work" / s / "state.safetensors").items()}


def train_here(studies: Path, tiny_model: Path, folder: Path, settings: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    config = load_config(TrainConfig, settings)
    run_train(
        studies, folder / "model", folder / "work", config, held_out=["two"], continue_from=tiny_model, device="cpu"
    )
    return load_states(folder)


def load_validations(folder: Path) -> dict[str, float]:
    lines = [line for s in ("evidence", "proposals") for line in (folder / "work" / s / "log.jsonl").open()]
    found = [json.loads(line) for line in lines]
    return {f"{n} {k}": v for n, e in enumerate(found) if "validation" in e for k, v in e["validation"].items()}


def test_the_recipe_gives_the_same_model_in_two_processes(studies: Path, tiny_model: Path, tmp_path: Path):
    told = launch(2, *train_command(studies, tiny_model, tmp_path, write_settings(tmp_path)))
    assert told == f"tiny@2 is in {tmp_path / 'model'}\n"
    shared = load_states(tmp_path)
    alone = train_here(studies, tiny_model, tmp_path / "alone", write_settings(tmp_path, accumulate=2))
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    # Each process validated its part of the slices.
    assert load_validations(tmp_path) == pytest.approx(load_validations(tmp_path / "alone"), abs=0.02)
    first, second = (load_file(f / "model" / "conditioning" / WEIGHTS) for f in (tmp_path, tmp_path / "alone"))
    assert all(torch.allclose(first[n].float(), second[n].float(), rtol=1e-2, atol=1e-4) for n in first)


def kill_at(command: list[str], log: Path, step: int) -> None:
    """Run a command until a log says that it is at a step, then kill it with no chance to clean up."""
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    try:
        started = time.monotonic()
        while True:
            lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
            if any(f'"step": {step},' in line for line in lines):
                break
            assert process.poll() is None, "The training ended before it could be killed."
            assert time.monotonic() - started < 600
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_a_training_that_was_killed_twice_gives_the_same_weights_bit_for_bit(
    studies: Path, tiny_model: Path, tmp_path: Path
):
    settings = write_settings(tmp_path)
    command = train_command(studies, tiny_model, tmp_path, settings)
    kill_at(command, tmp_path / "work" / "evidence" / "log.jsonl", 5)
    assert not (tmp_path / "model").exists()
    kill_at(command, tmp_path / "work" / "proposals" / "log.jsonl", 5)
    assert not (tmp_path / "model").exists()
    with safe_open(tmp_path / "work" / "proposals" / "state.safetensors", "pt") as file:
        assert 3 <= int(file.metadata()["step"]) < 8
    killed = train_here(studies, tiny_model, tmp_path, settings)
    whole = train_here(studies, tiny_model, tmp_path / "whole", settings)
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    first, second = (f / "model" / "conditioning" / WEIGHTS for f in (tmp_path, tmp_path / "whole"))
    assert first.read_bytes() == second.read_bytes()
