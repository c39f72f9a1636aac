"""How much is computed at once: slices and latents that fit into the device's memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")


@dataclass(frozen=True)
class BatchSize:
    """How much at once.

    Attributes:
        slices: Encoded together.
        samples: Latents denoised together: (slice, structure) pairs x proposals.
    """

    slices: int
    samples: int

    def halve(self, slices: int, samples: int) -> BatchSize:
        """Half of what was just tried, at least one of each.

        Args:
            slices: Of the batch that did not fit.
            samples: Latents that the batch could have had in all.
        """
        return BatchSize(max(1, slices // 2), max(1, min(self.samples, samples) // 2))


@dataclass(frozen=True)
class Batch:
    """Slices to compute together.

    Attributes:
        number: Of the whole batch that it is, or is a part of.
        slices: Axial indices, ascending.
    """

    number: int
    slices: NDArray[np.int64]


def plan_batches(slices: NDArray[np.int64], size: int, first: int | None = None) -> list[Batch]:
    """Whole batches, in the order in which to compute them: as they lie, or by their distance to an axial index.

    Example:
        >>> [batch.slices.tolist() for batch in plan_batches(np.arange(5), 2, first=3)]
        [[2, 3], [4], [0, 1]]
    """
    batches = [Batch(number, slices[start : start + size]) for number, start in enumerate(range(0, len(slices), size))]
    if first is not None:
        batches.sort(key=lambda batch: int(np.abs(batch.slices - first).min()))
    return batches


def compute_in_batches(
    batches: Sequence[Batch],
    size: BatchSize,
    samples_per_slice: int,
    compute: Callable[[Batch, BatchSize], T],
    on_full: Callable[[BatchSize], None],
) -> Iterator[tuple[Batch, T]]:
    """Compute one batch after the other. One that does not fit into memory is computed in halves, and so is everything
    after it, down to one latent of one slice.

    Args:
        batches: See `plan_batches`.
        size: How much to try first.
        samples_per_slice: Latents of a slice at most: structures x proposals.
        compute: Computes a batch with at most so many latents at once.
        on_full: Called with the size that is tried next; lets go of what can be made again.

    Yields:
        What was computed together, and what `compute` gave.

    Raises:
        Exception: what `compute` raises, if it is no lack of memory or the smallest batch does not fit.
    """
    todo = deque(batches)
    while todo:
        batch = todo.popleft()
        count = len(batch.slices)
        if count > size.slices:
            parts = [Batch(batch.number, batch.slices[i : i + size.slices]) for i in range(0, count, size.slices)]
            todo.extendleft(reversed(parts))
            continue
        is_full = False
        try:
            outcome = compute(batch, size)
        except Exception as err:
            if not is_out_of_memory(err) or (count == 1 and size.samples == 1):
                raise
            is_full = True
        if is_full:  # After the except clause: its error holds what was computed so far.
            size = size.halve(count, count * samples_per_slice)
            on_full(size)
            todo.appendleft(batch)
            continue
        yield batch, outcome


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error of torch or numpy means that memory did not suffice; not every device has a class for it."""
    text = str(err).lower()
    signs = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
    return isinstance(err, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(err, RuntimeError) and any(sign in text for sign in signs)
    )
