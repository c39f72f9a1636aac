"""What is told of a training, from its files and from the server that runs it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from progidiff.storage.json_text import Text


class RunFacts(BaseModel):
    """What is told of a run wherever it is listed. Before the first run only `state` and `message` are set.

    Attributes:
        state: "idle" if there never was one, "starting", "running", "stopping", "done", "failed", "stopped" or
            "interrupted".
        message: The same as a sentence, with what came out of it.
        trainer: One of `TRAINERS`.
        params: As they were asked for.
        ignored: Names of parameters that mean nothing to the trainer.
        user: Who asked for it.
        stage: What it is at.
        step, total: Of the stage.
        eta_seconds: Until the end of the stage; None if not known.
        best_metric: Dice on the held-back slices.
        reason: Why it failed and what to do about it, else "".
        published: Whether the new version is served.
        version: The version that was written, ``name@version``, else "".
        figures: Dice of "base", "current" and "adapted", see `Outcome`.
        data: Which images it learns from and which are held back.
        sequence: The last event of the label history that it read; 0 if not known.
        paused: Whether it gives way to requests that want the device.
        started, ended: Seconds since 1970; None while it lasts.
    """

    # What a later version writes into the files of a run is passed over.
    model_config = ConfigDict(frozen=True, extra="ignore")

    state: str
    message: Text
    trainer: Text = ""
    params: dict[str, Any] = {}
    ignored: list[Text] = []
    user: Text = ""
    stage: Text = ""
    step: int = 0
    total: int = 0
    eta_seconds: float | None = None
    best_metric: float = 0.0
    reason: Text = ""
    published: bool = False
    version: Text = ""
    figures: dict[Text, dict[Text, float | None]] = {}
    data: dict[str, Any] = {}
    sequence: int = 0
    paused: bool = False
    started: float = 0.0
    ended: float | None = None


class RunStatus(RunFacts):
    """A run, as the runner tells it.

    Attributes:
        id: Its folder's name; a later run's sorts behind it.
        log: File with what the process and its libraries print.
    """

    id: str = ""
    log: str = ""
