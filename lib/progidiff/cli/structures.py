"""The part of the command line for what a folder labels of its own: ``progidiff structures list | add | rename``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.annotating import StoreOption, StudiesOption
from progidiff.cli.options import JsonOption
from progidiff.errors import RequestError
from progidiff.storage.state import default_store

if TYPE_CHECKING:
    from progidiff.labels.folder_structures import FolderStructures

InsistOption = Annotated[
    bool, typer.Option("--insist", help="Take a name that is nearly a known one ('livr') as it stands.")
]


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    structures = typer.Typer(
        no_args_is_help=True,
        help="Structures that a folder labels and this program does not know.",
        rich_markup_mode=None,
    )
    structures.command("list")(list_structures)
    structures.command("add")(add_structure)
    structures.command("rename")(rename_structure)
    app.add_typer(structures, name="structures")


def list_structures(studies: StudiesOption, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the folder's own structures: id, name, and the words that mean the same."""
    rows = _open(studies, store).own()
    if as_json:
        typer.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=1, ensure_ascii=False))
        return
    for row in rows:
        also = ", ".join(row.words)
        typer.echo(f"{row.label_id:4} {row.name}{f' ({also})' if also else ''}")
    if not rows:
        typer.echo("This folder has no structures of its own.", err=True)


def add_structure(
    name: Annotated[str, typer.Argument(help="In any script.", show_default=False)],
    studies: StudiesOption,
    store: StoreOption = None,
    word: Annotated[
        list[str] | None, typer.Option(help="Another word for it; give it several times.", show_default=False)
    ] = None,
    label_id: Annotated[
        int | None, typer.Option("--id", help="In labels. Default: the next that is free.", show_default=False)
    ] = None,
    color: Annotated[str | None, typer.Option(help="As #rrggbb.", show_default=False)] = None,
    code: Annotated[str | None, typer.Option(help="Its SNOMED CT code.", show_default=False)] = None,
    insist: InsistOption = False,
) -> None:
    """Add a structure, so that it can be labelled and taught."""
    row = _open(studies, store).add(
        name, label_id=label_id, color=color, code=code, words=word or (), insist=insist, user="command line"
    )
    typer.echo(f"'{row.name}' has id {row.label_id} in '{studies}'.", err=True)


def rename_structure(
    name: Annotated[str, typer.Argument(help="As it is called now.", show_default=False)],
    new: Annotated[str, typer.Argument(help="Its new name.", show_default=False)],
    studies: StudiesOption,
    store: StoreOption = None,
    insist: InsistOption = False,
) -> None:
    """Call a structure by another name; its id and its labels stay, and the old name is understood on."""
    row = _open(studies, store).rename(name, new, insist=insist, user="command line")
    typer.echo(f"'{row.name}' has id {row.label_id} in '{studies}', as before.", err=True)


def _open(studies: Path, store: Path | None) -> FolderStructures:
    from progidiff.labels.folder_structures import FolderStructures
    from progidiff.labels.history import AnnotationStore

    if not studies.is_dir():
        raise RequestError(f"There is no folder '{studies}'. Name the folder of images with --studies.")
    state = store or default_store(str(studies))
    return FolderStructures(studies, state, AnnotationStore(state / "annotations", studies / "labels" / "final"))
