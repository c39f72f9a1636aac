"""What to annotate next: the image and its slices, for a client, from the scores that are there.

Answers come from the score store in memory; no image is opened unless nothing of it is known yet. An image is reserved
for the client that got it, so that two people work on two images. While nothing is scored, slices are spread evenly,
and the answer says so.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from pydantic import BaseModel, ConfigDict, SkipValidation

from progidiff.active_learning.answers import (
    OrganProgress,
    QueueEntry,
    SuggestedSlice,
    SuggestedWork,
    TrainedVersion,
    Worklist,
    WorklistEntry,
)
from progidiff.active_learning.report import count_rounds, list_versions
from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.settings import BY_SCORE, DEFAULT_STRATEGY, HEADINGS, STRATEGIES, AcquisitionConfig
from progidiff.active_learning.strategies import (
    Pick,
    Pool,
    build_pool,
    compute_uncertainty,
    pick_slices,
    space_evenly,
    summarise_reasons,
)
from progidiff.errors import ImageError, NotFoundError, RequestError
from progidiff.images.formats import Use, is_picture, list_suffixes
from progidiff.images.pictures import PICTURE, read_picture_grid
from progidiff.labels.history import AnnotationStore
from progidiff.labels.readings import Readings
from progidiff.labels.saving import REVIEW_PAGE
from progidiff.server.datastores.images import find_image
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.storage.json_text import Text
from progidiff.storage.versions import VersionStore

logger = logging.getLogger(__name__)

SLICES_PER_IMAGE = 8
"""How many slices of an image are suggested at a time."""

MAX_QUEUE = 500

ALL, TODO, STARTED, DONE = "all", "todo", "started", "done"
STATES = (ALL, TODO, STARTED, DONE)
"""Of an image in the worklist, and all of them."""

ALL_LABELLED = (
    "Every image is labelled. To go on, add images, or review the labels that the model doubts most: GET "
    "/progidiff/queue lists them."
)
NO_IMAGES = "The datastore has no images. Put some into the studies folder, or add one with PUT /datastore/image."
ALL_RESERVED = (
    "Every image that is not labelled yet is with somebody else. Try again in {minutes:g} minutes at the latest, or "
    "skip ahead in the queue."
)


class Suggestion(SuggestedWork):
    """An image that a client should work on.

    Attributes:
        path: Of its file, as the system gives it: clients open it.
    """

    path: Annotated[str, SkipValidation]


class NothingLeft(BaseModel):
    """That there is no image to give.

    Attributes:
        message: Why, and what to do instead.
        review: Labelled images that may be worth a second look.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    message: Text
    review: list[QueueEntry]


@dataclass(frozen=True)
class _Survey:
    """The state of the whole pool at one moment."""

    images: tuple[str, ...]
    annotated: Mapping[str, frozenset[int] | None]
    entries: Mapping[str, ScoredImage]
    pool: Pool
    open: frozenset[str]
    rounds: Mapping[str, int]

    def find_round(self, image: str | None = None) -> int:
        """How often the model for an image was trained with labels of this pool; of all images, that of the modality
        with the fewest: an order over modalities is as little settled as the youngest model in it."""
        entries = self.entries.values() if image is None else [self.entries[image]]
        return min((self.rounds.get(modality, 0) for modality in {entry.modality for entry in entries}), default=0)


class Selection:
    """Chooses from a pool; safe for threads.

    Args:
        app: Whose datastore is the pool.
        infer: Opens images of which nothing is known, and names the model.
        scores: Of the background scorer.
        annotations: What is annotated.
        reservations: Who has which image.
        wanted_version: Modality -> the model version whose scores are preferred.
        failures: Images that could not be scored, and why.
        fingerprint: Of an image's file: another one means that a file which could not be read deserves another look.
        config: Of the strategies.
        default: The strategy that the host's name `random` stands for.
        reserve_minutes: For the message when all are reserved.
        textdiff: Gives the versions of the models for pictures, None if there are none.
        readings: Who reads what, where images are read twice; None where they are not.
    """

    def __init__(
        self,
        app: MONAILabelApp,
        infer: ProposalInferTask,
        scores: SliceScoreStore,
        annotations: AnnotationStore,
        reservations: Reservations,
        wanted_version: Callable[[str], str],
        failures: Callable[[], Mapping[str, str]],
        fingerprint: Callable[[str], str],
        config: AcquisitionConfig | None = None,
        default: str = DEFAULT_STRATEGY,
        reserve_minutes: float = 30.0,
        textdiff: Callable[[], VersionStore[Any] | None] = lambda: None,
        readings: Readings | None = None,
    ) -> None:
        self._textdiff = textdiff
        self._readings = readings or Readings(annotations, is_on=False)
        self._versions: tuple[object, list[TrainedVersion]] = (None, [])
        self.reservations = reservations
        self.default = default
        self.config = config or AcquisitionConfig()
        self._app = app
        self._infer = infer
        self._scores = scores
        self._annotations = annotations
        self._wanted_version = wanted_version
        self._failures = failures
        self._fingerprint = fingerprint
        self._minutes = reserve_minutes
        self._lock = threading.RLock()
        self._broken: dict[str, tuple[str, str]] = {}
        self._finished: dict[str, int] = {}
        self._pool: tuple[tuple[ScoredImage, ...], Pool] = ((), build_pool([]))

    def prepare(self) -> None:
        """Read the scores and put the pool together before anybody asks; a server calls it from a thread of its own
        when it starts.

        Changes nothing, reserves nothing and never raises: what fails here is told to the first who asks.
        """
        try:
            # The files are read outside the lock: who asks meanwhile reads on where this is.
            if self._scores.load_all():
                self.queue(1)
        except Exception as err:  # without it the first answer is slow, nothing else
            logger.warning(
                "The pool could not be put together ahead of the first request: %s: %s", type(err).__name__, err
            )

    def next(
        self, client: str, strategy: str = "random", count: int = SLICES_PER_IMAGE, user: str = ""
    ) -> Suggestion | NothingLeft:
        """The image that a client should work on, reserved for it.

        Args:
            client: Who asks. What it was given before and did not label goes back to the others.
            strategy: One of `STRATEGIES`, or `random` for the default one.
            count: Slices to suggest.
            user: Whose skipped images come last.

        Raises:
            RequestError: if there is no such strategy.
        """
        name = self._check_strategy(strategy)
        with self._lock:
            mine = set(self.reservations.held_by(client))
        while True:
            with self._lock:
                survey = self._survey(user)
                image = self._reserve_next(survey, name, client, mine, user)
            if image is None:
                return self._explain_end(survey, client)
            # Outside the lock: an image behind a DICOMweb server may have to be fetched, and others need not wait for
            # that.
            answer = self._describe_opened(survey, image, name, count)
            if answer is not None:
                for other in mine - {image}:
                    self.reservations.release(other)
                return answer
            self.reservations.release(image)

    def _reserve_next(self, survey: _Survey, strategy: str, client: str, mine: set[str], user: str) -> str | None:
        """The best image that nobody else has, reserved; what the client just had or skipped only when there is nothing
        else.
        """
        others = {image for image, owner in self.reservations.all().items() if owner != client}
        skipped = self._find_skipped(user) & survey.open
        for excluded in (others | mine | skipped, others | mine, others):
            for image in self._order(survey, strategy, excluded):
                if self.reservations.reserve(image, client):
                    return image
        return None

    def queue(self, limit: int = 50) -> list[QueueEntry]:
        """What would be given next, best first, by the default strategy.

        Args:
            limit: 1..500 images.

        Raises:
            RequestError: if the limit is out of range.
        """
        if not 1 <= limit <= MAX_QUEUE:
            raise RequestError(f"Option limit is {limit}; it must be from 1 to {MAX_QUEUE}.")
        with self._lock:
            survey = self._survey()
            reserved = self.reservations.all()
            found: list[QueueEntry] = []
            for image in self._order(survey, self.default, frozenset(), limit):
                entry = self._describe(survey, image, self.default, SLICES_PER_IMAGE, opened=False)
                if entry is not None:
                    found.append(QueueEntry(**dict(entry), reserved_by=reserved.get(image)))
                if len(found) == limit:
                    break
            return found or self.review(limit)

    def review(self, limit: int = 5) -> list[QueueEntry]:
        """The labelled images whose proposals disagree most: where a label may be worth a second look."""
        with self._lock:
            survey = self._survey()
            reserved = self.reservations.all()
            labelled = [image for image in survey.images if image in survey.entries and image not in survey.open]
            doubt = {image: compute_uncertainty(survey.entries[image].scores, self.config) for image in labelled}
            found = []
            for image in sorted(labelled, key=lambda image: (-doubt[image], image))[:limit]:
                picks = pick_slices(
                    survey.pool,
                    SLICES_PER_IMAGE,
                    within=image,
                    config=self.config,
                    round_index=survey.find_round(image),
                )
                answer = self._answer(survey, image, picks, "review", summarise_reasons(picks))
                found.append(QueueEntry(**dict(answer), reserved_by=reserved.get(image)))
            return found

    def worklist(
        self, state: str = ALL, search: str = "", offset: int = 0, limit: int = 50, user: str = ""
    ) -> Worklist:
        """All images with what is done on each, in the order of the default strategy; those that are done come last.

        Args:
            state: One of `STATES`.
            search: What the id of an image contains, in any case; "" for all.
            offset: Images to leave out at the beginning.
            limit: 1..500 images.
            user: Whose list; where images are read twice, the states are those of this person's readings.
        """
        with self._lock:
            survey = self._survey(user)
            tags = {image: self._readings.find_shown_tag(image, user) for image in survey.images}
            states = self._find_states(survey, tags)
            wanted = {
                image for image, own in states.items() if state in (ALL, own) and search.casefold() in image.casefold()
            }
            listed = [image for image in self._order(survey, self.default, frozenset(), MAX_QUEUE) if image in wanted]
            given = set(listed)
            rest = sorted(wanted - given, key=lambda image: (states[image] == DONE, image))
            page = [*listed, *rest][offset : offset + limit]
            reserved = self.reservations.all()
            annotated = {image: self._annotations.find_annotated(image, tag) for image, tag in tags.items()}
            entries = [
                WorklistEntry(
                    **{**dict(self._describe_any(survey, image)), "state": states[image]},
                    reserved_by=reserved.get(image),
                    annotated=_count_annotated(annotated.get(image, {})),
                )
                for image in page
            ]
        organs = Counter(name for image in survey.images for name in annotated.get(image, {}))
        return Worklist(
            images=len(survey.images),
            counts={name: list(states.values()).count(name) for name in (TODO, STARTED, DONE)},
            found=len(wanted),
            entries=entries,
            strategy=self.default,
            heading=HEADINGS[self.default],
            organs=[OrganProgress(structure=name, images=count) for name, count in organs.most_common()],
            folder="",
            formats=list(list_suffixes(Use.IMAGE)),
        )

    def _find_states(self, survey: _Survey, tags: Mapping[str, str]) -> dict[str, str]:
        """Image -> one of `STATES`. What somebody said of it counts first; a viewer's label of a whole volume says that
        nothing is left, one structure of the review page does not."""
        said = self._annotations.find_finished(frozenset(tags.values()).__contains__)
        states = {}
        for image in survey.images:
            if image in said:
                is_done = said[image]
            else:
                saves = self._annotations.in_force(image, tags[image])
                is_step = bool(saves) and all(save.client == REVIEW_PAGE for save in saves)
                entry = survey.entries.get(image)
                depth = entry.scores.num_slices if entry else None
                is_done = is_whole(survey.annotated.get(image, frozenset()), depth) and not is_step
            begun = survey.annotated.get(image, frozenset())
            states[image] = DONE if is_done else STARTED if begun is None or begun else TODO
        return states

    def _describe_any(self, survey: _Survey, image: str) -> SuggestedWork:
        """An image with the slices that the strategy chose of it, whether any are left or not."""
        found = (
            self._describe(survey, image, self.default, SLICES_PER_IMAGE, opened=False)
            if image in survey.open
            else None
        )
        return found or self._answer(survey, image, [], "", "")

    def release(self, image: str) -> None:
        """For when a label of an image was saved."""
        self.reservations.release(image)

    def _check_strategy(self, strategy: str) -> str:
        if strategy == "random":
            return self.default
        if strategy not in STRATEGIES:
            raise RequestError(f"There is no strategy '{strategy[:60]}'; there are random, {', '.join(STRATEGIES)}.")
        return strategy

    def _survey(self, user: str = "") -> _Survey:
        """The pool as it is, for a person where images are read twice."""
        images = tuple(sorted(self._app.datastore().list_images()))
        known = set(images)
        # A label that was made elsewhere, of which no slices are known, is of the whole volume.
        annotated: dict[str, frozenset[int] | None] = dict.fromkeys(
            known - set(self._app.datastore().get_unlabeled_images())
        )
        annotated |= {image: slices for image, slices in self._annotations.annotated_images().items() if image in known}
        entries = {
            image: entry for image, entry in self._scores.pick_newest(self._wanted_version).items() if image in known
        }
        ordered = tuple(entries[image] for image in sorted(entries))
        if len(self._pool[0]) != len(ordered) or any(a is not b for a, b in zip(self._pool[0], ordered, strict=True)):
            self._pool = (ordered, build_pool([entry.scores for entry in ordered]))
        finished = self._annotations.find_finished()
        work = frozenset(
            image for image in images if not finished.get(image) and self._has_work(image, annotated, entries)
        )
        rounds = self._count_rounds(known | annotated.keys())
        if self._readings.is_on:
            work = frozenset(image for image in images if self._readings.is_open_for(image, user))
            own = {
                image: self._annotations.annotated_slices(image, self._readings.find_shown_tag(image, user))
                for image in images
            }
            annotated = {image: slices for image, slices in own.items() if slices is None or slices}
        return _Survey(images, annotated, entries, self._pool[1], work, rounds)

    def _count_rounds(self, images: Collection[str]) -> dict[str, int]:
        """See `report.count_rounds`; versions never change, so that they are read again only when there are others."""
        adapters, textdiff = self._infer.engine.adapters, self._textdiff()
        stores: list[VersionStore[Any]] = [adapters] if textdiff is None else [adapters, textdiff]
        state = [(type(store).__name__, entry.name, entry.versions) for store in stores for entry in store.entries()]
        if state != self._versions[0]:
            problems: list[str] = []
            self._versions = (state, list_versions(adapters, textdiff, problems))
            for problem in problems:
                logger.warning("%s", problem)
        return count_rounds(self._versions[1], images)

    def _has_work(
        self, image: str, annotated: Mapping[str, frozenset[int] | None], entries: Mapping[str, ScoredImage]
    ) -> bool:
        slices = annotated.get(image, frozenset())
        if is_whole(slices, entries[image].scores.num_slices if image in entries else None):
            return False
        return image in entries or len(slices or ()) != self._finished.get(
            image
        )  # how many slices it has is found out when it is opened

    def _order(self, survey: _Survey, strategy: str, excluded: Collection[str], limit: int = 1) -> Iterator[str]:
        """The images that may be given, best first: `limit` of them by one look at the pool, then the others."""
        free = survey.open - set(excluded) - self._find_unreadable().keys()
        given: set[str] = set()
        if strategy in BY_SCORE or (strategy == "foreground_random" and len(survey.pool)):
            while True:
                picks = pick_slices(
                    survey.pool,
                    limit,
                    strategy,
                    self.config,
                    annotated=survey.annotated,
                    excluded=[image for image in survey.entries if image not in free or image in given],
                    one_per_image=True,
                    round_index=survey.find_round(),
                    seed=self._seed(strategy),
                )
                for pick in picks:
                    given.add(pick.image)
                    yield pick.image
                if not picks:
                    break
        # Without scores, or for strategies that need none: little annotated first, otherwise by chance (the same one
        # until a label comes).
        chance = f"{self._seed(strategy)}"
        rest = free - given

        def rank(image: str) -> tuple[int, bytes]:
            done = 0 if strategy == "uniform_random" else len(survey.annotated.get(image) or ())
            return done, hashlib.sha256(f"{chance}:{image}".encode()).digest()

        yield from sorted(rest, key=rank)

    def _describe_opened(self, survey: _Survey, image: str, strategy: str, count: int) -> Suggestion | None:
        """The answer for an image, None if its file is gone or cannot be read; it is then passed over until it
        changes.
        """
        try:
            path = find_image(self._app, image)
            answer = self._describe(survey, image, strategy, count, opened=True)
        except (NotFoundError, ImageError) as err:
            logger.warning("'%s' is passed over: %s", image, err)
            with self._lock:
                self._broken[image] = (self._fingerprint(image), str(err))
            return None
        if answer is None:
            with self._lock:
                self._finished[image] = len(survey.annotated.get(image) or ())
            return None
        return Suggestion(**dict(answer), path=path)

    def _describe(self, survey: _Survey, image: str, strategy: str, count: int, opened: bool) -> SuggestedWork | None:
        done = survey.annotated.get(image) or frozenset()
        state = "started" if done else "new"
        if image in survey.entries:
            settings = {
                "annotated": survey.annotated,
                "round_index": survey.find_round(image),
                "seed": self._seed(strategy),
            }
            picks = pick_slices(survey.pool, count, strategy, self.config, within=image, **settings)  # type: ignore[arg-type]
            return self._answer(survey, image, picks, state, summarise_reasons(picks)) if picks else None
        why = "Not scored yet: slices are spread evenly."
        if not opened:
            if self._is_known_picture(image):
                return self._answer(survey, image, [], state, "Not scored yet.", PICTURE)
            return self._answer(survey, image, [], state, why)
        path = find_image(self._app, image)
        if is_picture(path):
            read_picture_grid(path)  # Whether it can be read at all.
            pick = Pick(image, 0, 0.0, (), "not scored yet")
            return self._answer(survey, image, [pick], state, "Not scored yet.", PICTURE)
        volume = self._infer.open_volume(path, None, self._app.datastore().get_image_info(image))
        depth = len(volume.to_stack()[0])
        if strategy == "uniform_random":
            left = [z for z in range(depth) if z not in done]
            chosen = [
                int(z) for z in np.random.default_rng([self._seed(strategy), *image.encode()]).permutation(left)[:count]
            ]
            picks = [Pick(image, z, 0.0, (), "drawn at random") for z in chosen]
            why = "Drawn at random."
        else:
            picks = [
                Pick(image, z, 0.0, (), "as far as possible from annotated slices")
                for z in space_evenly(depth, count, done)
            ]
        return self._answer(survey, image, picks, state, why, volume.modality) if picks else None

    def _is_known_picture(self, image: str) -> bool:
        """Whether it is a picture, as far as that can be told without fetching it."""
        datastore = self._app.datastore()
        return not isinstance(datastore, DICOMWebDatastore) and is_picture(str(datastore.get_image_uri(image)))

    def _answer(
        self, survey: _Survey, image: str, picks: list[Pick], state: str, reason: str, modality: str = ""
    ) -> SuggestedWork:
        """`modality` is that of an image without scores; "" if not known."""
        entry = survey.entries.get(image)

        def tell(text: str) -> str:
            return text.replace(" on slice 1", "") if entry is not None and entry.modality == PICTURE else text

        return SuggestedWork(
            image=image,
            slices=[SuggestedSlice.of(pick, tell(pick.reason)) for pick in picks],
            reason=tell(reason),
            scores_from=entry.scores.version if entry else "",
            state=state,
            modality=entry.modality if entry else modality,
        )

    def _seed(self, strategy: str) -> int:
        """Chance changes with every label that is saved; the scored strategies have a noise of their own that changes
        with the model.
        """
        return 0 if strategy in BY_SCORE else self._annotations.last_sequence()

    def _find_skipped(self, user: str) -> set[str]:
        """What the user, or somebody without a name, set aside and nobody labelled since."""
        skipped: dict[str, None] = {}
        for event in self._annotations.events():
            if event.kind == "skip" and event.user in ("", user):
                skipped[event.image] = None
            elif event.kind == "label":
                skipped.pop(event.image, None)
        return set(skipped)

    def _explain_end(self, survey: _Survey, client: str) -> NothingLeft:
        """Why there is nothing to give, and what to do instead."""
        if not survey.images:
            return NothingLeft(message=NO_IMAGES, review=[])
        with self._lock:
            reasons = self._find_unreadable()
            taken = [
                image
                for image, owner in self.reservations.all().items()
                if owner != client and image in survey.open - reasons.keys()
            ]
        if taken:
            return NothingLeft(message=ALL_RESERVED.format(minutes=self._minutes), review=[])
        broken = sorted(survey.open & reasons.keys())
        message = ALL_LABELLED
        if broken:
            message = (
                f"Every image that can be read is labelled. {len(broken)} cannot be read, "
                f"for example '{broken[0]}': {reasons[broken[0]]}"
            )
        return NothingLeft(message=message, review=self.review(5))

    def _find_unreadable(self) -> dict[str, str]:
        """Images that cannot be read, and why, as long as their files are what they were."""
        self._broken = {image: entry for image, entry in self._broken.items() if entry[0] == self._fingerprint(image)}
        return {**self._failures(), **{image: reason for image, (_, reason) in self._broken.items()}}


def _count_annotated(structures: Mapping[str, frozenset[int] | None]) -> dict[str, int | None]:
    return {name: None if slices is None else len(slices) for name, slices in structures.items()}


def is_whole(slices: frozenset[int] | None, num_slices: int | None) -> bool:
    """Whether an image is wholly annotated: as a whole, or slice by slice until none is left.

    Args:
        slices: That are annotated; None for the whole volume.
        num_slices: Of the image; None if not known.

    Example:
        >>> is_whole(None, None), is_whole(frozenset({0, 1}), 2), is_whole(frozenset({0, 1}),
        ...     3), is_whole(frozenset({0, 1}), None)
        (True, True, False, False)
    """
    return slices is None or (num_slices is not None and len(slices) >= num_slices)
