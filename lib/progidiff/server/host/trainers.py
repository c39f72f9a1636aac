"""The trainers as the host sees them: their options, and how far the training is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from progidiff.server.trainings import describe_for_host, describe_stats
from progidiff.training_runs.options import DESCRIPTIONS, TRAINERS, get_defaults
from progidiff.training_runs.runner import TrainingRunner


class RunnerTrainTask(TrainTask):
    """One trainer of the runner.

    Args:
        trainer: One of `TRAINERS`.
        runner: Gives the app's runner.
    """

    def __init__(self, trainer: str, runner: Callable[[], TrainingRunner]) -> None:
        super().__init__(DESCRIPTIONS[trainer])
        self.trainer = trainer
        self._runner = runner

    def config(self) -> dict[str, Any]:
        """The options with their defaults."""
        return get_defaults(self.trainer)

    def stats(self) -> dict[str, Any]:
        """The run under way, whichever trainer's it is, or the last one: viewers read the first trainer's only."""
        return describe_stats(self._runner().status())

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train and wait for the end, for calls that the host makes itself."""
        runner = self._runner()
        runner.start(self.trainer, request)
        runner.wait()
        return describe_for_host(runner.status()).model_dump(exclude_unset=True)


def build_trainers(runner: Callable[[], TrainingRunner]) -> dict[str, TrainTask]:
    """All trainers by name."""
    return {trainer: RunnerTrainTask(trainer, runner) for trainer in TRAINERS}
