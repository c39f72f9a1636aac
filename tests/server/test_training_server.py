"""Training as a user does it: the stock client against a real server process, a real child process, a model of toy
width.

The tests follow one story and run in order, on one studies folder: labels are saved, a version is trained and served, a
worse one is refused, versions go back and forth, the training is killed, the server is killed, and nothing is lost. One
start of a training costs about ten seconds of processor time; the file takes about 90 seconds on a quiet machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import pytest
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException
from typer.testing import CliRunner

from progidiff.cli.main import app as cli
from progidiff.prompts.structures import fixed_ids
from progidiff.testing import build_tiny_model
from support.labelled_phantoms import write_case
from support.servers import Server, copy_app, run_server

LEARNS = {"steps": 40, "validate_every": 10, "batch_size": 6, "learning_rate": 1e-2, "rank": 4}
LEARNS_NOTHING = {"steps": 2, "validate_every": 2, "batch_size": 2, "learning_rate": 1e-7}
LONG = {"steps": 5000, "validate_every": 5, "patience": 1000, "batch_size": 2, "learning_rate": 1e-4, "rank": 2}
NAMES = ("one", "two", "three")
INFO = {"label_info": [{"name": "Liver", "idx": 1}, {"name": "left kidney", "idx": 2}]}
PATIENCE_SECONDS = 900.0


class World:
    """The folder that everything happens in, and the server that runs on it now."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.studies, self.model, self.drawn = folder / "studies", folder / "model", folder / "drawn"
        build_tiny_model(self.model)
        self.studies.mkdir()
        for shift, name in enumerate(NAMES):
            write_case(
                self.studies,
                name,
                {1: np.s_[6:16, 6 + shift : 20, 2:8], 2: np.s_[24:30, 8:16, 1 + shift : 9]},
                slices=12,
            )
            (self.studies / f"{name}.json").write_text('{"modality": "MR"}')
        # What somebody draws in a viewer, whose ids are named by what is sent along and by nothing else.
        shutil.move(self.studies / "labels" / "final", self.drawn)
        shutil.rmtree(self.studies / "labels")
        self.app = copy_app(folder)
        self._stack = ExitStack()
        self.server: Server | None = None

    def start(self) -> Server:
        """A server on this folder; the one before must be gone."""
        self._stack = ExitStack()
        options = ("model_dir", str(self.model), "device", "cpu", "score_pool", "off", "training_nice", "0")
        self.server = self._stack.enter_context(
            run_server(self.studies, self.app, self.folder / "server.log", *options)
        )
        return self.server

    def close(self) -> None:
        """End the server."""
        self._stack.close()

    @property
    def client(self) -> MONAILabelClient:
        """The stock client."""
        assert self.server is not None
        return MONAILabelClient(self.server.url, tmpdir=str(self.folder), client_id="somebody")

    def get(self, path: str) -> Any:
        assert self.server is not None
        return self.server.get(path).json()

    def post(self, path: str) -> Any:
        assert self.server is not None
        return requests.post(self.server.url + path, timeout=30)

    def infer(self) -> str:
        """The adapter that answers for an MR image."""
        return self.ask("liver")[0]

    def ask(self, prompt: str) -> tuple[str, dict[str, int]]:
        """The adapter that answers a prompt for an MR image, and the names of the ids in its answer."""
        file, params = self.client.infer("progidiff", "one", {"prompt": prompt, "num_proposals": 1, "steps": 1})
        os.unlink(file)
        return str(params["adapter"]), dict(params["label_names"])

    def poll(self, until: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The task as the client polls it, once something is true of it."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            task: dict[str, Any] = self.client.train_status()
            if until(task):
                return task
            assert time.monotonic() < deadline, task
            time.sleep(0.3)

    def train(self, trainer: str, params: dict[str, Any]) -> dict[str, Any]:
        """Start, wait for the end."""
        self.client.train_start(trainer, params)
        return self.poll(lambda task: task["status"] != "RUNNING")

    def child(self) -> psutil.Process:
        """The process that trains."""
        assert self.server is not None
        for process in psutil.Process(self.server.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if "progidiff.training_runs.child" in process.cmdline():
                    return process
        raise AssertionError("No training process is there.")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("training"))
    world.start()
    yield world
    world.close()


def test_without_accepted_labels_training_is_refused_with_what_to_do(world: World):
    assert not world.client.train_status(check_if_running=True)
    with pytest.raises(MONAILabelClientException) as refusal:
        world.client.train_start("progidiff_adapt", dict(LEARNS))
    assert "Status: 422" in refusal.value.msg
    assert "No image has an accepted label yet. Save a label with tag final" in refusal.value.msg
    assert world.get("/progidiff/training")["state"] == "idle"
    assert list(world.client.info()["trainers"]) == ["progidiff", "progidiff_adapt", "textdiff"]


def test_saved_labels_become_a_version_that_is_served(world: World):
    for name in NAMES:
        world.client.save_label(name, str(world.drawn / f"{name}.nii.gz"), "final", dict(INFO))
    assert world.infer() == ""

    started = world.client.train_start("progidiff_adapt", dict(LEARNS))
    assert started["status"] == "RUNNING"
    assert started["request"]["model"] == "progidiff_adapt"
    assert world.client.train_status(check_if_running=True)
    second = requests.post(world.server.url + "/train/progidiff", json={}, timeout=30)  # type: ignore[union-attr]
    assert second.status_code == 503
    assert int(second.headers["Retry-After"]) >= 5
    assert "One training at a time" in second.json()["detail"]

    # What Slicer draws its progress bar from: the first trainer's entry, whichever trains.
    world.poll(lambda task: task["stage"] in ("evidence", "validation") and task["step"] > 0)
    stats = next(iter(world.client.info()["train_stats"].values()))
    assert not stats["total_time"]
    assert 0 < stats["epoch"] <= stats["total_epochs"] == 40
    assert isinstance(stats["best_metric"], float)

    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "DONE", task
    assert task["published"] is True
    assert task["version"] == "mr@1"
    assert "mr@1 is published: Dice" in task["details"][-1]
    assert task["end_ts"] >= task["start_ts"]
    stats = next(iter(world.client.info()["train_stats"].values()))
    assert stats["total_time"]
    assert stats["best_metric"] > 0
    assert world.infer() == "mr@1"


def test_a_worse_version_is_kept_but_not_served_and_the_client_is_told(world: World):
    task = world.train("progidiff", dict(LEARNS_NOTHING))
    assert task["status"] == "DONE"
    assert task["published"] is False
    assert task["version"] == "mr@2"
    assert "mr@2 is kept but not published: Dice" in task["result"]
    assert "mr@1 has" in task["result"]
    assert world.infer() == "mr@1"
    (adapter,) = world.get("/progidiff/versions")
    assert (adapter["name"], adapter["current"]) == ("mr", 1)
    newest, first = adapter["versions"]
    assert (newest["version"], newest["kind"], newest["accepted"], newest["fits"]) == (2, "full", False, True)
    assert (first["version"], first["kind"], first["accepted"]) == (1, "lora", True)
    assert first["dice"]["adapted"]["consensus"] > first["dice"]["base"]["consensus"]


def test_versions_go_back_and_forth_by_route_and_by_command(world: World):
    assert world.post("/progidiff/versions/mr/rollback").json() == {"name": "mr", "served": ""}
    assert world.infer() == ""
    assert world.post("/progidiff/versions/mr/2/use").json() == {"name": "mr", "served": "mr@2"}
    assert world.infer() == "mr@2"
    refused = world.post("/progidiff/versions/mr/9/use")
    assert refused.status_code == 404
    assert "has no version 9; there are: 1, 2" in refused.json()["detail"]
    done = CliRunner().invoke(cli, ["adapters", "rollback", "mr", "--model", str(world.model)])
    assert "the model itself answers" in done.output
    assert world.infer() == ""
    assert world.post("/progidiff/versions/mr/1/use").status_code == 200
    assert world.infer() == "mr@1"


def test_requests_are_answered_during_a_training_which_goes_on(world: World):
    world.client.train_start("progidiff_adapt", dict(LONG))
    before = world.poll(lambda task: task["step"] >= 6)["step"]
    assert world.infer() == "mr@1"
    assert world.poll(lambda task: task["step"] > before + 3)["status"] == "RUNNING"


def test_a_training_that_was_killed_says_so_and_continues_where_it_was(world: World):
    step = world.poll(lambda task: task["step"] >= 12)["step"]
    world.child().send_signal(signal.SIGKILL)
    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "ERROR"
    assert "was killed (signal 9, SIGKILL) at" in task["reason"]
    assert "start it again" in task["result"]
    assert world.infer() == "mr@1"

    world.client.train_start("progidiff_adapt", dict(LONG))
    task = world.poll(lambda task: task["step"] > 0)
    assert task["step"] >= step - step % 5 - 5


def test_a_server_that_is_killed_takes_the_training_along_and_loses_nothing(world: World):
    assert world.server is not None
    labels = {name: (world.studies / "labels" / "final" / f"{name}.nii.gz").read_bytes() for name in NAMES}
    child = world.child()
    step = world.poll(lambda task: task["step"] >= 25)["step"]
    os.kill(world.server.process.pid, signal.SIGKILL)
    with contextlib.suppress(psutil.NoSuchProcess):
        child.wait(10)
    assert not child.is_running()
    world.close()

    world.start()
    task = world.client.train_status()
    assert (task["status"], task["state"]) == ("ERROR", "interrupted")
    assert "The server ended while the training was" in task["reason"]
    assert not world.client.train_status(check_if_running=True)
    assert {name: (world.studies / "labels" / "final" / f"{name}.nii.gz").read_bytes() for name in NAMES} == labels
    assert world.infer() == "mr@1"
    assert [v["version"] for v in world.get("/progidiff/versions")[0]["versions"]] == [2, 1]

    world.client.train_start("progidiff_adapt", dict(LONG))
    assert world.poll(lambda task: task["step"] > 0)["step"] >= step - step % 5 - 5


def test_stopping_makes_a_checkpoint_and_says_so(world: World):
    stopped = world.client.train_stop()
    assert stopped["status"] in ("STOPPED", "RUNNING")
    assert stopped["details"]
    task = world.poll(lambda task: task["status"] != "RUNNING")
    assert task["status"] == "STOPPED"
    assert "Stopped on request at" in task["result"]
    assert world.client.train_stop() is None
    history = world.get("/progidiff/training")["history"]
    assert [run["state"] for run in history] == ["stopped", "interrupted", "failed", "done", "done"]


def test_a_name_that_nobody_knew_is_taught_and_answers_after_a_restart(world: World):
    for name in NAMES:
        image = nibabel.load(world.drawn / f"{name}.nii.gz")
        cyst = np.where(np.asarray(image.dataobj) == 2, 1, 0).astype(np.uint8)
        path = world.folder / f"{name}-cyst.nii.gz"
        nibabel.save(nibabel.Nifti1Image(cyst, image.affine), path)
        info = {"label_info": [{"name": "cyst", "idx": 1}], "structures": ["cyst"]}
        world.client.save_label(name, str(path), "final", info)
    with pytest.raises(MONAILabelClientException, match="yet: it has 21 labelled slices"):
        world.ask("cyst")
    with pytest.raises(MONAILabelClientException, match="names no structure"):
        world.ask("fornix")
    before = world.infer()

    # It looks like the liver, and has to be told from it by its place alone.
    task = world.train("progidiff_adapt", {**LEARNS, "steps": 150, "validate_every": 25, "structures": ["cyst"]})
    assert (task["status"], task["version"]) == ("DONE", "mr-cyst@1"), task
    assert "for cyst on the held-back slices" in task["result"]
    # At toy width chance decides whether it beats chance; who looks at it may serve it all the same.
    if not task["published"]:
        assert world.post("/progidiff/versions/mr-cyst/1/use").json()["served"] == "mr-cyst@1"

    def check() -> None:
        assert world.ask("cyst")[0] == "mr-cyst@1"
        assert world.infer() == before
        prompts = {entry["structure"]: entry["label"] for entry in world.get("/progidiff/prompts")}
        assert prompts["cyst"] == 14
        assert {name: prompts[name] for name in fixed_ids()} == fixed_ids()

    check()
    world.close()
    world.start()
    check()
    assert world.post("/progidiff/versions/mr-cyst/rollback").json()["served"] == ""
    with pytest.raises(MONAILabelClientException, match="yet: it has 21 labelled slices"):
        world.ask("cyst")
