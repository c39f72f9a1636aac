"""Training that starts by itself after so many newly annotated slices, and scores that follow the model."""

from __future__ import annotations

import logging
import threading
from typing import Any

from progidiff.annotations import Annotation
from progidiff.errors import BusyError, ProGiDiffError, RequestError
from progidiff.retrain import Mark, MarkFile, describe_countdown
from progidiff.server.context import Context
from progidiff.training_options import TRAINERS, TrainingOptions

logger = logging.getLogger(__name__)

USER = "retrain_after"
"""Who is said to have started a training that started by itself."""


class Retraining:
    """Counts after every save, starts trainings, and says so.

    Args:
        context: With the label history and the runner.

    Raises:
        RequestError: if `--conf retrain_task` names no trainer, or `retrain_params` something that it does not have.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._after = context.options.retrain_after
        self._task = context.options.retrain_task
        self._mark = MarkFile(context.options.store / "retrain.json")
        self._lock = threading.Lock()
        if self._task not in TRAINERS:
            raise RequestError(f"--conf retrain_task {self._task[:60]}: there is no such trainer; there are {', '.join(TRAINERS)}.")
        self._params = read_params(context.options.retrain_params)
        _, ignored = TrainingOptions.from_params(self._task, self._params)  # a wrong one is told at the start, not after the first labels
        if ignored:
            raise RequestError(f"--conf retrain_params: trainer {self._task} has no {', '.join(ignored)}.")

    def count(self) -> int:
        """Newly annotated slices since the last training."""
        return self._context.annotations.count_slices_since(self._mark.load().sequence)

    def on_saved(self, annotation: Annotation) -> dict[str, Any]:
        """What a saved label means for the next training; for `Context.on_saved`.

        Returns:
            "retrain": message, slices, after, started (whether a training started now) and run (its id); nothing if trainings do not
            start by themselves.
        """
        if not self._after:
            return {}
        with self._lock:
            self._note_manual_run(annotation.sequence - 1)
            slices = self.count()
            told: dict[str, Any] = {"slices": slices, "after": self._after, "started": False, "run": ""}
            if slices < self._after:
                return {"retrain": {**told, "message": describe_countdown(slices, self._after)}}
            try:
                run = self._context.training.start(self._task, self._params, USER)
            except BusyError as err:
                message = f"{slices} new slices are enough for a training, which starts with a save after the one under way. {err}"
                return {"retrain": {**told, "message": message}}
            except ProGiDiffError as err:
                logger.warning("No training after %d new slices: %s", slices, err)
                return {"retrain": {**told, "message": f"{slices} new slices are enough for a training, but it cannot start: {err}"}}
            self._set(Mark(annotation.sequence, str(run["id"]), automatic=True))
            message = f"{slices} new slices: a training has started. Its version is served if it is better; GET /train/ shows how far it is."
            return {"retrain": {**told, "message": message, "started": True, "run": run["id"]}}

    def on_published(self, version: str) -> None:
        """Another version is served: its proposals need scores; for `Context.on_published`."""
        logger.info("%s is served: the pool is scored again", version or "The model itself")
        self._context.scorer.wake()

    def resume(self) -> None:
        """Continue a training that started by itself and ended with the server; the checkpoints are there."""
        mark = self._mark.load()
        last = self._context.training.status()
        if not self._after or not mark.automatic or last.get("id") != mark.run or last["state"] != "interrupted":
            return
        try:
            run = self._context.training.start(self._task, self._params, USER)
            self._set(Mark(mark.sequence, str(run["id"]), automatic=True))
            logger.info("The training that ended with the server goes on as %s", run["id"])
        except ProGiDiffError as err:
            logger.warning("The training that ended with the server does not go on: %s", err)

    def _note_manual_run(self, sequence: int) -> None:
        """A training that somebody started since the last save has seen all labels before this one."""
        last, mark = self._context.training.status(), self._mark.load()
        if last.get("id") and last["id"] != mark.run and sequence >= mark.sequence:
            self._set(Mark(sequence, str(last["id"])))

    def _set(self, mark: Mark) -> None:
        try:
            self._mark.save(mark)
        except OSError as err:
            logger.warning("What was trained on is not written down (%s); after a restart these labels count as new.", err)


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
            raise RequestError(f"--conf retrain_params has '{entry[:60]}'; write name=value,name=value, for example steps=100.")
        values[name.strip()] = value.strip()
    return values
