"""The way of one request through a model that draws close-ups.

1. find      all slices            -> evidence (P, Z, h, w), once per volume, because windows belong to volumes
2. plan      evidence              -> windows per structure, each for a run of slices
3. draw      batches of slices     -> K proposals (n, K, S, S) in every window that shows them
4. store     windows               -> uint8 (P, K, Z, H, W) on a working grid of twice as many pixels

Who has drawn something looks at that slice and waits for it. It is drawn first, alone, and shown (`Work.on_preview`);
none of it is kept, so that the result is the same bits wherever anybody looks. Where nothing is found yet, that first
look goes by the slice and its neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.images.close_up import CloseUpWindow, WindowRules, compute_fineness, plan_windows
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
from progidiff.proposals.walk import SMALL, Walk
from progidiff.proposals.work import Work

FINER = 2
"""Pixels of the kept proposals per pixel of the working grid, along both axes."""

Seen = dict[int, list[tuple[CloseUpWindow, torch.Tensor]]]
"""Axial index -> windows and the proposals that were drawn in them, (K, S, S)."""

Key = tuple[str, str]
"""(adapter, digest of the volume)."""


@dataclass(frozen=True)
class Search:
    """What is found so far of some prompts in a volume. A person clicks again before a search of 20 seconds is over:
    the next request goes on with it.

    Attributes:
        texts: P prompts.
        evidence: uint8 (P, Z, h, w) of 0..255, filled slice by slice.
        is_searched: (Z,) the slices that are.
    """

    texts: tuple[str, ...]
    evidence: NDArray[np.uint8]
    is_searched: NDArray[np.bool_]


class EvidenceShelf:
    """What was found in the last volumes, so that a second prompt draws at once.

    Args:
        max_bytes: The oldest goes when there is more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._found: OrderedDict[Key, dict[str, NDArray[np.uint8]]] = OrderedDict()
        self._search: tuple[Key, Search] | None = None

    def go_on(self, key: Key, texts: tuple[str, ...], shape: tuple[int, int, int]) -> Search:
        """What a cancelled request has found in a volume so far, or a new search; only the last one is remembered.

        Args:
            key: Of the volume.
            texts: P prompts.
            shape: (Z, h, w).
        """
        if self._search is not None and self._search[0] == key and self._search[1].texts == texts:
            return self._search[1]
        search = Search(texts, np.zeros((len(texts), *shape), np.uint8), np.zeros(shape[0], bool))
        self._search = (key, search)
        return search

    def get(self, key: Key) -> dict[str, NDArray[np.uint8]]:
        """Text of a prompt -> evidence (Z, h, w); empty if nothing is known."""
        if key in self._found:
            self._found.move_to_end(key)
        return dict(self._found.get(key, {}))

    def put(self, key: Key, found: dict[str, NDArray[np.uint8]]) -> None:
        """Remember what was found in a volume."""
        self._search = None
        self._found[key] = found
        self._found.move_to_end(key)
        while len(self._found) > 1 and self._count_bytes() > self._max_bytes:
            self._found.popitem(last=False)

    def clear(self) -> None:
        """Forget everything."""
        self._search = None
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
        structures: What the network that draws was trained on. The name of anything else says nothing to it: what it
            would take from a text that it never saw is noise.
        calibration: What turns agreement into a probability; None if nobody measured it.
    """

    pipeline: CloseUpPipeline
    rules: WindowRules
    shelf: EvidenceShelf
    texts: tuple[str, ...]
    prompts: EncodedPrompts
    structures: tuple[str, ...]
    calibration: Calibration | None = None

    def count_windows(self, samples: int, num_proposals: int) -> int:
        """Windows of one batch, at least 1: fewer of those with many pixels.

        Args:
            samples: Proposals of a batch of usual windows.
            num_proposals: K.
        """
        usual = samples / compute_fineness(self.rules.large_size) ** 2
        return max(1, int(usual) // num_proposals)


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
            if self._request.edits and self._work.first in self.slices:
                self._preview(int(self._work.first or 0))
            self._subjects = self._find_subjects(size)
        # The next click ends this: it is not to wait for a whole batch.
        samples = size.samples if not self._request.edits or self._draws_together else min(size.samples, SMALL.samples)
        at_once = self._tools.count_windows(samples, len(self._levels))
        if self._draws_together:
            self._draw_together(batch.slices, at_once)
            self._result.keep_pins()
            return None
        for p, (subject, windows) in enumerate(self._subjects):
            self._check_cancelled()
            self._draw(self._result, p, subject, windows, batch.slices, at_once)
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

    def _preview(self, z: int) -> None:
        """Show the slice that somebody drew on before anything else is looked at."""
        found = self._tools.shelf.get(self._key)
        if any(query.text and query.text not in found for query in self._request.queries):
            found = self._find_near(z)
        preview = replace(self._result, probabilities=np.zeros(self._result.probabilities.shape, np.uint8))
        at_once = self._tools.count_windows(SMALL.samples, len(self._levels))
        for p, (subject, windows) in enumerate(self._plan_subjects(found)):
            self._draw(preview, p, subject, windows, np.array([z]), at_once)
        preview.keep_pins()
        self._work.on_preview(preview, z)

    def _draw(
        self,
        into: VolumeProposals,
        p: int,
        subject: Subject,
        windows: Sequence[CloseUpWindow],
        slices: NDArray[np.int64],
        at_once: int,
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
            self._check_cancelled()
            for n, z in enumerate(drawing.slices.tolist()):
                parts.setdefault(z, []).append((drawing.window, drawing.probabilities[n]))
        store_parts(into, p, parts)

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
            store_parts(self._result, p, parts)
            share = (p + 1) / len(found)
            self._work.on_progress(self._done + int(len(slices) * share), self._total)

    def _find_subjects(self, size: BatchSize) -> list[tuple[Subject, list[CloseUpWindow]]]:
        """Evidence and windows of every structure that is asked for."""
        shelf = self._tools.shelf
        found = shelf.get(self._key)
        if any(query.text and query.text not in found for query in self._request.queries):
            found |= self._find(size)
            shelf.put(self._key, found)
        return self._plan_subjects(found)

    def _plan_subjects(self, found: Mapping[str, NDArray[np.uint8]]) -> list[tuple[Subject, list[CloseUpWindow]]]:
        threshold = round(self._card.gate * 255)
        subjects = []
        for p, (query, placed) in enumerate(zip(self._request.queries, self._placed, strict=True)):
            text = query.text
            subject = self._describe(p, found[text] if text else None, placed)
            windows = plan_windows(found[text] >= threshold, self._grid, self._tools.rules) if text else []
            subjects.append((subject, placed.plan_windows(windows, self._grid.shape, self._tools.rules)))
        return subjects

    def _describe(self, p: int, evidence: NDArray[np.uint8] | None, placed: PlacedEdits) -> Subject:
        """A structure of the request. Without evidence it is what the edits say. The text is empty there, and of a
        structure that the network was not trained on.
        """
        prompts, is_found = self._prompts, evidence is not None
        is_told = is_found and self._request.queries[p].name in self._tools.structures
        tokens, mask = (prompts.tokens, prompts.mask) if is_told else (prompts.empty_tokens, prompts.empty_mask)
        row = p if is_told else 0
        return Subject(
            stack=self._stack,
            intensities=self._window,
            evidence=np.zeros(self._evidence_shape, np.uint8) if evidence is None else evidence,
            grid=self._grid,
            pooled=prompts.pooled[p] if is_told else torch.zeros_like(prompts.pooled[p]),
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
        known = self._tools.texts
        fresh = {
            query.text: p for p, query in enumerate(self._request.queries) if query.text and query.text not in known
        }
        pooled = torch.cat([self._tools.prompts.pooled, self._prompts.pooled[list(fresh.values())]])
        search = self._tools.shelf.go_on(self._key, (*known, *fresh), self._evidence_shape)
        for start in range(0, len(self._stack), size.slices):
            slices = np.arange(start, min(start + size.slices, len(self._stack)), dtype=np.int64)
            if not search.is_searched[slices].all():
                self._check_cancelled()
                search.evidence[:, slices] = self._search(slices, pooled)
                search.is_searched[slices] = True
        return dict(zip(search.texts, search.evidence, strict=True))

    def _find_near(self, z: int) -> dict[str, NDArray[np.uint8]]:
        """Look for the request's structures on what a close-up of one slice shows; elsewhere nothing is found."""
        asked = {query.text: p for p, query in enumerate(self._request.queries) if query.text}
        evidence = np.zeros((len(asked), *self._evidence_shape), np.uint8)
        if asked:
            config = self._tools.pipeline.network.config
            step = max(1, round(config.neighbour_mm / self._grid.stack_spacing[0]))
            around = z + np.arange(-config.evidence_neighbours, config.evidence_neighbours + 1) * step
            slices = np.unique(np.clip(around, 0, len(self._stack) - 1)).astype(np.int64)
            evidence[:, slices] = self._search(slices, self._prompts.pooled[list(asked.values())])
        return dict(zip(asked, evidence, strict=True))

    def _search(self, slices: NDArray[np.int64], pooled: torch.Tensor) -> NDArray[np.uint8]:
        """Evidence uint8 (P, n, h, w) of P text vectors on some slices."""
        features = self._encode(slices).to(next(self._pipeline.branch.parameters()).dtype)
        maps = self._pipeline.predict_evidence(features, replace(self._prompts, pooled=pooled))  # (n, P, h, w)
        found: NDArray[np.uint8] = (maps * 255).round().to(torch.uint8).cpu().numpy().swapaxes(0, 1)
        return found


def store_parts(into: VolumeProposals, p: int, parts: Seen) -> None:
    """Put what was drawn of structure `p` on the grid of a result."""
    for z, seen in parts.items():
        (rows, columns), maps = blend(seen, lambda window, values: window.restore_to(values, into.grid))
        quantised = (maps.clamp(0, 1) * 255).round().to(torch.uint8).numpy()  # (K, rows, columns)
        # Proposals that draw nothing are exact zeros: "absent" is then the same everywhere.
        quantised *= (quantised >= DRAWN).any(axis=(1, 2), keepdims=True)
        into.probabilities[p, :, z, rows, columns] = quantised
