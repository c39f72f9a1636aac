"""Kept, or computed: the one place that finds a result, waits for the device, computes and keeps.

A `Question` says what the result depends on; a `Shelf` is where results lie. What a computation has so far can be
looked at meanwhile, and what an interrupted one leaves is continued by the next one with the same question.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from progidiff.errors import CancelledError, StoreError
from progidiff.proposals.device_queue import Stop
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import UnfinishedProposals, Work

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Question:
    """A request about one image to one model: all that a result depends on.

    Attributes:
        request: Settled, see `ProposalRequest.settle`.
        image: Id in the datastore; "" for an upload.
        digest: Of the voxels, their grid and modality.
        model: ``name@version``.
    """

    request: ProposalRequest
    image: str
    digest: str
    model: str

    @cached_property
    def key(self) -> str:
        """Under which the result is kept."""
        return self.request.key(self.image, self.digest, self.model)

    @cached_property
    def whole(self) -> str:
        """The same for all questions that differ in the structures only."""
        return self.request.whole_key(self.image, self.digest, self.model)

    @cached_property
    def steered(self) -> str:
        """The key of the same question without edits; "" if it has none."""
        if not self.request.edits:
            return ""
        return self.request.model_copy(update={"edits": ()}).key(self.image, self.digest, self.model)


class Turn(Protocol):
    """The device, for the time being; a `Job`, or `Alone`."""

    @property
    def id(self) -> str:
        """Name of the job."""

    @property
    def image(self) -> str:
        """What the job is about."""

    @property
    def device(self) -> str:
        """Which of several devices it is; "" where there is one."""

    @property
    def stop(self) -> Stop | None:
        """Why the work is to stop; None if it is not."""

    def progress(self, done: int, total: int) -> None:
        """Told how many slices of how many are done."""

    def cancelled(self) -> bool:
        """Asked between batches."""


TakeTurn = Callable[[], AbstractContextManager[Turn]]
"""Waits for the device; whoever leaves the `with` block hands it on."""

Compute = Callable[[Work], VolumeProposals]
"""Answers the question, by one of the models."""


@dataclass(frozen=True)
class Alone:
    """The turn of a process that shares its device with nobody."""

    image: str
    id: str = ""
    device: str = ""
    stop: Stop | None = None

    def progress(self, done: int, total: int) -> None:
        """Nobody watches."""

    def cancelled(self) -> bool:
        """Nobody cancels."""
        return False

    @classmethod
    @contextmanager
    def take(cls, image: str) -> Iterator[Alone]:
        """There is nothing to wait for."""
        yield cls(image)


class Shelf(Protocol):
    """Where results lie."""

    def find(self, question: Question) -> VolumeProposals | None:
        """The result; None if there is none."""

    def keep(self, question: Question, proposals: VolumeProposals) -> None:
        """Keep a result for the next time."""


class DiskShelf:
    """Results in a store, which survive a restart; a longer prompt answers a shorter one.

    Args:
        store: Where.
        must_keep: Whether a disk that refuses is an error (`StoreError`), or a warning in the log: whoever waits for an
            answer gets it all the same.
    """

    def __init__(self, store: ProposalStore, must_keep: bool = False) -> None:
        self.store = store
        self._must_keep = must_keep

    def find(self, question: Question) -> VolumeProposals | None:
        """What is kept under the question's own key, or as a part of the answer to a longer prompt: the pool is scored
        with `all`.
        """
        result = self.store.load(question.key)
        if result is None:
            result = self.store.find_part(question.image, question.request.queries, question.whole)
            if result is not None:
                self.keep(question, result)  # Annotations name proposals by their key, and it is found faster.
        return result

    def keep(self, question: Question, proposals: VolumeProposals) -> None:
        """Keep a result.

        Raises:
            StoreError: if the disk refuses, and it must be kept.
        """
        try:
            self.store.save(
                question.key, proposals, question.image, question.request.queries, question.whole, question.steered
            )
        except StoreError as err:
            if self._must_keep:
                raise
            logger.warning("The proposals for '%s' are used but not kept: %s", question.image, err)


class MemoryShelf:
    """The last few results, for several threads.

    Args:
        count: How many.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._results: OrderedDict[str, VolumeProposals] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, question: Question) -> VolumeProposals | None:
        """The result; None if there is none, or it was long ago."""
        with self._lock:
            if question.key in self._results:
                self._results.move_to_end(question.key)
            return self._results.get(question.key)

    def keep(self, question: Question, proposals: VolumeProposals) -> None:
        """Keep a result; the one that was not used for longest goes."""
        with self._lock:
            self._results[question.key] = proposals
            self._results.move_to_end(question.key)
            while len(self._results) > self._count:
                self._results.popitem(last=False)


@dataclass(frozen=True)
class Answer:
    """What a question was answered with.

    Attributes:
        proposals: The result.
        key: Under which it is kept.
        job: Id of the job that computed it; None if it was kept.
    """

    proposals: VolumeProposals
    key: str
    job: str | None


class Keeper:
    """Finds, waits, computes and keeps; safe for threads.

    Args:
        shelf: Where results lie.

    Attributes:
        hits, misses: Questions that were answered with what is kept, and those that had to be computed.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.hits = 0
        self.misses = 0
        self._lock = threading.Lock()
        self._running: dict[str, UnfinishedProposals] = {}
        self._previews: dict[str, UnfinishedProposals] = {}
        self._interrupted: tuple[str, UnfinishedProposals] | None = None

    def find(self, question: Question) -> VolumeProposals | None:
        """What is kept; None if it would have to be computed."""
        return self._shelf.find(question)

    def find_or_compute(
        self, question: Question, compute: Compute, take_turn: TakeTurn, work: Work | None = None
    ) -> Answer:
        """The result, kept or computed.

        Args:
            question: What is asked of which image.
            compute: Computes it when it is not there; called while the turn lasts.
            take_turn: Waits for the device.
            work: How to compute.

        Raises:
            BusyError, CancelledError: from `take_turn`; CancelledError also if the turn was cancelled.
            StoreError: if the result has to be kept and cannot.
            ProGiDiffError: whatever `compute` finds wrong.
        """
        found = self._look_up(question)
        if found is not None:
            return Answer(found, question.key, None)
        with take_turn() as turn:
            found = self._look_up(question)  # Somebody may have asked for the same while this one waited.
            if found is not None:
                return Answer(found, question.key, None)
            with self._lock:
                self.misses += 1
            job = turn.id
            computed = self._compute(question, compute, turn, work or Work())
        self._shelf.keep(question, computed)
        return Answer(computed, question.key, job)

    def find_unfinished(self, job_id: str) -> UnfinishedProposals | None:
        """What a running job has so far; None before its first slices and after its end."""
        return self._running.get(job_id) or self._previews.get(job_id)

    def _look_up(self, question: Question) -> VolumeProposals | None:
        found = self.find(question)
        if found is not None:
            with self._lock:
                self.hits += 1
        return found

    def _compute(self, question: Question, compute: Compute, turn: Turn, work: Work) -> VolumeProposals:
        unfinished = self._take_interrupted(question.key)
        ready = set(unfinished.slices) if unfinished is not None else set()

        def collect(proposals: VolumeProposals, slices: Sequence[int]) -> None:
            ready.update(slices)
            self._running[turn.id] = UnfinishedProposals(turn.image, proposals, frozenset(ready))

        def preview(proposals: VolumeProposals, z: int) -> None:
            # Apart from what is collected: whoever continues an interrupted computation does not build on it.
            self._previews[turn.id] = UnfinishedProposals(turn.image, proposals, frozenset({z}))

        if unfinished is not None:
            self._running[turn.id] = unfinished
        try:
            return compute(
                replace(
                    work,
                    device=turn.device,
                    unfinished=unfinished,
                    on_progress=turn.progress,
                    on_slices=collect,
                    on_preview=preview,
                    is_cancelled=turn.cancelled,
                )
            )
        except CancelledError:
            left = self._running.get(turn.id)
            # What somebody cancelled is not wanted; what had to make way, or lost its client, is asked for again.
            if left is not None and turn.stop in (Stop.PREEMPTED, Stop.GONE):
                with self._lock:
                    self._interrupted = (question.key, left)
            raise
        finally:
            self._running.pop(turn.id, None)
            self._previews.pop(turn.id, None)

    def _take_interrupted(self, key: str) -> UnfinishedProposals | None:
        """What an interrupted computation left, for this one alone: it goes on in the same arrays."""
        with self._lock:
            if self._interrupted is None or self._interrupted[0] != key:
                return None
            unfinished = self._interrupted[1]
            self._interrupted = None
            return unfinished
