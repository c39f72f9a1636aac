"""Training over HTTP: the host's addresses with the host's answers, and ours for history and versions.

The host would train in a process that outlives it, queue trainings without end, and kill what is to be stopped. Here
one training runs at a time (503 with Retry-After while another does), and stopping waits for a clean checkpoint.
"""

from __future__ import annotations

import logging
from typing import Any

from pydantic import BaseModel, ConfigDict

from progidiff.errors import NotFoundError, RequestError
from progidiff.server.families import find_family
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ADMINISTER, CALLER, MEDIUM, READ, Content, Endpoints
from progidiff.server.parts import get_context
from progidiff.server.trainings import TrainingTask, describe_for_host, list_families
from progidiff.server.version_answers import NamedVersions, ServedVersion
from progidiff.training_runs.options import TRAINERS
from progidiff.training_runs.status import RunStatus

logger = logging.getLogger(__name__)

_STOP_WAIT_SECONDS = 10.0
_MAX_VERSION = 10**9


class StartedTraining(BaseModel):
    """A training that was started, as the host tells it of each trainer.

    Attributes:
        result: The training.
        detail: Always null.
    """

    model_config = ConfigDict(frozen=True)

    result: TrainingTask
    detail: None


class TrainingAnswer(RunStatus):
    """The training under way, or else the last one.

    Attributes:
        running: Whether one is under way.
        history: The last runs, newest first.
    """

    running: bool
    history: list[RunStatus]


# long because it is a table: one endpoint after the other, each a few lines.
def build_endpoints() -> Endpoints:
    """Start, watch and stop a training; versions."""
    endpoints = Endpoints()

    @endpoints.get(
        "/train/",
        READ,
        tags=["Train"],
        summary="The training under way, or the last one",
        takes="Query: all, check_if_running",
        response_model_exclude_unset=True,
    )
    def get_status(all: bool = False, check_if_running: bool = False) -> TrainingTask | list[TrainingTask]:
        runner = get_context().training
        if check_if_running and not runner.is_running():
            raise NotFoundError(
                "No training is running. POST /train/progidiff, /train/progidiff_adapt or /train/textdiff starts one."
            )
        runs = runner.history() if all else [runner.status()]
        if not runs or runs[0].state == "idle":
            raise NotFoundError(
                "No training was started yet. POST /train/progidiff, "
                "/train/progidiff_adapt or /train/textdiff starts one."
            )
        tasks = [describe_for_host(run) for run in reversed(runs)]
        return tasks if all else tasks[0]

    @endpoints.post(
        "/train/",
        ADMINISTER,
        tags=["Train"],
        summary="Start a training: of the one trainer that the options name, else of progidiff",
        takes="JSON: options of the trainers",
        body=MEDIUM,
        content=Content.PARAMS,
        response_model_exclude_unset=True,
    )
    def start_default(
        params: dict[str, Any] | None = None, run_sync: bool = False, user: User = CALLER
    ) -> dict[str, StartedTraining]:
        # OHIF's button means "train"; the host would start all trainers one after the other.
        named = [name for name in TRAINERS if isinstance((params or {}).get(name), dict)]
        trainer = named[0] if len(named) == 1 else next(iter(TRAINERS))
        options = (params or {}).get(trainer, {}) if named else params
        return {trainer: StartedTraining(result=_start(trainer, options, run_sync, user), detail=None)}

    @endpoints.post(
        "/train/{model}",
        ADMINISTER,
        tags=["Train"],
        summary="Start a training",
        takes="JSON: options of the trainer",
        body=MEDIUM,
        content=Content.PARAMS,
        response_model_exclude_unset=True,
    )
    def start(
        model: str,
        params: dict[str, Any] | None = None,
        run_sync: bool = False,
        enqueue: bool = False,
        user: User = CALLER,
    ) -> TrainingTask:
        return _start(model, params, run_sync, user)

    @endpoints.delete(
        "/train/",
        ADMINISTER,
        tags=["Train"],
        summary="Stop the training after a clean checkpoint",
        response_model_exclude_unset=True,
    )
    def stop(user: User = CALLER) -> TrainingTask | None:
        status = get_context().training.stop(wait=_STOP_WAIT_SECONDS)
        logger.info("Training stopped by '%s'", user.name)
        return None if status is None else describe_for_host(status)

    @endpoints.get(
        "/progidiff/training",
        READ,
        tags=["ProGiDiff"],
        summary="The training under way or the last one, and earlier ones",
        takes="Query: limit",
        response_model_exclude_unset=True,
    )
    def describe_training(limit: int = 20) -> TrainingAnswer:
        if not 0 <= limit <= 1000:
            raise RequestError(f"Query limit is {limit}; it must be a whole number from 0 to 1000.")
        runner = get_context().training
        return TrainingAnswer(
            **runner.status().model_dump(exclude_unset=True),
            running=runner.is_running(),
            history=runner.history(limit) if limit else [],
        )

    @endpoints.get(
        "/progidiff/versions",
        READ,
        tags=["ProGiDiff"],
        summary="Adapters and textdiff models, their versions with Dice and verdict, and which are served",
        response_model_exclude_unset=True,
    )
    def get_versions() -> list[NamedVersions]:
        families = list_families(get_context())
        return [versions for family in families for versions in family.list_versions()]

    @endpoints.post(
        "/progidiff/versions/{name}/{version}/use",
        ADMINISTER,
        tags=["ProGiDiff"],
        summary="Serve this version from the next request on",
    )
    def use(name: str, version: int, user: User = CALLER) -> ServedVersion:
        if not 1 <= version < _MAX_VERSION:
            raise RequestError(
                f"Version {version} cannot be: versions count 1, 2, 3. GET /progidiff/versions lists them."
            )
        context = get_context()
        served = find_family(list_families(context), name).use(name, version)
        logger.info("%s is served, by '%s'", served, user.name)
        context.training.announce(served)
        return ServedVersion(name=name, served=served)

    @endpoints.post(
        "/progidiff/versions/{name}/rollback",
        ADMINISTER,
        tags=["ProGiDiff"],
        summary="Serve what was served before; in the end the model itself",
    )
    def roll_back(name: str, user: User = CALLER) -> ServedVersion:
        context = get_context()
        served = find_family(list_families(context), name).roll_back(name)
        logger.info("%s is rolled back to '%s', by '%s'", name, served, user.name)
        context.training.announce(served)
        return ServedVersion(name=name, served=served)

    return endpoints


def _start(trainer: str, params: dict[str, Any] | None, run_sync: bool, user: User) -> TrainingTask:
    if trainer not in TRAINERS:
        raise NotFoundError(f"There is no trainer '{trainer[:64]}'; this server has {', '.join(TRAINERS)}.")
    if run_sync:
        raise RequestError(
            "run_sync is not offered: a training takes longer than a request may. Leave it out and poll GET /train/."
        )
    status = get_context().training.start(trainer, params, user.name)
    logger.info("Training %s (%s) started by '%s'", status.id, trainer, user.name)
    return describe_for_host(status)
