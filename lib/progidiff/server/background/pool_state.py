"""What the choice of the next image goes by, for every image of the pool, kept up to date by what changed.

A pool may have a hundred thousand images. Looking at each of them for every request would make each save and each next
sample slower with every image that is added, so that the history, the datastore and the scores are asked what changed
since the last time, and only those images are looked at again. All of them are when there are other images, or scores
of other structures.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import numpy as np
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from numpy.typing import NDArray

from progidiff.active_learning.image_choice import ImageTable, shuffle_images, shuffle_keys
from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.strategies import Pool, build_pool
from progidiff.labels.history import AnnotationStore
from progidiff.labels.saving import REVIEW_PAGE
from progidiff.server.datastores.local import SafeLocalDatastore

ALL, TODO, STARTED, DONE = "all", "todo", "started", "done"
OF_IMAGES = (TODO, STARTED, DONE)
STATES = (ALL, *OF_IMAGES)
"""Of an image in the worklist, and all of them."""

_CODES = {name: number for number, name in enumerate(OF_IMAGES)}


class PoolState:
    """One pool; whoever uses it holds a lock of his own around everything.

    Args:
        app: Whose datastore is the pool.
        annotations: What is annotated.
        scores: Of the background scorer.
        wanted_version: Modality -> the model version whose scores are preferred.

    Attributes:
        images: Ids, ascending.
        annotated: Image -> its annotated slices; None for the whole volume. Images without any are not there.
        entries: Image -> its scores. Of images that are gone too.
        open: bool (V,), of the images in their order: whether work is left.
        done: int (V,), annotated slices; 0 where the whole volume is.
        modalities: Of the scored images, counted.
        organs: Structure -> images on which it is annotated.
        table: What images are drawn by.
    """

    def __init__(
        self,
        app: MONAILabelApp,
        annotations: AnnotationStore,
        scores: SliceScoreStore,
        wanted_version: Callable[[str], str],
    ) -> None:
        self._app = app
        self._annotations = annotations
        self._scores = scores
        self._wanted_version = wanted_version
        self.images: tuple[str, ...] = ()
        self._positions: dict[str, int] = {}
        self.entries: Mapping[str, ScoredImage] = {}
        self._exhausted: dict[str, int] = {}
        self._names: object = None
        self._changes: int | None = None
        self._labelled: frozenset[str] = frozenset()
        self._foreign: frozenset[str] = frozenset()
        self._sequence = 0
        self._dirty: set[str] = set()
        self._pool: tuple[tuple[ScoredImage, ...], Pool] = ((), build_pool([]))
        self.table = ImageTable((), 0)
        self._start_again(())

    def _start_again(self, images: Sequence[str]) -> None:
        self.images = tuple(images)
        self._positions = {image: number for number, image in enumerate(self.images)}
        self.annotated: dict[str, frozenset[int] | None] = {}
        self.open = np.zeros(len(self.images), bool)
        self.done = np.zeros(len(self.images), np.int64)
        self._states = np.zeros(len(self.images), np.int8)
        self.modalities: Counter[str] = Counter()
        self.organs: Counter[str] = Counter()
        self._organs_of: dict[str, tuple[str, ...]] = {}
        self._modality_of: dict[str, str] = {}
        self._is_new = True
        self._keys = shuffle_keys(self.images)
        self._dirty = set(self.images)

    def update(self) -> None:
        """Look at what changed."""
        self._find_other_images()
        self._find_other_labels()
        self._find_other_scores()
        for image in self._dirty & self._positions.keys():
            self._look_at(image)
        self._dirty.clear()

    def exhaust(self, image: str) -> None:
        """Say that an unscored image was opened, and that no slice is left beside those that are annotated now."""
        self._exhausted[image] = len(self.annotated.get(image) or ())
        self._dirty.add(image)

    def find(self, images: Collection[str]) -> NDArray[np.intp]:
        """Positions of those images that are in the pool."""
        return np.array([self._positions[image] for image in images if image in self._positions], np.intp)

    def is_open(self, image: str) -> bool:
        """Whether work is left on an image."""
        position = self._positions.get(image)
        return position is not None and bool(self.open[position])

    def list_states(self) -> list[str]:
        """One of `TODO`, `STARTED`, `DONE` for each image, in their order."""
        return [OF_IMAGES[code] for code in self._states.tolist()]

    def select_states(self, state: str) -> NDArray[np.bool_]:
        """bool (V,): the images in a state."""
        return np.ones(len(self.images), bool) if state == ALL else self._states == _CODES[state]

    def count_states(self) -> dict[str, int]:
        """State -> images."""
        counts = np.bincount(self._states, minlength=len(_CODES)).tolist()
        return {name: counts[code] for name, code in _CODES.items()}

    def by_chance(
        self, free: NDArray[np.bool_], seed: int, least_first: NDArray[np.int64] | None = None
    ) -> Iterator[str]:
        """Images in an order that a seed gives, the same for an image whichever others are free.

        Args:
            free: bool (V,), which of them.
            seed: Of the order.
            least_first: int (V,); images with less of it come before all others.
        """
        for position in shuffle_images(self._keys, np.flatnonzero(free), seed, least_first):
            yield self.images[position]

    def build_slice_pool(self) -> Pool:
        """All slices of all scored images side by side; made when it is asked for, and again when scores changed."""
        ordered = tuple(self.entries[image] for image in self.images if image in self.entries)
        known = self._pool[0]
        if len(known) != len(ordered) or any(a is not b for a, b in zip(known, ordered, strict=True)):
            self._pool = (ordered, build_pool([entry.scores for entry in ordered]))
        return self._pool[1]

    def build_image_pool(self, image: str) -> Pool:
        """The slices of one scored image, with the structures of all."""
        return build_pool([self.entries[image].scores], self.table.structures)

    def _find_other_images(self) -> None:
        datastore = self._app.datastore()
        names: object = datastore.list_names() if isinstance(datastore, SafeLocalDatastore) else None
        if names is not None and names is self._names:
            return
        images = sorted(map(str, datastore.list_images()))
        self._names = names
        if len(images) != len(self.images) or any(a != b for a, b in zip(images, self.images, strict=True)):
            self._start_again(images)

    def _find_other_labels(self) -> None:
        sequence = self._annotations.last_sequence()
        if sequence < self._sequence:  # The log was replaced.
            self._dirty |= self._positions.keys()
        elif sequence > self._sequence:
            self._dirty |= self._annotations.changed_since(self._sequence)
        self._sequence = sequence
        foreign = self._annotations.foreign_labels()
        if foreign is not self._foreign:
            self._dirty |= foreign ^ self._foreign
            self._foreign = foreign
        datastore = self._app.datastore()
        if isinstance(datastore, SafeLocalDatastore):
            self._changes, changed = datastore.changes.since(self._changes)
            self._dirty |= self._positions.keys() if changed is None else changed
            return
        labelled = frozenset(self._positions) - set(map(str, datastore.get_unlabeled_images()))
        self._dirty |= labelled ^ self._labelled
        self._labelled = labelled

    def _find_other_scores(self) -> None:
        entries, known = self._scores.pick_newest(self._wanted_version), self.entries
        if entries is known and not self._is_new:
            return
        self.entries = entries
        self._dirty |= {image for image, entry in entries.items() if known.get(image) is not entry}
        self._dirty |= known.keys() - entries.keys()
        orders = dict.fromkeys(entries[image].scores.structures for image in self.images if image in entries)
        structures = tuple(dict.fromkeys(name for order in orders for name in order))
        if self._is_new or structures != self.table.structures:
            self.table = ImageTable(structures, len(self.images))
            self._dirty |= self._positions.keys()
        self._is_new = False

    def _look_at(self, image: str) -> None:
        position = self._positions[image]
        slices = self._annotations.annotated_slices(image)
        if slices is not None and not slices and self._is_labelled(self._app.datastore(), image):
            slices = None  # A label that was made elsewhere, of which no slices are known, is of the whole volume.
        if slices is None or slices:
            self.annotated[image] = slices
        else:
            self.annotated.pop(image, None)
        entry = self.entries.get(image)
        depth = entry.scores.num_slices if entry is not None else None
        self.done[position] = len(slices or ())
        self.table.put(position, None if entry is None else entry.scores, slices)
        self._count(image, entry)
        said = self._annotations.is_finished(image)
        self.open[position] = not said and self._has_work(image, slices, depth)
        clients = [save.client for save in self._annotations.in_force(image)]
        self._states[position] = _CODES[find_state(said, slices, depth, clients)]

    def _has_work(self, image: str, slices: frozenset[int] | None, depth: int | None) -> bool:
        if is_whole(slices, depth):
            return False
        # How many slices it has is found out when it is opened.
        return depth is not None or len(slices or ()) != self._exhausted.get(image)

    def _count(self, image: str, entry: ScoredImage | None) -> None:
        before, after = self._organs_of.get(image, ()), tuple(self._annotations.find_annotated(image))
        if before != after:
            self.organs.subtract(before)
            self.organs.update(after)
            self._organs_of[image] = after
        known, modality = self._modality_of.get(image), None if entry is None else entry.modality
        if known != modality:
            if known is not None:
                self.modalities[known] -= 1
                del self._modality_of[image]
            if modality is not None:
                self.modalities[modality] += 1
                self._modality_of[image] = modality

    def _is_labelled(self, datastore: Datastore, image: str) -> bool:
        if isinstance(datastore, SafeLocalDatastore):
            return datastore.is_labelled(image)
        return image in self._labelled


def find_state(
    said: bool | None,
    slices: frozenset[int] | None,
    depth: int | None,
    clients: Collection[str],
) -> str:
    """One of `TODO`, `STARTED`, `DONE`. What somebody said of an image counts first; a viewer's label of a whole volume
    says that nothing is left, one structure of the review page does not.

    Args:
        said: Whether it is done; None if nobody said anything.
        slices: That are annotated; None for the whole volume.
        depth: Slices of the image; None if not known.
        clients: What made the saves in force.
    """
    if said is not None:
        is_done = said
    else:
        is_step = bool(clients) and all(client == REVIEW_PAGE for client in clients)
        is_done = is_whole(slices, depth) and not is_step
    return DONE if is_done else STARTED if slices is None or slices else TODO


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
