"""Which images changed, for whoever keeps something about each of them up to date."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable

_KEPT = 10_000


class ChangeLog:
    """The last changes, counted; safe for threads.

    Example:
        >>> log = ChangeLog()
        >>> first, everything = log.since(None)
        >>> log.note(["a", "b"])
        >>> log.since(first) == (2, {"a", "b"}), everything is None
        (True, True)
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._last: deque[str] = deque(maxlen=_KEPT)

    def note(self, images: Iterable[str]) -> None:
        """Say that something about these changed."""
        with self._lock:
            for image in images:
                self._count += 1
                self._last.append(image)

    def since(self, count: int | None) -> tuple[int, set[str] | None]:
        """How many changes there were, and the images that changed since there were `count`; None if that is not known
        any more, so that it may be all.
        """
        with self._lock:
            new = None if count is None else self._count - count
            if new is None or new > len(self._last):
                return self._count, None
            return self._count, {self._last[-position] for position in range(1, new + 1)}
