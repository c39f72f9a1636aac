"""SIGKILL of the server, of the training and of the scoring, while two clients save labels slice by slice and whole.

Every round waits for a random stage of a training, or for the scoring, and a random moment in it; what is killed then
is the process that trains or the server (scoring is a thread of it). After the next start: every acknowledged save is
there, byte for byte, the label in force is the one in the folder, ``progidiff audit verify`` finds nothing, images and
versions are listed, no half file counts. Three rounds take about a minute on a quiet machine; `make test-faults` runs
more, from a seed that it prints.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import requests
from typer.testing import CliRunner

from progidiff.cli.main import app as cli
from progidiff.labels.history import AnnotationStore
from progidiff.prompts.structures import STRUCTURES
from support.labelled_phantoms import AFFINE, write_case
from support.servers import Server, copy_app, run_server

ROUNDS = int(os.environ.get("FAULT_SERVER_ROUNDS", "3"))
SEED = os.environ.get("FAULT_SEED", "1")
NAMES = ("one", "two", "three")
SHAPE = (40, 28, 12)
IDS = {name: STRUCTURES.index(name) + 1 for name in ("liver", "spleen")}
TRAINING = {"steps": 12, "validate_every": 4, "batch_size": 2, "rank": 2, "name": "mr", "learning_rate": 1e-3}
STAGES = ("start", "prepare", "evidence", "validation", "gate", "version", "its end")
PATIENCE_SECONDS = 600.0


def draw_mask(seed: int) -> np.ndarray:
    """Two structures as blocks, somewhere on every slice."""
    chosen = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, np.uint8)
    for value in IDS.values():
        i, j = chosen.integers(4, 24), chosen.integers(4, 14)
        mask[i : i + 10, j : j + 8] = value
    return mask


class Saver(threading.Thread):
    """A client that saves labels until it is told to stop or the server is gone.

    Attributes:
        acknowledged: One entry per answer 200.
        refused: Answers that are none, which must have a reason.
    """

    def __init__(self, url: str, folder: Path, name: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self._url, self._folder, self._random = url, folder, random.Random(name)
        self._file = folder / f"{name.replace(':', '-')}.nii.gz"
        self._stop_asked = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(requests.ConnectionError, requests.Timeout):
            while not self._stop_asked.wait(self._random.uniform(0, 0.3)):
                self.save(self._random.choice(NAMES))

    def save(self, image: str) -> None:
        seed = self._random.randrange(2**31)
        slices = (
            sorted(self._random.sample(range(SHAPE[2]), self._random.randint(1, 5)))
            if self._random.random() < 0.6
            else None
        )
        nibabel.save(nibabel.Nifti1Image(draw_mask(seed), AFFINE), self._file)
        about: dict[str, Any] = {"label_info": [{"name": name, "idx": value} for name, value in IDS.items()]}
        if slices is not None:
            about["slices"] = slices
        content = self._file.read_bytes()
        files = {"label": ("label.nii.gz", content), "params": (None, json.dumps(about))}
        answer = requests.put(
            f"{self._url}/datastore/label", params={"image": image, "tag": "final"}, files=files, timeout=120
        )
        if answer.status_code != 200:
            self.refused.append(f"{answer.status_code}: {answer.text[:300]}")
            return
        sent = hashlib.sha256(content).hexdigest() if slices is None else None
        sequence = answer.json()["annotation"]["sequence"]
        self.acknowledged.append({"image": image, "sequence": sequence, "slices": slices, "seed": seed, "sent": sent})

    def stop(self) -> None:
        self._stop_asked.set()
        self.join(150)


class Bench:
    """The folder that everything happens in, the server on it now, and what was acknowledged so far."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.studies, self.model = folder, folder / "studies", model
        self.studies.mkdir()
        for name in NAMES:
            write_case(self.studies, name, {1: np.s_[6:16, 6:20, 2:8]}, slices=SHAPE[2])
            (self.studies / f"{name}.json").write_text('{"modality": "MR"}')
        shutil.rmtree(self.studies / "labels")
        self.app = copy_app(folder)
        self.acknowledged: list[dict[str, Any]] = []
        self._stack = ExitStack()
        self.server: Server | None = None

    def start(self) -> None:
        if self.server is None:
            conf = (
                "model_dir",
                str(self.model),
                "device",
                "cpu",
                "score_pool",
                "on",
                "score_prompt",
                "liver",
                "training_nice",
                "0",
            )
            conf += ("adapters", str(self.folder / "adapters"))
            self.server = self._stack.enter_context(
                run_server(self.studies, self.app, self.folder / "server.log", *conf)
            )

    def kill(self) -> None:
        assert self.server is not None
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait(10)
        self._stack.close()
        self.server = None

    def close(self) -> None:
        self._stack.close()

    def get(self, path: str) -> Any:
        assert self.server is not None
        return self.server.get(path).json()

    def find_child(self) -> psutil.Process | None:
        assert self.server is not None
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(self.server.process.pid).children():
                if "progidiff.training_runs.child" in process.cmdline():
                    return process
        return None

    def start_training(self) -> None:
        assert self.server is not None
        answer = requests.post(f"{self.server.url}/train/progidiff_adapt", json=TRAINING, timeout=60)
        assert answer.status_code == 200 or "under way" in answer.text, answer.text

    def wait_for_stage(self, stage: str) -> None:
        """Until the training is at this stage or further, or at its end."""

        def is_there() -> bool:
            status = self.get("/progidiff/training")
            return status["state"] not in ("starting", "running") or status["stage"] in STAGES[STAGES.index(stage) :]

        wait_for(is_there)

    def check(self) -> list[str]:
        """What is wrong with the folder of a server that has started again; the clients are quiet."""
        problems = []
        store = AnnotationStore(self.studies / ".progidiff" / "annotations", self.studies / "labels" / "final")
        labels = {label.sequence: label for label in store.list()}
        for ack in self.acknowledged:
            label = labels.get(ack["sequence"])
            if label is None or label.image != ack["image"]:
                problems.append(f"save {ack['sequence']} of {ack['image']} is lost")
                continue
            content = store.label_file(label).read_bytes()
            if ack["sent"] is not None and hashlib.sha256(content).hexdigest() != ack["sent"]:
                problems.append(f"save {ack['sequence']} is not byte for byte what was sent")
            kept = np.asarray(nibabel.load(store.label_file(label)).dataobj)
            slices = range(SHAPE[2]) if ack["slices"] is None else ack["slices"]
            if any(not np.array_equal(kept[..., z], draw_mask(ack["seed"])[..., z]) for z in slices):
                problems.append(f"save {ack['sequence']} has other voxels")
        for name in NAMES:
            current, final = store.current(name), self.studies / "labels" / "final" / f"{name}.nii.gz"
            if current is None or final.read_bytes() != store.label_file(current).read_bytes():
                problems.append(f"the file of '{name}' is not the label in force")
        if any(event.kind != "label" for event in store.events()):
            problems.append("something was deleted that nobody deleted")
        verified = CliRunner().invoke(cli, ["audit", "verify", "--studies", str(self.studies)])
        if verified.exit_code != 0:
            problems.append(verified.output)
        listed = self.get("/datastore/?output=all")["objects"]
        if sorted(listed) != sorted(NAMES) or any("final" not in entry["labels"] for entry in listed.values()):
            problems.append(f"the datastore lists {listed}")
        for adapter in self.get("/progidiff/versions"):
            problems += [
                text for text in (adapter["problem"], *(version["problem"] for version in adapter["versions"])) if text
            ]
        problems += [f"damaged: {path}" for path in self.folder.rglob("*damaged*")]
        return problems


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def carry_out(bench: Bench, kind: str, name: str) -> str:
    """One round, up to and including the kill; says what was killed when."""
    chosen = random.Random(name)
    if kind == "scoring" and bench.server is None:
        shutil.rmtree(bench.studies / ".progidiff" / "scores", ignore_errors=True)
    bench.start()
    assert bench.server is not None
    savers = [Saver(bench.server.url, bench.folder, f"{name}:{k}") for k in range(2)]
    missing = set(NAMES) - {ack["image"] for ack in bench.acknowledged}
    for image in sorted(missing):
        savers[0].save(image)
    for saver in savers:
        saver.start()
    stage, delay, killed = chosen.choice(STAGES), chosen.uniform(0, 1) ** 3, "server"  # The last stages are short.
    if kind == "scoring":
        stage, delay = "scoring", chosen.uniform(0, 0.5)
        wait_for(lambda: bench.get("/progidiff/scoring")["state"] in ("scoring", "done"))
    else:
        bench.start_training()
        bench.wait_for_stage(stage)
    time.sleep(delay)
    if kind == "training":
        child = bench.find_child()
        killed = "training" if child is not None else "training, which had ended already,"
        with contextlib.suppress(psutil.NoSuchProcess):
            if child is not None:
                child.kill()
        wait_for(lambda: bench.get("/progidiff/training")["state"] not in ("starting", "running"))
    else:
        bench.kill()
    for saver in savers:
        saver.stop()
        bench.acknowledged += saver.acknowledged
        assert saver.refused == [], f"FAULT_SEED={SEED}"
    saved = sum(len(saver.acknowledged) for saver in savers)
    return f"{killed} killed {delay:.2f} s into {stage}, {saved} saves acknowledged"


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and the kernel's parent-death signal")
def test_whatever_was_acknowledged_is_there_after_a_kill_of_server_training_or_scoring(
    tmp_path: Path, tiny_model: Path
):
    bench = Bench(tmp_path, tiny_model)
    try:
        for number in range(ROUNDS):
            kind = ("scoring", "training", "server", "training")[number % 4]
            told = carry_out(bench, kind, f"{SEED}:{number}")
            bench.start()
            problems = bench.check()
            print(
                f"round {number}, FAULT_SEED={SEED}: {told}, {len(bench.acknowledged)} in "
                f"all, {len(problems)} problems",
                flush=True,
            )
            assert problems == [], (
                f"FAULT_SEED={SEED} round {number}: {told}\n{(tmp_path / 'server.log').read_text()[-3000:]}"
            )
        assert len(bench.acknowledged) >= 2 * ROUNDS
    finally:
        bench.close()
