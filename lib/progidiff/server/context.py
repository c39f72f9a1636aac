"""The parts of the running app, for routes and tasks: one object instead of globals in every module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance

from progidiff.options import ServerOptions
from progidiff.server.infer_task import ProposalInferTask


@dataclass
class Context:
    """What the app is made of.

    Attributes:
        app: The app itself; ``app.datastore()`` has images and labels.
        options: From `--conf`.
        model_dir: The base model's folder.
        infer: The task with engine, proposal store and device queue.
    """

    app: MONAILabelApp
    options: ServerOptions
    model_dir: Path
    infer: ProposalInferTask


def get_context() -> Context:
    """The parts of the app that this process serves."""
    return cast(Context, app_instance().context)
