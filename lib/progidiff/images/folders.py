"""What of a folder of studies is not served, and why: nobody should look for an image in vain."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from progidiff.images.dicom import is_dicom
from progidiff.images.formats import Use, find_format, find_kind, list_suffixes, strip_suffix
from progidiff.storage.json_text import show_text

logger = logging.getLogger(__name__)

MAX_LOOKED_AT = 2000
"""Entries of subfolders that are looked at; a folder of studies may lie above anything."""

_NAMED = 3


@dataclass(frozen=True)
class LeftOut:
    """One file, or one subfolder with its files.

    Attributes:
        name: Relative to the folder of studies.
        reason: Why it is not served and what to do, a sentence.
    """

    name: str
    reason: str


def list_volumes(folder: Path) -> dict[str, Path]:
    """The volumes of a folder, by name without suffix. Of two files of one name the first counts, as on the server, and
    the log has the other.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or find_kind(path, Use.UPLOAD) != "volume":
            continue
        first = found.setdefault(strip_suffix(path), path)
        if first != path:
            logger.warning("Left out: '%s'. '%s' has the same name. Rename one of them.", path.name, first.name)
    return dict(sorted(found.items()))


def list_left_out(
    folder: Path, served: Collection[str], passed_over: Collection[str] = (), faults: Mapping[str, str] | None = None
) -> tuple[LeftOut, ...]:
    """The images of a folder that are not served.

    Args:
        folder: Of studies.
        served: Names of the files in it that are.
        passed_over: Names of files and subfolders that are no images of it (labels, for example).
        faults: Name -> why it is not looked at at all, a sentence.

    Returns:
        By name. What is no image (tables, notes, hidden files) is not named.
    """
    served_by = {strip_suffix(name): name for name in served}
    faults = faults or {}
    found: list[LeftOut] = []
    folders: list[Path] = []
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith(".") or entry.name in served or entry.name in passed_over:
                continue
            if entry.name in faults:
                is_image = find_format(entry.name) is not None or entry.is_dir()
                found += [LeftOut(show_text(entry.name), faults[entry.name])] if is_image else []
            elif entry.is_dir():
                folders.append(Path(entry.path))
            elif entry.is_file():
                reason = _explain_file(Path(entry.path), served_by)
                found += [LeftOut(entry.name, reason)] if reason else []
    left = MAX_LOOKED_AT
    for subfolder in folders:
        files = list(islice(_walk(subfolder), left))
        left -= len(files)
        reason = _explain_folder(files)
        found += [LeftOut(f"{subfolder.name}{os.sep}", reason)] if reason else []
    return tuple(sorted(found, key=lambda entry: entry.name))


def _explain_file(file: Path, served_by: dict[str, str]) -> str:
    """ "" if it is no image."""
    row = find_format(file)
    if row is None:
        return _DICOM if _says_dicom(file) else ""
    other = served_by.get(strip_suffix(file))
    if other is not None:
        return f"'{other}' has the same name and is served. Rename one of them."
    if Use.SESSION in row.uses and Use.UPLOAD not in row.uses:
        return _DICOM
    if Use.IMAGE not in row.uses:
        return (
            f"Files of this format ({row.suffix}) are not served from a folder. Convert it to one of "
            f"{', '.join(list_suffixes(Use.IMAGE, row.kind))}."
        )
    return "This server was started for other formats (MONAI_LABEL_DATASTORE_FILE_EXT). Add this one, or convert it."


_DICOM = (
    "DICOM files are not served as they are. `progidiff import FOLDER --studies STUDIES` converts every series of a "
    "folder "
    "once; or send it as an archive with PUT /session/, or serve it from a DICOMweb server."
)


def _explain_folder(files: list[Path]) -> str:
    """ "" if it holds no images."""
    images = sorted(file.name for file in files if find_format(file, Use.UPLOAD) is not None)
    if images:
        names = ", ".join(images[:_NAMED]) + (", ..." if len(images) > _NAMED else "")
        return f"Images in subfolders are not served ({names}). Move them into the folder of studies itself."
    is_series = any(find_format(file, Use.SESSION) is not None for file in files)
    return _DICOM if is_series or any(_says_dicom(file) for file in files[:_NAMED]) else ""


def _walk(folder: Path) -> Iterator[Path]:
    for path, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(path) / name for name in sorted(names) if not name.startswith("."))


def _says_dicom(file: Path) -> bool:
    try:
        return not file.suffix and is_dicom(file)
    except OSError:
        return False
