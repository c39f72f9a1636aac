"""Versions of adapters and of models for pictures on the command line: list, show, use, roll back."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, TypeVar

import typer

from progidiff.errors import RequestError
from progidiff.storage.versions import VersionCard, VersionStore

C = TypeVar("C", bound=VersionCard)

ReferenceArgument = Annotated[
    str, typer.Argument(help="NAME for the version that is served, or NAME@VERSION.", show_default=False)
]
ExactReferenceArgument = Annotated[str, typer.Argument(help="NAME@VERSION.", show_default=False)]


def print_versions(store: VersionStore[C], as_json: bool) -> None:
    """Print names, versions and which one is served (*)."""
    entries = store.entries()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    if not entries:
        typer.echo(f"'{store.root}' holds no {store.noun.lower()}s; `{store.trainer}` trains one.", err=True)
    for entry in entries:
        numbers = " ".join(f"{v}*" if v == entry.current else str(v) for v in entry.versions)
        typer.echo(f"{entry.name}: {numbers}{'' if entry.current is not None else ' (none is served)'}")
        if entry.problem:
            typer.echo(f"  {entry.problem}", err=True)


def print_version(store: VersionStore[C], reference: str, as_json: bool) -> None:
    """Print the card of a version for people, or card, run.json and history as JSON."""
    card = store.find(reference)
    if as_json:
        known = {store.noun.lower(): card.to_dict(), "run": store.run(card), "history": store.history(card.name)}
        typer.echo(json.dumps(known, indent=1))
    else:
        from progidiff.model.hub_card import strip_front_matter

        typer.echo(strip_front_matter((store.folder(card) / "README.md").read_text(encoding="utf-8")))


def serve_version(store: VersionStore[C], reference: str) -> None:
    """Publish a version.

    Raises:
        RequestError: if only its name is given.
    """
    if "@" not in reference:
        raise RequestError(
            f"Name the version too, for example {reference}@1; `{store.command} list` shows what there is."
        )
    card = store.find(reference)
    store.publish(card.name, card.version)
    typer.echo(f"{card.full_name} is served.")


def roll_back(store: VersionStore[C], name: str, without: str) -> None:
    """Publish what was published before; `without` is said where that is no version."""
    version = store.rollback(name)
    typer.echo(f"{name}@{version} is served." if version is not None else without)
