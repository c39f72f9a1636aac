"""Unpacking an uploaded archive without trusting it: no path leaves the folder, no links, bounded number and size.

The sizes that an archive states are not believed either: bytes are counted while they are written, so a bomb stops at
the limit.
"""

from __future__ import annotations

import errno
import shutil
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from progidiff.errors import ProGiDiffError, RequestError, StoreError, TooLargeError
from progidiff.images.decoding import apart

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_CHUNK = 1 << 20
_MAX_NAME = 255
_MEMORY = 256 << 20
"""Bytes for unpacking: of xz most. Headers are read whole, and may say of themselves that they are endless."""


@dataclass(frozen=True)
class Limits:
    """What one archive may hold.

    Attributes:
        members: Files and folders.
        size: Bytes of all files, unpacked.
    """

    members: int = 20_000
    size: int = 8 << 30


def extract_archive(archive: Path, folder: Path, limits: Limits | None = None) -> int:
    """Unpack a zip or tar file into an empty folder; on an error the folder is empty again.

    Args:
        archive: The file; what it is, is found from its content.
        folder: Exists and is empty.
        limits: Of members and bytes.

    Returns:
        The number of files written, at least 1.

    Raises:
        RequestError: if it is no archive, damaged, encrypted, empty, or names a member that is a link, a device, or
            outside of the folder.
        TooLargeError: if it holds more than the limits.
        StoreError: if the disk is full.
    """
    limits = limits or Limits()
    unpack = apart(_unpack, reads=[archive], writes=[folder], decoded=limits.size, memory=_MEMORY, name="The archive")
    try:
        return unpack(archive, folder, limits)
    except BaseException:
        for entry in folder.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        raise


def _unpack(archive: Path, folder: Path, limits: Limits) -> int:
    try:
        written = _extract(archive, folder, limits)
        if not written:
            raise RequestError("The archive holds no file. Pack the image, or the DICOM files of one series, into it.")
        return written
    except ProGiDiffError:
        raise
    except Exception as err:  # Whatever a reader raises on bytes that somebody sent, the file is at fault.
        if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                "The archive cannot be unpacked, the disk is full. Free some space, or set TMPDIR to another disk."
            ) from err
        reason = err.strerror if isinstance(err, OSError) else str(err)[:200]
        raise RequestError(
            f"The archive cannot be unpacked ({type(err).__name__}: {reason}). Pack it again, without a password."
        ) from err


def _extract(archive: Path, folder: Path, limits: Limits) -> int:
    files, left = 0, limits.size
    for count, (name, source) in enumerate(_list_members(archive), start=1):
        if count > limits.members:
            raise TooLargeError(f"The archive has more than {limits.members} members. Send one series per archive.")
        if source is None and not PurePosixPath(name).parts:
            continue  # "./", as `tar` writes for the folder itself.
        target = folder.joinpath(*_check_name(name))
        if source is None:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with source as stream, target.open("xb") as file:
            while chunk := stream.read(_CHUNK):
                left -= len(chunk)
                if left < 0:
                    raise TooLargeError(
                        f"The archive unpacks to more than {limits.size / 1e9:g} GB. Send "
                        "one series per archive, or crop the image."
                    )
                file.write(chunk)
        files += 1
    return files


def _check_name(name: str) -> tuple[str, ...]:
    """The parts of a member's path, if it stays inside."""
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if (
        not parts
        or name.startswith(("/", "\\"))
        or any(part in ("..", ".") or ":" in part or "\0" in part for part in parts)
    ):
        raise RequestError(
            f"The archive has a member '{name[:80]}', which lies outside of it. Pack the folder with relative names."
        )
    if any(len(part.encode()) > _MAX_NAME for part in parts) or len(parts) > 32:
        raise RequestError(
            f"The archive has a member with a name that is too long, '{name[:80]}...'. Pack the files directly."
        )
    return parts


def _list_members(archive: Path) -> Iterator[tuple[str, IO[bytes] | None]]:
    """Name and content of every member; None for a folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if (entry.external_attr >> 16) & 0o170000 == 0o120000:
                    raise RequestError(f"The archive has a link, '{entry.filename[:80]}'. Pack the file itself.")
                yield entry.filename, None if entry.is_dir() else opened.open(entry)
        return
    with _open_tar(archive) as tar:
        for member in tar:
            if not (member.isfile() or member.isdir()):
                raise RequestError(
                    f"The archive has a link or a device, '{member.name[:80]}'. Pack the files themselves."
                )
            yield member.name, None if member.isdir() else tar.extractfile(member)


@contextmanager
def _open_tar(archive: Path) -> Iterator[tarfile.TarFile]:
    try:
        tar = tarfile.open(archive)  # noqa: SIM115  closed below
    except tarfile.ReadError as err:
        raise RequestError(
            f"What was sent is no archive that is read here. Send {', '.join(SUFFIXES)}, "
            "or the files without uncompress."
        ) from err
    with tar:
        yield tar
