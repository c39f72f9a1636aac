"""What is written down beside an image: its modality, and the file `<name>.json` next to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progidiff.errors import ImageError
from progidiff.images.formats import strip_suffix
from progidiff.images.modality import check_modality, find_modality, list_modalities
from progidiff.storage.json_text import decode_json_file

logger = logging.getLogger(__name__)

_UNSAID = ("OT", "SC", "SEG", "UNK")
"""What DICOM's modality says where it says nothing about how an image was taken."""


def find_stated_modality(
    path: Path, info: Mapping[str, Any] | None = None, tag: str | None = None
) -> tuple[str, str] | None:
    """The modality that is written down somewhere, and where: "dicom" or "sidecar"; see `load_volume`.

    Args:
        path: The image.
        info: What a datastore knows about it.
        tag: DICOM's modality, if the format has one.

    Returns:
        None if nobody says; `guess_modality` then looks at the intensities.

    Raises:
        ImageError: if it is another modality than CT or MR.
        RequestError: if what the datastore or sidecar says is no modality.
    """
    # A datastore that converted the series to NIfTI (DICOMweb) hands on the tag, or "UNK".
    found = _check_tag(tag or (info or {}).get("Modality"), path)
    if found is not None:
        return found, "dicom"
    stated, where = (info.get("modality") if info else None), f"The modality that the datastore gives for '{path.name}'"
    if stated is None:
        sidecar = read_sidecar(path)
        stated, where = sidecar.get("modality"), f"The modality in '{_find_sidecar(path).name}'"
        # Converters (dcm2niix) write down DICOM's own tag.
        found = _check_tag(sidecar.get("Modality"), path) if stated is None else None
    found = found or check_modality(stated, where)
    return None if found is None else (found, "sidecar")


def _check_tag(tag: object, path: Path) -> str | None:
    """The modality that DICOM's tag names; None if it names none."""
    text = str(tag or "").strip().upper()
    if text in ("", *_UNSAID):
        return None
    row = find_modality(text)
    if row is None or row.name != text:
        names = list_modalities()
        raise ImageError(
            f"'{path.name}' is a {text[:16]} image, and only {' and '.join(names)} are known here; give "
            f"modality={' or '.join(names)} to try it anyway."
        )
    return row.name


def read_sidecar(path: Path) -> dict[str, Any]:
    """What the file `<name>.json` next to an image says; empty if there is none or it is no JSON object.

    Converters copy names of people and places as the scanner has them, in an encoding of their own: such characters are
    lost, and the rest is read.
    """
    sidecar = _find_sidecar(path)
    try:
        content = json.loads(decode_json_file(sidecar.read_bytes(), errors="replace")) if sidecar.is_file() else None
    except (OSError, ValueError) as err:
        logger.warning("Ignored %s, which is no readable JSON: %s", sidecar.name, err)
        return {}
    return content if isinstance(content, dict) else {}


def _find_sidecar(path: Path) -> Path:
    return path.with_name(strip_suffix(path) + ".json")
