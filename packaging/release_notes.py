#!/usr/bin/env python3
"""Print what CHANGELOG.md says of a version: `python packaging/release_notes.py 0.2.0`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def find_notes(text: str, version: str) -> str:
    """The section of a version, without its heading.

    Raises:
        SystemExit: if there is none, or it is empty.
    """
    found = re.search(rf"^## \[?{re.escape(version)}\b.*?\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise SystemExit(f"CHANGELOG.md says nothing of version {version}. Give its section a heading: ## {version}.")
    return found[1].strip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(find_notes(CHANGELOG.read_text(encoding="utf-8"), sys.argv[1]))
