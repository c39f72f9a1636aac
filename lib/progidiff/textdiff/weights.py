"""Folders of frozen weights: finding them, here or on a hub, and telling one content from another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from progidiff.errors import ModelError


def find_folder(source: str | Path, what: str, patterns: Sequence[str]) -> Path:
    """A local folder as it is, or a hub id fetched.

    Args:
        source: Folder or ``owner/name``.
        what: For messages, for example "denoiser".
        patterns: Which files of a hub's repository are needed.

    Raises:
        ModelError: if there is no such folder, or the hub does not answer.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    name = str(source)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelError(f"The {what} folder '{name}' does not exist. Give a folder or a hub id like 'owner/name'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as err:  # the hub client raises a dozen unrelated types; the cure is the same for all
        raise ModelError(
            f"The {what} '{name}' is no local folder and could not be fetched from the "
            f"model hub ({type(err).__name__}: {err}). Download it on a machine with "
            "network access and give its folder."
        ) from err


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object.

    Raises:
        ModelError: if the file is missing or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise ModelError(f"'{path}' is missing; restore the folder from where it came.") from err
    except (OSError, ValueError) as err:
        raise ModelError(f"'{path}' cannot be read as JSON ({err}); restore it from where it came.") from err
    if not isinstance(values, dict):
        raise ModelError(f"'{path}' holds no JSON object; restore it from where it came.")
    return values


def compute_digest(files: Iterable[Path]) -> str:
    """SHA-256 over the contents of files by name; read once, then remembered until a file changes."""
    state = hashlib.sha256()
    for path in sorted(files, key=lambda p: p.name):
        stat = path.stat()
        state.update(path.name.encode() + _hash_file(path.resolve(), stat.st_size, stat.st_mtime_ns))
    return state.hexdigest()


@lru_cache(maxsize=64)
def _hash_file(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
