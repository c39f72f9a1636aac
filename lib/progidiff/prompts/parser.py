"""Free text -> the structures it asks for.

A prompt is read in five steps:

1. words: lower case, accents off, ``_`` and ``-`` as spaces, punctuation and "and" as separators;
2. phrases: the longest known phrase wins, so "portal and splenic veins" is one structure and "left and right kidney"
   two;
3. sides: "left kidney", "kidney, left", "lt renal", "kidney on the left" are the same; no side means both;
4. "all", and "all except ...";
5. anything left over makes its clause unknown. A known word does not rescue it: "liver tumour" is not "liver".

What this does not do: negation ("no liver") and alternatives ("liver or spleen") are refused, because drawing a
structure that the user excluded is worse than asking again. Typing errors are never corrected silently; the error names
the nearest structures instead.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from progidiff.errors import PromptError

STRUCTURES: tuple[str, ...] = (
    "spleen",
    "right kidney",
    "left kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior vena cava",
    "portal and splenic veins",
    "pancreas",
    "right adrenal gland",
    "left adrenal gland",
)
"""The 13 structures of BTCV, in the order of its label ids (1..13)."""

MAX_PROMPT_CHARACTERS = 1000
"""Longer prompts are refused; text encoders read some 70 words at most."""


@dataclass(frozen=True)
class Query:
    """One structure asked for.

    Attributes:
        name: What the answer is called: a structure's name, or the user's own words for free text.
        text: What the text encoder reads. For a known structure its canonical name, so that all its synonyms give the
            same answer.
        known: False for free text, which no training example vouches for.
    """

    name: str
    text: str
    known: bool = True


@dataclass(frozen=True)
class _Phrases:
    """Synonyms of one structure; ``{side}`` stands for left or right.

    Attributes:
        training: Shown to the text encoder in training.
        heldout: Never shown in training, so that they measure whether the text encoder generalises.
        parsing: Understood by the parser only: abbreviations, bare adjectives, spellings that mean nothing to a text
            encoder.
    """

    training: tuple[str, ...]
    heldout: tuple[str, ...]
    parsing: tuple[str, ...] = ()


_KIDNEY = _Phrases(
    training=("{side} renal parenchyma", "kidney on the {side}", "{side}-sided kidney", "{side} renal organ"),
    heldout=("{side} renal tissue", "kidney of the {side} side", "{side} whole kidney", "{side} nephros"),
)
_ADRENAL = _Phrases(
    training=("{side} adrenal", "{side} suprarenal gland", "adrenal gland on the {side}", "{side}-sided adrenal gland"),
    heldout=("{side} suprarenal", "{side} adrenal tissue", "adrenal of the {side} side", "{side} adrenal body"),
)
_VOCABULARY: dict[str, _Phrases] = {
    "spleen": _Phrases(
        training=("splenic parenchyma", "splenic organ", "whole spleen"),
        heldout=("splenic tissue", "spleen parenchyma", "lien"),
        parsing=("splenic",),
    ),
    "right kidney": _KIDNEY,
    "left kidney": _KIDNEY,
    "gallbladder": _Phrases(
        training=("gall bladder", "gallbladder lumen", "bile-filled gallbladder"),
        heldout=("cholecyst", "gallbladder with bile", "vesica biliaris"),
        parsing=("gallbladders", "gb", "vesica fellea"),
    ),
    "esophagus": _Phrases(
        training=("oesophagus", "esophageal tube", "distal esophagus"),
        heldout=("abdominal esophagus", "gullet", "food pipe"),
        parsing=("esophageal", "oesophageal", "distal oesophagus", "abdominal oesophagus", "lower esophagus",
        "lower oesophagus"),
    ),
    "liver": _Phrases(
        training=("hepatic parenchyma", "hepatic organ", "whole liver"),
        heldout=("hepatic tissue", "liver parenchyma", "hepar"),
        parsing=("hepatic", "liver tissue"),
    ),
    "stomach": _Phrases(
        training=("gastric lumen", "gastric organ", "stomach with contents"),
        heldout=("stomach lumen", "gaster", "gastric lumen and wall"),
        parsing=("gastric", "gastric wall and lumen", "stomach contents"),
    ),
    "aorta": _Phrases(
        training=("abdominal aorta", "aortic lumen", "descending aorta"),
        heldout=("aortic vessel", "aortic trunk", "main abdominal artery"),
        parsing=("aortic", "aorta abdominalis", "ao"),
    ),
    "inferior vena cava": _Phrases(
        training=("ivc", "vena cava inferior", "inferior caval vein"),
        heldout=("lower vena cava", "vena cava", "caval vein"),
        parsing=("inferior cava", "cava", "inf vena cava", "postcava"),
    ),
    "portal and splenic veins": _Phrases(
        training=("portal vein and splenic vein", "portal vein", "splenic vein", "portal venous system"),
        heldout=("portosplenic veins", "splenoportal axis", "splenic and portal veins"),
        parsing=(
            "portal and splenic vein", "splenic and portal vein", "splenic vein and portal vein",
            "portal veins and splenic veins", "portal veins",
            "splenic veins", "portosplenic vein", "splenoportal veins", "splenoportal vein",
            "splenoportal confluence", "portosplenic confluence",
            "portal splenic confluence", "vena portae", "portal and splenic venous system",
            "portosplenic venous system",
        ),
    ),
    "pancreas": _Phrases(
        training=("pancreatic parenchyma", "pancreatic gland", "whole pancreas"),
        heldout=("pancreatic tissue", "pancreas gland", "pancreatic organ"),
        parsing=("pancreatic", "pancreas parenchyma"),
    ),
    "right adrenal gland": _ADRENAL,
    "left adrenal gland": _ADRENAL,
}  # fmt: skip

_PAIRED_NOUNS: dict[str, tuple[str, ...]] = {
    "kidney": ("kidney", "kidneys", "renal", "renal parenchyma", "renal organ", "renal organs", "renal tissue",
    "nephros", "kidney parenchyma"),
    "adrenal gland": (
        "adrenal gland", "adrenal glands", "adrenal", "adrenals", "adrenal tissue", "adrenal body", "adrenal bodies",
        "suprarenal gland", "suprarenal glands", "suprarenal", "suprarenals", "suprarenal body",
        "glandula suprarenalis",
    ),
}  # fmt: skip
"""Nouns that need a side; without one they mean both."""

_SIDES = {"left": "left", "lt": "left", "l": "left", "right": "right", "rt": "right", "r": "right", "bilateral": "both"}
_SEPARATORS = {"and", "plus", "with", "then", "also", "et"}
_NEGATIONS = {
    "no", "not", "none", "never", "neither", "nor", "dont", "isnt", "absent", "ignore", "omit", "skip", "remove",
    "exclude",
    "except", "excluding", "without", "minus", "but",
}  # fmt: skip
_EXCEPTIONS = (
    "except for",
    "except",
    "excluding",
    "without",
    "minus",
    "apart from",
    "other than",
    "aside from",
    "leaving out",
    "but not",
    "but",
)
_QUANTIFIERS = {"all", "every", "each"}
_EVERYTHING = {"everything", "organs", "structures", "organ", "structure", "labels"}
_FILLERS = {
    "the", "a", "an", "of", "in", "on", "at", "for", "from", "to", "this", "that", "these", "those", "it", "its",
    "is", "are", "please",
    "segment", "segmentation", "segmentations", "mask", "masks", "show", "me", "find", "draw", "outline", "delineate",
    "contour", "label",
    "annotate", "give", "get", "want", "need", "i", "we", "you", "can", "could", "image", "images", "scan", "scans",
    "slice", "slices",
    "volume", "ct", "mr", "mri", "axial", "patient", "patients", "my", "his", "her", "their", "side", "sided", "hand",
    "region", "area",
    "whole", "entire", "full", "complete", "both", "known", "available", "abdominal", "abdomen", "one", "ones",
    "only", "just",
}  # fmt: skip
_LIGATURES = {"\u0153": "oe", "\u0152": "oe", "\u00e6": "ae", "\u00c6": "ae"}
_ABBREVIATED = {"l", "r", "lt", "rt", "inf", "gb"}


def synonyms(structure: str) -> tuple[str, ...]:
    """All phrases that `parse_prompt` maps to `structure`, its name first.

    Raises:
        PromptError: if the structure has no vocabulary here.
    """
    phrases = _phrases_of(structure)
    return tuple(
        dict.fromkeys(
            (structure, *_expand(phrases.training, structure), *_expand(phrases.heldout, structure), *phrases.parsing)
        )
    )


def training_phrases(structure: str) -> tuple[str, ...]:
    """The name and the synonyms that training may show to the text encoder.

    Example:
        >>> training_phrases("left kidney")[:3]
        ('left kidney', 'left renal parenchyma', 'kidney on the left')
    """
    return (
        (structure, *_expand(_phrases_of(structure).training, structure)) if structure in _VOCABULARY else (structure,)
    )


def heldout_phrases(structure: str) -> tuple[str, ...]:
    """Synonyms that training never shows: a test of the text encoder, not of the parser.

    Example:
        >>> heldout_phrases("liver")
        ('hepatic tissue', 'liver parenchyma', 'hepar')
    """
    return _expand(_phrases_of(structure).heldout, structure) if structure in _VOCABULARY else ()


def compute_label_ids(queries: Iterable[Query]) -> dict[str, int]:
    """Label ids of what a prompt asks for: the place in `STRUCTURES` from 1, whatever the prompt; others follow in
    their order.

    Example:
        >>> compute_label_ids(parse_prompt("liver and spleen"))
        {'liver': 6, 'spleen': 1}
    """
    ids: dict[str, int] = {}
    others = len(STRUCTURES)
    for query in queries:
        if query.name in STRUCTURES:
            ids[query.name] = STRUCTURES.index(query.name) + 1
        elif query.name not in ids:
            others += 1
            ids[query.name] = others
    return ids


def describe(known: Iterable[str] = STRUCTURES) -> list[dict[str, Any]]:
    """One entry per structure of a model: ``{"structure": name, "synonyms": [...]}``, for `progidiff prompts` and the
    server.
    """
    return [{"structure": name, "synonyms": list(synonyms(name)[1:]) if name in _VOCABULARY else []} for name in known]


def parse_prompt(
    text: str, known: Sequence[str] = STRUCTURES, allow_free_text: bool = False, model: str = "the loaded model"
) -> tuple[Query, ...]:
    """Read the structures that a prompt asks for, in its order, each once.

    Args:
        text: The prompt, in English.
        known: Structures that the model was trained on; "all" means these, in this order.
        allow_free_text: Turn a clause that names no known structure into a free-text query instead of refusing it.
        model: What to call the model in messages.

    Raises:
        PromptError: if the prompt is empty, contradictory, negated, or names anything unknown. `suggestions` holds the
            nearest names.

    Example:
        >>> [query.name for query in parse_prompt("hepatic parenchyma and both kidneys")]
        ['liver', 'right kidney', 'left kidney']
        >>> [query.name for query in parse_prompt("kidney, left; liver")]
        ['left kidney', 'liver']
    """
    if not isinstance(text, str):
        raise PromptError(
            f"A prompt is text, got {type(text).__name__}. Write for example 'left kidney' or 'liver and spleen'."
        )
    if not text.strip():
        raise PromptError("The prompt is empty. Name a structure, for example 'liver', or write 'all'.", tuple(known))
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise PromptError(
            f"The prompt has {len(text)} characters, at most {MAX_PROMPT_CHARACTERS} are "
            "read. Name the structures only."
        )
    reader = _Reader(text, tuple(known), allow_free_text, model)
    queries = reader.read()
    if not queries:
        raise PromptError(
            f"Prompt {text.strip()!r} names no structure. Write for example 'liver and spleen', or 'all'.", tuple(known)
        )
    return queries


@dataclass
class _Item:
    """A piece of the prompt: its kind, its place in the text, and what it means."""

    kind: str  # word | fill | sep | side | noun | struct | all | quant | except | negation | or | free
    start: int
    end: int
    value: str = ""
    names: tuple[str, ...] = ()
    sides: list[str] = field(default_factory=list)


class _Reader:
    """One reading of one prompt."""

    def __init__(self, text: str, known: tuple[str, ...], allow_free_text: bool, model: str) -> None:
        self.text = text
        self.known = known
        self.allow_free_text = allow_free_text
        self.model = model
        self.phrases = _phrase_table(known)
        self.longest = max(len(words) for words in self.phrases)

    def read(self) -> tuple[Query, ...]:
        items = self._match_phrases(_split_words(self.text))
        cuts = [index for index, item in enumerate(items) if item.kind == "except"]
        if len(cuts) > 1:
            raise self._refuse_negation(items[cuts[1]].value)
        wanted = self._read_clauses(items[: cuts[0]] if cuts else items)
        if not cuts:
            return wanted
        exception = items[cuts[0]].value
        excluded = [query.name for query in self._read_clauses(self._complete_exception(items[cuts[0] + 1 :], wanted))]
        if not wanted:
            raise self._refuse_negation(exception)
        if not excluded:
            raise PromptError(
                f"Prompt {self.text.strip()!r} ends after '{exception}'. Say which structure to leave out.", self.known
            )
        strangers = [name for name in excluded if name not in [query.name for query in wanted]]
        if strangers:
            asked = " and ".join(query.name for query in wanted)
            raise PromptError(
                f"Prompt {self.text.strip()!r} leaves out {_quote(strangers)}, which it "
                f"does not ask for. Name only what you want: '{asked}'.",
                [query.name for query in wanted],
            )
        left = tuple(query for query in wanted if query.name not in excluded)
        if not left:
            raise PromptError(
                f"Prompt {self.text.strip()!r} leaves out everything that it asks for. Name at least one structure.",
                self.known,
            )
        return left

    def _complete_exception(self, items: list[_Item], wanted: tuple[Query, ...]) -> list[_Item]:
        """The side in "kidneys except the left" belongs to the kidneys."""
        content = [item for item in items if item.kind != "fill"]
        bases = {base for query in wanted for base in _PAIRED_NOUNS if query.name.endswith(base)}
        if len(content) != 1 or content[0].kind != "side" or len(bases) != 1:
            return items
        base = bases.pop()
        return [*content, _Item("noun", content[0].start, content[0].end, base, (base,))]

    def _match_phrases(self, words: list[_Item]) -> list[_Item]:
        """Words -> items, the longest phrase first."""
        items: list[_Item] = []
        index = 0
        while index < len(words):
            word = words[index]
            length, meaning = self._longest_phrase(words, index)
            if length:
                end = words[index + length - 1].end
                items.append(
                    _Item(
                        meaning.kind,
                        word.start,
                        end,
                        " ".join(w.value for w in words[index : index + length]),
                        meaning.names,
                    )
                )
                index += length
                continue
            exception = self._exception_at(words, index, items)
            if exception:
                phrase = words[index : index + exception]
                items.append(_Item("except", word.start, phrase[-1].end, " ".join(part.value for part in phrase)))
                index += exception
                continue
            if word.kind == "sep" or word.value in _SEPARATORS:
                items.append(_Item("sep", word.start, word.end, word.value))
            elif word.value in _SIDES:
                items.append(_Item("side", word.start, word.end, _SIDES[word.value]))
            elif word.value == "or":
                raise PromptError(
                    f"Prompt {self.text.strip()!r} leaves a choice open. Write 'and' to "
                    "get both structures, or name one."
                )
            elif word.value in _NEGATIONS:
                raise self._refuse_negation(word.value)
            elif word.value in _QUANTIFIERS:
                items.append(_Item("quant", word.start, word.end, word.value))
            elif word.value in _EVERYTHING:
                items.append(_Item("all", word.start, word.end, word.value))
            elif word.value in _FILLERS:
                items.append(_Item("fill", word.start, word.end, word.value))
            else:
                items.append(_Item("word", word.start, word.end, word.value))
            index += 1
        return items

    def _longest_phrase(self, words: list[_Item], index: int) -> tuple[int, _Item]:
        for length in range(min(self.longest, len(words) - index), 0, -1):
            meaning = self.phrases.get(tuple(word.value for word in words[index : index + length]))
            if meaning is not None:
                return length, meaning
        return 0, words[index]

    def _exception_at(self, words: list[_Item], index: int, before: list[_Item]) -> int:
        """Number of words of an exception such as "apart from"; "but" is one only after "all"."""
        if not any(item.kind in {"struct", "noun", "all", "quant"} for item in before):
            return 0
        has_all = any(item.kind in {"all", "quant"} for item in before)
        for phrase in _EXCEPTIONS:
            parts = phrase.split()
            if [word.value for word in words[index : index + len(parts)]] == parts and (has_all or parts[0] != "but"):
                return len(parts)
        return 0

    def _read_clauses(self, items: list[_Item]) -> tuple[Query, ...]:
        items = self._mark_unknown_clauses(items)
        items = [item for item in items if item.kind != "fill"]
        self._bind_sides(items)
        queries: list[Query] = []
        for item in items:
            if item.kind == "all":
                queries += [Query(name, name) for name in self.known]
            elif item.kind == "free":
                queries.append(Query(item.value, item.value, known=False))
            elif item.kind == "struct":
                queries += self._known_queries(item.names, item.value)
            elif item.kind == "noun":
                queries += self._known_queries(self._paired_names(item), item.value)
        return tuple(
            {query.name: query for query in reversed(queries)}[name]
            for name in dict.fromkeys(query.name for query in queries)
        )

    def _mark_unknown_clauses(self, items: list[_Item]) -> list[_Item]:
        """Clauses with unknown words become one free-text item or an error; quantifiers become "all" or nothing."""
        result: list[_Item] = []
        for clause in _split_clauses(items):
            if len(clause) == 1 and clause[0].kind == "sep":
                result += clause
                continue
            content = [item for item in clause if item.kind != "fill"]
            if any(item.kind == "word" for item in content):
                words = self.text[content[0].start : content[-1].end]
                if not self.allow_free_text:
                    raise self._refuse_unknown(words, content)
                result.append(_Item("free", content[0].start, content[-1].end, " ".join(words.split())))
                continue
            named = any(item.kind in {"struct", "noun", "side"} for item in content)
            collective = [item for item in content if item.kind in {"quant", "all"}]
            if named:
                result += [item for item in content if item not in collective]
            else:
                # "all", "every organ", "structures", but not the bare singular "organ".
                meant = any(item.kind == "quant" or item.value not in {"organ", "structure"} for item in collective)
                result += [_Item("all", collective[0].start, collective[0].end, "all")] if meant else []
        return result

    def _bind_sides(self, items: list[_Item]) -> None:
        """Attach every side to its noun, in place."""
        index = 0
        previous: _Item | None = None
        while index < len(items):
            item = items[index]
            if item.kind in {"noun", "struct", "free"}:
                previous = item
            if item.kind != "side":
                index += 1
                continue
            adjacent = previous is not None and index > 0 and items[index - 1] is previous
            following = items[index + 1] if index + 1 < len(items) else None
            forward = following is not None and following.kind == "noun"
            if (
                adjacent
                and previous is not None
                and previous.kind == "noun"
                and not previous.sides
                and not (forward and _is_plural(previous))
            ):
                previous.sides.append(item.value)  # "kidney left"
                index += 1
                continue
            run = [item.value]
            end = index + 1
            while end + 1 < len(items) and items[end].kind == "sep" and items[end + 1].kind == "side":
                run.append(items[end + 1].value)
                end += 2
            following = items[end] if end < len(items) else None
            if following is not None and following.kind == "noun":
                following.sides += run  # "left kidney", "left and right kidney"
                previous = following
                index = end + 1
                continue
            if following is not None and following.kind == "side":
                raise self._refuse_contradiction(f"'{item.value} {following.value}'")
            if (following is not None and following.kind == "struct") or (
                adjacent and previous is not None and previous.kind == "struct"
            ):
                unpaired = following if following is not None and following.kind == "struct" else previous
                assert unpaired is not None
                name = unpaired.names[0]
                raise PromptError(
                    f"Prompt {self.text.strip()!r} asks for a {item.value} side of "
                    f"'{name}', which is drawn as a whole. Ask for '{name}'.",
                    (name,),
                )
            if previous is not None and previous.kind == "noun" and not adjacent:
                previous.sides += run  # "kidney, left", "left kidney and right"
                index = end
                continue
            if adjacent and previous is not None and previous.kind == "noun":
                raise self._refuse_contradiction(f"'{previous.sides[0]}' and '{item.value}'")
            near = tuple(name for name in self.known if name.startswith(item.value))
            raise PromptError(
                f"Prompt {self.text.strip()!r} says '{item.value}' but not of what. Write "
                f"for example '{item.value} kidney'.",
                near,
            )

    def _paired_names(self, item: _Item) -> tuple[str, ...]:
        base = item.names[0]
        if not item.sides or item.sides == ["both"]:
            return (f"right {base}", f"left {base}")
        if "both" in item.sides:
            raise self._refuse_contradiction("'bilateral' and one side")
        return tuple(dict.fromkeys(f"{side} {base}" for side in item.sides))

    def _known_queries(self, names: tuple[str, ...], words: str) -> list[Query]:
        missing = [name for name in names if name not in self.known]
        if missing and not self.allow_free_text:
            raise PromptError(
                f"Prompt {self.text.strip()!r} asks for {_quote(missing)}, which {self.model} was not trained on. It "
                f"knows {_quote(self.known)}; send allow_free_text=true to try it anyway.",
                self._suggest(words, names),
            )
        return [Query(name, name, known=name in self.known) for name in names]

    def _refuse_unknown(self, words: str, content: list[_Item]) -> PromptError:
        sides = {item.value for item in content if item.kind == "side"} - {"both"}
        near = tuple(
            dict.fromkeys(
                name for item in content if item.kind in {"struct", "noun"} for name in self._names_near(item, sides)
            )
        )
        suggestions = tuple(dict.fromkeys((*near, *self._suggest(words, ()))))[:3]
        did_you_mean = f" Did you mean {_quote(suggestions, 'or')}?" if suggestions else ""
        clause = "" if words.strip() == self.text.strip() else f" (in {self.text.strip()!r})"
        return PromptError(
            f"Prompt {words!r}{clause} names no structure that {self.model} was trained "
            f"on.{did_you_mean} `progidiff prompts` lists them; send allow_free_text=true to try it anyway.",
            suggestions,
        )

    def _names_near(self, item: _Item, sides: set[str]) -> tuple[str, ...]:
        names = (
            item.names
            if item.kind == "struct"
            else tuple(f"{side} {item.names[0]}" for side in ("right", "left") if side in sides or not sides)
        )
        return tuple(name for name in names if name in self.known)

    def _suggest(self, words: str, instead_of: tuple[str, ...]) -> tuple[str, ...]:
        """Up to three known names near to the words, by difflib over all their synonyms and single words."""
        wanted = " ".join(
            word.value
            for word in _split_words(words)
            if word.kind != "sep" and word.value not in _FILLERS | _SIDES.keys()
        )
        scores: dict[str, float] = {}
        for name in self.known:
            if name in instead_of:
                continue
            phrases = [
                re.sub(r"\b(left|right)\b ?", "", phrase)
                for phrase in (synonyms(name) if name in _VOCABULARY else (name,))
            ]
            # Word by word as well: "livr segment four" is near to "liver". Only against words that mean this structure
            # alone.
            single = (
                {*(phrase for phrase in phrases if " " not in phrase), *name.split()}
                - _FILLERS
                - _SIDES.keys()
                - {"and"}
            )
            pairs = [(wanted, phrase, 0.6) for phrase in phrases] + [
                (word, part, 0.7) for word in wanted.split() if len(word) > 3 for part in single
            ]
            pairs.append((wanted, name, 0.75))
            for ours, theirs, enough in pairs:
                ratio = difflib.SequenceMatcher(None, ours, theirs).ratio()
                if ratio >= enough:
                    scores[name] = max(scores.get(name, 0.0), ratio)
        sides = {_SIDES[word.value] for word in _split_words(words) if word.value in _SIDES}
        other_sides = {"left", "right"} - sides if sides and "both" not in sides else set()
        best = sorted((name for name in scores if name.split()[0] not in other_sides), key=lambda name: -scores[name])
        return tuple(name for name in best if scores[name] >= scores[best[0]] - 0.15)[:3]

    def _refuse_negation(self, word: str) -> PromptError:
        return PromptError(
            f"Prompt {self.text.strip()!r} says '{word}', and a model of structures cannot draw what is not wanted. "
            "Name only what you want, or write 'all except ...'.",
            self.known,
        )

    def _refuse_contradiction(self, what: str) -> PromptError:
        return PromptError(
            f"Prompt {self.text.strip()!r} contradicts itself: {what}. Write 'left "
            "kidney', 'right kidney' or 'both kidneys'."
        )


def _split_words(text: str) -> list[_Item]:
    """Lower-case words and separators with their places in the original text."""
    plain = ""
    places: list[int] = []
    for place, character in enumerate(text):
        for piece in unicodedata.normalize("NFKD", _LIGATURES.get(character, character)).lower():
            if unicodedata.combining(piece) or piece in "'\u2019":
                continue
            plain += " " if piece in "_-\u2010\u2011\u2013\u2014" else piece
            places.append(place)
    words: list[_Item] = []
    for match in re.finditer(r"\w+|[,;:/&+|.!?\n]", plain):
        start, end = places[match.start()], places[match.end() - 1] + 1
        value = match.group()
        if value[0].isalnum():
            words.append(_Item("word", start, end, value))
        elif not (value == "." and words and words[-1].value in _ABBREVIATED):
            words.append(_Item("sep", start, end, value))
    return words


def _split_clauses(items: list[_Item]) -> list[list[_Item]]:
    """Runs between separators; each separator stands alone."""
    clauses: list[list[_Item]] = [[]]
    for item in items:
        if item.kind == "sep":
            clauses += [[item], []]
        else:
            clauses[-1].append(item)
    return [clause for clause in clauses if clause]


def _phrase_table(known: tuple[str, ...]) -> dict[tuple[str, ...], _Item]:
    """Words of a phrase -> what it means. Sided structures enter as nouns; their sides are bound later."""
    table: dict[tuple[str, ...], _Item] = {}

    def add(phrase: str, kind: str, name: str) -> None:
        table.setdefault(tuple(word.value for word in _split_words(phrase)), _Item(kind, 0, 0, phrase, (name,)))

    for base, nouns in _PAIRED_NOUNS.items():
        for noun in nouns:
            add(noun, "noun", base)
    paired = {f"{side} {base}" for base in _PAIRED_NOUNS for side in ("left", "right")}
    for name in (*STRUCTURES, *known):
        if name in paired:
            continue
        for phrase in synonyms(name) if name in _VOCABULARY else (name,):
            add(phrase, "struct", name)
    return table


def _phrases_of(structure: str) -> _Phrases:
    if structure not in _VOCABULARY:
        raise PromptError(
            f"'{structure}' has no synonyms here; the structures with a vocabulary are {_quote(STRUCTURES)}.",
            STRUCTURES,
        )
    return _VOCABULARY[structure]


def _expand(phrases: tuple[str, ...], structure: str) -> tuple[str, ...]:
    return tuple(phrase.format(side=structure.split()[0]) for phrase in phrases)


def _is_plural(item: _Item) -> bool:
    return item.value.endswith("s") and item.value != "nephros"


def _quote(names: Sequence[str], last: str = "and") -> str:
    """'a', 'b' and 'c'."""
    quoted = [f"'{name}'" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} {last} {quoted[-1]}" if quoted else "nothing"
