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
