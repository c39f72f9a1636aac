"""The way of one request through a model that draws close-ups.

1. find      all slices            -> evidence (P, Z, h, w), once, because windows belong to volumes
2. plan      evidence              -> windows per structure, each for a run of slices
3. draw      batches of slices     -> K proposals in every window that shows them
4. store     windows               -> uint8 (P, K, Z, H, W) on a working grid of twice as many pixels
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from progidiff.images.close_up import CloseUpWindow, WindowRules, plan_windows
from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.conditioning import SliceFeatures
from progidiff.model.folder import ModelCard
from progidiff.model.pipeline import EncodedPrompts, ProposalPipeline
from progidiff.proposals.batches import Batch, BatchSize
from progidiff.proposals.close_ups import Drawing, Subject, draw_close_ups
from progidiff.proposals.islands import DRAWN
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.walk import FeatureBook, Walk
from progidiff.proposals.work import Work

FINER = 2
"""Pixels of the kept proposals per pixel of the working grid, along both axes."""


class CloseUpWalk(Walk):
    """One request on one volume, drawn in close-ups.

    Args:
        pipeline: The networks that find.
        close_up: The network that draws.
        rules: How windows are planned.
        book: The features of an earlier prompt on this volume, by batch of `find`.
        card, request, adapter, volume, prompts, work, started: See `Walk`.
    """

    def __init__(
        self,
        pipeline: ProposalPipeline,
        close_up: CloseUpPipeline,
        rules: WindowRules,
        book: FeatureBook,
        card: ModelCard,
        request: ProposalRequest,
        adapter: str,
        volume: Volume,
        prompts: EncodedPrompts,
        work: Work,
        started: float,
    ) -> None:
        super().__init__(pipeline, card, request, adapter, volume, prompts, work, started)
        self._close_up, self._rules, self._book = close_up, rules, book
        self._close_noise = close_up.draw_noise(request.num_proposals, request.seed)
        self._levels = close_up.draw_levels(request.num_proposals, request.seed)
        self._evidence: NDArray[np.uint8] | None = None  # (P, Z, h, w)
        self._windows: list[list[CloseUpWindow]] = []

    def make_result_grid(self, grid: WorkingGrid) -> WorkingGrid:
        """Close-ups know more than the working grid can hold."""
        return grid.refine(FINER)
