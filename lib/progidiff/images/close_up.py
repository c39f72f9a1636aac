"""Close-ups: a window of fine pixels around what is asked for, and the exact way back.

The working grid shows a whole slice in pixels of about 2 mm, on which an adrenal gland is a dozen pixels. A
`CloseUpWindow` is a part of the axial stack, the same for a run of slices (so that proposal k, whose noise belongs to
the window, is one coherent volume), with pixels as fine as its extent allows. `plan_windows` puts windows around where
something was found; `CloseUpWindow.extract` and `CloseUpWindow.restore` go there and back.

Axes are those of the axial stack (`progidiff.images.working_grid`): (Z, Y, X), positions in mm from the outer corner of
the stack's first pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import GeometryError
from progidiff.images.working_grid import WorkingGrid

PLAIN_SIZE = 128
"""Pixels along both axes of a window up to which lengths in pixels mean what they say."""


def compute_fineness(size: int) -> float:
    """By what lengths in pixels are multiplied in a window of `size`, so that clicks and borders are as wide in mm in
    any number of pixels: 1 up to `PLAIN_SIZE`.

    Example:
        >>> compute_fineness(96), compute_fineness(512)
        (1.0, 4.0)
    """
    return max(1.0, size / PLAIN_SIZE)


@dataclass(frozen=True)
class WindowRules:
    """How large a close-up may be.

    Attributes:
        size: Pixels along both axes of a window.
        large_size: The same for what needs more than `size` pixels of `coarse_mm`.
        finest_mm: Pixels are never finer: beyond the scanner's own pixels there is nothing to see.
        coarse_mm: Pixels from which on the larger window is taken.
        margin_mm: Room on every side of what was found.
        beyond_mm: How far above and below what was found slices are looked at too: evidence misses ends.
        apart_mm: Parts that are further apart than so much get windows of their own, if that makes them finer.
        smallest_share: Parts smaller than this share of the largest are not worth a window.
        most: Windows of one structure at most; the largest parts win.
    """

    size: int = 96
    large_size: int = 128
    finest_mm: float = 0.9
    coarse_mm: float = 1.8
    margin_mm: float = 16.0
    beyond_mm: float = 12.0
    apart_mm: float = 40.0
    smallest_share: float = 0.02
    most: int = 4

    def fit(self, extent_mm: float) -> tuple[int, float]:
        """Pixels along both axes, and their size in mm, for a square of `extent_mm`.

        What does not fit into the larger window at `coarse_mm` gets coarser pixels: no structure is cut.

        Example:
            >>> WindowRules().fit(60), WindowRules().fit(256), WindowRules().fit(512)
            ((96, 0.9), (128, 2.0), (128, 4.0))
        """
        size = self.size if extent_mm <= self.size * self.coarse_mm else self.large_size
        return size, max(self.finest_mm, extent_mm / size)

    def at_size(self, pixels: int) -> WindowRules:
        """The same windows, all in `pixels` along both axes: each shows what it shows now, in mm.

        For a denoiser that is made for one size. Where its pixels are finer than the scanner's, they are interpolated;
        the way back is that of every window.

        Example:
            >>> WindowRules().at_size(512).fit(60), WindowRules().at_size(512).fit(256)
            ((512, 0.16875), (512, 0.5))
        """
        share = self.size / pixels
        finest, coarse = self.finest_mm * share, self.coarse_mm * share
        return replace(self, size=pixels, large_size=pixels, finest_mm=finest, coarse_mm=coarse)


@dataclass(frozen=True)
class _Pixels:
    """Where pixels lie: outer corner (y, x) of the first and sizes (dy, dx) in mm, and their counts (rows, columns)."""

    origin: tuple[float, float]
    spacing: tuple[float, float]
    counts: tuple[int, int]


@dataclass(frozen=True)
class CloseUpWindow:
    """Square pixels around a place of the axial stack, on a run of slices.

    Attributes:
        shape: (Z, Y, X) of the axial stack.
        stack_spacing: (dz, dy, dx) of the axial stack in mm.
        center: (y, x) of the window's middle in mm.
        spacing: Pixel size in mm.
        size: Pixels along both axes.
        first, last: The axial slices that it shows, both included.
    """

    shape: tuple[int, int, int]
    stack_spacing: tuple[float, float, float]
    center: tuple[float, float]
    spacing: float
    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last < self.shape[0]:
            raise GeometryError(
                f"A close-up of the slices {self.first} to {self.last} lies outside a stack of {self.shape[0]} slices."
            )

    @property
    def slices(self) -> NDArray[np.int64]:
        """The axial indices that it shows."""
        return np.arange(self.first, self.last + 1, dtype=np.int64)

    @property
    def box(self) -> tuple[slice, slice]:
        """The rows and columns of the stack whose middle lies in the window; empty beyond the image."""
        return self._find_box(self._stack_pixels)

    @property
    def _stack_pixels(self) -> _Pixels:
        return _Pixels((0.0, 0.0), self.stack_spacing[1:], self.shape[1:])

    def _find_box(self, pixels: _Pixels) -> tuple[slice, slice]:
        spans = []
        for origin, step, count, middle in zip(pixels.origin, pixels.spacing, pixels.counts, self.center, strict=True):
            half = self.size * self.spacing / 2
            start = math.ceil((middle - origin - half) / step - 0.5)
            stop = math.floor((middle - origin + half) / step - 0.5) + 1
            low = min(max(start, 0), count)
            spans.append(slice(low, max(low, min(stop, count))))
        return spans[0], spans[1]

    def extract(self, stack: NDArray[np.generic] | Tensor, indices: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Slices of the stack as the window shows them, averaged over the area of its pixels where those are coarser.

        Args:
            stack: (Z, Y, X), any real type.
            indices: N axial indices.

        Returns:
            float32 (N, size, size); 0 beyond the image, so shift intensities to where 0 is background first.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        rows, columns = self._reach()
        part = stack[chosen][:, rows, columns]
        pixels = part.float() if isinstance(part, Tensor) else torch.from_numpy(np.ascontiguousarray(part, np.float32))
        if not pixels.numel():
            return torch.zeros(len(chosen), self.size, self.size)
        origin = (rows.start * self.stack_spacing[1], columns.start * self.stack_spacing[2])
        grid = make_sampling_grid(
            torch.tensor([[self.center[0] - origin[0], self.center[1] - origin[1]]]),
            torch.tensor([[self.spacing, 0.0], [0.0, self.spacing]])[None],
            self.size,
            (int(pixels.shape[-2]), int(pixels.shape[-1])),
            self.stack_spacing[1:],
            self.supersampling,
        )
        return sample_area(pixels[:, None], grid.expand(len(pixels), -1, -1, -1), self.supersampling)[:, 0]

    def extract_map(self, maps: Tensor, grid: WorkingGrid) -> Tensor:
        """Maps of the working grid as the window shows them (bilinear).

        Args:
            maps: (N, h, w) on `grid`, any float range.
            grid: The working grid of the same stack.

        Returns:
            (N, size, size); the border's values beyond the working grid.
        """
        corner = tuple(c - n * grid.spacing / 2 for c, n in zip(grid.center, (grid.height, grid.width), strict=True))
        sampling = make_sampling_grid(
            torch.tensor([[self.center[0] - corner[0], self.center[1] - corner[1]]]),
            torch.tensor([[self.spacing, 0.0], [0.0, self.spacing]])[None],
            self.size,
            (grid.height, grid.width),
            (grid.spacing, grid.spacing),
        )
        return F.grid_sample(
            maps[:, None].float(), sampling.expand(len(maps), -1, -1, -1), padding_mode="border", align_corners=False
        )[:, 0]

    def restore(self, maps: Float[Tensor, "*leading size size"]) -> Float[Tensor, "*leading rows columns"]:
        """Maps of the window on the stack's own pixels, those of `box` (bilinear).

        Args:
            maps: (..., size, size), any float range.

        Returns:
            (..., rows, columns) of `box`.
        """
        return self._restore(maps, self._stack_pixels)[1]

    def restore_to(self, maps: Tensor, grid: WorkingGrid) -> tuple[tuple[slice, slice], Tensor]:
        """Maps of the window on the pixels of a working grid (bilinear).

        Args:
            maps: (..., size, size), any float range.
            grid: Of the same stack.

        Returns:
            The rows and columns of the grid whose middle lies in the window, and (..., rows, columns) there.
        """
        corner = (grid.center[0] - grid.height * grid.spacing / 2, grid.center[1] - grid.width * grid.spacing / 2)
        return self._restore(maps, _Pixels(corner, (grid.spacing, grid.spacing), (grid.height, grid.width)))

    def _restore(self, maps: Tensor, pixels: _Pixels) -> tuple[tuple[slice, slice], Tensor]:
        if maps.shape[-2:] != (self.size, self.size):
            raise GeometryError(f"Maps of {tuple(maps.shape[-2:])} pixels do not fit a close-up of {self.size}.")
        box = self._find_box(pixels)
        places = []
        for span, origin, step, middle in zip(box, pixels.origin, pixels.spacing, self.center, strict=True):
            mm = origin + (torch.arange(span.start, span.stop, dtype=torch.float64) + 0.5) * step
            places.append(((mm - middle) / (self.size * self.spacing / 2)).float())
        grid_y, grid_x = torch.meshgrid(places[0], places[1], indexing="ij")
        flat = maps.reshape(1, -1, self.size, self.size)
        grid = torch.stack([grid_x, grid_y], -1)[None].to(flat.dtype)
        found = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return box, found.reshape(*maps.shape[:-2], *found.shape[-2:])

    def make_taper(self, ramp_px: float = 8.0) -> Tensor:
        """Weights (size, size) in (0, 1], lower towards the border: overlapping windows blend without a seam.

        Args:
            ramp_px: Width of the border, in pixels of a window of at most `PLAIN_SIZE`.
        """
        place = torch.arange(self.size) + 0.5
        edge = torch.minimum(place, self.size - place)
        ramp = (edge / (ramp_px * compute_fineness(self.size))).clamp(max=1.0)
        return torch.minimum(ramp[:, None], ramp[None, :])

    @property
    def supersampling(self) -> int:
        """Looks per pixel and axis that average over its area."""
        return count_looks(self.spacing, min(self.stack_spacing[1:]))

    def _reach(self) -> tuple[slice, slice]:
        """`box` with room for interpolation."""
        rows, columns = self.box
        return (
            slice(max(rows.start - 2, 0), min(rows.stop + 2, self.shape[1])),
            slice(max(columns.start - 2, 0), min(columns.stop + 2, self.shape[2])),
        )


def count_looks(spacing: float, finest: float) -> int:
    """Looks per pixel of `spacing` mm and axis, into pixels of `finest` mm, that average over its area: 1 to 4."""
    return int(min(4, max(1, math.ceil(spacing / finest - 0.2))))


def make_sampling_grid(
    centers: Float[Tensor, "N 2"],
    axes: Float[Tensor, "N 2 2"],
    size: int,
    source: tuple[int, int],
    source_spacing: tuple[float, float],
    supersampling: int = 1,
) -> Float[Tensor, "N S S 2"]:
    """Where the pixels of windows come from, as `grid_sample` takes it.

    Args:
        centers: (N, 2) middles (y, x) in mm from the outer corner of the source's first pixel.
        axes: (N, 2, 2) mm per pixel: axes[n, :, 0] is a step down, axes[n, :, 1] a step to the right, each (y, x).
        size: Pixels of a window along both axes.
        source: (rows, columns) of what is sampled.
        source_spacing: Its pixel size (dy, dx) in mm.
        supersampling: Looks per pixel and axis.

    Returns:
        (N, s size, s size, 2), x and y in -1..1 from outer edge to outer edge.
    """
    count = size * supersampling
    place = (torch.arange(count) + 0.5) / supersampling - size / 2
    down, right = torch.meshgrid(place, place, indexing="ij")
    steps = torch.stack([down, right], -1)  # (S, S, 2)
    mm = centers[:, None, None] + torch.einsum("nij,abj->nabi", axes, steps)
    extent = torch.tensor([source[0] * source_spacing[0], source[1] * source_spacing[1]])
    return (mm / extent * 2 - 1).flip(-1)


def sample_area(
    pixels: Float[Tensor, "N C Y X"], grid: Float[Tensor, "N S S 2"], supersampling: int = 1
) -> Float[Tensor, "N C H H"]:
    """Bilinear looks, averaged over `supersampling` squared of them; 0 beyond the source."""
    found = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return F.avg_pool2d(found, supersampling) if supersampling > 1 else found


@dataclass(frozen=True)
class _Part:
    """A connected part of what was found, in mm and slices.

    Attributes:
        low, high: (z, y, x) of its corners; z in slices, both included, y and x in mm.
        weight: Pixels.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    weight: int

    @property
    def extent(self) -> float:
        """The longer side, in mm."""
        return max(self.high[1] - self.low[1], self.high[2] - self.low[2])

    def join(self, other: _Part) -> _Part:
        """The box around both."""
        return _Part(
            (min(self.low[0], other.low[0]), min(self.low[1], other.low[1]), min(self.low[2], other.low[2])),
            (max(self.high[0], other.high[0]), max(self.high[1], other.high[1]), max(self.high[2], other.high[2])),
            self.weight + other.weight,
        )

    def gap(self, other: _Part) -> float:
        """In-plane distance of the boxes in mm."""
        gaps = [max(self.low[a] - other.high[a], other.low[a] - self.high[a], 0.0) for a in (1, 2)]
        return math.hypot(*gaps)


def plan_windows(found: NDArray[np.bool_], grid: WorkingGrid, rules: WindowRules | None = None) -> list[CloseUpWindow]:
    """Windows around everything that was found, the largest part's first.

    Evidence in two places that are far apart gets two windows: which one is right is for the close-ups to say, each of
    which sees its own. Parts that are close share one.

    Args:
        found: (Z, h, w) where the working grid shows something.
        grid: The working grid.
        rules: How large windows may be.

    Returns:
        At most `rules.most` windows; none if nothing was found.
    """
    rules = rules or WindowRules()
    parts = sorted(_find_parts(found, grid), key=lambda part: -part.weight)
    if not parts:
        return []
    worth = [part for part in parts if part.weight >= rules.smallest_share * parts[0].weight]
    groups: list[_Part] = []
    for part in worth:
        near = next((i for i, group in enumerate(groups) if _belong_together(group, part, rules)), None)
        if near is None:
            groups.append(part)
        else:
            groups[near] = groups[near].join(part)
    groups.sort(key=lambda part: -part.weight)
    return [_make_window(part, grid, rules) for part in groups[: rules.most]]


def _belong_together(group: _Part, part: _Part, rules: WindowRules) -> bool:
    """Whether one window serves both: they are close, or it is as fine as that of the larger one alone."""
    together = rules.fit(group.join(part).extent + 2 * rules.margin_mm)
    alone = rules.fit(group.extent + 2 * rules.margin_mm)
    return group.gap(part) <= rules.apart_mm or together[1] <= alone[1] * 1.05


def _find_parts(found: NDArray[np.bool_], grid: WorkingGrid) -> Iterator[_Part]:
    numbered, count = ndimage.label(found, structure=np.ones((3, 3, 3), bool))
    sizes = np.bincount(numbered.ravel(), minlength=count + 1)
    corner = [c - n * grid.spacing / 2 for c, n in zip(grid.center, (grid.height, grid.width), strict=True)]
    for number, box in enumerate(ndimage.find_objects(numbered), start=1):
        if box is None:
            continue
        depth, rows, columns = box
        yield _Part(
            (depth.start, corner[0] + rows.start * grid.spacing, corner[1] + columns.start * grid.spacing),
            (depth.stop - 1, corner[0] + rows.stop * grid.spacing, corner[1] + columns.stop * grid.spacing),
            int(sizes[number]),
        )


def _make_window(part: _Part, grid: WorkingGrid, rules: WindowRules) -> CloseUpWindow:
    size, spacing = rules.fit(part.extent + 2 * rules.margin_mm)
    beyond = max(1, round(rules.beyond_mm / grid.stack_spacing[0]))
    return CloseUpWindow(
        shape=grid.shape,
        stack_spacing=grid.stack_spacing,
        center=((part.low[1] + part.high[1]) / 2, (part.low[2] + part.high[2]) / 2),
        spacing=spacing,
        size=size,
        first=max(0, int(part.low[0]) - beyond),
        last=min(grid.shape[0] - 1, int(part.high[0]) + beyond),
    )


def window_at(
    place: tuple[int, float, float],
    extent_mm: float,
    shape: tuple[int, int, int],
    stack_spacing: tuple[float, float, float],
    rules: WindowRules | None = None,
    reach_mm: float = 0.0,
) -> CloseUpWindow:
    """A window around a place that somebody named: a click, or the middle of a box.

    Args:
        place: Axial slice, and (y, x) in mm.
        extent_mm: What it should show at least.
        shape, stack_spacing: Of the axial stack.
        rules: How large windows may be.
        reach_mm: How far it goes above and below the slice.

    Raises:
        GeometryError: if the slice is not in the stack.
    """
    rules = rules or WindowRules()
    size, spacing = rules.fit(extent_mm)
    reach = round(reach_mm / stack_spacing[0])
    z = int(place[0])
    if not 0 <= z < shape[0]:
        raise GeometryError(f"Slice {z} lies outside a stack of {shape[0]} slices, 0 to {shape[0] - 1}.")
    return CloseUpWindow(
        shape, stack_spacing, (place[1], place[2]), spacing, size, max(0, z - reach), min(shape[0] - 1, z + reach)
    )
