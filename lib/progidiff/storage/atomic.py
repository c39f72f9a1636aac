"""Making what was written survive a power cut; used by every store of this package."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file by rename: whoever reads it finds the old text or the new one, never a part. One writer at a
    time.

    Raises:
        OSError: if the disk refuses; the old text stays.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    flush(scratch)
    os.replace(scratch, path)
