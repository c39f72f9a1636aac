"""Windows for training close-ups: drawn from volumes at their own pixels, warped and averaged in one resampling.

Volumes are kept as uint8 in memory-mapped files; a window reads the few pixels that it shows. What a window is centred
on is what it will be in use: the windows that `plan_windows` makes from out-of-fold evidence, jittered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn import functional as F

from progidiff.errors import RequestError
from progidiff.images.close_up import (
    CloseUpWindow,
    WindowRules,
    count_looks,
    make_sampling_grid,
    plan_windows,
    sample_area,
)
from progidiff.images.working_grid import WorkingGrid

LABEL_LOOKS = 3
"""Looks per pixel and axis that find how much of it a structure covers."""


@dataclass(frozen=True)
class PooledVolume:
    """One labelled volume.

    Attributes:
        name: Of the case.
        patient: Cases of one patient stay together in a split.
        image: uint8 (Z, Y, X), the intensity window in 0..255.
        labels: uint8 (Z, Y, X) label ids 1..P of the pool's structures; 0 elsewhere.
        spacing: (dz, dy, dx) in mm.
        known: The ids that this volume's labels speak about.
        evidence: uint8 (Z, P, h, w) on `grid`, of a network that did not see this volume; None if nothing looked.
        grid: Of the evidence.
        source: The data set, for balanced drawing.
    """

    name: str
    patient: str
    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    spacing: tuple[float, float, float]
    known: tuple[int, ...]
    evidence: NDArray[np.uint8] | None = None
    grid: WorkingGrid | None = None
    source: str = ""


@dataclass(frozen=True)
class Sight:
    """A structure of a volume and the windows in which it is looked for.

    Attributes:
        volume: Index into the pool.
        label: Its id.
        windows: Largest part first.
        shown: Axial slices that the truth shows it on.
    """

    volume: int
    label: int
    windows: tuple[CloseUpWindow, ...]
    shown: NDArray[np.int64]


@dataclass(frozen=True)
class Jitter:
    """How far a training window is off the planned one.

    Attributes:
        shift: Standard deviation of its middle, in shares of its extent.
        zoom: Standard deviation of the logarithm of its pixel size.
        aspect: The same of height over width.
        turn: Largest angle in radians.
        bend: Standard deviation of a smooth displacement, in shares of its extent.
    """

    shift: float = 0.07
    zoom: float = 0.16
    aspect: float = 0.06
    turn: float = 0.25
    bend: float = 0.012


@dataclass
class WindowSample:
    """N windows with their truth, before they are made into what the network reads.

    Attributes:
        images: (N, C, S, S) in [0, 1].
        evidence: (N, E, S, S) in [0, 1].
        is_found: (N,) whether there is evidence.
        truth: (N, R, S, S) area shares in [0, 1], one per reader.
        weight: (N, R), 0 where there is no such reader.
        neighbour: (N, S, S) the truth of another slice.
        neighbour_mm: (N,) its distance; 0 for none.
        labels: N label ids.
        spacing: (N, 2) pixel size and distance of slices in mm.
    """

    images: Tensor
    evidence: Tensor
    is_found: Tensor
    truth: Tensor
    weight: Tensor
    neighbour: Tensor
    neighbour_mm: Tensor
    labels: list[int]
    spacing: Tensor


class WindowSource(Protocol):
    """A data set that windows are drawn from.

    Attributes:
        size: Pixels of a window along both axes.
        evidence_neighbours: Slices on each side whose evidence is shown.
    """

    size: int
    evidence_neighbours: int

    def look(self, rng: np.random.Generator) -> dict[str, Any]:
        """One window, the parts of a `WindowSample`."""
        ...


class WindowPool:
    """Data sets that are trained on together.

    Args:
        sources: What is drawn from.
        weights: How often each; equally often by default.

    Raises:
        RequestError: if there is no source, or they differ in the size of their windows.
    """

    def __init__(self, sources: Sequence[WindowSource], weights: Sequence[float] | None = None) -> None:
        shapes = {(source.size, source.evidence_neighbours) for source in sources}
        if len(shapes) != 1:
            raise RequestError(f"Windows of one pool have one size and depth, got {sorted(shapes) or 'no data set'}.")
        self.sources = tuple(sources)
        self.size, self.evidence_neighbours = next(iter(shapes))
        given = np.ones(len(sources)) if weights is None else np.asarray(weights, float)
        self._shares = given / given.sum()

    def draw(self, count: int, rng: np.random.Generator) -> WindowSample:
        """Draw windows."""
        return _stack([self.sources[rng.choice(len(self.sources), p=self._shares)].look(rng) for _ in range(count)])


@dataclass
class VolumeSource:
    """Labelled volumes, and where in them structures are looked for.

    Attributes:
        volumes: What is drawn from.
        size: Pixels of a training window; larger windows are drawn in parts of this size.
        num_neighbours, neighbour_mm: Slices on each side, see `CloseUpConfig`.
        gate: Evidence from which on a pixel is found, in 0..1.
        rules: How windows are planned.
        jitter: How far they are off.
        off_share: Share of the windows on slices without the structure.
        worn_share: Share of the windows of volumes that nothing looked at which get evidence made from the truth
            (`wear_truth`), so that evidence is known from their kind of image too.
    """

    volumes: Sequence[PooledVolume]
    size: int = 96
    num_neighbours: int = 2
    neighbour_mm: float = 3.0
    evidence_neighbours: int = 1
    gate: float = 0.3
    rules: WindowRules = field(default_factory=WindowRules)
    jitter: Jitter = field(default_factory=Jitter)
    off_share: float = 0.2
    worn_share: float = 0.0
    sights: list[Sight] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        for v, volume in enumerate(self.volumes):
            for label in volume.known:
                shown = np.flatnonzero((volume.labels == label).any(axis=(1, 2)))
                windows = plan_sight(volume, label, self.gate, self.rules)
                if windows:
                    self.sights.append(Sight(v, label, tuple(windows), shown))
        self._by_label: dict[int, list[Sight]] = {}
        for sight in self.sights:
            self._by_label.setdefault(sight.label, []).append(sight)

    def look(self, rng: np.random.Generator) -> dict[str, Any]:
        """One window; every structure is seen as often as any other."""
        labels = sorted(self._by_label)
        sights = self._by_label[labels[rng.integers(len(labels))]]
        return self._look(sights[rng.integers(len(sights))], rng)

    def _look(self, sight: Sight, rng: np.random.Generator) -> dict[str, Any]:
        volume = self.volumes[sight.volume]
        window = sight.windows[min(len(sight.windows) - 1, int(rng.geometric(0.75)) - 1)]
        inside = sight.shown[(sight.shown >= window.first) & (sight.shown <= window.last)]
        if len(inside) and rng.random() >= self.off_share:
            z = int(rng.choice(inside))
        else:
            z = int(rng.integers(window.first, window.last + 1))
        center, axes = jitter_window(window.center, window.spacing, window.size, self.size, self.jitter, rng)
        return self.show(volume, sight.label, z, center, axes, rng)

    def show(
        self,
        volume: PooledVolume,
        label: int,
        z: int,
        center: Tensor,
        axes: Tensor,
        rng: np.random.Generator,
    ) -> dict[str, Any]:
        """One window of a volume: images, evidence, truth and the truth of another slice."""
        depth = len(volume.image)
        dz, *plane = volume.spacing
        pixel = float(axes.norm(dim=0).mean())
        bend = draw_smooth(rng, self.jitter.bend * self.size * pixel, (2, 4, 4), self.size)
        step = max(1, round(self.neighbour_mm / dz))
        around = np.arange(-self.num_neighbours, self.num_neighbours + 1) * step
        slices = np.clip(z + around, 0, depth - 1)
        looks = count_looks(pixel, min(plane))

        def sample(stack: NDArray[np.uint8]) -> Tensor:
            return sample_window(stack, center, axes, bend, self.size, (plane[0], plane[1]), looks) / 255

        images = self.take_picture(volume.image[slices], sample, rng)
        other, far = self._pick_neighbour(volume, z, dz, rng)
        middle = slice(
            self.num_neighbours - self.evidence_neighbours, self.num_neighbours + self.evidence_neighbours + 1
        )
        is_worn = volume.evidence is None and rng.random() < self.worn_share
        rows = [z, other, *(slices[middle] if is_worn else [])]
        drawn = (volume.labels[rows] == label).astype(np.uint8)
        shares = sample_window(drawn, center, axes, bend, self.size, (plane[0], plane[1]), LABEL_LOOKS, mode="nearest")
        if is_worn:
            evidence = wear_truth(shares[2:], pixel, rng)
        elif volume.evidence is None or volume.grid is None:
            evidence = torch.zeros(2 * self.evidence_neighbours + 1, self.size, self.size)
        else:
            grid = volume.grid
            corner = torch.tensor(
                [grid.center[0] - grid.height * grid.spacing / 2, grid.center[1] - grid.width * grid.spacing / 2]
            )
            maps = volume.evidence[slices[middle], label - 1]
            evidence = (
                sample_window(
                    maps, center - corner, axes, bend, self.size, (grid.spacing, grid.spacing), 1, padding="border"
                )
                / 255
            )
        return {
            "images": images,
            "evidence": evidence,
            "is_found": float(is_worn or volume.evidence is not None),
            "truth": shares[:1],
            "neighbour": shares[1],
            "neighbour_mm": far,
            "label": label,
            "spacing": (pixel, dz * step),
        }

    def take_picture(
        self, stack: NDArray[np.uint8], sample: Callable[[NDArray[np.uint8]], Tensor], rng: np.random.Generator
    ) -> Tensor:
        """What a window of some slices shows, (C, S, S) in [0, 1].

        Args:
            stack: (C, Y, X), these slices.
            sample: Their pixels -> those of the window, (C, S, S) in [0, 1].
            rng: Of what is not the volume's own.
        """
        return sample(stack)

    def _pick_neighbour(self, volume: PooledVolume, z: int, dz: float, rng: np.random.Generator) -> tuple[int, float]:
        """Another slice up to 25 mm away, as an annotator may have accepted."""
        reach = max(1, round(25 / dz))
        other = int(np.clip(z + rng.integers(1, reach + 1) * rng.choice([-1, 1]), 0, len(volume.image) - 1))
        return other, abs(other - z) * dz


def draw_smooth(rng: np.random.Generator, spread: float, knots: tuple[int, int, int], size: int) -> Tensor:
    """A smooth random field (C, size, size), of standard deviation `spread` at its `knots` (C, rows, columns)."""
    coarse = torch.from_numpy(rng.normal(0, spread, (1, *knots))).float()
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]


def wear_truth(shares: Tensor, pixel: float, rng: np.random.Generator) -> Tensor:
    """Truth as a coarse network might find it: displaced by up to a few mm, blurred, too wide here, too narrow there.

    Args:
        shares: (E, S, S) area shares in [0, 1] of neighbouring slices.
        pixel: mm.
        rng: Of the errors.

    Returns:
        (E, S, S) in [0, 1].
    """
    count, size = len(shares), shares.shape[-1]
    still = F.affine_grid(torch.eye(2, 3)[None], [1, 1, size, size], align_corners=False)
    moved = still + draw_smooth(rng, rng.uniform(0, 2.5) / pixel * 2 / size, (2, 6, 6), size).permute(1, 2, 0)
    found = F.grid_sample(shares[None], moved, padding_mode="border", align_corners=False)[0]
    width = rng.uniform(1.2, 3.5) / pixel
    blurred = torch.from_numpy(gaussian_filter(found.numpy(), (0, width, width)))
    offset = (
        draw_smooth(rng, rng.uniform(0, 2), (1, 6, 6), size)
        + torch.from_numpy(rng.normal(0, 0.5, (count, 1, 1))).float()
    )
    return torch.sigmoid(torch.logit(blurred.clamp(1e-3, 1 - 1e-3)) * rng.uniform(0.8, 2) + offset)


def jitter_window(
    center: tuple[float, float], spacing: float, size: int, shown: int, jitter: Jitter, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Middle (2,) in mm and axes (2, 2) in mm per pixel of a window that is a little off.

    Args:
        center, spacing, size: Of the planned window.
        shown: Pixels of the training window; of a larger one a part is shown.
        jitter: How far it is off.
    """
    extent = size * spacing
    room = max(0.0, (size - shown) / 2 * spacing)
    moved = np.array(center) + rng.normal(0, jitter.shift * extent, 2) + rng.uniform(-room, room, 2)
    pixel = spacing * np.exp(rng.normal(0, jitter.zoom))
    aspect, angle = np.exp(rng.normal(0, jitter.aspect)), rng.uniform(-jitter.turn, jitter.turn)
    scale = np.diag([pixel * aspect, pixel / aspect])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return torch.from_numpy(moved).float(), torch.from_numpy(turn @ scale).float()


def plan_sight(volume: PooledVolume, label: int, gate: float, rules: WindowRules) -> list[CloseUpWindow]:
    """The windows of a structure: from the evidence as in use, from the truth where there is none."""
    if volume.evidence is not None and volume.grid is not None:
        found = plan_windows(volume.evidence[:, label - 1] >= gate * 255, volume.grid, rules)
        if found:
            return found
    depth, rows, columns = volume.image.shape
    _, dy, dx = volume.spacing
    # The truth on square pixels, as `plan_windows` wants them.
    grid = WorkingGrid(
        (depth, rows, columns),
        volume.spacing,
        (rows * dy / 2, columns * dx / 2),
        min(dy, dx),
        round(rows * dy / min(dy, dx)),
        round(columns * dx / min(dy, dx)),
    )
    mask = volume.labels == label
    if not mask.any():
        return []
    if mask.shape[1:] != (grid.height, grid.width):
        mask = F.interpolate(torch.from_numpy(mask)[:, None].float(), (grid.height, grid.width))[:, 0].numpy() > 0.5
    return plan_windows(mask, grid, rules)


def sample_window(
    pixels: NDArray[np.uint8],
    center: Tensor,
    axes: Tensor,
    bend: Tensor,
    size: int,
    spacing: tuple[float, float],
    looks: int,
    mode: str = "bilinear",
    padding: str = "zeros",
) -> Tensor:
    """(C, Y, X) -> (C, size, size) of a warped window; reads only the rows and columns that it needs."""
    reach = axes.abs().sum(dim=1) * size / 2 + bend.abs().amax() + 2 * max(spacing)
    low = [max(0, int((center[a] - reach[a]) / spacing[a])) for a in (0, 1)]
    high = [min(pixels.shape[1 + a], int((center[a] + reach[a]) / spacing[a]) + 2) for a in (0, 1)]
    if low[0] >= high[0] or low[1] >= high[1]:
        return torch.zeros(len(pixels), size, size)
    part = torch.from_numpy(np.ascontiguousarray(pixels[:, low[0] : high[0], low[1] : high[1]])).float()
    origin = torch.tensor([low[0] * spacing[0], low[1] * spacing[1]])
    source = (int(part.shape[1]), int(part.shape[2]))
    grid = make_sampling_grid((center - origin)[None], axes[None], size, source, spacing, looks)
    extent = torch.tensor([source[0] * spacing[0], source[1] * spacing[1]])
    shift = bend
    if looks > 1:
        shift = F.interpolate(bend[None], scale_factor=looks, mode="bilinear", align_corners=False)[0]
    grid = grid + (shift.permute(1, 2, 0) / extent * 2).flip(-1)
    if mode == "bilinear" and padding == "zeros":
        return sample_area(part[None], grid, looks)[0]
    found = F.grid_sample(part[None], grid, mode=mode, padding_mode=padding, align_corners=False)
    return (F.avg_pool2d(found, looks) if looks > 1 else found)[0]


def _stack(parts: Sequence[dict[str, Any]]) -> WindowSample:
    readers = max(len(part["truth"]) for part in parts)
    truth = torch.stack([F.pad(part["truth"], (0, 0, 0, 0, 0, readers - len(part["truth"]))) for part in parts])
    weight = torch.tensor([[float(r < len(part["truth"])) for r in range(readers)] for part in parts])
    return WindowSample(
        images=torch.stack([part["images"] for part in parts]),
        evidence=torch.stack([part["evidence"] for part in parts]),
        is_found=torch.tensor([part["is_found"] for part in parts]),
        truth=truth,
        weight=weight,
        neighbour=torch.stack([part["neighbour"] for part in parts]),
        neighbour_mm=torch.tensor([part["neighbour_mm"] for part in parts]),
        labels=[part["label"] for part in parts],
        spacing=torch.tensor([part["spacing"] for part in parts]),
    )
