"""Results on disk: switching the shown proposal is a read, and survives a restart.

One folder per result, named by its key, which is a hash of everything that the result depends on. A folder is written
under a temporary name, flushed to disk and renamed, so a reader sees all of it or nothing, also after a power cut and
also from another process. What cannot be read is moved aside, logged and treated as absent: it is computed again. When
the store grows beyond its limit, the results that were not used for longest go first. Of results that differ in a
person's edits alone, which come by the click, the last few stay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter

from progidiff.errors import ImageError, StoreError
from progidiff.prompts.parser import Query
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.storage.atomic import atomic_folder, remove_leftovers
from progidiff.storage.state_files import DamagedStateError, read_state

logger = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 4 << 30
"""Limit of a store on disk: 4 GiB, some thousand volumes with a handful of structures."""

MAX_STEERED = 4
"""Results that differ in the edits alone: the last one, and some steps back for undo and for another tab."""

_KEY = re.compile(r"[0-9a-f]{64}")
_CARD = "entry.json"
_DAMAGED = ".damaged-"
_KEPT_DAMAGED = 3


@dataclass(frozen=True)
class StoredResult:
    """What the store knows about a result without opening it.

    Attributes:
        key: See `ProposalRequest.key`.
        image_id: The image it belongs to.
        created: Seconds since 1970.
        structures: The structures asked for.
        num_bytes: Size on disk.
        whole: See `ProposalRequest.whole_key` and `ProposalStore.find_part`; "" if it was not kept.
        texts: What the text encoder read per structure; empty if it was not kept.
        steered: Key of the same request without its edits; "" if it has none.
    """

    key: str
    image_id: str
    created: float
    structures: tuple[str, ...]
    num_bytes: int
    whole: str = ""
    texts: tuple[str, ...] = ()
    steered: str = ""


_ENTRY = TypeAdapter(StoredResult)


class ProposalStore:
    """A folder of results; safe for threads and for several processes on one folder.

    Args:
        root: The folder; made if absent.
        max_bytes: Limit on disk.
        in_memory: Results kept open, the last ones used.

    Raises:
        StoreError: if the folder cannot be made.
    """

    def __init__(self, root: str | os.PathLike[str], max_bytes: int = DEFAULT_MAX_BYTES, in_memory: int = 2) -> None:
        self.root = Path(root)
        self.max_bytes = max_bytes
        self._in_memory = in_memory
        self._open: OrderedDict[str, VolumeProposals] = OrderedDict()
        self._entries: dict[str, StoredResult] = {}
        self._lock = threading.RLock()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(
                f"The folder '{self.root}' for results cannot be made ({err}). Choose another one or free it."
            ) from err
        remove_leftovers(self.root)

    def save(
        self,
        key: str,
        proposals: VolumeProposals,
        image_id: str,
        queries: Sequence[Query] = (),
        whole: str = "",
        steered: str = "",
    ) -> StoredResult:
        """Keep a result, in place of an older one with the same key.

        Args:
            key: See `key`.
            proposals: The result.
            image_id: The image it belongs to.
            queries: What was asked for, in the order of its structures.
            whole: See `ProposalRequest.whole_key`; with it, `find_part` answers shorter requests from
                this result.
            steered: Key of the same request without its edits, "" if it has none. Of results with the same one, the
                `MAX_STEERED` that were used last stay.

        Raises:
            StoreError: if the key is none of `ProposalRequest.key`, or the disk refuses; nothing is left behind then.
        """
        if not _KEY.fullmatch(key):
            raise StoreError(f"'{key}' is no key of a result; make one with ProposalRequest.key.")
        with self._lock:
            try:
                self.root.mkdir(parents=True, exist_ok=True)
                with atomic_folder(self.root / key, existing="replace") as scratch:
                    proposals.to_files(scratch)
                    num_bytes = sum(file.stat().st_size for file in scratch.iterdir())
                    texts = tuple(query.text for query in queries)
                    entry = StoredResult(
                        key, image_id, time.time(), proposals.structures, num_bytes, whole, texts, steered
                    )
                    (scratch / _CARD).write_text(json.dumps(asdict(entry)), encoding="utf-8")
            except OSError as err:
                raise StoreError(
                    f"The result for '{image_id}' could not be kept in '{self.root}' ({err}). Free some disk space."
                ) from err
            self._entries[key] = entry
            self._remember(key, proposals)
            if steered:
                self._prune_steered(entry)
            self._prune(keep=key)
            return entry

    def load(self, key: str) -> VolumeProposals | None:
        """A result, or None if there is none that can be read."""
        if not _KEY.fullmatch(key):
            return None
        with self._lock:
            folder = self.root / key
            if not folder.is_dir():
                self._forget(key)
                return None
            proposals = self._open.get(key)
            if proposals is None:
                try:
                    proposals = VolumeProposals.from_files(folder)
                except ImageError as err:
                    self._move_aside(folder, str(err))
                    return None
            self._remember(key, proposals)
            with contextlib.suppress(OSError):
                os.utime(folder)  # last use, for pruning
            return proposals

    def find_part(self, image_id: str, queries: Sequence[Query], whole: str) -> VolumeProposals | None:
        """The answer to a request from a kept one that asked for more structures of the same image with the same
        settings.

        Args:
            image_id: The image.
            queries: The structures asked for.
            whole: See `ProposalRequest.whole_key`: image, settings and weights.

        Returns:
            The structures asked for, in their order; None if no kept result holds them all. A structure's proposals do
            not depend on what else was asked for: noise and offsets are drawn for the slice, not for the structure.
        """
        asked = [(query.name, query.text) for query in queries]
        for entry in self.list(image_id):
            kept = list(zip(entry.structures, entry.texts, strict=False))
            if entry.whole != whole or not all(one in kept for one in asked):
                continue
            result = self.load(entry.key)
            if result is not None:
                return result.take([name for name, _ in asked])
        return None

    def list(self, image_id: str | None = None) -> list[StoredResult]:
        """The results of an image (or of all), the newest first."""
        with self._lock:
            present = (
                [path.name for path in self.root.iterdir() if _KEY.fullmatch(path.name)] if self.root.is_dir() else []
            )
            for key in self._entries.keys() - set(present):
                self._forget(key)
            entries = [entry for entry in map(self._entry, present) if entry is not None]
        return sorted(
            (entry for entry in entries if image_id in (None, entry.image_id)),
            key=lambda entry: (-entry.created, entry.key),
        )

    def latest(self, image_id: str) -> StoredResult | None:
        """The newest result of an image; `load` its key to open it."""
        return next(iter(self.list(image_id)), None)

    def _entry(self, key: str) -> StoredResult | None:
        known = self._entries.get(key)
        if known is not None:
            return known
        folder = self.root / key
        try:
            entry = replace(read_state(folder / _CARD, _ENTRY.validate_json), key=key)
        except (OSError, DamagedStateError) as err:
            if not folder.is_dir():
                return None  # another process pruned it meanwhile
            self._move_aside(folder, f"{_CARD} cannot be read ({err})")
            return None
        self._entries[key] = entry
        return entry

    def _move_aside(self, folder: Path, reason: str) -> None:
        logger.warning("Result %s is damaged and will be computed again: %s", folder.name, reason)
        self._forget(folder.name)
        try:
            os.replace(folder, self.root / f"{_DAMAGED}{time.time_ns()}-{folder.name}")
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
        for surplus in sorted(self.root.glob(f"{_DAMAGED}*"))[:-_KEPT_DAMAGED]:
            shutil.rmtree(surplus, ignore_errors=True)

    def _prune_steered(self, newest: StoredResult) -> None:
        """Keep the last few of the results that differ from this one in the edits alone."""
        others = [entry for entry in self.list(newest.image_id) if entry.steered == newest.steered]
        others = [entry for entry in others if entry.key != newest.key]
        for entry in sorted(others, key=self._last_use, reverse=True)[MAX_STEERED - 1 :]:
            self._remove(entry)
            logger.info("Removed the result %s of '%s': edits came after it", entry.key, entry.image_id)

    def _remove(self, entry: StoredResult) -> None:
        shutil.rmtree(self.root / entry.key, ignore_errors=True)
        self._forget(entry.key)

    def _prune(self, keep: str) -> None:
        entries = self.list()
        total = sum(entry.num_bytes for entry in entries)
        if total <= self.max_bytes:
            return
        for entry in sorted(entries, key=lambda entry: (self._last_use(entry), entry.created)):
            if total <= self.max_bytes:
                break
            if entry.key != keep:
                self._remove(entry)
                total -= entry.num_bytes
                logger.info(
                    "Removed the result %s of '%s' to stay under %d bytes", entry.key, entry.image_id, self.max_bytes
                )

    def _last_use(self, entry: StoredResult) -> float:
        try:
            return (self.root / entry.key).stat().st_mtime
        except OSError:
            return entry.created

    def _remember(self, key: str, proposals: VolumeProposals) -> None:
        self._open[key] = proposals
        self._open.move_to_end(key)
        while len(self._open) > self._in_memory:
            self._open.popitem(last=False)

    def _forget(self, key: str) -> None:
        self._open.pop(key, None)
        self._entries.pop(key, None)
