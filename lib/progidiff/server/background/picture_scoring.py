"""Scores of pictures, for the background scorer: how far the draws of the served textdiff version disagree about each
one.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.strategies import compute_scores
from progidiff.errors import BusyError, CancelledError, MemoryFullError, ModelError, ProGiDiffError, RequestError
from progidiff.images.pictures import PICTURE
from progidiff.proposals.device_queue import DeviceQueue
from progidiff.server.tasks.pictures import NUM_DRAWS, TextDiffInferTask, open_picture

logger = logging.getLogger(__name__)


class PictureScorer:
    """Scores one picture at a time, when it is told to.

    Args:
        task: With the models, the sentences and the store of what they draw.
        queue: Of the device.
        scores: Where scores are kept.
    """

    def __init__(self, task: TextDiffInferTask, queue: DeviceQueue, scores: SliceScoreStore) -> None:
        self._task = task
        self._queue = queue
        self._scores = scores
        self._broken = ""

    def version(self) -> str:
        """The version that a request is answered with; "" if there is none, or it cannot be loaded. Never raises."""
        version = str(self._task.engine.describe()["version"])
        return "" if version == self._broken else version

    def fingerprint(self, path: Path, of_file: str) -> str:
        """Changes when the picture's file, its sentence or the served version does.

        Args:
            path: The picture.
            of_file: Fingerprint of the file alone.
        """
        return hashlib.sha256(f"{of_file}:{self._find_sentence(path)}:{self.version()}".encode()).hexdigest()

    def score(self, image: str, path: Path, fingerprint: str) -> bool:
        """Score a picture as far as the device is free; the draws are kept for the first look at it.

        Returns:
            False if somebody else needs the device.

        Raises:
            ProGiDiffError: if the picture cannot be scored.
        """
        card = self._task.engine.pick()
        subject = open_picture(path)
        sentence = self._find_sentence(path)
        key = self._task.make_key(subject, sentence, NUM_DRAWS, card, image)
        known = self._task.load_kept(subject, sentence, card, key)
        if known is None:
            try:
                with self._queue.background_job("score", image) as job:
                    try:
                        known = self._task.propose(subject, sentence, NUM_DRAWS, card, job)
                    except RequestError as err:
                        if sentence is None:
                            raise
                        logger.warning("'%s' is scored without its sentence: %s", image, err)
                        # Kept as what they are: a request with this sentence is to be refused, not answered from here.
                        key = self._task.make_key(subject, None, NUM_DRAWS, card, image)
                        known = self._task.load_kept(subject, None, card, key) or self._task.propose(
                            subject, None, NUM_DRAWS, card, job
                        )
            except MemoryFullError:
                raise
            except (BusyError, CancelledError):
                return False
            except ModelError as err:
                logger.warning("Pictures are not scored by %s: %s", card.full_name, err)
                self._broken = card.full_name
                return True
            self._task.keep(subject, key, *known, image)
        proposals, _ = known
        scores = compute_scores(image, proposals.structures, proposals.probabilities, 1.0, card.full_name)
        self._scores.save(ScoredImage(scores, fingerprint, PICTURE, time.time()))
        return True

    def _find_sentence(self, path: Path) -> str | None:
        """The sentence in text.csv; a table that cannot be read counts as none: requests say what is wrong with it."""
        try:
            return self._task.find_sentence(path, None)[0]
        except ProGiDiffError as err:
            logger.warning("%s", err)
            return None
