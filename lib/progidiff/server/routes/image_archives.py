"""An image that comes packed: a DICOM series, or one volume, in a zip or tar file, as a file that a folder serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import UploadFile

from progidiff.errors import RequestError, StoreError
from progidiff.images.archives import SUFFIXES, Limits, extract_archive
from progidiff.images.choosing import keep_one_image
from progidiff.images.formats import Use, find_format, list_suffixes
from progidiff.images.reading import load_volume
from progidiff.images.writing import save_array
from progidiff.storage.atomic import scratch_folder

_GB = 1_000_000_000


@dataclass(frozen=True)
class PackedImage:
    """What an archive held.

    Attributes:
        path: A file of a format that is served from a folder.
        name: Of the archive, without its suffix.
        modality: Of a DICOM series; "" for a file, which says it itself or not.
    """

    path: Path
    name: str
    modality: str


def is_archive(name: str) -> bool:
    """Whether a file is an archive by its name.

    Example:
        >>> is_archive("scan.ZIP"), is_archive("scan.nii.gz")
        (True, False)
    """
    return name.lower().endswith(SUFFIXES)


@contextmanager
def unpacked_image(upload: UploadFile, max_gb: float) -> Iterator[PackedImage]:
    """The one image in an uploaded archive; it is gone afterwards.

    Args:
        upload: The archive.
        max_gb: Largest upload in GB; twice as much may come out of it.

    Raises:
        RequestError: if it holds no image, several, or one of a format that is not served.
        ImageError: if the series cannot be read.
        TooLargeError: if it unpacks to too much.
        StoreError: if the disk is full.
    """
    sent = Path(upload.filename or "archive.zip").name
    suffix = next(suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if sent.lower().endswith(suffix))
    with scratch_folder("upload") as folder:
        archive, received = folder / "archive", folder / "image"
        received.mkdir()
        try:
            with archive.open("wb") as target:
                shutil.copyfileobj(upload.file, target, 1 << 20)
        except OSError as err:
            raise StoreError(
                f"The upload could not be written ({err}). Free some disk space and send it again."
            ) from err
        extract_archive(archive, received, Limits(size=int(max_gb * _GB) * 2))
        keep_one_image(received, "")
        yield _pick_image(received, folder, sent[: -len(suffix)])


def _pick_image(received: Path, folder: Path, name: str) -> PackedImage:
    inner = received
    while inner.is_dir() and len(entries := list(inner.iterdir())) == 1:
        inner = entries[0]
    row = find_format(inner.name, Use.IMAGE) if inner.is_file() else None
    if row is not None:
        return PackedImage(inner, name, "")
    if inner.is_file() and find_format(inner.name, Use.SESSION) is None:
        raise RequestError(
            f"The archive holds '{inner.name[-40:]}', which is no image. Pack the DICOM files of one series, or one of "
            f"{', '.join(list_suffixes(Use.IMAGE))}."
        )
    volume = load_volume(inner)
    return PackedImage(save_array(volume.array, volume.affine, folder / "series.nii.gz"), name, volume.modality)
