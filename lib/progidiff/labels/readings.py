"""Double reading: two people label an image without each other, their labels are compared, and a third one decides.

Each person's label of an image has a tag of its own in the history, so that neither counts as the label and neither
changes the other. What the third person decides is a label of tag `FINAL` like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import RequestError
from progidiff.labels.history import FINAL, Annotation, AnnotationStore

READERS = 2
"""People who read an image before somebody decides."""

_PREFIX = "reading-"
_MAX_NAME = 40
_PLAIN = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Reading:
    """One person's label of an image.

    Attributes:
        user: Who.
        tag: Of the person's saves.
        label: The newest of them in force; its file is the whole reading.
        annotated: Structure -> axial slices that were read for it; None for the whole volume.
    """

    user: str
    tag: str
    label: Annotation
    annotated: Mapping[str, frozenset[int] | None]


@dataclass(frozen=True)
class SliceAgreement:
    """How far two readings agree on a structure on a slice.

    Attributes:
        index: Axial, from 0.
        dice: 0..1; 1 if neither draws it.
    """

    index: int
    dice: float


@dataclass(frozen=True)
class StructureAgreement:
    """How far two readings agree on a structure, on the slices that both people read for it.

    Attributes:
        structure: Its name.
        dice: Over all these slices, 0..1; 1 if neither draws it.
        slices: Of each of them on which somebody draws it, the worst first.
    """

    structure: str
    dice: float
    slices: tuple[SliceAgreement, ...]


class Readings:
    """Who reads what.

    Args:
        store: The history of labels.
        is_on: Whether images are read twice; everything goes to tag `FINAL` otherwise.
    """

    def __init__(self, store: AnnotationStore, is_on: bool) -> None:
        self._store = store
        self.is_on = is_on

    def list(self, image: str) -> list[Reading]:
        """The readings of an image, the one that began first in front."""
        tags = sorted(tag for tag in self._store.find_tags(image) if tag.startswith(_PREFIX))
        found = [(tag, self._store.in_force(image, tag)) for tag in tags]
        readings = [
            (saves[0].sequence, Reading(saves[-1].user, tag, saves[-1], self._store.find_annotated(image, tag)))
            for tag, saves in found
            if saves
        ]
        return [reading for _, reading in sorted(readings, key=lambda entry: entry[0])]

    def find_tag(self, image: str, user: str) -> str:
        """Where a person's label of an image goes: the person's own reading, or what counts, where two other people
        read it and this one decides.

        Raises:
            RequestError: if nobody knows who it is.
        """
        if not self.is_on:
            return FINAL
        if not user:
            raise RequestError(
                "Images are read twice here, and a reading needs somebody's name. Log in as a user, not without a "
                "login or with a token of the server."
            )
        tags = [reading.tag for reading in self.list(image)]
        own = make_tag(user)
        return own if own in tags or len(tags) < READERS else FINAL

    def find_shown_tag(self, image: str, user: str) -> str:
        """As `find_tag`, for somebody who looks; without a name it is what counts."""
        return self.find_tag(image, user) if user else FINAL

    def may_see(self, image: str, tag: str, user: str) -> bool:
        """Whether a person may see a label of an image: whatever is no reading, the own reading, and those of others
        where two people have read it and this one has not.
        """
        if not self.is_on or not tag.startswith(_PREFIX):
            return True
        tags = [reading.tag for reading in self.list(image)]
        own = make_tag(user) if user else ""
        return tag == own or (len(tags) >= READERS and own not in tags)

    def may_change(self, image: str, tag: str, user: str) -> bool:
        """Whether a person may save, rename or bring back under a tag: the own reading, and what counts where two
        other people read it.
        """
        if not self.is_on or not (tag == FINAL or tag.startswith(_PREFIX)):
            return True
        return bool(user) and tag == self.find_tag(image, user)

    def is_open_for(self, image: str, user: str) -> bool:
        """Whether a person may still be given an image: to read it, or to decide it."""
        tags = [reading.tag for reading in self.list(image)]
        if make_tag(user) in tags or self._store.current(image) is not None:
            return False
        return bool(user)


def make_tag(user: str) -> str:
    """The tag of a person's readings; two people never share one.

    Example:
        >>> make_tag("anna"), make_tag("Dr. Ä")
        ('reading-anna', 'reading-Dr._-df2a96b3')
    """
    if _PLAIN.fullmatch(user) and len(user) <= _MAX_NAME:
        return _PREFIX + user
    plain = "".join(letter if _PLAIN.fullmatch(letter) else "_" for letter in user)[:_MAX_NAME].rstrip("_")
    return f"{_PREFIX}{plain}_-{hashlib.sha256(user.encode(errors='surrogatepass')).hexdigest()[:8]}"


def compare_readings(
    first: tuple[Reading, NDArray[Any]], second: tuple[Reading, NDArray[Any]]
) -> list[StructureAgreement]:
    """How far two readings agree, structure by structure, the worst first.

    Args:
        first, second: A reading and its label ids, shape (Z, Y, X).
    """
    (one, mine), (other, theirs) = first, second
    ids, their_ids = dict(one.label.label_ids), dict(other.label.label_ids)
    found = []
    for name in (name for name in one.annotated if name in other.annotated):
        slices = _share(one.annotated[name], other.annotated[name], len(mine))
        masks = [(mine[z] == ids.get(name, -1), theirs[z] == their_ids.get(name, -1)) for z in slices]
        by_slice = [
            SliceAgreement(z, _compute_dice(*pair)) for z, pair in zip(slices, masks, strict=True) if np.any(pair)
        ]
        if slices:
            both = [np.stack(part) for part in zip(*masks, strict=True)]
            worst = tuple(sorted(by_slice, key=lambda entry: (entry.dice, entry.index)))
            found.append(StructureAgreement(name, _compute_dice(both[0], both[1]), worst))
    return sorted(found, key=lambda entry: entry.dice)


def _share(first: frozenset[int] | None, second: frozenset[int] | None, depth: int) -> list[int]:
    every = frozenset(range(depth))
    return sorted((every if first is None else first) & (every if second is None else second))


def _compute_dice(first: NDArray[Any], second: NDArray[Any]) -> float:
    total = int(first.sum()) + int(second.sum())
    return 1.0 if total == 0 else round(2 * int((first & second).sum()) / total, 4)
