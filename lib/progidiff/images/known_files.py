"""What was once read from files, for as long as these stay as they are."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class KnownFiles(Generic[T]):
    """The last few results of reading files, by path, place on disk, size and times.

    For what is asked of headers again and again: each time it is not known, a process of its own reads it.

    Args:
        size: Results that are kept.
    """

    def __init__(self, size: int = 4096) -> None:
        self._size = size
        self._known: OrderedDict[tuple[object, ...], T] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, path: Path, read: Callable[[], T]) -> T:
        """The result for a file, read if it is not known.

        Raises:
            OSError: if the file cannot be looked at.
        """
        state = path.stat()
        key = (str(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
                return self._known[key]
        result = read()
        with self._lock:
            self._known[key] = result
            while len(self._known) > self._size:
                self._known.popitem(last=False)
        return result
