"""When a training starts by itself: the real counting, runner and history; only the process that trains is a
stand-in.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from progidiff.errors import RequestError
from progidiff.labels.history import AnnotationStore
from progidiff.server.background.retraining import USER, Retraining
from progidiff.server.options import ServerOptions
from progidiff.training_runs.runner import TrainingRunner

PROGRAM = """
import json, os, sys, threading, time
folder = sys.argv[1]
answer = os.path.join(os.path.dirname(os.path.abspath(__file__)), "answer.json")

def listen():
    for line in sys.stdin:
        if line.strip() == "stop":
            print(json.dumps({"state": "stopped", "message": "Stopped on request."}), flush=True)
            os._exit(0)

threading.Thread(target=listen, daemon=True).start()
while not os.path.exists(answer):
    time.sleep(0.01)
time.sleep(0.01)
with open(answer) as file:
    print(file.read(), flush=True)
os.remove(answer)
os._exit(0)
"""
"""Trains until `answer.json` says how it ended."""


class Place:
    """A server's parts that count and train, on a folder with images of both kinds."""

    def __init__(self, folder: Path, **conf: str) -> None:
        self.folder = folder
        self.studies = folder / "studies"
        self.studies.mkdir(exist_ok=True)
        (folder / "stand_in.py").write_text(PROGRAM, encoding="utf-8")
        self.annotations = AnnotationStore(folder / "store" / "annotations")
        self.options = ServerOptions.from_conf(
            {"retrain_after": "4", "store": str(folder / "store"), **conf}, str(self.studies)
        )
        ended: list[Callable[[dict[str, Any]], None]] = []
        self.runner = TrainingRunner(
            self.options.store / "training",
            lambda _: {"sequence": self.annotations.last_sequence()},
            module="stand_in",
            on_ended=ended,
        )
        self.retraining = Retraining(
            self.options, self.annotations, self.runner, lambda image: image.endswith(".png"), lambda: None
        )
        self.over: list[str] = []
        ended += [self.retraining.on_ended, lambda run: self.over.append(run.id)]

    def save(self, image: str, *slices: int) -> dict[str, Any]:
        """Save slices of an image; what the client is told."""
        label = self.folder / ("label.png" if image.endswith(".png") else "label.nii.gz")
        label.write_bytes(b"label")
        annotation = self.annotations.record(
            image, label, slices=slices or None, num_slices=1 if image.endswith(".png") else 100
        )
        return dict(self.retraining.on_saved(annotation)["retrain"])

    def end(self, state: str = "done", **values: Any) -> None:
        """End the run under way."""
        run = self.runner.status().id
        scratch = self.folder / "answer.new"
        scratch.write_text(json.dumps({"state": state, **values}), encoding="utf-8")
        os.replace(scratch, self.folder / "answer.json")
        wait_for(lambda: run in self.over)
        assert next(entry.state for entry in self.runner.history() if entry.id == run) == state

    def runs(self) -> list[tuple[str, str]]:
        """(trainer, user), oldest first."""
        return [(run.trainer, run.user) for run in reversed(self.runner.history())]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def open_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Place]]:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    places: list[Place] = []

    def build(**conf: str) -> Place:
        places.append(Place(tmp_path, **conf))
        return places[-1]

    yield build
    for place in places:
        place.runner.close()
        place.runner.wait(30)


def test_a_failed_training_uses_up_no_slices_and_the_next_save_tries_again(open_place: Callable[..., Place]):
    place = open_place()
    assert place.save("a.nii.gz", 1, 2, 3)["message"] == "3 of 4 slices until the next training."
    assert place.save("a.nii.gz", 4)["started"] is True
    place.end("failed", reason="Label a second image.")
    assert len(place.runs()) == 1  # it would only fail again
    told = place.save("a.nii.gz", 5)
    assert (told["slices"], told["started"]) == (5, True)
    assert "The one before failed: Label a second image." in told["message"]
    place.end()
    assert place.save("b.nii.gz", 1)["message"] == "1 of 4 slices until the next training."


def test_what_comes_together_during_a_training_starts_the_next_one_without_another_save(
    open_place: Callable[..., Place],
):
    place = open_place()
    place.save("a.nii.gz", 1, 2, 3, 4)
    wait_for(lambda: place.runner.status().sequence == 1)
    assert (
        place.save("a.nii.gz", 5)["message"] == "1 of 4 slices until the next training."
    )  # the others are being trained on
    told = place.save("b.nii.gz", 1, 2, 3)
    assert (told["slices"], told["started"]) == (4, False)
    assert "starts when the one under way ends" in told["message"]
    place.end()
    wait_for(lambda: place.runs() == [("progidiff_adapt", USER)] * 2)
    wait_for(lambda: place.runner.status().sequence == 3)
    place.end()
    assert place.save("b.nii.gz", 4)["slices"] == 1


def test_a_manual_training_resets_the_count_only_if_it_is_done_learned_from_all_and_makes_the_same_kind(
    open_place: Callable[..., Place],
):
    place = open_place()
    place.save("a.nii.gz", 1, 2, 3)
    for trainer, params, state in (
        ("progidiff_adapt", {}, "failed"),
        ("textdiff", {}, "done"),
        ("progidiff_adapt", {"shots": "1"}, "done"),
    ):
        place.runner.start(trainer, params, "anna")
        place.end(state)
        assert place.annotations.count_slices_since(0) == 3
        assert place.retraining._count(place.retraining._plans[0]) == 3
    place.runner.start("progidiff", {}, "anna")
    wait_for(lambda: place.runner.status().sequence == 1)
    place.end()
    assert place.save("a.nii.gz", 4)["slices"] == 1


def test_a_manual_training_that_was_in_the_way_lets_the_due_one_start_when_it_ends(open_place: Callable[..., Place]):
    place = open_place()
    place.runner.start("textdiff", {}, "anna")
    assert place.save("a.nii.gz", 1, 2, 3, 4)["started"] is False
    place.end("failed", reason="No weights.")
    wait_for(lambda: place.runs() == [("textdiff", "anna"), ("progidiff_adapt", USER)])


def test_a_person_who_stops_a_training_is_not_given_the_next_one(open_place: Callable[..., Place]):
    place = open_place()
    place.save("a.nii.gz", 1, 2, 3, 4)
    wait_for(lambda: place.runner.status().sequence == 1)
    place.runner.stop(wait=30)
    wait_for(lambda: not place.runner.is_running())
    assert place.save("a.nii.gz", 5)["message"] == "1 of 4 slices until the next training."
    assert len(place.runs()) == 1


def test_the_trainer_follows_what_was_labelled(open_place: Callable[..., Place]):
    place = open_place(retrain_after="2", retrain_params="steps=9,rank=4")
    assert place.save("one.png")["slices"] == 1
    assert place.save("a.nii.gz", 1)["slices"] == 1  # counted by themselves
    assert place.save("two.png")["started"] is True
    assert (place.runner.status().trainer, place.runner.status().params) == ("textdiff", {"steps": "9"})
    wait_for(lambda: place.runner.status().sequence == 3)
    place.end()
    assert place.save("a.nii.gz", 2)["started"] is True
    assert (place.runner.status().trainer, place.runner.status().params) == (
        "progidiff_adapt",
        {"steps": "9", "rank": "4"},
    )


def test_a_named_trainer_counts_what_it_can_learn_from(open_place: Callable[..., Place]):
    told = open_place(retrain_after="1", retrain_task="progidiff_adapt").save("one.png")
    assert (told["slices"], told["started"]) == (0, False)
    assert "--conf retrain_task auto" in told["message"]
    place = open_place(retrain_task="textdiff")
    assert place.save("a.nii.gz", 1)["slices"] == 2  # the picture before, too: textdiff learns from both
    with pytest.raises(RequestError, match="progidiff_adapt or textdiff has no speed"):
        open_place(retrain_params="speed=3")


def test_a_server_that_comes_back_knows_what_is_done_due_or_interrupted(open_place: Callable[..., Place]):
    first = open_place()
    first.save("a.nii.gz", 1, 2, 3, 4)
    wait_for(lambda: first.runner.status().sequence == 1)
    first.runner.close()  # as at the end of the server
    assert first.runner.wait(30)
    second = open_place()
    assert second.runner.status().state == "interrupted"
    second.retraining.resume()
    wait_for(lambda: second.runner.status().sequence == 1)
    second.end()
    (second.options.store / "retrain.json").unlink()  # killed before it was written
    third = open_place()
    third.retraining.resume()
    assert third.save("a.nii.gz", 5)["slices"] == 1
    third.annotations.record(
        "b.nii.gz", third.folder / "label.nii.gz", slices=[1, 2, 3]
    )  # killed between the save and the count
    fourth = open_place()
    fourth.retraining.resume()
    wait_for(lambda: fourth.runner.status().sequence == 3)
    assert len(fourth.runs()) == 3
