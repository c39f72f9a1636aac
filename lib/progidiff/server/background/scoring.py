"""Scores of the whole pool, made in the background while nobody uses the device.

A thread for every device takes the images one after the other: those without scores first, then those scored by an
older model version, labelled ones last. It asks for K proposals under `DeviceQueue.background_job`, so that the first
request of a person that finds no idle device stops it after the small batch of slices it is at; the slices that are
ready are kept and the rest follows when a device is idle again. Scores go to the `SliceScoreStore`; the proposals
themselves are kept as the answer to the request that would ask for them, so that the first look at an image costs a
reading.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from pydantic import BaseModel, ConfigDict

from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.errors import BusyError, CancelledError, ModelError, NotFoundError, ProGiDiffError, StoreError
from progidiff.images.formats import is_picture, strip_suffix
from progidiff.images.pictures import PICTURE
from progidiff.proposals.device_queue import Job
from progidiff.server.background.scorers import ImageScorer, PictureScorer, VolumeScorer
from progidiff.server.datastores.images import find_image, list_ids
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.storage.json_text import Text

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_ROUNDS = 20.0
"""After which the pool is looked through for new images when there is nothing to do."""

SECONDS_AFTER_REQUESTS = 2.0
"""A person who just asked will ask again: the device is left alone for so long."""


_REST = 20
"""How many times longer than looking through the pool took it is not looked through again."""


class ScoringProgress(BaseModel):
    """How far the scoring of the pool is.

    Attributes:
        state: "off", "waiting", "scoring", "done", or why it waits.
        images: Of the pool.
        scored: By the version that is served.
        outdated: By an older one.
        failed: Image -> why it could not be scored.
        image: The one in work; "" if none is.
        slices_done, slices_total: Of that one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: Text
    images: int
    scored: int
    outdated: int
    failed: dict[Text, Text]
    image: Text
    slices_done: int
    slices_total: int


class PoolScorer:
    """The background threads, one for every device; one scorer per server process.

    Args:
        app: Whose datastore is scored.
        infer: With the engine, the device's queue and the proposal store.
        scores: Where scores are kept.
        prompt: The structures to score, as a request names them.
        find_labelled: The images that are wholly annotated, and can wait.
        is_training: Whether a training runs: it needs the processor, and its model will ask for new scores anyway.
        pictures: Scores pictures; None where there are none.
        threads: How many images are scored side by side: one on each device.
    """

    def __init__(
        self,
        app: MONAILabelApp,
        infer: ProposalInferTask,
        scores: SliceScoreStore,
        prompt: str = "all",
        find_labelled: Callable[[], Collection[str]] = frozenset,
        is_training: Callable[[], bool] = lambda: False,
        pictures: PictureScorer | None = None,
        threads: int = 1,
    ) -> None:
        self.infer = infer
        self._pictures = pictures
        self.scores = scores
        self._app = app
        self._volumes = VolumeScorer(infer, scores, prompt)
        self._find_labelled = find_labelled
        self._is_training = is_training
        self._failed: dict[str, tuple[str, str]] = {}
        self._plan: deque[str] = deque()
        self._planned: tuple[object, object, float] = (None, None, 0.0)
        self._pause = SECONDS_BETWEEN_ROUNDS
        self._jobs: dict[str, Job] = {}
        self._claimed: set[str] = set()
        self._claiming = threading.Lock()
        self._state = "off"
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._count = threads

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Begin; no effect if it runs.

        Args:
            first: What the first thread does before any of them scores; must not raise.
        """
        if not self._threads:
            self._state = "waiting"
            self._add_thread(lambda: self._begin(first))
            # A daemon thread inside the network when the interpreter ends takes the process down with a crash.
            atexit.register(self.stop)

    def _begin(self, first: Callable[[], None]) -> None:
        """In the first thread: what comes before, then a thread for every further device."""
        first()
        for _ in range(1, self._count):
            if not self._stop.is_set():
                self._add_thread(lambda: None)

    def _add_thread(self, first: Callable[[], None]) -> None:
        name = "progidiff-scorer" + (f"-{len(self._threads) + 1}" if self._threads else "")
        thread = threading.Thread(target=self._run, args=(first,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def stop(self) -> None:
        """End after the batches of slices that are computed now."""
        self._stop.set()
        self._wake.set()
        for job in list(self._jobs.values()):
            job.cancel()
        while self._threads:
            self._threads.pop().join(10)
            self._state = "off"

    def wake(self) -> None:
        """Look through the pool now: an image came, or another version is served."""
        self._planned = (None, None, 0.0)
        self._wake.set()

    def wanted_version(self, modality: str) -> str:
        """The version that a request for an image of this modality is answered with."""
        if modality == PICTURE:
            return self._pictures.version(modality) if self._pictures is not None else ""
        return self._volumes.version(modality)

    def failures(self) -> dict[str, str]:
        """Image -> why it could not be scored; a file that has changed since gets another try."""
        return {
            image: reason
            for image, (fingerprint, reason) in list(self._failed.items())
            if self.fingerprint(image) == fingerprint
        }

    def progress(self) -> ScoringProgress:
        """How far the pool is."""
        images = set(self._app.datastore().list_images())
        entries = self._find_scores()
        wanted = self._wanted_versions(entries)
        current = [
            image
            for image, entry in entries.items()
            if image in images and entry.scores.version == wanted[entry.modality]
        ]
        info = next((job.info() for job in list(self._jobs.values())), None)
        return ScoringProgress(
            state=self._state,
            images=len(images),
            scored=len(current),
            outdated=len(images & entries.keys()) - len(current),
            failed={name: reason for name, reason in self.failures().items() if name in images},
            image="" if info is None else info.image,
            slices_done=0 if info is None else info.slices_done,
            slices_total=0 if info is None else info.slices_total,
        )

    def find_next(self) -> str | None:
        """The image that is worth scoring next; None if all are scored by the version that is served.

        The whole pool is looked through when there are other images or another version, and now and then for files that
        changed; in between the images that were found then are taken one after the other.
        """
        entries = self._find_scores()
        wanted = self._wanted_versions(entries)
        listed = list_ids(self._app.datastore())
        # Of a folder the very same object until there are other images; of others a new list each time.
        images = listed if isinstance(listed, Mapping) else frozenset(listed)
        has_picture_model = bool(self.wanted_version(PICTURE))

        def is_due(image: str) -> bool:
            if image not in images or (not has_picture_model and self._find_picture(image) is not None):
                return False
            entry = entries.get(image)
            fingerprint = self.fingerprint(image)
            if image in self._failed and self._failed[image][0] == fingerprint:
                return False
            return entry is None or (entry.fingerprint, entry.scores.version) != (fingerprint, wanted[entry.modality])

        known, versions, until = self._planned
        is_same = known is images or (isinstance(images, frozenset) and known == images)
        if is_same and versions == (wanted, has_picture_model) and time.monotonic() < until:
            while self._plan and self._plan[0] not in self._claimed and not is_due(self._plan[0]):
                self._plan.popleft()
            if self._plan:  # What another thread is at may yet come back.
                return next((image for image in self._plan if image not in self._claimed and is_due(image)), None)
        began = time.monotonic()
        labelled = set(self._find_labelled())
        due = [image for image in list(images) if is_due(image)]
        self._plan = deque(sorted(due, key=lambda image: (image in labelled, image in entries, image)))
        self._pause = max(SECONDS_BETWEEN_ROUNDS, _REST * (time.monotonic() - began))
        self._planned = (images, (wanted, has_picture_model), time.monotonic() + self._pause)
        return next((image for image in self._plan if image not in self._claimed), None)

    def score(self, image: str) -> bool:
        """Score one image, as far as the device is free.

        Returns:
            Whether it is done: scored, or noted as impossible. False: somebody else needs the device.

        Raises:
            ModelError: if there is no model to score with.
        """
        fingerprint = ""
        try:
            path = Path(find_image(self._app, image))
            fingerprint = self.fingerprint(image)
            info = self._app.datastore().get_image_info(image)
            if not self._scorer_of(path).score(image, path, fingerprint, partial(self._take_turn, image), info):
                return False
        except (ModelError, BusyError, StoreError):
            raise
        except NotFoundError as err:
            logger.info("%s", err)
            self.scores.remove(image)
            self._failed[image] = (fingerprint, str(err))
        except ProGiDiffError as err:
            logger.warning("'%s' is not scored: %s", image, err)
            self._failed[image] = (fingerprint, str(err))
        else:
            self._failed.pop(image, None)
        return True

    def _scorer_of(self, path: Path) -> ImageScorer:
        return self._pictures if self._pictures is not None and is_picture(path) else self._volumes

    @contextmanager
    def _take_turn(self, image: str) -> Iterator[Job]:
        """The device while nobody else wants it."""
        with self.infer.queue.background_job("score", image) as job:
            self._jobs[image] = job
            try:
                if self._stop.is_set():
                    raise CancelledError("Scoring ends with the server.")
                yield job
            finally:
                del self._jobs[image]

    def _find_scores(self) -> Mapping[str, ScoredImage]:
        return self.scores.pick_newest(self.wanted_version)

    def _wanted_versions(self, entries: Mapping[str, ScoredImage]) -> dict[str, str]:
        return {modality: self.wanted_version(modality) for modality in {entry.modality for entry in entries.values()}}

    def fingerprint(self, image: str) -> str:
        """Changes when the image's file does; "" if it is gone, or behind a DICOMweb server."""
        datastore = self._app.datastore()
        if isinstance(datastore, DICOMWebDatastore):
            return ""  # asking for the file would fetch it, and a series does not change
        path = Path(datastore.get_image_uri(image) or "/")
        of_file = fingerprint_image(path)
        return self._scorer_of(path).fingerprint(path, of_file) if of_file else ""

    def _find_picture(self, image: str) -> Path | None:
        """The file of a picture; None if the image is something else."""
        datastore = self._app.datastore()
        if isinstance(datastore, DICOMWebDatastore):
            return None
        path = Path(datastore.get_image_uri(image) or "/")
        return path if is_picture(path) else None

    def _run(self, first: Callable[[], None]) -> None:
        # At the priority of everybody else: whoever comes while a batch is computed waits for this thread, and a busy
        # machine would pass a thread of low priority over.
        first()
        while not self._stop.is_set():
            pause = SECONDS_BETWEEN_ROUNDS
            try:
                pause = self._work()
            except ModelError as err:
                self._state = f"no model: {err}"
            except ProGiDiffError as err:
                self._state = f"waiting: {err}"
            except Exception as err:  # a thread that dies silently would look like a pool that is scored
                logger.exception("Scoring goes on after an unexpected error")
                self._state = f"waiting after an unexpected error: {type(err).__name__}"
            self._wake.wait(pause)
            if not self._stop.is_set():  # The other threads are to see it too.
                self._wake.clear()

    def _work(self) -> float:
        """Score what there is. Returns after how many seconds to look again."""
        while not self._stop.is_set():
            if self._is_training():
                self._state = "waiting: a training runs"
                return SECONDS_BETWEEN_ROUNDS
            if not self.infer.queue.is_idle():
                self._state = "waiting: the device is in use"
                return SECONDS_AFTER_REQUESTS
            with self._claiming:
                image = self.find_next()
                self._claimed |= set() if image is None else {image}
            if image is None:
                self._state = "scoring" if self._claimed else "done"
                return self._pause
            self._state = "scoring"
            try:
                is_done = self.score(image)
            finally:
                self._claimed.discard(image)
            if not is_done:
                self._state = "waiting: the device is in use"
                return SECONDS_AFTER_REQUESTS
        return 0.0


def fingerprint_image(path: Path) -> str:
    """Changes when an image's file, its sidecar, or any file of its folder changes; "" if there is none."""
    if path == Path("/") or not path.exists():
        return ""
    files = sorted(path.iterdir()) if path.is_dir() else [path, path.with_name(strip_suffix(path) + ".json")]
    parts = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.exists()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
