"""What to annotate next: the image and its slices, for a client, from the scores that are there.

Answers come from the score store in memory (`PoolState`); no image is opened unless nothing of it is known yet. An
image is reserved for the client that got it, so that two people work on two images. While nothing is scored, slices are
spread evenly, and the answer says so.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Any

import numpy as np
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from numpy.typing import NDArray
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
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.active_learning.settings import BY_SCORE, DEFAULT_STRATEGY, HEADINGS, STRATEGIES, AcquisitionConfig
from progidiff.active_learning.strategies import (
    ImageScores,
    Pick,
    Pool,
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
from progidiff.server.background.pool_state import ALL, DONE, OF_IMAGES, PoolState, find_state
from progidiff.server.datastores.images import find_image
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.storage.json_text import Text
from progidiff.storage.versions import VersionStore

logger = logging.getLogger(__name__)

SLICES_PER_IMAGE = 8
"""How many slices of an image are suggested at a time."""

MAX_QUEUE = 500

MAX_ORDERED = 1000
"""So many images of the worklist are in the order of the strategy; those after them are by name."""

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
    """The pool at one moment, for one person.

    Attributes:
        state: Of all images; changes when somebody looks again.
        annotated: Image -> its annotated slices, None for the whole volume; where images are read twice, the person's.
        open: bool (V,): on which images work is left, for that person.
        done: int (V,): slices that are annotated.
        rounds: Modality -> trainings.
    """

    state: PoolState
    annotated: Mapping[str, frozenset[int] | None]
    open: NDArray[np.bool_]
    done: NDArray[np.int64]
    rounds: Mapping[str, int]

    def find_round(self, image: str | None = None) -> int:
        """How often the model for an image was trained with labels of this pool; of all images, that of the modality
        with the fewest: an order over modalities is as little settled as the youngest model in it."""
        found = self.state.modalities if image is None else [self.state.entries[image].modality]
        return min((self.rounds.get(name, 0) for name in found if self.state.modalities[name] > 0), default=0)

    def is_open(self, image: str) -> bool:
        """Whether work is left on an image."""
        found = self.state.find([image])
        return len(found) > 0 and bool(self.open[found[0]])


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
        self._failures = failures
        self._fingerprint = fingerprint
        self._minutes = reserve_minutes
        self._lock = threading.RLock()
        self._broken: dict[str, tuple[str, str]] = {}
        self._wanted_version = wanted_version
        self._state = PoolState(app, annotations, scores, lambda modality: self._wanted_version(modality))
        self._rounds: tuple[object, object, dict[str, int]] = (None, None, {})
        self._doubts: dict[str, tuple[ImageScores, float]] = {}

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
        skipped = set(filter(survey.is_open, self._annotations.find_skipped(user)))
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
            state = survey.state
            labelled = [
                image
                for image, is_open in zip(state.images, survey.open.tolist(), strict=True)
                if not is_open and image in state.entries
            ]
            doubts = {image: self._doubt(image) for image in labelled}
            pool = state.build_slice_pool()
            found = []
            for image in sorted(labelled, key=lambda image: (-doubts[image], image))[:limit]:
                picks = pick_slices(
                    pool,
                    SLICES_PER_IMAGE,
                    within=image,
                    # Where to look again is about this image, not about what it stands for.
                    config=replace(self.config, cover=False),
                    round_index=survey.find_round(image),
                )
                answer = self._answer(survey, image, picks, "review", summarise_reasons(picks))
                found.append(QueueEntry(**dict(answer), reserved_by=reserved.get(image)))
            return found

    def _doubt(self, image: str) -> float:
        """See `compute_uncertainty`."""
        scores = self._state.entries[image].scores
        known = self._doubts.get(image)
        if known is None or known[0] is not scores:
            known = self._doubts[image] = scores, compute_uncertainty(scores, self.config)
        return known[1]

    def worklist(
        self, state: str = ALL, search: str = "", offset: int = 0, limit: int = 50, user: str = ""
    ) -> Worklist:
        """All images with what is done on each, in the order of the default strategy as far as `MAX_ORDERED`, then by
        name; those that are done come last.

        Args:
            state: One of `STATES`.
            search: What the id of an image contains, in any case; "" for all.
            offset: Images to leave out at the beginning.
            limit: 1..500 images.
            user: Whose list; where images are read twice, the states are those of this person's readings.
        """
        with self._lock:
            survey = self._survey(user)
            pool = survey.state
            tags = self._find_tags(user)
            states = pool.list_states() if tags is None else self._find_states(survey, tags)
            wanted = pool.select_states(state) if tags is None else np.array([state in (ALL, own) for own in states])
            if search:
                name = search.casefold()
                wanted = wanted & np.array([name in image.casefold() for image in pool.images], bool)
            page = self._find_page(survey, states, wanted, offset, limit)
            reserved = self.reservations.all()
            entries = [
                WorklistEntry(
                    **{**dict(self._describe_any(survey, image)), "state": states[number]},
                    reserved_by=reserved.get(image),
                    annotated=_count_annotated(
                        self._annotations.find_annotated(image, *(() if tags is None else (tags[image],)))
                    ),
                )
                for number, image in page
            ]
            if tags is None:
                renamed = self._annotations.find_renamed()
                counts, organs = pool.count_states(), Counter[str]()
                for name, number in (+pool.organs).items():
                    organs[renamed.get(name, name)] += number
            else:
                counts = {name: states.count(name) for name in OF_IMAGES}
                organs = Counter(
                    name for image, tag in tags.items() for name in self._annotations.find_annotated(image, tag)
                )
        return Worklist(
            images=len(pool.images),
            counts=counts,
            found=int(wanted.sum()),
            entries=entries,
            strategy=self.default,
            heading=HEADINGS[self.default],
            organs=[OrganProgress(structure=name, images=count) for name, count in organs.most_common()],
            folder="",
            formats=list(list_suffixes(Use.IMAGE)),
        )

    def _find_page(
        self, survey: _Survey, states: list[str], wanted: NDArray[np.bool_], offset: int, limit: int
    ) -> list[tuple[int, str]]:
        """Positions and ids of some images of the worklist; no more of the order is worked out than it takes."""
        images = survey.state.images
        rest = wanted.copy()
        ordered: list[int] = []
        for image in islice(self._order(survey, self.default, frozenset(), MAX_QUEUE), MAX_ORDERED):
            number = int(survey.state.find([image])[0])
            if wanted[number]:
                ordered.append(number)
                rest[number] = False
                if len(ordered) == offset + limit:
                    break
        else:
            by_name = np.flatnonzero(rest).tolist()
            ordered += [number for number in by_name if states[number] != DONE]
            ordered += [number for number in by_name if states[number] == DONE]
        return [(number, images[number]) for number in ordered[offset : offset + limit]]

    def _find_tags(self, user: str) -> dict[str, str] | None:
        """Image -> the tag whose label a person is shown; None where it is the label that counts for all images."""
        if not self._readings.is_on:
            return None
        return {image: self._readings.find_shown_tag(image, user) for image in self._state.images}

    def _find_states(self, survey: _Survey, tags: Mapping[str, str]) -> list[str]:
        """The state of each image, of the labels of these tags."""
        said = self._annotations.find_finished(frozenset(tags.values()).__contains__)
        states = []
        for image, tag in tags.items():
            entry = survey.state.entries.get(image)
            clients = [save.client for save in self._annotations.in_force(image, tag)]
            slices = survey.annotated.get(image, frozenset())
            depth = entry.scores.num_slices if entry else None
            states.append(find_state(said.get(image), slices, depth, clients))
        return states

    def _describe_any(self, survey: _Survey, image: str) -> SuggestedWork:
        """An image with the slices that the strategy chose of it, whether any are left or not."""
        found = (
            self._describe(survey, image, self.default, SLICES_PER_IMAGE, opened=False)
            if survey.is_open(image)
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
        state = self._state
        state.update()
        rounds = self._count_rounds(state)
        if not self._readings.is_on:
            return _Survey(state, state.annotated, state.open, state.done, rounds)
        own = {
            image: self._annotations.annotated_slices(image, self._readings.find_shown_tag(image, user))
            for image in state.images
        }
        return _Survey(
            state,
            {image: slices for image, slices in own.items() if slices is None or slices},
            np.array([self._readings.is_open_for(image, user) for image in state.images], bool),
            np.array([len(slices or ()) for slices in own.values()], np.int64),
            rounds,
        )

    def _count_rounds(self, state: PoolState) -> dict[str, int]:
        """See `report.count_rounds`; versions never change, so that they are read again only when there are others."""
        adapters, textdiff = self._infer.engine.adapters, self._textdiff()
        stores: list[VersionStore[Any]] = [adapters] if textdiff is None else [adapters, textdiff]
        found = [(type(store).__name__, entry.name, entry.versions) for store in stores for entry in store.entries()]
        if found != self._versions[0]:
            problems: list[str] = []
            self._versions = (found, list_versions(adapters, textdiff, problems))
            for problem in problems:
                logger.warning("%s", problem)
        versions, images, rounds = self._rounds
        if versions is not self._versions[1] or images is not state.images:
            rounds = count_rounds(self._versions[1], frozenset(state.images))
            self._rounds = (self._versions[1], state.images, rounds)
        return rounds

    def _order(self, survey: _Survey, strategy: str, excluded: Collection[str], limit: int = 1) -> Iterator[str]:
        """The images that may be given, best first: `limit` of them by one look at the pool, then the others."""
        state = survey.state
        free = survey.open.copy()
        for images in (excluded, self._find_unreadable()):
            free[state.find(images)] = False
        if strategy in BY_SCORE or (strategy == "foreground_random" and self._readings.is_on):
            chosen = self._order_by_slices(survey, strategy, free, limit)
        elif strategy == "foreground_random":
            rng = np.random.default_rng([self._seed(strategy), survey.find_round(), *strategy.encode()])
            drawn = state.table.draw(free, self.config.foreground_share, rng)
            chosen = (state.images[position] for position in drawn)
        else:
            chosen = iter(())
        for image in chosen:
            free[state.find([image])] = False
            yield image
        # Without scores, or for strategies that need none: little annotated first, otherwise by chance (the same one
        # until a label comes).
        done = None if strategy == "uniform_random" else survey.done
        yield from state.by_chance(free, self._seed(strategy), done)

    def _order_by_slices(self, survey: _Survey, strategy: str, free: NDArray[np.bool_], limit: int) -> Iterator[str]:
        state, pool = survey.state, survey.state.build_slice_pool()
        left = free.copy()
        while len(pool):
            picks = pick_slices(
                pool,
                limit,
                strategy,
                self.config,
                annotated=survey.annotated,
                excluded=[image for image in pool.images if not left[state.find([image])[0]]],
                one_per_image=True,
                round_index=survey.find_round(),
                seed=self._seed(strategy),
            )
            for pick in picks:
                left[state.find([pick.image])] = False
                yield pick.image
            if not picks:
                return

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
                self._state.exhaust(image)
            return None
        return Suggestion(**dict(answer), path=path)

    def _describe(self, survey: _Survey, image: str, strategy: str, count: int, opened: bool) -> SuggestedWork | None:
        done = survey.annotated.get(image) or frozenset()
        state = "started" if done else "new"
        if image in survey.state.entries:
            settings = {
                "annotated": survey.annotated,
                "round_index": survey.find_round(image),
                "seed": self._seed(strategy),
            }
            pool = self._find_slices(survey, image, strategy)
            picks = pick_slices(pool, count, strategy, self.config, within=image, **settings)  # type: ignore[arg-type]
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
        entry = survey.state.entries.get(image)

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

    @staticmethod
    def _find_slices(survey: _Survey, image: str, strategy: str) -> Pool:
        """Where slices of an image are chosen from; how its scores compare says only the whole pool."""
        state = survey.state
        return state.build_slice_pool() if strategy in BY_SCORE else state.build_image_pool(image)

    def _explain_end(self, survey: _Survey, client: str) -> NothingLeft:
        """Why there is nothing to give, and what to do instead."""
        if not survey.state.images:
            return NothingLeft(message=NO_IMAGES, review=[])
        with self._lock:
            reasons = self._find_unreadable()
            taken = [
                image
                for image, owner in self.reservations.all().items()
                if owner != client and image not in reasons and survey.is_open(image)
            ]
        if taken:
            return NothingLeft(message=ALL_RESERVED.format(minutes=self._minutes), review=[])
        broken = sorted(filter(survey.is_open, reasons))
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
