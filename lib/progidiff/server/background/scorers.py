"""What the background scorer asks of an image, and how its scores follow from the proposals: one way for every kind of
image; a kind says which version answers, and what it proposes.
"""

from __future__ import annotations

import hashlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progidiff.active_learning.scores import ScoredImage, SliceScoreStore, name_version
from progidiff.active_learning.strategies import compute_scores
from progidiff.errors import (
    BusyError,
    CancelledError,
    MemoryFullError,
    ModelError,
    ProGiDiffError,
    RequestError,
)
from progidiff.images.pictures import PICTURE
from progidiff.images.reading import load_volume
from progidiff.prompts.parser import Query, parse_prompt
from progidiff.proposals.keeper import TakeTurn
from progidiff.proposals.request import DEFAULT_NUM_PROPOSALS, NONE, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.server.tasks.pictures import TextDiffInferTask, open_picture
from progidiff.server.tasks.volumes import ProposalInferTask

logger = logging.getLogger(__name__)

UNWATCHED = Work(remember=False, is_yielding=True)
"""How work is done that nobody waits for."""


@dataclass(frozen=True)
class Scored:
    """Proposals of an image, and what of them counts.

    Attributes:
        proposals: Of all structures.
        structures: Those whose disagreement says something.
        version: Of the scores, see `name_version`.
        slice_mm: Distance of the slices; 1 for a picture.
        modality: Of the image; `PICTURE` for a picture.
    """

    proposals: VolumeProposals
    structures: tuple[str, ...]
    version: str
    slice_mm: float
    modality: str


class ImageScorer(ABC):
    """Scores one image of a kind at a time, when it is told to.

    Args:
        scores: Where scores are kept.
    """

    def __init__(self, scores: SliceScoreStore) -> None:
        self._scores = scores

    @abstractmethod
    def version(self, modality: str) -> str:
        """The version that a request is answered with; "" if there is none."""

    @abstractmethod
    def propose(self, image: str, path: Path, info: Mapping[str, Any], take_turn: TakeTurn) -> Scored | None:
        """The proposals that a request for the image would get, kept or computed.

        Returns:
            None if there are none, and why is in the log.
        """

    def fingerprint(self, path: Path, of_file: str) -> str:
        """Changes when something does that scores depend on, beside the version.

        Args:
            path: The image.
            of_file: Fingerprint of the file alone.
        """
        return of_file

    def score(
        self, image: str, path: Path, fingerprint: str, take_turn: TakeTurn, info: Mapping[str, Any] | None = None
    ) -> bool:
        """Score an image as far as the device is free; its proposals are kept for the first look at it.

        Args:
            image: Its id.
            path: Its file.
            fingerprint: Kept with the scores.
            take_turn: Gets the device, or raises `BusyError`.
            info: What the datastore knows about it.

        Returns:
            False if somebody else needs the device.

        Raises:
            ModelError: if there is no model to score with.
            ProGiDiffError: if the image cannot be scored.
        """
        try:
            found = self.propose(image, path, info or {}, take_turn)
        except MemoryFullError:
            raise  # Nobody asked for the device: it will not be better in two seconds.
        except (BusyError, CancelledError):
            return False
        if found is not None:
            proposals = found.proposals
            chosen = [proposals.structures.index(name) for name in found.structures]
            scores = compute_scores(
                image,
                found.structures,
                proposals.probabilities[chosen],
                found.slice_mm,
                found.version,
                None if found.modality == PICTURE else proposals.grid.covered,
            )
            self._scores.save(ScoredImage(scores, fingerprint, found.modality, time.time()))
        return True


ALL = "all"
"""The prompt for everything that is known."""


class VolumeScorer(ImageScorer):
    """Scores volumes by the diffusion model.

    Args:
        task: With the engine and the store of proposals.
        scores: Where scores are kept.
        prompt: The structures to score, as a request names them.
    """

    def __init__(self, task: ProposalInferTask, scores: SliceScoreStore, prompt: str) -> None:
        super().__init__(scores)
        self._task = task
        self._prompt = prompt

    def version(self, modality: str) -> str:
        """The version for this modality: the model's, or its adapter's."""
        engine = self._task.engine
        adapter = engine.pick_adapter(None, modality, [query.name for query in self._read_prompt(modality)])
        return name_version(engine.model_version, adapter.full_name if adapter else "")

    def _read_prompt(self, modality: str) -> tuple[Query, ...]:
        """What is scored of images of a modality. "all" is what this folder teaches, once a version knows it: who
        labels a heart does not want to hear where a liver is uncertain.
        """
        task, own = self._task, self._task.own
        known = task.structures
        if own is not None and self._prompt.strip().lower() == ALL:
            taught = {row.name for row in own.own()} & set(task.engine.find_taught(modality))
            known = tuple(name for name in known if name in taught) or known
        words = {} if own is None else own.words()
        return parse_prompt(self._prompt, known, False, task.engine.model_version, words)

    def propose(self, image: str, path: Path, info: Mapping[str, Any], take_turn: TakeTurn) -> Scored:
        """Proposals of all slices, for the structures of the prompt; those that the version was trained on count."""
        task, engine = self._task, self._task.engine
        volume = load_volume(path, None, info)
        request = ProposalRequest(queries=self._read_prompt(volume.modality), clean_up=task.options.clean_up)
        adapter = task.pick_adapter(None, volume, request.queries)
        question = task.ask(request, volume, image, adapter)
        proposals = task.answer(question, volume, take_turn, UNWATCHED).proposals
        answering = engine.pick_adapter(proposals.adapter or NONE, volume.modality)
        trained = engine.structures if answering is None else answering.structures
        # What the version was never shown is guessed: its disagreement says nothing about this image.
        chosen = tuple(name for name in proposals.structures if name in trained) or proposals.structures
        return Scored(
            proposals,
            chosen,
            name_version(proposals.model_version, proposals.adapter),
            proposals.grid.stack_spacing[0],
            volume.modality,
        )


class PictureScorer(ImageScorer):
    """Scores pictures by the textdiff version that answers for each: how far its draws disagree.

    Args:
        task: With the models, the sentences and the store of what they draw.
        scores: Where scores are kept.
    """

    def __init__(self, task: TextDiffInferTask, scores: SliceScoreStore) -> None:
        super().__init__(scores)
        self._task = task
        self._broken = ""

    def version(self, modality: str = PICTURE) -> str:
        """The version that answers, with "+" between them if grey pictures have another one; "" also if it cannot be
        loaded. Never raises.
        """
        try:
            version = "+".join(sorted(card.full_name for card in self._task.list_answering()))
        except (ProGiDiffError, OSError):  # Who asks for a picture is told.
            return ""
        return "" if version == self._broken else version

    def fingerprint(self, path: Path, of_file: str) -> str:
        """Changes when the picture's file, its sentence or the served version does."""
        return hashlib.sha256(f"{of_file}:{self._find_sentence(path)}:{self.version()}".encode()).hexdigest()

    def propose(self, image: str, path: Path, info: Mapping[str, Any], take_turn: TakeTurn) -> Scored | None:
        """Draws with the sentence of the picture, or without it if it cannot be used; None if no version can."""
        subject = open_picture(path)
        card = self._task.pick_fitting(subject)
        version = self.version() or card.full_name
        sentence = self._find_sentence(path)
        try:
            try:
                answer = self._task.answer(subject, sentence, DEFAULT_NUM_PROPOSALS, card, image, take_turn)
            except RequestError as err:
                if sentence is None:
                    raise
                logger.warning("'%s' is scored without its sentence: %s", image, err)
                # Kept as what they are: a request with this sentence is to be refused, not answered from here.
                answer = self._task.answer(subject, None, DEFAULT_NUM_PROPOSALS, card, image, take_turn)
        except ModelError as err:
            logger.warning("Pictures are not scored by %s: %s", card.full_name, err)
            if version != card.full_name:  # The other model can score the other pictures.
                raise RequestError(str(err)) from err
            self._broken = card.full_name
            return None
        return Scored(answer.proposals, answer.proposals.structures, version, 1.0, PICTURE)

    def _find_sentence(self, path: Path) -> str | None:
        """The sentence in text.csv; a table that cannot be read counts as none: requests say what is wrong with it."""
        try:
            return self._task.find_sentence(path, None)[0]
        except ProGiDiffError as err:
            logger.warning("%s", err)
            return None
