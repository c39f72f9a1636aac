"""One line for one or several devices: who computes, who waits, how far it is, and how to stop it.

The concurrency design in full: every inference request has a thread of its own (the web framework's pool), and for each
device exactly one of them at a time is between `DeviceQueue.job`'s enter and exit. The others wait there. Nothing else
in the server takes the queue's lock for longer than a dictionary look-up, so other requests are never held up by an
inference.

Several devices serve one line: who is next gets the device that is free first. With a line for each, somebody would
wait behind a long request while another device is idle. A request that finds several idle takes the one that computed
the same image last, since that remembers its features; otherwise the one that has been idle longest.

Turns go round the users who wait (`Asker`), the one whose last turn is longest ago first; one user's requests are
served as they came. A waiting request holds a thread, therefore the queue is short: beyond `max_waiting` it answers
`BusyError` at once. Nobody can hold all its places: of whoever has most, the youngest waiting request makes room for
somebody who has at least two fewer.

A request whose client went away is cancelled: while it waits within a second, while it computes after its batch.

Work that nobody waits for (`DeviceQueue.background_job`) gets a device only while it is idle, and is cancelled by the
first request that finds no idle one; it takes no place in the queue and is not listed.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from progidiff.errors import BusyError, CancelledError, NotFoundError, RequestError

_JOB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

_LOOK_SECONDS = 0.5
"""How often a job asks whether its client is still there."""

_REMEMBERED_TURNS = 256
"""Users whose last turn is remembered."""


@dataclass(frozen=True)
class Asker:
    """Who sent a request.

    Attributes:
        name: Turns go round these: a user's name, or the address of somebody without a login.
        is_gone: Whether the client closed the connection; called by the thread that waits or computes, and cheap.
    """

    name: str = ""
    is_gone: Callable[[], bool] | None = None


NOBODY = Asker()
"""Who asks where there is no client."""


class JobState(StrEnum):
    """Life of a job: queued -> running -> done, failed or cancelled; a queued job can also be cancelled."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stop(StrEnum):
    """Why a job was told to stop."""

    ASKED = "asked"
    """Somebody cancelled it, or the server ends."""
    GONE = "gone"
    """Its client went away."""
    PREEMPTED = "preempted"
    """It was background work, and a request came."""
    DISPLACED = "displaced"
    """It waited, and others have waited for less."""


class JobInfo(BaseModel):
    """A job as it stands now.

    Attributes:
        id, kind, image: See `Job`.
        device: Name of the device that has it; of all of them while it waits.
        state: One of `JobState`.
        position: Jobs before this one in the line: 0 = running or finished, 1 = next.
        waiting_for: What it waits for, to be read after "waiting for"; "" if it does not wait.
        percent: 0 to 100.
        slices_done, slices_total: Axial slices; 0 of 0 before the first are counted.
        created: Seconds since 1970.
        waited_s, running_s: Seconds.
        reason: Why it failed or was cancelled, else "".
    """

    model_config = ConfigDict(frozen=True)

    id: str
    kind: str
    image: str
    device: str
    state: JobState
    position: int
    waiting_for: str
    percent: int
    slices_done: int
    slices_total: int
    created: float
    waited_s: float
    running_s: float
    reason: str


class Job:
    """One piece of work for a device, seen by the worker, by whoever polls it, and by whoever cancels it.

    Attributes:
        id: Name to poll and cancel it by.
        kind: What it is, e.g. ``"infer"``.
        image: The image id it is about.
        owner: Name of who asked, see `Asker`.
        device: Name of the device that it got; "" while it waits.
        reason: Why it failed or was cancelled, else empty.
        stop: Why it was told to stop; None if it was not.
    """

    def __init__(self, queue: DeviceQueue, job_id: str, kind: str, image: str, asker: Asker = NOBODY) -> None:
        self.id = job_id
        self.kind = kind
        self.image = image
        self.owner = asker.name
        self.device = ""
        self.reason = ""
        self.stop: Stop | None = None
        self._is_gone = asker.is_gone
        self._next_look = 0.0
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
        """Jobs before this one in the line: 0 = running or finished, 1 = next."""
        return self._queue._describe_wait(self)[0]

    def progress(self, done: int, total: int) -> None:
        """Report how far the work is.

        Args:
            done: Axial slices finished, 0..total.
            total: Axial slices to do.
        """
        self._slices_total = max(0, int(total))
        self._slices_done = min(max(0, int(done)), self._slices_total)

    def cancelled(self) -> bool:
        """Whether it is to stop; the worker looks between two batches of slices and raises `CancelledError`."""
        now = time.monotonic()
        if self._is_gone is not None and self.stop is None and now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            if self._is_gone():
                self.cancel(Stop.GONE)
        return self._cancel.is_set()

    def cancel(self, why: Stop = Stop.ASKED) -> None:
        """Ask to stop it. A waiting job leaves the queue at once, a running one after its current batch of slices; no
        effect on a finished one.
        """
        if self.stop is None:
            self.stop = why
        self._cancel.set()
        self._turn.set()

    def wait(self) -> None:
        """Wait for the turn.

        Raises:
            BusyError: if it made room for others.
            CancelledError: if it was cancelled, or its client went away.
        """
        while not self._turn.wait(None if self._is_gone is None else _LOOK_SECONDS):
            self.cancelled()
        if not self.cancelled():
            return
        if self.stop is Stop.DISPLACED:
            raise BusyError(
                f"Others wait for {self._queue.device} too, and your requests held more than their share of the "
                "places. Send this one again when one of yours is done.",
                retry_after=self._queue.retry_after,
            )
        if self.stop is Stop.GONE:
            raise CancelledError(f"Whoever asked for job {self.id} on image '{self.image}' went away while it waited.")
        raise CancelledError(
            f"Job {self.id} on image '{self.image}' was cancelled while it waited; send "
            "the request again to restart it."
        )

    def info(self) -> JobInfo:
        """How it stands now."""
        now = time.time()
        started, ended, state = self._started, self._ended, self._state
        total = self._slices_total
        position, waiting_for = self._queue._describe_wait(self)
        return JobInfo(
            id=self.id,
            kind=self.kind,
            image=self.image,
            device=self.device or self._queue.device,
            state=state,
            position=position,
            waiting_for=waiting_for,
            percent=100 if state is JobState.DONE else int(100 * self._slices_done / total) if total else 0,
            slices_done=self._slices_done,
            slices_total=total,
            created=round(self._created, 3),
            waited_s=max(0.0, round((started or ended or now) - self._created, 3)),
            running_s=max(0.0, round((ended or now) - started, 3)) if started else 0.0,
            reason=self.reason,
        )


class DeviceQueue:
    """Access to devices by turns, with a memory of recent jobs.

    Args:
        devices: Name of the device, for messages and polls; or of several, all different.
        max_waiting: Jobs that may wait besides the running ones.
        keep: Finished jobs that stay pollable; the oldest are forgotten first.

    Attributes:
        devices: Their names.
        device: The same as one text.
        on_demand: Called with True when the first request wants a device and with False when the last one has had it,
            so that other processes on the device can pause; background work does not count. They must return at once
            and not raise.
        on_started: Called with every job that has got the device; the same holds.
        on_ended: Called with every job that ended, also one that never got the device; the same holds.

    Example:
        >>> queue = DeviceQueue("cpu")
        >>> with queue.job("infer", "patient-1") as job:
        ...     job.progress(5, 10)
        ...     job.info().percent
        50
        >>> job.info().state.value
        'done'
    """

    def __init__(self, devices: str | Sequence[str], max_waiting: int = 8, keep: int = 64) -> None:
        self.devices = (devices,) if isinstance(devices, str) else tuple(devices)
        self.device = " or ".join(self.devices)
        self.max_waiting = max_waiting
        self._keep = keep
        self._lock = threading.Lock()
        # By device; those that have been idle longest come first among the idle ones.
        self._running: dict[str, Job] = {}
        self._background: list[Job] = []
        self._idle = list(self.devices)
        self._last_images: dict[str, str] = {}
        self._waiting: list[Job] = []
        self._last_turns: OrderedDict[str, int] = OrderedDict()
        self._turns = 0
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._seconds_of_last_job = 5.0
        self._closed = False
        self._demanded = False
        self.on_demand: list[Callable[[bool], None]] = []
        self.on_started: list[Callable[[JobInfo], None]] = []
        self.on_ended: list[Callable[[JobInfo], None]] = []

    @property
    def is_closed(self) -> bool:
        """Whether the server ends, so that no more work is taken."""
        return self._closed

    def count(self) -> Counter[tuple[str, JobState]]:
        """How many jobs of which kind wait or run, background work included."""
        with self._lock:
            counted = Counter((job.kind, JobState.QUEUED) for job in self._waiting)
            counted.update((job.kind, JobState.RUNNING) for job in self._running.values())
            return counted

    def close(self) -> None:
        """For the end of the server: cancel every job, running or waiting, and take no more."""
        with self._lock:
            self._closed = True
            unfinished = [job for job in self._jobs.values() if job.state in (JobState.QUEUED, JobState.RUNNING)]
            unfinished += self._background
        for job in unfinished:
            job.cancel()

    @property
    def retry_after(self) -> int:
        """Seconds after which another try makes sense: a guess from the last job's duration."""
        return max(1, round(self._seconds_of_last_job))

    @contextmanager
    def job(self, kind: str, image: str, job_id: str | None = None, asker: Asker = NOBODY) -> Iterator[Job]:
        """Wait for a device, hold it for the `with` block, hand it on.

        Args:
            kind: What the work is, e.g. ``"infer"``.
            image: The image id it is about.
            job_id: A name chosen by the client, so that it can poll before the answer is there; made up if None.
            asker: Who asks.

        Raises:
            BusyError: if the queue is full or closed, or the job made room for others.
            CancelledError: if it was cancelled while waiting, or its client went away.
            RequestError: if `job_id` is malformed or belongs to an unfinished job.
        """
        job = self._enter(kind, image, job_id, asker)
        try:
            job.wait()
            with self._lock:
                job._state = JobState.RUNNING
                job._started = time.time()
            self._tell(self.on_started, job)
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
        """Hold a device for the `with` block if one is idle, until a request wants it: then the job is cancelled, and
        the worker, who looks between two batches of slices, raises `CancelledError`.

        Args:
            kind: What the work is, e.g. ``"score"``.
            image: The image id it is about.

        Raises:
            BusyError: if no device is idle, or the queue is closed.
        """
        job = Job(self, uuid.uuid4().hex[:12], kind, image)
        with self._lock:
            if self._closed or not self._idle:
                raise BusyError(f"{self.device} is not idle; background work waits until it is.")
            self._hold(job)
            self._background.append(job)
            job._state = JobState.RUNNING
            job._started = time.time()
        try:
            self._tell(self.on_started, job)
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
        """Whether there is a device on which nobody computes."""
        with self._lock:
            return bool(self._idle) and not self._closed

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

    def _enter(self, kind: str, image: str, job_id: str | None, asker: Asker) -> Job:
        if job_id is not None and not _JOB_ID.fullmatch(job_id):
            raise RequestError("A job id has 1 to 64 letters, digits, '-' or '_'; leave job_id out to get one made up.")
        with self._lock:
            if self._closed:
                raise BusyError(
                    "The server is stopping and takes no more work; send the request again when it is back.",
                    retry_after=30,
                )
            known = self._jobs.get(job_id) if job_id else None
            if known is not None and known.state in (JobState.QUEUED, JobState.RUNNING):
                raise RequestError(
                    f"Job '{job_id}' is still {known.state.value}; choose another job_id or leave it out."
                )
            # The first request behind background work is next at once: it does not count as waiting.
            if len(self._waiting) >= self.max_waiting + len(self._background):
                self._make_room(asker.name)
            job = Job(self, job_id or uuid.uuid4().hex[:12], kind, image, asker)
            self._jobs.pop(job.id, None)
            self._jobs[job.id] = job
            if self._idle:
                self._start(job)
            else:
                self._waiting.append(job)
                # One device for each who waits is enough.
                for other in self._background[: len(self._waiting)]:
                    other.cancel(Stop.PREEMPTED)
            self._forget_old()
            self._tell_demand()
        return job

    def _make_room(self, owner: str) -> None:
        """Send away the youngest waiting job of whoever has most, if that is at least two more than the owner has.

        Raises:
            BusyError: if nobody has.
        """
        held = Counter(job.owner for job in self._waiting)
        held.update(job.owner for job in self._running.values() if job not in self._background)
        youngest_of = {job.owner: job for job in self._waiting}
        greediest = max(youngest_of, key=lambda name: held[name], default=None)
        if greediest is None or held[greediest] < held[owner] + 2:
            raise BusyError(
                f"{len(self._waiting)} requests already wait for {self.device}, more would time out. Try again in "
                f"about {self.retry_after} s, or cancel some with DELETE /progidiff/jobs/<id>.",
                retry_after=self.retry_after,
            )
        displaced = youngest_of[greediest]
        self._waiting.remove(displaced)
        displaced.cancel(Stop.DISPLACED)

    def _start(self, job: Job) -> None:
        """Give an idle device to a job."""
        self._hold(job)
        self._turns += 1
        self._last_turns[job.owner] = self._turns
        self._last_turns.move_to_end(job.owner)
        while len(self._last_turns) > _REMEMBERED_TURNS:
            self._last_turns.popitem(last=False)
        job._turn.set()

    def _hold(self, job: Job) -> None:
        """Take the idle device that knows the image, or else the one that has been idle longest."""
        knowing = [name for name in self._idle if job.image and self._last_images.get(name) == job.image]
        job.device = (knowing or self._idle)[0]
        self._idle.remove(job.device)
        self._running[job.device] = job
        self._last_images[job.device] = job.image

    def _list_turns(self) -> Sequence[Job]:
        """Those who wait, in the order in which they are served if nobody else comes."""
        last = dict(self._last_turns)
        left = list(self._waiting)
        order = []
        while left:
            # `min` takes the first of equals: of users who never had a turn, the one who came first.
            job = min(left, key=lambda job: last.get(job.owner, 0))
            left.remove(job)
            order.append(job)
            last[job.owner] = self._turns + len(order)
        return order

    def _leave(self, job: Job, state: JobState, reason: str) -> None:
        with self._lock:
            job._ended = time.time()
            job._state = state
            job.reason = reason
            if self._running.get(job.device) is job:
                if job in self._background:
                    self._background.remove(job)
                elif job._started is not None and state is JobState.DONE:
                    self._seconds_of_last_job = job._ended - job._started
                del self._running[job.device]
                self._idle.append(job.device)
                if self._waiting:
                    following = self._list_turns()[0]
                    self._waiting.remove(following)
                    self._start(following)
            elif job in self._waiting:
                self._waiting.remove(job)
            self._forget_old()
            self._tell_demand()
        self._tell(self.on_ended, job)

    def _tell(self, listeners: Sequence[Callable[[JobInfo], None]], job: Job) -> None:
        for listener in listeners:
            listener(job.info())

    def _tell_demand(self) -> None:
        """Call `on_demand` if the demand changed; under the lock, so that the calls come in the order of the
        changes.
        """
        demanded = bool(self._waiting) or len(self._running) > len(self._background)
        if demanded != self._demanded:
            self._demanded = demanded
            for listener in self.on_demand:
                listener(demanded)

    def _describe_wait(self, job: Job) -> tuple[int, str]:
        """The position of a job, and what it waits for; 0 and "" if it does not wait."""
        with self._lock:
            if job not in self._waiting:
                return 0, ""
            position = self._list_turns().index(job) + 1
            requests = position - len(self._background)
            if requests > 0:
                return position, f"{requests} request{'s' if requests > 1 else ''} before it"
            scored = self._background[position - 1].image
            return position, f"the background scoring of '{scored}', which makes way after the slices it is at"

    def _forget_old(self) -> None:
        finished = [
            job_id for job_id, job in self._jobs.items() if job.state not in (JobState.QUEUED, JobState.RUNNING)
        ]
        for job_id in finished[: max(0, len(finished) - self._keep)]:
            del self._jobs[job_id]
