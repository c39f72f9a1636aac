"""Pictures of masks and proposals on axial slices, for people.

Slices are drawn as on a radiologist's screen: the patient's right at the picture's left, the spine at the bottom,
pixels in their true proportions. A structure has the same colour in every picture. matplotlib is imported when a
picture is drawn, without its global state, so that a server's threads may draw as well.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import RequestError, StoreError
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.volume import Volume
from progidiff.prompts.structures import pick_color
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.storage.atomic import replace_bytes

BACKGROUND = "#101214"
TEXT = "#e8e8e8"
DPI = 110
MARGIN_MM = 20.0


def draw_overlay(
    volume: Volume,
    labels: NDArray[Any],
    names: Mapping[int, str],
    path: str | os.PathLike[str],
    slices: Sequence[int] | None = None,
    num_slices: int = 5,
    title: str = "",
) -> Path:
    """A row of axial slices with every structure as a tinted area with an outline, and a legend.

    Args:
        volume: The image.
        labels: Label ids on its grid, shape (I, J, K) in file order; 0 is nothing.
        names: Label id -> structure, for the legend; ids without a name are drawn and called by their number.
        path: PNG to write (whole or not at all).
        slices: Axial indices z; by default `pick_slices` chooses.
        num_slices: How many it chooses.
        title: A line above the picture.

    Returns:
        The path written.

    Raises:
        GeometryError: if the labels are not on the volume's grid.
        RequestError: if a slice does not exist.
        StoreError: if the disk refuses.
    """
    from matplotlib.patches import Patch

    stack, spacing = volume.to_stack()
    found = volume.arrange(labels)
    chosen = _check_slices(slices, len(stack)) if slices is not None else pick_slices(found, num_slices)
    rows, cols = _find_body(volume, stack, found > 0, spacing)
    figure, axes = _make_figure(1, len(chosen), _proportion(rows, cols, spacing), extra_inches=0.9 if title else 0.62)
    window = compute_window(volume)
    for axis, z in zip(axes[0], chosen, strict=True):
        _show_slice(axis, stack[z], rows, cols, spacing, window)
        _write_sides(axis)
        axis.set_title(f"z = {z}", color=TEXT, fontsize=8, pad=3)
        for value in np.unique(found[z]):
            if value:
                _paint(axis, found[z] == value, rows, cols, spacing, pick_color(names.get(int(value), ""), int(value)))
    present = [int(value) for value in np.unique(labels) if value]
    patches = [
        Patch(color=pick_color(names.get(value, ""), value), label=names.get(value, f"label {value}"))
        for value in present
    ]
    if patches:
        figure.legend(
            handles=patches, loc="lower center", ncols=min(len(patches), 7), frameon=False, labelcolor=TEXT, fontsize=8
        )
    else:
        figure.text(0.5, 0.03, "nothing found", color=TEXT, ha="center", fontsize=8)
    if title:
        figure.suptitle(title, color=TEXT, fontsize=9)
    return _save(figure, path)


def draw_proposals(
    volume: Volume,
    proposals: VolumeProposals,
    path: str | os.PathLike[str],
    structures: Sequence[str] | None = None,
    slices: Sequence[int] | None = None,
    max_proposals: int = 4,
) -> Path:
    """One row per structure: the slice, the proposals side by side, their consensus, and the share of proposals per
    pixel.

    The first column shows the whole slice, the others the part of it in the white frame.

    Args:
        volume: The image that the proposals were made for.
        proposals: The result of `Engine.propose`.
        path: PNG to write (whole or not at all).
        structures: Rows, in this order; by default all that were asked.
        slices: Axial index z of each row; by default a large slice on which the proposals differ.
        max_proposals: Columns of proposals; the consensus and the shares are always those of all.

    Raises:
        GeometryError: if the volume has another grid.
        RequestError: if there is no such structure or slice.
        StoreError: if the disk refuses.
    """
    wanted = list(proposals.structures if structures is None else structures)
    stack, spacing = volume.to_stack()
    if slices is not None and len(slices) != len(wanted):
        raise RequestError(f"{len(slices)} slices were given for {len(wanted)} structures; give one for each, or none.")
    shown = min(max_proposals, proposals.num_proposals)
    body = _find_body(volume, stack, None, spacing)
    window = compute_window(volume)
    figure, axes = _make_figure(len(wanted), shown + 3, _proportion(*body, spacing), extra_inches=0.75)
    ids = {name: index + 1 for index, name in enumerate(proposals.structures)}
    for position, (name, row) in enumerate(zip(wanted, axes, strict=True)):
        share = volume.arrange(proposals.agreement(volume.grid, name))
        masks = [volume.arrange(proposals.mask(volume.grid, name, k + 1)) for k in range(shown)]
        z = _check_slices(slices, len(stack))[position] if slices is not None else _pick_telling_slice(share)
        frame = _frame_around(share[z] > 0, body, spacing)
        color = pick_color(name, ids[name])
        heat = _draw_row(row, stack[z], share[z], [mask[z] for mask in masks], body, frame, spacing, window, color)
        index = proposals.structures.index(name)
        row[0].set_ylabel(name, color=TEXT, fontsize=9)
        row[0].set_xlabel(
            f"z = {z}, disagreement {proposals.disagreement[index, z]:.2f}"
            if share[z].any()
            else f"z = {z}, not found",
            color=TEXT,
            fontsize=7,
        )
    headings = [
        "slice",
        *(f"proposal {k + 1}" for k in range(shown)),
        f"consensus of {proposals.num_proposals}",
        "agreement",
    ]
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, color=TEXT, fontsize=9, pad=4)
    bar = figure.colorbar(heat, ax=axes[:, -1].tolist(), fraction=0.05, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label(f"share of {proposals.num_proposals} proposals", color=TEXT, fontsize=7)
    bar.ax.tick_params(colors=TEXT, labelsize=7)
    bar.outline.set_visible(False)
    return _save(figure, path)


def pick_slices(labels: NDArray[Any], count: int) -> list[int]:
    """Axial slices that show what is labelled, each structure counting the same, in ascending order.

    Args:
        labels: Label ids on the axial stack, shape (Z, Y, X).
        count: How many; fewer if the stack has fewer. Evenly spaced slices if nothing is labelled.

    Example:
        >>> labels = np.zeros((9, 2, 2), np.uint8)
        >>> labels[4:7] = 1
        >>> pick_slices(labels, 3), pick_slices(labels * 0, 3)
        ([4, 5, 6], [2, 4, 6])
    """
    count = min(count, len(labels))
    weights = np.zeros(len(labels))
    for value in np.unique(labels):
        if value:
            area = (labels == value).sum(axis=(1, 2)).astype(np.float64)
            weights += area / area.sum()
    if not weights.any():
        weights += 1
        quantiles = (np.arange(count) + 1) / (count + 1)
    else:
        quantiles = (np.arange(count) + 0.5) / count
    height = np.cumsum(weights) / weights.sum()
    chosen = set(np.searchsorted(height, quantiles - 1e-9).tolist())
    for z in np.argsort(-weights, kind="stable").tolist():  # Quantiles may fall on the same slice.
        if len(chosen) >= count:
            break
        chosen.add(z)
    return sorted(chosen)


def _pick_telling_slice(share: NDArray[Any]) -> int:
    """The slice with the most doubt among those with at least half of the largest area; the middle one if nothing is
    drawn.
    """
    area = (share >= 0.5).sum(axis=(1, 2))
    if not area.any():
        area = (share > 0).sum(axis=(1, 2))
    if not area.any():
        return len(share) // 2
    doubt = (share * (1 - share)).sum(axis=(1, 2))
    return int(np.argmax(np.where(area * 2 >= area.max(), doubt + 1e-9 * area, -1)))


def _check_slices(slices: Sequence[int], count: int) -> list[int]:
    wrong = [z for z in slices if not 0 <= z < count]
    if wrong:
        raise RequestError(f"There is no slice {wrong[0]}; this volume has the axial slices 0 to {count - 1}.")
    return list(slices)


def _find_body(
    volume: Volume, stack: NDArray[Any], also: NDArray[Any] | None, spacing: tuple[float, float, float]
) -> tuple[slice, slice]:
    """Rows and columns that hold the body in most slices and everything in `also` (boolean stack), with a small
    margin.
    """
    sampled = stack[:: max(1, len(stack) // 24)]
    body = (sampled > compute_body_threshold(volume)).mean(axis=0) > 0.5
    shape = body.shape
    marked = np.asarray(also.any(axis=0)) if also is not None else np.zeros(shape, dtype=bool)
    spans = []
    for axis in (0, 1):
        inside = (body.mean(axis=1 - axis) > 0.06) | marked.any(axis=1 - axis)
        spans.append(_grow(np.flatnonzero(inside), 0.25 * MARGIN_MM / spacing[1 + axis], shape[axis]))
    return spans[0], spans[1]


def _grow(positions: NDArray[Any], margin: float, size: int) -> slice:
    """From the first to the last position with a margin in pixels; everything if there is none."""
    if len(positions) == 0:
        return slice(0, size)
    return slice(max(0, int(positions[0] - margin)), min(size, int(positions[-1] + margin) + 1))


def _frame_around(
    mask: NDArray[Any], body: tuple[slice, slice], spacing: tuple[float, float, float]
) -> tuple[slice, slice]:
    """A box around the mask with a margin, in the proportions of the body's box and not smaller than a third of it."""
    if not mask.any():
        return body
    rows, cols = np.nonzero(mask)
    heights = [(body[axis].stop - body[axis].start) * spacing[1 + axis] for axis in (0, 1)]
    extents = [(np.ptp(places) + 1) * spacing[1 + axis] + 2 * MARGIN_MM for axis, places in enumerate((rows, cols))]
    scale = min(1.0, max(extents[0] / heights[0], extents[1] / heights[1], 1 / 3))
    spans = []
    for axis, places in enumerate((rows, cols)):
        length = max(2, round(scale * (body[axis].stop - body[axis].start)))
        middle = (int(places.min()) + int(places.max()) + 1) / 2
        start = int(
            np.clip(round(middle - length / 2), body[axis].start, max(body[axis].start, body[axis].stop - length))
        )
        spans.append(slice(start, start + length))
    return spans[0], spans[1]


def _proportion(rows: slice, cols: slice, spacing: tuple[float, float, float]) -> float:
    """Height over width of a box of pixels, in mm."""
    found: float = (rows.stop - rows.start) * spacing[1] / ((cols.stop - cols.start) * spacing[2])
    return found


def _make_figure(rows: int, cols: int, proportion: float, extra_inches: float) -> tuple[Any, NDArray[Any]]:
    """A figure without pyplot, with (rows, cols) bare axes of this height over width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = 2.5 if cols > 3 else 3.4
    height = width * float(np.clip(proportion, 0.3, 2.5))
    size = (cols * width, rows * (height + (0.12 if rows > 1 else 0)) + extra_inches)
    legend = 0.35 / size[1] if rows == 1 else 0.0
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01, rect=(0, legend, 1, 1 - legend))
    figure = Figure(figsize=size, dpi=DPI, facecolor=BACKGROUND, layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, cols, squeeze=False)
    for axis in axes.ravel():
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_facecolor("black")
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, axes


def _extent(rows: slice, cols: slice, spacing: tuple[float, float, float]) -> tuple[float, float, float, float]:
    """Outer edges of a box of pixels in mm, as matplotlib wants them: left, right, bottom, top (y downwards)."""
    return cols.start * spacing[2], cols.stop * spacing[2], rows.stop * spacing[1], rows.start * spacing[1]


def _show_slice(
    axis: Any,
    pixels: NDArray[Any],
    rows: slice,
    cols: slice,
    spacing: tuple[float, float, float],
    window: tuple[float, float],
) -> None:
    axis.imshow(
        pixels[rows, cols],
        cmap="gray",
        vmin=window[0],
        vmax=window[1],
        extent=_extent(rows, cols, spacing),
        interpolation="bilinear",
    )


def _paint(
    axis: Any, mask: NDArray[Any], rows: slice, cols: slice, spacing: tuple[float, float, float], color: str
) -> None:
    """Tint a mask (Y, X) and draw its outline."""
    from matplotlib.colors import to_rgb

    part = mask[rows, cols]
    if not part.any():
        return
    tint = np.zeros((*part.shape, 4), dtype=np.float32)
    tint[part.astype(bool)] = (*to_rgb(color), 0.32)
    axis.imshow(tint, extent=_extent(rows, cols, spacing), interpolation="nearest")
    _outline(axis, mask, rows, cols, spacing, color)


def _outline(
    axis: Any, mask: NDArray[Any], rows: slice, cols: slice, spacing: tuple[float, float, float], color: str
) -> None:
    """Draw the outline of a mask (Y, X), which must have a pixel in the box, in the scale that the slice was shown
    in.
    """
    part, extent = mask[rows, cols], _extent(rows, cols, spacing)
    padded = np.pad(part.astype(np.float32), 1)  # so that an outline closes at the edge of the box
    x = (np.arange(padded.shape[1]) - 0.5 + cols.start) * spacing[2]
    y = (np.arange(padded.shape[0]) - 0.5 + rows.start) * spacing[1]
    axis.contour(x, y, padded, levels=[0.5], colors=[color], linewidths=1.1)
    axis.set_xlim(extent[0], extent[1])
    axis.set_ylim(extent[2], extent[3])


def _draw_row(
    axes: NDArray[Any],
    pixels: NDArray[Any],
    share: NDArray[Any],
    masks: list[NDArray[Any]],
    body: tuple[slice, slice],
    frame: tuple[slice, slice],
    spacing: tuple[float, float, float],
    window: tuple[float, float],
    color: str,
) -> Any:
    """One structure on one slice; returns the heat map for the colour bar."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    _show_slice(axes[0], pixels, *body, spacing, window)
    _write_sides(axes[0])
    left, right, bottom, top = _extent(*frame, spacing)
    axes[0].add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="white", linewidth=0.8))
    for axis, mask in zip(axes[1:], [*masks, share >= 0.5], strict=False):
        _show_slice(axis, pixels, *frame, spacing, window)
        _paint(axis, mask.astype(bool) & (share > 0), *frame, spacing, color)
    _show_slice(axes[-1], pixels, *frame, spacing, window)
    part = share[frame[0], frame[1]]
    return axes[-1].imshow(
        np.ma.masked_equal(part, 0),
        cmap=colormaps["inferno"],
        vmin=0,
        vmax=1,
        alpha=0.8,
        extent=_extent(*frame, spacing),
        interpolation="nearest",
    )


def _write_sides(axis: Any) -> None:
    """R and L for the patient's sides."""
    for place, side, align in ((0.015, "R", "left"), (0.985, "L", "right")):
        axis.text(place, 0.97, side, transform=axis.transAxes, color=TEXT, fontsize=8, ha=align, va="top")


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    content = io.BytesIO()
    figure.savefig(content, format="png", facecolor=figure.get_facecolor(), metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_bytes(path, content.getvalue(), durable=False)
    except OSError as err:
        raise StoreError(f"'{path}' could not be written ({err}). Free some space or choose another folder.") from err
    return path
