"""How a request is computed, and who watches. None of it changes the proposals, but for a last bit that batches of
another size may round differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from progidiff.proposals.batches import BatchSize
from progidiff.proposals.volume_proposals import VolumeProposals


@dataclass(frozen=True)
class UnfinishedProposals:
    """What a computation has so far.

    Attributes:
        image: Id of the image.
        proposals: Right on the slices that are ready, empty on the others.
        slices: The axial indices that are ready.
    """

    image: str
    proposals: VolumeProposals
    slices: frozenset[int]


@dataclass(frozen=True)
class Work:
    """How to compute a request.

    Attributes:
        first: Somebody looks at this axial index: the slices around it are computed first, the others by their
            distance.
        remember: Keep the features of the slices in memory for the next prompt; work that nobody watches leaves that to
            others.
        device: Which of several devices has the turn, as `DeviceQueue` calls it; "" where there is one.
        whole: How much to try at once, in the place of the usual; batches of another size round differently.
        is_yielding: Somebody else may want the device at any time: where a whole batch takes seconds, on the processor,
            batches are small.
        unfinished: What an earlier computation of the same request left; its slices are not computed again.
        on_progress: Called with (slices done, slices in all).
        on_slices: Called after every batch with the proposals so far and the axial indices that are new in them. Their
            `probabilities` are filled further by later batches, and islands are not dropped yet; everything derived
            belongs to this moment.
        on_preview: Called with proposals of the one axial index that somebody drew on, before all others; they are
            like those that come, and none of them is kept.
        is_cancelled: Asked between batches.
    """

    first: int | None = None
    remember: bool = True
    device: str = ""
    whole: BatchSize | None = None
    is_yielding: bool = False
    unfinished: UnfinishedProposals | None = None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    on_slices: Callable[[VolumeProposals, Sequence[int]], None] = lambda proposals, slices: None
    on_preview: Callable[[VolumeProposals, int], None] = lambda proposals, z: None
    is_cancelled: Callable[[], bool] = lambda: False
