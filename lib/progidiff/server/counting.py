"""What is counted while the server runs, for `GET /metrics`.

What can be looked up when somebody asks (how many wait, what is served) is not counted here, see
`progidiff.server.metrics`. Labels are names that the code has: declared addresses, kinds of jobs, classes of errors. No
image, file, address of a client or user is ever one, so that there are as many series after a year as after a day.

One set per process: a reload of the app goes on counting.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from progidiff.proposals.device_queue import DeviceQueue, JobInfo
from progidiff.training_runs.status import RunStatus

REGISTRY = CollectorRegistry()
"""Of what this module counts; not the library's own, into which other packages write."""

_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_JOB_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)

_requests = Counter(
    "progidiff_http_requests",
    "Answered requests, by declared address; '*' stands for addresses that are none.",
    ("method", "route", "status"),
    registry=REGISTRY,
)
_request_seconds = Histogram(
    "progidiff_http_request_seconds",
    "From the header of a request to the last byte of its answer.",
    ("method", "route"),
    buckets=_REQUEST_SECONDS,
    registry=REGISTRY,
)
_in_flight = Gauge("progidiff_http_requests_in_flight", "Requests that are being answered.", registry=REGISTRY)
_errors = Counter(
    "progidiff_errors", "Error answers, by the kind that they name in `error`.", ("error",), registry=REGISTRY
)
_wait_seconds = Histogram(
    "progidiff_queue_wait_seconds",
    "How long a job waited for the device before it got it.",
    ("kind",),
    buckets=_JOB_SECONDS,
    registry=REGISTRY,
)
_job_seconds = Histogram(
    "progidiff_job_seconds", "How long a job held the device.", ("kind",), buckets=_JOB_SECONDS, registry=REGISTRY
)
_jobs = Counter("progidiff_jobs", "Jobs that ended: done, failed or cancelled.", ("kind", "state"), registry=REGISTRY)
_trainings = Counter(
    "progidiff_trainings", "Trainings that ended: done, failed or stopped.", ("state",), registry=REGISTRY
)


def begin_request() -> None:
    """A request has come."""
    _in_flight.inc()


def end_request(method: str, route: str, status: str, seconds: float) -> None:
    """Its answer has gone out.

    Args:
        method: As declared.
        route: The declared path, with its placeholders.
        status: Of the answer; "none" if the client went away before there was one.
        seconds: Since `begin_request`.
    """
    _in_flight.dec()
    _requests.labels(method, route, status).inc()
    _request_seconds.labels(method, route).observe(seconds)


def count_error(kind: str) -> None:
    """An error was answered."""
    _errors.labels(kind).inc()


def watch_queue(queue: DeviceQueue) -> None:
    """Count the jobs of a queue from now on."""
    queue.on_started.append(_note_start)
    queue.on_ended.append(_note_end)


def note_training(status: RunStatus) -> None:
    """A training has ended; for `TrainingRunner`."""
    _trainings.labels(status.state).inc()


def _note_start(job: JobInfo) -> None:
    _wait_seconds.labels(job.kind).observe(job.waited_s)


def _note_end(job: JobInfo) -> None:
    _jobs.labels(job.kind, str(job.state)).inc()
    if job.running_s:
        _job_seconds.labels(job.kind).observe(job.running_s)
