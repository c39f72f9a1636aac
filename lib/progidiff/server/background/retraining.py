"""Training that starts by itself after so many newly annotated slices, and scores that follow the model.

Slices count as new until a training that read them is done: one that fails uses up nothing, the next save tries again.
What came together while a training ran starts the next one when it ends. A training that a person stopped is a
decision: it counts as done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from progidiff.active_learning.advice import describe_countdown
from progidiff.errors import BusyError, ProGiDiffError, RequestError
from progidiff.labels.history import Annotation, AnnotationStore
from progidiff.proposals.request import AUTO
from progidiff.server.options import ServerOptions
from progidiff.training_runs.mark import MarkFile
from progidiff.training_runs.options import TRAINERS, FamilyName, TrainingOptions, find_family, get_defaults
from progidiff.training_runs.runner import ACTIVE, TrainingRunner
from progidiff.training_runs.status import RunStatus

logger = logging.getLogger(__name__)

USER = "retrain_after"
"""Who is said to have started a training that started by itself."""

BY_IMAGE = AUTO
"""As `--conf retrain_task`: pictures are trained on with textdiff, volumes with progidiff_adapt."""


@dataclass(frozen=True)
class _Plan:
    """One of the trainings that may start by themselves.

    Attributes:
        trainer: One of `TRAINERS`.
        params: Its parameters.
        pictures: Of which images slices count: True for pictures, False for volumes, None for both.
    """

    trainer: str
    params: Mapping[str, str]
    pictures: bool | None

    @property
    def family(self) -> FamilyName:
        """What it makes versions of."""
        return find_family(self.trainer)

    def takes(self, is_a_picture: bool) -> bool:
        """Whether it learns from such an image."""
        return self.pictures in (None, is_a_picture)


class Retraining:
    """Counts after every save and after every training, starts trainings, and says so.

    Args:
        options: From `--conf`.
        annotations: The label history.
        training: Starts and watches trainings.
        is_picture: Whether an image, named by its id, is a picture.
        wake_scorer: Called when another version is served.

    Raises:
        RequestError: if `--conf retrain_task` names no trainer, or `retrain_params` something that it does not have.
    """

    def __init__(
        self,
        options: ServerOptions,
        annotations: AnnotationStore,
        training: TrainingRunner,
        is_picture: Callable[[str], bool],
        wake_scorer: Callable[[], None],
    ) -> None:
        self._annotations = annotations
        self._training = training
        self._is_picture = is_picture
        self._wake_scorer = wake_scorer
        self._after = options.retrain_after
        self._mark = MarkFile(options.store / "retrain.json")
        self._started: dict[str, int] = {}
        self._lock = threading.RLock()
        task = options.retrain_task
        if task not in (BY_IMAGE, *TRAINERS):
            raise RequestError(
                f"--conf retrain_task {task[:60]}: there is no such trainer; there are "
                f"{', '.join((BY_IMAGE, *TRAINERS))}."
            )
        params = read_params(options.retrain_params)
        if task == BY_IMAGE:
            # Either trainer takes what it has of the parameters.
            picked = {
                trainer: {k: v for k, v in params.items() if k in get_defaults(trainer)}
                for trainer in ("progidiff_adapt", "textdiff")
            }
            strange = sorted(params.keys() - {name for part in picked.values() for name in part})
            self._plans = [_Plan(trainer, part, trainer == "textdiff") for trainer, part in picked.items()]
        else:
            _, ignored = TrainingOptions.from_params(task, params)
            strange = list(ignored)
            self._plans = [_Plan(task, params, None if find_family(task) == "textdiff" else False)]
        for plan in self._plans:
            TrainingOptions.from_params(
                plan.trainer, plan.params
            )  # a wrong one is told at the start, not after the first labels
        if strange:
            raise RequestError(
                "--conf retrain_params: trainer "
                f"{' or '.join(plan.trainer for plan in self._plans)} has no {', '.join(strange)}."
            )

    def on_saved(self, annotation: Annotation) -> dict[str, Any]:
        """What a saved label means for the next training; for `Context.on_saved`.

        Returns:
            "retrain": message, slices, after, started (whether a training started now) and run (its id); nothing if
            trainings do not start by themselves.
        """
        if not self._after:
            return {}
        with self._lock:
            pictured = self._is_picture(annotation.image)
            plan = next((plan for plan in self._plans if plan.takes(pictured)), None)
            told: dict[str, Any] = {"slices": 0, "after": self._after, "started": False, "run": ""}
            if plan is None:
                message = (
                    f"Pictures do not count here: {self._plans[0].trainer} learns from volumes. --conf retrain_task "
                    f"{BY_IMAGE} trains on both."
                )
                return {"retrain": {**told, "message": message}}
            slices = told["slices"] = self._count(plan)
            if slices < self._after:
                return {"retrain": {**told, "message": describe_countdown(slices, self._after)}}
            before = self._training.status()
            try:
                run = self._start(plan)
            except BusyError as err:
                message = (
                    f"{slices} new slices are enough for a training, which starts when the one under way ends. {err}"
                )
                return {"retrain": {**told, "message": message}}
            except ProGiDiffError as err:
                logger.warning("No training after %d new slices: %s", slices, err)
                return {
                    "retrain": {
                        **told,
                        "message": f"{slices} new slices are enough for a training, but it cannot start: {err}",
                    }
                }
            message = (
                f"{slices} new slices: a training has started. Its version is served if "
                "it is better; GET /train/ shows how far it is."
            )
            if before.state == "failed" and before.user == USER:
                message += f" The one before failed: {before.reason}"
            return {"retrain": {**told, "message": message, "started": True, "run": run}}

    def on_ended(self, run: RunStatus) -> None:
        """A training ended: move the mark, and start the next one if enough came meanwhile; for `Context.on_ended`."""
        with self._lock:
            self._note(run)
            # Its own failure would only repeat itself, and who stopped a training wants the device: the next save tries
            # again.
            plans = [
                plan for plan in self._plans if run.state == "done" or run.user != USER or plan.trainer != run.trainer
            ]
            self._start_what_is_due([] if run.state == "stopped" else plans)

    def on_published(self, version: str) -> None:
        """Another version is served: its proposals need scores; for `Context.on_published`."""
        logger.info("%s is served: the pool is scored again", version or "The model itself")
        self._wake_scorer()

    def resume(self) -> None:
        """Continue a training that started by itself and ended with the server (the checkpoints are there), or start
        one that is due.
        """
        if not self._after:
            return
        with self._lock:
            for run in reversed(self._training.history()):
                self._note(run)
            last = self._training.status()
            if last.state == "interrupted" and last.user == USER:
                try:
                    plan = next((plan for plan in self._plans if plan.trainer == last.trainer), None)
                    if plan is not None:
                        logger.info("The training that ended with the server goes on as %s", self._start(plan))
                        return
                except ProGiDiffError as err:
                    logger.warning("The training that ended with the server does not go on: %s", err)
            # What failed or was stopped waits for the next save.
            self._start_what_is_due([plan for plan in self._plans if last.state in ("idle", "done")])

    def _start_what_is_due(self, plans: list[_Plan]) -> None:
        """Start the first training that has enough slices; the next one follows when it ends."""
        for plan in plans if self._after else []:
            slices = self._count(plan)
            if slices < self._after:
                continue
            try:
                logger.info("%d new slices: training %s has started", slices, self._start(plan))
            except ProGiDiffError as err:
                logger.warning("No training after %d new slices: %s", slices, err)
            return

    def _start(self, plan: _Plan) -> str:
        """Start a training now; its id."""
        sequence = self._annotations.last_sequence()
        run = self._training.start(plan.trainer, plan.params, USER).id
        self._started[run] = sequence
        return run

    def _count(self, plan: _Plan) -> int:
        """Newly annotated slices since what was trained on, or is being trained on."""
        since = self._mark.load().of(plan.family)
        run = self._training.status()
        if run.state in ACTIVE and self._counts(run) and find_family(run.trainer) == plan.family:
            since = max(since, self._find_sequence(run))
        return self._annotations.count_slices_since(
            since, None if plan.pictures is None else lambda image: plan.takes(self._is_picture(image))
        )

    def _note(self, run: RunStatus) -> None:
        """Move the mark to what a training has read, if it is done."""
        if run.state not in ("done", "stopped") or not self._counts(run):
            return
        mark, family = self._mark.load(), find_family(run.trainer)
        if self._find_sequence(run) <= mark.of(family):
            return
        moved = mark.moved(family, self._find_sequence(run))
        try:
            self._mark.save(moved)
        except OSError as err:
            logger.warning(
                "What was trained on is not written down (%s); after a restart these labels count as new.", err
            )

    def _counts(self, run: RunStatus) -> bool:
        """Whether a training learned from all labels: not a manual one on some of them only, nor a manual one that was
        stopped.
        """
        if run.trainer not in TRAINERS:
            return False
        if run.user == USER:
            return True
        try:
            options, _ = TrainingOptions.from_params(run.trainer, run.params)
        except RequestError:
            return False
        return run.state != "stopped" and not (options.shots or options.slices or options.cases or options.structures)

    def _find_sequence(self, run: RunStatus) -> int:
        """The last event of the label history that a training has read; 0 if that is not known."""
        return run.sequence or self._started.get(run.id, 0)


def read_params(text: str) -> dict[str, str]:
    """``name=value,name=value`` as a mapping.

    Raises:
        RequestError: if an entry has no value.

    Example:
        >>> read_params("steps=100, name=site")
        {'steps': '100', 'name': 'site'}
    """
    values = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = entry.partition("=")
        if not equals or not name.strip():
            raise RequestError(
                f"--conf retrain_params has '{entry[:60]}'; write name=value,name=value, for example steps=100."
            )
        values[name.strip()] = value.strip()
    return values
