"""One queue per device: who computes, who waits, how far it is, and how to stop it.

The concurrency design in full: every inference request has a thread of its own (the web framework's pool), and exactly
one of them at a time is between `DeviceQueue.job`'s enter and exit. The others wait there, first come, first served.
Nothing else in the server takes the queue's lock for longer than a dictionary look-up, so other requests are never held
up by an inference.

A waiting request holds a thread, therefore the queue is short: beyond `max_waiting` it answers `BusyError` at once.

Work that nobody waits for (`DeviceQueue.background_job`) gets the device only while it is idle, and is cancelled by the
first request that comes; it takes no place in the queue and is not listed.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from progidiff.errors import BusyError, CancelledError, NotFoundError, RequestError

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class JobState(StrEnum):
    """Life of a job: queued -> running -> done, failed or cancelled; a queued job can also be cancelled."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Job:
    """One piece of work for a device, seen by the worker, by whoever polls it, and by whoever cancels it.

    Attributes:
        id: Name to poll and cancel it by.
        kind: What it is, e.g. ``"infer"``.
        image: The image id it is about.
        reason: Why it failed or was cancelled, else empty.
    """

    def __init__(self, queue: DeviceQueue, job_id: str, kind: str, image: str) -> None:
        self.id = job_id
        self.kind = kind
        self.image = image
        self.reason = ""
        self._queue = queue
        self._state = JobState.QUEUED
        self._created = time.time()
        self._started: float | None = None
        self._ended: float | None = None
        self._slices_done = 0
        self._slices_total = 0
        self._cancel = threading.Event()
        self._turn = threading.Event()

    @property
    def state(self) -> JobState:
        """Where it stands."""
        return self._state

    @property
    def position(self) -> int:
        """Jobs before this one on its device: 0 = running or finished, 1 = next."""
        return self._queue._position(self)

    def progress(self, done: int, total: int) -> None:
        """Report how far the work is.

        Args:
            done: Axial slices finished, 0..total.
            total: Axial slices to do.
        """
        self._slices_total = max(0, int(total))
        self._slices_done = min(max(0, int(done)), self._slices_total)

    def cancelled(self) -> bool:
        """Whether someone asked to stop it; the worker looks between two batches of slices and raises
        `CancelledError`.
        """
        return self._cancel.is_set()

    def cancel(self) -> None:
        """Ask to stop it. A waiting job leaves the queue at once, a running one after its current batch of slices; no
        effect on a finished one.
        """
        self._cancel.set()
        self._turn.set()

    def info(self) -> dict[str, Any]:
        """State as plain values.

        Returns:
            id, kind, image, device, state, position (see `position`), percent (0..100), slices_done, slices_total,
            waited_s and running_s (seconds), created (Unix time), reason.
        """
        now = time.time()
        started, ended, state = self._started, self._ended, self._state
        total = self._slices_total
        percent = 100 if state is JobState.DONE else int(100 * self._slices_done / total) if total else 0
        return {
            "id": self.id,
            "kind": self.kind,
            "image": self.image,
            "device": self._queue.device,
            "state": state.value,
            "position": self.position,
            "percent": percent,
            "slices_done": self._slices_done,
            "slices_total": total,
            "created": round(self._created, 3),
            "waited_s": max(0.0, round((started or ended or now) - self._created, 3)),
            "running_s": max(0.0, round((ended or now) - started, 3)) if started else 0.0,
            "reason": self.reason,
        }


class DeviceQueue:
    """First come, first served access to one device, with a memory of recent jobs.

    Args:
        device: Name of the device, for messages and polls.
        max_waiting: Jobs that may wait besides the running one.
        keep: Finished jobs that stay pollable; the oldest are forgotten first.

    Attributes:
        on_demand: Called with True when the first request wants the device and with False when the last one has had it,
            so that other processes on the device can pause; background work does not count. They must return at once
            and not raise.

    Example:
        >>> queue = DeviceQueue("cpu")
        >>> with queue.job("infer", "patient-1") as job:
        ...     job.progress(5, 10)
        ...     job.info()["percent"]
        50
        >>> job.info()["state"]
        'done'
    """

    def __init__(self, device: str, max_waiting: int = 8, keep: int = 64) -> None:
        self.device = device
        self.max_waiting = max_waiting
        self._keep = keep
        self._lock = threading.Lock()
        self._running: Job | None = None
        self._background: Job | None = None
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._seconds_of_last_job = 5.0
        self._closed = False
        self._demanded = False
        self.on_demand: list[Callable[[bool], None]] = []

    def close(self) -> None:
        """For the end of the server: cancel every job, running or waiting, and take no more."""
        with self._lock:
            self._closed = True
            unfinished = [job for job in self._jobs.values() if job.state in (JobState.QUEUED, JobState.RUNNING)]
            if self._background is not None:
                unfinished.append(self._background)
        for job in unfinished:
            job.cancel()

    @contextmanager
    def job(self, kind: str, image: str, job_id: str | None = None) -> Iterator[Job]:
        """Wait for the device, hold it for the `with` block, hand it on.

        Args:
            kind: What the work is, e.g. ``"infer"``.
            image: The image id it is about.
            job_id: A name chosen by the client, so that it can poll before the answer is there; made up if None.

        Raises:
            BusyError: if the queue is full (`retry_after` is a guess from the last job's duration) or closed.
            CancelledError: if it was cancelled while waiting.
            RequestError: if `job_id` is malformed or belongs to an unfinished job.
        """
        job = self._enter(kind, image, job_id)
        try:
            job._turn.wait()
            if job.cancelled():
                raise CancelledError(
                    f"Job {job.id} on image '{image}' was cancelled while it waited; send "
                    "the request again to restart it."
                )
            with self._lock:
                job._state = JobState.RUNNING
                job._started = time.time()
            yield job
        except BaseException as err:
            self._leave(
                job,
                JobState.CANCELLED if isinstance(err, CancelledError) else JobState.FAILED,
                str(err) or type(err).__name__,
            )
            raise
        self._leave(job, JobState.DONE, "")

    @contextmanager
    def background_job(self, kind: str, image: str) -> Iterator[Job]:
        """Hold the device for the `with` block if it is idle, until a request wants it: then the job is cancelled, and
        the worker, who looks between two batches of slices, raises `CancelledError`.

        Args:
            kind: What the work is, e.g. ``"score"``.
            image: The image id it is about.

        Raises:
            BusyError: if the device is not idle, or the queue is closed.
        """
        job = Job(self, uuid.uuid4().hex[:12], kind, image)
        with self._lock:
            if self._closed or self._running is not None:
                raise BusyError(f"{self.device} is not idle; background work waits until it is.")
            self._running = self._background = job
            job._state = JobState.RUNNING
            job._started = time.time()
        try:
            yield job
        except BaseException as err:
            self._leave(
                job,
                JobState.CANCELLED if isinstance(err, CancelledError) else JobState.FAILED,
                str(err) or type(err).__name__,
            )
            raise
        self._leave(job, JobState.DONE, "")

    def is_idle(self) -> bool:
        """Whether nobody computes and nobody waits."""
        with self._lock:
            return self._running is None and not self._closed

    def get(self, job_id: str) -> Job:
        """The job of this id.

        Raises:
            NotFoundError: if it never existed or is forgotten.
        """
        with self._lock:
            job = self._jobs.get(job_id)
        if job is None:
            raise NotFoundError(
                f"There is no job '{job_id}'; the last {self._keep} finished ones are "
                "remembered. GET /progidiff/jobs lists them."
            )
        return job

    def list(self, image: str | None = None) -> list[Job]:
        """Known jobs, newest first, of one image if given."""
        with self._lock:
            return [job for job in reversed(self._jobs.values()) if image is None or job.image == image]

    def _enter(self, kind: str, image: str, job_id: str | None) -> Job:
        if job_id is not None and not _JOB_ID.fullmatch(job_id):
            raise RequestError("A job id has 1 to 64 letters, digits, '-' or '_'; leave job_id out to get one made up.")
        with self._lock:
            if self._closed:
                raise BusyError(
                    "The server is stopping and takes no more work; send the request again when it is back.",
                    retry_after=30,
                )
            # The first request behind background work is next at once: it does not count as waiting.
            places = self.max_waiting + (self._background is not None)
            if len(self._waiting) >= places:
                retry_after = max(1, round(self._seconds_of_last_job))
                raise BusyError(
                    f"{len(self._waiting)} requests already wait for {self.device}, more "
                    f"would time out. Try again in about {retry_after} s, or cancel some "
                    "with DELETE /progidiff/jobs/<id>.",
                    retry_after=retry_after,
                )
            known = self._jobs.get(job_id) if job_id else None
            if known is not None and known.state in (JobState.QUEUED, JobState.RUNNING):
                raise RequestError(
                    f"Job '{job_id}' is still {known.state.value}; choose another job_id or leave it out."
                )
            job = Job(self, job_id or uuid.uuid4().hex[:12], kind, image)
            self._jobs.pop(job.id, None)
            self._jobs[job.id] = job
            if self._running is None:
                self._running = job
                job._turn.set()
            else:
                self._waiting.append(job)
                if self._background is not None:
                    self._background.cancel()
            self._forget_old()
            self._tell_demand()
        return job

    def _leave(self, job: Job, state: JobState, reason: str) -> None:
        with self._lock:
            job._ended = time.time()
            job._state = state
            job.reason = reason
            if job is self._running:
                if job is self._background:
                    self._background = None
                elif job._started is not None and state is JobState.DONE:
                    self._seconds_of_last_job = job._ended - job._started
                self._running = self._waiting.popleft() if self._waiting else None
                if self._running is not None:
                    self._running._turn.set()
            elif job in self._waiting:
                self._waiting.remove(job)
            self._forget_old()
            self._tell_demand()

    def _tell_demand(self) -> None:
        """Call `on_demand` if the demand changed; under the lock, so that the calls come in the order of the
        changes.
        """
        demanded = bool(self._waiting) or (self._running is not None and self._running is not self._background)
        if demanded != self._demanded:
            self._demanded = demanded
            for listener in self.on_demand:
                listener(demanded)

    def _position(self, job: Job) -> int:
        with self._lock:
            return self._waiting.index(job) + 1 if job in self._waiting else 0

    def _forget_old(self) -> None:
        finished = [
            job_id for job_id, job in self._jobs.items() if job.state not in (JobState.QUEUED, JobState.RUNNING)
        ]
        for job_id in finished[: max(0, len(finished) - self._keep)]:
            del self._jobs[job_id]
