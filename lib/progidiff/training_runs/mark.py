"""When the next training is due, and when annotating more is hardly worth it: counting and arithmetic, no HTTP and no
network.

A training is due after so many *newly annotated* slices: the count is taken from the label history, so that saving a
slice again, deleting or undoing moves it as it should, and a restart forgets nothing.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from progidiff.storage.atomic import replace_text
from progidiff.storage.state_files import load_state
from progidiff.training_runs.options import FamilyName


@dataclass(frozen=True)
class Mark:
    """Up to which event of the label history labels have been trained on; a training that failed has learned nothing
    and moves nothing.

    Attributes:
        adapters: By trainings of the model for volumes.
        textdiff: By trainings of the model for pictures.
    """

    adapters: int = 0
    textdiff: int = 0

    def of(self, family: FamilyName) -> int:
        """The one of a family of versions."""
        return self.textdiff if family == "textdiff" else self.adapters

    def moved(self, family: FamilyName, sequence: int) -> Mark:
        """With another one for a family."""
        return replace(self, textdiff=sequence) if family == "textdiff" else replace(self, adapters=sequence)


class MarkFile:
    """The mark on disk; a new one appears by rename.

    Args:
        path: The file; made when the first training is done.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Mark:
        """The mark; of a file that cannot be read, the first one: labels are then trained on once too often, never too
        seldom.
        """
        return load_state(self._path, _read_mark, Mark, "All labels count as new for the next training.")

    def save(self, mark: Mark) -> None:
        """Replace the mark.

        Raises:
            OSError: if the disk refuses; the old one stays.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self._path, json.dumps(asdict(mark)))


def _read_mark(content: bytes) -> Mark:
    values = json.loads(content)
    earlier = values.get("sequence", 0)  # Version 0.1 had one for all.
    return Mark(int(values.get("adapters", earlier)), int(values.get("textdiff", earlier)))
