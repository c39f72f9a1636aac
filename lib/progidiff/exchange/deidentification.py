"""DICOM series without what says whose they are: the Basic Application Confidentiality Profile of DICOM PS3.15 (Annex
E).

What the profile asks of each attribute comes from its table E.1-1 of edition 2026c, as `dicom-anonymizer` holds it;
here it is applied at every depth. Beyond the table, free text, names of people, dates and private attributes go
wherever they are, and UIDs that are not DICOM's own are replaced, the same one by the same one. The place of the slices
and their pixels stay.

Pixels are not looked at. Objects that say that something is written into them, and captures of screens, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pydicom
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence

from progidiff import __version__
from progidiff.errors import ImageError, NotFoundError, ProGiDiffError, RequestError, StoreError
from progidiff.exchange.dicom_folders import FoundSeries, find_series
from progidiff.exchange.pseudonyms import Pseudonyms, check_apart
from progidiff.storage.atomic import atomic_folder

_EDITION = "dicomfields_2026c"
_Action = Literal["remove", "empty", "dummy", "replace"]

_ACTIONS: Mapping[str, _Action] = {
    "X_TAGS": "remove",
    "X_D_TAGS": "remove",
    "X_Z_D_TAGS": "remove",
    "X_Z_U_STAR_TAGS": "remove",
    "X_Z_TAGS": "empty",
    "Z_TAGS": "empty",
    "Z_D_TAGS": "dummy",
    "D_TAGS": "dummy",
    "U_TAGS": "replace",
}
"""Where the table leaves a choice, the one that says least and keeps images readable."""

_TEXT = frozenset(["PN", "LT", "ST", "UT", "UC", "UR", "DA", "DT", "TM", "AS"])
"""Kinds of values that go although the table does not name their attribute."""
_BYTES = frozenset(["OB", "OW", "OF", "OD", "OL", "OV", "UN"])
_PIXEL_GROUPS = (0x0028, 0x7FE0)
"""Groups whose bytes are pixels, or say how pixels are shown."""

_DUMMIES: Mapping[str, str] = {"DA": "19000101", "DT": "19000101000000", "TM": "000000", "AS": "000Y"}
_DICOM_ROOT = "1.2.840.10008."
_PATIENT = (0x0010, 0x0010), (0x0010, 0x0020)
_CAPTURES = "1.2.840.10008.5.1.4.1.1.7"


@dataclass(frozen=True)
class SeriesOutcome:
    """What became of a series: "written" or "left out".

    Attributes:
        series: UID that it had, and what else is known.
        name: Of its new folder; "" if it was left out.
        note: Why, a sentence.
    """

    series: FoundSeries
    name: str
    note: str = ""


def deidentify_folder(folder: Path, out: Path, pseudonyms: Pseudonyms) -> tuple[list[SeriesOutcome], tuple[str, ...]]:
    """Write every series of images of a folder without what says whose it is.

    Args:
        folder: With DICOM files in it.
        out: New, or empty; it appears complete or not at all, one folder per series.
        pseudonyms: The key; saved before anything appears.

    Returns:
        What became of each series, and what was passed over, sentences.

    Raises:
        NotFoundError: if there are no images.
        RequestError: if `out` will not do, or the key would lie in it.
        StoreError: if the disk refuses.
    """
    check_apart(pseudonyms.path, out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"'{out}' is not empty. Name a new folder, so that nothing else goes out with it.")
    found = find_series(folder)
    if not found.series:
        raise NotFoundError(f"'{folder}' holds no DICOM images. Name a folder with DICOM files in it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as scratch:
            outcomes = [_write_series(series, scratch, pseudonyms) for series in found.series]
            if not any(outcome.name for outcome in outcomes):
                raise RequestError(f"No series of '{folder}' can go out. {outcomes[0].note}")
            pseudonyms.save()
    except OSError as err:
        raise StoreError(f"'{out}' could not be written ({err}). Free some disk space or name another folder.") from err
    return outcomes, found.notes


def _write_series(series: FoundSeries, out: Path, pseudonyms: Pseudonyms) -> SeriesOutcome:
    name = pseudonyms.of_image(series.image_id)
    try:
        datasets = [deidentify(_read(file), pseudonyms) for file in series.files]
    except ProGiDiffError as err:
        return SeriesOutcome(series, "", str(err))
    (out / name).mkdir()
    for index, dataset in enumerate(sorted(datasets, key=_find_place), start=1):
        dataset.save_as(out / name / f"{index:05d}.dcm", enforce_file_format=True)
    return SeriesOutcome(series, name)


def _find_place(dataset: Dataset) -> int:
    """Of an object in its series; 0 where its number is none."""
    number = str(dataset.get("InstanceNumber") or "").strip()
    return int(number) if number.isdecimal() and number.isascii() and len(number) <= 12 else 0


def _read(file: Path) -> Dataset:
    try:
        dataset = pydicom.dcmread(file)
        dataset.decode()
    except Exception as err:  # Whatever the parser raises on bytes that somebody sent, the file is at fault.
        raise ImageError(f"'{file.name}' cannot be read ({str(err)[:120]}). Export it again.") from err
    return dataset


def deidentify(dataset: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """One object without what says whose it is.

    Args:
        dataset: As read; not changed.
        pseudonyms: The key; it grows.

    Raises:
        ImageError: if its pixels may show a name, there are none, or it is no whole DICOM object.
    """
    name = str(dataset.get("SOPInstanceUID", ""))
    if "PixelData" not in dataset:
        raise ImageError(f"Object {name} has no pixels, and only images are written here. Leave it out.")
    if str(dataset.get("BurnedInAnnotation", "")).strip().upper() == "YES" or str(
        dataset.get("SOPClassUID", "")
    ).startswith(_CAPTURES):
        raise ImageError(
            f"Object {name} has text in its pixels, or is a capture of a screen: whose it is may be read there. "
            "Export the "
            "original images."
        )
    needed = {"SOPClassUID", "SOPInstanceUID"} - set(dataset.dir())
    if needed or "TransferSyntaxUID" not in dataset.file_meta:
        raise ImageError(f"Object {name} does not say what it is ({', '.join(sorted(needed)) or 'TransferSyntaxUID'}).")
    patient = str(dataset.get("PatientID", "") or dataset.get("PatientName", "") or dataset.get("StudyInstanceUID", ""))
    clean = _clean(dataset, pseudonyms)
    clean.PatientID = clean.PatientName = pseudonyms.of_patient(patient)
    clean.PatientIdentityRemoved = "YES"
    clean.DeidentificationMethod = f"ProGiDiff Label {__version__}: DICOM PS3.15 Basic Profile"
    clean.LongitudinalTemporalInformationModified = "REMOVED"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "113100", "DCM"
    code.CodeMeaning = "Basic Application Confidentiality Profile"
    clean.DeidentificationMethodCodeSequence = Sequence([code])
    meta = FileMetaDataset()  # Made anew: the old one names the machine that sent the object.
    meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = clean.SOPClassUID, clean.SOPInstanceUID
    clean.file_meta = meta
    return clean


def _clean(dataset: Dataset, pseudonyms: Pseudonyms) -> Dataset:
    """A data set, or an item of a sequence at any depth."""
    clean = Dataset()
    for element in dataset:
        kept = _clean_element(element, pseudonyms)
        if kept is not None:
            clean.add(kept)
    return clean


def _clean_element(element: DataElement, pseudonyms: Pseudonyms) -> DataElement | None:
    """What is left of an attribute; None if nothing is."""
    tag, kind = element.tag, element.VR
    action = _find_action(tag.group, tag.element)
    if tag in _PATIENT:
        return None  # At the top it is written anew; below it says of somebody else, or the same once more.
    if tag.is_private or action == "remove":
        return None
    if action == "empty":
        return DataElement(tag, kind, Sequence() if kind == "SQ" else None)
    if action == "dummy":
        return _make_dummy(element, pseudonyms)
    if kind == "SQ":
        return DataElement(tag, kind, Sequence([_clean(item, pseudonyms) for item in element.value or []]))
    if kind == "UI":
        return _replace_uids(element, pseudonyms)
    if kind in _TEXT or (kind in _BYTES and tag.group not in _PIXEL_GROUPS):
        return None
    return DataElement(tag, kind, element.value, is_undefined_length=element.is_undefined_length)


def _make_dummy(element: DataElement, pseudonyms: Pseudonyms) -> DataElement | None:
    """A value of the same kind that says nothing."""
    kind = element.VR
    if kind == "UI":
        return _replace_uids(element, pseudonyms)
    if kind == "SQ" or kind in _BYTES:
        return None
    if kind in _DUMMIES:
        return DataElement(element.tag, kind, _DUMMIES[kind])
    if kind in ("US", "SS", "UL", "SL", "UV", "SV", "FL", "FD", "IS", "DS"):
        return DataElement(element.tag, kind, 0)
    return DataElement(element.tag, kind, "REMOVED")


def _replace_uids(element: DataElement, pseudonyms: Pseudonyms) -> DataElement:
    values = element.value if isinstance(element.value, (list, pydicom.multival.MultiValue)) else [element.value]
    found = [
        str(value) if not value or str(value).startswith(_DICOM_ROOT) else pseudonyms.of_uid(str(value))
        for value in values
    ]
    return DataElement(element.tag, "UI", found if len(found) != 1 else found[0])


@cache
def _find_action(group: int, element: int) -> _Action | None:
    """What the table asks of an attribute; None if it does not name it."""
    exact, masked = _load_table()
    action = exact.get((group, element))
    if action is not None:
        return action
    for (wanted_group, wanted_element, group_mask, element_mask), rule in masked.items():
        if group & group_mask == wanted_group & group_mask and element & element_mask == wanted_element & element_mask:
            return rule
    return None


@cache
def _load_table() -> tuple[dict[tuple[int, ...], _Action], dict[tuple[int, ...], _Action]]:
    """The table: attributes, and groups that repeat (overlays, curves) with their masks."""
    from dicomanonymizer.dicomfields_selector import dicom_anonymization_database_selector

    rows = dicom_anonymization_database_selector(_EDITION)
    found: dict[tuple[int, ...], _Action] = {
        tuple(tag): action for name, action in _ACTIONS.items() for tag in rows[name] if tuple(tag) not in _PATIENT
    }
    exact: dict[tuple[int, ...], _Action] = {tag: action for tag, action in found.items() if len(tag) == 2}
    return exact, {tag: action for tag, action in found.items() if len(tag) == 4}
