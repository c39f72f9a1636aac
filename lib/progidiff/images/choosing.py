"""Which image is meant among the files that came together, in an archive or one by one.

Archives of a DICOM study hold more than one series, and more than DICOM: an index (DICOMDIR), notes, a viewer, what
macOS and Windows leave behind. What is no image is passed over. If one image is left it is the one; if there are
several, they are listed, and the sender names one.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from progidiff.errors import RequestError
from progidiff.images.dicom import DicomSeries, list_series
from progidiff.images.formats import Use, find_format

_COMPANIONS = ("dicomdir", "thumbs.db", "desktop.ini")
_COMPANION_FOLDERS = ("__macosx",)
_NO_IMAGES = ("SEG", "SR", "PR", "KO", "DOC", "REG", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD")
"""DICOM's modalities of what was made from images."""

_LISTED = 12


@dataclass(frozen=True)
class _Candidate:
    """One image: by which name it is chosen, what people read, and its files."""

    name: str
    text: str
    files: tuple[Path, ...]


def is_companion(path: Path) -> bool:
    """Whether a file lies beside images and is none, by its name.

    Example:
        >>> [is_companion(Path(name)) for name in ("__MACOSX/a/._1.dcm", "study/.DS_Store", "DICOMDIR", "study/1.dcm")]
        [True, True, True, False]
    """
    folders = [part.lower() for part in path.parts[:-1]]
    name = path.name.lower()
    return name in _COMPANIONS or name.startswith(".") or any(folder in _COMPANION_FOLDERS for folder in folders)


def keep_one_image(folder: Path, wanted: str = "") -> None:
    """Remove all but one image from a folder of received files: a file, or the files of one DICOM series.

    Args:
        folder: With subfolders; what is left keeps its place, but a series that lies in several gets one of its own.
        wanted: Name of the image if there may be several: the path of a file in the folder, or the UID of a series.

    Raises:
        RequestError: if there is none, or several and `wanted` is none of them.
    """
    candidates = _list_candidates(folder)
    if not candidates:
        names = sorted(path.name for path in folder.rglob("*") if path.is_file())
        raise RequestError(
            f"No image is among the {len(names)} files that were sent ({', '.join(names[:4])[:120]}). Send NIfTI, NRRD "
            "or MetaImage, or the files of one DICOM series."
        )
    chosen = [one for one in candidates if one.name == wanted] if wanted else candidates
    if len(chosen) != 1:
        listed = "; ".join(one.text for one in candidates[:_LISTED]) + ("; ..." if len(candidates) > _LISTED else "")
        asked = f"None of them is called '{wanted[:80]}'." if wanted else "One is needed."
        raise RequestError(
            f"{len(candidates)} images were sent: {listed}. {asked} Send them again with series=<its name as listed>, "
            f"for example series={candidates[0].name}."
        )
    kept = set(chosen[0].files)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in kept:
            path.unlink()
    if len({path.parent for path in kept}) > 1:
        _flatten(folder, chosen[0].files)


def _list_candidates(folder: Path) -> list[_Candidate]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    rest = [path for path in files if not is_companion(path.relative_to(folder))]
    rows = {path: row for path in rest if (row := find_format(path, Use.UPLOAD)) is not None}
    named = {path: str(path.relative_to(folder).as_posix()) for path in rows}
    volumes = [_Candidate(named[path], named[path], (path,)) for path, row in rows.items() if row.kind == "volume"]
    found = [*_list_dicom(set(rest) - set(rows)), *volumes]
    # A picture beside a volume is a preview of it.
    return found or [_Candidate(named[path], named[path], (path,)) for path in rows]


def _list_dicom(files: set[Path]) -> list[_Candidate]:
    found: dict[str, DicomSeries] = {}
    for folder in sorted({path.parent for path in files}):
        for series in list_series(folder):
            if series.modality not in _NO_IMAGES:
                before = found[series.uid].files if series.uid in found else ()
                own = tuple(file for file in series.files if Path(file) in files)
                found[series.uid] = replace(series, files=(*before, *own))
    # A single slice is no volume: a scout, or a capture of the screen.
    whole = [series for series in found.values() if len(series.files) > 1] or list(found.values())
    return [_Candidate(series.uid, str(series), tuple(map(Path, series.files))) for series in whole]


def _flatten(folder: Path, files: tuple[Path, ...]) -> None:
    target = folder / ".series"
    target.mkdir()
    for number, path in enumerate(files):
        path.rename(target / f"{number:04d}-{path.name}")
    for path in folder.iterdir():
        if path != target:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    target.rename(folder / "series")
