"""Many volumes on a Ray cluster.

Actors without a GPU read and write, actors with a GPU, or a part of one, compute; how many there are follows from what
the cluster has, not the machine on which the command was given. An image passes from one to the next through Ray's
object store and never through this process, which only says who does what: each model has one image at work and one
waiting, so that memory stays bounded whatever the number of images, and there is no block of images that could be
unevenly large. An actor that dies is started again elsewhere; what it had in hand begins again, and what it had already
written is found and not made twice. An image whose workers end again and again is reported as failed.
"""

from __future__ import annotations

import logging
import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from progidiff.errors import ModelError, ProGiDiffError, RequestError
from progidiff.evaluation.prelabel import Answered, ImageOutcome, Item, Opened
from progidiff.prelabelling.pipeline import POLL_SECONDS, Job, Source

logger = logging.getLogger(__name__)

AT_WORK = 2
"""Images that one actor has: one at work, one waiting."""

_CPUS_PER_MODEL = 4.0
"""Of a model without a GPU; more cores gain little."""


@dataclass(frozen=True)
class Plan:
    """Which actors there are.

    Attributes:
        models: How many compute.
        gpus: Of each, a part of one too.
        model_cpus: Of each.
        hands: How many read and write.
        hand_cpus: Of each.
    """

    models: int
    gpus: float
    model_cpus: float
    hands: int
    hand_cpus: float


def plan_actors(
    resources: Mapping[str, float], workers: int | None = None, gpus_per_worker: float | None = None
) -> Plan:
    """What to start on a cluster.

    Args:
        resources: Of the whole cluster, as `ray.cluster_resources` says.
        workers: Models; None for as many as fit.
        gpus_per_worker: Of each model; None for 1 where there are GPUs. 0.5 puts two on each GPU.

    Raises:
        RequestError: if GPUs are asked for and there are none, or parts of them that Ray cannot give.

    Example:
        >>> plan_actors({"CPU": 32.0, "GPU": 4.0}, gpus_per_worker=0.5)
        Plan(models=8, gpus=0.5, model_cpus=1.0, hands=16, hand_cpus=1.0)
        >>> plan_actors({"CPU": 8.0})
        Plan(models=2, gpus=0.0, model_cpus=3.0, hands=2, hand_cpus=1.0)
    """
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    share = (1.0 if gpus else 0.0) if gpus_per_worker is None else gpus_per_worker
    if share < 0 or (share > 1 and share != int(share)):
        raise RequestError(f"--gpus-per-worker {share:g} must be 0, a part of 1 such as 0.5, or a whole number.")
    if share and not gpus:
        raise RequestError(
            f"--gpus-per-worker {share:g} asks for GPUs, and the cluster has none. Leave it out, or start its machines "
            "with them (`ray start --num-gpus`)."
        )
    per_gpu = math.floor(1 / share + 1e-9) if 0 < share < 1 else 0
    fitting = int(gpus) * per_gpu if per_gpu else int(gpus // share) if share else max(1, int(cpus // _CPUS_PER_MODEL))
    models = workers or max(1, fitting)
    if share and models > fitting:
        logger.warning("%d models are asked for and the GPUs of the cluster hold %d: the others wait", models, fitting)
    model_cpus = 1.0 if share else max(1.0, min(_CPUS_PER_MODEL, (cpus - models) // models))
    left = cpus - models * model_cpus
    return Plan(models, share, model_cpus, max(1, min(2 * models, int(left))), 1.0 if left >= 1 else 0.0)


class Hand:
    """Reads and writes, in a process of the cluster."""

    def __init__(self, job: Job) -> None:
        self._prelabeller = job.make()

    def ping(self) -> int:
        """Number of its process, once it has started."""
        return os.getpid()

    def read(self, item: Item) -> tuple[ImageOutcome | None, Opened | None]:
        """See `Prelabeller.read`; one of both is None, so that the voxels stay where they are."""
        result = self._prelabeller.read(item)
        return (result, None) if isinstance(result, ImageOutcome) else (None, result)

    def write(self, answered: Answered) -> ImageOutcome:
        """See `Prelabeller.write`."""
        return self._prelabeller.write(answered)


class Model:
    """Computes, in a process of the cluster that has a GPU to itself or shares one."""

    def __init__(self, job: Job, gpus: float) -> None:
        # Ray shows a process only the GPUs that are its own.
        device = job.device or ("cuda" if gpus else "cpu")
        self._prelabeller = replace(job, device=device).make()

    def ping(self) -> int:
        """Number of its process, once it has started."""
        return os.getpid()

    def compute(self, opened: Opened) -> tuple[ImageOutcome | None, Answered | None]:
        """See `Prelabeller.compute`; one of both is None."""
        result = self._prelabeller.compute(opened)
        return (result, None) if isinstance(result, ImageOutcome) else (None, result)


@dataclass(eq=False)
class _Worker:
    """An actor: whether it answers, and how much it has to do."""

    handle: Any
    is_up: bool = False
    load: int = 0


@dataclass(eq=False)
class _Task:
    """What one actor was asked; of "read" and "compute", `result` is where the image then lies."""

    kind: Literal["ping", "read", "compute", "write"]
    worker: _Worker
    item: Item | None = None
    result: Any = None
    weight: int = 0


class _Dispatcher:
    """Says who does what."""

    def __init__(self, job: Job, source: Source, plan: Plan) -> None:
        import ray

        self._ray = ray
        self._source = source
        self._most_deaths = job.retries + 1
        forever = {"max_restarts": -1, "max_task_retries": 0}
        hand = ray.remote(num_cpus=plan.hand_cpus, **forever)(Hand)
        model = ray.remote(num_cpus=plan.model_cpus, num_gpus=plan.gpus, **forever)(Model)
        self._hands = [_Worker(hand.remote(job)) for _ in range(plan.hands)]
        self._models = [_Worker(model.remote(job, plan.gpus)) for _ in range(plan.models)]
        self._tasks: dict[Any, _Task] = {}
        self._deaths: dict[str, int] = {}
        self._again: deque[Item] = deque()
        self._opened: deque[tuple[Item, Any]] = deque()
        self._answered: deque[tuple[Item, Any]] = deque()
        for worker in [*self._hands, *self._models]:
            self._ping(worker)

    def run(self) -> Iterator[ImageOutcome]:
        """Everything, in the order in which it gets done."""
        try:
            while True:
                self._hand_out()
                busy = [ref for ref, task in self._tasks.items() if task.kind != "ping"]
                if not busy and not self._opened and not self._answered and not self._again and self._source.is_empty:
                    return
                ready, _ = self._ray.wait(list(self._tasks), num_returns=1, timeout=POLL_SECONDS)
                for ref in ready:
                    outcome = self._finish(self._tasks.pop(ref), ref)
                    if outcome is not None:
                        yield outcome
        finally:
            for worker in [*self._hands, *self._models]:
                self._ray.kill(worker.handle)

    def _hand_out(self) -> None:
        """Give everybody who is free something to do: what is furthest first, so that memory is given back."""
        while self._answered and (hand := self._find_free(self._hands)) is not None:
            item, ref = self._answered.popleft()
            self._ask("write", hand, item, hand.handle.write.remote(ref), None)
        while self._opened and (model := self._find_free(self._models, self._weigh(self._opened[0][0]))) is not None:
            item, ref = self._opened.popleft()
            known, result = model.handle.compute.options(num_returns=2).remote(ref)
            self._ask("compute", model, item, known, result)
        reading = sum(task.kind in ("read", "compute") for task in self._tasks.values())
        most = AT_WORK * len(self._models) + len(self._hands)
        while (
            reading + len(self._opened) < most
            and (hand := self._find_free(self._hands)) is not None
            and (item_ := self._again.popleft() if self._again else self._source.take()) is not None
        ):
            known, result = hand.handle.read.options(num_returns=2).remote(item_)
            self._ask("read", hand, item_, known, result)
            reading += 1

    def _ask(
        self, kind: Literal["read", "compute", "write"], worker: _Worker, item: Item, ref: Any, result: Any
    ) -> None:
        weight = self._weigh(item) if kind == "compute" else 1
        worker.load += weight
        self._tasks[ref] = _Task(kind, worker, item, result, weight)

    def _weigh(self, item: Item) -> int:
        """An image whose worker ended has the next one to itself: nobody else's should end with it."""
        return AT_WORK if item.image in self._deaths else 1

    def _find_free(self, workers: list[_Worker], weight: int = 1) -> _Worker | None:
        free = [worker for worker in workers if worker.is_up and worker.load + weight <= AT_WORK]
        return min(free, key=lambda worker: worker.load, default=None)

    def _ping(self, worker: _Worker) -> None:
        worker.is_up = False
        self._tasks[worker.handle.ping.remote()] = _Task("ping", worker)

    def _finish(self, task: _Task, ref: Any) -> ImageOutcome | None:
        """Take what an actor says; an image goes on to its next step, or back to the beginning."""
        errors = self._ray.exceptions
        task.worker.load -= task.weight
        try:
            known = self._ray.get(ref)
        except errors.RayTaskError as err:
            if isinstance(err.cause, ProGiDiffError):
                raise err.cause from err
            return self._begin_again(task, err)
        except errors.RayError as err:  # The actor, its machine, or what it was to read is gone.
            return self._begin_again(task, err)
        if task.kind == "ping":
            task.worker.is_up = True
            return None
        assert task.item is not None
        if known is not None:
            return known  # type: ignore[no-any-return]  # Ray's references have no types
        (self._opened if task.kind == "read" else self._answered).append((task.item, task.result))
        return None

    def _begin_again(self, task: _Task, err: Exception) -> ImageOutcome | None:
        if "creation task" in str(err):
            reason = str(getattr(err, "cause", None) or err).strip().splitlines()[-1]
            raise ModelError(
                f"A worker of the cluster could not start ({reason}). Every machine must have this package, the model "
                "and the folders under the same paths."
            ) from err
        if task.worker.is_up or task.kind == "ping":
            self._ping(task.worker)
        if task.item is None:
            return None
        image = task.item.image
        self._deaths[image] = self._deaths.get(image, 0) + 1
        logger.warning("The worker of '%s' is gone (%s); the image begins again", image, type(err).__name__)
        if self._deaths[image] < self._most_deaths:
            self._again.append(task.item)
            return None
        reason = (
            f"Its worker ended {self._deaths[image]} times ({type(err).__name__}); it may need more memory than a "
            "machine of the cluster has."
        )
        return ImageOutcome(image, "failed", reason, address=task.item.address, attempts=self._deaths[image])


def connect(address: str | None) -> None:
    """Join a Ray cluster, or start one on this machine.

    Raises:
        RequestError: if Ray is not installed, or the cluster does not answer.
    """
    try:
        import ray
    except ImportError as err:
        raise RequestError(
            "Ray is not installed. `pip install 'progidiff[ray]'` brings it, or leave --ray out."
        ) from err
    if ray.is_initialized():
        return
    try:
        ray.init(address=address, include_dashboard=None if address else False, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as err:
        reason = " ".join(str(err).split())[:200]
        raise RequestError(
            f"The Ray cluster '{address}' does not answer ({reason}). `ray status` on one of its machines says whether "
            "it is up."
        ) from err


def run_on_ray(
    job: Job, source: Source, workers: int | None = None, gpus_per_worker: float | None = None
) -> Iterator[ImageOutcome]:
    """Label what a source gives on the cluster that this process has joined (`connect`).

    Raises:
        RequestError: if the cluster has not what is asked for.
        ModelError: if a worker cannot start.
        StoreError: if a label cannot be written.
    """
    import ray

    plan = plan_actors(ray.cluster_resources(), workers, gpus_per_worker)
    yield from _Dispatcher(job, source, plan).run()
