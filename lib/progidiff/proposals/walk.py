"""The way of one request through the networks, on one volume.

1. encode    slices (n, C, H, W)          -> features, once per slice, whatever is asked of it
2. evidence  features, prompts (P)        -> (n, P, H, W) in [0, 1]; M (slice, structure) pairs are not plainly absent
3. propose   pairs, noise (K, c, h, w)    -> probabilities (M, K, H, W)
4. store     probabilities                -> uint8 (P, K, Z, H, W), 8 bits each
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from progidiff.errors import CancelledError, ImageError, RequestError
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid, plan_working_grid
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import ModelCard
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline
from progidiff.proposals.batches import Batch, BatchSize, plan_batches
from progidiff.proposals.islands import DRAWN
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work

WHOLE = BatchSize(slices=16, samples=64)

SMALL = BatchSize(slices=4, samples=16)
"""What the processor does in about a second, for work that makes way for others (`Work.is_yielding`)."""

Pair = tuple[int, int]
"""(n, p): a slice of the batch and a structure."""


class FeatureBook:
    """The features of the batches of one request: those that an earlier prompt left, or new ones for the next.

    Args:
        known: Of every batch, by number; None if there are none.
        is_collecting: Whether new ones are wanted.
        max_bytes: More than so many are not held.
    """

    def __init__(self, known: Sequence[SliceFeatures] | None, is_collecting: bool, max_bytes: int) -> None:
        self._known = known
        self._fresh: dict[int, SliceFeatures] | None = {} if is_collecting and known is None else None
        self._max_bytes = max_bytes

    def find(self, number: int) -> SliceFeatures | None:
        """Of a batch; None if they have to be computed."""
        return None if self._known is None else self._known[number]

    def add(self, number: int, features: SliceFeatures) -> None:
        """Collect what was computed."""
        if self._fresh is not None:
            self._fresh[number] = features
            if count_bytes(self._fresh.values()) > self._max_bytes:
                self._fresh = None  # Too large to remember; do not hold what will not be kept.

    def drop(self) -> None:
        """Let go of all, and collect no more: memory is full, and batches are no longer whole."""
        self._known = self._fresh = None

    def collected(self, count: int) -> list[SliceFeatures] | None:
        """The new features of all batches; None if they are not new, not wanted or not complete."""
        if self._fresh is None or len(self._fresh) < count:
            return None
        return [self._fresh[number] for number in range(count)]


class Walk:
    """One request on one volume.

    Args:
        pipeline: The networks that answer.
        card: Of the model.
        request: Settled, see `ProposalRequest.settle`.
        adapter: Full name of the version whose networks these are; "" for the model itself.
        volume: The image.
        prompts: The request's P structures, encoded.
        work: How to compute it, and who watches.
        started: When the computation began, on the monotonic clock.

    Attributes:
        slices: The axial indices that are to be computed, ascending: int64 of shape (Z',).
        batches: The same in batches, in the order in which to compute them.
        size: Of the batches.

    Raises:
        RequestError: if a slice is asked for that the volume has not.
        ImageError: if the volume cannot be segmented.
    """

    def __init__(
        self,
        pipeline: ProposalPipeline,
        card: ModelCard,
        request: ProposalRequest,
        adapter: str,
        volume: Volume,
        prompts: EncodedPrompts,
        work: Work,
        started: float,
    ) -> None:
        self._steps, self._guidance = request.settled()
        self._started = started
        self._pipeline, self._card, self._request, self._work = pipeline, card, request, work
        self._volume, self._prompts = volume, prompts
        config = card.conditioning
        self._stack, spacing = volume.to_stack()  # (Z, Y, X)
        grid = plan_working_grid(
            self._stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
        )
        self._window = compute_window(volume, config.mr_headroom)
        self._noise = pipeline.draw_noise(request.num_proposals, request.seed)  # (K, c, h, w)
        self._offsets = pipeline.draw_offsets(request.num_proposals, request.seed)  # (K, H, W) or None

        depth = len(self._stack)
        wanted = np.arange(depth) if request.slices is None else np.asarray(request.slices, dtype=np.int64)
        if len(wanted) == 0 or wanted[0] < 0 or wanted[-1] >= depth:
            raise RequestError(f"Slices must lie in 0..{depth - 1}, the axial indices of '{volume.name}'.")
        self._grid, kept = grid, self._make_result_grid(grid)
        # Pages that nobody writes to take no memory.
        shape = (len(request.queries), request.num_proposals, depth, kept.height, kept.width)
        self._result = VolumeProposals(
            structures=tuple(query.name for query in request.queries),
            probabilities=np.zeros(shape, np.uint8),
            grid=kept,
            seed=request.seed,
            num_inference_steps=self._steps,
            guidance_scale=self._guidance,
            model_version=card.full_name,
            adapter=adapter,
            modality=volume.modality,
            modality_source=volume.modality_source,
            seconds=0.0,
        )
        self.slices = wanted
        if work.unfinished is not None:
            self._result = work.unfinished.proposals
            self._started -= self._result.seconds
            self.slices = wanted[~np.isin(wanted, list(work.unfinished.slices))]
        self._total, self._done = len(wanted), len(wanted) - len(self.slices)
        self.size = SMALL if work.is_yielding and pipeline.device.type == "cpu" else work.whole or WHOLE
        self.batches = plan_batches(self.slices, self.size.slices, work.first)

    def compute(self, batch: Batch, size: BatchSize, features: SliceFeatures | None) -> SliceFeatures | None:
        """Propose on some slices.

        Args:
            batch: Which.
            size: How many latents at once.
            features: Of these slices, if they are known.

        Returns:
            The features, for the next prompt; None if there is nothing to remember.
        """
        self._check_cancelled()
        # 1. Encode
        if features is None:
            features = self._encode(batch.slices)  # fine, coarse and levels, each (n, D_l, h_l, w_l)
        used = features.to(next(self._pipeline.branch.parameters()).dtype)

        # 2. Evidence
        evidence = self._pipeline.predict_evidence(used, self._prompts)  # (n, P, H, W)
        pairs = find_present(evidence, self._card.gate)  # M pairs

        at_once = max(1, size.samples // len(self._noise))
        for start in range(0, len(pairs), at_once):
            self._check_cancelled()
            part = pairs[start : start + at_once]
            # 3. Propose
            probabilities = self._propose(used, evidence, part, size.samples)  # (m, K, H, W)
            # 4. Store
            store(self._result.probabilities, probabilities, part, batch.slices)
            share = (start + len(part)) / len(pairs)
            self._work.on_progress(self._done + int(len(batch.slices) * share), self._total)
        return features

    def _make_result_grid(self, grid: WorkingGrid) -> WorkingGrid:
        """What proposals are kept on: the grid that the networks see."""
        return grid

    def finish(self, batch: Batch) -> None:
        """Tell whoever watches that the slices of a batch are ready."""
        self._done += len(batch.slices)
        self._work.on_progress(self._done, self._total)
        self._work.on_slices(self._collect(), batch.slices.tolist())

    def end(self) -> VolumeProposals:
        """The proposals; islands are dropped if all slices are there."""
        result = self._collect()
        return result.drop_islands(self._request.clean_up) if self._total == len(self._stack) else result

    def _encode(self, slices: NDArray[np.int64]) -> SliceFeatures:
        config = self._card.conditioning
        inputs = self._grid.extract_slices(
            self._stack, slices, self._window, config.num_neighbours, config.neighbour_mm
        )  # (n, C, H, W)
        if not torch.isfinite(inputs).all():
            raise ImageError(
                f"'{self._volume.name}' holds values that are not finite; replace NaN and infinity before segmenting."
            )
        features = self._pipeline.encode_slices(inputs)
        # What is remembered is what is used the first time too: the second prompt must not see rounder numbers.
        on_processor = self._pipeline.device.type == "cpu"
        return features.to(torch.bfloat16 if on_processor else features.fine.dtype)

    def _propose(self, features: SliceFeatures, evidence: Tensor, pairs: Sequence[Pair], samples: int) -> Tensor:
        """Probabilities (m, K, H, W) of some pairs; no more proposals of them at once than `samples`."""
        drawn = []
        for k in range(0, len(self._noise), samples):
            offsets = None if self._offsets is None else self._offsets[k : k + samples]
            noise = self._noise[k : k + samples]
            drawn.append(
                self._pipeline.propose(
                    features, evidence, self._prompts, pairs, noise, self._steps, self._guidance, offsets
                )
            )
        return torch.cat(drawn, dim=1)

    def _collect(self) -> VolumeProposals:
        return replace(self._result, seconds=time.monotonic() - self._started)

    def _check_cancelled(self) -> None:
        if self._work.is_cancelled():
            raise CancelledError(
                f"Stopped on request after {self._done} of {self._total} slices of '{self._volume.name}'; nothing was "
                "kept."
            )


def find_present(evidence: Float[Tensor, "n P H W"], gate: float) -> list[Pair]:
    """The structures that are not plainly absent, slice by slice for each of them.

    Args:
        evidence: (n, P, H, W) in [0, 1].
        gate: What the strongest pixel must reach.
    """
    strongest = evidence.amax(dim=(2, 3)).cpu()  # (n, P)
    count, structures = strongest.shape
    return [(n, p) for p in range(structures) for n in range(count) if float(strongest[n, p]) >= gate]


def store(
    into: UInt8[NDArray[Any], "P K Z H W"],
    probabilities: Float[Tensor, "m K H W"],
    pairs: Sequence[Pair],
    slices: NDArray[np.int64],
) -> None:
    """Write probabilities as 8 bits. Proposals that draw nothing are exact zeros: "absent" is then the same everywhere.

    Args:
        into: (P, K, Z, H, W).
        probabilities: (m, K, H, W) in [0, 1].
        pairs: The m pairs (n, p).
        slices: Axial index of every n.
    """
    quantised = (probabilities * 255).round().to(torch.uint8).numpy()  # (m, K, H, W)
    for (n, p), masks in zip(pairs, quantised, strict=True):
        into[p, :, slices[n]] = masks * (masks >= DRAWN).any(axis=(1, 2), keepdims=True)


def count_bytes(features: Iterable[SliceFeatures]) -> int:
    """What features take in memory."""
    return sum(t.numel() * t.element_size() for f in features for t in (f.fine, f.coarse, *f.levels.values()))
