"""The textdiff models of a server: versions on disk, one of them in the memory of a device once somebody asks.

Nothing is loaded, and no weight is looked for, before the first request: a server without these weights starts as fast
and says what is missing when it is asked. Whoever calls `TextDiffEngine.predict` holds the device (`DeviceQueue`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from progidiff.errors import MemoryFullError, ModelError, ProGiDiffError

if TYPE_CHECKING:  # the package brings diffusers and transformers along
    from progidiff.storage.versions import VersionEntry
    from progidiff.textdiff.model import TextDiffCard, TextDiffModel, TextDiffResult
    from progidiff.textdiff.pictures import Picture
    from progidiff.textdiff.versions import TextDiffStore

logger = logging.getLogger(__name__)

DENOISER = "denoiser"
"""Folder of the denoiser beside the heads, which a first head is trained with."""

TEXT_TABLE = "text.csv"
"""The sentences, beside the images."""

PHRASE_TABLE = "phrases.csv"
"""What sentences ask for, beside the images: with it a training teaches a sentence to select."""


class TextDiffEngine:
    """Finds, loads and runs versions.

    Args:
        root: Folder of the models: ``<name>/<version>/`` and ``denoiser/``.
        devices: What the queue calls a device -> "cpu", "cuda"; None to pick.
    """

    def __init__(self, root: Path, devices: Mapping[str, str | None] | None = None) -> None:
        self.root = root
        self._devices = dict(devices or {"": None})
        self._lock = threading.Lock()
        self._loaded: dict[str, tuple[str, TextDiffModel]] = {}

    @property
    def store(self) -> TextDiffStore:
        """The versions."""
        from progidiff.textdiff.versions import TextDiffStore

        return TextDiffStore(self.root)

    def find_store(self) -> TextDiffStore | None:
        """The versions; None without a folder of them, and nothing is imported then."""
        return self.store if self.root.is_dir() else None

    def names(self) -> list[str]:
        """The models that there are; never raises."""
        try:
            return [entry.name for entry in self.entries()]
        except (ProGiDiffError, OSError) as err:
            logger.warning("The textdiff models in '%s' cannot be listed: %s", self.root, err)
            return []

    def pick(self, wanted: str | None = None) -> TextDiffCard:
        """The version that answers.

        Args:
            wanted: ``name`` for its served version, ``name@version``, or None for the served version that was published
                last.

        Raises:
            ModelError: if there are no weights, or those wanted are damaged.
            NotFoundError: if there is no such version.
        """
        entries = self.entries()
        if not entries:
            raise ModelError(
                f"There are no weights for textdiff in '{self.root}'. Put a model there (`progidiff textdiff train` "
                "writes one), or name its folder with --conf textdiff; progidiff works without."
            )
        if wanted is not None:
            return self.store.find(wanted)
        newest = self.store.find_newest()
        if newest is None:
            there = ", ".join(f"{entry.name}@{version}" for entry in entries for version in entry.versions)
            raise ModelError(
                f"No textdiff model is published. Ask for one by number with option version ({there}), or publish one."
            )
        return self.store.find(newest.name)

    def list_served(self) -> list[TextDiffCard]:
        """The served version of every model, the one that was published last first; those that are damaged are left
        out and logged.
        """
        served = [entry for entry in self.entries() if entry.current is not None]
        cards: list[TextDiffCard] = []
        for entry in sorted(served, key=lambda entry: (entry.published, entry.name), reverse=True):
            try:
                cards.append(self.store.find(entry.name))
            except ProGiDiffError as err:
                logger.warning("The textdiff model '%s' is not offered: %s", entry.name, err)
        return cards

    def describe(self) -> dict[str, Any]:
        """What answers without being asked for a version; never raises.

        Returns:
            "version" ("" if there is none), "classes", "error" (why there is none).
        """
        try:
            card = self.pick()
        except (ProGiDiffError, OSError) as err:
            return {"version": "", "classes": [], "error": str(err)}
        return {"version": card.full_name, "classes": list(card.classes), "error": ""}

    def label_ids(self) -> dict[str, int]:
        """Class -> label id of the version that answers by itself; empty if there is none."""
        return number_classes(self.describe()["classes"])

    def predict(
        self,
        picture: Picture | NDArray[Any],
        sentence: str | None,
        draws: int,
        card: TextDiffCard,
        on_progress: Callable[[int, int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
        device: str = "",
    ) -> TextDiffResult:
        """Run a version on a device that the caller holds; it is loaded if it is not the last one that ran there.

        Raises:
            ModelError: if it cannot be loaded.
            RequestError: if the sentence is too long.
            ImageError: if the picture cannot be used.
            CancelledError: if `is_cancelled` said so.
            MemoryFullError: if the device has no memory for it.
        """
        try:
            return self._load(card, device).predict(
                picture, sentence, draws, on_progress=on_progress, is_cancelled=is_cancelled
            )
        except (MemoryError, RuntimeError) as err:
            if (
                isinstance(err, MemoryError)
                or "out of memory" in str(err).lower()
                or "can't allocate memory" in str(err)
            ):
                raise MemoryFullError(
                    "The device has no memory left for this picture. Try again when less runs, or send a smaller one.",
                    30,
                ) from err
            raise

    def entries(self) -> list[VersionEntry]:
        """What is on disk; without a folder nothing is imported either."""
        store = self.find_store()
        return [] if store is None else store.entries()

    def _load(self, card: TextDiffCard, device: str) -> TextDiffModel:
        key = f"{card.full_name} {card.sha256}"
        name = device if device in self._devices else next(iter(self._devices))
        with self._lock:
            if name not in self._loaded or self._loaded[name][0] != key:
                self._loaded.pop(name, None)  # The old one goes before the new one comes.
                self._loaded[name] = (key, self.store.load_model(card, self._devices[name]))
                logger.info("Loaded textdiff model %s", card.full_name)
            return self._loaded[name][1]


class SentenceTable:
    """``text.csv`` of a studies folder; read again when it changes.

    Args:
        folder: None if the images lie in no folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / TEXT_TABLE
        self._lock = threading.Lock()
        self._read: tuple[tuple[int, int], Mapping[str, str]] | None = None

    @property
    def phrases(self) -> Path | None:
        """The table of phrases that select, ``phrases.csv`` beside the images; None without one."""
        table = None if self._path is None else self._path.with_name(PHRASE_TABLE)
        return table if table is not None and table.is_file() else None

    def find(self, file_name: str) -> str | None:
        """The sentence of an image; None if there is none.

        Args:
            file_name: Of the image, with its suffix.

        Raises:
            RequestError: if the table cannot be read.
        """
        if self._path is None:
            return None
        try:
            status = self._path.stat()
        except OSError:
            return None
        from progidiff.textdiff.sentences import find_sentence, read_sentences

        stamp = (status.st_mtime_ns, status.st_size)
        with self._lock:
            if self._read is None or self._read[0] != stamp:
                self._read = (stamp, read_sentences(self._path))
            return find_sentence(self._read[1], file_name)


def number_classes(classes: Any) -> dict[str, int]:
    """Class -> label id, from 1 in the order of the model.

    Example:
        >>> number_classes(["nuclei", "stroma"])
        {'nuclei': 1, 'stroma': 2}
    """
    return {str(name): number for number, name in enumerate(classes, start=1)}
