"""Scores of slices on disk: what the background scorer found, per image and model version; "what next" is answered from
here.

::

    <root>/<version>/<sha256 of the image id>.safetensors   disagreement, entropy, foreground; the rest in its header

One small file per image, written under a temporary name, flushed and renamed: a reader sees all of it or nothing, and a
scorer that was killed goes on where it was. A file that cannot be read is moved aside and scored again. What the files
hold stays in memory once they are read; whether there are others is asked of the folder (`FolderWatch`), so that it
costs the same however many images there are.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save as save_safetensors

from progidiff.active_learning.strategies import ImageScores
from progidiff.errors import StoreError
from progidiff.storage.atomic import remove_leftovers, replace_bytes
from progidiff.storage.folder_watch import FolderWatch

logger = logging.getLogger(__name__)

FORMAT = 1
KEPT_VERSIONS = 4
"""Scores of so many model versions are kept per modality, the last ones scored: to go back to after a rollback, and for
the report.

Per modality, because a model for CT goes on being used while the one for MR is trained ten times."""

_SUFFIX = ".safetensors"
_DAMAGED = ".damaged-"


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """Scores of one image by one model version.

    Attributes:
        scores: The scores; `scores.version` is the model version, see `name_version`.
        fingerprint: Of the image when it was scored; another one now means that the file has changed.
        modality: "CT" or "MR".
        created: Seconds since 1970.
    """

    scores: ImageScores
    fingerprint: str
    modality: str
    created: float


def name_version(model: str, adapter: str = "") -> str:
    """The version that proposals come from, as one name.

    Example:
        >>> name_version("ct-base@1"), name_version("ct-base@1", "mr@2")
        ('ct-base@1', 'ct-base@1+mr@2')
    """
    return f"{model}+{adapter}" if adapter else model


@dataclass(eq=False)
class _Folder:
    """What is known of the scores of one version.

    Attributes:
        watch: Whether its files are those that were read.
        known: File name -> its time and size, and what it holds.
    """

    watch: FolderWatch
    known: dict[str, tuple[tuple[int, int], ScoredImage]] = field(default_factory=dict)


class SliceScoreStore:
    """A folder of scores; safe for threads, and for several processes on one folder.

    Args:
        root: The folder; made when something is saved.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._lock = threading.RLock()
        self._reading = threading.RLock()
        self._versions: dict[Path, _Folder] = {}
        self._of_image: dict[str, dict[Path, ScoredImage]] = {}
        self._modalities: set[str] = set()
        self._changed: set[str] = set()
        self._wanted: dict[str, str] = {}
        self._best: Mapping[str, ScoredImage] = {}

    def save(self, entry: ScoredImage) -> None:
        """Keep the scores of an image, in place of those by the same version.

        Raises:
            StoreError: if the disk refuses; nothing is left behind then.
        """
        scores = entry.scores
        header = {
            "format": FORMAT,
            "image": scores.image,
            "structures": list(scores.structures),
            "slice_mm": scores.slice_mm,
            "version": scores.version,
            "fingerprint": entry.fingerprint,
            "modality": entry.modality,
            "created": entry.created,
        }
        tensors = {
            name: getattr(scores, name).astype("float32", order="C")
            for name in ("disagreement", "entropy", "foreground")
        }
        content = save_safetensors(tensors, {"progidiff": json.dumps(header)})
        folder = self.root / _fold(scores.version)
        is_new = not folder.is_dir()
        known = self._folder(folder)
        path = folder / _file_name(scores.image)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with known.watch.own_change():
                if not known.known:  # what another process left; once, as a look at all names is no part of a save
                    remove_leftovers(folder)
                replace_bytes(path, content)
                os.utime(folder)
                stat = path.stat()
                self._remember(path, _stamp(stat), replace(entry, scores=replace(scores, **tensors)))
        except OSError as err:
            raise StoreError(
                f"The scores of '{scores.image}' could not be kept in '{self.root}' ({err}). Free some disk space."
            ) from err
        if is_new:  # which versions are too many changes with a new one, not with every image of the pool
            self._prune(folder)

    def load(self, image: str, version: str) -> ScoredImage | None:
        """The scores of an image by a version, or None."""
        return self._read(self.root / _fold(version) / _file_name(image))

    def load_all(self) -> list[ScoredImage]:
        """Everything that can be read, in no order."""
        folders = self._look()
        with self._lock:
            return [entry for folder in folders for _, entry in folder.known.values()]

    def pick_newest(self, wanted: Callable[[str], str]) -> Mapping[str, ScoredImage]:
        """One entry per image: by the version that is wanted for its modality, else the newest there is.

        Args:
            wanted: Modality -> version.

        Returns:
            The very same mapping until something changes.
        """
        self._look()
        with self._lock:
            modalities = set(self._modalities)
        versions = {modality: wanted(modality) for modality in modalities}
        with self._lock:
            changed = self._changed if versions == self._wanted else self._of_image.keys() | self._best.keys()
            if changed:
                best = dict(self._best)
                for image in changed:
                    own = self._of_image.get(image)
                    if own:
                        best[image] = max(own.values(), key=lambda entry: self._rank(entry, versions))
                    else:
                        best.pop(image, None)
                self._best = best
            self._wanted, self._changed = versions, set()
            return self._best

    def remove(self, image: str) -> None:
        """Forget an image that is gone."""
        for folder in self._folders():
            path = folder / _file_name(image)
            with self._folder(folder).watch.own_change():
                path.unlink(missing_ok=True)
                self._forget(path)

    @staticmethod
    def _rank(entry: ScoredImage, versions: dict[str, str]) -> tuple[bool, float]:
        return entry.scores.version == versions.get(entry.modality), entry.created

    def _folders(self) -> list[Path]:
        return (
            [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
            if self.root.is_dir()
            else []
        )

    def _folder(self, folder: Path) -> _Folder:
        with self._lock:
            return self._versions.setdefault(folder, _Folder(FolderWatch(folder)))

    def _look(self) -> list[_Folder]:
        """Read what came since the last time, whichever process wrote it."""
        # One thread at a time: of two that go through the pool at once, as when a server starts, none reads what the
        # other has read.
        with self._reading:
            present = self._folders()
            for folder in self._versions.keys() - set(present):
                self._forget_folder(folder)
            found = [self._folder(folder) for folder in present]
            for folder, known in zip(present, found, strict=True):
                if not known.watch.is_as_seen():
                    self._look_at(folder, known)
            return found

    def _look_at(self, folder: Path, known: _Folder) -> None:
        with known.watch.look(), contextlib.suppress(FileNotFoundError):
            with self._lock:
                gone = set(known.known)
            with os.scandir(folder) as files:
                for file in files:
                    if file.name.endswith(_SUFFIX) and self._read(Path(file.path), file.stat()) is not None:
                        gone.discard(file.name)
            for name in gone:
                if not (folder / name).exists():  # it may have come back, by this process
                    self._forget(folder / name)

    def _read(self, path: Path, stat: os.stat_result | None = None) -> ScoredImage | None:
        try:
            stamp = _stamp(stat or path.stat())
        except OSError:
            return None
        with self._reading:
            with self._lock:
                known = self._folder(path.parent).known.get(path.name)
            return known[1] if known is not None and known[0] == stamp else self._open(path, stamp)

    def _remember(self, path: Path, stamp: tuple[int, int], entry: ScoredImage) -> None:
        with self._lock:
            self._folder(path.parent).known[path.name] = (stamp, entry)
            self._of_image.setdefault(entry.scores.image, {})[path.parent] = entry
            self._modalities.add(entry.modality)
            self._changed.add(entry.scores.image)

    def _forget(self, path: Path) -> None:
        with self._lock:
            known = self._folder(path.parent).known.pop(path.name, None)
            if known is None:
                return
            image = known[1].scores.image
            own = self._of_image.get(image, {})
            own.pop(path.parent, None)
            if not own:
                self._of_image.pop(image, None)
            self._changed.add(image)

    def _forget_folder(self, folder: Path) -> None:
        with self._lock:
            for name in list(self._folder(folder).known):
                self._forget(folder / name)
            del self._versions[folder]

    def _open(self, path: Path, stamp: tuple[int, int]) -> ScoredImage | None:
        try:
            with safe_open(path, framework="numpy") as file:
                header = json.loads(file.metadata()["progidiff"])
                arrays = {name: file.get_tensor(name) for name in ("disagreement", "entropy", "foreground")}
            if header["format"] != FORMAT:
                raise ValueError(f"format {header['format']}")
            scores = ImageScores(
                str(header["image"]),
                tuple(map(str, header["structures"])),
                **arrays,
                slice_mm=float(header["slice_mm"]),
                version=str(header["version"]),
            )
            entry = ScoredImage(scores, str(header["fingerprint"]), str(header["modality"]), float(header["created"]))
        except FileNotFoundError:
            return None
        except Exception as err:  # safetensors raises its own untyped error for a truncated file
            self._move_aside(path, f"{type(err).__name__}: {err}")
            return None
        self._remember(path, stamp, entry)
        return entry

    def _move_aside(self, path: Path, reason: str) -> None:
        logger.warning("The scores in '%s' cannot be read (%s); the image is scored again.", path, reason)
        with contextlib.suppress(OSError):
            os.replace(path, path.with_name(f"{_DAMAGED}{path.name}"))

    def _prune(self, keep: Path) -> None:
        """Remove the versions that were not scored with for longest, see `KEPT_VERSIONS`."""
        folders = sorted(self._folders(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
        if len(folders) <= KEPT_VERSIONS:
            return
        last_scored: dict[str, list[Path]] = {}
        for folder in folders:
            known = self._folder(folder)
            with self._reading:
                if not known.watch.is_as_seen():
                    self._look_at(folder, known)
            for modality in {entry.modality for _, entry in known.known.values()}:
                last_scored.setdefault(modality, []).append(folder)
        kept = {keep, *(folder for group in last_scored.values() for folder in group[:KEPT_VERSIONS])}
        for folder in (folder for folder in folders if folder not in kept):
            self._forget_folder(folder)
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_mtime_ns, stat.st_size


def _fold(version: str) -> str:
    """A folder's name for a version: readable, and safe whatever a model is called."""
    readable = "".join(letter if letter.isalnum() or letter in "@+._-" else "_" for letter in version).strip(".")[:80]
    return f"{readable or 'version'}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"


def _file_name(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest() + _SUFFIX
