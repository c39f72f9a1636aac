"""The working grid: where the networks see a volume, and the exact way back.

A volume arrives as an *axial stack*: shape (Z, Y, X), z towards Superior, y towards Posterior, x towards the patient's
Left, so that slice ``stack[z]`` looks as on a radiologist's screen (patient's right at the left edge, spine at the
bottom). `plan_working_grid` puts a window of fixed pixel size around the body; `WorkingGrid.extract_slices` resamples
slices into it; `WorkingGrid.restore_slices` resamples maps back. Only the in-plane axes are resampled: slice z of the
working grid is slice z of the volume, so nothing is interpolated between slices.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from progidiff.errors import GeometryError, ImageError

BACKGROUND = -1.0
"""Value of everything outside the volume, in the network's intensity range [-1, 1]."""


@dataclass(frozen=True)
class WorkingGrid:
    """An in-plane window of ``height x width`` pixels of ``spacing`` mm around ``center``, the same for all slices.

    Attributes:
        shape: (Z, Y, X) of the axial stack.
        stack_spacing: (dz, dy, dx) of the axial stack in mm.
        center: (y, x) of the window's middle, in mm from the outer corner of the stack's first pixel.
        spacing: Pixel size of the working grid in mm (square pixels).
        height, width: Pixels of the working grid.
    """

    shape: tuple[int, int, int]
    stack_spacing: tuple[float, float, float]
    center: tuple[float, float]
    spacing: float
    height: int
    width: int

    def extract_slices(
        self,
        stack: NDArray[Any],
        indices: NDArray[Any] | list[int],
        window: tuple[float, float],
        num_neighbours: int,
        neighbour_mm: float,
    ) -> torch.Tensor:
        """Windowed slices with their neighbours as channels.

        Args:
            stack: The axial stack, shape (Z, Y, X), any real dtype.
            indices: Axial indices z of the N slices wanted.
            window: (low, high) intensities that map to -1 and 1; values beyond are clipped.
            num_neighbours: Neighbouring slices on each side; C = 2 * num_neighbours + 1.
            neighbour_mm: Distance between channels in mm, rounded to whole slices (at least one). Beyond the ends of
                the stack the last slice is repeated.

        Returns:
            float32 tensor of shape (N, C, height, width) in [-1, 1], channels from inferior to superior.
        """
        if tuple(stack.shape) != self.shape:
            raise GeometryError(
                f"The stack has shape {tuple(stack.shape)}, the grid was planned for "
                f"{self.shape}; plan a grid for this stack."
            )
        z_max = self.shape[0] - 1
        step = max(1, round(neighbour_mm / self.stack_spacing[0]))
        offsets = step * np.arange(-num_neighbours, num_neighbours + 1)
        wanted = np.clip(np.asarray(indices, dtype=np.int64)[:, None] + offsets[None], 0, z_max)
        unique, inverse = np.unique(wanted, return_inverse=True)
        low, high = window
        pixels = torch.from_numpy(np.ascontiguousarray(stack[unique], dtype=np.float32))
        pixels = ((pixels - low) / (high - low)).clamp_(0, 1).mul_(2).sub_(1)
        resampled = self._resample_to_grid(pixels[:, None])[:, 0]
        return resampled[torch.from_numpy(inverse.reshape(wanted.shape))]

    def extract_labels(self, labels: NDArray[Any], indices: NDArray[Any] | list[int], num_labels: int) -> torch.Tensor:
        """Label slices on the working grid, by the largest share of each pixel.

        Args:
            labels: Label ids 0..num_labels on the axial stack, shape (Z, Y, X).
            indices: Axial indices of the N slices wanted.
            num_labels: Largest label id.

        Returns:
            uint8 tensor of shape (N, height, width).
        """
        chosen = np.ascontiguousarray(labels[np.asarray(indices)])
        best = torch.full((len(chosen), self.height, self.width), 0.0)
        result = torch.zeros((len(chosen), self.height, self.width), dtype=torch.uint8)
        present = [int(v) for v in np.unique(chosen) if 0 < v <= num_labels]
        background = torch.ones_like(best)
        shares = []
        for value in present:
            share = self._resample_to_grid(torch.from_numpy((chosen == value).astype(np.float32))[:, None], fill=0.0)[
                :, 0
            ]
            background -= share
            shares.append(share)
        best.copy_(background)
        for value, share in zip(present, shares, strict=True):
            wins = share > best
            result[wins] = value
            best = torch.maximum(best, share)
        return result

    def restore_slices(self, maps: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """Resample maps of the working grid onto the stack's own pixels (bilinear).

        Args:
            maps: Shape (N, height, width), any float range.
            fill: Value outside the working grid.

        Returns:
            Tensor of shape (N, Y, X), the dtype of `maps`.
        """
        if tuple(maps.shape[-2:]) != (self.height, self.width):
            raise GeometryError(
                f"Maps of {tuple(maps.shape[-2:])} pixels do not fit the working grid of {(self.height, self.width)}."
            )
        _, size_y, size_x = self.shape
        _, dy, dx = self.stack_spacing
        rows, inside_y = _source_coordinates(size_y, dy, self.center[0], self.spacing, self.height)
        cols, inside_x = _source_coordinates(size_x, dx, self.center[1], self.spacing, self.width)
        y0, y1 = _span(inside_y)
        x0, x1 = _span(inside_x)
        result = torch.full((len(maps), size_y, size_x), fill, dtype=maps.dtype)
        # Only the part of the stack that the window covers is computed; at 512 x 512 that is often half of it.
        grid_y, grid_x = torch.meshgrid(rows[y0:y1], cols[x0:x1], indexing="ij")
        grid = torch.stack([grid_x, grid_y], -1)[None].expand(len(maps), -1, -1, -1)
        result[:, y0:y1, x0:x1] = F.grid_sample(
            maps[:, None], grid.to(maps.dtype), mode="bilinear", padding_mode="border", align_corners=False
        )[:, 0]
        return result

    def refine(self, factor: int) -> WorkingGrid:
        """The same window with `factor` times the pixels along both axes."""
        return replace(self, spacing=self.spacing / factor, height=self.height * factor, width=self.width * factor)

    def find_pixel(self, y: int, x: int) -> tuple[int, int]:
        """The row and column that show the middle of a pixel of the stack; outside of 0..height, 0..width beyond the
        window.
        """
        mm = ((y + 0.5) * self.stack_spacing[1], (x + 0.5) * self.stack_spacing[2])
        places = (
            (at - middle) / self.spacing + count / 2
            for at, middle, count in zip(mm, self.center, (self.height, self.width), strict=True)
        )
        row, column = (int(np.floor(place)) for place in places)
        return row, column

    @cached_property
    def covered(self) -> NDArray[Any]:
        """Which pixels of the working grid lie in the stack by their middle, bool of shape (height, width)."""
        places = []
        for count, center, size in zip((self.height, self.width), self.center, self._stack_mm, strict=True):
            middle = center + (np.arange(count) + 0.5 - count / 2) * self.spacing
            places.append((middle >= 0) & (middle <= size))
        return places[0][:, None] & places[1][None, :]

    @property
    def _stack_mm(self) -> tuple[float, float]:
        return self.shape[1] * self.stack_spacing[1], self.shape[2] * self.stack_spacing[2]

    def _resample_to_grid(self, pixels: torch.Tensor, fill: float = BACKGROUND) -> torch.Tensor:
        """(N, 1, Y, X) -> (N, 1, height, width), area-averaged when shrinking."""
        _, dy, dx = self.stack_spacing
        size_y, size_x = pixels.shape[-2:]
        # Anti-aliased resize to the working spacing first, then a sub-pixel shift into the window: a single bilinear
        # lookup would skip pixels when the volume is finer than the grid and make thin structures flicker.
        mid_y = max(1, round(size_y * dy / self.spacing))
        mid_x = max(1, round(size_x * dx / self.spacing))
        if (mid_y, mid_x) != (size_y, size_x):
            pixels = F.interpolate(pixels, size=(mid_y, mid_x), mode="bilinear", antialias=True, align_corners=False)
        spacing_y = size_y * dy / mid_y
        spacing_x = size_x * dx / mid_x
        rows, _ = _source_coordinates(self.height, self.spacing, None, spacing_y, mid_y, self.center[0], self.height)
        cols, _ = _source_coordinates(self.width, self.spacing, None, spacing_x, mid_x, self.center[1], self.width)
        grid_y, grid_x = torch.meshgrid(rows, cols, indexing="ij")
        grid = torch.stack([grid_x, grid_y], -1)[None].expand(len(pixels), -1, -1, -1)
        return F.grid_sample(pixels - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + fill

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file; `WorkingGrid.from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WorkingGrid:
        """The inverse of `to_dict`."""
        return cls(
            shape=tuple(values["shape"]),
            stack_spacing=tuple(values["stack_spacing"]),
            center=tuple(values["center"]),
            spacing=float(values["spacing"]),
            height=int(values["height"]),
            width=int(values["width"]),
        )


def _source_coordinates(
    count: int,
    spacing: float,
    center: float | None,
    source_spacing: float,
    source_count: int,
    window_center: float | None = None,
    window_count: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of `count` target pixels in the source's normalised coordinates (-1..1 = outer edges), and which lie
    inside.

    With `center` the source is the window (placed at `center` mm) and the target the stack; with `window_center` the
    target is the window and the source starts at 0 mm.
    """
    mm = (torch.arange(count, dtype=torch.float64) + 0.5) * spacing
    if window_center is not None:
        mm = mm + window_center - window_count * spacing / 2
        start = 0.0
    else:
        assert center is not None
        start = center - source_count * source_spacing / 2
    normalised = (mm - start) / (source_count * source_spacing) * 2 - 1
    return normalised.float(), normalised.abs() <= 1


def _span(inside: torch.Tensor) -> tuple[int, int]:
    """First and one-past-last true position of a contiguous run; (0, 0) if there is none."""
    found = inside.nonzero()
    return (int(found[0]), int(found[-1]) + 1) if len(found) else (0, 0)


def plan_working_grid(
    stack: NDArray[Any],
    stack_spacing: tuple[float, float, float],
    body_threshold: float,
    height: int,
    width: int,
    spacing_range: tuple[float, float],
) -> WorkingGrid:
    """Put the working window around the body.

    The pixel size is the smallest in `spacing_range` for which the body fits with a small margin, so slim and large
    patients look alike to the networks; a field of view that cuts the body off is not magnified beyond the range.

    Args:
        stack: Axial stack, shape (Z, Y, X).
        stack_spacing: (dz, dy, dx) in mm.
        body_threshold: Intensity above which a pixel belongs to the body (or the table).
        height, width: Pixels of the window.
        spacing_range: Smallest and largest pixel size in mm.

    Raises:
        ImageError: if the stack is not three-dimensional or empty.
    """
    if stack.ndim != 3 or min(stack.shape) < 1:
        raise ImageError(
            f"An axial stack needs three axes, got shape {stack.shape}; 4-D series must be split into volumes first."
        )
    _, dy, dx = (float(v) for v in stack_spacing)
    # The share of slices in which a pixel is body: a median outline, blind to arms and tables on single slices.
    sampled = stack[:: max(1, len(stack) // 32)]
    share = (sampled > body_threshold).mean(axis=0)
    body = share > 0.5
    rows = np.flatnonzero(body.mean(axis=1) > 0.05)
    cols = np.flatnonzero(body.mean(axis=0) > 0.05)
    if len(rows) == 0 or len(cols) == 0:
        rows, cols = np.arange(stack.shape[1]), np.arange(stack.shape[2])
    top, bottom = rows[0] * dy, (rows[-1] + 1) * dy
    left, right = cols[0] * dx, (cols[-1] + 1) * dx
    margin = 1.05
    needed = max((bottom - top) * margin / height, (right - left) * margin / width)
    spacing = float(np.clip(needed, *spacing_range))
    return WorkingGrid(
        shape=(int(stack.shape[0]), int(stack.shape[1]), int(stack.shape[2])),
        stack_spacing=(float(stack_spacing[0]), dy, dx),
        center=(float(top + bottom) / 2, float(left + right) / 2),
        spacing=spacing,
        height=height,
        width=width,
    )
