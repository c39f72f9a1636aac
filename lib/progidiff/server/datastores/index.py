"""What the datastore knows of its images, in SQLite: a change writes its own rows, however many images there are.

The host keeps the same in one JSON file, which it writes whole; see `progidiff.server.datastores.host_file`.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from progidiff.errors import StoreError
from progidiff.storage.state_files import note_damage, set_aside

_SCHEMA = """
CREATE TABLE IF NOT EXISTS images (id TEXT PRIMARY KEY, record TEXT, placed TEXT NOT NULL, revision INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS images_by_revision ON images (revision);
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True)
class FileState:
    """Which file it is, without reading it: another one, or another content, has another state.

    Attributes:
        inode: Its number on the disk.
        modified: When it was written, in ns.
        size: In bytes.
    """

    inode: int
    modified: int
    size: int

    @classmethod
    def of(cls, path: Path) -> FileState | None:
        """Of a file; None if there is none."""
        try:
            status = path.stat()
        except OSError:
            return None
        return cls(status.st_ino, status.st_mtime_ns, status.st_size)


@dataclass(frozen=True)
class Placed:
    """A label that this program put into a folder.

    Attributes:
        sequence: Of the save in the history; 0 if it has none.
        file: The file as it was then.
    """

    sequence: int
    file: FileState


@dataclass(frozen=True)
class Row:
    """What is known of an image.

    Attributes:
        record: As the host has it, JSON; None for an image that is gone.
        placed: By tag, what was put into the folders.
    """

    record: str | None
    placed: Mapping[str, Placed] = field(default_factory=dict)


class DatastoreIndex:
    """Rows by image, with a revision that counts up; for one thread at a time.

    A damaged file is set aside, and an empty index takes its place.

    Args:
        path: The file; made with the folder.

    Raises:
        StoreError: if it can be neither opened nor made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._refusals():
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = self._open()
        except StoreError:
            raise
        except sqlite3.DatabaseError as err:
            self._start_again(err)

    def load(self, after: int) -> tuple[int, dict[str, Row]]:
        """What changed after a revision.

        Returns:
            The revision now, lower than `after` if the index was lost meanwhile; the rows that changed since.

        Raises:
            StoreError: if the file cannot be read.
        """
        try:
            if FileState.of(self._path) is None:
                raise sqlite3.DatabaseError("it is gone")
            with self._refusals():
                (revision,) = self._connection.execute("SELECT coalesce(max(revision), 0) FROM images").fetchone()
                rows = self._connection.execute(
                    "SELECT id, record, placed FROM images WHERE revision > ? ORDER BY rowid",
                    (after if revision >= after else 0,),
                ).fetchall()
                return revision, {image: Row(record, _read_placed(placed)) for image, record, placed in rows}
        except (sqlite3.DatabaseError, ValueError, TypeError) as err:
            self._start_again(err)
            return 0, {}

    def list_records(self) -> dict[str, str]:
        """The record of every image that is there, as it was written.

        Raises:
            StoreError: if the file cannot be read.
        """
        with self._refusals():
            return dict(self._connection.execute("SELECT id, record FROM images WHERE record IS NOT NULL"))

    def save(self, rows: Mapping[str, Row]) -> int:
        """Replace rows, all of them or none.

        Returns:
            The new revision.

        Raises:
            StoreError: if the disk refuses; nothing has changed then.
        """
        with self._refusals(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            (revision,) = self._connection.execute("SELECT coalesce(max(revision), 0) + 1 FROM images").fetchone()
            self._connection.executemany(
                "INSERT INTO images VALUES (?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                "record = excluded.record, placed = excluded.placed, revision = excluded.revision",
                [(image, row.record, _write_placed(row.placed), revision) for image, row in rows.items()],
            )
            return int(revision)

    def get_note(self, name: str) -> str:
        """A value of `set_note`; "" if there is none."""
        with self._refusals():
            found = self._connection.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone()
        return "" if found is None else str(found[0])

    def set_note(self, name: str, value: str) -> None:
        """Keep a value.

        Raises:
            StoreError: if the disk refuses.
        """
        with self._refusals(), self._connection:
            self._connection.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value))

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def _open(self) -> sqlite3.Connection:
        with self._refusals():
            # Every use is under the datastore's lock. A journal of its own, no shared memory: folders may lie on a
            # network drive.
            connection = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode = TRUNCATE")
                connection.execute("PRAGMA synchronous = FULL")
                connection.executescript(_SCHEMA)
            except BaseException:
                connection.close()
                raise
            return connection

    def _start_again(self, err: Exception) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()
        kept = set_aside(self._path) if self._path.exists() else None
        journal = self._path.with_name(f"{self._path.name}-journal")
        if journal.exists():
            set_aside(journal)
        note_damage(
            self._path, str(err), "The list of images is made again from the host's file and the folders.", kept
        )
        self._connection = self._open()

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.OperationalError, OSError) as err:
            raise StoreError(
                f"'{self._path}' could not be used ({err}). Free some disk space, or check who may write there."
            ) from err


def _read_placed(text: str) -> dict[str, Placed]:
    return {
        str(tag): Placed(int(sequence), FileState(int(inode), int(modified), int(size)))
        for tag, (sequence, inode, modified, size) in json.loads(text).items()
    }


def _write_placed(placed: Mapping[str, Placed]) -> str:
    return json.dumps(
        {tag: (entry.sequence, entry.file.inode, entry.file.modified, entry.file.size) for tag, entry in placed.items()}
    )
