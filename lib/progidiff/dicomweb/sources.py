"""The DICOM images that a segmentation is drawn on: their headers, without pixels, in the order of their slices."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from progidiff.dicomweb import headers
from progidiff.dicomweb.frames import Series
from progidiff.errors import ImageError
from progidiff.images.decoding import apart
from progidiff.storage.atomic import check_regular

logger = logging.getLogger(__name__)

_EMPTY = (
    "PatientID",
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "AccessionNumber",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "ReferringPhysicianName",
)
"""What a segmentation repeats of its image and may leave empty."""

_SAME = (
    *_EMPTY,
    "PatientAge",
    "PatientSize",
    "PatientWeight",
    "PatientIdentityRemoved",
    "DeidentificationMethod",
    "StudyDescription",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "FrameOfReferenceUID",
    "PositionReferenceIndicator",
    "Modality",
    "Manufacturer",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "Rows",
    "Columns",
)
"""What the slices of a series have in common, as far as a segmentation of it needs it."""

_NEEDED = (
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SOPClassUID",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
)


@dataclass(frozen=True)
class _Headers:
    """What is read of a folder.

    Attributes:
        common: DICOM JSON of what all slices say.
        instances: SOPInstanceUID of each slice.
        positions: ImagePositionPatient of each slice, mm.
    """

    common: str
    instances: list[str]
    positions: list[list[float]]


def list_sources(series: Series) -> list[Dataset]:
    """The slices of a series that is served from here, ascending along their normal."""
    sources = []
    for index in range(series.grid.shape[0]):
        source = Dataset()
        source.update(series.common)
        source.update(headers.build_own(series.identity, series.grid, index))
        sources.append(source)
    return sources


def read_sources(folder: Path) -> list[Dataset]:
    """The slices of the one series in a folder, ascending along their normal.

    Values that break the rules of their type, and would make the segmentation a file that others refuse, are left out.

    Raises:
        ImageError: if a file is no DICOM image, or does not say where it lies, or they are not of one series.
    """
    read = apart(_read_headers, reads=[folder])(folder)
    common = Dataset.from_json(read.common)
    orientation = np.asarray(common.ImageOrientationPatient, dtype=np.float64)
    places = np.asarray(read.positions, dtype=np.float64)
    heights = places @ np.cross(orientation[:3], orientation[3:])
    order = np.argsort(heights, kind="stable")
    if len(order) > 1:  # Programs that find a few frames only cannot tell it from those.
        common.SpacingBetweenSlices = f"{abs(heights[order[-1]] - heights[order[0]]) / (len(order) - 1):.8g}"
    if not common.get("SliceThickness"):
        common.SliceThickness = common.get("SpacingBetweenSlices", "1")
    sources = []
    for index in map(int, order):
        source = Dataset()
        source.update(common)
        source.SOPInstanceUID = read.instances[index]
        source.ImagePositionPatient = [f"{value:.10g}" for value in read.positions[index]]
        sources.append(source)
    return sources


def _read_headers(folder: Path) -> _Headers:
    check_regular(folder)
    files = sorted(file for file in folder.iterdir() if file.is_file())
    if not files:
        raise ImageError(f"The folder '{folder.name}' holds no DICOM files.")
    common: Dataset | None = None
    instances, positions = [], []
    for file in files:
        try:
            read = pydicom.dcmread(file, stop_before_pixels=True)
            instance, position = str(read.SOPInstanceUID), [float(value) for value in read.ImagePositionPatient]
            own = _pick(read)
        except Exception as err:  # Whatever a reader raises on bytes from elsewhere, the file is at fault.
            raise ImageError(
                f"'{file.name}' of the series cannot be segmented ({' '.join(str(err).split())[:200]}). Export the "
                "series again."
            ) from err
        if common is None:
            common = own
        _check_alike(common, own, file)
        instances.append(instance)
        positions.append(position)
    return _Headers(json.dumps(common.to_json_dict()) if common is not None else "{}", instances, positions)


def _pick(read: Dataset) -> Dataset:
    """What of a header a segmentation repeats, valid values only."""
    found = Dataset()
    for keyword in _SAME:
        if keyword in read:
            element = read[keyword]
            try:
                valid = DataElement(element.tag, element.VR, element.value, validation_mode=pydicom.config.RAISE)
            except ValueError:
                logger.info("%s of the series is not valid and is left out of the segmentation.", keyword)
                continue
            found.add(valid)
    for keyword in _EMPTY:
        if keyword not in found:
            setattr(found, keyword, "")
    if not found.get("FrameOfReferenceUID"):  # Secondary captures and converted images often have none.
        found.FrameOfReferenceUID = headers.make_uid("frame of reference", str(found.get("SeriesInstanceUID", "")))
    missing = [keyword for keyword in _NEEDED if not found.get(keyword)]
    if missing:
        raise ImageError(f"it does not say {', '.join(missing)}")
    return found


def _check_alike(common: Dataset, own: Dataset, file: Path) -> None:
    alike: Sequence[str] = ("StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
    wrong = [keyword for keyword in alike if common.get(keyword) != own.get(keyword)]
    if wrong:
        raise ImageError(
            f"'{file.name}' differs from the other files of the series in {', '.join(wrong)}; a segmentation is drawn "
            "on one series of slices of one size."
        )
