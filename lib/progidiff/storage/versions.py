"""Versions of trained weights on disk: immutable folders, and a pointer to the one that is served.

::

    <root>/<name>/
      1/, 2/, 3/ ...   weights, card, run.json, README.md; written once, never changed
      CURRENT          which version is served, and which ones were before it; moved into place by a rename
      history.jsonl    what happened and when; only ever appended to

A reader sees a version whole or not at all, also after a power cut and from another process: a folder is written under
a temporary name, flushed and renamed. Numbers count up and are never given twice, not even after somebody deleted a
folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from progidiff.errors import ModelError, NotFoundError, RequestError, StoreError
from progidiff.storage.atomic import atomic_folder, locked, remove_leftovers, replace_bytes

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")


class VersionCard(Protocol):
    """What the card of a version must say.

    Attributes:
        name, version: Shown as ``name@version``; versions count 1, 2, 3.
        sha256: Of the weights, see `hash_weights`.
        kind: "lora", "full" or "head".
        modality: Of the images it answers for: "CT", "MR" or "picture".
        structures: Names it was trained on.
        base: Content of the model it belongs to.
        base_name: The same for people.
        created: ISO time, UTC.
    """

    @property
    def name(self) -> str:
        """See above."""

    @property
    def version(self) -> int:
        """See above."""

    @property
    def sha256(self) -> str:
        """See above."""

    @property
    def kind(self) -> str:
        """See above."""

    @property
    def modality(self) -> str:
        """See above."""

    @property
    def structures(self) -> tuple[str, ...]:
        """See above."""

    @property
    def base(self) -> str:
        """See above."""

    @property
    def base_name(self) -> str:
        """See above."""

    @property
    def created(self) -> str:
        """See above."""

    @property
    def full_name(self) -> str:
        """See above."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the card's file."""


C = TypeVar("C", bound=VersionCard)


@dataclass(frozen=True)
class VersionEntry:
    """One name in the list of a store.

    Attributes:
        name: Of what has versions.
        versions: Numbers on disk, ascending.
        current: The version that is served; None if none is.
        published: When `current` became current, seconds since 1970.
        problem: Why `current` cannot be used; empty if it can.
    """

    name: str
    versions: tuple[int, ...]
    current: int | None
    published: float
    problem: str = ""


@dataclass(frozen=True)
class _Pointer:
    """What CURRENT says; `before` is what rollback goes back through, oldest first."""

    version: int | None
    before: tuple[int | None, ...]
    time: float


class VersionStore(ABC, Generic[C]):
    """A folder of names with versions; safe for several processes.

    Attributes:
        noun: What has versions, for messages.
        weights_file, card_file: Their names in a version's folder; see `weights_files` for several.
        command: Of the command line, with "list", "use" and "rollback".
        trainer: The command that makes a version.
        example: A name, for messages.
        reserved: Words that requests use for something else; nothing may be named so.
        without: What a request asks for to have none, for messages; "" if it must have one.

    Args:
        root: The folder; made when the first version is added, so that a model folder may be read-only.
    """

    noun: str
    weights_file: str
    card_file: str
    command: str
    trainer: str
    example: str
    reserved: tuple[str, ...] = ()
    without: str = ""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._cards: dict[tuple[Path, int, int], C] = {}

    def weights_files(self, card: C) -> tuple[str, ...]:
        """The names of the files that hold the weights of a version."""
        return (self.weights_file,)

    def files(self, card: C) -> tuple[str, ...]:
        """What a version's folder must hold, beside its card."""
        return *self.weights_files(card), "run.json", "README.md"

    @abstractmethod
    def read_card(self, values: dict[str, Any]) -> C:
        """The card from what its file holds. May raise KeyError, TypeError, ValueError or ModelError."""

    def read_dice(self, run: Mapping[str, Any]) -> Mapping[str, Mapping[str, float | None]]:
        """Dice on what was held back, from a run.json: "base" (what there was without training), "current" (what was
        served) and "adapted" (the version) -> figure, of which "consensus" is the mean; empty if nothing was measured.
        """
        return run.get("validation") or {}

    def count_slices(self, run: Mapping[str, Any]) -> int:
        """How many slices a version learned from, from its run.json; a picture is one."""
        return sum(len(slices) for slices in (run.get("training_slices") or {}).values())

    def check_base(self, card: C, base: str) -> None:
        """Refuse a version of another model.

        Args:
            card: Of the version.
            base: Content of the model that is loaded, see `VersionCard`.

        Raises:
            ModelError: if the version belongs to another one.
        """
        if card.base != base:
            otherwise = f", or ask for {self.without}" if self.without else ""
            raise ModelError(
                f"{self.noun} '{card.full_name}' was trained for another base ({card.base_name}, content "
                f"{card.base[:12]}) than the one that is loaded (content {base[:12]}). Train one for this base with "
                f"`{self.trainer} --name {card.name}`{otherwise}."
            )

    def cure(self, name: str) -> str:
        """The last sentence of a message about damaged files."""
        return f"Restore it from a backup, or go back with `{self.command} rollback {name}`."

    def check_name(self, name: str) -> str:
        """Refuse a name that would not do as a folder or is a word of the requests.

        Raises:
            RequestError: saying what a name may hold.
        """
        what = f"{'an' if self.noun[0] in 'AEIOU' else 'a'} {self.noun.lower()}"
        if not _NAME.fullmatch(name):
            raise RequestError(
                f"'{name[:64]}' cannot name {what}: use letters, digits, '.', '_' and "
                "'-', start with a letter or digit, at most 64."
            )
        if name.lower() in self.reserved:
            raise RequestError(
                f"'{name}' cannot name {what}: requests use this word for something else. "
                f"Choose another, for example '{self.example}'."
            )
        return name

    def _add(
        self,
        name: str,
        weights: Mapping[str, bytes],
        make_card: Callable[[int, str, str], C],
        run: Mapping[str, Any],
        readme: Callable[[C], str],
        beside: Mapping[str, bytes] | None = None,
    ) -> C:
        """Write a new version. It is not published.

        Args:
            name: Letters, digits, dot, underscore, hyphen.
            weights: Content of the weights' files, by name in the version's folder.
            make_card: (version, time of creation, `hash_weights`) -> the card.
            run: Configuration, command, commit, package versions, data hashes, parent version, metrics.
            readme: Makes the card for people.
            beside: Other files, by name.

        Raises:
            RequestError: if the name cannot be used.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        self.check_name(name)
        folder = self.root / name
        with (
            self._locked(name),
            disk_errors(f"A new version of {self.noun.lower()} '{name}' could not be written into '{folder}'"),
        ):
            remove_leftovers(folder)
            numbers = (int(event["version"] or 0) for event in self.history(name))
            version = 1 + max([0, *self._version_numbers(name), *numbers])
            now = datetime.now(UTC).isoformat(timespec="seconds")
            card = make_card(version, now, hash_weights(weights))
            with atomic_folder(folder / str(version)) as scratch:
                for file, content in {**weights, **(beside or {})}.items():
                    (scratch / file).parent.mkdir(exist_ok=True)
                    (scratch / file).write_bytes(content)
                (scratch / "run.json").write_bytes(to_json(run))
                (scratch / "README.md").write_text(readme(card), encoding="utf-8")
                (scratch / self.card_file).write_bytes(to_json(card.to_dict()))
                for path in scratch.rglob("*"):
                    if path.is_file():
                        path.chmod(0o444)
                # First the number, then the folder: a crash between them wastes a number instead of giving it
                # twice.
                self._log(name, "added", version)
        logger.info("Wrote %s %s", self.noun.lower(), card.full_name)
        return card

    def publish(self, name: str, version: int) -> C:
        """Make a version the one that is served.

        Raises:
            NotFoundError: if there is no such version.
            ModelError: if the version is damaged; it is not published then.
            StoreError: if the disk refuses; the served version stays then.
        """
        self.check_name(name)
        self._check_exists(name)
        with self._locked(name):
            card = self.card(name, version)
            self._read(card)
            try:
                pointer = self._pointer(name)
            except ModelError as err:
                logger.warning("%s It is replaced.", err)
                pointer = _Pointer(None, (), 0.0)
            if pointer.version != version:
                self._move(
                    name, _Pointer(version, (*pointer.before, pointer.version), self._publication_time()), "published"
                )
        return card

    def rollback(self, name: str) -> int | None:
        """Go back to the version that was served before the present one.

        Returns:
            Its number; None if no version was: the model itself is served again then.

        Raises:
            NotFoundError: if there is no such name, or nothing to go back to.
            ModelError: if the version to go back to is damaged; the served one stays.
        """
        self.check_name(name)
        self._check_exists(name)
        with self._locked(name):
            pointer = self._pointer(name)
            if not pointer.before:
                raise NotFoundError(
                    f"{self.noun} '{name}' has no earlier version to go back to. "
                    f"`{self.command} list` shows what there is."
                )
            *before, version = pointer.before
            if version is not None:
                self._read(self.card(name, version))
            self._move(name, _Pointer(version, tuple(before), self._publication_time()), "rolled back")
        return version

    def current(self, name: str) -> int | None:
        """The version that is served, None if none is. Reads one small file.

        Raises:
            ModelError: if CURRENT is damaged.
        """
        self.check_name(name)
        return self._pointer(name).version

    def card(self, name: str, version: int) -> C:
        """What a version is, from its card.

        Raises:
            NotFoundError: if there is no such version; the message names those there are.
            ModelError: if a file of it is missing or damaged.
        """
        self.check_name(name)
        folder = self.root / name / str(version)
        if not folder.is_dir():
            there = ", ".join(map(str, self._version_numbers(name)))
            if not there:
                raise NotFoundError(self._no_such(name))
            raise NotFoundError(f"{self.noun} '{name}' has no version {version}; there are: {there}.")
        self._check_there(name, version, (self.card_file,))
        path = folder / self.card_file
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._cards:
            try:
                card = self.read_card(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise ModelError(f"'{path}' cannot be read ({type(err).__name__}: {err}). {self.cure(name)}") from err
            if (card.name, card.version) != (name, version):
                raise ModelError(
                    f"'{path}' says {card.full_name}; a version folder must keep its name. {self.cure(name)}"
                )
            self._cards[key] = card
        card = self._cards[key]
        self._check_there(name, version, self.files(card))
        return card

    def find(self, reference: str) -> C:
        """``name`` -> its served version, ``name@version`` -> that one.

        Raises:
            NotFoundError: if there is none; the message names what there is.
            ModelError: if it is damaged.
        """
        name, at, version = reference.partition("@")
        if not _NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
            raise NotFoundError(
                f"'{reference[:64]}' names no {self.noun.lower()}; write name or name@version, for example "
                f"{self.example}@2. {self._available()}"
            )
        if at:
            return self.card(name, int(version))
        if not self._version_numbers(name):
            raise NotFoundError(self._no_such(name))
        current = self._pointer(name).version
        if current is None:
            there = ", ".join(f"{name}@{v}" for v in self._version_numbers(name))
            raise NotFoundError(
                f"{self.noun} '{name}' has no published version. Ask for one by number "
                f"({there}), or `{self.command} use` one."
            )
        return self.card(name, current)

    def folder(self, card: C) -> Path:
        """Where a version lies."""
        return self.root / card.name / str(card.version)

    def entries(self) -> list[VersionEntry]:
        """All names; never raises for one that is damaged."""
        return [self.entry(name) for name in self._names()]

    def find_newest(self) -> VersionEntry | None:
        """Of the names with a served version, the one whose version was published last; None if there is none."""
        served = [entry for entry in self.entries() if entry.current is not None]
        return max(served, key=lambda entry: (entry.published, entry.name), default=None)

    def entry(self, name: str) -> VersionEntry:
        """One line of `entries`."""
        versions = self._version_numbers(name)
        try:
            pointer = self._pointer(name)
        except ModelError as err:
            return VersionEntry(name, versions, None, 0.0, str(err))
        try:
            if pointer.version is not None:
                self.card(name, pointer.version)
        except (ModelError, NotFoundError) as err:
            return VersionEntry(name, versions, pointer.version, pointer.time, str(err))
        return VersionEntry(name, versions, pointer.version, pointer.time)

    def history(self, name: str) -> list[dict[str, Any]]:
        """What happened, oldest first: "time" (ISO, UTC), "event", "version", "before". Lines that cannot be read are
        left out.
        """
        try:
            lines = (self.root / name / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        events = []
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                event = json.loads(line)
                events.append({**event, "version": None if event["version"] is None else int(event["version"])})
        return events

    def run(self, card: C) -> dict[str, Any]:
        """run.json of a version.

        Raises:
            ModelError: if it cannot be read.
        """
        path = self.folder(card) / "run.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            raise ModelError(f"'{path}' cannot be read ({err}). {self.cure(card.name)}") from err

    def find_run(self, name: str, fingerprint: str) -> C | None:
        """The newest version whose run.json has this "fingerprint": the version that the very same training made, if it
        was done before.
        """
        for version in reversed(self.entry(name).versions):
            try:
                card = self.card(name, version)
                if self.run(card).get("fingerprint") == fingerprint:
                    return card
            except (ModelError, NotFoundError) as err:
                logger.warning("%s", err)
        return None

    def publish_once(self, card: C) -> None:
        """Publish a version unless it ever was, so that a rollback is not undone by repeating the training that made
        it.

        Raises:
            NotFoundError, ModelError, StoreError: see `publish`.
        """
        if not any(
            event["event"] == "published" and event["version"] == card.version for event in self.history(card.name)
        ):
            self.publish(card.name, card.version)

    def _names(self) -> list[str]:
        try:
            return sorted(
                p.name
                for p in self.root.iterdir()
                if p.is_dir() and _NAME.fullmatch(p.name) and self._version_numbers(p.name)
            )
        except OSError:
            return []

    def _version_numbers(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(
                sorted(int(p.name) for p in (self.root / name).iterdir() if _VERSION.fullmatch(p.name) and p.is_dir())
            )
        except OSError:
            return ()

    def _check_there(self, name: str, version: int, files: Sequence[str]) -> None:
        folder = self.root / name / str(version)
        missing = [file for file in files if not (folder / file).is_file()]
        if missing:
            raise ModelError(
                f"Version {name}@{version} is incomplete: {', '.join(missing)} is missing "
                f"in '{folder}'. {self.cure(name)}"
            )

    def _check_exists(self, name: str) -> None:
        if not self._version_numbers(name):
            raise NotFoundError(self._no_such(name))

    def _available(self) -> str:
        names = [entry.name for entry in self.entries()]
        return (
            f"There are: {', '.join(names)}."
            if names
            else f"'{self.root}' holds none yet; `{self.trainer}` trains one."
        )

    def _no_such(self, name: str) -> str:
        return f"There is no {self.noun.lower()} '{name}'. {self._available()}"

    def _read(self, card: C) -> dict[str, bytes]:
        """The files with weights, by name, as they were written."""
        contents = {}
        for file in self.weights_files(card):
            path = self.folder(card) / file
            try:
                contents[file] = path.read_bytes()
            except OSError as err:
                raise ModelError(f"'{path}' cannot be read ({err}). {self.cure(card.name)}") from err
        if hash_weights(contents) != card.sha256:
            path = self.folder(card) / next(iter(contents))
            raise ModelError(
                f"'{path}' is damaged: its content is not the one that {self.card_file} "
                f"vouches for. {self.cure(card.name)}"
            )
        return contents

    def _pointer(self, name: str) -> _Pointer:
        path = self.root / name / "CURRENT"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            before = tuple(None if v is None else int(v) for v in values["before"])
            version = values["version"]
            return _Pointer(None if version is None else int(version), before, float(values["time"]))
        except (FileNotFoundError, NotADirectoryError):
            return _Pointer(None, (), 0.0)
        except (OSError, ValueError, KeyError, TypeError) as err:
            raise ModelError(
                f"'{path}' cannot be read ({type(err).__name__}). Set it again with "
                f"`{self.command} use {name}@VERSION`."
            ) from err

    def _move(self, name: str, pointer: _Pointer, event: str) -> None:
        folder = self.root / name
        with disk_errors(f"CURRENT of {self.noun.lower()} '{name}' could not be moved"):
            self._log(name, event, pointer.version, pointer.before)
            content = {"version": pointer.version, "before": list(pointer.before), "time": pointer.time}
            replace_bytes(folder / "CURRENT", to_json(content))

    def _publication_time(self) -> float:
        """Now, but after every publication so far: `AdapterStore.pick_for` goes by it, and clocks are set back."""
        latest = 0.0
        for name in self._names():
            with contextlib.suppress(ModelError):  # Damaged: it is not picked.
                latest = max(latest, self._pointer(name).time)
        return max(time.time(), latest + 1e-3)

    def _log(self, name: str, event: str, version: int | None, before: tuple[int | None, ...] = ()) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            "version": version,
            "before": list(before),
        }
        with (self.root / name / "history.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        holder = f"Another process has been changing {self.noun.lower()} '{name}'"
        with locked(self.root / name / ".lock", holder):
            yield


def hash_weights(contents: Mapping[str, bytes]) -> str:
    """SHA-256 of the only file; of several, that of the lines ``<SHA-256>  <name>`` in the order of the names.

    Example:
        >>> hash_weights({"a": b""})[:8], hash_weights({"a": b"", "b": b""})[:8]
        ('e3b0c442', 'f87e14d5')
    """
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def to_json(values: Any) -> bytes:
    """JSON as the files of a version have it."""
    return (json.dumps(values, indent=1) + "\n").encode()


@contextlib.contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """An `OSError` as a `StoreError` that begins with `what`."""
    try:
        yield
    except OSError as err:
        raise StoreError(
            f"{what} ({err}). Free some disk space or check who may write there; what was there before is untouched."
        ) from err
