"""Python in Markdown pages, as a reader would copy it."""

from __future__ import annotations

import re
from pathlib import Path


def list_snippets(page: Path) -> list[str]:
    """The text of every fenced block of Python, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
