"""The small words of prompts, and how text is cut into words. What structures are called is in `structures`."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["word", "fill", "sep", "side", "noun", "struct", "all", "quant", "except", "free"]

SIDES = {
    **dict.fromkeys(("left", "lt", "l", "linke", "linker", "linken", "links", "gauche", "izquierdo", "izquierda",
                     "sinistro", "sinistra"), "left"),
    **dict.fromkeys(("right", "rt", "r", "rechte", "rechter", "rechten", "rechts", "droit", "droite", "derecho",
                     "derecha", "destro", "destra"), "right"),
    "bilateral": "both",
}  # fmt: skip
SEPARATORS = {"and", "plus", "with", "then", "also", "et", "und", "y", "e", "和", "与", "及"}
NEGATIONS = {
    "no", "not", "none", "never", "neither", "nor", "dont", "isnt", "absent", "ignore", "omit", "skip", "remove",
    "exclude", "except", "excluding", "without", "minus", "but", "kein", "keine", "nicht", "ohne", "sans", "sin",
    "senza",
}  # fmt: skip
EXCEPTIONS = (
    "except for", "except", "excluding", "without", "minus", "apart from", "other than", "aside from", "leaving out",
    "but not", "but",
)  # fmt: skip
QUANTIFIERS = {"all", "every", "each"}
EVERYTHING = {"everything", "organs", "structures", "organ", "structure", "labels"}
FILLERS = {
    "the", "a", "an", "of", "in", "on", "at", "for", "from", "to", "this", "that", "these", "those", "it", "its",
    "is", "are", "please", "segment", "segmentation", "segmentations", "mask", "masks", "show", "me", "find", "draw",
    "outline", "delineate", "contour", "label", "annotate", "give", "get", "want", "need", "i", "we", "you", "can",
    "could", "image", "images", "scan", "scans", "slice", "slices", "volume", "ct", "mr", "mri", "axial", "patient",
    "patients", "my", "his", "her", "their", "side", "sided", "hand", "region", "area", "whole", "entire", "full",
    "complete", "both", "known", "available", "abdominal", "abdomen", "one", "ones", "only", "just",
    # Articles and "both" in German, French, Spanish and Italian.
    "die", "der", "das", "den", "beide", "beiden", "le", "la", "les", "deux", "el", "los", "las", "ambos", "ambas",
    "il", "lo", "gli", "entrambi", "entrambe",
}  # fmt: skip

_LIGATURES = {"œ": "oe", "Œ": "oe", "æ": "ae", "Æ": "ae", "ς": "σ"}
_FIRST_OTHER_SCRIPT = 0x250
"""Of Unicode: before it are Latin letters."""
_ABBREVIATED = {"l", "r", "lt", "rt", "inf", "gb"}


@dataclass
class Item:
    """A piece of a prompt.

    Attributes:
        kind: What it is.
        start, end: Its place in the text, half open.
        value: The word or phrase.
        names: What it means: structures, or the organ of a noun that needs a side.
        sides: Of a noun.
    """

    kind: Kind
    start: int
    end: int
    value: str = ""
    names: tuple[str, ...] = ()
    sides: list[str] = field(default_factory=list)


def split_words(text: str) -> list[Item]:
    """Lower-case words and separators with their places in the original text; accents are off, and ``_`` and ``-`` are
    spaces.

    Example:
        >>> [item.value for item in split_words("Hígado, kidney_left")]
        ['higado', ',', 'kidney', 'left']
    """
    plain = ""
    places: list[int] = []
    for place, character in enumerate(text):
        for piece in unicodedata.normalize("NFKD", _LIGATURES.get(character, character)).lower():
            if unicodedata.combining(piece) or piece in "'\u2019":
                continue
            plain += " " if piece in "_-\u2010\u2011\u2013\u2014" else piece
            places.append(place)
    words: list[Item] = []
    for match in re.finditer(r"[和与及]|[^\W和与及]+|[,;:/&+|.!?\n、。]", plain):
        start, end = places[match.start()], places[match.end() - 1] + 1
        value = match.group()
        if value[0].isalnum():
            words.append(Item("word", start, end, value))
        elif not (value == "." and words and words[-1].value in _ABBREVIATED):
            words.append(Item("sep", start, end, value))
    return words


def spell_out(text: str) -> str:
    """Text in letters that every text encoder tells apart: other scripts sign by sign, by what Unicode calls the sign.

    A tokenizer of English has one token for all signs that it does not know, so that two names in such a script would
    be one prompt.

    Example:
        >>> spell_out("left ventricle"), spell_out("Ösophagus"), spell_out("左心"), spell_out("ноги")
        ('left ventricle', 'Ösophagus', '5de6 5fc3', 'en o ghe i')
    """
    if all(ord(character) < _FIRST_OTHER_SCRIPT or not character.isalnum() for character in text):
        return text
    pieces = []
    for character in text:
        if ord(character) < _FIRST_OTHER_SCRIPT or not character.isalnum():
            pieces.append(character)
        else:
            name = unicodedata.name(character, f"{ord(character):x}")
            pieces.append(f" {re.split(r'[ -]', name)[-1].lower()} ")
    return " ".join("".join(pieces).split())


def split_clauses(items: list[Item]) -> list[list[Item]]:
    """Runs between separators; each separator stands alone."""
    clauses: list[list[Item]] = [[]]
    for item in items:
        if item.kind == "sep":
            clauses += [[item], []]
        else:
            clauses[-1].append(item)
    return [clause for clause in clauses if clause]


def quote(names: tuple[str, ...] | list[str], last: str = "and") -> str:
    """Names for a sentence.

    Example:
        >>> quote(["a", "b", "c"])
        "'a', 'b' and 'c'"
    """
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}" if quoted else "nothing"
