"""The part of the command line for whoever keeps a server running."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from progidiff.errors import RequestError
from progidiff.images.formats import strip_suffix
from progidiff.logs import Names, find_key_file, open_key
from progidiff.storage.state import default_store

StudiesOption = Annotated[
    str, typer.Option(help="Folder or DICOMweb address that the server was started with.", show_default=False)
]
StoreOption = Annotated[Path | None, typer.Option(help="The server's --conf store, if it had one.", show_default=False)]


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    app.command("log-name")(show_log_name)
    app.command("backup")(back_up)
    app.command("restore")(restore)


def show_log_name(
    names: Annotated[list[str], typer.Argument(help="Ids or file names of images.", show_default=False)],
    studies: StudiesOption,
    store: StoreOption = None,
) -> None:
    """Print the pseudonym that stands for an image in a log that hides names (--conf log json)."""
    file = find_key_file(store or default_store(studies))
    if not file.is_file():
        raise RequestError(
            f"There is no key in '{file}': no server with these studies has hidden names in its log. Name what it "
            "serves, or its --store."
        )
    hidden = Names(open_key(file), strip=strip_suffix)
    for name in names:
        typer.echo(f"{hidden.pseudonym(name)}\t{name}")


def back_up(
    studies: StudiesOption,
    out: Annotated[Path, typer.Option(help="The tar file to write; new.", show_default=False)],
    store: StoreOption = None,
    adapters: Annotated[
        Path | None, typer.Option(help="Folder of trained adapters, to copy them too.", show_default=False)
    ] = None,
    textdiff: Annotated[
        Path | None, typer.Option(help="Folder of TextDiff versions, to copy them too.", show_default=False)
    ] = None,
    secrets: Annotated[
        list[Path] | None,
        typer.Option(help="Users file, token file, ...; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Copy labels, their history, versions, users and state into one file; a server may be running meanwhile.

    Images and what is computed again are left out. The file holds secrets: only its owner can read it.
    """
    from progidiff.backup import Places, create_backup

    folder = None if studies.startswith(("http://", "https://")) else Path(studies)
    given = {"adapters": adapters, "textdiff": textdiff, **{f"secrets/{file.name}": file for file in secrets or ()}}
    more = {name: path for name, path in given.items() if path is not None}
    for path in more.values():
        if not path.exists():
            raise RequestError(f"There is no '{path}'. Leave its option out, or name what there is.")
    manifest = create_backup(Places(store or default_store(studies), folder, more), out)
    typer.echo(f"{len(manifest.files)} files in {out}", err=True)


def restore(
    backup: Annotated[Path, typer.Argument(help="What `progidiff backup` wrote.", show_default=False)],
    to: Annotated[Path, typer.Option(help="A new folder, or an empty one.", show_default=False)],
) -> None:
    """Check a backup and unpack it: `studies` and `store` into a new folder, from where they are moved to their
    places.
    """
    from progidiff.backup import restore_backup

    manifest = restore_backup(backup, to)
    typer.echo(f"{len(manifest.files)} files of version {manifest.version} in {to}", err=True)
