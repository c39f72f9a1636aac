"""Kept or computed: the keys of former versions, the only place that waits and computes, and interrupted work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from progidiff.errors import CancelledError, RequestError, StoreError
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.prompts.parser import Query
from progidiff.proposals.device_queue import DeviceQueue, Job, Stop
from progidiff.proposals.engine import Engine
from progidiff.proposals.keeper import Alone, DiskShelf, Keeper, MemoryShelf, Question
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from support.proposals import make_proposals, make_request

LIVER, SPLEEN = Query("liver", "liver"), Query("spleen", "spleen")

FREE = Query("a red thing", "a red thing", False)
NUCLEI = Query("nuclei", "Dense on the left.", False)

KEYS_OF_0_1_0 = [
    # Structures, settings; image, digest, model; and the key that version 0.1.0 made of them.
    (
        [LIVER],
        {},
        ("a", "00", "base@1"),
        "f10e62561fb411995fd208a2db6966194627a64f175ba87b0fc86724bc5b5b20",
    ),
    (
        [LIVER, SPLEEN],
        {"clean_up": "small"},
        ("a", "00", "base@1"),
        "366537cdf92b543c280b144ba0f0a02c1c1dea1c70a67f7b55f1e0ea2a61e4b4",
    ),
    (
        [FREE],
        {
            "num_proposals": 8, "num_inference_steps": 2, "seed": 2**32 - 1, "guidance_scale": 2.5, "adapter": "mr@2",
            "clean_up": "largest",
        },
        ("case 7", "ff", "progidiff@3"),
        "1a7a0d553ca033ac5966d2c1599156ca69d04c8fd1aa3f44a624ee227ba13cd3",
    ),
    (
        [NUCLEI],
        {"num_inference_steps": 3},
        ("one", "abc:0", "textdiff nuclei@1 s"),
        "3811f75b9e901a812d63230d22dc1a96ce2a636adc94de771a8dba852febca15",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("queries", "settings", "image", "key"), KEYS_OF_0_1_0)
def test_what_version_0_1_0_kept_is_found(
    queries: list[Query], settings: dict[str, Any], image: tuple[str, str, str], key: str
):
    request = ProposalRequest(queries=tuple(queries), **settings)
    assert request.settle(4, 1.0, settings.get("adapter", "")).key(*image) == key


def test_a_prompt_is_a_part_of_what_version_0_1_0_kept():
    whole = "2213f82c298a03e30281dcbf6d4f29de14c70accce10e22798d61d4b4fdfb447"
    request = ProposalRequest(queries=(SPLEEN,), clean_up="small").settle(4, 1.0, "")
    assert request.whole_key("a", "00", "base@1") == whole


def make_question(prompt: str = "liver and spleen and pancreas", image: str = "image") -> Question:
    return Question(make_request(prompt), image, "digest", "toy@1")


class Model:
    """Computes what it is told, and counts."""

    def __init__(self) -> None:
        self.asked: list[Work] = []

    def compute(self, work: Work) -> VolumeProposals:
        self.asked.append(work)
        return make_proposals()


@pytest.mark.parametrize("shelf", ["disk", "memory"])
def test_what_was_computed_is_kept_and_found_without_a_turn(tmp_path: Path, shelf: str):
    keeper = Keeper(DiskShelf(ProposalStore(tmp_path)) if shelf == "disk" else MemoryShelf(2))
    queue, model, question = DeviceQueue("cpu"), Model(), make_question()
    first = keeper.find_or_compute(question, model.compute, lambda: queue.job("infer", "image", "mine"))
    assert (first.job, first.key) == ("mine", question.key)
    again = keeper.find_or_compute(question, model.compute, lambda: queue.job("infer", "image"))
    assert (again.job, len(model.asked), len(queue.list())) == (None, 1, 1)
    np.testing.assert_array_equal(again.proposals.probabilities, first.proposals.probabilities)


def test_a_longer_prompt_answers_a_shorter_one_which_then_has_a_key_of_its_own(tmp_path: Path):
    keeper, model = Keeper(DiskShelf(ProposalStore(tmp_path))), Model()
    keeper.find_or_compute(make_question(), model.compute, partial(Alone.take, "image"))
    part = keeper.find(make_question("spleen"))
    assert part is not None
    assert part.structures == ("spleen",)
    assert ProposalStore(tmp_path).load(make_question("spleen").key) is not None
    assert keeper.find(make_question("aorta")) is None


def test_memory_forgets_what_was_not_used_for_longest():
    keeper, model = Keeper(MemoryShelf(2)), Model()
    for image in ("a", "b"):
        keeper.find_or_compute(make_question(image=image), model.compute, partial(Alone.take, image))
    assert keeper.find(make_question(image="a")) is not None
    keeper.find_or_compute(make_question(image="c"), model.compute, partial(Alone.take, "c"))
    assert [keeper.find(make_question(image=image)) is not None for image in "abc"] == [True, False, True]


def test_who_waited_finds_what_the_one_before_computed(tmp_path: Path):
    keeper, queue, model = Keeper(DiskShelf(ProposalStore(tmp_path))), DeviceQueue("cpu"), Model()
    question = make_question()
    answers: list[str | None] = []

    def ask() -> None:
        answers.append(
            keeper.find_or_compute(question, model.compute, lambda: queue.job("infer", "image", "second")).job
        )

    with queue.job("infer", "image", "first"):
        thread = threading.Thread(target=ask)
        thread.start()
        while queue.list("image")[0].id != "second":
            thread.join(0.01)
        keeper._shelf.keep(question, make_proposals())
    thread.join(10)
    assert (answers, model.asked) == ([None], [])


def test_a_full_disk_is_an_error_only_where_the_result_must_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    store = ProposalStore(tmp_path)

    def refuse(*args: object) -> None:
        raise StoreError("The disk is full.")

    monkeypatch.setattr(store, "save", refuse)
    answer = Keeper(DiskShelf(store)).find_or_compute(make_question(), Model().compute, partial(Alone.take, "image"))
    assert answer.proposals.structures == make_proposals().structures
    assert "used but not kept: The disk is full" in caplog.text
    with pytest.raises(StoreError, match="The disk is full"):
        Keeper(DiskShelf(store, must_keep=True)).find_or_compute(
            make_question(), Model().compute, partial(Alone.take, "image")
        )


def test_a_request_that_leaves_something_to_the_model_has_no_key():
    with pytest.raises(RequestError, match="Settle it first"):
        ProposalRequest(queries=(LIVER,)).key("image", "00", "toy@1")


# Interrupted work, on a real engine of toy width


@pytest.fixture(scope="module")
def long_volume(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Volume:
    path = phantom_writer(tmp_path_factory.mktemp("keeper") / "long.nii.gz", shape=(40, 30, 37))
    return load_volume(path, modality="CT")


@dataclass
class StoppedTurn:
    """A turn that ends after some slices."""

    why: Stop
    after: int
    id: str = "stopped"
    image: str = "long"
    device: str = ""
    stop: Stop | None = None

    def progress(self, done: int, total: int) -> None:
        if done >= self.after:
            self.stop = self.why

    def cancelled(self) -> bool:
        return self.stop is not None

    @contextmanager
    def take(self) -> Iterator[StoppedTurn]:
        yield self


def test_a_preview_is_shown_while_the_job_runs_and_nothing_is_built_on_it():
    keeper, question, seen = Keeper(MemoryShelf(2)), make_question(), list[Any]()

    def compute(work: Work) -> VolumeProposals:
        seen.append(work.unfinished)
        work.on_preview(make_proposals(), 1)
        seen.append(keeper.find_unfinished("stopped"))
        raise CancelledError("made way")

    for _ in range(2):
        with pytest.raises(CancelledError):
            keeper.find_or_compute(question, compute, StoppedTurn(Stop.PREEMPTED, 0, stop=Stop.PREEMPTED).take)
    first, shown, second, _ = seen
    assert (first, second) == (None, None)
    assert (shown.image, shown.slices) == ("long", {1})
    assert keeper.find_unfinished("stopped") is None


@pytest.mark.parametrize(
    ("why", "is_yielding", "after", "encoded"),
    [
        (Stop.PREEMPTED, True, 16, 37),  # in batches of 4, so that no work is lost
        (Stop.GONE, False, 32, 37),
        (Stop.GONE, False, 20, 37 + 16),  # within a batch, which is computed again
        (Stop.ASKED, False, 32, 37 + 32),
    ],
)
def test_what_had_to_make_way_or_lost_its_client_is_continued_and_gives_the_same_proposals(
    tiny_model: Path, long_volume: Volume, why: Stop, is_yielding: bool, after: int, encoded: int
):
    engine, keeper = Engine(tiny_model, device="cpu", dtype="fp32"), Keeper(MemoryShelf(2))
    calls: list[int] = []
    engine.load().branch.encoder.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    request = ProposalRequest(queries=(LIVER, SPLEEN), num_proposals=3, clean_up="largest")
    card = engine.card
    settled = request.settle(card.num_inference_steps, card.guidance_scale, "")
    question = Question(settled, "long", long_volume.digest, card.full_name)
    compute = partial(engine.propose, settled, long_volume)
    with pytest.raises(CancelledError):
        keeper.find_or_compute(
            question, compute, StoppedTurn(why, after).take, Work(remember=False, is_yielding=is_yielding)
        )
    told: list[int] = []
    queue = DeviceQueue("cpu")

    @contextmanager
    def watch() -> Iterator[Job]:
        with queue.job("infer", "long") as job:
            report = job.progress
            job.progress = lambda done, total: (told.append(done), report(done, total))[1]  # type: ignore[method-assign]
            yield job

    result = keeper.find_or_compute(question, compute, watch).proposals
    assert sum(calls) == encoded
    assert told == sorted(told)
    assert (told[0] > after // 16 * 16) == (why is not Stop.ASKED)
    assert (told[-1], result.clean_up) == (37, "largest")
    expected = Engine(tiny_model, device="cpu", dtype="fp32").propose(request, long_volume)
    difference = np.abs(result.probabilities.astype(int) - expected.probabilities).max()
    assert difference <= (1 if is_yielding else 0)  # Batches of another size may round the last bit differently.
