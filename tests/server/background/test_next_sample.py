"""What is given next, without a server: the real stores and chooser on a datastore that is a list."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.errors import ModelError
from progidiff.labels.history import AnnotationStore
from progidiff.model.adapters import AdapterStore
from progidiff.model.lora import LoraSettings
from progidiff.server import wiring
from progidiff.server.background.next_sample import NO_IMAGES, Selection
from progidiff.server.background.scoring import PoolScorer
from support.scores import make_entry

SLICES = 7
"""Of every image, see `make_entry`."""


class Pool:
    """Images a, b... with scores by base@1, their history, adapters, and the chooser."""

    def __init__(
        self, folder: Path, images: Sequence[str] = ("a", "b"), modality: Callable[[str], str] = lambda image: "CT"
    ) -> None:
        self.folder = folder
        self.annotations = AnnotationStore(folder / "annotations")
        self.adapters = AdapterStore(folder / "adapters")
        scores = SliceScoreStore(folder / "scores")
        for seed, image in enumerate(images):
            scores.save(make_entry(image, seed=seed, modality=modality(image)))
            (folder / f"{image}.nii.gz").write_bytes(b"")
        datastore = SimpleNamespace(
            list_images=lambda: list(images),
            get_unlabeled_images=lambda: list(images),
            get_image_uri=lambda image: str(folder / f"{image}.nii.gz"),
        )
        self.selection = Selection(
            SimpleNamespace(datastore=lambda: datastore),
            SimpleNamespace(engine=SimpleNamespace(adapters=self.adapters)),  # type: ignore[arg-type]
            SliceScoreStore(folder / "scores"),
            self.annotations,
            Reservations(folder / "reservations.json"),
            lambda modality: "base@1",
            dict,
            lambda image: "",
        )

    def label(self, image: str, slices: Sequence[int] | None) -> None:
        file = self.folder / "label.nii.gz"
        file.write_bytes(b"label")
        self.annotations.record(image, file, slices=slices, num_slices=SLICES)

    def train(self, modality: str, cases: Sequence[str], accepted: bool = True) -> None:
        run = {"training_cases": list(cases), "accepted": accepted}
        self.adapters.add(
            modality.lower(), "lora", {"branch.x": torch.zeros(1)}, modality=modality, structures=("liver",),
            base="b", base_name="t@1", run=run,
            readme=lambda card: "", lora=LoraSettings(),
        )  # fmt: skip

    def rounds(self, image: str | None = None) -> int:
        return self.selection._survey().find_round(image)


def test_the_noise_is_that_of_the_first_round_until_labels_of_this_pool_improved_a_model(tmp_path: Path):
    pool = Pool(tmp_path)
    assert pool.rounds() == 0
    pool.train("CT", ["somebody", "elses"])  # came with the package
    pool.train("CT", ["a"], accepted=False)  # refused by the gate
    pool.train("MR", ["a", "b"])  # another model
    assert (pool.rounds(), pool.rounds("a")) == (0, 0)
    pool.train("CT", ["a", "b"])
    assert (pool.rounds(), pool.rounds("a")) == (1, 1)


def test_every_modality_counts_its_own_rounds_and_the_order_is_as_noisy_as_the_youngest_model_in_it(tmp_path: Path):
    pool = Pool(tmp_path, ("a", "b", "m"), lambda image: "MR" if image == "m" else "CT")
    pool.train("CT", ["a"])
    pool.train("CT", ["a", "b"])
    assert (pool.rounds("a"), pool.rounds("m"), pool.rounds()) == (2, 0, 0)


def test_images_that_were_labelled_slice_by_slice_are_offered_for_review(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.label("a", list(range(SLICES)))
    pool.label("b", range(3))
    pool.label("b", range(3, SLICES))
    answer = pool.selection.next("anna").model_dump()
    assert "Every image is labelled" in answer["message"]
    assert sorted(entry["image"] for entry in answer["review"]) == ["a", "b"]
    assert all(entry["slices"] and entry["state"] == "review" for entry in answer["review"])
    assert [entry.state for entry in pool.selection.queue()] == ["review"] * 2


def test_an_image_with_a_slice_left_is_given_and_not_reviewed(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.label("a", None)
    pool.label("b", range(1, SLICES))
    answer = pool.selection.next("anna").model_dump()
    assert (answer["image"], [entry["index"] for entry in answer["slices"]]) == ("b", [0])
    assert [entry.image for entry in pool.selection.review()] == ["a"]


def test_an_empty_pool_says_where_images_go(tmp_path: Path):
    pool = Pool(tmp_path, ())
    assert pool.selection.next("anna").model_dump() == {"message": NO_IMAGES, "review": []}
    assert pool.selection.queue() == []


def test_when_everything_is_with_somebody_else_the_answer_says_until_when(tmp_path: Path):
    pool = Pool(tmp_path)
    pool.label("a", None)
    given: dict[str, Any] = pool.selection.next("anna").model_dump()
    assert given["image"] == "b"
    answer = pool.selection.next("ben").model_dump()
    assert answer["review"] == []
    assert "is with somebody else. Try again in 30 minutes at the latest" in answer["message"]
    assert pool.selection.next("anna").model_dump()["image"] == "b"  # it is still hers


@pytest.mark.parametrize("slices", [None, tuple(range(SLICES))])
def test_an_image_that_is_wholly_labelled_is_not_queued(tmp_path: Path, slices: Sequence[int] | None):
    pool = Pool(tmp_path)
    pool.label("a", slices)
    assert [entry.image for entry in pool.selection.queue()] == ["b"]


class Look:
    """What a starting server reads and puts together, and in which thread; and its scorer, which finds a training
    running.
    """

    def __init__(self, pool: Pool, score_pool: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.threads: set[str] = set()
        self.is_scoring = threading.Event()
        self._record("progidiff.active_learning.scores.safe_open", "read", monkeypatch)
        self._record("progidiff.server.background.pool_state.ImageTable", "build", monkeypatch)
        scorer = PoolScorer(None, None, pool.selection._scores, is_training=self._note_scoring)  # type: ignore[arg-type]
        self.context: Any = SimpleNamespace(
            scorer=scorer,
            selection=pool.selection,
            retraining=SimpleNamespace(resume=lambda: None),
            options=SimpleNamespace(score_pool=score_pool, warm_up=False),
        )
        monkeypatch.setattr(wiring, "_running", [])

    def _record(self, where: str, event: str, monkeypatch: pytest.MonkeyPatch) -> None:
        module, name = where.rsplit(".", 1)
        real = getattr(sys.modules[module], name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.events.append(event)
            self.threads.add(threading.current_thread().name)
            return real(*args, **kwargs)

        monkeypatch.setattr(where, call)

    def _note_scoring(self) -> bool:
        self.events.append("score")
        self.is_scoring.set()
        return True

    def start(self) -> None:
        wiring.start(self.context, "")
        for thread in threading.enumerate():
            if thread.name == "progidiff-first-look":
                thread.join(20)
        if self.context.options.score_pool == "on":
            assert self.is_scoring.wait(20)
            self.context.scorer.stop()


@pytest.mark.parametrize(("score_pool", "thread"), [("on", "progidiff-scorer"), ("off", "progidiff-first-look")])
def test_a_server_that_starts_puts_the_pool_together_in_the_background_before_it_scores_and_before_anybody_asks(
    tmp_path: Path, score_pool: str, thread: str, monkeypatch: pytest.MonkeyPatch
):
    pool = Pool(tmp_path)
    look = Look(pool, score_pool, monkeypatch)
    look.start()
    assert look.events == ["read", "read", "build", *(["score"] if score_pool == "on" else [])]
    assert look.threads == {thread}  # starting waits for none of it
    assert pool.selection.reservations.all() == {}
    look.events.clear()
    assert pool.selection.next("anna").model_dump()["scores_from"] == "base@1"
    assert look.events == []


def test_a_pool_that_cannot_be_put_together_stops_neither_the_scorer_nor_the_first_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def fail(modality: str) -> str:
        raise ModelError("there is no model")

    pool = Pool(tmp_path)
    monkeypatch.setattr(pool.selection, "_wanted_version", fail)
    look = Look(pool, "on", monkeypatch)
    look.start()
    assert look.events == ["read", "read", "score"]
    assert "ModelError: there is no model" in caplog.text
    monkeypatch.setattr(pool.selection, "_wanted_version", lambda modality: "base@1")
    assert pool.selection.next("anna").model_dump()["image"] in ("a", "b")  # the lock is free, and the answer is there


def test_without_scores_a_starting_server_does_not_look_at_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pool = Pool(tmp_path, ())
    look = Look(pool, "off", monkeypatch)
    datastore = pool.selection._app.datastore()
    monkeypatch.setattr(pool.selection._app, "datastore", lambda: look.events.append("list") or datastore)
    look.start()
    assert look.events == []  # behind an address it takes a while
    assert pool.selection.next("anna").model_dump()["message"] == NO_IMAGES
    assert "list" in look.events
