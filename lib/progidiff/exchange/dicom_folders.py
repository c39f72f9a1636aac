"""DICOM files as they lie in folders, found series by series and converted once into images of a folder of studies.

Files are known by what is in them: names and endings say nothing, a series may lie in several folders, and folders hold
notes, indexes and objects that are no images. A converted series is a NIfTI file on the grid of its slices, with a
sidecar that says which series it was. Its name has nothing of the patient in it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from progidiff.errors import ConflictError, ImageError, NotFoundError, ProGiDiffError, StoreError
from progidiff.exchange.importing import CaseOutcome, write_sidecar
from progidiff.images.choosing import is_companion
from progidiff.images.dicom import is_dicom
from progidiff.images.geometry import times
from progidiff.images.reading import load_series, load_volume, read_grid
from progidiff.images.writing import save_mask
from progidiff.storage.atomic import scratch_folder

logger = logging.getLogger(__name__)

_TAGS = [
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "Modality",
    "SeriesDescription",
    "StudyDate",
    "Rows",
    "SOPInstanceUID",
]
_DATE = re.compile(r"\d{8}")


@dataclass(frozen=True)
class FoundSeries:
    """The files of one series.

    Attributes:
        uid: SeriesInstanceUID.
        study_uid: StudyInstanceUID.
        modality, description, date: As DICOM says; "" if it does not.
        files: Their paths, each object once.
    """

    uid: str
    study_uid: str
    modality: str
    description: str
    date: str
    files: tuple[Path, ...]

    @property
    def image_id(self) -> str:
        """What the image is called: for people, and the same for the same series.

        Example:
            >>> FoundSeries("1.2.3", "1.2", "CT", "Abdomen 5.0 B30f", "", ()).image_id
            'CT_Abdomen_5.0_B30f_c47f5b18'
        """
        words = [re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("._") for text in (self.modality, self.description[:40])]
        return "_".join([*filter(None, words), hashlib.sha256(self.uid.encode()).hexdigest()[:8]])


@dataclass(frozen=True)
class FoundFiles:
    """What a folder holds.

    Attributes:
        series: Of images, by UID.
        notes: What was passed over, sentences.
    """

    series: tuple[FoundSeries, ...]
    notes: tuple[str, ...]


def find_series(folder: Path) -> FoundFiles:
    """The DICOM series in a folder and its subfolders.

    Raises:
        NotFoundError: if there is no such folder.
    """
    if not folder.is_dir():
        raise NotFoundError(f"There is no folder '{folder}'. Check the path.")
    found: dict[str, list[tuple[Path, pydicom.Dataset]]] = {}
    objects: set[str] = set()
    others: Counter[str] = Counter()
    for path in walk_files(folder):
        header = _read_header(path)
        if header is None:
            others["files that are not DICOM"] += 1
            continue
        if "Rows" not in header or not header.get("SeriesInstanceUID"):
            others[f"DICOM objects without an image ({header.get('Modality', '') or 'no modality'})"] += 1
        elif header.get("Modality") == "SEG":
            others["segmentations (SEG), which a DICOMweb server brings in with their images"] += 1
        elif str(header.get("SOPInstanceUID", path)) in objects:
            others["copies of the same object"] += 1
        else:
            objects.add(str(header.get("SOPInstanceUID", path)))
            found.setdefault(str(header.SeriesInstanceUID), []).append((path, header))
    series = tuple(_describe(uid, entries) for uid, entries in sorted(found.items()))
    return FoundFiles(series, tuple(f"Passed over: {count} {what}." for what, count in sorted(others.items())))


def import_series(found: FoundSeries, studies: Path) -> CaseOutcome:
    """Convert one series into an image of a folder of studies; the image appears by rename.

    Args:
        found: Of `find_series`.
        studies: The folder.

    Returns:
        What became of it; one that cannot be read is "failed" with the reason.

    Raises:
        StoreError: if the disk refuses.
    """
    image_id = found.image_id
    try:
        volume = load_series(found.files, image_id)
        target = studies / f"{image_id}.nii.gz"
        if target.exists():
            present = load_volume(target)
            if present.array.shape == volume.array.shape and np.array_equal(present.array, volume.array):
                return CaseOutcome(image_id, "there")
            raise ConflictError(
                f"'{target.name}' was made of the same series with {times(present.array.shape)} voxels, and now it has "
                f"{times(volume.array.shape)}. Take the old image out first, with its label, if the series is "
                "complete now."
            )
        with scratch_folder("series") as scratch:
            # The reader's own eyes: what is written lies where the slices did, or it is not written.
            written = read_grid(save_mask(volume.array, volume.grid, scratch / target.name))
            volume.grid.check_same(written)
        values = {"modality": volume.modality, "description": found.description, "study_date": found.date}
        values |= {"series_uid": found.uid, "study_uid": found.study_uid, "slices": str(len(found.files))}
        studies.mkdir(parents=True, exist_ok=True)
        write_sidecar(target, {name: value for name, value in values.items() if value})
        save_mask(volume.array, volume.grid, target)
    except StoreError:
        raise
    except OSError as err:
        raise StoreError(f"'{studies}' could not be written ({err}). Free some disk space.") from err
    except ProGiDiffError as err:
        what = ", ".join(filter(None, (found.modality, found.description, f"{len(found.files)} files")))
        return CaseOutcome(image_id, "failed", (f"Series {found.uid} ({what}): {err}",))
    return CaseOutcome(image_id, "imported", written.warnings)


def _describe(uid: str, entries: list[tuple[Path, pydicom.Dataset]]) -> FoundSeries:
    first = entries[0][1]
    date = str(first.get("StudyDate", "") or "")
    return FoundSeries(
        uid,
        str(first.get("StudyInstanceUID", "") or ""),
        str(first.get("Modality", "") or ""),
        " ".join(str(first.get("SeriesDescription", "") or "").split()),
        date if _DATE.fullmatch(date) else "",
        tuple(path for path, _ in entries),
    )


def _read_header(path: Path) -> pydicom.Dataset | None:
    """What a file says of itself; None if it is no DICOM."""
    try:
        if not is_dicom(path):
            return None
        return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
    except (OSError, InvalidDicomError, ImageError):
        return None
    except Exception as err:  # Whatever the parser raises on bytes that somebody sent, the file is at fault.
        logger.warning("'%s' says that it is DICOM and cannot be read: %s", path.name, err)
        return None


def walk_files(folder: Path) -> Iterator[Path]:
    """The files in a folder and its subfolders that may be images, by their names."""
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place) / name
            if not is_companion(path.relative_to(folder)) and path.is_file():
                yield path
