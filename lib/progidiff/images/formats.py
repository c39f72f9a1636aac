"""The file formats: one row per suffix, which says what reads it, what writes it, and what it may be used for.

Everything that asks for a suffix asks here, without regard to case: the readers, the datastore, uploads, answers,
labels, the command line and, through the server, the pages. A new format is one more row.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from progidiff.images import dicom, itk, nifti, pictures, text_headers
from progidiff.images.geometry import Grid
from progidiff.images.raw import Place, Raw

Kind = Literal["volume", "picture"]


class Use(Flag):
    """What files of a format may be.

    Attributes:
        IMAGE: Served from a folder of studies.
        UPLOAD: Sent with a request for one inference, or read by a batch.
        SESSION: Sent for a session, also in an archive.
        LABEL: A label map that somebody made.
        ANSWER: A label map that is made here; the host lists these, so labels that come so are kept byte for byte.
        SEGMENTS: A label map that is made here on request and names what it draws.
    """

    NONE = 0
    IMAGE = auto()
    UPLOAD = auto()
    SESSION = auto()
    LABEL = auto()
    ANSWER = auto()
    SEGMENTS = auto()


@dataclass(frozen=True)
class Format:
    """One suffix.

    Attributes:
        suffix: Lower case, with its dot.
        name: What people call the format; several suffixes may share it.
        kind: "volume" or "picture".
        uses: What such files may be.
        read: Voxels and affine of a file; of a picture, a label map's.
        read_place: What the header alone says; None if only reading all tells.
        write: Writes an array (I, J, K) on its grid; None if this program does not.
    """

    suffix: str
    name: str
    kind: Kind
    uses: Use
    read: Callable[[Path], Raw]
    read_place: Callable[[Path], Place] | None = None
    write: Callable[[NDArray[Any], Grid, Path], None] | None = None


_READ = Use.UPLOAD | Use.SESSION
_ALL = _READ | Use.IMAGE | Use.LABEL | Use.ANSWER
_NIFTI = (nifti.read_nifti, nifti.read_nifti_place, nifti.write_nifti)
_TEXT = (text_headers.read_file, text_headers.read_file_place)
_PICTURE = (pictures.read_picture_map, pictures.read_picture_place)

FORMATS: tuple[Format, ...] = (
    Format(".nii.gz", "NIfTI", "volume", _ALL, *_NIFTI),
    Format(".nii", "NIfTI", "volume", _ALL, *_NIFTI),
    Format(".seg.nrrd", "NRRD", "volume", Use.LABEL | Use.SEGMENTS, *_TEXT),
    Format(".nrrd", "NRRD", "volume", _ALL, *_TEXT, itk.write_itk),
    Format(".mha", "MetaImage", "volume", _READ | Use.LABEL, *_TEXT, itk.write_itk),
    Format(".nhdr", "NRRD", "volume", Use.NONE, *_TEXT),
    Format(".mhd", "MetaImage", "volume", Use.NONE, *_TEXT),
    Format(".dcm", "DICOM", "volume", Use.SESSION, dicom.read_dicom_file),
    Format(".ima", "DICOM", "volume", Use.SESSION, dicom.read_dicom_file),
    Format(".dicom", "DICOM", "volume", Use.SESSION, dicom.read_dicom_file),
    Format(".png", "PNG", "picture", _ALL, *_PICTURE, pictures.write_picture_map),
    Format(".jpg", "JPEG", "picture", _READ | Use.IMAGE, *_PICTURE),
    Format(".jpeg", "JPEG", "picture", _READ | Use.IMAGE, *_PICTURE),
    Format(".tif", "TIFF", "picture", _READ | Use.IMAGE | Use.LABEL, *_PICTURE),
    Format(".tiff", "TIFF", "picture", _READ | Use.IMAGE | Use.LABEL, *_PICTURE),
)


def list_suffixes(use: Use, kind: Kind | None = None) -> tuple[str, ...]:
    """The suffixes of files that may be used so, the usual one first.

    Example:
        >>> list_suffixes(Use.ANSWER, "volume"), list_suffixes(Use.ANSWER, "picture")
        (('.nii.gz', '.nii', '.nrrd'), ('.png',))
    """
    return tuple(row.suffix for row in FORMATS if use in row.uses and kind in (None, row.kind))


def list_written(kind: Kind) -> tuple[str, ...]:
    """The suffixes that arrays can be written with.

    Example:
        >>> list_written("volume")
        ('.nii.gz', '.nii', '.nrrd', '.mha')
    """
    return tuple(row.suffix for row in FORMATS if row.write is not None and row.kind == kind)


def find_format(path: str | os.PathLike[str], use: Use = Use.NONE) -> Format | None:
    """The row of a file by its name, the longest suffix that fits; None if there is none, or none for this use.

    Example:
        >>> find_format("CT.NII.GZ").suffix, find_format("liver.seg.nrrd").suffix, find_format("notes.txt")
        ('.nii.gz', '.seg.nrrd', None)
        >>> find_format("photo.JPG", Use.LABEL) is None
        True
    """
    name = Path(path).name.lower()
    found = [row for row in FORMATS if name.endswith(row.suffix) and use in row.uses]
    return max(found, key=lambda row: len(row.suffix), default=None)


def find_writer(path: str | os.PathLike[str]) -> Format | None:
    """The row of a file that is to be written; None if this program writes none so."""
    row = find_format(path)
    if row is not None and row.write is None:
        row = next((other for other in FORMATS if other.write and row.suffix.endswith(other.suffix)), None)
    return row


def strip_suffix(path: str | os.PathLike[str]) -> str:
    """File name without the suffix of its image format.

    Example:
        >>> strip_suffix("studies/case.01.nii.gz"), strip_suffix("studies/case.02.seg.nrrd")
        ('case.01', 'case.02.seg')
    """
    path = Path(path)
    row = find_format(path)
    if row is None or path.is_dir():
        return path.name
    suffix = row.suffix.removeprefix(".seg")
    return path.name[: -len(suffix)]


def list_spellings(patterns: Iterable[str]) -> tuple[str, ...]:
    """All suffixes of the formats that patterns like ``*.jpg`` name by one of them.

    Example:
        >>> list_spellings(["*.jpg", "*.nii.gz"])
        ('.nii.gz', '.jpg', '.jpeg')
    """
    named = {pattern.removeprefix("*").lower() for pattern in patterns}
    names = {row.name for row in FORMATS if row.suffix in named and row.kind == "picture"}
    return tuple(row.suffix for row in FORMATS if row.suffix in named or row.name in names)


def find_kind(path: str | os.PathLike[str], use: Use = Use.NONE) -> Kind | None:
    """Whether a file is a volume or a picture by its name; None if it is neither, or not for this use.

    Example:
        >>> find_kind("a.mha", Use.UPLOAD), find_kind("a.mha", Use.IMAGE)
        ('volume', None)
    """
    row = find_format(path, use)
    return None if row is None else row.kind


def is_picture(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a picture by its name.

    Example:
        >>> is_picture("tissue_01.PNG"), is_picture("ct.nii.gz")
        (True, False)
    """
    return find_kind(path) == "picture"
