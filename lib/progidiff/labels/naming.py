"""A label as its folder names things: what it calls a structure is understood, and what nobody knows becomes one."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace

from progidiff.errors import RequestError, StoreError
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.saving import Previous, ReadyLabel, SaveOptions
from progidiff.labels.segments import LabelMap, Look

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedLabel:
    """A label whose structures are called as the folder calls them.

    Attributes:
        label: Opened.
        options: What was sent along.
        looks: Structure -> colour and code, of the file and of what was sent along, which says more.
    """

    label: LabelMap
    options: SaveOptions
    looks: dict[str, Look]

    @property
    def names(self) -> list[str]:
        """What it draws or speaks of, each once."""
        return list_names(self.label, self.options)


def name_label(
    label: LabelMap, options: SaveOptions, structures: FolderStructures, previous: Previous | None = None
) -> NamedLabel:
    """Call what a label draws or speaks of as the folder does, and ask back what is probably misspelt.

    Args:
        label: As it was opened.
        options: What was sent along.
        structures: Of the folder.
        previous: The label in force, whose names are settled; None if there is none.

    Raises:
        PromptError: if a name that nobody knows is nearly a known one, and `options.confirm` does not insist.
    """
    told = options.label_names
    names = {name: _find_name(name, structures) for name in list_names(label, options)}
    if not options.confirm:
        settled = set() if previous is None else set(previous.label_ids)
        for name in dict.fromkeys(names.values()):
            if name not in settled and structures.is_new(name):
                structures.check_name(name)
    looks = {names[name]: label.looks[value] for value, name in label.names.items() if value in label.looks}
    looks |= {_find_name(name, structures): look for name, look in options.looks.items()}
    return NamedLabel(
        replace(label, names={value: names[name] for value, name in label.names.items()}),
        replace(
            options,
            label_names=None if told is None else {value: names[name] for value, name in told.items()},
            structures=None if options.structures is None else _rename(options.structures, names),
            effort=tuple((_find_name(name, structures), seconds, clicks) for name, seconds, clicks in options.effort),
        ),
        looks,
    )


def declare_label(structures: FolderStructures, ready: ReadyLabel, user: str) -> tuple[list[str], tuple[str, ...]]:
    """Let what a saved label draws for the first time be structures of the folder. The label is saved, whatever the
    table of structures says; the next save with such a name tries again.

    Returns:
        Sentences for the person who saved, and the structures that are the folder's from now on.
    """
    try:
        new = [name for name in ready.label_ids if structures.is_new(name)]
        told = structures.declare(ready.label_ids, user, ready.looks, ready.confirm)
        return told, tuple(name for name in new if structures.find(name) is not None)
    except (StoreError, RequestError) as err:
        logger.warning("A label is saved, and its new structures are not noted: %s", err)
        return [f"The label is saved, and its new structures are not noted: {err}"], ()


def list_names(label: LabelMap, options: SaveOptions) -> list[str]:
    """Every name that a label or what came along with it says, each once."""
    return list(
        dict.fromkeys([*label.names.values(), *(options.label_names or {}).values(), *(options.structures or ())])
    )


def _find_name(name: str, structures: FolderStructures) -> str:
    row = structures.find(name)
    return name if row is None else row.name


def _rename(names: Iterable[str], found: dict[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(found[name] for name in names))
