"""What the training process does with a request, run in this process: outcomes, reasons, and what it leaves behind."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.errors import ModelError, NotFoundError
from progidiff.model.adapters import AdapterStore, compute_base_digest
from progidiff.server.families import Family
from progidiff.server.trainings import describe_for_host, describe_stats
from progidiff.training.accepted_labels import AcceptedLabel, build_cases, to_json
from progidiff.training_runs import child
from progidiff.training_runs.child import Control, Progress
from progidiff.training_runs.options import TrainingOptions
from progidiff.training_runs.runner import Outcome, TrainingRunner, write_json
from support.labelled_phantoms import write_case

QUICK = {"steps": 20, "validate_every": 10, "batch_size": 6, "learning_rate": 1e-2, "rank": 4}
BARELY = {"steps": 2, "validate_every": 2, "batch_size": 2, "learning_rate": 1e-7}
RECORD = {"label_info": [{"name": "liver", "idx": 1}, {"name": "left kidney", "idx": 2}]}


class Place:
    """A datastore, a model, and runs on them."""

    def __init__(self, folder: Path, model: Path, names: tuple[str, ...] = ("one", "two")) -> None:
        self.folder, self.model, self.studies = (
            folder,
            Path(shutil.copytree(model, folder / "model")),
            folder / "studies",
        )
        self.studies.mkdir()
        self.names = names
        for shift, name in enumerate(names):
            write_case(
                self.studies,
                name,
                {1: np.s_[6:16, 6 + shift : 20, 2:8], 2: np.s_[24:30, 8:16, 1 + shift : 9]},
                slices=12,
            )
            (self.studies / f"{name}.json").write_text('{"modality": "MR"}')
        self.store = AdapterStore(self.model / "adapters")
        self._count = 0

    def label(self, name: str) -> Path:
        return self.studies / "labels" / "final" / f"{name}.nii.gz"

    def relabel(self, name: str, change: Any, affine: np.ndarray | None = None) -> None:
        image = nibabel.load(self.label(name))
        values = change(np.asarray(image.dataobj).copy())
        nibabel.save(nibabel.Nifti1Image(values, image.affine if affine is None else affine), self.label(name))

    def train(self, trainer: str = "progidiff_adapt", said: str = "", **params: Any) -> Outcome:
        """A run of the process's work; `said` is what the server says to it."""
        self._count += 1
        folder = self.folder / "training" / "runs" / f"20260101T00000{self._count}-abcdef"
        folder.mkdir(parents=True)
        options, _ = TrainingOptions.from_params(trainer, params)
        labels = [AcceptedLabel(n, self.studies / f"{n}.nii.gz", self.label(n), RECORD) for n in self.names]
        request = {
            "trainer": trainer,
            "params": params,
            "options": options.to_dict(),
            "cases": to_json(build_cases(labels, None, None)),
            "started": 1.0,
        }
        request |= {"model_dir": str(self.model), "adapters": str(self.store.root), "backbone": None, "device": "cpu"}
        write_json(folder / "request.json", request)
        control = Control(io.StringIO(said), lambda: None)
        control._listen()
        outcome = child.run(folder, control, Progress(folder / "progress.json", control))
        write_json(folder / "outcome.json", {**outcome.to_dict(), "ended": 2.0})
        return outcome


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path) -> Place:
    return Place(tmp_path, tiny_model)


def test_a_run_ends_with_a_version_its_figures_and_nothing_left_over(place: Place):
    outcome = place.train(**QUICK)
    assert outcome.state == "done"
    assert outcome.version == "mr@1"
    assert outcome.published == (outcome.figures["adapted"]["consensus"] > outcome.figures["base"]["consensus"])
    assert outcome.best_metric == outcome.figures["adapted"]["consensus"]
    run = place.store.run(place.store.card("mr", 1))
    assert run["command"].startswith('progidiff_adapt {"steps": 20')
    work = place.folder / "training" / "work"
    assert [p.name for p in work.iterdir()] == ["cache"]
    assert len(list((work / "cache").iterdir())) == 2

    status = TrainingRunner(place.folder / "training", lambda _: {}).status()
    task, stats = describe_for_host(status), describe_stats(status)
    assert (task.status, task.request["model"], task.details) == ("DONE", "progidiff_adapt", [outcome.message])
    assert stats["total_time"] == "0:00:01"
    assert (stats["epoch"], stats["total_epochs"], stats["version"]) == (20, 20, "mr@1")


def test_a_run_that_is_stopped_continues_and_one_that_is_done_is_not_repeated(place: Place):
    stopped = place.train("progidiff", said="stop\n", **BARELY)
    assert stopped.state == "stopped"
    assert "start it again with the same options" in stopped.message
    outcome = place.train("progidiff", **BARELY)
    assert (outcome.state, outcome.version) == ("done", "mr@1")
    assert place.train("progidiff", **BARELY).message.startswith("This very training was done before.")
    assert place.store.entry("mr").versions == (1,)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda a: np.where(a == 2, 222, a),
            "holds ids 222, which neither the label's record .* nor labels.json names",
        ),
        (lambda a: a * 0, "The label of 'two' is empty"),
        (lambda a: a.astype(np.float32) + 0.5 * (a > 0), "save it with whole numbers"),
        (lambda a: a[:, :, :-1], "resample it to the image's grid"),
    ],
    ids=["unknown ids", "no foreground", "floats", "another grid"],
)
def test_the_reason_of_a_bad_label_reaches_the_client_and_nothing_changes(place: Place, change: Any, reason: str):
    place.relabel("two", change)
    outcome = place.train(**BARELY)
    assert outcome.state == "failed"
    assert re.search(reason, outcome.reason)
    assert place.store.entries() == []


@pytest.mark.parametrize("value", [np.nan, 7.0], ids=["not a number", "constant"])
def test_the_reason_of_a_bad_image_reaches_the_client(place: Place, value: float):
    path = place.studies / "one.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.full(image.shape, value, np.float32), image.affine), path)
    outcome = place.train(**BARELY)
    assert outcome.state == "failed"
    assert "one" in outcome.reason
    assert place.store.entries() == []


def test_one_labelled_volume_works_and_the_client_is_told_what_that_means(tmp_path: Path, tiny_model: Path):
    outcome = Place(tmp_path, tiny_model, ("only",)).train(**BARELY)
    assert outcome.state == "done"
    assert "Only one volume is labelled: some of its slices were held back, so the figures flatter." in outcome.message


def test_a_damaged_checkpoint_is_named_with_what_to_remove(place: Place):
    assert place.train(said="stop\n", **BARELY).state == "stopped"
    (state,) = (place.folder / "training" / "work").glob("mr-*/evidence/state.safetensors")
    state.write_bytes(state.read_bytes()[:50])
    outcome = place.train(**BARELY)
    assert outcome.state == "failed"
    assert f"'{state}' is damaged" in outcome.reason
    assert "remove it to start this run again" in outcome.reason
    assert place.store.entries() == []


def test_a_version_of_another_base_is_listed_but_cannot_be_served(place: Place):
    place.train("progidiff", **BARELY)
    path = place.store.root / "mr" / "1" / "adapter.json"
    values = json.loads(path.read_text())
    path.chmod(0o644)
    path.write_text(json.dumps({**values, "base": "0" * 64, "base_name": "other@7"}))
    served = place.store.current("mr")  # whether two steps were enough for the gate is not the point here
    family = Family("", lambda: place.store, lambda: compute_base_digest(place.model))
    (adapter,) = family.list_versions()
    assert (adapter.versions[0].fits, adapter.versions[0].base) == (False, "other@7")
    with pytest.raises(ModelError, match="was trained for another base .other@7"):
        family.use("mr", 1)
    with pytest.raises(NotFoundError, match="no version 5"):
        family.use("mr", 5)
    assert place.store.current("mr") == served
    path.write_text("{")
    (adapter,) = family.list_versions()
    assert "cannot be read" in adapter.versions[0].problem
    path.write_text(json.dumps({**values, "base": compute_base_digest(place.model)}))
    assert family.use("mr", 1) == "mr@1"
