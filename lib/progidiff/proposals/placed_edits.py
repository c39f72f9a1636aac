"""Edits on the axial stack of an image, and as the maps of a window."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from skimage import draw
from torch import Tensor

from progidiff.errors import GeometryError, RequestError
from progidiff.images.close_up import CloseUpWindow, WindowRules, window_at
from progidiff.images.geometry import Grid, times
from progidiff.proposals.edit_maps import draw_edit_maps
from progidiff.proposals.edits import Edit

NEIGHBOUR_REACH_MM = 30.0
"""A painted slice says something about slices up to so far away."""

CLICK_EXTENT_MM = 86.0
"""What a window shows around a click where nothing was found."""


@dataclass
class SliceEdits:
    """What was drawn of a structure on one axial slice, in pixels (y, x) of the stack.

    Attributes:
        wanted, unwanted: Clicks and the points of lines; each line is a list of its points.
        frames: Outlines of boxes and lassos that hold the structure.
        holes: Outlines of lassos that hold none of it.
    """

    wanted: list[list[tuple[int, int]]] = field(default_factory=list)
    unwanted: list[list[tuple[int, int]]] = field(default_factory=list)
    frames: list[list[tuple[float, float]]] = field(default_factory=list)
    holes: list[list[tuple[float, float]]] = field(default_factory=list)


@dataclass(frozen=True)
class PlacedEdits:
    """The edits of one structure on the axial stack.

    Attributes:
        slices: Axial index -> what was drawn there.
        painted: Axial index -> the mask (Y, X) that was painted.
        stack_spacing: (dz, dy, dx) in mm.
    """

    slices: Mapping[int, SliceEdits]
    painted: Mapping[int, NDArray[np.bool_]]
    stack_spacing: tuple[float, float, float]

    def __bool__(self) -> bool:
        return bool(self.slices) or bool(self.painted)

    def draw(self, window: CloseUpWindow, z: int) -> Tensor | None:
        """The maps of a slice of a window; None where nothing is said about it."""
        drawn = self.slices.get(z)
        neighbour, distance = self._find_neighbour(window, z)
        if drawn is None and neighbour is None:
            return None
        drawn = drawn or SliceEdits()
        wanted, unwanted = (self._trace(window, lines) for lines in (drawn.wanted, drawn.unwanted))
        frame = self._fill(window, drawn.frames) if drawn.frames else None
        if drawn.holes:
            unwanted |= self._fill(window, drawn.holes)
        return draw_edit_maps(window.size, wanted, unwanted, frame, neighbour, distance)

    def pins(self) -> list[tuple[int, int, int, bool]]:
        """Voxels (z, y, x) that a click or a line says are inside or outside.

        Where both were said, outside counts: what is too much is easier to see than what is missing.
        """
        found: dict[tuple[int, int, int], bool] = {}
        for z, drawn in self.slices.items():
            for lines, inside in ((drawn.wanted, True), (drawn.unwanted, False)):
                for line in lines:
                    for y, x in _join(line):
                        found[z, y, x] = inside
        return [(*place, inside) for place, inside in sorted(found.items())]

    def count_contradictions(self) -> int:
        """Voxels that were said to be inside and outside; see `pins` for what counts."""
        count = 0
        for drawn in self.slices.values():
            wanted, unwanted = (
                {pixel for line in lines for pixel in _join(line)} for lines in (drawn.wanted, drawn.unwanted)
            )
            count += len(wanted & unwanted)
        return count

    def plan_windows(
        self, known: Sequence[CloseUpWindow], shape: tuple[int, int, int], rules: WindowRules
    ) -> list[CloseUpWindow]:
        """Windows for what was drawn outside of the known ones."""
        windows = list(known)
        for z, places in sorted(self._places().items()):
            for place in places:
                if not any(_holds(window, z, place) for window in windows):
                    extent = max(CLICK_EXTENT_MM, self._extent(z) * 1.3 + 2 * rules.margin_mm)
                    windows.append(
                        window_at((z, *place), extent, shape, self.stack_spacing, rules, reach_mm=NEIGHBOUR_REACH_MM)
                    )
        return windows

    def _places(self) -> dict[int, list[tuple[float, float]]]:
        """Middles of what was drawn, in mm, by slice."""
        dy, dx = self.stack_spacing[1:]
        found: dict[int, list[tuple[float, float]]] = {}
        for z, drawn in self.slices.items():
            lines = [*drawn.wanted, *drawn.frames]
            for line in lines:
                middle = np.asarray(line, float).mean(axis=0) + 0.5
                found.setdefault(z, []).append((float(middle[0]) * dy, float(middle[1]) * dx))
        for z, mask in self.painted.items():
            if mask.any():
                middle = np.argwhere(mask).mean(axis=0) + 0.5
                found.setdefault(z, []).append((float(middle[0]) * dy, float(middle[1]) * dx))
        return found

    def _extent(self, z: int) -> float:
        """The longer side of the frames or of the painted mask of a slice, in mm."""
        points = [point for line in (self.slices[z].frames if z in self.slices else []) for point in line]
        if z in self.painted and self.painted[z].any():
            points += [tuple(place) for place in np.argwhere(self.painted[z])]
        if not points:
            return 0.0
        size = np.ptp(np.asarray(points, float), axis=0) * np.asarray(self.stack_spacing[1:])
        return float(size.max())

    def _find_neighbour(self, window: CloseUpWindow, z: int) -> tuple[Tensor | None, float]:
        """The nearest painted slice as the window shows it, and how far away it is."""
        dz = self.stack_spacing[0]
        near = [other for other in self.painted if abs(other - z) * dz <= NEIGHBOUR_REACH_MM]
        if not near:
            return None, 0.0
        nearest = min(near, key=lambda other: abs(other - z))
        shown = window.extract(self.painted[nearest][None].astype(np.float32), [0])[0]
        return shown, abs(nearest - z) * dz

    def _trace(self, window: CloseUpWindow, lines: Sequence[Sequence[tuple[int, int]]]) -> NDArray[np.bool_]:
        """Pixels of a window that lines of stack pixels run over."""
        drawn = np.zeros((window.size, window.size), bool)
        for line in lines:
            places = [self._to_window(window, y + 0.5, x + 0.5) for y, x in line]
            pixels = [(int(np.floor(y)), int(np.floor(x))) for y, x in places]
            for (y0, x0), (y1, x1) in zip(pixels, pixels[1:] or pixels, strict=False):
                rows, columns = draw.line(y0, x0, y1, x1)
                inside = (rows >= 0) & (rows < window.size) & (columns >= 0) & (columns < window.size)
                drawn[rows[inside], columns[inside]] = True
        return drawn

    def _fill(self, window: CloseUpWindow, outlines: Sequence[Sequence[tuple[float, float]]]) -> NDArray[np.bool_]:
        """Pixels of a window inside of any outline."""
        drawn = np.zeros((window.size, window.size), bool)
        for outline in outlines:
            places = np.array([self._to_window(window, y, x) for y, x in outline]) - 0.5
            rows, columns = draw.polygon(places[:, 0], places[:, 1], drawn.shape)
            drawn[rows, columns] = True
        return drawn

    def _to_window(self, window: CloseUpWindow, y: float, x: float) -> tuple[float, float]:
        """Position in pixels of a window, 0 at its outer corner, from one in pixels of the stack."""
        mm = (y * self.stack_spacing[1], x * self.stack_spacing[2])
        row, column = (
            (at - middle) / window.spacing + window.size / 2 for at, middle in zip(mm, window.center, strict=True)
        )
        return row, column


def place_edits(edits: Sequence[Edit], structure: str, grid: Grid) -> PlacedEdits:
    """The edits of a structure on the axial stack of an image.

    Args:
        edits: As sent.
        structure: Those for it, and those that name none.
        grid: Of the image.

    Raises:
        GeometryError: if one lies outside of the image or on several slices, or a painted slice has another size.
    """
    slices: dict[int, SliceEdits] = {}
    painted: dict[int, NDArray[np.bool_]] = {}
    for number, edit in enumerate(edits, start=1):
        if edit.structure not in ("", structure):
            continue
        if edit.mask:
            z, mask = _read_painted(edit, number, grid)
            if edit.kind == "paint":
                painted[z] = mask
            else:
                drawn = slices.setdefault(z, SliceEdits())
                (drawn.wanted if edit.positive else drawn.unwanted).extend(find_runs(mask))
            continue
        placed = [grid.locate(point) for point in edit.points]
        if len({z for z, _, _ in placed}) > 1:
            raise GeometryError(
                f"Edit {number} ({edit.kind}) runs over several axial slices of '{grid.name}'; draw on one slice at a "
                "time."
            )
        into = slices.setdefault(placed[0][0], SliceEdits())
        _sort_in(into, edit, [(y, x) for _, y, x in placed])
    return PlacedEdits(slices, painted, grid.stack_spacing)


def _sort_in(into: SliceEdits, edit: Edit, line: list[tuple[int, int]]) -> None:
    if edit.kind in ("click", "scribble"):
        (into.wanted if edit.positive else into.unwanted).append(line)
        return
    if edit.kind == "box":
        (y0, x0), (y1, x1) = line
        top, bottom, left, right = min(y0, y1), max(y0, y1) + 1, min(x0, x1), max(x0, x1) + 1
        outline: list[tuple[float, float]] = [(top, left), (top, right), (bottom, right), (bottom, left)]
    else:
        outline = [(y + 0.5, x + 0.5) for y, x in line]
    (into.frames if edit.positive else into.holes).append(outline)


def _read_painted(edit: Edit, number: int, grid: Grid) -> tuple[int, NDArray[np.bool_]]:
    depth, rows, columns = grid.stack_shape
    z = -1 if edit.slice is None else edit.slice
    if not 0 <= z < depth:
        raise GeometryError(f"Edit {number} paints slice {z}; '{grid.name}' has the axial slices 0 to {depth - 1}.")
    try:
        packed = np.frombuffer(base64.b64decode(edit.mask, validate=True), np.uint8)
    except (binascii.Error, ValueError) as err:
        raise RequestError(f"The mask of edit {number} is no base64 text ({err}).") from err
    if len(packed) != (rows * columns + 7) // 8:
        raise GeometryError(
            f"Edit {number} paints {len(packed)} bytes of mask; a slice of '{grid.name}' is {times((rows, columns))} "
            f"pixels, {(rows * columns + 7) // 8} bytes. Was it drawn on another image?"
        )
    return z, np.unpackbits(packed, count=rows * columns).astype(bool).reshape(rows, columns)


def find_runs(mask: NDArray[np.bool_]) -> list[list[tuple[int, int]]]:
    """A mask (Y, X) as lines along its rows, each by its two ends.

    Example:
        >>> find_runs(np.array([[False, True, True], [True, False, True]]))
        [[(0, 1), (0, 2)], [(1, 0), (1, 0)], [(1, 2), (1, 2)]]
    """
    steps = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    firsts, lasts = np.argwhere(steps == 1), np.argwhere(steps == -1)
    return [
        [(int(y), int(first)), (int(y), int(end) - 1)]
        for (y, first), (_, end) in zip(firsts.tolist(), lasts.tolist(), strict=True)
    ]


def _join(line: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """All pixels of a line through points."""
    found: list[tuple[int, int]] = []
    for (y0, x0), (y1, x1) in zip(line, line[1:] or line, strict=False):
        rows, columns = draw.line(y0, x0, y1, x1)
        found += zip(rows.tolist(), columns.tolist(), strict=True)
    return found


def _holds(window: CloseUpWindow, z: int, place: tuple[float, float]) -> bool:
    """Whether a window shows a place, not just at its very edge."""
    reach = 0.45 * window.size * window.spacing
    inside = all(abs(at - middle) <= reach for at, middle in zip(place, window.center, strict=True))
    return inside and window.first <= z <= window.last
