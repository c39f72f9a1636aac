"""Log lines that repeat themselves: a few are written, the rest is counted.

A process without free descriptors fails at the same line thousands of times a second; written out, that fills the disk
before anybody reads it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

_KEPT = "progidiff_is_kept"
"""Attribute of a record that one handler has let through or left out, for the next one."""


class RepeatedLines(logging.Filter):
    """Lets so many warnings and errors of one line of code through in a while.

    Args:
        most: Records of one place and kind of exception in a window.
        window: Seconds.
        clock: Seconds that never go back.
    """

    MAX_PLACES = 1000

    def __init__(self, most: int = 20, window: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._window = window
        self._clock = clock
        self._seen: dict[Hashable, tuple[float, int]] = {}
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written; the first of a new window says how many were not."""
        if record.levelno < logging.WARNING:
            return True
        known = getattr(record, _KEPT, None)
        if known is None:
            known = self._count(record)
            setattr(record, _KEPT, known)
        return bool(known)

    def _count(self, record: logging.LogRecord) -> bool:
        kind = record.exc_info[0] if record.exc_info else None
        place = (record.name, record.pathname, record.lineno, kind)
        with self._lock:
            now = self._clock()
            begun, count = self._seen.get(place, (now, 0))
            if now - begun >= self._window:
                if count > self._most:
                    left_out = f" ({count - self._most} more like the last were left out)"
                    record.msg = f"{record.getMessage()}{left_out}"
                    record.args = None
                begun, count = now, 0
            if len(self._seen) > self.MAX_PLACES:
                self._seen.clear()
            self._seen[place] = (begun, count + 1)
            return count < self._most


_filter = RepeatedLines()


def install() -> None:
    """Count at every handler that writes log lines of this process. Safe to call again."""
    names = [name for name, entry in logging.root.manager.loggerDict.items() if isinstance(entry, logging.Logger)]
    for each in (logging.root, *map(logging.getLogger, names)):
        for handler in each.handlers:
            if _filter not in handler.filters:
                handler.addFilter(_filter)
