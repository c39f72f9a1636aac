"""Who labels which image: a folder that all processes see, in which each claims one image after the other.

Nobody has a fixed share: whoever is free takes the next image, so that slow images and slow machines hold nobody up,
and a process that dies loses only what it had in hand. A claim is a file that only one process can make. Its owner says
by the time of another file, again and again, that it is alive; when it has been silent for `EXPIRY_SECONDS`, or is seen
to have ended (on the same machine at once), its claims are anybody's again. What was finished stays finished as long
as any process is at work; the first one to come to a folder where nobody is begins anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType

from progidiff.errors import StoreError
from progidiff.evaluation.prelabel import Item
from progidiff.storage.atomic import is_owner_gone, locked, name_owner, replace_text

EXPIRY_SECONDS = 120.0
"""Silence of an owner on another machine after which its claims are anybody's."""

_BEAT = 6
"""Signs of life in the time of expiry."""

_OWNER, _CLAIM, _DONE = ".owner", ".claim", ".done"
_FAILED = "failed"
_STOP = "stopped.txt"


class Claims:
    """What this process claims; safe for threads. A context manager.

    Args:
        folder: Seen by all processes of the run, under any path; made if absent.
        expiry: Seconds, see `EXPIRY_SECONDS`.

    Raises:
        StoreError: if nothing can be written there.
    """

    def __init__(self, folder: Path, expiry: float = EXPIRY_SECONDS) -> None:
        self._folder = folder
        self._expiry = expiry
        self._name = name_owner()
        self._mine = folder / f"{self._name}{_OWNER}"
        self._held: set[str] = set()
        self._ended = threading.Event()
        try:
            (folder / _FAILED).mkdir(parents=True, exist_ok=True)
            with self._lock():
                if not self._others():
                    self._begin_anew()
                self._mine.write_text("", encoding="utf-8")
        except OSError as err:
            raise StoreError(
                f"'{folder}' cannot be written ({err}). Name a folder that all processes may write with --claims."
            ) from err
        self._beat = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
        self._beat.start()

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def take(self, image: str) -> bool:
        """Claim an image; False if somebody else has it, or it is done."""
        if self.is_done(image):
            return False
        claim = self._file(image, _CLAIM)
        try:
            handle = os.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            if not self._take_over(claim):
                return False
        else:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(self._name)
        if self.is_done(image):  # Its last owner finished between the two looks.
            claim.unlink(missing_ok=True)
            return False
        self._held.add(image)
        return True

    def finish(self, images: Iterable[str]) -> None:
        """Say that images need nobody any more."""
        for image in images:
            # Done before free: nobody finds it neither claimed nor done.
            self._file(image, _DONE).write_text("", encoding="utf-8")
            self._release(image)

    def fail(self, image: str) -> None:
        """Count an image that failed, for the budget of all processes."""
        (self._folder / _FAILED / self._hash(image)).write_text(image, encoding="utf-8")

    def is_done(self, image: str) -> bool:
        """Whether somebody finished an image."""
        return self._file(image, _DONE).exists()

    def count_failed(self) -> int:
        """How many images failed, of all processes."""
        return len(os.listdir(self._folder / _FAILED))

    def stop(self, reason: str) -> None:
        """End the run of all processes."""
        replace_text(self._folder / _STOP, reason, durable=False)

    def find_stop(self) -> str:
        """Why some process ended the run of all; "" if none did."""
        try:
            return (self._folder / _STOP).read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""

    def close(self) -> None:
        """Give back what is not finished."""
        if self._ended.is_set():
            return
        self._ended.set()
        for image in list(self._held):
            self._release(image)
        with contextlib.suppress(OSError):
            self._mine.unlink(missing_ok=True)
        self._beat.join()

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        return locked(self._folder / ".lock", f"Another process has been at the claims in '{self._folder}'")

    def _others(self) -> list[Path]:
        """Signs of life of other processes; those of the dead are removed."""
        found = []
        for file in self._folder.glob(f"*{_OWNER}"):
            if self._is_dead(file.name.removesuffix(_OWNER)):
                file.unlink(missing_ok=True)
            else:
                found.append(file)
        return found

    def _begin_anew(self) -> None:
        for file in [*self._folder.iterdir(), *(self._folder / _FAILED).iterdir()]:
            if file.is_file() and file.name != ".lock":
                file.unlink(missing_ok=True)

    def _take_over(self, claim: Path) -> bool:
        """Take a claim whose owner is dead."""
        if not self._is_ownerless(claim):
            return False
        with self._lock():
            if not self._is_ownerless(claim):
                return False
            replace_text(claim, self._name, durable=False)
            return True

    def _is_ownerless(self, claim: Path) -> bool:
        try:
            owner = claim.read_text(encoding="utf-8")
            if not owner:  # Being written, or its writer died at that moment.
                return self._find_age(claim) > self._expiry
        except FileNotFoundError:
            return False  # Just given back, or finished: looked at again.
        return owner != self._name and self._is_dead(owner)

    def _is_dead(self, owner: str) -> bool:
        if is_owner_gone(owner):
            return True
        try:
            return self._find_age(self._folder / f"{owner}{_OWNER}") > self._expiry
        except FileNotFoundError:
            return True

    def _find_age(self, file: Path) -> float:
        """Seconds since a file was touched, by the clock of whoever keeps the folder: machines' own differ."""
        probe = self._mine if self._mine.exists() else self._folder / ".lock"
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime

    def _keep_alive(self) -> None:
        while not self._ended.wait(self._expiry / _BEAT):
            with contextlib.suppress(OSError):  # A file server that is away for a moment; the next sign may reach it.
                os.utime(self._mine)

    def _release(self, image: str) -> None:
        self._held.discard(image)
        claim = self._file(image, _CLAIM)
        with contextlib.suppress(OSError):
            if claim.read_text(encoding="utf-8") == self._name:
                claim.unlink(missing_ok=True)

    def _file(self, image: str, suffix: str) -> Path:
        return self._folder / f"{self._hash(image)}{suffix}"

    @staticmethod
    def _hash(image: str) -> str:
        return hashlib.sha256(image.encode()).hexdigest()[:40]


class Supply:
    """The images of a run, one after the other, as far as nobody else has them.

    Args:
        items: All of them.
        claims: Who has which.
        index, count: Of this process: each begins elsewhere, so that they rarely ask for the same.
        on_idle: Called when others have all that is left: they may wait for this process, too.
    """

    def __init__(
        self,
        items: Sequence[Item],
        claims: Claims,
        index: int = 0,
        count: int = 1,
        on_idle: Callable[[], None] = lambda: None,
    ) -> None:
        start = len(items) * index // max(1, count)
        self._waiting = deque([*items[start:], *items[:start]])
        self._claims = claims
        self._on_idle = on_idle

    def take(self) -> Item | None:
        """The next image; None if there is none just now."""
        if self._claims.find_stop():
            self.end()
        for _ in range(len(self._waiting)):
            item = self._waiting.popleft()
            if self._claims.take(item.image):
                return item
            if not self._claims.is_done(item.image):
                self._waiting.append(item)
        if self._waiting:
            self._on_idle()
        return None

    @property
    def is_empty(self) -> bool:
        """Whether every image is done or in this process's hands."""
        return not self._waiting

    def end(self) -> None:
        """Give out no image any more."""
        self._waiting.clear()
