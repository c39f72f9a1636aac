"""The parts of the running app, for routes and tasks: one object instead of globals in every module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance
from prometheus_client import CollectorRegistry

from progidiff.labels.drawn_slices import DrawnSlices
from progidiff.labels.history import Annotation, AnnotationStore
from progidiff.labels.readings import Readings
from progidiff.logs import Names
from progidiff.server.datastores.local import SafeLocalDatastore
from progidiff.server.datastores.remote_labels import RemoteLabels
from progidiff.server.datastores.served_images import ServedImages
from progidiff.server.gate.auth import Authenticator
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.pictures import TextDiffInferTask
from progidiff.server.tasks.sentences import SentenceEditor
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.users import Token

if TYPE_CHECKING:  # they ask the context themselves
    from progidiff.server.background.next_sample import Selection
    from progidiff.server.background.retraining import Retraining
    from progidiff.server.background.scoring import PoolScorer
    from progidiff.server.readiness import Readiness
    from progidiff.training_runs.runner import TrainingRunner
from progidiff.training_runs.status import RunStatus


@dataclass
class Context:
    """What the app is made of.

    Attributes:
        app: The app itself; ``app.datastore()`` has images and labels.
        options: From `--conf`.
        model_dir: The base model's folder.
        infer: The task with engine, proposal store and device queue.
        textdiff: The task for pictures and sentences, on the same queue and store.
        served: The images of a local folder as DICOM series.
        annotations: The history of labels.
        readings: Who reads what, where images are read twice.
        sentences: Writes the sentences of pictures back.
        labels: Saves, deletes and undoes labels; set when the datastore is opened.
        on_saved: Asked after every new label of tag `final`; what they return goes into the answer. One that raises is
            logged.
        drawn: On how many slices structures are labelled.
        scorer: Scores the pool in the background.
        selection: Chooses what is annotated next.
        retraining: Starts trainings after so many annotated slices.
        auth: Finds out who sends a request.
        training: Starts and watches trainings.
        readiness: Whether prompts are answered.
        registry: The figures for Prometheus.
        metrics_tokens: Tokens that open those and nothing else.
        names: Takes names of images out of the log; None if they are told.
        on_published: Called with ``name@version`` after another version is served, "" for the model itself; one that
            raises is logged.
        on_ended: Called with the status of a training that ended.
    """

    app: MONAILabelApp
    options: ServerOptions
    model_dir: Path
    infer: ProposalInferTask
    textdiff: TextDiffInferTask
    served: ServedImages
    auth: Authenticator
    annotations: AnnotationStore
    readings: Readings
    sentences: SentenceEditor
    labels: SafeLocalDatastore | RemoteLabels = field(init=False)
    on_saved: list[Callable[[Annotation], dict[str, Any]]] = field(default_factory=list)
    scorer: PoolScorer = field(init=False)
    drawn: DrawnSlices = field(init=False)
    selection: Selection = field(init=False)
    retraining: Retraining = field(init=False)
    training: TrainingRunner = field(init=False)
    readiness: Readiness = field(init=False)
    registry: CollectorRegistry = field(init=False)
    metrics_tokens: tuple[Token, ...] = ()
    names: Names | None = None
    on_published: list[Callable[[str], None]] = field(default_factory=list)
    on_ended: list[Callable[[RunStatus], None]] = field(default_factory=list)


def get_context() -> Context:
    """The parts of the app that this process serves."""
    return cast(Context, app_instance().context)
