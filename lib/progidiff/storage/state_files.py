"""Small files with the state of a server: read with a check, set aside when damaged, and said.

A disk that was full, a power cut or an editor can leave half a file, and no such file may stop a server or fail every
request. One that cannot be read is renamed to ``<name>.damaged-<time>``, the log and `list_damage` say what that
means, and a safe default takes its place.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

DAMAGED = ".damaged-"
"""Between the name of a damaged file and the time it was found."""

_MAX_KEPT = 100
_PARSE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What parsers raise for content that is not theirs; pydantic's `ValidationError` is a `ValueError`."""

_found: list[Damage] = []
_lock = threading.Lock()


class DamagedStateError(ValueError):
    """A state file holds something else than it should."""


@dataclass(frozen=True)
class Damage:
    """Something in the state that is not as it was left.

    Attributes:
        file: Its path.
        problem: What is wrong.
        meaning: What the server does instead, and what to do.
        kept_as: Name of the damaged file now; "" if it is where it was.
        time: When it was found, ISO 8601, UTC.
    """

    file: str
    problem: str
    meaning: str
    kept_as: str
    time: str


def read_state(path: Path, parse: Callable[[bytes], T]) -> T:
    """What a state file says.

    Args:
        parse: Content of the file -> what it means; may raise what a parser raises.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        DamagedStateError: if it holds something else.
    """
    content = path.read_bytes()
    try:
        return parse(content)
    except _PARSE_ERRORS as err:
        what = "it is empty" if not content else " ".join(str(err).split())[:200] or type(err).__name__
        raise DamagedStateError(what) from err


def load_state(path: Path, parse: Callable[[bytes], T], default: Callable[[], T], meaning: str) -> T:
    """What a state file says; the default if there is none, or if it is damaged, which is said.

    Args:
        parse: As in `read_state`.
        default: Makes what holds instead; a safe choice.
        meaning: What the default means to people, as a sentence.
    """
    try:
        return read_state(path, parse)
    except FileNotFoundError:
        return default()
    except DamagedStateError as err:
        note_damage(path, str(err), meaning, set_aside(path))
    except OSError as err:  # It may be whole: it stays where it is.
        note_damage(path, str(err), meaning)
    return default()


def set_aside(path: Path) -> Path | None:
    """Rename a damaged file or folder, so that another can take its place.

    Returns:
        Where it is now; None if the disk refuses.
    """
    aside = path.with_name(f"{path.name}{DAMAGED}{time.time_ns()}")
    try:
        os.replace(path, aside)
    except OSError as err:
        logger.warning("'%s' is damaged and could not be set aside: %s", path, err)
        return None
    return aside


def note_damage(path: Path, problem: str, meaning: str, kept_as: Path | None = None) -> None:
    """Say in the log, and to `list_damage`, that something is damaged; once for the same thing."""
    kept = "" if kept_as is None else kept_as.name
    damage = Damage(str(path), problem, meaning, kept, datetime.now(UTC).isoformat(timespec="seconds"))
    with _lock:
        if any((known.file, known.problem, known.kept_as) == (damage.file, problem, kept) for known in _found):
            return
        _found.append(damage)
        del _found[:-_MAX_KEPT]
    moved = f"; it is kept as '{kept}'" if kept else ""
    logger.error("'%s' cannot be read (%s)%s. %s", path, problem, moved, meaning)


def list_damage() -> list[Damage]:
    """What was found damaged since this process started, oldest first."""
    with _lock:
        return list(_found)
