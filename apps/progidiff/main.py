"""The MONAI Label app: wires the package `progidiff` to the host and holds nothing else."""

import logging
import sys
from pathlib import Path
from typing import Any

from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.scoring import ScoringMethod
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask

import progidiff
from progidiff.images import decoding, text_headers
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.readings import Readings
from progidiff.server import install, log_lines, wiring
from progidiff.server.datastores import pacs
from progidiff.server.datastores.local import is_folder, open_annotations, open_local
from progidiff.server.datastores.served_images import ServedImages
from progidiff.server.gate.auth import Authenticator
from progidiff.server.host import calls
from progidiff.server.host.strategies import build_strategies
from progidiff.server.host.trainers import build_trainers
from progidiff.server.options import ServerOptions
from progidiff.server.parts import Context
from progidiff.server.routes import host, table
from progidiff.server.tasks.pictures import build_textdiff
from progidiff.server.tasks.scribbles import ScribbleInferTask
from progidiff.server.tasks.sentences import SentenceEditor
from progidiff.server.tasks.slices import SliceInferTask
from progidiff.server.tasks.volumes import build_task
from progidiff.server.trainings import build_runner

logger = logging.getLogger(__name__)


class ProGiDiffApp(MONAILabelApp):
    """Prompt in, K proposals and their agreement out."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.options = ServerOptions.from_conf(conf or {}, studies)
        names = log_lines.set_up(self.options, (studies, app_dir))
        decoding.read_apart(self.options.read_apart)
        decoding.report_in_background()
        text_headers.allow_detached(self.options.detached_data)
        model_dir = self.options.model_dir or Path(app_dir) / "model"
        annotations = open_annotations(self.options.store, studies)
        # The table of ids lies with the images, or in the server's own folder where they lie behind an address.
        own = FolderStructures(studies if is_folder(studies) else self.options.store, self.options.store, annotations)
        infer = build_task(self.options, model_dir, self.datastore, own)
        self.context = Context(
            self,
            self.options,
            model_dir,
            infer,
            build_textdiff(self.options, model_dir, infer, studies, self.datastore),
            served=ServedImages(self.options.store / "dicom", self.datastore),
            annotations=annotations,
            readings=Readings(annotations, self.options.double_reading),
            sentences=SentenceEditor(Path(studies) if is_folder(studies) else None, self.options.store / "sentences"),
            auth=Authenticator.from_options(self.options),
            names=names,
        )
        self.context.training = build_runner(self.context)
        wiring.build(self.context)
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name="ProGiDiff Label",
            description="Type a prompt, get proposals with their agreement, keep one. For research, not for diagnosis.",
            version=progidiff.__version__,
        )
        # In the processes that the host starts for training and batches there is no web application to extend.
        if "monailabel.app" in sys.modules:
            install.install(sys.modules["monailabel.app"].app, self, table.build_endpoints())
            wiring.start(self.context, studies)

    def init_datastore(self) -> Datastore:
        """Images and labels, in a folder or behind an address."""
        if not is_folder(self.studies):
            self.context.labels = wiring.build_remote_labels(self.context)
            return pacs.open_remote(self)
        context, options = self.context, self.options
        context.labels = open_local(
            self.studies, context.annotations, context.infer.store, options.store, context.textdiff.engine.label_ids
        )
        if context.names is not None:
            context.names.watch(context.labels.list_names)
        return self.context.labels

    def init_infers(self) -> dict[str, InferTask]:
        """Whole volumes, single slices steered by clicks, volumes by scribbles, pictures with a sentence; the models
        load at the first request.
        """
        infer = self.context.infer
        return {
            "progidiff": infer,
            "progidiff_slice": SliceInferTask(infer),
            "progidiff_scribbles": ScribbleInferTask(infer),
            "textdiff": self.context.textdiff,
        }

    def init_trainers(self) -> dict[str, TrainTask]:
        """All accepted labels, or a low-rank adapter; both run in a process of their own."""
        return build_trainers(lambda: self.context.training)

    def init_strategies(self) -> dict[str, Strategy]:
        """What comes next: ours, and the plain ones to compare it with."""
        return build_strategies(lambda: self.context.selection, self.options.next_strategy)

    def init_scoring_methods(self) -> dict[str, ScoringMethod]:
        """None: the host would run them, in a process of their own, at start and after every next sample."""
        return {}

    def info(self) -> dict[str, Any]:
        """What clients ask for on every connect; never raises."""
        return calls.get_info(self)

    def infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Answer the host's own calls through the same checks as HTTP requests."""
        return calls.infer_for_host(self, request)

    def cleanup_sessions(self) -> None:
        """Remove uploads that have expired; the host calls this every five minutes."""
        host.remove_expired_sessions(self)

    def batch_infer(self, request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        """Answer `POST /batch/infer`, in this process or in one that the host starts for it."""
        return calls.batch_infer(self, request)
