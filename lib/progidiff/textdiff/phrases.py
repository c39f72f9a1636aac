"""Phrases that select: what a head is taught to read when the sentence decides which structures are drawn.

A table ``phrases.csv`` says for whole sentences which classes of the label they ask for::

    text,structures
    left lung,left lung
    opacity in the right upper zone,right lung
    both lungs,left lung; right lung
    the heart,

A phrase holds for every picture. One that asks for nothing is taught to draw nothing, as is no sentence at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import RequestError
from progidiff.prompts.parser import training_phrases
from progidiff.textdiff.sentences import read_rows

PHRASE_TABLE = "phrases.csv"
"""Beside the images; where it lies, a first head selects."""


@dataclass(frozen=True)
class Phrase:
    """A sentence and what it asks for.

    Attributes:
        text: The whole sentence.
        classes: Numbers of the classes, 1 upwards, ascending; empty: none of them.
    """

    text: str
    classes: tuple[int, ...]


def read_phrases(path: Path, classes: Sequence[str]) -> tuple[Phrase, ...]:
    """Read a table of phrases.

    Args:
        path: CSV or XLSX with the columns "text" and "structures"; several structures are separated by semicolons.
        classes: Names of the classes, in the order of their numbers.

    Raises:
        RequestError: if it cannot be read, lacks a column, names a class there is not, says two things of one
            phrase, or leaves a class without any.
    """
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    found: dict[str, Phrase] = {}
    for line, text, names in _read_table(path):
        strange = [name for name in names if name not in numbers]
        if strange:
            raise RequestError(
                f"The table '{path.name}' asks for {strange[0]!r} (row {line}); the classes are {', '.join(classes)}. "
                "Write one of them, several with semicolons between, or nothing."
            )
        phrase = Phrase(text, tuple(sorted({numbers[name] for name in names})))
        if found.setdefault(text.casefold(), phrase).classes != phrase.classes:
            raise RequestError(f"The table '{path.name}' says two things of '{text[:80]}' (row {line}); keep one.")
    phrases = tuple(found.values())
    silent = [name for name, number in numbers.items() if not any(number in phrase.classes for phrase in phrases)]
    if silent:
        raise RequestError(
            f"The table '{path.name}' has no phrase that asks for {', '.join(silent)}; add a row with the name alone."
        )
    return phrases


def list_asked(path: Path) -> list[str]:
    """The structures that the phrases of a table ask for, whatever model they are for.

    Raises:
        RequestError: if it cannot be read or lacks a column.
    """
    return list(dict.fromkeys(name for _, _, names in _read_table(path) for name in names))


def _read_table(path: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Number of the row, phrase, and the names it asks for."""
    rows = read_rows(path)
    header = [cell.strip().lower() for cell in next(rows, [])]
    if "text" not in header or "structures" not in header:
        raise RequestError(
            f"The table '{path.name}' needs the columns 'text' and 'structures' (its columns: "
            f"{', '.join(header)[:200] or 'none'}); write 'text,structures' at its top and one phrase in each row."
        )
    places = header.index("text"), header.index("structures")
    for line, row in enumerate(rows, start=2):
        text, asked = (" ".join(row[place].split()) if place < len(row) else "" for place in places)
        if text:
            yield line, text, [name.strip() for name in asked.split(";") if name.strip()]


def compose_phrases(classes: Sequence[str]) -> tuple[Phrase, ...]:
    """The names of classes and the synonyms that the prompts know, each asking for its class.

    Example:
        >>> phrases = compose_phrases(["left kidney", "cyst"])
        >>> [(phrase.text, phrase.classes) for phrase in (phrases[0], phrases[-1])]
        [('left kidney', (1,)), ('cyst', (2,))]
    """
    found: dict[str, Phrase] = {}
    for number, name in enumerate(classes, start=1):
        for text in training_phrases(name):
            found.setdefault(text.casefold(), Phrase(text, (number,)))
    return tuple(found.values())


def find_asked(phrases: Sequence[Phrase], sentence: str | None) -> tuple[int, ...] | None:
    """What a sentence asks for according to the phrases, whatever its case; None if none of them is it.

    Example:
        >>> find_asked([Phrase("left lung", (2,))], "Left  lung"), find_asked([Phrase("left lung", (2,))], "liver")
        ((2,), None)
    """
    wanted = " ".join((sentence or "").split()).casefold()
    return next((phrase.classes for phrase in phrases if phrase.text.casefold() == wanted), None)


def group_phrases(phrases: Sequence[Phrase]) -> dict[tuple[int, ...], list[str]]:
    """Phrases by what they ask for, so that each selection can be taught as often, however many ways there are to
    ask for it.
    """
    groups: dict[tuple[int, ...], list[str]] = {}
    for phrase in phrases:
        groups.setdefault(phrase.classes, []).append(phrase.text)
    return groups


def keep_classes(values: NDArray[Any], classes: Sequence[int]) -> NDArray[Any]:
    """A mask of class numbers with those only that are asked for."""
    return np.where(np.isin(values, list(classes)), values, 0)
