"""The sentences of pictures as people change them: ``text.csv`` written back by rename, and beside it who wrote what,
when, and what stood there before.

::

    <store>/sentences/log.jsonl     one JSON object per change; only ever appended to

The line is on disk before the table changes, so that no sentence is ever lost; if the table cannot be written, the line
is taken back. Whoever changes a sentence says which one was seen: if the table has another one by now, written from
another tab, by somebody else or in a spreadsheet, nothing changes and both are told.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict

from progidiff.errors import ConflictError, RequestError, StoreError
from progidiff.server.tasks.picture_engine import TEXT_TABLE
from progidiff.storage.atomic import flush, locked, replace_bytes
from progidiff.storage.json_text import Text
from progidiff.storage.state_files import note_damage

logger = logging.getLogger(__name__)

_MAX_SHOWN = 120


class SentenceChange(BaseModel):
    """One line of the history.

    Attributes:
        time: UTC, ISO 8601.
        image: Id of the picture.
        file: Its file name.
        user: Who changed it; "" if nobody had to log in.
        former: What stood there; "" for nothing.
        sentence: What stands there now; "" for nothing.
    """

    model_config = ConfigDict(frozen=True)

    time: Text
    image: Text
    file: Text
    user: Text
    former: Text
    sentence: Text


class SentenceEditor:
    """Changes ``text.csv`` of a studies folder; safe for threads and for several processes.

    Args:
        folder: Of the images; None if they lie in no folder.
        history: Folder of the history; made at the first change.
    """

    def __init__(self, folder: Path | None, history: Path) -> None:
        self._table = None if folder is None else folder / TEXT_TABLE
        self._log = history / "log.jsonl"
        self._lock_file = history / "log.lock"
        self._mutex = threading.Lock()

    @property
    def is_possible(self) -> bool:
        """Whether there is a folder that a table may lie in."""
        return self._table is not None

    def find_changes(self, image: str) -> list[SentenceChange]:
        """The changes of a picture's sentence, newest first."""
        return [change for change in reversed(self._read()) if change.image == image]

    def change(self, image: str, file: str, sentence: str | None, former: str, user: str) -> str:
        """Write a sentence into the table.

        Args:
            image: Id of the picture.
            file: Its file name.
            sentence: The new one; None to take it away.
            former: The one that the person saw; "" for none.
            user: Who changes it.

        Returns:
            The sentence as it stands now; "" for none.

        Raises:
            RequestError: if the sentence or the table is refused.
            ConflictError: if the table has neither the new sentence nor the one that was seen.
            StoreError: if the disk refuses; nothing has changed then.
            BusyError: if another process holds the table for too long.
        """
        from progidiff.textdiff.sentence_table import NEW_TABLE, change_sentence, check_sentence
        from progidiff.textdiff.sentences import find_sentence, read_sentences

        if self._table is None:
            raise RequestError("The images lie in no folder, so no table of sentences can lie beside them.")
        wanted = None if sentence is None else check_sentence(sentence)
        with self._mutex, locked(self._lock_file, "Another process has been changing a sentence"):
            before = self._read_table()
            known = {} if before is None else read_sentences(self._table)
            present = " ".join((find_sentence(known, file) or "").split())
            if present == (wanted or ""):
                return present
            if present != " ".join(former.split()):
                raise ConflictError(_describe_conflict(image, present, self.find_changes(image)))
            after = change_sentence(NEW_TABLE if before is None else before, TEXT_TABLE, file, wanted)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            change = SentenceChange(time=now, image=image, file=file, user=user, former=present, sentence=wanted or "")
            with self._appended(change):
                if self._read_table() != before:
                    raise ConflictError(f"The table {TEXT_TABLE} was saved by another program just now. Save again.")
                self._write_table(after)
        logger.info("The sentence of '%s' was changed by '%s'", image, user)
        return wanted or ""

    def _read_table(self) -> bytes | None:
        """None if there is no table."""
        assert self._table is not None
        try:
            return self._table.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as err:
            raise RequestError(
                f"The table {TEXT_TABLE} cannot be read ({err.strerror}). Check who may read it."
            ) from err

    def _write_table(self, content: bytes) -> None:
        assert self._table is not None
        target = self._table.resolve()  # A link to the table stays a link.
        try:
            mode = target.stat().st_mode & 0o777 if target.exists() else 0o666
            replace_bytes(target, content, mode=mode)
        except OSError as err:
            raise StoreError(
                f"{TEXT_TABLE} could not be written ({err.strerror}); the sentence was not saved. Free some disk "
                "space, or check who may write into the folder of the images."
            ) from err

    @contextlib.contextmanager
    def _appended(self, change: SentenceChange) -> Iterator[None]:
        """Have a line at the end of the log; after an exception in the block it is not there."""
        line = (change.model_dump_json() + "\n").encode()
        try:
            self._log.parent.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab+") as file:
                size = file.seek(0, os.SEEK_END)
                if size and _read_last(file, size) != b"\n":
                    line = b"\n" + line  # What a crash left of a line stays a line of its own.
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            if size == 0:
                flush(self._log.parent)
        except OSError as err:
            raise StoreError(
                f"The history of sentences could not be written ({err.strerror}); the sentence was not saved. Free "
                "some disk space and save again."
            ) from err
        try:
            yield
        except BaseException:
            os.truncate(self._log, size)
            raise

    def _read(self) -> list[SentenceChange]:
        try:
            lines = self._log.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as err:
            note_damage(self._log, str(err), "The history of sentences is not shown.")
            return []
        changes = []
        for number, line in enumerate(lines, start=1):
            try:
                changes.append(SentenceChange.model_validate(json.loads(line)))
            except ValueError:  # A line that a crash cut off, or that somebody changed: the others count.
                note_damage(self._log, f"line {number} is damaged", "This one change of a sentence is not shown.")
        return changes


def _read_last(file: BinaryIO, size: int) -> bytes:
    file.seek(size - 1)
    return file.read(1)


def _describe_conflict(image: str, present: str, changes: list[SentenceChange]) -> str:
    last = changes[0] if changes and changes[0].sentence == present else None
    who = f" by {last.user}" if last is not None and last.user else ""
    now = f"It is now: '{present[:_MAX_SHOWN]}'" if present else "There is none now"
    return (
        f"The sentence of '{image}' was changed meanwhile{who}. {now}. Look at it, then save yours again to replace "
        "it; nothing of yours is lost."
    )
