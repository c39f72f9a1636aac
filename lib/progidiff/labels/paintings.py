"""Slices that a person drew by hand, as the review page sends them: voxels, where decisions otherwise name proposals.

A mask travels as the lengths of its runs within its box, some hundred numbers for an organ. Where several structures
are drawn on a voxel of one slice, the one that is listed last lies on top::

    {"shape": [Z, Y, X],
     "slices": {"41": [{"structure": "liver", "box": [y0, y1, x0, x1], "runs": [0, 12, 3, ...], "edits": 7}]}}

`shape` is that of the axial stack and says which grid was drawn on. `box` is half-open, null if nothing is drawn;
`runs` counts voxels outside, inside, outside, ... of the mask in the box row by row, beginning with outside (which may
be 0). `edits` counts strokes and other changes. `start` may name the pick that was drawn on (`decisions.MaskPick`), of
the result with the key `proposals`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError, RequestError
from progidiff.images.geometry import Shape, times
from progidiff.labels.saving import read_structure
from progidiff.params import read_int, show_value

MAX_EDITS = 10**6
"""Of one structure on one slice."""

_MAX_STRUCTURES = 255
_MAX_KEY = 64
_EXAMPLE = '{"structure": "liver", "box": [10, 12, 20, 23], "runs": [0, 2, 1, 3], "edits": 1}'


@dataclass(frozen=True)
class Painting:
    """A structure on a slice as it was drawn.

    Attributes:
        structure: Its name.
        box: (y0, y1, x0, x1), half-open; None if nothing is drawn.
        runs: int64; voxels outside and inside of the mask by turns, row by row in the box.
        edits: Strokes and other changes.
        start: The pick that was drawn on, as sent; None if it is not said.
        proposals: Key of the result that it is a pick of; "" if it is not said.
    """

    structure: str
    box: tuple[int, int, int, int] | None
    runs: NDArray[Any]
    edits: int
    start: Any = None
    proposals: str = ""

    def draw_on(self, target: NDArray[Any], value: int) -> None:
        """Put a value where it is drawn.

        Args:
            target: Of shape (Y, X), changed.

        Example:
            >>> target = np.zeros((2, 4), np.uint8)
            >>> Painting("liver", (0, 2, 1, 3), np.array([1, 3]), 1).draw_on(target, 6)
            >>> target.tolist()
            [[0, 0, 6, 0], [0, 6, 6, 0]]
        """
        if self.box is None:
            return
        y0, y1, x0, x1 = self.box
        inside = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs).reshape(y1 - y0, x1 - x0)
        target[y0:y1, x0:x1][inside] = value


@dataclass(frozen=True)
class Paintings:
    """All that was drawn of an image.

    Attributes:
        slices: Axial index -> paintings, from the bottom; each structure once.
    """

    slices: Mapping[int, tuple[Painting, ...]] = field(default_factory=dict)

    @classmethod
    def from_params(cls, params: object, shape: Shape, image: str) -> Paintings:
        """Read what was sent; None is nothing.

        Args:
            params: See the module.
            shape: (Z, Y, X) of the axial stack.
            image: For messages.

        Raises:
            RequestError: if it is something else, or does not fit together.
            GeometryError: if it was drawn on another grid.
        """
        if params is None:
            return cls()
        if not isinstance(params, Mapping) or not isinstance(params.get("slices"), Mapping):
            raise RequestError(
                f'painted must be an object such as {{"shape": [Z, Y, X], "slices": {{"41": [{_EXAMPLE}]}}}}.'
            )
        _check_shape(params.get("shape"), shape, image)
        depth, height, width = shape
        return cls(
            {
                read_int(z, "painted slices", 0, depth - 1): _read_slice(entries, height, width, f"slice {str(z)[:9]}")
                for z, entries in params["slices"].items()
            }
        )

    @property
    def structures(self) -> tuple[str, ...]:
        """What is drawn somewhere, in the order of slices."""
        return tuple(dict.fromkeys(painting.structure for _, painting in self))

    def __iter__(self) -> Any:
        """(axial index, painting), in the order of slices and from the bottom."""
        return ((z, painting) for z in sorted(self.slices) for painting in self.slices[z])

    def count_edits(self, structures: Collection[str]) -> dict[str, int]:
        """Structure -> edits on all its slices."""
        counts: dict[str, int] = {}
        for _, painting in self:
            if painting.structure in structures:
                counts[painting.structure] = counts.get(painting.structure, 0) + painting.edits
        return counts

    def draw_on(self, stack: NDArray[Any], label_ids: Mapping[str, int]) -> None:
        """Draw over a label: what was drawn by hand wins over what was picked.

        Args:
            stack: Axial stack of shape (Z, Y, X), changed. It must not hold picks of what is drawn on the same slice.
            label_ids: Structure -> label id.
        """
        for z, painting in self:
            painting.draw_on(stack[z], label_ids[painting.structure])


def _check_shape(sent: object, shape: Shape, image: str) -> None:
    is_shape = isinstance(sent, Sequence) and not isinstance(sent, str) and all(type(size) is int for size in sent)
    if not isinstance(sent, Sequence) or not is_shape or tuple(sent) != tuple(shape):
        told = times(sent) if isinstance(sent, Sequence) and is_shape else show_value(sent)
        raise GeometryError(
            f"What was drawn is on a grid of {told} voxels, and image '{image}' has {times(shape)} (slices, rows, "
            "columns). Open this image and draw on it, or submit under the image that was drawn on."
        )


def _read_slice(entries: object, height: int, width: int, where: str) -> tuple[Painting, ...]:
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) > _MAX_STRUCTURES:
        raise RequestError(f"What is painted on {where} must be a list of objects such as {_EXAMPLE}.")
    paintings = tuple(_read_painting(entry, height, width, where) for entry in entries)
    names = [painting.structure for painting in paintings]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(f"'{twice}' is painted twice on {where}. Send each structure once, as it is in the end.")
    return paintings


def _read_painting(entry: object, height: int, width: int, where: str) -> Painting:
    if not isinstance(entry, Mapping):
        raise RequestError(f"What is painted on {where} must be a list of objects such as {_EXAMPLE}.")
    structure = read_structure(entry.get("structure"), "painted")
    edits = read_int(entry.get("edits", 1), "edits", 0, MAX_EDITS)
    box = _read_box(entry.get("box"), height, width, f"{structure} on {where}")
    size = 0 if box is None else (box[1] - box[0]) * (box[3] - box[2])
    runs = _read_runs(entry.get("runs", []), size, f"{structure} on {where}")
    return Painting(structure, box, runs, edits, entry.get("start"), str(entry.get("proposals") or "")[:_MAX_KEY])


def _read_box(sent: object, height: int, width: int, where: str) -> tuple[int, int, int, int] | None:
    if sent is None:
        return None
    if not isinstance(sent, Sequence) or isinstance(sent, str) or len(sent) != 4 or not _are_whole(sent):
        raise RequestError(f"The box of {where} must be four whole numbers [y0, y1, x0, x1], or null for nothing.")
    y0, y1, x0, x1 = (int(edge) for edge in sent)
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise RequestError(
            f"The box {[y0, y1, x0, x1]} of {where} does not lie in the slice, which has {times((height, width))} "
            "voxels; it is [y0, y1, x0, x1], half-open and not empty."
        )
    return y0, y1, x0, x1


def _read_runs(sent: object, size: int, where: str) -> NDArray[Any]:
    if not isinstance(sent, Sequence) or isinstance(sent, str) or len(sent) > size + 1 or not _are_whole(sent):
        raise RequestError(
            f"The runs of {where} must be whole numbers, at most one more than its box has voxels ({size})."
        )
    if any(not 0 <= length <= size for length in sent) or sum(sent) != size:
        raise RequestError(
            f"The runs of {where} must not be negative and must add up to the {size} voxels of its box; they add up to "
            f"{show_value(sum(sent))}. The mask was cut off on its way: submit again."
        )
    return np.array(sent, dtype=np.int64)


def _are_whole(values: Iterable[object]) -> bool:
    return all(type(value) is int for value in values)
