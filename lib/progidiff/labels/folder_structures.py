"""What a folder labels beyond the structures that this program knows: its own structures, and what they are called.

::

    <studies>/labels.json          id -> name, as ever; every structure of the folder is in it
    <state>/structures.json        of the folder's own ones also colour, code, and the words that mean the same

A structure is added by a person on any client, or by the first label that is saved with its name. Its id stays its own
for good: a rename keeps it, and the old name goes on being understood. A name that is nearly one that is known ("livr")
is asked back, because a folder with two structures for one thing teaches neither.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from progidiff.errors import ConflictError, NotFoundError, ProGiDiffError, PromptError, RequestError, StoreError
from progidiff.images.reading import read_grid
from progidiff.labels.cases import LABELS_JSON, read_label_names
from progidiff.labels.history import AnnotationStore
from progidiff.labels.saving import MAX_LABEL_ID
from progidiff.labels.segments import MAX_NAME, Look, is_unnamed, load_label_map
from progidiff.prompts.parser import canonical_name, parse_prompt
from progidiff.prompts.structures import LAST_LABEL_ID, STRUCTURES, TABLE, Code, find_structure, fixed_ids, pick_color
from progidiff.prompts.words import EVERYTHING, FILLERS, NEGATIONS, QUANTIFIERS, SEPARATORS, SIDES, split_words
from progidiff.storage.atomic import locked, replace_text
from progidiff.storage.state_files import load_state

logger = logging.getLogger(__name__)

STRUCTURES_JSON = "structures.json"

MAX_WORDS = 50
"""Names of one structure."""

_LOOK_AGAIN_SECONDS = 1.0
"""After which names are read again that another process may have changed."""

_NEAR = (
    "'{name}' is nearly '{near}', which is known already. If you mean that, call it '{near}'. If '{name}' is something "
    "else, insist: Add a structure on the review page, or POST /progidiff/structures with confirm=true, or send "
    "confirm=true with the label."
)
_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_CODE = re.compile(r"\d{6,18}")


class _CodeRow(BaseModel):
    model_config = ConfigDict(frozen=True)

    value: str
    meaning: str
    scheme: str = "SCT"


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True)

    name: str
    label_id: int
    color: str
    code: _CodeRow | None = None
    words: tuple[str, ...] = ()


class _Table(BaseModel):
    """structures.json.

    Attributes:
        structures: The folder's own.
        adds_to_table: Whether labels.json was written here, with the table's structures in it for their ids alone: that
            a label does not draw one of those says nothing then.
    """

    model_config = ConfigDict(frozen=True)

    format: int = 1
    structures: tuple[_Row, ...] = ()
    adds_to_table: bool = False


class FolderStructure(BaseModel):
    """A structure of a folder.

    Attributes:
        name: What it is called, in any script.
        label_id: In the folder's labels, 1..255.
        color: "#rrggbb".
        code: SNOMED CT; None if nobody gave one.
        words: What means the same, without the name.
        is_own: Whether it is none of the structures that this program knows.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    label_id: int
    color: str
    code: Code | None = None
    words: tuple[str, ...] = Field(default_factory=tuple)
    is_own: bool = True


class FolderStructures:
    """The structures of one folder; safe for several processes on it.

    Args:
        studies: Folder with ``labels.json``: the studies' own, or the state's where the images lie on another server.
        state: The app's state folder, for ``structures.json``.
        history: Where changes are noted; None to note none.
    """

    def __init__(
        self, studies: str | os.PathLike[str], state: str | os.PathLike[str], history: AnnotationStore | None = None
    ) -> None:
        self._labels_file = Path(studies) / LABELS_JSON
        self._file = Path(state) / STRUCTURES_JSON
        self._history = history
        self._seen: tuple[object, tuple[FolderStructure, ...]] = (None, ())
        self._former: tuple[float, Mapping[str, str]] = (-_LOOK_AGAIN_SECONDS, {})
        if history is not None:
            history.find_renamed = self.former_names

    def load(self) -> tuple[FolderStructure, ...]:
        """Every structure that labels of this folder have an id for, ascending by id.

        Raises:
            RequestError: if labels.json is damaged.
        """
        stamps = tuple(_stamp(path) for path in (self._labels_file, self._file))
        if self._seen[0] != stamps:
            self._seen = (stamps, self._read())
        return self._seen[1]

    def own(self) -> tuple[FolderStructure, ...]:
        """Those of `load` that this program does not know."""
        return tuple(row for row in self.load() if row.is_own)

    def words(self) -> dict[str, tuple[str, ...]]:
        """Own structure -> what it is called besides, as `prompts.parser.parse_prompt` takes it."""
        return {row.name: row.words for row in self.own()}

    def looks(self) -> dict[str, Look]:
        """Own structure -> colour and code, for files that say them."""
        return {row.name: Look(row.color, row.code) for row in self.own()}

    def former_names(self) -> Mapping[str, str]:
        """What else an own structure is called, and was called before it was renamed -> its name. Never raises: with a
        labels.json that is damaged nothing is renamed.
        """
        now = time.monotonic()
        if now - self._former[0] >= _LOOK_AGAIN_SECONDS:
            try:
                found = {word: row.name for row in self.own() for word in row.words}
            except RequestError as err:
                logger.warning("Structures of this folder go by the names with which they were saved: %s", err)
                found = {}
            self._former = (now, found)
        return self._former[1]

    @property
    def adds_to_table(self) -> bool:
        """Whether labels.json names the table's structures for their ids alone, see `_Table`."""
        return self._load_table().adds_to_table

    def find(self, text: str) -> FolderStructure | None:
        """The structure that a name or one of its words means; None if none is called so.

        Case, accents, hyphens and spaces do not matter. A synonym of a structure of the table means that one.
        """
        wanted = fold_name(text)
        found = next(
            (row for row in self.own() if wanted in {fold_name(word) for word in (row.name, *row.words)}), None
        )
        if found is not None or not wanted:
            return found
        name = canonical_name(text)
        return next((row for row in self.load() if canonical_name(row.name) == name), None)

    def add(
        self,
        name: str,
        *,
        label_id: int | None = None,
        color: str | None = None,
        code: str | Code | None = None,
        words: Sequence[str] = (),
        insist: bool = False,
        user: str = "",
    ) -> FolderStructure:
        """Add a structure of the folder's own.

        Args:
            name: In any script.
            label_id: In labels; None for the next that is free.
            color: "#rrggbb"; None for one that is picked.
            code: SNOMED CT, its number or number and meaning.
            words: What means the same.
            insist: Whether a name that is nearly a known one is meant as it stands.
            user: Who adds it.

        Raises:
            PromptError: if the name says nothing, means a known structure, or nearly is one (`suggestions` holds it).
            ConflictError: if the folder has it, or the id is another's.
            RequestError: if id, colour or code is none, or labels.json is damaged.
            StoreError: if the disk refuses.
        """
        name, words = _clean(name), _clean_words(words)
        if color is not None and not _COLOR.fullmatch(color):
            raise RequestError(f"Colour {color[:20]!r} is none; write it as #rrggbb, for example #80ed99.")
        coded = _read_code(code, name)
        with self._locked():
            rows = self.load()
            self._check_new(name, rows, insist)
            for word in words:
                self._check_word(word, name, rows)
            number = self._pick_id(label_id, name, rows)
            row = _Row(name=name, label_id=number, color=color or pick_color(name, number), code=coded, words=words)
            self._write_names({**{r.label_id: r.name for r in rows}, number: name})
            table = self._load_table()
            self._write(table.model_copy(update={"structures": (*table.structures, row)}))
        self._note(f"'{name}' is a structure of this folder, with id {number}", user)
        return _to_structure(row)

    def check_name(self, name: str) -> None:
        """Ask back a name that is probably a slip of the keyboard away from a known one.

        Raises:
            PromptError: if it is; `suggestions` holds the known one.
        """
        near = self._find_near(name, self.load())
        if near is not None:
            raise PromptError(_NEAR.format(name=name, near=near), (near,))

    def declare(
        self, ids: Mapping[str, int], user: str = "", looks: Mapping[str, Look] | None = None, insist: bool = False
    ) -> list[str]:
        """Take over the structures of a label that was saved. One whose name is nearly a known one is kept in the label
        and not taken over: it may be a slip, which the person is asked about.

        Args:
            ids: Structure -> id, as the label was kept.
            user: Who saved it.
            looks: Structure -> colour and code that came with it.
            insist: Whether names that are nearly known ones are meant as they stand.

        Returns:
            Sentences about what is asked back or does not fit.
        """
        told = []
        new = {name: number for name, number in ids.items() if self.is_new(name)}
        if len(new) > MAX_LABEL_ID - max([LAST_LABEL_ID, *(row.label_id for row in self.load())]):
            return [
                f"{len(new)} new structures are more than this folder has ids left; they are kept in this label, and "
                "no model is taught them. Use another folder for them."
            ]
        for name, number in new.items():
            look = (looks or {}).get(name, Look())
            taken = {row.label_id for row in self.load()}
            code = look.code if _is_free(look.code) else None
            label_id = None if number in taken else number
            try:
                self.add(name, label_id=label_id, color=look.color, code=code, insist=insist, user=user)
            except PromptError as err:
                if err.suggestions:
                    told.append(
                        f"{err} Until then '{name}' is taught to no model: rename it in this label with POST "
                        "/progidiff/annotations/<image>/rename, or add it as a structure of its own."
                    )
        return told

    def declared(self) -> tuple[str, ...]:
        """Names that somebody meant as they stand: own structures that were added, by hand or by a saved label."""
        return tuple(row.name for row in self._load_table().structures)

    def count_labelled_slices(self, name: str) -> int:
        """On how many axial slices of all images the labels in force draw a structure; 0 without a history."""
        store, meant = self._history, self.find(name)
        if store is None or meant is None:
            return 0
        called = {fold_name(word) for word in (meant.name, *meant.words)}
        return sum(_count_drawn(store, image, called) for image in store.annotated_images())

    def answer_ids(self) -> dict[str, int]:
        """Own structure -> its id in answers of the model: the folder's, but beyond those of the table, which answers
        use whatever a folder numbers its labels with.
        """
        ids = {row.name: row.label_id for row in self.own() if row.label_id > LAST_LABEL_ID}
        last = max([LAST_LABEL_ID, *ids.values()])
        for row in self.own():
            if row.name not in ids:
                last += 1
                ids[row.name] = last
        return ids

    def is_new(self, name: str) -> bool:
        """Whether a name in a label is that of a structure which neither the program nor the folder knows. One that
        says nothing, or stands for several, is none.

        Example:
            >>> structures = FolderStructures("nowhere", "nowhere")
            >>> [structures.is_new(name) for name in ("left ventricle", "hepar", "Segment_1", "liver and tumour")]
            [True, False, False, False]
        """
        if is_unnamed(name) or self.find(name) is not None or find_structure(canonical_name(name)) is not None:
            return False
        try:
            _clean(name)
            return len(parse_prompt(name, allow_free_text=True)) == 1
        except PromptError:
            return False

    def rename(self, name: str, new: str, *, insist: bool = False, user: str = "") -> FolderStructure:
        """Call a structure of the folder's own by another name; its id stays, and the old name is understood on.

        Raises:
            NotFoundError: if the folder has no such structure of its own.
            PromptError, ConflictError: as `add`.
        """
        new = _clean(new)
        with self._locked():
            rows = self.load()
            old = self.find(name)
            if old is None or not old.is_own:
                raise NotFoundError(
                    f"This folder has no structure of its own called '{name[:MAX_NAME]}'. It has "
                    f"{', '.join(row.name for row in rows if row.is_own) or 'none'}."
                )
            others = tuple(row for row in rows if row.label_id != old.label_id)
            if fold_name(new) not in {fold_name(word) for word in (old.name, *old.words)}:
                self._check_new(new, others, insist)
            words = tuple(dict.fromkeys(word for word in (old.name, *old.words) if word != new))[:MAX_WORDS]
            row = _to_row(old).model_copy(update={"name": new, "words": words})
            self._replace(row, others)
        self._note(f"'{old.name}' is called '{new}' now, with the same id {old.label_id}", user)
        return _to_structure(row)

    def describe(
        self, name: str, *, color: str | None = None, code: str | Code | None = None, words: Sequence[str] | None = None
    ) -> FolderStructure:
        """Change what is known of a structure of the folder's own; None leaves it as it is.

        Raises:
            NotFoundError: if the folder has no such structure of its own.
            ConflictError, RequestError: as `add`.
        """
        if color is not None and not _COLOR.fullmatch(color):
            raise RequestError(f"Colour {color[:20]!r} is none; write it as #rrggbb, for example #80ed99.")
        with self._locked():
            rows = self.load()
            old = self.find(name)
            if old is None or not old.is_own:
                raise NotFoundError(f"This folder has no structure of its own called '{name[:MAX_NAME]}'.")
            others = tuple(row for row in rows if row.label_id != old.label_id)
            row = _to_row(old)
            if color is not None:
                row = row.model_copy(update={"color": color})
            if code is not None:
                row = row.model_copy(update={"code": _read_code(code, old.name)})
            if words is not None:
                cleaned = _clean_words(words)
                for word in cleaned:
                    self._check_word(word, old.name, others)
                row = row.model_copy(update={"words": cleaned})
            self._replace(row, others)
        return _to_structure(row)

    def _read(self) -> tuple[FolderStructure, ...]:
        rows = {row.name: row for row in self._load_table().structures}
        names = self._load_names()
        found = []
        for number, name in sorted(names.items()):
            row = rows.pop(name, None)
            if row is not None:
                found.append(_to_structure(row.model_copy(update={"label_id": number})))
                continue
            known = find_structure(canonical_name(name))
            if known is None:
                found.append(FolderStructure(name=name, label_id=number, color=pick_color(name, number)))
                continue
            found.append(
                FolderStructure(name=known.name, label_id=number, color=known.color, code=known.code, is_own=False)
            )
        return tuple(found)

    def _load_names(self) -> dict[int, str]:
        """labels.json; without one the ids that answers use."""
        if not self._labels_file.is_file():
            return {number: name for name, number in fixed_ids().items()}
        return read_label_names(self._labels_file)

    def _load_table(self) -> _Table:
        meaning = "Colours, codes and further words of this folder's own structures are lost; names and ids stay."
        return load_state(self._file, _Table.model_validate_json, _Table, meaning)

    def _check_new(self, name: str, rows: Sequence[FolderStructure], insist: bool) -> None:
        """Refuse a name that is another's, or nearly."""
        self._check_word(name, name, rows)
        near = None if insist else self._find_near(name, rows)
        if near is not None:
            raise PromptError(_NEAR.format(name=name, near=near), (near,))

    def _find_near(self, name: str, rows: Sequence[FolderStructure]) -> str | None:
        return find_near(name, [*STRUCTURES, *_list_words(rows)])

    def _check_word(self, word: str, name: str, rows: Sequence[FolderStructure]) -> None:
        known = canonical_name(word)
        if known in STRUCTURES:
            raise PromptError(
                f"'{word}' is '{known}', which this program knows. Draw it as '{known}', or choose another name.",
                (known,),
            )
        taken = next(
            (row for row in rows if fold_name(word) in {fold_name(other) for other in (row.name, *row.words)}), None
        )
        if taken is not None:
            told = (
                "is a structure of this folder"
                if fold_name(taken.name) == fold_name(word)
                else f"means '{taken.name}' here"
            )
            cure = f"Use '{taken.name}', or choose another {'name' if word == name else 'word'}."
            raise ConflictError(f"'{word}' {told} already, with id {taken.label_id}. {cure}")

    def _pick_id(self, label_id: int | None, name: str, rows: Sequence[FolderStructure]) -> int:
        taken = {row.label_id: row.name for row in rows}
        if label_id is None:
            free = max([LAST_LABEL_ID, *taken]) + 1
            if free > MAX_LABEL_ID:
                raise RequestError(f"A label holds {MAX_LABEL_ID} ids, and they are all given. Use another folder.")
            return free
        if not 1 <= label_id <= MAX_LABEL_ID:
            raise RequestError(f"Id {label_id} of '{name}' lies outside 1 to {MAX_LABEL_ID}. Choose another, or none.")
        if label_id in taken:
            raise ConflictError(
                f"Id {label_id} is '{taken[label_id]}' in this folder, so '{name}' cannot have it. Leave the id out to "
                "get one that is free."
            )
        return label_id

    def _replace(self, row: _Row, others: Sequence[FolderStructure]) -> None:
        self._write_names({**{other.label_id: other.name for other in others}, row.label_id: row.name})
        table = self._load_table()
        kept = tuple(old for old in table.structures if old.label_id != row.label_id)
        self._write(table.model_copy(update={"structures": (*kept, row)}))

    def _write_names(self, names: Mapping[int, str]) -> None:
        """labels.json; one that is new names the table's structures too, so that their ids stay what they are."""
        if not self._labels_file.exists():
            self._write(self._load_table().model_copy(update={"adds_to_table": True}))
        text = json.dumps({str(number): name for number, name in sorted(names.items())}, indent=1, ensure_ascii=False)
        _store(self._labels_file, f"{text}\n")

    def _write(self, table: _Table) -> None:
        _store(self._file, f"{table.model_dump_json(indent=1)}\n")
        self._former = (-_LOOK_AGAIN_SECONDS, {})

    def _note(self, reason: str, user: str) -> None:
        if self._history is not None:
            self._history.note_structure(reason, user)

    def _locked(self) -> Any:
        return locked(self._file.with_name("structures.lock"), "Another process has been writing this folder's names")


def _is_free(code: Code | None) -> bool:
    """Whether a code that came with a segment can be that of a structure of the folder's own."""
    if code is None or not _CODE.fullmatch(code.value):
        return False
    return not any(known.has_own_code and known.code.value == code.value for known in TABLE)


def find_near(name: str, known: Sequence[str]) -> str | None:
    """The known name that a name is probably a slip of the keyboard away from; None if it is none, or is one itself.

    Word by word: "right ventricle" is not near to "left ventricle", nor "tumour 1" to "tumour 2". Scripts without
    letters are not compared: one sign of another is another word there.

    Args:
        known: Names; of structures of the table their phrases count too.

    Example:
        >>> find_near("livr", ["liver", "spleen"]), find_near("liver tumour", ["liver"]), find_near("Lever", ["liver"])
        ('liver', None, 'liver')
    """
    words = _split(name)
    for owner in known:
        row = find_structure(owner)
        for phrase in (owner,) if row is None else row.phrases:
            others = _split(phrase)
            if words == others:
                return None
            if len(words) == len(others) and all(map(_is_slip, words, others)):
                return owner
    return None


def _count_drawn(store: AnnotationStore, image: str, called: Collection[str]) -> int:
    """Axial slices on which the label in force of an image draws a structure, by one of its names (folded)."""
    label = store.current(image)
    values = [] if label is None else [value for word, value in label.label_ids if fold_name(word) in called]
    if label is None or not values:
        return 0
    try:
        grid = read_grid(store.label_file(label))
        drawn = grid.arrange(np.isin(load_label_map(store.label_file(label), grid).array, values))
    except ProGiDiffError as err:
        logger.warning("The label of '%s' is not counted: %s", image, err)
        return 0
    return int(drawn.any(axis=(1, 2)).sum())


def means_several(name: str) -> bool:
    """Whether a name means several structures of the table ("kidneys"), or says what it does not mean ("no liver").

    Example:
        >>> means_several("liver and spleen"), means_several("left ventricle")
        (True, False)
    """
    words = set(_split(name))
    if words & (NEGATIONS | {"or"}):
        return True
    try:
        return len(parse_prompt(name)) > 1
    except PromptError:
        return False


def _is_slip(one: str, other: str) -> bool:
    shorter = min(len(one), len(other))
    if one == other:
        return True
    if shorter < 4 or one.upper() == one or other.upper() == other or {one, other} <= SIDES.keys():
        return False
    return _count_edits(one, other) <= (1 if shorter < 8 else 2)


def _count_edits(one: str, other: str) -> int:
    """Characters to insert, drop or replace."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def _split(name: str) -> list[str]:
    return [item.value for item in split_words(name)]


def fold_name(name: str) -> str:
    """What two spellings of one name have in common.

    Example:
        >>> fold_name("Left-Ventricle") == fold_name("left  ventricle")
        True
    """
    return " ".join(_split(name))


def _list_words(rows: Sequence[FolderStructure]) -> list[str]:
    return [row.name for row in rows if row.is_own]


def _clean(name: str) -> str:
    """A name as it is kept.

    Raises:
        PromptError: if it says nothing, or would be read as something else in a prompt.
    """
    cleaned = " ".join("".join(c if c.isprintable() else " " for c in str(name)).split())
    if not cleaned:
        raise PromptError("The name of the structure is empty. Write what it is called, for example 'left ventricle'.")
    if len(cleaned) > MAX_NAME:
        raise PromptError(f"The name has {len(cleaned)} characters; at most {MAX_NAME} are kept. Choose a shorter one.")
    if is_unnamed(cleaned):
        raise PromptError(
            f"'{cleaned}' does not say what it is. Write what it is called, for example 'left ventricle'."
        )
    if means_several(cleaned):
        raise PromptError(f"'{cleaned}' does not name one structure. Draw each under a name of its own.")
    words = set(_split(cleaned))
    small = FILLERS | SIDES.keys() | SEPARATORS | QUANTIFIERS | EVERYTHING | NEGATIONS | {"or"}
    if not any(word[0].isalnum() for word in words) or words <= small:
        raise PromptError(f"'{cleaned}' names no structure. Write what it is called, for example 'left ventricle'.")
    return cleaned


def _clean_words(words: Sequence[str]) -> tuple[str, ...]:
    if len(words) > MAX_WORDS:
        raise RequestError(f"{len(words)} further words are more than the {MAX_WORDS} of a structure. Send fewer.")
    return tuple(dict.fromkeys(_clean(word) for word in words))


def _read_code(code: str | Code | None, name: str) -> _CodeRow | None:
    if code is None:
        return None
    row = code if isinstance(code, Code) else Code(str(code).strip(), name)
    if row.scheme == "SCT" and not _CODE.fullmatch(row.value):
        raise RequestError(f"'{row.value[:30]}' is no SNOMED CT code; it has 6 to 18 digits, for example 80891009.")
    table = next((known.name for known in TABLE if known.has_own_code and known.code.value == row.value), None)
    if table is not None and row.scheme == "SCT":
        raise ConflictError(f"Code {row.value} is '{table}', which '{name}' is not. Leave the code out.")
    return _CodeRow(value=row.value, meaning=row.meaning, scheme=row.scheme)


def _to_structure(row: _Row) -> FolderStructure:
    code = None if row.code is None else Code(row.code.value, row.code.meaning, row.code.scheme)
    return FolderStructure(name=row.name, label_id=row.label_id, color=row.color, code=code, words=row.words)


def _to_row(row: FolderStructure) -> _Row:
    code = (
        None if row.code is None else _CodeRow(value=row.code.value, meaning=row.code.meaning, scheme=row.code.scheme)
    )
    return _Row(name=row.name, label_id=row.label_id, color=row.color, code=code, words=row.words)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _store(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as err:
        raise StoreError(
            f"'{path}' could not be written ({err}). Free some disk space, or check who may write there."
        ) from err
