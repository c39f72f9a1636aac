"""Copies of what people made and nobody can make again: labels, sentences, their history, versions, users, state.

A backup is one tar file whose last member, ``MANIFEST.json``, names every file with its SHA-256: one that was cut off
or damaged is told by it. Images are not in it, nor is what is computed again: kept proposals, scores, slices as DICOM,
checkpoints of trainings, and the index of the images.

A server may run meanwhile. Under the locks that a save holds the log is read and the label files are linked into a
folder of the backup's own, which takes no time: files are never changed in place, so the links hold what was there.
Versions cannot change, and what points to them is copied first.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import BaseModel, ConfigDict, ValidationError

import progidiff
from progidiff.errors import RequestError, StoreError
from progidiff.labels.history import AnnotationStore
from progidiff.storage.atomic import WRITING, atomic_file, flush, locked, make_scratch_name

FORMAT = 1
MANIFEST = "MANIFEST.json"
HISTORY = "annotations"

_CACHE = re.compile(r"[0-9a-f]{64}|scores|dicom|incoming|datastore\.sqlite.*|\.damaged-.*")
"""What of a store's folder is computed again, means nothing elsewhere, or is an image (`progidiff receive`)."""
_OF_STUDIES = ("labels", "labels.json", "text.csv", "datastore_v2.json")
_OF_TRAININGS = (("training", "work"), ("training", "lock"))
_CHUNK = 1 << 20


class Manifest(BaseModel):
    """The last member of a backup.

    Attributes:
        format: Of this description.
        version: Of the program that made the backup.
        made: Seconds since 1970.
        files: Name in the backup -> SHA-256.
    """

    model_config = ConfigDict(frozen=True)

    format: int
    version: str
    made: float
    files: dict[str, str]


@dataclass(frozen=True)
class Places:
    """Where a server keeps what is copied.

    Attributes:
        store: Its state, `--conf store`.
        studies: The folder of images; None behind a DICOMweb address.
        more: Name -> folder or file: versions (adapters, textdiff) and secrets (users file, tokens).
    """

    store: Path
    studies: Path | None
    more: Mapping[str, Path]


def create_backup(places: Places, file: Path) -> Manifest:
    """Write a backup; a server may be running.

    Args:
        places: What to copy.
        file: The tar file; new.

    Returns:
        What is in it.

    Raises:
        RequestError: if the file exists, or there is nothing to copy.
        BusyError: if a save holds the locks for too long.
        StoreError: if a disk refuses; there is no file then.
    """
    if file.exists():
        raise RequestError(f"'{file}' exists. Name a new file: a backup replaces none.")
    if not places.store.is_dir():
        raise RequestError(f"There is no '{places.store}'. Name what the server serves, or its --store.")
    files: dict[str, str] = {}
    try:
        with (
            _snapshot(places) as snapshot,
            atomic_file(file, mode=0o600) as scratch,
            tarfile.open(scratch, "w", format=tarfile.PAX_FORMAT) as tar,
        ):
            for root, prefix in (*((path, name) for name, path in places.more.items()), (snapshot, "")):
                for path in _list_files(root):
                    name = str(PurePosixPath(prefix, path.relative_to(root).as_posix()))
                    files[name] = _add(tar, path, name)
            manifest = Manifest(format=FORMAT, version=progidiff.__version__, made=time.time(), files=files)
            content = manifest.model_dump_json(indent=1).encode()
            entry = tarfile.TarInfo(MANIFEST)
            entry.size, entry.mode = len(content), 0o600
            tar.addfile(entry, io.BytesIO(content))
    except OSError as err:
        raise StoreError(
            f"The backup could not be written ({err}). Free some disk space or name another file."
        ) from err
    return manifest


def restore_backup(file: Path, target: Path) -> Manifest:
    """Unpack a backup into a new folder, in which `store`, `labels`, `adapters`, ... lie beside each other.

    The folder appears under its name when all is unpacked and checked; a restore that is interrupted leaves nothing
    there.

    Raises:
        RequestError: if the folder holds anything, or the file is damaged or no backup.
        StoreError: if the disk refuses.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RequestError(f"'{target}' is not empty. Name a new folder, and move its content to its place then.")
    scratch = target.with_name(make_scratch_name())
    try:
        scratch.mkdir(parents=True, mode=0o700)
        manifest = _unpack(file, scratch)
        _check_history(scratch / "store" / HISTORY, file)
        for place, _, names in os.walk(scratch):
            for name in names:
                flush(Path(place) / name)
        os.replace(scratch, target)
        flush(target.parent)
    except OSError as err:
        raise StoreError(f"'{target}' could not be written ({err}). Free some disk space or name another one.") from err
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


@contextlib.contextmanager
def _snapshot(places: Places) -> Iterator[Path]:
    """A folder with the store and the labels as they are between two saves."""
    folder = places.store / make_scratch_name()
    folder.mkdir(mode=0o700)
    try:
        holder = "A server has been saving a label"
        with ExitStack() as locks:
            if places.studies is not None:
                locks.enter_context(locked(places.studies / ".lock", holder))
            if (places.store / HISTORY).is_dir():
                locks.enter_context(locked(places.store / HISTORY / ".lock", holder))
            for path in _list_files(places.store, is_store=True):
                _link(path, folder / "store" / path.relative_to(places.store))
            for name in _OF_STUDIES if places.studies is not None else ():
                source = Path(places.studies or "") / name
                for path in _list_files(source):
                    _link(path, folder / "studies" / name / path.relative_to(source))
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _list_files(root: Path, is_store: bool = False) -> Iterator[Path]:
    """Plain files that are finished, and of a store no caches; what points to versions comes before the versions."""
    if root.is_file():
        yield root
        return
    for place, folders, names in os.walk(root):
        parts = Path(place).relative_to(root).parts
        folders[:] = sorted(name for name in folders if not _is_left_out((*parts, name), is_store))
        for name in sorted(names):
            path = Path(place) / name
            if not _is_left_out((*parts, name), is_store) and path.is_file() and not path.is_symlink():
                yield path


def _is_left_out(parts: tuple[str, ...], is_store: bool) -> bool:
    name = parts[-1]
    if name.startswith(WRITING) or name.endswith(".lock"):
        return True
    return is_store and (parts in _OF_TRAININGS or (len(parts) == 1 and _CACHE.fullmatch(name) is not None))


def _link(path: Path, target: Path) -> None:
    """The same content under another name, also when a rename puts another file in its place. The log grows in place:
    it is copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        shutil.copy2(path, target)
        return
    try:
        os.link(path, target)
    except OSError:  # Of another disk, or one without links.
        shutil.copy2(path, target)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> str:
    """Put a file into the backup. Returns its SHA-256."""
    entry = tar.gettarinfo(path, name)
    entry.type, entry.linkname = tarfile.REGTYPE, ""  # Two names of one file are two files there.
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    with path.open("rb") as content:
        entry.size = os.fstat(content.fileno()).st_size
        reader = _Hashing(content)
        tar.addfile(entry, reader)
    return reader.digest.hexdigest()


class _Hashing(io.RawIOBase):
    """Reads a file, and knows the hash of what was read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self.digest.update(data)
        return data


def _unpack(file: Path, folder: Path) -> Manifest:
    """Write all files of a backup, and compare them with its manifest.

    Raises:
        RequestError: if anything is missing, surplus or other than it was.
    """
    cure = "Take another backup; nothing was restored."
    found: dict[str, str] = {}
    manifest: Manifest | None = None
    try:
        with tarfile.open(file, "r:") as tar:
            for entry in tar:
                content = tar.extractfile(entry) if entry.isreg() else None
                if content is None or manifest is not None or not _is_plain(entry.name):
                    raise RequestError(f"'{file}' holds '{entry.name[:80]}', which no backup does. {cure}")
                if entry.name == MANIFEST:
                    manifest = Manifest.model_validate_json(content.read())
                    continue
                found[entry.name] = _write(content, folder / entry.name, entry.size, entry.mode & 0o700)
    except FileNotFoundError as err:
        if err.filename == str(file):
            raise RequestError(f"There is no '{file}'. Name the file of a backup.") from err
        raise
    except (tarfile.TarError, EOFError, ValidationError) as err:
        raise RequestError(f"'{file}' is damaged, or no backup ({err}). {cure}") from err
    if manifest is None:
        raise RequestError(f"The end of '{file}' is missing, or it is no backup. {cure}")
    if manifest.format != FORMAT:
        raise RequestError(
            f"'{file}' has format {manifest.format}, this version reads {FORMAT}. Use the newer program."
        )
    wrong = sorted(name for name in found.keys() | manifest.files.keys() if found.get(name) != manifest.files.get(name))
    if wrong:
        raise RequestError(f"'{file}' is damaged: '{wrong[0]}' is not as it was ({len(wrong)} files). {cure}")
    return manifest


def _is_plain(name: str) -> bool:
    """Whether a name leads to a place below the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and bool(path.parts)


def _write(content: IO[bytes], path: Path, size: int, mode: int) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), size
    with path.open("xb") as target:
        while left and (data := content.read(min(left, _CHUNK))):
            digest.update(data)
            target.write(data)
            left -= len(data)
    path.chmod(mode or 0o600)
    return digest.hexdigest()


def _check_history(root: Path, file: Path) -> None:
    """Have the history look at itself: it names labels that its log speaks of and that are not there."""
    problems = AnnotationStore(root).verify() if root.is_dir() else []
    if problems:
        raise RequestError(
            f"The history of labels in '{file}' is damaged: {problems[0]} Take another backup; nothing was restored."
        )
