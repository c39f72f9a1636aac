"""Which images there are, as DICOM would name them, without reading more of them than needed.

Listing a folder needs of every image its header, a digest of its bytes and its modality. They are kept on disk until
the file changes. Only an image whose modality nobody states is read as a whole, once, to guess it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from progidiff.dicomweb.geometry import ServedGrid
from progidiff.dicomweb.headers import Identity
from progidiff.errors import ProGiDiffError
from progidiff.images.formats import strip_suffix
from progidiff.images.modality import list_modalities
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.sidecars import find_stated_modality, read_sidecar
from progidiff.storage.atomic import replace_text

logger = logging.getLogger(__name__)

_DATE = re.compile(r"\d{8}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Entry:
    """One image of a folder.

    Attributes:
        identity: What its data sets are called.
        num_slices: Axial slices.
        refused: Why it cannot be served, "" if it can.
    """

    identity: Identity
    num_slices: int
    refused: str = ""


class Catalogue:
    """Entries by image, kept in a folder.

    Args:
        root: The folder; made when the first entry is kept.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._known: dict[str, tuple[list[int], Entry]] = {}
        self._lock = threading.Lock()

    def describe(self, image: str, path: Path, info: Mapping[str, Any] | None = None) -> Entry:
        """The entry of an image, new if its file or sidecar changed.

        Args:
            image: Its id.
            path: Its file.
            info: What the datastore knows about it.
        """
        with self._lock:
            mark = _mark(path)
            known = self._known.get(image) or self._load(image)
            if known is None or known[0] != mark:
                known = (mark, describe_file(image, path, info))
                self._save(image, *known)
            self._known[image] = known
            return known[1]

    def _file(self, image: str) -> Path:
        return self.root / f"{hashlib.sha256(image.encode()).hexdigest()[:32]}.json"

    def _load(self, image: str) -> tuple[list[int], Entry] | None:
        try:
            card = json.loads(self._file(image).read_text(encoding="utf-8"))
            return card["mark"], Entry(Identity(**card["identity"]), int(card["num_slices"]), str(card["refused"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as err:
            logger.warning("The entry of '%s' is damaged and is made again: %s", image, err)
            return None

    def _save(self, image: str, mark: list[int], entry: Entry) -> None:
        card = {
            "mark": mark,
            "identity": asdict(entry.identity),
            "num_slices": entry.num_slices,
            "refused": entry.refused,
        }
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_text(self._file(image), json.dumps(card), durable=False)
        except OSError as err:  # It only saves time: the entry is made again after a restart.
            logger.warning("The entry of '%s' is not kept: %s", image, err)


def _mark(path: Path) -> list[int]:
    """Changes when the file or its sidecar changes."""
    mark = []
    for file in (path, path.with_name(strip_suffix(path) + ".json")):
        try:
            status = file.stat()
            mark += [status.st_size, status.st_mtime_ns]
        except OSError:
            mark += [-1, -1]
    return mark


def describe_file(image: str, path: Path, info: Mapping[str, Any] | None = None) -> Entry:
    """The entry of an image; see `Catalogue.describe`, which keeps it."""
    digest = ""
    modality = list_modalities()[0]
    try:
        digest = _compute_digest(path)
        grid = ServedGrid.of(read_grid(path))
        stated = find_stated_modality(path, info)
        modality = stated[0] if stated is not None else load_volume(path, None, info).modality
    except (ProGiDiffError, OSError) as err:
        logger.warning("'%s' is not shown as DICOM: %s", image, err)
        return Entry(Identity(image, digest, modality), 0, str(err))
    sidecar = read_sidecar(path)
    date = str(sidecar.get("study_date", ""))
    description = str(sidecar.get("description") or sidecar.get("shows") or "")[:64]
    return Entry(Identity(image, digest, modality, date if _DATE.fullmatch(date) else "", description), grid.shape[0])


def _compute_digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=20)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
