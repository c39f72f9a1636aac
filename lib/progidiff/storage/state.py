"""Where the state of a studies folder is kept."""

from __future__ import annotations

import hashlib
from pathlib import Path


def default_store(studies: str) -> Path:
    """Where proposals are kept if `--conf store` does not say; see `ServerOptions.store`."""
    if studies.startswith(("http://", "https://")):
        return Path.home() / ".cache" / "progidiff" / hashlib.sha256(studies.encode()).hexdigest()[:16]
    return Path(studies) / ".progidiff"
