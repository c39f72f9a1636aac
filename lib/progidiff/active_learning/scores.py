"""Scores of slices on disk: what the background scorer found, per image and model version; "what next" is answered from
here.

::

    <root>/<version>/<sha256 of the image id>.safetensors   disagreement, entropy, foreground; the rest in its header

One small file per image, written under a temporary name, flushed and renamed: a reader sees all of it or nothing, and a
scorer that was killed goes on where it was. A file that cannot be read is moved aside and scored again. Files stay in
memory once they are read, so that a pool of a thousand images costs a thousand `stat` calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.numpy import save as save_safetensors

from progidiff.active_learning.strategies import ImageScores
from progidiff.errors import StoreError
from progidiff.storage.atomic import remove_leftovers, replace_bytes

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


class SliceScoreStore:
    """A folder of scores; safe for threads, and for several processes on one folder.

    Args:
        root: The folder; made when something is saved.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._lock = threading.RLock()
        self._reading = threading.Lock()
        self._known: dict[Path, tuple[tuple[int, int], ScoredImage]] = {}

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
        tensors = {"disagreement": scores.disagreement, "entropy": scores.entropy, "foreground": scores.foreground}
        content = save_safetensors(
            {name: values.astype("float32", order="C") for name, values in tensors.items()},
            {"progidiff": json.dumps(header)},
        )
        folder = self.root / _fold(scores.version)
        is_new = not folder.is_dir()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            replace_bytes(folder / _file_name(scores.image), content)
            os.utime(folder)
        except OSError as err:
            raise StoreError(
                f"The scores of '{scores.image}' could not be kept in '{self.root}' ({err}). Free some disk space."
            ) from err
        remove_leftovers(folder)
        if is_new:  # which versions are too many changes with a new one, not with every image of the pool
            self._prune(folder)

    def load(self, image: str, version: str) -> ScoredImage | None:
        """The scores of an image by a version, or None."""
        return self._read(self.root / _fold(version) / _file_name(image))

    def load_all(self) -> list[ScoredImage]:
        """Everything that can be read, in no order."""
        found = []
        for folder in self._folders():
            found += self._load_folder(folder)
        return found

    def pick_newest(self, wanted: Callable[[str], str]) -> dict[str, ScoredImage]:
        """One entry per image: by the version that is wanted for its modality, else the newest there is.

        Args:
            wanted: Modality -> version.
        """
        versions: dict[str, str] = {}
        best: dict[str, ScoredImage] = {}
        for entry in self.load_all():
            if entry.modality not in versions:
                versions[entry.modality] = wanted(entry.modality)
            known = best.get(entry.scores.image)
            if known is None or self._rank(entry, versions) > self._rank(known, versions):
                best[entry.scores.image] = entry
        return best

    def remove(self, image: str) -> None:
        """Forget an image that is gone."""
        for folder in self._folders():
            (folder / _file_name(image)).unlink(missing_ok=True)

    @staticmethod
    def _rank(entry: ScoredImage, versions: dict[str, str]) -> tuple[bool, float]:
        return entry.scores.version == versions.get(entry.modality), entry.created

    def _folders(self) -> list[Path]:
        return (
            [path for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")]
            if self.root.is_dir()
            else []
        )

    def _load_folder(self, folder: Path) -> list[ScoredImage]:
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as files:
            return [
                entry
                for file in files
                if file.name.endswith(_SUFFIX) and (entry := self._read(Path(file.path), file.stat()))
            ]
        return []

    def _read(self, path: Path, stat: os.stat_result | None = None) -> ScoredImage | None:
        try:
            stat = stat or path.stat()
        except OSError:
            return None
        stamp = (stat.st_mtime_ns, stat.st_size)
        with self._lock:
            known = self._known.get(path)
        if known is not None and known[0] == stamp:
            return known[1]
        # One file at a time: of two threads that go through the pool at once, as when a server starts, none reads what
        # the other has read.
        with self._reading:
            with self._lock:
                known = self._known.get(path)
            return known[1] if known is not None and known[0] == stamp else self._open(path, stamp)

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
        with self._lock:
            self._known[path] = (stamp, entry)
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
            for modality in {entry.modality for entry in self._load_folder(folder)}:
                last_scored.setdefault(modality, []).append(folder)
        kept = {keep, *(folder for group in last_scored.values() for folder in group[:KEPT_VERSIONS])}
        for folder in (folder for folder in folders if folder not in kept):
            with self._lock:
                for path in [path for path in self._known if path.parent == folder]:
                    del self._known[path]
            for path in folder.iterdir():
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                folder.rmdir()


def _fold(version: str) -> str:
    """A folder's name for a version: readable, and safe whatever a model is called."""
    readable = "".join(letter if letter.isalnum() or letter in "@+._-" else "_" for letter in version).strip(".")[:80]
    return f"{readable or 'version'}-{hashlib.sha256(version.encode()).hexdigest()[:8]}"


def _file_name(image: str) -> str:
    return hashlib.sha256(image.encode()).hexdigest() + _SUFFIX
