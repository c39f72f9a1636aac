"""The audit on the command line: ``progidiff audit export | verify``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.errors import NotFoundError, RequestError, StoreError
from progidiff.storage.atomic import replace_text
from progidiff.storage.state import default_store

if TYPE_CHECKING:
    from progidiff.labels.history import AnnotationStore

StudiesOption = Annotated[
    str, typer.Option(help="Folder or DICOMweb address that the server was started with.", show_default=False)
]
StoreOption = Annotated[Path | None, typer.Option(help="The server's --conf store, if it had one.", show_default=False)]

DAMAGED_EXIT_CODE = 1
"""`progidiff audit verify` ends with it if anything is damaged or missing."""


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    audit = typer.Typer(
        no_args_is_help=True,
        help="Who saved which label, when and from which proposal: export, verify.",
        rich_markup_mode=None,
    )
    audit.command("export")(export)
    audit.command("verify")(verify)
    app.add_typer(audit, name="audit")


def export(
    studies: StudiesOption,
    out: Annotated[
        Path, typer.Option(help="File to write: .csv, or .jsonl for one JSON object per line.", show_default=False)
    ],
    image: Annotated[str | None, typer.Option(help="Only this image.", show_default=False)] = None,
    store: StoreOption = None,
) -> None:
    """Write one row per label saved, deleted, undone, restored or skipped; a server may be running meanwhile."""
    from progidiff.labels.audit import format_audit, list_audit

    if out.suffix.lower() not in (".csv", ".jsonl"):
        raise RequestError(f"'{out}' is neither .csv nor .jsonl. Name a file such as audit.csv.")
    rows = list_audit(_open(studies, store), image)
    _write(out, format_audit(rows, out.suffix.lower()[1:]))
    typer.echo(f"{len(rows)} events in {out}")


def verify(studies: StudiesOption, store: StoreOption = None) -> None:
    """Read the log and every kept label again, and name what is damaged or missing; exit code 1 if anything is."""
    annotations = _open(studies, store)
    problems = annotations.verify()
    for sentence in [*problems, *annotations.list_torn()]:
        typer.echo(sentence)
    if problems:
        sys.exit(DAMAGED_EXIT_CODE)
    typer.echo(f"{len(annotations.events())} events and {len(annotations.list())} labels are as they were written.")


def _open(studies: str, store: Path | None) -> AnnotationStore:
    from progidiff.labels.history import AnnotationStore

    root = (store or default_store(studies)) / "annotations"
    if not root.is_dir():
        raise NotFoundError(
            f"There is no '{root}': no label was saved yet, or the server had another "
            "--conf store; name it with --store."
        )
    return AnnotationStore(root)


def _write(path: Path, text: str) -> None:
    """By rename, so that a reader sees all of it or the old file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    except OSError as err:
        raise StoreError(f"'{path}' could not be written ({err}). Free some disk space or name another file.") from err
