"""Versions of adapters on disk: immutable folders, and a pointer to the one that is served.

::

    <root>/<name>/
      1/, 2/, 3/ ...   adapter.safetensors, adapter.json, run.json, README.md; written once, never changed
      CURRENT          which version is served, and which ones were before it; moved into place by a rename
      history.jsonl    what happened and when; only ever appended to

A reader sees a version whole or not at all, also after a power cut and from another process: a folder is written under a
temporary name, flushed and renamed. Numbers count up and are never given twice, not even after somebody deleted a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from progidiff.conditioning import ConditioningBranch
from progidiff.errors import BusyError, ModelError, NotFoundError, RequestError, StoreError
from progidiff.files import flush
from progidiff.lora import LoraSettings, load_full, merge_lora
from progidiff.model_files import compute_conditioning_digest, load_card

logger = logging.getLogger(__name__)

FORMAT = 1
FILES = ("adapter.safetensors", "adapter.json", "run.json", "README.md")
RESERVED = ("auto", "none")
"""Words that a request uses for "choose by modality" and "the model itself"; no adapter may be named so."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_VERSION = re.compile(r"[1-9][0-9]{0,8}")
_WRITING = ".writing-"
_STALE_SECONDS = 3600.0

Kind = Literal["lora", "full"]


@dataclass(frozen=True)
class AdapterCard:
    """``adapter.json``: what a version is, without its weights.

    Attributes:
        name, version: Shown as ``name@version``; versions count 1, 2, 3.
        kind: "lora": updates of some layers; "full": all weights of the conditioning branch (and maybe of the denoiser).
        modality: "CT" or "MR", the images it was trained on and is picked for.
        structures: Names it was trained on.
        base: Content of the model it belongs to, see `compute_base_digest`.
        base_name: The same for people, ``name@version``.
        created: ISO time, UTC.
        sha256: Of adapter.safetensors.
        lora: Rank, alpha and targets; None for kind "full".
    """

    name: str
    version: int
    kind: Kind
    modality: str
    structures: tuple[str, ...]
    base: str
    base_name: str
    created: str
    sha256: str
    lora: LoraSettings | None = None

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for adapter.json."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {"format": FORMAT, **values, "structures": list(self.structures), "lora": None if self.lora is None else self.lora.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdapterCard:
        """The inverse of `to_dict`."""
        if values["format"] != FORMAT:
            raise ModelError(f"This adapter has format {values['format']}, this program reads {FORMAT}; install the version that wrote it.")
        plain = {k: values[k] for k in cls.__dataclass_fields__}
        if plain["kind"] not in ("lora", "full"):
            raise ValueError(f"kind {plain['kind']!r}")
        lora = None if plain["lora"] is None else LoraSettings.from_dict(plain["lora"])
        return cls(**{**plain, "version": int(plain["version"]), "structures": tuple(plain["structures"]), "lora": lora})


@dataclass(frozen=True)
class AdapterEntry:
    """One name in the list of adapters.

    Attributes:
        name: Of the adapter.
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


class AdapterStore:
    """A folder of adapters; safe for several processes.

    Args:
        root: The folder; made when the first version is added, so that a model folder may be read-only.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._cards: dict[tuple[Path, int, int], AdapterCard] = {}

    def add(
        self,
        name: str,
        kind: Kind,
        tensors: Mapping[str, Tensor],
        *,
        modality: str,
        structures: tuple[str, ...],
        base: str,
        base_name: str,
        run: Mapping[str, Any],
        readme: Callable[[AdapterCard], str],
        lora: LoraSettings | None = None,
    ) -> AdapterCard:
        """Write a new version. It is not published.

        Args:
            name: Letters, digits, dot, underscore, hyphen.
            tensors: From `lora.collect_tensors` or `lora.collect_full`.
            run: Configuration, command, commit, package versions, data hashes, parent version, metrics.
            readme: Makes the card for people.

        Returns:
            The card, with the number the version got.

        Raises:
            RequestError: if the name cannot be used.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        check_name(name)
        if (kind == "lora") == (lora is None):
            raise RequestError(f"A version of kind '{kind}' {'needs' if kind == 'lora' else 'has no'} rank, alpha and targets.")
        content = save_safetensors({n: t.contiguous() for n, t in tensors.items()})
        folder = self.root / name
        scratch: Path | None = None
        with self._locked(name), _disk_errors(f"A new version of adapter '{name}' could not be written into '{folder}'"):
            try:
                self._remove_leftovers(folder)
                version = 1 + max([0, *self._version_numbers(name), *(int(e["version"] or 0) for e in self.history(name))])
                card = AdapterCard(
                    name=name,
                    version=version,
                    kind=kind,
                    modality=modality,
                    structures=tuple(structures),
                    base=base,
                    base_name=base_name,
                    created=datetime.now(UTC).isoformat(timespec="seconds"),
                    sha256=hashlib.sha256(content).hexdigest(),
                    lora=lora,
                )
                scratch = Path(tempfile.mkdtemp(prefix=_WRITING, dir=folder))
                _write(scratch / "adapter.safetensors", content)
                _write(scratch / "run.json", _to_json(run))
                _write(scratch / "README.md", readme(card).encode())
                _write(scratch / "adapter.json", _to_json(card.to_dict()))
                for file in scratch.iterdir():
                    file.chmod(0o444)
                scratch.chmod(0o755)
                flush(scratch)
                # First the number, then the folder: a crash between them wastes a number instead of giving it twice.
                self._log(name, "added", version)
                os.replace(scratch, folder / str(version))
                flush(folder)
            finally:
                if scratch is not None:
                    shutil.rmtree(scratch, ignore_errors=True)
        logger.info("Wrote adapter %s", card.full_name)
        return card

    def publish(self, name: str, version: int) -> AdapterCard:
        """Make a version the one that is served.

        Raises:
            NotFoundError: if there is no such version.
            ModelError: if the version is damaged; it is not published then.
            StoreError: if the disk refuses; the served version stays then.
        """
        check_name(name)
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
                self._move(name, _Pointer(version, (*pointer.before, pointer.version), self._publication_time()), "published")
        return card

    def rollback(self, name: str) -> int | None:
        """Go back to the version that was served before the present one.

        Returns:
            Its number; None if no version was: the model itself is served again then.

        Raises:
            NotFoundError: if there is no such adapter, or nothing to go back to.
            ModelError: if the version to go back to is damaged; the served one stays.
        """
        check_name(name)
        self._check_exists(name)
        with self._locked(name):
            pointer = self._pointer(name)
            if not pointer.before:
                raise NotFoundError(f"Adapter '{name}' has no earlier version to go back to. `progidiff adapters list` shows what there is.")
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
        check_name(name)
        return self._pointer(name).version

    def card(self, name: str, version: int) -> AdapterCard:
        """What a version is, from its adapter.json.

        Raises:
            NotFoundError: if there is no such version; the message names those there are.
            ModelError: if a file of it is missing or damaged.
        """
        check_name(name)
        folder = self.root / name / str(version)
        if not folder.is_dir():
            there = ", ".join(map(str, self._version_numbers(name)))
            if not there:
                raise NotFoundError(self._no_such(name))
            raise NotFoundError(f"Adapter '{name}' has no version {version}; there are: {there}.")
        missing = [file for file in FILES if not (folder / file).is_file()]
        if missing:
            raise ModelError(f"Version {name}@{version} is incomplete: {', '.join(missing)} is missing in '{folder}'. {_cure(name)}")
        path = folder / "adapter.json"
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if key not in self._cards:
            try:
                card = AdapterCard.from_dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise ModelError(f"'{path}' cannot be read ({type(err).__name__}: {err}). {_cure(name)}") from err
            if (card.name, card.version) != (name, version):
                raise ModelError(f"'{path}' says {card.full_name}; a version folder must keep its name. {_cure(name)}")
            self._cards[key] = card
        return self._cards[key]

    def find(self, reference: str) -> AdapterCard:
        """``name`` -> its served version, ``name@version`` -> that one.

        Raises:
            NotFoundError: if there is none; the message names what there is.
            ModelError: if it is damaged.
        """
        name, at, version = reference.partition("@")
        if not _NAME.fullmatch(name) or (at and not _VERSION.fullmatch(version)):
            raise NotFoundError(f"'{reference[:64]}' names no adapter; write name or name@version, for example mr@2. {self._available()}")
        if at:
            return self.card(name, int(version))
        if not self._version_numbers(name):
            raise NotFoundError(self._no_such(name))
        current = self._pointer(name).version
        if current is None:
            there = ", ".join(f"{name}@{v}" for v in self._version_numbers(name))
            raise NotFoundError(f"Adapter '{name}' has no published version. Ask for one by number ({there}), or `progidiff adapters use` one.")
        return self.card(name, current)

    def load(self, card: AdapterCard, base: str) -> dict[str, Tensor]:
        """The tensors of a version.

        Args:
            base: `compute_base_digest` of the model it is meant for.

        Raises:
            ModelError: if it belongs to another base or is damaged.
        """
        if card.base != base:
            raise ModelError(
                f"Adapter '{card.full_name}' was trained for another base ({card.base_name}, content {card.base[:12]}) than the one that is loaded "
                f"(content {base[:12]}). Train one for this base with `progidiff adapt --name {card.name}`, or ask for adapter 'none'."
            )
        return load_safetensors(self._read(card))

    def folder(self, card: AdapterCard) -> Path:
        """Where a version lies."""
        return self.root / card.name / str(card.version)

    def entries(self) -> list[AdapterEntry]:
        """All adapters by name; never raises for one that is damaged."""
        return [self.entry(name) for name in self._names()]

    def entry(self, name: str) -> AdapterEntry:
        """One line of `entries`."""
        versions = self._version_numbers(name)
        try:
            pointer = self._pointer(name)
        except ModelError as err:
            return AdapterEntry(name, versions, None, 0.0, str(err))
        try:
            if pointer.version is not None:
                self.card(name, pointer.version)
        except (ModelError, NotFoundError) as err:
            return AdapterEntry(name, versions, pointer.version, pointer.time, str(err))
        return AdapterEntry(name, versions, pointer.version, pointer.time)

    def history(self, name: str) -> list[dict[str, Any]]:
        """What happened, oldest first: "time" (ISO, UTC), "event", "version", "before". Lines that cannot be read are left out."""
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

    def run(self, card: AdapterCard) -> dict[str, Any]:
        """run.json of a version.

        Raises:
            ModelError: if it cannot be read.
        """
        path = self.folder(card) / "run.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as err:
            raise ModelError(f"'{path}' cannot be read ({err}). {_cure(card.name)}") from err

    def pick_for(self, modality: str, base: str) -> AdapterCard | None:
        """The served version for images of a modality: of several the one published last; None if there is none.

        Adapters of another base are passed over with a line in the log: the base was exchanged, and they wait for their own.

        Raises:
            ModelError: if the one that should be served is damaged.
        """
        candidates: list[tuple[float, AdapterCard]] = []
        for name in self._names():
            pointer = self._pointer(name)
            if pointer.version is None:
                continue
            card = self.card(name, pointer.version)
            if card.modality != modality:
                continue
            if card.base != base:
                logger.warning("Adapter %s is passed over: it was trained for another base (%s)", card.full_name, card.base_name)
                continue
            candidates.append((pointer.time, card))
        return max(candidates, key=lambda c: (c[0], c[1].name))[1] if candidates else None

    def _names(self) -> list[str]:
        try:
            return sorted(p.name for p in self.root.iterdir() if p.is_dir() and _NAME.fullmatch(p.name) and self._version_numbers(p.name))
        except OSError:
            return []

    def _version_numbers(self, name: str) -> tuple[int, ...]:
        try:
            return tuple(sorted(int(p.name) for p in (self.root / name).iterdir() if _VERSION.fullmatch(p.name) and p.is_dir()))
        except OSError:
            return ()

    def _check_exists(self, name: str) -> None:
        if not self._version_numbers(name):
            raise NotFoundError(self._no_such(name))

    def _available(self) -> str:
        names = [entry.name for entry in self.entries()]
        return f"There are: {', '.join(names)}." if names else f"'{self.root}' holds none yet; `progidiff adapt` trains one."

    def _no_such(self, name: str) -> str:
        return f"There is no adapter '{name}'. {self._available()}"

    def _read(self, card: AdapterCard) -> bytes:
        path = self.folder(card) / "adapter.safetensors"
        try:
            content = path.read_bytes()
        except OSError as err:
            raise ModelError(f"'{path}' cannot be read ({err}). {_cure(card.name)}") from err
        if hashlib.sha256(content).hexdigest() != card.sha256:
            raise ModelError(f"'{path}' is damaged: its content is not the one that adapter.json vouches for. {_cure(card.name)}")
        return content

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
            raise ModelError(f"'{path}' cannot be read ({type(err).__name__}). Set it again with `progidiff adapters use {name}@VERSION`.") from err

    def _move(self, name: str, pointer: _Pointer, event: str) -> None:
        folder = self.root / name
        with _disk_errors(f"CURRENT of adapter '{name}' could not be moved"):
            self._log(name, event, pointer.version, pointer.before)
            handle, scratch = tempfile.mkstemp(prefix=".current-", dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_to_json({"version": pointer.version, "before": list(pointer.before), "time": pointer.time}))
                    file.flush()
                    os.fsync(file.fileno())
                os.chmod(scratch, 0o644)
                os.replace(scratch, folder / "CURRENT")
            except BaseException:
                Path(scratch).unlink(missing_ok=True)
                raise
            flush(folder)

    def _publication_time(self) -> float:
        """Now, but after every publication so far: `pick_for` goes by it, and clocks are set back."""
        latest = 0.0
        for name in self._names():
            with contextlib.suppress(ModelError):  # Damaged: it is not picked.
                latest = max(latest, self._pointer(name).time)
        return max(time.time(), latest + 1e-3)

    def _log(self, name: str, event: str, version: int | None, before: tuple[int | None, ...] = ()) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "version": version, "before": list(before)}
        with (self.root / name / "history.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        folder = self.root / name
        with _disk_errors(f"The folder '{folder}' cannot be made"):
            folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=30)
        try:
            with _disk_errors(f"'{folder}' cannot be locked"):
                lock.acquire()
        except Timeout as err:
            raise BusyError(f"Another process has been changing adapter '{name}' for 30 s. Try again when it is done.", retry_after=30) from err
        try:
            yield
        finally:
            lock.release()

    @staticmethod
    def _remove_leftovers(folder: Path) -> None:
        """Temporary folders of processes that died."""
        for path in folder.glob(f"{_WRITING}*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(path, ignore_errors=True)


def check_name(name: str) -> str:
    """Refuse a name that would not do as a folder or is a word of the requests.

    Raises:
        RequestError: saying what a name may hold.

    Example:
        >>> check_name("mr-t2")
        'mr-t2'
    """
    if not _NAME.fullmatch(name):
        raise RequestError(f"'{name[:64]}' cannot name an adapter: use letters, digits, '.', '_' and '-', start with a letter or digit, at most 64.")
    if name.lower() in RESERVED:
        raise RequestError(f"'{name}' cannot name an adapter: requests use this word for something else. Choose another, for example 'mr'.")
    return name


def compute_base_digest(model_dir: Path) -> str:
    """Identity of the model that an adapter belongs to: content of the conditioning and of the backbone it was trained with.

    Raises:
        ModelError: if the model folder holds no conditioning.
    """
    backbone = load_card(model_dir).backbone_digest
    return hashlib.sha256(f"{compute_conditioning_digest(model_dir)} {backbone}".encode()).hexdigest()


def build_networks(
    card: AdapterCard, tensors: Mapping[str, Tensor], branch: ConditioningBranch, unet: nn.Module, path: Path
) -> tuple[ConditioningBranch, nn.Module]:
    """Adapted copies of a base's networks; see `lora.merge_lora` for why they are copies.

    Returns:
        The branch; the denoiser, which is the given one if the adapter leaves it as it is.

    Raises:
        ModelError: if any tensor is missing, left over or of another shape.
    """
    if card.lora is not None:
        adapted, denoiser = merge_lora(tensors, branch, unet, card.lora, path)
    else:
        adapted, denoiser = load_full(tensors, branch, unet, path)
    return adapted, unet if denoiser is None else denoiser


def _cure(name: str) -> str:
    return f"Restore it from a backup, or go back with `progidiff adapters rollback {name}`."


def _to_json(values: Any) -> bytes:
    return (json.dumps(values, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise StoreError(f"{what} ({err}). Free some disk space or check who may write there; what was there before is untouched.") from err
