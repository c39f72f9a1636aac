"""The labelled images of a folder, and its table of label ids.

::

    <studies>/
      case1.nii.gz
      labels/final/case1.nii.gz      on the grid of its image; .seg.nrrd and .nrrd too
      labels.json                    what the ids of these labels mean
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from progidiff.errors import RequestError
from progidiff.images.folders import list_volumes
from progidiff.images.formats import strip_suffix
from progidiff.labels.history import split_label_name
from progidiff.storage.json_text import decode_json_file

LABELS_JSON = "labels.json"

_BACKGROUND = {"background", "bg", "clear label", "unlabeled", "unlabelled", "none", "0", ""}
_EXAMPLE = '{"1": "liver", "2": "spleen"}'


@dataclass(frozen=True)
class LabelledCase:
    """An image with its label.

    Attributes:
        name: File name without suffix.
        image: Path of the image.
        label: Path of the label map on the image's grid.
    """

    name: str
    image: Path
    label: Path


def list_labelled(studies: Path, names: Iterable[str] | None = None) -> list[LabelledCase]:
    """The volumes of a local datastore that have a label in `labels/final`, by name.

    Args:
        studies: Folder of images.
        names: Only these, with or without suffix, in the order of the folder.

    Raises:
        RequestError: if the folder is absent, nothing is labelled, or a name is unknown or has no label.
    """
    if not studies.is_dir():
        raise RequestError(
            f"There is no folder '{studies}'. Name a folder of images with labels/final and labels.json."
        )
    images = list_volumes(studies)
    final = studies / "labels" / "final"
    labels = _find_labels(final) if final.is_dir() else {}
    cases = {name: LabelledCase(name, images[name], labels[name]) for name in images if name in labels}
    if not cases:
        raise RequestError(
            f"'{studies}' holds no image with a label of the same name in labels/final; "
            "there is nothing to compare with."
        )
    if names is None:
        return list(cases.values())
    wanted = [strip_suffix(name) for name in names]
    unknown = [name for name in wanted if name not in cases]
    if unknown:
        without = [name for name in unknown if name in images]
        reason = (
            f"{', '.join(without)} has no label in labels/final"
            if without
            else f"there is no image {', '.join(unknown)}"
        )
        raise RequestError(f"In '{studies}' {reason}. The labelled cases are {', '.join(cases)}.")
    return [case for name, case in cases.items() if name in wanted]


def load_label_names(studies: Path) -> dict[int, str]:
    """Label id -> structure, from the labels.json of a folder; see `read_label_names`.

    Raises:
        RequestError: if it is absent or something else.
    """
    path = studies / LABELS_JSON
    if not path.is_file():
        raise RequestError(
            f"'{studies}' has no labels.json (label id -> structure), so its labels "
            'have no names. Write one, for example {"1": "liver"}.'
        )
    return read_label_names(path)


def read_label_names(path: Path) -> dict[int, str]:
    """Label id -> structure, from a JSON table in either order: ``{"6": "liver"}``, or ``{"liver": 6}`` as nnU-Net v2
    writes it, there also under "labels" beside other entries. The background may be named; a byte order mark is passed
    over.

    Raises:
        RequestError: if it is something else, or the file cannot be read.
    """
    try:
        values = json.loads(decode_json_file(path.read_bytes()), object_pairs_hook=_build_object)
        if isinstance(values, dict) and isinstance(values.get("labels"), dict):
            values = values["labels"]
        if not isinstance(values, dict):
            raise ValueError(f"it holds a JSON {type(values).__name__} and no object")
        pairs = [_read_pair(str(key), value) for key, value in values.items()]
    except (OSError, ValueError) as err:
        raise RequestError(
            f"'{path}' does not map label ids to structures ({err}), so its labels have no names and none can be "
            f"saved. Make it look like {_EXAMPLE}."
        ) from err
    names: dict[int, str] = {}
    for value, name in pairs:
        if value == 0 and name.strip().lower() in _BACKGROUND:
            continue
        if value < 1:
            raise RequestError(
                f"'{path}' gives '{name[:60]}' the id {value}; ids below 1 are the background and have no name. Number "
                "the structures from 1."
            )
        if names.setdefault(value, name) != name:
            raise RequestError(
                f"'{path}' gives the id {value} to '{names[value][:60]}' and to '{name[:60]}'. Give each its own."
            )
    return names


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, whose reader would take the last of two entries of one name.

    Raises:
        ValueError: if a name comes twice.
    """
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"'{key[:40]}' is in it twice")
        found[key] = value
    return found


def _read_pair(key: str, value: Any) -> tuple[int, str]:
    """Id and name, whichever comes first.

    Raises:
        ValueError: if neither is an id.
    """
    if isinstance(value, str):
        if not _is_number(key) and not _is_number(value):
            raise ValueError(f"neither '{key[:40]}' nor '{value[:40]}' beside it is a whole number")
        return (int(key), value) if _is_number(key) else (int(value), key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"'{key[:40]}' has {str(value)[:40]} beside it, which is neither an id nor a name")
    if _is_number(key):
        raise ValueError(f"'{key[:40]}' and {value} are both numbers")
    return value, key


def _is_number(text: str) -> bool:
    return text.strip().lstrip("-").isdecimal()


def _find_labels(folder: Path) -> dict[str, Path]:
    """Id of the image -> path, by name."""
    found = {path: split_label_name(path.name) for path in sorted(list_volumes(folder).values())}
    return {parts[0]: path for path, parts in found.items() if parts is not None}
