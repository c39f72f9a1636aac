"""Whether the server answers prompts: weights loaded, images and state on a disk that answers, not about to end.

Weights load at the first prompt. Whoever watches over servers sends no prompts to one that is not ready, so the first
question whether it is begins to load them. With `--conf warm_up true` they load at start, and every network runs once
on every device before the server is ready.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from monailabel.interfaces.app import MONAILabelApp

from progidiff.errors import BusyError, CancelledError, ModelError, NotReadyError, ProGiDiffError
from progidiff.proposals.device_queue import Job, JobInfo, JobState
from progidiff.proposals.engine import Engine
from progidiff.server.datastores.local import is_folder
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.storage.atomic import make_scratch_name

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 30.0
"""After which loading is tried again when it failed."""


class Readiness:
    """Looks when somebody asks; one thread asks at a time.

    Args:
        app: With the images.
        infer: With the weights, the device's queue and the store.
        clock: Seconds that never go back.
        warms_up: Whether networks run once before anybody asks.
    """

    def __init__(
        self,
        app: MONAILabelApp,
        infer: ProposalInferTask,
        clock: Callable[[], float] = time.monotonic,
        warms_up: bool = False,
    ) -> None:
        self._app = app
        self._infer = infer
        self._clock = clock
        self._warms_up = warms_up
        self._warm: set[str] = set()
        self._starting = threading.Lock()
        infer.queue.on_ended.append(self._note)
        self._loader: threading.Thread | None = None
        self._failed: tuple[float, ModelError] | None = None

    def check(self) -> None:
        """Return if the server answers prompts.

        Raises:
            NotReadyError: with the reason and what to do.
        """
        if self._infer.queue.is_closed:
            raise NotReadyError("The server is stopping. Ask another one, or wait until it is back.", retry_after=30)
        self._check_images()
        self._check_store()
        self._check_weights()

    def _check_images(self) -> None:
        studies = str(self._app.studies)
        try:
            if is_folder(studies):
                with os.scandir(studies) as entries:
                    next(entries, None)
            else:
                self._app.datastore().list_images()
        except Exception as err:  # Of the disk, or of whatever the host's client of the PACS raises.
            logger.warning("The images cannot be read: %s", err)
            raise NotReadyError(
                f"The images cannot be read ({type(err).__name__}). Look whether the disk, or the DICOMweb server, "
                "with the studies is there; the log says more."
            ) from err

    def _check_store(self) -> None:
        store = self._infer.store.root
        try:
            _write_and_remove(store)
            labels = Path(str(self._app.studies)) / "labels"
            if is_folder(str(self._app.studies)) and labels.is_dir():  # It is made with the first label.
                _write_and_remove(labels)
        except OSError as err:
            logger.warning("The state cannot be written: %s", err)
            raise NotReadyError(
                f"Nothing can be saved ({err.strerror}). Free some disk space, or let the server's account write to "
                "the folders of its state and labels; the log names them."
            ) from err

    def _check_weights(self) -> None:
        if not self._list_cold():
            return
        self.begin()
        if all(engine.info()["loaded"] for engine in self._infer.engines.values()):
            raise NotReadyError("The networks are being warmed up. Ask again in a few seconds.")
        raise NotReadyError("The weights are being loaded. Ask again in a few seconds.")

    def begin(self) -> None:
        """Begin to load what is not loaded, in a thread of its own; no effect if it has begun.

        Raises:
            NotReadyError: if that failed a moment ago.
        """
        with self._starting:
            if self._loader is not None and self._loader.is_alive():
                return
            if self._failed is not None and self._clock() < self._failed[0] + _RETRY_SECONDS:
                raise NotReadyError(f"There is no model to answer with: {self._failed[1]}", retry_after=30)
            self._loader = threading.Thread(target=self._load, name="progidiff-loader", daemon=True)
            self._loader.start()

    def _note(self, job: JobInfo) -> None:
        """What computed volumes has warmed its device up."""
        if job.kind in ("infer", "slice", "score") and job.running_s and job.state is not JobState.FAILED:
            self._warm.add(job.device)

    def _list_cold(self) -> list[str]:
        """Devices that do not answer at once yet."""
        engines = self._infer.engines
        if self._warms_up:
            return [device for device in engines if device not in self._warm]
        return [device for device, engine in engines.items() if not engine.info()["loaded"]]

    def _load(self) -> None:
        """On one idle device after the other, as a prompt would; where somebody computes, that loads them too."""
        self._failed = None
        engines = self._infer.engines
        try:
            for _ in engines:
                with self._infer.queue.background_job("load", "") as job:
                    self._prepare(job, engines)
        except BusyError as err:
            logger.debug("%s", err)
        except ModelError as err:
            logger.warning("The weights cannot be loaded: %s", err)
            self._failed = (self._clock(), err)
        except (ProGiDiffError, OSError, RuntimeError) as err:
            logger.exception("The weights cannot be loaded")
            reason = f"{type(err).__name__} while its weights were loaded; the log says more."
            self._failed = (self._clock(), ModelError(reason))

    def _prepare(self, job: Job, engines: Mapping[str, Engine]) -> None:
        device, engine = job.device, engines.get(job.device, self._infer.engine)
        if not self._warms_up:
            engine.load()
            return
        if device in self._warm:
            return
        started = time.monotonic()
        try:
            engine.warm_up(job.cancelled)
            logger.info("The networks on %s are warm after %.1f s", device, time.monotonic() - started)
        except CancelledError as err:
            logger.info("%s", err)
        self._warm.add(device)


def _write_and_remove(folder: Path) -> None:
    scratch = folder / make_scratch_name()
    try:
        scratch.write_bytes(b"ready?")
    finally:
        scratch.unlink(missing_ok=True)
