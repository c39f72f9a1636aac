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

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from progidiff.errors import PromptError
from progidiff.prompts.hints import suggest
from progidiff.prompts.structures import STRUCTURES, TABLE, find_structure, number_structures, pick_color
from progidiff.prompts.words import (
    EVERYTHING,
    EXCEPTIONS,
    FILLERS,
    NEGATIONS,
    QUANTIFIERS,
    SEPARATORS,
    SIDES,
    Item,
    Kind,
    quote,
    split_clauses,
    split_words,
)

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


def synonyms(structure: str) -> tuple[str, ...]:
    """All phrases that `parse_prompt` maps to `structure`, its name first.

    Raises:
        PromptError: if the structure has no vocabulary here.
    """
    row = find_structure(structure)
    if row is None:
        raise PromptError(
            f"'{structure}' has no synonyms here; the structures with a vocabulary are {quote(STRUCTURES)}.", STRUCTURES
        )
    return row.phrases


def training_phrases(structure: str) -> tuple[str, ...]:
    """The name and the synonyms that training may show to the text encoder.

    Example:
        >>> training_phrases("left kidney")[:3]
        ('left kidney', 'left renal parenchyma', 'kidney on the left')
    """
    row = find_structure(structure)
    return (structure,) if row is None else (structure, *row.with_side(row.training))


def heldout_phrases(structure: str) -> tuple[str, ...]:
    """Synonyms that training never shows: a test of the text encoder, not of the parser.

    Example:
        >>> heldout_phrases("liver")
        ('hepatic tissue', 'liver parenchyma', 'hepar')
    """
    row = find_structure(structure)
    return () if row is None else row.with_side(row.heldout)


Words = Mapping[str, Sequence[str]]
"""Structure that the table does not know -> what it is called besides."""

_NO_WORDS: Words = MappingProxyType({})


def parse_prompts(
    texts: Iterable[str], known: tuple[str, ...], allow_free_text: bool, model: str, words: Words = _NO_WORDS
) -> tuple[Query, ...]:
    """Several prompts as one: in order, each structure once; see `parse_prompt`."""
    queries: dict[str, Query] = {}
    for text in texts:
        for query in parse_prompt(text, known, allow_free_text, model, words):
            queries.setdefault(query.name, query)
    return tuple(queries.values())


def compute_label_ids(queries: Iterable[Query]) -> dict[str, int]:
    """Label ids of what a prompt asks for, see `structures.number_structures`.

    Example:
        >>> compute_label_ids(parse_prompt("liver and spleen"))
        {'liver': 6, 'spleen': 1}
    """
    return number_structures(query.name for query in queries)


def describe(known: Iterable[str] = STRUCTURES) -> list[dict[str, Any]]:
    """One entry per structure of a model, for `progidiff prompts` and the server: ``{"structure": name, "synonyms":
    [...], "color": "#rrggbb"}``.
    """
    entries = []
    for name, number in number_structures(known).items():
        row = find_structure(name)
        found = [] if row is None else list(row.phrases[1:])
        entries.append({"structure": name, "synonyms": found, "color": pick_color(name, number)})
    return entries


@functools.lru_cache(maxsize=1024)
def canonical_name(name: str) -> str:
    """The table's name of a structure, or the name itself if it means none, or several.

    Example:
        >>> canonical_name("kidney_left"), canonical_name("Tumour 1")
        ('left kidney', 'Tumour 1')
    """
    name = " ".join(name.split())
    if name.lower() in STRUCTURES:
        return name.lower()
    try:
        queries = parse_prompt(name)
    except PromptError:
        return name
    return queries[0].name if len(queries) == 1 else name


def contradicts(name: str, meant: Sequence[str]) -> bool:
    """Whether a name means a structure of the table, and something else beside it others.

    Args:
        name: As somebody wrote it.
        meant: The structures that a code can mean; empty if it means none.

    Example:
        >>> contradicts("Liver", ("spleen",)), contradicts("tumour", ("liver",))
        (True, False)
    """
    known = canonical_name(name)
    return bool(meant) and known in STRUCTURES and known not in meant


def parse_prompt(
    text: str,
    known: Sequence[str] = STRUCTURES,
    allow_free_text: bool = False,
    model: str = "the loaded model",
    words: Words = _NO_WORDS,
) -> tuple[Query, ...]:
    """Read the structures that a prompt asks for, in its order, each once.

    Args:
        text: The prompt, in English; the names of the structures in German, French, Spanish, Italian or Chinese too.
        known: Structures that the model was trained on; "all" means these, in this order.
        allow_free_text: Turn a clause that names no known structure into a free-text query instead of refusing it.
        model: What to call the model in messages.
        words: What structures that the table does not know are called besides their names, see
            `labels.folder_structures`.

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
    reader = _Reader(text, tuple(known), allow_free_text, model, words)
    queries = reader.read()
    if not queries:
        raise PromptError(
            f"Prompt {text.strip()!r} names no structure. Write for example 'liver and spleen', or 'all'.", tuple(known)
        )
    return queries


class _Reader:
    """One reading of one prompt."""

    def __init__(self, text: str, known: tuple[str, ...], allow_free_text: bool, model: str, words: Words) -> None:
        self.text = text
        self.known = known
        self.allow_free_text = allow_free_text
        self.model = model
        self.phrases = _phrase_table(known, tuple((name, tuple(others)) for name, others in words.items()))
        self.longest = max(len(words) for words in self.phrases)

    def read(self) -> tuple[Query, ...]:
        items = self._match_phrases(split_words(self.text))
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
                f"Prompt {self.text.strip()!r} leaves out {quote(strangers)}, which it "
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

    def _complete_exception(self, items: list[Item], wanted: tuple[Query, ...]) -> list[Item]:
        """The side in "kidneys except the left" belongs to the kidneys."""
        content = [item for item in items if item.kind != "fill"]
        bases = {row.organ for query in wanted if (row := find_structure(query.name)) is not None and row.side}
        if len(content) != 1 or content[0].kind != "side" or len(bases) != 1:
            return items
        base = bases.pop()
        return [*content, Item("noun", content[0].start, content[0].end, base, (base,))]

    def _match_phrases(self, words: list[Item]) -> list[Item]:
        """Words -> items, the longest phrase first."""
        items: list[Item] = []
        index = 0
        while index < len(words):
            word = words[index]
            length, meaning = self._longest_phrase(words, index)
            if length:
                end = words[index + length - 1].end
                items.append(
                    Item(
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
                items.append(Item("except", word.start, phrase[-1].end, " ".join(part.value for part in phrase)))
                index += exception
                continue
            if word.kind == "sep" or word.value in SEPARATORS:
                items.append(Item("sep", word.start, word.end, word.value))
            elif word.value in SIDES:
                items.append(Item("side", word.start, word.end, SIDES[word.value]))
            elif word.value == "or":
                raise PromptError(
                    f"Prompt {self.text.strip()!r} leaves a choice open. Write 'and' to "
                    "get both structures, or name one."
                )
            elif word.value in NEGATIONS:
                raise self._refuse_negation(word.value)
            elif word.value in QUANTIFIERS:
                items.append(Item("quant", word.start, word.end, word.value))
            elif word.value in EVERYTHING:
                items.append(Item("all", word.start, word.end, word.value))
            elif word.value in FILLERS:
                items.append(Item("fill", word.start, word.end, word.value))
            else:
                items.append(Item("word", word.start, word.end, word.value))
            index += 1
        return items

    def _longest_phrase(self, words: list[Item], index: int) -> tuple[int, Item]:
        for length in range(min(self.longest, len(words) - index), 0, -1):
            meaning = self.phrases.get(tuple(word.value for word in words[index : index + length]))
            if meaning is not None:
                return length, meaning
        return 0, words[index]

    def _exception_at(self, words: list[Item], index: int, before: list[Item]) -> int:
        """Number of words of an exception such as "apart from"; "but" is one only after "all"."""
        if not any(item.kind in {"struct", "noun", "all", "quant"} for item in before):
            return 0
        has_all = any(item.kind in {"all", "quant"} for item in before)
        for phrase in EXCEPTIONS:
            parts = phrase.split()
            if [word.value for word in words[index : index + len(parts)]] == parts and (has_all or parts[0] != "but"):
                return len(parts)
        return 0

    def _read_clauses(self, items: list[Item]) -> tuple[Query, ...]:
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

    def _mark_unknown_clauses(self, items: list[Item]) -> list[Item]:
        """Clauses with unknown words become one free-text item or an error; quantifiers become "all" or nothing."""
        result: list[Item] = []
        for clause in split_clauses(items):
            if len(clause) == 1 and clause[0].kind == "sep":
                result += clause
                continue
            content = [item for item in clause if item.kind != "fill"]
            if any(item.kind == "word" for item in content):
                words = self.text[content[0].start : content[-1].end]
                if not self.allow_free_text:
                    raise self._refuse_unknown(words, content)
                result.append(Item("free", content[0].start, content[-1].end, " ".join(words.split())))
                continue
            named = any(item.kind in {"struct", "noun", "side"} for item in content)
            collective = [item for item in content if item.kind in {"quant", "all"}]
            if named:
                result += [item for item in content if item not in collective]
            else:
                # "all", "every organ", "structures", but not the bare singular "organ".
                meant = any(item.kind == "quant" or item.value not in {"organ", "structure"} for item in collective)
                result += [Item("all", collective[0].start, collective[0].end, "all")] if meant else []
        return result

    def _bind_sides(self, items: list[Item]) -> None:
        """Attach every side to its noun, in place."""
        index = 0
        previous: Item | None = None
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

    def _paired_names(self, item: Item) -> tuple[str, ...]:
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
                f"Prompt {self.text.strip()!r} asks for {quote(missing)}, which {self.model} was not trained on. It "
                f"knows {quote(self.known)}; send allow_free_text=true to try it anyway.",
                suggest(words, self.known, names),
            )
        return [Query(name, name, known=name in self.known) for name in names]

    def _refuse_unknown(self, words: str, content: list[Item]) -> PromptError:
        sides = {item.value for item in content if item.kind == "side"} - {"both"}
        near = tuple(
            dict.fromkeys(
                name for item in content if item.kind in {"struct", "noun"} for name in self._names_near(item, sides)
            )
        )
        suggestions = tuple(dict.fromkeys((*near, *suggest(words, self.known))))[:3]
        did_you_mean = f" Did you mean {quote(suggestions, 'or')}?" if suggestions else ""
        clause = "" if words.strip() == self.text.strip() else f" (in {self.text.strip()!r})"
        return PromptError(
            f"Prompt {words!r}{clause} names no structure that {self.model} was trained "
            f"on.{did_you_mean} `progidiff prompts` lists them; send allow_free_text=true to try it anyway.",
            suggestions,
        )

    def _names_near(self, item: Item, sides: set[str]) -> tuple[str, ...]:
        names = (
            item.names
            if item.kind == "struct"
            else tuple(f"{side} {item.names[0]}" for side in ("right", "left") if side in sides or not sides)
        )
        return tuple(name for name in names if name in self.known)

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


@functools.lru_cache(maxsize=64)
def _phrase_table(
    known: tuple[str, ...], words: tuple[tuple[str, tuple[str, ...]], ...] = ()
) -> Mapping[tuple[str, ...], Item]:
    """Words of a phrase -> what it means. One of a pair enters by the nouns of its organ; its side is bound later."""
    table: dict[tuple[str, ...], Item] = {}

    def add(phrase: str, kind: Kind, name: str) -> None:
        table.setdefault(tuple(word.value for word in split_words(phrase)), Item(kind, 0, 0, phrase, (name,)))

    for row in TABLE:
        for noun in row.nouns:
            add(noun, "noun", row.organ)
    for row in TABLE:
        for phrase in row.phrases:
            if not row.side or not SIDES.keys() & {word.value for word in split_words(phrase)}:
                add(phrase, "struct", row.name)
    for name in known:
        if find_structure(name) is None:
            add(name, "struct", name)
    for name, others in words:
        for phrase in (name, *others) if find_structure(name) is None else ():
            add(phrase, "struct", name)
    return MappingProxyType(table)


def _is_plural(item: Item) -> bool:
    return item.value.endswith("s") and item.value != "nephros"
