"""Versions of TextDiff models on disk: immutable folders and a pointer to the one that is served, as adapters have them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from progidiff.textdiff.model import TextDiffCard, TextDiffModel


class TextDiffStore:
    """``<root>/<name>/1, 2, 3 ...`` with ``CURRENT`` and ``history.jsonl``; safe for several processes. See `adapters.AdapterStore`.

    Also there, with the meaning they have for adapters: `publish`, `rollback`, `current`, `card`, `find`, `folder`, `entries`,
    `entry`, `history`, `run`.

    Args:
        root: The folder; made when the first version is added. The shipped one is `model.default_folder()`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def add(self, name: str, model: TextDiffModel, run: Mapping[str, Any], readme: str | None = None) -> TextDiffCard:
        """Write a model as the next version of `name`. It is not published.

        Raises:
            RequestError: if the name cannot be used.
            StoreError: if the disk refuses; nothing is left behind then.
        """
        raise NotImplementedError
