"""Close-ups of one structure on a volume: windows around its evidence, drawn slice by slice, and put together.

1. plan   evidence (Z, h, w)                 -> windows, each for a run of slices
2. look   window, slices (n)                 -> what the network reads, (n, C, S, S)
3. draw   K proposals                        -> (n, K, S, S)
4. place  windows on the pixels of a target  -> (K, n, rows, columns), blended where windows overlap
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from progidiff.images.close_up import CloseUpWindow
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.close_up import WindowBatch
from progidiff.model.close_up_pipeline import CloseUpPipeline


@dataclass(frozen=True)
class Subject:
    """A structure of a volume.

    Attributes:
        stack: (Z, Y, X), the axial stack.
        intensities: (low, high) that map to -1 and 1.
        evidence: uint8 (Z, h, w) of 0..255 on `grid`.
        grid: The working grid.
        pooled: (T,) its text vector.
        tokens: (L, D) for cross-attention.
        token_mask: (L,), or None.
        empty: Tokens (1, L', D) and mask (1, L') of the empty text, for guidance; None without it.
        is_found: Whether `evidence` says anything; False for what has no name, which edits alone describe.
        edits: Maps (D, S, S) of a slice of a window, or None where nobody drew anything.
    """

    stack: NDArray[np.generic]
    intensities: tuple[float, float]
    evidence: NDArray[np.uint8]
    grid: WorkingGrid
    pooled: Tensor
    tokens: Tensor
    token_mask: Tensor | None
    empty: tuple[Tensor, Tensor | None] | None = None
    is_found: bool = True
    edits: Callable[[CloseUpWindow, int], Tensor | None] | None = None


@dataclass(frozen=True)
class Drawing:
    """What was drawn in a window.

    Attributes:
        window: Where.
        slices: (n,) axial indices.
        sharpened: (n, S, S) the evidence, sharpened, in [0, 1].
        probabilities: (n, K, S, S) the proposals, in [0, 1].
    """

    window: CloseUpWindow
    slices: NDArray[np.int64]
    sharpened: Tensor
    probabilities: Tensor


def draw_close_ups(
    pipeline: CloseUpPipeline,
    subject: Subject,
    windows: Sequence[CloseUpWindow],
    noise: Tensor,
    levels: Tensor,
    num_inference_steps: int = 1,
    slices: NDArray[np.int64] | None = None,
    at_once: int = 16,
    guidance_scale: float = 1.0,
) -> Iterator[Drawing]:
    """Draw a structure in its windows.

    Args:
        pipeline: The networks.
        subject: What is drawn.
        windows: Where it is looked for.
        noise, levels: Of the proposals, see `CloseUpPipeline`.
        num_inference_steps: T.
        slices: Only these axial indices; None for all that the windows show.
        at_once: Windows in one batch.
        guidance_scale: Strength of the text; 1 costs nothing.
    """
    for window in windows:
        wanted = window.slices if slices is None else window.slices[np.isin(window.slices, slices)]
        for start in range(0, len(wanted), at_once):
            part = wanted[start : start + at_once]
            batch = look(pipeline, subject, window, part)
            count = len(part)
            tokens = subject.tokens[None].expand(count, -1, -1)
            mask = None if subject.token_mask is None else subject.token_mask[None].expand(count, -1)
            sharpened, drawn = pipeline.propose(
                batch, tokens, mask, noise, levels, num_inference_steps, guidance_scale, subject.empty
            )
            yield Drawing(window, part, sharpened, drawn)


_Look = tuple[int, CloseUpWindow, NDArray[np.int64], WindowBatch]
"""Number of a structure, a window, some of its slices, and what the network reads of them."""


def draw_together(
    pipeline: CloseUpPipeline,
    items: Sequence[tuple[Subject, Sequence[CloseUpWindow]]],
    noise: Tensor,
    levels: Tensor,
    num_inference_steps: int = 1,
    slices: NDArray[np.int64] | None = None,
    at_once: int = 16,
    guidance_scale: float = 1.0,
) -> Iterator[tuple[int, Drawing]]:
    """Draw several structures in their windows, windows of one size in one batch whatever they show.

    For devices: a structure has a few windows on a batch of slices, and a device is busy with many at once. Batches of
    another size round differently, so the processor draws structure by structure (`draw_close_ups`) and gives the same
    bits whatever else is asked.

    Args:
        pipeline: The networks.
        items: Structures and their windows.
        noise, levels, num_inference_steps, slices, at_once, guidance_scale: See `draw_close_ups`.

    Yields:
        The number of the structure, and what was drawn in one of its windows.
    """
    looks: dict[tuple[int, bool], list[_Look]] = {}

    def draw(
        group: Sequence[_Look],
    ) -> Iterator[tuple[int, Drawing]]:
        owners = [items[p][0] for p, _, part, _ in group for _ in part]
        batch = WindowBatch.concatenate([batch for _, _, _, batch in group])
        masks = [owner.token_mask for owner in owners if owner.token_mask is not None]
        length = max(len(owner.tokens) for owner in owners)
        tokens = torch.stack([_lengthen(owner.tokens, length) for owner in owners])
        mask = torch.stack([_lengthen(mask, length) for mask in masks]) if masks else None
        sharpened, drawn = pipeline.propose(
            batch, tokens, mask, noise, levels, num_inference_steps, guidance_scale, owners[0].empty
        )
        start = 0
        for p, window, part, _ in group:
            rows = slice(start, start + len(part))
            start += len(part)
            yield p, Drawing(window, part, sharpened[rows], drawn[rows])

    for p, (subject, windows) in enumerate(items):
        for window in windows:
            wanted = window.slices if slices is None else window.slices[np.isin(window.slices, slices)]
            for start in range(0, len(wanted), at_once):
                part = wanted[start : start + at_once]
                batch = look(pipeline, subject, window, part)
                # Without edits a network does not look for them at all, and that is not the same as none.
                kind = int(batch.images.shape[-1]), batch.edits is None
                group = looks.setdefault(kind, [])
                if sum(len(other) for _, _, other, _ in group) + len(part) > at_once:
                    yield from draw(group)
                    group.clear()
                group.append((p, window, part, batch))
    for group in looks.values():
        if group:
            yield from draw(group)


def _lengthen(tokens: Tensor, length: int) -> Tensor:
    """(L, ...) -> (length, ...) with zeros, which a mask leaves out."""
    return (
        torch.cat([tokens, tokens.new_zeros(length - len(tokens), *tokens.shape[1:])])
        if len(tokens) < length
        else tokens
    )


def look(pipeline: CloseUpPipeline, subject: Subject, window: CloseUpWindow, slices: NDArray[np.int64]) -> WindowBatch:
    """What the network reads of some slices of a window."""
    config, device = pipeline.network.config, pipeline.device
    depth, dz = window.shape[0], window.stack_spacing[0]
    step = max(1, round(config.neighbour_mm / dz))
    offsets = np.arange(-config.num_neighbours, config.num_neighbours + 1) * step
    wanted = np.clip(slices[:, None] + offsets[None], 0, depth - 1)  # (n, C)
    unique, inverse = np.unique(wanted, return_inverse=True)
    low, high = subject.intensities
    # Background is 0 for the resampling, as it is in training.
    part = np.clip((subject.stack[unique].astype(np.float32) - low) / (high - low), 0, 1)
    shown = window.extract(part, np.arange(len(unique)))
    images = shown[torch.from_numpy(inverse.reshape(wanted.shape))] * 2 - 1
    middle = slice(
        config.num_neighbours - config.evidence_neighbours, config.num_neighbours + config.evidence_neighbours + 1
    )
    near = wanted[:, middle]
    known, back = np.unique(near, return_inverse=True)
    maps = window.extract_map(torch.from_numpy(subject.evidence[known]).float() / 255, subject.grid)
    evidence = maps[torch.from_numpy(back.reshape(near.shape))]
    edits = None
    if subject.edits is not None:
        drawn = [subject.edits(window, int(z)) for z in slices]
        if any(one is not None for one in drawn):
            blank = next(torch.zeros_like(one) for one in drawn if one is not None)
            edits = torch.stack([blank if one is None else one for one in drawn]).to(device)
    return WindowBatch(
        images=images.to(device),
        evidence=evidence.to(device),
        is_found=torch.full((len(slices),), float(subject.is_found), device=device),
        edits=edits,
        pooled=subject.pooled[None].expand(len(slices), -1).to(device),
        spacing=torch.tensor([[window.spacing, dz * step]], device=device).expand(len(slices), -1),
    )


def place_on_stack(
    drawings: Sequence[Drawing], which: Callable[[Drawing], Tensor]
) -> Mapping[int, tuple[tuple[slice, slice], Tensor]]:
    """Maps of all windows on the stack's own pixels, blended where they overlap.

    Args:
        drawings: Of one structure.
        which: What of them: (n, S, S) or (n, K, S, S).

    Returns:
        Axial index -> the rows and columns of the smallest box around all windows, and the maps there.
    """
    by_slice: dict[int, list[tuple[CloseUpWindow, Tensor]]] = {}
    for drawing in drawings:
        maps = which(drawing)
        for n, z in enumerate(drawing.slices.tolist()):
            by_slice.setdefault(z, []).append((drawing.window, maps[n]))
    return {
        z: blend(parts, lambda window, values: (window.box, window.restore(values))) for z, parts in by_slice.items()
    }


Restore = Callable[[CloseUpWindow, Tensor], tuple[tuple[slice, slice], Tensor]]
"""A window and its maps -> rows and columns of the target, and the maps there."""


def blend(parts: Sequence[tuple[CloseUpWindow, Tensor]], restore: Restore) -> tuple[tuple[slice, slice], Tensor]:
    """Maps of several windows as one: where they overlap, each counts less towards its border.

    Args:
        parts: Windows and their maps (..., S, S) of one slice.
        restore: Brings them to the target's pixels.

    Returns:
        The rows and columns of the smallest box around all windows, and the maps (..., rows, columns).
    """
    if len(parts) == 1:
        return restore(*parts[0])
    restored = [restore(window, maps) for window, maps in parts]
    boxes = [box for box, _ in restored]
    rows, columns = (
        slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in (0, 1)
    )
    leading = parts[0][1].shape[:-2]
    total = torch.zeros(*leading, rows.stop - rows.start, columns.stop - columns.start)
    weight = torch.zeros(total.shape[-2:])
    for (window, _), (box, maps) in zip(parts, restored, strict=True):
        inside = (
            slice(box[0].start - rows.start, box[0].stop - rows.start),
            slice(box[1].start - columns.start, box[1].stop - columns.start),
        )
        taper = restore(window, window.make_taper())[1]
        total[..., inside[0], inside[1]] += maps * taper
        weight[inside] += taper
    return (rows, columns), total / weight.clamp_min(1e-6)
