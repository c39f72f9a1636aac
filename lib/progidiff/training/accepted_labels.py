"""From a datastore's accepted labels to training cases: what every id means, and which slices somebody vouches for.

The meaning of an id comes from, in this order: the label's file itself (see `labels.segments`), its history, its record
in the datastore (`label_info`, as viewers send it), the folder's labels.json, and only if there is none of these, the
fixed ids that our own server hands out. An id that none of them names is refused when the label is read, never guessed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from progidiff.errors import ImageError
from progidiff.images.formats import is_picture
from progidiff.labels.cases import LABELS_JSON, list_labelled, load_label_names
from progidiff.labels.folder_structures import FolderStructures, fold_name
from progidiff.labels.history import AnnotationStore
from progidiff.labels.segments import combine_names, read_names
from progidiff.prompts.parser import canonical_name
from progidiff.prompts.structures import fixed_ids
from progidiff.storage.state import default_store
from progidiff.training.slice_cache import Case

logger = logging.getLogger(__name__)

ANNOTATIONS = "annotations"
"""Folder of the `AnnotationStore` in a server's state folder."""

EVERYTHING = ""
"""Key of `Case.annotated` for slices that count for every structure of the table."""


@dataclass(frozen=True)
class AcceptedLabel:
    """An image and its label of tag "final", as a datastore knows them.

    Attributes:
        name: Image id.
        image: File, or folder of one DICOM series.
        label: File on the image's grid.
        label_info: The label's record; viewers send "label_info" [{"name", "idx"}], our own answers hold "label_names"
            {name: id}.
        image_info: The image's record.
    """

    name: str
    image: Path
    label: Path
    label_info: Mapping[str, Any] = field(default_factory=dict)
    image_info: Mapping[str, Any] = field(default_factory=dict)


def list_local_labels(studies: Path) -> list[AcceptedLabel]:
    """The accepted labels of a local datastore's folder, whether or not a server is running on it.

    Raises:
        RequestError: if there are none.
    """
    try:
        objects = dict(json.loads((studies / "datastore_v2.json").read_text(encoding="utf-8"))["objects"])
    except (OSError, ValueError, KeyError, TypeError):
        objects = {}  # No server was here yet, or it is writing at this moment: labels.json still names the ids.
    found = []
    for case in list_labelled(studies):
        record = objects.get(case.name) or {}
        label = (record.get("labels") or {}).get("final") or {}
        found.append(
            AcceptedLabel(
                case.name,
                case.image,
                case.label,
                label.get("info") or {},
                (record.get("image") or {}).get("info") or {},
            )
        )
    return found


def find_local_cases(studies: Path, annotations: AnnotationStore | None = None) -> list[Case]:
    """The training cases of a local datastore's folder.

    Args:
        annotations: Who labelled which slices; None for the store that a server keeps in this folder, if it has one.

    Raises:
        RequestError: if nothing is labelled, or labels.json is damaged.
    """
    if annotations is None:
        kept = default_store(str(studies)) / ANNOTATIONS
        annotations = AnnotationStore(kept, studies / "labels" / "final") if kept.is_dir() else None
    return build_cases(
        list_local_labels(studies), load_folder_names(studies), annotations, find_folder_structures(studies)
    )


def find_folder_structures(studies: Path) -> FolderStructures:
    """The own structures of a local datastore's folder, as a server on it keeps them."""
    return FolderStructures(studies, default_store(str(studies)))


def build_cases(
    labels: Iterable[AcceptedLabel],
    folder_names: Mapping[int, str] | None,
    annotations: AnnotationStore | None,
    own: FolderStructures | None = None,
) -> list[Case]:
    """Training cases of accepted labels.

    Args:
        labels: From `list_local_labels`, or from the server's datastore.
        folder_names: labels.json of the folder; None if it has none.
        annotations: Who labelled which slices; None: whole volumes are labelled.
        own: The folder's own structures: what labels called them before they were renamed, and their other words.

    Returns:
        The cases that anything is annotated of, in the given order.
    """
    now = {} if own is None else {fold_name(word): row.name for row in own.own() for word in (row.name, *row.words)}
    # Then labels.json gives the known structures their ids, and says nothing of what a label shows.
    is_told = own is None or not own.adds_to_table
    cases = []
    for label in labels:
        current = None if annotations is None else annotations.current(label.name)
        recorded = {} if current is None else {value: name for name, value in current.label_ids}
        told = recorded or read_label_names(label.label_info)
        try:
            in_file = read_names(label.label)
        except ImageError as err:
            logger.warning("The label of '%s' is left out: %s", label.name, err)
            continue
        said = combine_names(in_file, told)
        names = {**(folder_names or {}), **said}
        # A picture shows what a sentence asked for; what its label itself names is all there is.
        names_all = (is_told and bool(names)) or (is_picture(label.image) and bool(said))
        # The fixed ids name all that could be there; what is not drawn is unknown then, not absent.
        if not names:
            names = {value: name for name, value in fixed_ids().items()}
        names = {value: now.get(fold_name(name), name) for value, name in names.items()}
        annotated = None if annotations is None else _read_slices(annotations, label.name, now)
        if annotated is not None and not annotated:
            logger.info("No slice of '%s' is annotated; it is left out", label.name)
            continue
        info = {k: str(v) for k, v in label.image_info.items() if k.lower() == "modality"}
        cases.append(Case(label.name, label.image, label.label, names, annotated, info, names_all))
    return cases


def read_label_names(info: Mapping[str, Any]) -> dict[int, str]:
    """Label id -> name out of a label's record; empty if it says nothing.

    Example:
        >>> read_label_names({"label_info": [{"name": "liver", "idx": 1}, {"name": "spleen", "idx": 2}]})
        {1: 'liver', 2: 'spleen'}
        >>> read_label_names({"params": {"label_names": {"liver": 6}}})
        {6: 'liver'}
    """
    names: dict[int, str] = {}
    entries = info.get("label_info")
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        if isinstance(entry, Mapping) and entry.get("name"):
            number = next(
                (entry[key] for key in ("idx", "id", "value", "labelValue") if entry.get(key) is not None), None
            )
            if isinstance(number, (int, str)) and str(number).isdecimal() and int(number) > 0:
                names[int(number)] = str(entry["name"])
    params = info.get("params")
    table = info.get("label_names") or (params.get("label_names") if isinstance(params, Mapping) else None)
    if not names and isinstance(table, Mapping):
        names = {
            int(number): str(name) for name, number in table.items() if str(number).isdecimal() and int(number) > 0
        }
    return names


def load_folder_names(studies: Path) -> dict[int, str] | None:
    """labels.json of a folder, None if it has none.

    Raises:
        RequestError: if it is something else.
    """
    return load_label_names(studies) if (studies / LABELS_JSON).is_file() else None


def to_json(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Cases as plain values, for another process."""
    return [
        {
            "name": case.name,
            "image": str(case.image),
            "label": str(case.label),
            "structures": {str(value): name for value, name in case.structures.items()},
            "annotated": None
            if case.annotated is None
            else {k: None if v is None else sorted(v) for k, v in case.annotated.items()},
            "info": dict(case.info),
            "names_all": case.names_all,
        }
        for case in cases
    ]


def from_json(values: Iterable[Mapping[str, Any]]) -> list[Case]:
    """The inverse of `to_json`."""
    return [
        Case(
            str(entry["name"]),
            Path(entry["image"]),
            Path(entry["label"]),
            {int(value): str(name) for value, name in entry["structures"].items()},
            None
            if entry["annotated"] is None
            else {k: None if v is None else frozenset(v) for k, v in entry["annotated"].items()},
            dict(entry["info"]),
            bool(entry["names_all"]),
        )
        for entry in values
    ]


def _read_slices(store: AnnotationStore, image: str, now: Mapping[str, str]) -> dict[str, frozenset[int] | None] | None:
    """`Case.annotated` out of the saves in force; None if the label was made elsewhere and counts as a whole."""
    saves = store.in_force(image)
    if not saves:
        return None if store.annotated_slices(image) is None else {}
    found: dict[str, frozenset[int] | None] = {}
    for save in saves:
        called = [canonical_name(text) for text in save.structures]
        for name in [now.get(fold_name(text), text) for text in called] or [EVERYTHING]:
            before = found.get(name, frozenset())
            found[name] = None if before is None or save.slices is None else before | frozenset(save.slices)
    return found
