"""One lock per image: who works on one image keeps nobody from the others, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from progidiff.errors import BusyError

WAIT_SECONDS = 30.0
"""Longer than any save of a whole volume takes."""


class ImageLocks:
    """Locks by the id of an image; one exists only while somebody has it or waits for it.

    Args:
        work: What is going on while a lock is held, for the message: "saved", "fetched".
        seconds: How long to wait for one.
    """

    def __init__(self, work: str = "saved", seconds: float = WAIT_SECONDS) -> None:
        self._work = work
        self._seconds = seconds
        self._mutex = threading.Lock()
        self._locks: dict[str, tuple[threading.RLock, int]] = {}

    @contextmanager
    def hold(self, image_id: str) -> Iterator[None]:
        """Be the only one at work on an image; a thread that is already may ask again.

        Raises:
            BusyError: if somebody else is at it for too long.
        """
        with self._mutex:
            lock, users = self._locks.get(image_id, (threading.RLock(), 0))
            self._locks[image_id] = lock, users + 1
        try:
            if not lock.acquire(timeout=self._seconds):
                raise BusyError(
                    f"'{image_id[:100]}' has been {self._work} for somebody else for {self._seconds:.0f} s. Send it "
                    "again in a while; nothing was changed.",
                    retry_after=10,
                )
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._mutex:
                lock, users = self._locks.pop(image_id)
                if users > 1:
                    self._locks[image_id] = lock, users - 1
