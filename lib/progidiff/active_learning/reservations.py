"""Who was given which image to annotate, so that two people do not get the same one; a reservation ends by itself.

Kept in one small JSON file that appears by rename: a restarted server still knows. One process writes it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import FiniteFloat, TypeAdapter

from progidiff.storage.atomic import replace_text
from progidiff.storage.state_files import load_state

logger = logging.getLogger(__name__)

_HELD = TypeAdapter(dict[str, tuple[str, FiniteFloat]])
"""Image -> client, and until when: seconds since 1970."""


class Reservations:
    """Image -> client, each for a while.

    Args:
        file: Where they are kept; made when the first one is.
        minutes: How long one lasts.
        clock: Seconds since 1970; for tests.
    """

    def __init__(self, file: Path, minutes: float = 30.0, clock: Callable[[], float] = time.time) -> None:
        self._file = file
        self._seconds = minutes * 60
        self._clock = clock
        self._lock = threading.RLock()
        self._held = self._load()

    def reserve(self, image: str, client: str) -> bool:
        """Give an image to a client, or extend what it holds. False if somebody else has it."""
        with self._lock:
            owner = self.owner(image)
            if owner not in (None, client):
                return False
            self._held[image] = (client, self._clock() + self._seconds)
            self._save()
            return True

    def release(self, image: str) -> None:
        """End a reservation, for example when a label was saved."""
        with self._lock:
            if self._held.pop(image, None) is not None:
                self._save()

    def owner(self, image: str) -> str | None:
        """Who holds an image, None if nobody does."""
        with self._lock:
            self._expire()
            return self._held[image][0] if image in self._held else None

    def held_by(self, client: str) -> list[str]:
        """The images of a client."""
        with self._lock:
            self._expire()
            return sorted(image for image, (owner, _) in self._held.items() if owner == client)

    def all(self) -> dict[str, str]:
        """Image -> client."""
        with self._lock:
            self._expire()
            return {image: owner for image, (owner, _) in self._held.items()}

    def _expire(self) -> None:
        now = self._clock()
        for image, (client, until) in list(self._held.items()):
            if until <= now:
                del self._held[image]
            elif until > now + self._seconds:  # the clock went back; nobody holds an image for longer than one term
                self._held[image] = (client, now + self._seconds)

    def _load(self) -> dict[str, tuple[str, float]]:
        return load_state(self._file, _HELD.validate_json, dict, "All images are free again.")

    def _save(self) -> None:
        """A reservation that cannot be written still holds until the server stops."""
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._file, json.dumps(self._held))
        except OSError as err:
            logger.warning("Reservations are not kept on disk: %s", err)
