"""Whether a folder can be used, asked before the work rather than after it."""

from __future__ import annotations

import getpass
import os
import shutil
import tempfile
from pathlib import Path

from progidiff.errors import StoreError

LEAST_FREE_BYTES = 100 << 20
"""Below this a server's first answers fill the disk."""


def check_writable(folder: Path, holds: str, cure: str) -> None:
    """Refuse a folder that cannot be written, or whose disk is all but full; make it if it is absent.

    Args:
        folder: Any path.
        holds: What is kept there, for the message.
        cure: What else can be done, for the message.

    Raises:
        StoreError: saying why and what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Rights alone do not tell: a disk may be mounted for reading only, a share may map accounts.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writing-check-") as probe:
            probe.write(b"\0")
    except OSError as err:
        raise StoreError(
            f"'{folder}' cannot be written by {_name_account()} ({err.strerror or err}), and {holds} are kept there. "
            f"Give this account the right to write there, or {cure}."
        ) from err
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise StoreError(
            f"The disk of '{folder}' is full: {free / 1e6:.0f} MB are free, and {holds} are kept there. Free at least "
            f"{LEAST_FREE_BYTES / 1e6:.0f} MB, or {cure}."
        )


def _name_account() -> str:
    try:
        return f"the account '{getpass.getuser()}'"
    except (KeyError, OSError):  # a container may run under a number that has no name
        return f"account {os.getuid()}"
