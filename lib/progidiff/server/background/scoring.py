"""Scores of the whole pool, made in the background while nobody uses the device.

One thread of low priority takes the images one after the other: those without scores first, then those scored by an
older model version, labelled ones last. It asks the engine for K proposals under `DeviceQueue.background_job`, so that
the first request of a person stops it after the batch of slices it is at; the slices that are ready are kept and the
rest follows when the device is idle again. Scores go to the `SliceScoreStore`; the proposals themselves go to the
`ProposalStore` under the key of the request that would ask for them, so that the first look at an image costs a
reading.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp

from progidiff.active_learning.scores import ScoredImage, SliceScoreStore, name_version
from progidiff.active_learning.strategies import compute_scores
from progidiff.errors import (
    BusyError,
    CancelledError,
    MemoryFullError,
    ModelError,
    NotFoundError,
    ProGiDiffError,
    StoreError,
)
from progidiff.images.formats import is_picture, strip_suffix
from progidiff.images.pictures import PICTURE
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.prompts.parser import Query, parse_prompt
from progidiff.proposals.islands import drop_islands
from progidiff.proposals.request import NONE
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.background.picture_scoring import PictureScorer
from progidiff.server.datastores.images import find_image
from progidiff.server.tasks.volumes import ProposalInferTask

logger = logging.getLogger(__name__)

NUM_PROPOSALS = 4
"""K of the scores, and of a request that does not say."""

SECONDS_BETWEEN_ROUNDS = 20.0
"""After which the pool is looked through for new images when there is nothing to do."""

SECONDS_AFTER_REQUESTS = 2.0
"""A person who just asked will ask again: the device is left alone for so long."""

_NICE = 10


@dataclass
class _Unfinished:
    """Slices of an image that are ready; the others follow."""

    image: str
    key: str
    proposals: VolumeProposals
    ready: set[int]


class PoolScorer:
    """The background thread; one per server process.

    Args:
        app: Whose datastore is scored.
        infer: With the engine, the device's queue and the proposal store.
        scores: Where scores are kept.
        prompt: The structures to score, as a request names them.
        find_labelled: The images that are wholly annotated, and can wait.
        is_training: Whether a training runs: it needs the processor, and its model will ask for new scores anyway.
        pictures: Scores pictures; None where there are none.
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
    ) -> None:
        self.infer = infer
        self._pictures = pictures
        self.scores = scores
        self._app = app
        self._prompt = prompt
        self._find_labelled = find_labelled
        self._is_training = is_training
        self._failed: dict[str, tuple[str, str]] = {}
        self._unfinished: _Unfinished | None = None
        self._current: tuple[str, int, int] | None = None
        self._state = "off"
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, first: Callable[[], None] = lambda: None) -> None:
        """Begin; no effect if it runs.

        Args:
            first: What the thread does before it scores; must not raise.
        """
        if self._thread is None:
            self._state = "waiting"
            self._thread = threading.Thread(target=self._run, args=(first,), name="progidiff-scorer", daemon=True)
            self._thread.start()
            # A daemon thread inside the network when the interpreter ends takes the process down with a crash.
            atexit.register(self.stop)

    def stop(self) -> None:
        """End after the batch of slices that is computed now."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(10)
            self._thread = None
            self._state = "off"

    def wake(self) -> None:
        """Look through the pool now: an image came, or another version is served."""
        self._wake.set()

    def wanted_version(self, modality: str) -> str:
        """The version that a request for an image of this modality is answered with."""
        if modality == PICTURE:
            return self._pictures.version() if self._pictures is not None else ""
        adapter = self.infer.engine.pick_adapter(None, modality)
        return name_version(self.infer.engine.model_version, adapter.full_name if adapter else "")

    def failures(self) -> dict[str, str]:
        """Image -> why it could not be scored; a file that has changed since gets another try."""
        return {
            image: reason
            for image, (fingerprint, reason) in list(self._failed.items())
            if self.fingerprint(image) == fingerprint
        }

    def progress(self) -> dict[str, Any]:
        """How far the pool is.

        Returns:
            "state" ("off", "waiting", "scoring", "done", or why it waits), "images", "scored" (by the version that is
            served), "outdated" (by an older one), "failed" {image: reason}, "image", "slices_done", "slices_total" of
            the one in work.
        """
        images = set(self._app.datastore().list_images())
        entries = self._find_scores()
        wanted = self._wanted_versions(entries)
        current = [
            image
            for image, entry in entries.items()
            if image in images and entry.scores.version == wanted[entry.modality]
        ]
        image, done, total = self._current or ("", 0, 0)
        return {
            "state": self._state,
            "images": len(images),
            "scored": len(current),
            "outdated": len(images & entries.keys()) - len(current),
            "failed": {name: reason for name, reason in self.failures().items() if name in images},
            "image": image,
            "slices_done": done,
            "slices_total": total,
        }

    def find_next(self) -> str | None:
        """The image that is worth scoring next; None if all are scored by the version that is served."""
        entries = self._find_scores()
        wanted = self._wanted_versions(entries)
        labelled = set(self._find_labelled())
        urgent: list[tuple[bool, bool, str]] = []
        has_picture_model = bool(self.wanted_version(PICTURE))
        for image in sorted(self._app.datastore().list_images()):
            if not has_picture_model and self._find_picture(image) is not None:
                continue
            entry = entries.get(image)
            fingerprint = self.fingerprint(image)
            if image in self._failed and self._failed[image][0] == fingerprint:
                continue
            if entry is None or (entry.fingerprint, entry.scores.version) != (fingerprint, wanted[entry.modality]):
                urgent.append((image in labelled, entry is not None, image))
        return min(urgent)[2] if urgent else None

    def score(self, image: str) -> bool:
        """Score one image, as far as the device is free.

        Returns:
            Whether it is done: scored, or noted as impossible. False: somebody else needs the device.

        Raises:
            ModelError: if there is no model to score with.
        """
        fingerprint = ""
        try:
            path = find_image(self._app, image)
            fingerprint = self.fingerprint(image)
            if self._pictures is not None and is_picture(path):
                return self._score_picture(image, Path(path), fingerprint)
            volume = load_volume(path, None, self._app.datastore().get_image_info(image))
            found = self._propose(image, volume)
            if found is None:
                return False
            self._keep(image, fingerprint, found, volume)
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
        self._unfinished = None
        return True

    def _score_picture(self, image: str, path: Path, fingerprint: str) -> bool:
        assert self._pictures is not None
        is_done = self._pictures.score(image, path, fingerprint)
        if is_done:
            self._failed.pop(image, None)
        return is_done

    def _propose(self, image: str, volume: Volume) -> VolumeProposals | None:
        """The proposals of all slices, from the store or the engine; None if the device is needed elsewhere."""
        task = self.infer
        adapter = task.engine.pick_adapter(None, volume.modality)
        queries = self._parse_prompt()
        key, whole = (self._key(image, volume, asked, adapter.full_name if adapter else "") for asked in (queries, ()))
        stored = task.store.load(key)
        if stored is not None:
            return stored
        depth = len(volume.to_stack()[0])
        if self._unfinished is not None and (self._unfinished.image, self._unfinished.key) != (image, key):
            self._unfinished = None
        before = self._unfinished
        if before is None or len(before.ready) < depth:
            try:
                with task.queue.background_job("score", image) as job:
                    task.engine.propose(
                        volume,
                        queries,
                        num_proposals=NUM_PROPOSALS,
                        adapter=adapter.full_name if adapter else NONE,
                        slices=[z for z in range(depth) if before is None or z not in before.ready],
                        progress=lambda done, total: self._note(image, depth - total + done, depth),
                        on_slices=lambda part, slices: self._collect(image, key, part, slices),
                        is_cancelled=lambda: job.cancelled() or self._stop.is_set(),
                        remember=False,
                    )
            except MemoryFullError:
                raise  # Nobody asked for the device: it will not be better in two seconds.
            except (BusyError, CancelledError):
                return None
            finally:
                self._current = None
        assert self._unfinished is not None
        # All slices are there only now, of one try or of several.
        clean_up = task.options.clean_up
        result = replace(self._unfinished.proposals, clean_up=clean_up)
        grid = result.grid
        drop_islands(result.probabilities, clean_up, (grid.stack_spacing[0], grid.spacing, grid.spacing), grid.covered)
        try:
            task.store.save(key, result, image, queries, whole)
        except StoreError as err:
            logger.warning("The proposals for '%s' are scored but not kept: %s", image, err)
        return result

    def _collect(self, image: str, key: str, part: VolumeProposals, slices: Sequence[int]) -> None:
        """Add slices that are ready to those of earlier tries."""
        if self._unfinished is None:
            self._unfinished = _Unfinished(
                image, key, replace(part, probabilities=np.zeros_like(part.probabilities)), set()
            )
        known = self._unfinished
        known.proposals.probabilities[:, :, list(slices)] = part.probabilities[:, :, list(slices)]
        known.ready.update(slices)

    def _keep(self, image: str, fingerprint: str, proposals: VolumeProposals, volume: Volume) -> None:
        trained = self.infer.engine.structures
        adapter = self.infer.engine.pick_adapter(proposals.adapter or NONE, volume.modality)
        if adapter is not None:
            trained = adapter.structures
        # What the version was never shown is guessed: its disagreement says nothing about this image.
        chosen = [index for index, name in enumerate(proposals.structures) if name in trained] or list(
            range(len(proposals.structures))
        )
        scores = compute_scores(
            image,
            [proposals.structures[index] for index in chosen],
            proposals.probabilities[chosen],
            proposals.grid.stack_spacing[0],
            name_version(proposals.model_version, proposals.adapter),
            proposals.grid.covered,
        )
        self.scores.save(ScoredImage(scores, fingerprint, volume.modality, time.time()))

    def _key(self, image: str, volume: Volume, queries: tuple[Query, ...], adapter: str) -> str:
        card = self.infer.engine.card
        return self.infer.store.key(
            image_id=image,
            image_digest=volume.digest,
            queries=queries,
            num_proposals=NUM_PROPOSALS,
            num_inference_steps=card.num_inference_steps,
            seed=0,
            guidance_scale=card.guidance_scale,
            model_version=card.full_name,
            adapter=adapter,
            clean_up=self.infer.options.clean_up,
        )

    def _parse_prompt(self) -> tuple[Query, ...]:
        return parse_prompt(self._prompt, self.infer.structures, False, self.infer.engine.model_version)

    def _find_scores(self) -> dict[str, ScoredImage]:
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
        return (
            self._pictures.fingerprint(path, of_file)
            if of_file and self._pictures is not None and is_picture(path)
            else of_file
        )

    def _find_picture(self, image: str) -> Path | None:
        """The file of a picture; None if the image is something else."""
        datastore = self._app.datastore()
        if isinstance(datastore, DICOMWebDatastore):
            return None
        path = Path(datastore.get_image_uri(image) or "/")
        return path if is_picture(path) else None

    def _note(self, image: str, done: int, total: int) -> None:
        self._current = (image, done, total)

    def _run(self, first: Callable[[], None]) -> None:
        first()  # at full priority: it takes locks that requests need
        with contextlib.suppress(AttributeError, OSError):  # threads have a priority of their own on Linux only
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
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
            image = self.find_next()
            if image is None:
                self._state = "done"
                return SECONDS_BETWEEN_ROUNDS
            self._state = "scoring"
            if not self.score(image):
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
