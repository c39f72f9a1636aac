"""Where the app lies: pages, weights, and the file that the host loads.

In a checkout that is ``apps/progidiff`` beside the package. An installed package carries the same files, but it may
lie where nobody may write, and it goes when it is upgraded; the host writes into the folder of its app, and adapters
are trained into the model's. So they are laid out once in a folder of the user's, ``$PROGIDIFF_HOME/app``, and brought
up to date when the package has changed. What was trained there stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from progidiff.errors import ModelError, StoreError
from progidiff.storage.atomic import atomic_file, remove_leftovers, replace_text

_PACKAGE = Path(__file__).resolve().parents[1]

CHECKOUT = _PACKAGE.parents[1]
"""The folder that holds app and sample images where the package is used from a checkout."""

PACKAGED_APP = _PACKAGE / "_app"
"""The app inside an installed package; a checkout has none."""

PACKAGED_HOST = _PACKAGE / "_host"
"""MONAI Label inside an installed package; a checkout has none, it is installed beside it there."""

MANIFEST = "manifest.json"
"""In the packaged app and in the folder laid out from it: path -> SHA-256 of every file."""

_VERSION = re.compile(r"model/(?:adapters|textdiff)/[^/]+/\d+/")
"""What is trained there too: a folder of it is written once and never touched again."""

_POINTERS = re.compile(r"model/(?:adapters|textdiff)/[^/]+/(?:CURRENT|history\.jsonl)")
"""What changes when something is published there."""

_SPARE_BYTES = 64 << 20


def find_home() -> Path:
    """The folder of the user's for what an installed package must write: ``$PROGIDIFF_HOME``, else
    ``~/.local/share/progidiff``.
    """
    named = os.environ.get("PROGIDIFF_HOME")
    if named:
        return Path(named).expanduser().absolute()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "progidiff"


def find_app() -> Path:
    """The app's folder; from an installed package it is laid out or brought up to date first.

    Raises:
        ModelError: if the package carries no app.
        StoreError: if the folder cannot be written.
    """
    beside = CHECKOUT / "apps" / "progidiff"
    if (beside / "main.py").is_file():
        return beside
    if not (PACKAGED_APP / MANIFEST).is_file():
        raise ModelError(
            f"This copy of progidiff in '{_PACKAGE}' carries no app, pages and weights. Install the wheel that "
            "`make wheel` builds, or use a checkout: git clone, then `make setup`."
        )
    target = find_home() / "app"
    lay_out_app(PACKAGED_APP, target)
    return target


def find_model() -> Path:
    """The shipped weights: a folder with ``backbone``, ``conditioning``, ``adapters`` and ``textdiff``.

    Raises:
        ModelError: if the package carries none.
        StoreError: if they cannot be laid out.
    """
    return find_app() / "model"


def lay_out_app(source: Path, target: Path) -> bool:
    """Make a folder hold the app of a package, without touching what was trained or published in it.

    Pages, backbone and conditioning become the package's. A version of an adapter or head is written if there is none
    of its number. Which one is served (CURRENT) follows the package until somebody publishes there.

    Args:
        source: Folder with the app and its `MANIFEST`.
        target: Made if absent.

    Returns:
        Whether anything had to be done.

    Raises:
        StoreError: if the disk is full or refuses.
    """
    manifest = (source / MANIFEST).read_text(encoding="utf-8")
    wanted: dict[str, str] = json.loads(manifest)
    try:
        if _read_text(target / MANIFEST) == manifest:
            return False
        target.mkdir(parents=True, exist_ok=True)
        with FileLock(target / ".lock"):
            former = json.loads(_read_text(target / MANIFEST) or "{}")
            changes = list(_list_changes(target, wanted, former))
            _check_space(target, sum((source / name).stat().st_size for name in changes))
            for name in changes:
                _copy(source / name, target / name)
            for name in former.keys() - wanted.keys():
                if not _VERSION.match(name) and not _POINTERS.fullmatch(name):
                    (target / name).unlink(missing_ok=True)
            replace_text(target / MANIFEST, manifest)
    except OSError as err:
        raise StoreError(
            f"The app cannot be laid out in '{target}' ({err.strerror or err}); pages and weights are kept there, and "
            "what is trained. Make it writable, or name another folder: export PROGIDIFF_HOME=/path/to/folder."
        ) from err
    return True


def _list_changes(target: Path, wanted: Mapping[str, str], former: Mapping[str, str]) -> Iterator[str]:
    """Files of the package that have to be written."""
    kept: dict[str, bool] = {}
    for name, digest in wanted.items():
        version = _VERSION.match(name)
        if version is not None:
            place = version[0]
            # Asked once: after the first file is written the folder exists.
            if not kept.setdefault(place, (target / place).is_dir() and not _is_half(target, place, wanted, former)):
                yield name
            continue
        there = _compute_digest(target / name)
        if there == digest or (_POINTERS.fullmatch(name) and there is not None and there != former.get(name)):
            continue
        yield name


def _is_half(target: Path, place: str, wanted: Mapping[str, str], former: Mapping[str, str]) -> bool:
    """Whether a version's folder was being written by a lay-out that did not come to its end: some of the package's
    files, unchanged, and nothing else.
    """
    if any(name.startswith(place) for name in former):
        return False
    ours = {name: digest for name, digest in wanted.items() if name.startswith(place)}
    there = [path.relative_to(target).as_posix() for path in (target / place).rglob("*") if path.is_file()]
    return len(there) < len(ours) and all(ours.get(name) == _compute_digest(target / name) for name in there)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent)
    with atomic_file(target) as scratch:
        shutil.copyfile(source, scratch)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed and free < needed + _SPARE_BYTES:
        raise StoreError(
            f"Pages and weights need {(needed + _SPARE_BYTES) / 1e6:.0f} MB in '{folder}', and {free / 1e6:.0f} MB are "
            "free. Free some, or name a folder on another disk: export PROGIDIFF_HOME=/path/to/folder."
        )


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _compute_digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
