"""Families of trained versions, adapters of the model for volumes and heads for pictures, listed and served by the same
code: what a version is comes from its card, what a family is from its store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from progidiff.errors import ModelError, NotFoundError
from progidiff.server.version_answers import NamedVersions, VersionAnswer, describe_version, list_events
from progidiff.storage.versions import VersionStore


@dataclass(frozen=True)
class Family:
    """Versions that trainings make and that one model takes.

    Attributes:
        trainer: By which clients tell it from adapters, which have "".
        find_store: The versions; None if there is no folder of them.
        find_base: Content of the model that is loaded, which versions must belong to; None where each names its own.
    """

    trainer: str
    find_store: Callable[[], VersionStore[Any] | None]
    find_base: Callable[[], str] | None = None

    def has(self, name: str) -> bool:
        """Whether there is a version of this name."""
        store = self.find_store()
        return store is not None and name in {entry.name for entry in store.entries()}

    def list_versions(self) -> list[NamedVersions]:
        """All names with their versions; one that is damaged is named and does not end the list."""
        store = self.find_store()
        if store is None:
            return []
        base = None if self.find_base is None else self.find_base()
        told = {"trainer": self.trainer} if self.trainer else {}
        return [
            NamedVersions(
                name=entry.name,
                current=entry.current,
                published=entry.published,
                problem=entry.problem,
                history=list_events(store.history(entry.name)),
                versions=[_describe(store, entry.name, version, base) for version in reversed(entry.versions)],
                **told,
            )
            for entry in store.entries()
        ]

    def use(self, name: str, version: int) -> str:
        """Serve a version. Returns its full name.

        Raises:
            NotFoundError: if there is no such version.
            ModelError: if it is damaged or belongs to another base; the served one stays.
        """
        store = self._store(name)
        if self.find_base is not None:
            store.check_base(store.card(name, version), self.find_base())
        return str(store.publish(name, version).full_name)

    def roll_back(self, name: str) -> str:
        """Serve what was served before. Returns its full name, "" for the model itself.

        Raises:
            NotFoundError: if there is nothing to go back to.
            ModelError: if it is damaged; the served one stays.
        """
        version = self._store(name).rollback(name)
        return "" if version is None else f"{name}@{version}"

    def _store(self, name: str) -> VersionStore[Any]:
        store = self.find_store()
        if store is None:
            raise NotFoundError(f"There is no version of '{name[:64]}', nor a folder of any. Train one first.")
        return store


def find_family(families: Sequence[Family], name: str) -> Family:
    """The first one that has versions of a name, or the first of all: it knows how to say what there is."""
    return next((family for family in families if family.has(name)), families[0])


def _describe(store: VersionStore[Any], name: str, version: int, base: str | None) -> VersionAnswer:
    try:
        card = store.card(name, version)
        run = store.run(card)
    except (ModelError, NotFoundError) as err:
        return VersionAnswer(version=version, problem=str(err))
    values = {
        "kind": card.kind,
        "modality": card.modality,
        "structures": list(card.structures),
        "created": card.created,
        "base": card.base_name,
        "fits": base is None or card.base == base,
    }
    return describe_version(version, values, run, store.read_dice(run))
