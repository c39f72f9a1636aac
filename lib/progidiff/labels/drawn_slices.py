"""On how many axial slices structures are drawn, over all labels in force: what a training can learn them from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from progidiff.errors import ProGiDiffError
from progidiff.images.reading import load_label, read_grid
from progidiff.labels.history import Annotation, AnnotationStore

_KEPT = 20_000


@dataclass(frozen=True)
class Drawn:
    """What is labelled of a structure.

    Attributes:
        slices: Axial slices on which it is drawn, of all images.
        images: On which it is drawn.
    """

    slices: int = 0
    images: int = 0


class DrawnSlices:
    """Counts; a label is opened once, and again when another is in force. Safe for threads.

    Args:
        annotations: The history; labels that were made elsewhere and name nothing are not counted.
        find_image: Image id -> path of the image, or an error of ours.
    """

    def __init__(self, annotations: AnnotationStore, find_image: Callable[[str], str]) -> None:
        self._annotations = annotations
        self._find_image = find_image
        self._counts: dict[str, dict[int, int]] = {}
        self._lock = threading.Lock()

    def count(self, names: Collection[str]) -> dict[str, Drawn]:
        """Structure -> what is labelled of it."""
        wanted = set(names)
        found = dict.fromkeys(names, Drawn())
        for image in self._annotations.annotated_images() if wanted else ():
            current = self._annotations.current(image)
            ids = {} if current is None else {name: value for name, value in current.label_ids if name in wanted}
            if current is None or not ids:
                continue
            slices = self._count_in(image, current)
            for name, value in ids.items():
                number = slices.get(value, 0)
                found[name] = Drawn(found[name].slices + number, found[name].images + (number > 0))
        return found

    def _count_in(self, image: str, label: Annotation) -> dict[int, int]:
        """Id -> axial slices, of one label; nothing of one that cannot be read, which others tell."""
        with self._lock:
            known = self._counts.get(label.sha256)
        if known is None:
            try:
                grid = read_grid(Path(self._find_image(image)))
                stack = grid.arrange(load_label(self._annotations.label_file(label), like=grid))
            except ProGiDiffError:
                return {}
            known = {}
            for _, value in label.label_ids:
                known[value] = int((stack == value).any(axis=(1, 2)).sum())
            with self._lock:
                if len(self._counts) >= _KEPT:
                    self._counts.clear()
                self._counts[label.sha256] = known
        return known
