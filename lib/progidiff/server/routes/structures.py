"""The structures of this folder over HTTP: which there are, which the model knows, and how to teach another one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from progidiff.errors import NotFoundError, RequestError
from progidiff.labels.drawn_slices import Drawn
from progidiff.labels.folder_structures import MAX_WORDS, FolderStructure, FolderStructures
from progidiff.labels.segments import MAX_NAME, clean_text
from progidiff.prompts.structures import Code, find_structure, name_label_id, number_structures, pick_color
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import ANNOTATE, CALLER, READ, SMALL, Content, Endpoints
from progidiff.server.parts import Context, get_context
from progidiff.storage.json_text import Text
from progidiff.training.split import NEEDED_SLICES


class StructureCode(BaseModel):
    """A coded concept.

    Attributes:
        value: Of SNOMED CT, 6 to 18 digits.
        meaning: In words; the structure's name if it is left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: str = Field(max_length=18)
    meaning: str = Field(default="", max_length=MAX_NAME)


class StructureAnswer(BaseModel):
    """A structure of this folder.

    Attributes:
        name: What it is called here.
        label_id: In the folder's labels, 1..255; null of what a model knows and labels.json does not name.
        color: "#rrggbb".
        code: SNOMED CT; null if nobody gave one.
        words: What means the same.
        is_own: Whether the folder brought it, and this program does not know it by itself.
        is_known: Whether a served model proposes it.
        slices: Axial slices on which it is labelled; counted for structures that no model knows, null for others.
        images: On which it is labelled; the same.
        missing: How many more labelled slices it takes until proposals can be expected of a training; 0 for what a
            model knows.
    """

    model_config = ConfigDict(frozen=True)

    name: Text
    label_id: int | None
    color: str
    code: StructureCode | None
    words: list[Text]
    is_own: bool
    is_known: bool
    slices: int | None
    images: int | None
    missing: int

    @classmethod
    def of(cls, row: FolderStructure, is_known: bool, drawn: Drawn | None) -> Self:
        """What is known of a row of the folder's table."""
        known = find_structure(row.name)
        words = list(row.words) if known is None else list(known.phrases[1:])
        return cls(
            name=row.name,
            label_id=row.label_id,
            color=row.color,
            code=None if row.code is None else StructureCode(value=row.code.value, meaning=row.code.meaning),
            words=words,
            is_own=row.is_own,
            is_known=is_known,
            slices=None if drawn is None else drawn.slices,
            images=None if drawn is None else drawn.images,
            missing=0 if is_known or drawn is None else max(0, NEEDED_SLICES - drawn.slices),
        )


class StructuresAnswer(BaseModel):
    """All of them.

    Attributes:
        structures: Ascending by id.
        slices_needed: Labelled slices of a structure with which a training can be expected to propose it.
    """

    model_config = ConfigDict(frozen=True)

    structures: list[StructureAnswer]
    slices_needed: int


class NewStructure(BaseModel):
    """A structure to add.

    Attributes:
        name: In any language and script.
        color: "#rrggbb"; one is picked if it is left out.
        code: SNOMED CT.
        words: What means the same.
        confirm: Whether a name that is nearly a known one is meant as it stands.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    color: str | None = None
    code: StructureCode | None = None
    words: list[str] = Field(default=[], max_length=MAX_WORDS)
    confirm: bool = False


class StructureChange(BaseModel):
    """What is to change of a structure of the folder's own; null leaves it as it is.

    Attributes:
        name: Its new name. Its id stays and so do its labels; the former name goes on being understood.
        color: "#rrggbb".
        code: SNOMED CT.
        words: What means the same, in place of the words so far; with a new name, the former one is added.
        confirm: As of `NewStructure`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str | None = None
    color: str | None = None
    code: StructureCode | None = None
    words: list[str] | None = Field(default=None, max_length=MAX_WORDS)
    confirm: bool = False


def build_endpoints() -> Endpoints:
    """List, add, change."""
    endpoints = Endpoints()

    @endpoints.get(
        "/progidiff/structures",
        READ,
        tags=["Structures"],
        summary="The structures of this folder: ids, colours, words, what a model knows, and how far others are",
    )
    def list_structures() -> StructuresAnswer:
        return StructuresAnswer(structures=describe_structures(get_context()), slices_needed=NEEDED_SLICES)

    @endpoints.post(
        "/progidiff/structures",
        ANNOTATE,
        tags=["Structures"],
        summary="Add a structure that nobody knows yet; a name nearly as a known one is asked back",
        takes="JSON: name, color, code, words, confirm",
        body=SMALL,
        content=Content.JSON,
    )
    def add(structure: NewStructure, user: User = CALLER) -> StructureAnswer:
        context = get_context()
        row = context.labels.structures.add(
            structure.name,
            color=structure.color,
            code=_to_code(structure.code, structure.name),
            words=structure.words,
            insist=structure.confirm,
            user=user.name,
        )
        return _describe(context, row)

    @endpoints.post(
        "/progidiff/structures/{label_id}",
        ANNOTATE,
        tags=["Structures"],
        summary="Rename a structure of the folder's own, or change its words, colour or code; its labels stay",
        takes="JSON: name, color, code, words, confirm",
        body=SMALL,
        content=Content.JSON,
    )
    def change(label_id: int, change: StructureChange, user: User = CALLER) -> StructureAnswer:
        context = get_context()
        return _describe(context, _change(context.labels.structures, label_id, change, user.name))

    return endpoints


def describe_structures(context: Context) -> list[StructureAnswer]:
    """Every structure of the folder, ascending by id, and what the models know beside them."""
    rows = context.labels.structures.load()
    known = list_known(context)
    drawn = context.drawn.count([row.name for row in rows if row.name not in known])
    answers = [StructureAnswer.of(row, row.name in known, drawn.get(row.name)) for row in rows]
    return answers + _describe_others(sorted(known - {row.name for row in rows}))


def list_known(context: Context) -> set[str]:
    """What the model, or a version of it that is served, proposes by name."""
    return set(context.infer.structures)


def _describe_others(names: Iterable[str]) -> list[StructureAnswer]:
    """What a model knows and labels.json does not name."""
    answers = []
    for name, number in number_structures(names).items():
        row = FolderStructure(
            name=name,
            label_id=number,
            color=pick_color(name, number),
            code=None if (known := find_structure(name)) is None else known.code,
            is_own=known is None,
        )
        answers.append(StructureAnswer.of(row, True, None).model_copy(update={"label_id": None}))
    return answers


def _describe(context: Context, row: FolderStructure) -> StructureAnswer:
    is_known = row.name in list_known(context)
    return StructureAnswer.of(row, is_known, None if is_known else context.drawn.count([row.name])[row.name])


def _change(table: FolderStructures, label_id: int, change: StructureChange, user: str) -> FolderStructure:
    """Both changes or none: what can be refused is asked first.

    Raises:
        NotFoundError: if no structure of the folder's own has this id.
        RequestError: if nothing is to change.
    """
    row = next((own for own in table.own() if own.label_id == label_id), None)
    if row is None:
        known = name_label_id(label_id)
        told = f"Id {label_id} is '{known}', which this program knows and nobody renames." if known else ""
        raise NotFoundError(told or f"This folder has no structure of its own with the id {label_id}.")
    if change.name is None and change.words is None and change.color is None and change.code is None:
        raise RequestError("Nothing is to change. Send a name, words, a colour or a code.")
    before = row
    if change.name is not None and change.name != row.name:
        row = table.rename(row.name, change.name, insist=change.confirm, user=user)
    if change.words is None and change.color is None and change.code is None:
        return row
    words = change.words
    if words is not None and row.name != before.name:
        words = [*(word for word in words if word != before.name), before.name]
    return table.describe(row.name, color=change.color, code=_to_code(change.code, row.name), words=words)


def _to_code(code: StructureCode | None, name: str) -> Code | None:
    return None if code is None else Code(code.value.strip(), clean_text(code.meaning) or clean_text(name))
