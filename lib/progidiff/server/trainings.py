"""The server's trainings: gathers labels from the datastore for a run, says what they make versions of, and describes
runs for clients.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from progidiff.errors import ProGiDiffError, RequestError
from progidiff.images.formats import is_picture
from progidiff.labels.history import FINAL
from progidiff.model.adapters import compute_base_digest
from progidiff.server import picture_trainings
from progidiff.server.datastores.images import find_image
from progidiff.server.datastores.local import is_folder
from progidiff.server.families import Family
from progidiff.server.parts import Context
from progidiff.server.tasks.pictures import NAME
from progidiff.storage.json_text import Text
from progidiff.training.accepted_labels import AcceptedLabel, build_cases, load_folder_names, to_json
from progidiff.training_runs.options import TrainingOptions, find_family
from progidiff.training_runs.runner import ACTIVE, TrainingRunner
from progidiff.training_runs.status import RunFacts, RunStatus

logger = logging.getLogger(__name__)

HOST_STATES = {
    **dict.fromkeys(ACTIVE, "RUNNING"),
    "done": "DONE",
    "failed": "ERROR",
    "interrupted": "ERROR",
    "stopped": "STOPPED",
}
"""What the host's clients call the state of a run: they look for RUNNING and show the other words."""

_HOST_TIME = "%Y-%m-%d %H:%M:%S"


def build_runner(context: Context) -> TrainingRunner:
    """The runner of this server; starts nothing. It gives way to requests that want the device."""

    def check() -> None:
        if not _list_labelled(context):
            raise RequestError(
                "No image has an accepted label yet. Save a label with tag final (Submit "
                "Label in 3D Slicer), then train."
            )

    runner = TrainingRunner(
        context.options.store / "training",
        lambda options: collect(context, options),
        check,
        context.on_published,
        nice=context.options.training_nice,
        on_ended=context.on_ended,
    )
    context.infer.queue.on_demand.append(runner.set_demand)
    return runner


def collect(context: Context, options: TrainingOptions) -> dict[str, Any]:
    """What a run needs to know: the accepted labels as they are now, and the model.

    Images that are gone or cannot be fetched are left out with a line in the log.

    Raises:
        RequestError: if nothing is left to train on, or labels.json is damaged.
    """
    datastore = context.app.datastore()
    local = is_folder(context.app.studies)
    sequence = context.annotations.last_sequence()  # First: a label that comes while these are gathered counts as new.
    labels = []
    for image in _list_labelled(context):
        try:
            path = Path(find_image(context.app, image))
        except ProGiDiffError as err:
            logger.warning("'%s' is left out of the training: %s", image, err)
            continue
        current = context.annotations.current(image)
        if local or current is None:
            label, info = Path(datastore.get_label_uri(image, FINAL)), datastore.get_label_info(image, FINAL)
        else:
            # What a DICOMweb server gives back has lost its empty slices; the history has the label as it was saved.
            label, info = context.annotations.label_file(current), {}
        labels.append(AcceptedLabel(image, path, label, info, datastore.get_image_info(image)))
    table = Path(context.app.studies) if local else context.options.store
    own = context.infer.own
    cases = build_cases(labels, load_folder_names(table), context.annotations, own)
    if not cases:
        raise RequestError(
            "No slice of any image is annotated, or the images are gone. Save a label with tag final, then train."
        )
    engine = context.infer.engine
    if find_family(options.trainer) == "textdiff":
        return {
            **picture_trainings.collect(context.textdiff, options, cases, context.options.training_device),
            "sequence": sequence,
        }
    cases = [case for case in cases if not is_picture(case.image)]
    if not cases:
        raise RequestError(
            "Only pictures have accepted labels, and this trainer learns from volumes. "
            "POST /train/textdiff trains on them."
        )
    return {
        "cases": to_json(cases),
        "declared": [] if own is None else list(own.declared()),
        "model_dir": str(engine.model_dir),
        "adapters": str(engine.adapters.root),
        "backbone": context.options.backbone,
        "device": context.options.training_device,
        "sequence": sequence,
    }


class TrainingTask(RunFacts):
    """A run as the host describes a task, with ours beside it: viewers read id, status, start_ts, end_ts, result and
    the last of details.

    Attributes:
        id: Of the run.
        status: See `HOST_STATES`.
        request: "model" is the trainer, beside it are the parameters.
        start_ts: Local time.
        end_ts: The same; not there while it lasts.
        details, result: What is to be said.
    """

    id: str
    status: str
    request: dict[str, Any]
    start_ts: str
    details: list[Text]
    result: Text
    end_ts: str = ""


def describe_for_host(status: RunStatus) -> TrainingTask:
    """A run in the host's form."""
    told = status.message or status.state
    task = {
        "id": status.id,
        "status": HOST_STATES[status.state],
        "request": {"model": status.trainer, **status.params},
        "start_ts": datetime.fromtimestamp(status.started).strftime(_HOST_TIME),
        "details": [told],
        "result": told,
    }
    if status.ended is not None:
        task["end_ts"] = datetime.fromtimestamp(status.ended).strftime(_HOST_TIME)
    return TrainingTask.model_validate({**status.model_dump(exclude_unset=True), **task})


def describe_stats(status: RunStatus) -> dict[str, Any]:
    """A run as an entry of the host's ``train_stats``: a step counts as an epoch, and ``total_time`` is empty while it
    lasts.
    """
    running = status.state in ACTIVE
    ours = {"trainer", "state", "stage", "step", "total", "eta_seconds", "message", "reason", "published", "version"}
    total_time = "" if running else str(timedelta(seconds=max(0, round((status.ended or 0) - status.started))))
    return {
        "epoch": status.step,
        "total_epochs": max(1, status.total),
        "best_metric": status.best_metric,
        "start_ts": int(status.started),
        "total_time": total_time,
        **status.model_dump(include=ours, exclude_unset=True),
    }


def list_families(context: Context) -> tuple[Family, ...]:
    """What trainings make versions of, adapters first."""
    engine, pictures = context.infer.engine, context.textdiff.engine
    return (
        Family("", lambda: engine.adapters, lambda: compute_base_digest(engine.model_dir)),
        Family(NAME, pictures.find_store),
    )


def _list_labelled(context: Context) -> list[str]:
    """Images with an accepted label; behind a DICOMweb address those that were labelled through this server."""
    if not is_folder(context.app.studies):
        return sorted(context.annotations.annotated_images())
    return sorted(str(image) for image in context.app.datastore().get_labeled_images())
