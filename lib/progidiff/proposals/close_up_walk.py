"""The way of one request through a model that draws close-ups.

1. find      all slices            -> evidence (P, Z, h, w), once per volume, because windows belong to volumes
2. plan      evidence              -> windows per structure, each for a run of slices
3. draw      batches of slices     -> K proposals (n, K, S, S) in every window that shows them
4. store     windows               -> uint8 (P, K, Z, H, W) on a working grid of twice as many pixels
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.images.close_up import CloseUpWindow, WindowRules, plan_windows
from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.calibration import Calibration
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import ModelCard
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline
from progidiff.proposals.batches import Batch, BatchSize
from progidiff.proposals.close_ups import Subject, blend, draw_close_ups, draw_together
from progidiff.proposals.edits import count_edits
from progidiff.proposals.islands import DRAWN
from progidiff.proposals.placed_edits import PlacedEdits, place_edits
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.walk import Walk
from progidiff.proposals.work import Work

FINER = 2
"""Pixels of the kept proposals per pixel of the working grid, along both axes."""

Seen = dict[int, list[tuple[CloseUpWindow, torch.Tensor]]]
"""Axial index -> windows and the proposals that were drawn in them, (K, S, S)."""

Key = tuple[str, str]
"""(adapter, digest of the volume)."""


class EvidenceShelf:
    """What was found in the last volumes, so that a second prompt draws at once.

    Args:
        max_bytes: The oldest goes when there is more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._found: OrderedDict[Key, dict[str, NDArray[np.uint8]]] = OrderedDict()

    def get(self, key: Key) -> dict[str, NDArray[np.uint8]]:
        """Text of a prompt -> evidence (Z, h, w); empty if nothing is known."""
        if key in self._found:
            self._found.move_to_end(key)
        return dict(self._found.get(key, {}))

    def put(self, key: Key, found: dict[str, NDArray[np.uint8]]) -> None:
        """Remember what was found in a volume."""
        self._found[key] = found
        self._found.move_to_end(key)
        while len(self._found) > 1 and self._count_bytes() > self._max_bytes:
            self._found.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()

    def _count_bytes(self) -> int:
        return sum(maps.nbytes for found in self._found.values() for maps in found.values())


@dataclass(frozen=True)
class CloseUpTools:
    """What drawing close-ups takes beside the networks that find.

    Attributes:
        pipeline: The network that draws.
        rules: How windows are planned.
        shelf: What was found before.
        texts: Prompts that are looked for beside those of the request, for the next one.
        prompts: The same, encoded.
        calibration: What turns agreement into a probability; None if nobody measured it.
    """

    pipeline: CloseUpPipeline
    rules: WindowRules
    shelf: EvidenceShelf
    texts: tuple[str, ...]
    prompts: EncodedPrompts
    calibration: Calibration | None = None


class CloseUpWalk(Walk):
    """One request on one volume, drawn in close-ups.

    Args:
        pipeline: The networks that find.
        tools: The network that draws, and what it needs.
        card, request, adapter, volume, prompts, work, started: See `Walk`.
    """

    def __init__(
        self,
        pipeline: ProposalPipeline,
        tools: CloseUpTools,
        card: ModelCard,
        request: ProposalRequest,
        adapter: str,
        volume: Volume,
        prompts: EncodedPrompts,
        work: Work,
        started: float,
    ) -> None:
        super().__init__(pipeline, card, request, adapter, volume, prompts, work, started)
        self._tools = tools
        self._key: Key = (adapter, volume.digest)
        self._close_noise = tools.pipeline.draw_noise(request.num_proposals, request.seed)
        self._levels = tools.pipeline.draw_levels(request.num_proposals, request.seed)
        names = [query.name for query in request.queries]
        self._placed = [place_edits(request.edits, name, volume.grid) for name in names]
        pins = {name: placed.pins() for name, placed in zip(names, self._placed, strict=True) if placed}
        # The agreement of an adapter, or given edits, is another one, which nobody compared with the truth.
        calibration = None if adapter or request.edits else tools.calibration
        steering = count_edits(request.edits)
        self._result = replace(self._result, pins=pins, calibration=calibration, steering=steering)
        self._draws_together = pipeline.device.type != "cpu"
        self._subjects: list[tuple[Subject, list[CloseUpWindow]]] | None = None

    def _make_result_grid(self, grid: WorkingGrid) -> WorkingGrid:
        return grid.refine(FINER)

    def compute(self, batch: Batch, size: BatchSize, features: SliceFeatures | None) -> SliceFeatures | None:
        """Draw the proposals of some slices.

        Args:
            batch: Which.
            size: How many windows and proposals at once.
            features: Not needed: what was found is on the shelf.
        """
        self._check_cancelled()
        if self._subjects is None:
            self._subjects = self._find_subjects(size)
        at_once = max(1, size.samples // len(self._levels))
        if self._draws_together:
            self._draw_together(batch.slices, at_once)
            self._result.keep_pins()
            return None
        for p, (subject, windows) in enumerate(self._subjects):
            self._check_cancelled()
            self._draw(p, subject, windows, batch.slices, at_once)
            share = (p + 1) / len(self._subjects)
            self._work.on_progress(self._done + int(len(batch.slices) * share), self._total)
        self._result.keep_pins()
        return None

    def end(self) -> VolumeProposals:
        """The proposals; islands are dropped if all slices are there, but for what a person clicked."""
        result = super().end()
        result.keep_pins()
        # What was derived for those who watched may be older than the pins.
        return replace(result)

    def _draw(
        self, p: int, subject: Subject, windows: Sequence[CloseUpWindow], slices: NDArray[np.int64], at_once: int
    ) -> None:
        """Draw a structure on some slices and store what is seen of it."""
        tools = self._tools
        parts: Seen = {}
        for drawing in draw_close_ups(
            tools.pipeline,
            subject,
            windows,
            self._close_noise,
            self._levels,
            self._steps,
            slices,
            at_once,
            self._guidance,
        ):
            for n, z in enumerate(drawing.slices.tolist()):
                parts.setdefault(z, []).append((drawing.window, drawing.probabilities[n]))
        self._store(p, parts)

    def _draw_together(self, slices: NDArray[np.int64], at_once: int) -> None:
        """Draw all structures on some slices in joint batches, and store what is seen of them."""
        subjects = self._subjects or []
        found: list[Seen] = [{} for _ in subjects]
        for p, drawing in draw_together(
            self._tools.pipeline,
            subjects,
            self._close_noise,
            self._levels,
            self._steps,
            slices,
            at_once,
            self._guidance,
        ):
            self._check_cancelled()
            for n, z in enumerate(drawing.slices.tolist()):
                found[p].setdefault(z, []).append((drawing.window, drawing.probabilities[n]))
        for p, parts in enumerate(found):
            self._store(p, parts)
            share = (p + 1) / len(found)
            self._work.on_progress(self._done + int(len(slices) * share), self._total)

    def _store(self, p: int, parts: Seen) -> None:
        """Put what was drawn of a structure on the grid of the result."""
        grid = self._result.grid
        for z, seen in parts.items():
            (rows, columns), maps = blend(seen, lambda window, values: window.restore_to(values, grid))
            quantised = (maps.clamp(0, 1) * 255).round().to(torch.uint8).numpy()  # (K, rows, columns)
            # Proposals that draw nothing are exact zeros: "absent" is then the same everywhere.
            quantised *= (quantised >= DRAWN).any(axis=(1, 2), keepdims=True)
            self._result.probabilities[p, :, z, rows, columns] = quantised

    def _find_subjects(self, size: BatchSize) -> list[tuple[Subject, list[CloseUpWindow]]]:
        """Evidence and windows of every structure that is asked for."""
        shelf, texts = self._tools.shelf, [query.text for query in self._request.queries]
        found = shelf.get(self._key)
        if any(text and text not in found for text in texts):
            found |= self._find(size)
            shelf.put(self._key, found)
        threshold = round(self._card.gate * 255)
        subjects = []
        for p, (text, placed) in enumerate(zip(texts, self._placed, strict=True)):
            subject = self._describe(p, found[text] if text else None, placed)
            windows = plan_windows(found[text] >= threshold, self._grid, self._tools.rules) if text else []
            subjects.append((subject, placed.plan_windows(windows, self._grid.shape, self._tools.rules)))
        return subjects

    def _describe(self, p: int, evidence: NDArray[np.uint8] | None, placed: PlacedEdits) -> Subject:
        """A structure of the request; without evidence it is what the edits say, and its text is empty."""
        prompts, is_found = self._prompts, evidence is not None
        tokens, mask = (prompts.tokens, prompts.mask) if is_found else (prompts.empty_tokens, prompts.empty_mask)
        row = p if is_found else 0
        return Subject(
            stack=self._stack,
            intensities=self._window,
            evidence=np.zeros(self._evidence_shape, np.uint8) if evidence is None else evidence,
            grid=self._grid,
            pooled=prompts.pooled[p] if is_found else torch.zeros_like(prompts.pooled[p]),
            tokens=tokens[row],
            token_mask=None if mask is None else mask[row],
            empty=(prompts.empty_tokens, prompts.empty_mask),
            is_found=is_found,
            edits=placed.draw if placed else None,
        )

    @property
    def _evidence_shape(self) -> tuple[int, int, int]:
        return len(self._stack), self._grid.height, self._grid.width

    def _find(self, size: BatchSize) -> dict[str, NDArray[np.uint8]]:
        """Look for the request's structures, and for those that may be asked for next, on all slices."""
        asked = {query.text: p for p, query in enumerate(self._request.queries) if query.text}
        others = [i for i, text in enumerate(self._tools.texts) if text not in asked]
        pooled = torch.cat([self._prompts.pooled[list(asked.values())], self._tools.prompts.pooled[others]])
        prompts = replace(self._prompts, pooled=pooled)
        texts = [*asked, *(self._tools.texts[i] for i in others)]
        evidence = np.zeros((len(texts), *self._evidence_shape), np.uint8)
        for start in range(0, len(self._stack), size.slices):
            self._check_cancelled()
            slices = np.arange(start, min(start + size.slices, len(self._stack)), dtype=np.int64)
            features = self._encode(slices).to(next(self._pipeline.branch.parameters()).dtype)
            maps = self._pipeline.predict_evidence(features, prompts)  # (n, P, h, w)
            evidence[:, slices] = (maps * 255).round().to(torch.uint8).cpu().numpy().swapaxes(0, 1)
        return dict(zip(texts, evidence, strict=True))
