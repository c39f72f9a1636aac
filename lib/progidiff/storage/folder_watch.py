"""Whether the names in a folder changed since they were read, told by one `stat` of the folder.

Stores whose files appear by rename change the folder's own time with every file. Who has read a folder of a hundred
thousand files therefore need not look at each of them again to know that nothing happened. What this process changes
itself it says (`own_change`), so that a store which grows by its own files is not read again after each of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_TICK_NS = 100_000_000
"""Two changes within so long may leave a folder with one time; clocks of disks tick every few milliseconds."""

_COARSE_NS = 3_000_000_000
"""The same where a disk keeps whole seconds."""

_RECHECK_SECONDS = 30.0
_RECHECK_SHARE = 50
"""A change of somebody else in the moment of an own one is found by a look after so many seconds, or after so many
times what the last look took, if that is more."""


class FolderWatch:
    """One folder, for several threads.

    Args:
        folder: Need not be there.
        clock: Nanoseconds since 1970; for tests.
    """

    def __init__(self, folder: Path, clock: Callable[[], int] = time.time_ns) -> None:
        self._folder = folder
        self._clock = clock
        self._mutex = threading.Lock()
        self._seen: int | None = None
        self._is_sure = False
        self._has_own = False
        self._looked = 0
        self._took = 0

    def is_as_seen(self) -> bool:
        """Whether nobody else has put a file into the folder, replaced or taken one since the last look."""
        modified = self._read()
        with self._mutex:
            if self._seen is None or not self._is_sure or modified != self._seen:
                return False
            pause = max(_RECHECK_SECONDS * 1e9, _RECHECK_SHARE * self._took)
            return not self._has_own or self._clock() - self._looked < pause

    @contextmanager
    def look(self) -> Iterator[None]:
        """While the folder is read; after an exception it counts as not read."""
        modified, began = self._read(), self._clock()
        yield
        now = self._clock()
        margin = _COARSE_NS if modified % 1_000_000_000 == 0 else _TICK_NS
        with self._mutex:
            self._seen = modified
            # A folder that is not there gets a time of its own when it is made.
            self._is_sure = modified == 0 or not -margin < began - modified < margin
            self._has_own = False
            self._looked, self._took = now, now - began

    @contextmanager
    def own_change(self) -> Iterator[None]:
        """While this process changes the folder, and keeps what it knows of it up to date by itself."""
        modified = self._read()
        with self._mutex:
            was_seen = self._seen is not None and self._is_sure and modified == self._seen
        yield
        after = self._read()
        with self._mutex:
            if was_seen:
                self._seen, self._has_own = after, True

    def _read(self) -> int:
        """When the folder was changed, in ns; 0 if there is none."""
        try:
            return self._folder.stat().st_mtime_ns
        except OSError:
            return 0
