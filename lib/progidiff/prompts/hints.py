"""What somebody may have meant: the structures nearest to words that name none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence

from progidiff.prompts.structures import find_structure
from progidiff.prompts.words import FILLERS, SIDES, split_words

_ALIKE_PHRASE, _ALIKE_WORD, _ALIKE_NAME, _ALIKE_FOREIGN = 0.6, 0.7, 0.75, 0.8
"""How alike (difflib's ratio) is enough. Stricter for other languages: short words of one language are often near to a
word of another that means something else.
"""


def suggest(words: str, known: Sequence[str], instead_of: Sequence[str] = ()) -> tuple[str, ...]:
    """Up to three known structures near to some words, best first, by all their phrases and single words.

    Args:
        words: What names nothing.
        known: Structures to choose from.
        instead_of: Of these none.

    Example:
        >>> suggest("left kidny", ("right kidney", "left kidney"))
        ('left kidney',)
    """
    items = split_words(words)
    wanted = " ".join(item.value for item in items if item.kind != "sep" and item.value not in FILLERS | SIDES.keys())
    scores: dict[str, float] = {}
    for name in known:
        if name in instead_of:
            continue
        for ours, theirs, enough in _list_pairs(wanted, name):
            ratio = difflib.SequenceMatcher(None, ours, theirs).ratio()
            if ratio >= enough:
                scores[name] = max(scores.get(name, 0.0), ratio)
    sides = {SIDES[item.value] for item in items if item.value in SIDES}
    other_sides = {"left", "right"} - sides if sides and "both" not in sides else set()
    best = sorted((name for name in scores if name.split()[0] not in other_sides), key=lambda name: -scores[name])
    return tuple(name for name in best if scores[name] >= scores[best[0]] - 0.15)[:3]


def _list_pairs(wanted: str, name: str) -> Iterator[tuple[str, str, float]]:
    """What to compare: ours, theirs, and how alike they must be."""
    row = find_structure(name)
    if row is None:
        own, foreign = [name], []
    else:
        others = [phrase for phrases in row.languages.values() for phrase in phrases]
        own = [phrase for phrase in row.phrases if phrase not in others]
        foreign = [" ".join(item.value for item in split_words(phrase) if item.value not in SIDES) for phrase in others]
    phrases = [re.sub(r"\b(left|right)\b ?", "", phrase) for phrase in own]
    # Word by word as well: "livr segment four" is near to "liver". Only against words that mean this structure alone.
    single = {*(phrase for phrase in phrases if " " not in phrase), *name.split()} - FILLERS - SIDES.keys() - {"and"}
    for phrase in phrases:
        yield wanted, phrase, _ALIKE_PHRASE
    for word in wanted.split():
        if len(word) > 3:
            for part in single:
                yield word, part, _ALIKE_WORD
    for phrase in foreign:
        yield wanted, phrase, _ALIKE_FOREIGN
    yield wanted, name, _ALIKE_NAME
