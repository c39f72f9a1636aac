"""OHIF in a real browser where things go wrong; the model is a toy, whose blots are as good as organs for this."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from progidiff.images.reading import load_label, load_volume
from progidiff.users import Role, UsersFile
from support.browser import drive, needs_browser
from support.crops import SWITCH_MS
from support.phantoms import write_phantom
from support.servers import ROOT, Server, copy_app, free_port, run_server

pytestmark = needs_browser

NAME, PASSWORD = "adam", "correct horse"
SAGITTAL = np.array([[0, 0, 5.5, -160], [-6.5, 0, 0, 150], [0, -5.0, 0, 70], [0, 0, 0, 1.0]])
ROUNDS = 3
STROKE = (3, 5, 4, 6)
"""z, row, column of a voxel that nothing proposes, and the label drawn there."""


class Restartable:
    """A server that asks for a login, and that can be killed and started again where it was."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.studies = folder / "studies"
        users = UsersFile(folder / "users.json")
        users.put(NAME, Role.ADMINISTER, PASSWORD)
        self.conf = ("model_dir", str(model), "device", "cpu", "users_file", str(users.path), "training_nice", "0")
        self.app = copy_app(folder)
        self.stack = ExitStack()
        self.start()

    def start(self) -> None:
        self.stack.close()
        self.server: Server = self.stack.enter_context(
            run_server(self.studies, self.app, self.folder / "server.log", *self.conf, port=self.port)
        )

    def kill(self) -> None:
        self.server.process.kill()
        self.server.process.wait(20)


@pytest.fixture(scope="module")
def restartable(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Restartable]:
    folder = tmp_path_factory.mktemp("troubles")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "sagittal.nii.gz", shape=(40, 12, 44), affine=SAGITTAL)
    sample = ROOT / "sample_datastore" / "sample_ct_abdomen.nii.gz"
    if sample.is_file():
        shutil.copy(sample, studies / "whole.nii.gz")
    else:
        write_phantom(studies / "whole.nii.gz", shape=(122, 101, 112))
    for name in ("sagittal", "whole"):
        (studies / f"{name}.json").write_text(json.dumps({"modality": "CT"}))
    running = Restartable(folder, tiny_model)
    yield running
    running.stack.close()


def test_nothing_is_lost_whatever_happens(restartable: Restartable, tmp_path: Path):
    seen = drive(
        "ohif_troubles.mjs",
        restartable.server.url,
        tmp_path / "shots",
        actions={"kill": restartable.kill, "restart": restartable.start},
        name=NAME,
        password=PASSWORD,
        first="sagittal",
        second="whole",
        stroke=STROKE,
        heavy=16,
        rounds=ROUNDS,
        timeout=90000,
    )
    print(json.dumps({key: seen[key] for key in ("switches", "next", "cancelled")}), tmp_path)
    # Every proposal once its data is here; the best of three times, as other programs of the machine may hold up a
    # frame.
    assert np.reshape(seen["switches"], (ROUNDS, -1)).min(axis=0).max() < SWITCH_MS
    assert seen["cancelled"].startswith("Stopped on request")
    assert seen["before"] == seen["afterCancel"] == seen["afterKill"]
    assert seen["isFree"]

    lines = (restartable.studies / ".progidiff" / "annotations" / "log.jsonl").read_text().splitlines()
    saves = [entry for entry in map(json.loads, lines) if entry.get("sha256")]
    assert [entry["slices"] for entry in saves] == [
        list(range(12)),
        *([seen[key]] for key in ("theirs", "mine", "late", "kept")),
    ]  # none of them twice
    assert [entry["edited"] for entry in saves] == [True, False, False, False, False]
    assert {entry["user"] for entry in saves} == {NAME}

    image = load_volume(restartable.studies / "sagittal.nii.gz")
    label = load_label(next((restartable.studies / "labels" / "final").glob("sagittal.*")), like=image.grid)
    shown = image.arrange(label)
    assert shown[STROKE[:3]] == STROKE[3]
    np.testing.assert_array_equal(shown.reshape(len(shown), -1), np.array(seen["drawn"]))
