"""The label in force: what the history says of it, for whoever joins another with it, compares one with it, or keeps
one in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from progidiff.errors import NotFoundError
from progidiff.images.geometry import Grid
from progidiff.labels.history import FINAL, Annotation, AnnotationStore, hash_file
from progidiff.labels.saving import Previous, ReadyLabel, combine_ids, prepare_renamed
from progidiff.labels.segments import LabelMap, combine_names, find_names
from progidiff.prompts.parser import canonical_name


def find_previous(annotations: AnnotationStore, image_id: str, tag: str) -> Previous | None:
    """The label in force, for `labels.saving.prepare_label`."""
    saves = annotations.in_force(image_id, tag)
    if not saves:
        return None
    slices: frozenset[int] | None = None
    if all(label.slices is not None for label in saves):
        slices = frozenset(z for label in saves for z in label.slices or ())
    structures = tuple(dict.fromkeys(name for label in saves for name in label.structures))
    file = annotations.label_file(saves[-1])
    renamed = annotations.find_renamed()
    own = {value: renamed.get(name, name) for value, name in find_names(file).items()}
    names = combine_names(own, {value: name for name, value in saves[-1].label_ids})
    return Previous(file, {name: value for value, name in names.items()}, slices, structures)


def find_meaning(
    label: LabelMap, save: Annotation | None, folder_ids: Mapping[str, int], renamed: Mapping[str, str] | None = None
) -> dict[int, str]:
    """Id -> structure of a label in force: as its file says, as its save says, and as the folder does.

    Args:
        label: Read.
        save: The last in force; None if somebody else made the label.
        folder_ids: Structure -> id, of `labels.saving.load_label_ids`.
        renamed: Former name -> the one of now, see `AnnotationStore.find_renamed`.
    """
    recorded = {} if save is None else {value: name for name, value in save.label_ids}
    names = {**{value: name for name, value in folder_ids.items()}, **combine_names(label.names, recorded)}
    now = renamed or {}
    return {value: now.get(name, canonical_name(name)) for value, name in names.items()}


def rename_in_force(
    annotations: AnnotationStore,
    image_id: str,
    old: str,
    new: str,
    grid: Grid,
    ids: Mapping[str, int],
    scratch: Path,
    tag: str = FINAL,
) -> ReadyLabel:
    """The label in force with another name for a structure, see `labels.saving.prepare_renamed`.

    Args:
        ids: Structure -> id, of the folder.
        scratch: For the file.
        tag: Of the label.

    Raises:
        NotFoundError: if there is no label, or no such structure.
    """
    previous = find_previous(annotations, image_id, tag)
    if previous is None:
        raise NotFoundError(f"Image '{image_id[:100]}' has no saved label yet, so there is nothing to rename.")
    saves = annotations.in_force(image_id, tag)
    return prepare_renamed(old, new, grid, saves, previous, combine_ids(ids, previous), scratch)


def is_repeat(ready: ReadyLabel, saves: list[Annotation]) -> bool:
    """Whether a label says nothing that the saves in force do not say already."""
    if not saves or hash_file(ready.file) != saves[-1].sha256:
        return False
    whole = any(label.slices is None for label in saves)
    known = {z for label in saves for z in label.slices or ()}
    covered = whole or (ready.slices is not None and known.issuperset(ready.slices))
    return covered and {name for label in saves for name in label.structures}.issuperset(ready.structures)


def record_ready(
    annotations: AnnotationStore, image_id: str, ready: ReadyLabel, tag: str, user: str, client: str
) -> Annotation:
    """Put a prepared label into the history."""
    return annotations.record(
        image_id,
        ready.file,
        tag=tag,
        user=user,
        client=client,
        slices=ready.slices,
        structures=ready.structures,
        source=ready.source,
        edited=ready.edited,
        seconds=ready.seconds,
        num_slices=ready.num_slices,
        label_ids=ready.label_ids,
        effort=ready.effort,
        edits=ready.edits,
    )
