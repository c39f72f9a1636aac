"""One label of many decisions: which proposals a person picked, on which slices, and what that draws on the image's
grid.

A decision names a structure and a pick; a plan holds picks for the whole volume and for single slices, which win.
Voxels are made from the kept proposals when the plan is carried out, so a plan is small enough to wait in a browser for
hours.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from progidiff.errors import RequestError
from progidiff.images.geometry import Grid
from progidiff.labels.saving import MERGED
from progidiff.params import read_float, read_int
from progidiff.proposals.agreement import merge_masks
from progidiff.proposals.request import BEST, CONSENSUS
from progidiff.proposals.volume_proposals import THRESHOLD, VolumeProposals

Rule = Literal["consensus", "best", "proposal", "union", "intersection", "majority", "threshold", "nothing"]

_RULES = ("consensus", "best", "proposal", "union", "intersection", "majority", "threshold", "nothing")


@dataclass(frozen=True)
class MaskPick:
    """What is drawn of a structure.

    Attributes:
        rule: "consensus" of all proposals, "best" (the medoid of the volume), one "proposal", "nothing", or how to
            merge the members: "union", "intersection", "majority" (at least half) or "threshold" (at least this share
            of them).
        members: Proposals 1..K that take part, ascending; empty for all. One for "proposal".
        threshold: With "threshold", above 0 and up to 1.
    """

    rule: Rule = "consensus"
    members: tuple[int, ...] = ()
    threshold: float = 0.5

    @classmethod
    def from_params(cls, params: object, num_proposals: int) -> MaskPick:
        """Read a pick as sent: {"rule", "members", "threshold"}.

        Raises:
            RequestError: if it is none, or names proposals that there are not.

        Example:
            >>> MaskPick.from_params({"rule": "union", "members": [3, 1]}, 4)
            MaskPick(rule='union', members=(1, 3), threshold=0.5)
        """
        if not isinstance(params, Mapping) or params.get("rule") not in _RULES:
            raise RequestError(f"A pick is an object with a rule, one of {', '.join(_RULES)}; got {str(params)[:60]}.")
        rule = cast(Rule, params["rule"])
        members = params.get("members") or []
        if not isinstance(members, (list, tuple)) or len(members) > num_proposals:
            raise RequestError(
                f"The members of a pick are a list of proposals, each from 1 to {num_proposals} and named once."
            )
        numbers = tuple(sorted({read_int(member, "members", 1, num_proposals) for member in members}))
        if rule == "proposal" and len(numbers) != 1:
            raise RequestError(
                "The rule proposal needs exactly one member, for example {'rule': 'proposal', 'members': [2]}."
            )
        threshold = read_float(params.get("threshold", 0.5), "threshold", 1e-6, 1.0)
        return cls(rule, numbers, threshold)

    @property
    def shown(self) -> str:
        """As the audit calls it: "consensus", "best", the number of a proposal, or "merged"."""
        if self.rule in (CONSENSUS, BEST):
            return self.rule
        return str(self.members[0]) if self.rule == "proposal" else MERGED

    def draw(self, masks: NDArray[Any], best: int) -> NDArray[Any]:
        """One mask of K proposals.

        Args:
            masks: bool of shape (K, Y, X).
            best: Index of the medoid.

        Returns:
            bool of shape (Y, X).

        Example:
            >>> masks = np.array([[[True, True]], [[True, False]]])
            >>> MaskPick("intersection").draw(masks, 0).tolist()
            [[True, False]]
        """
        if self.rule == "nothing":
            return np.zeros(masks.shape[1:], dtype=bool)
        if self.rule == "best":
            return cast(NDArray[Any], masks[best])
        if self.rule == "proposal":
            return cast(NDArray[Any], masks[self.members[0] - 1])
        chosen = masks[[member - 1 for member in self.members]] if self.members else masks
        how = "majority" if self.rule == "consensus" else self.rule
        return merge_masks(torch.from_numpy(chosen), how, self.threshold).numpy()


@dataclass(frozen=True)
class DrawnPick(MaskPick):
    """A pick that a person drew on: what it draws is kept beside it, see `paintings`. Rule and members are those of the
    pick that was drawn on; with the rule "union", nothing that could be named.
    """


@dataclass(frozen=True)
class Plan:
    """Decisions about one result.

    Attributes:
        volume: Structure -> pick on every slice that `slices` leaves out; empty if only single slices are decided.
        slices: Axial index -> structure -> pick.
    """

    volume: Mapping[str, MaskPick]
    slices: Mapping[int, Mapping[str, MaskPick]]

    @classmethod
    def from_params(cls, params: Mapping[str, Any], result: VolumeProposals) -> Plan:
        """Read a plan as sent: {"volume": {structure: pick}, "slices": {"12": {structure: pick}}}.

        Raises:
            RequestError: if it decides nothing, or names slices, structures or proposals that the result does not have.
        """
        volume = _read_picks(params.get("volume") or {}, result)
        sent = params.get("slices") or {}
        if not isinstance(sent, Mapping):
            raise RequestError(
                'slices must be an object of axial slices, for example {"12": {"liver": {"rule": "union"}}}.'
            )
        depth = result.grid.shape[0]
        slices = {read_int(z, "slices", 0, depth - 1): _read_picks(picks, result) for z, picks in sent.items()}
        slices = {z: picks for z, picks in sorted(slices.items()) if picks}
        if not volume and not slices:
            raise RequestError("Nothing is decided. Accept a slice or the volume first.")
        return cls(volume, slices)

    @property
    def structures(self) -> tuple[str, ...]:
        """What it speaks about."""
        return tuple(dict.fromkeys([*self.volume, *(name for picks in self.slices.values() for name in picks)]))

    @property
    def decided_slices(self) -> tuple[int, ...] | None:
        """Axial slices that it annotates; None for the whole volume."""
        return None if self.volume else tuple(self.slices)

    @property
    def shown(self) -> str:
        """The one thing that was picked everywhere, else `MERGED`."""
        picked = {pick.shown for picks in (self.volume, *self.slices.values()) for pick in picks.values()}
        return picked.pop() if len(picked) == 1 else MERGED

    def split(self) -> list[Plan]:
        """The same decisions as plans whose structures are all decided on the same slices, so that a save of each says
        nothing about a structure where nobody decided it.

        Example:
            >>> union, absent = MaskPick("union"), MaskPick("nothing")
            >>> plans = Plan({}, {3: {"liver": union}, 5: {"liver": union, "spleen": absent}}).split()
            >>> [(plan.structures, plan.decided_slices) for plan in plans]
            [(('liver',), (3, 5)), (('spleen',), (5,))]
        """
        groups: dict[tuple[int, ...] | None, list[str]] = {}
        for name in self.structures:
            slices = None if name in self.volume else tuple(z for z, picks in self.slices.items() if name in picks)
            groups.setdefault(slices, []).append(name)
        return [self._keep(names) for names in groups.values()]

    def draw(self, drawn: Mapping[int, Mapping[str, DrawnPick]]) -> Plan:
        """The same decisions with what was drawn by hand, which takes the place of picks on its slices.

        Args:
            drawn: Axial index -> structure -> what it was drawn on.
        """
        slices = {z: {**self.slices.get(z, {}), **drawn.get(z, {})} for z in sorted({*self.slices, *drawn})}
        return Plan(self.volume, {z: picks for z, picks in slices.items() if picks})

    @property
    def is_drawn(self) -> bool:
        """Whether something of it was drawn by hand."""
        return any(isinstance(pick, DrawnPick) for picks in self.slices.values() for pick in picks.values())

    def _keep(self, structures: Collection[str]) -> Plan:
        slices = {z: _choose(picks, structures) for z, picks in self.slices.items()}
        return Plan(_choose(self.volume, structures), {z: picks for z, picks in slices.items() if picks})

    def picks_on(self, z: int) -> dict[str, MaskPick]:
        """Structure -> pick on an axial slice; empty if it is not decided."""
        return {**self.volume, **self.slices.get(z, {})}


def compose_label(result: VolumeProposals, grid: Grid, plan: Plan, label_ids: Mapping[str, int]) -> NDArray[Any]:
    """Carry out a plan.

    Where several structures are drawn on a voxel, the one with the higher agreement of its proposals wins, then the one
    with the higher mean probability, then the one asked first, as in `VolumeProposals.label_map`.

    Args:
        result: The proposals.
        grid: Of the image that they were made for.
        plan: What to draw.
        label_ids: Structure -> label id 1..255.

    Returns:
        uint8 of shape (I, J, K) in file order; 0 on slices that the plan leaves out.

    Raises:
        GeometryError: if the image has another grid.
    """
    return compose_labels([(result, plan)], grid, label_ids)


def compose_labels(
    parts: Sequence[tuple[VolumeProposals, Plan]], grid: Grid, label_ids: Mapping[str, int]
) -> NDArray[Any]:
    """Carry out plans about several results of one image together, as `compose_label` does with one.

    Where structures of several results are drawn on a voxel, the one that the larger share of its own proposals draws
    wins: results may have different numbers of them.

    Args:
        parts: Results with their plans; no structure in more than one plan.
        grid: Of the image that they were made for.
        label_ids: Structure -> label id 1..255.

    Returns:
        uint8 of shape (I, J, K) in file order; 0 on slices that the plans leave out.

    Raises:
        GeometryError: if the image has another grid.
    """
    stack = np.zeros(parts[0][0].grid.shape, dtype=np.uint8)
    labels = grid.from_stack(stack)  # A view: what is drawn on the stack is drawn in file order.
    best = [
        {name: order[0] for name, order in zip(result.structures, result.ranking, strict=True)} for result, _ in parts
    ]
    for z in range(len(stack)):
        score = np.zeros(stack.shape[1:], dtype=np.float32)
        for (result, plan), typical in zip(parts, best, strict=True):
            picks = plan.picks_on(z)
            for name in (name for name in result.structures if _is_made_here(picks.get(name))):
                maps = result.slice_probabilities(name, z)
                masks = maps >= THRESHOLD
                if not masks.any():
                    continue
                support = (
                    masks.sum(axis=0, dtype=np.uint8) + maps.mean(axis=0) / 256
                )  # float32, as there: ties must break the same way
                if len(parts) > 1:
                    support = support / result.num_proposals
                wins = picks[name].draw(masks, typical[name]) & (support > score)
                score[wins] = support[wins]
                stack[z][wins] = label_ids[name]
    return labels


def _is_made_here(pick: MaskPick | None) -> bool:
    return pick is not None and not isinstance(pick, DrawnPick)


def _choose(picks: Mapping[str, MaskPick], structures: Collection[str]) -> dict[str, MaskPick]:
    return {name: pick for name, pick in picks.items() if name in structures}


def _read_picks(picks: object, result: VolumeProposals) -> dict[str, MaskPick]:
    if not isinstance(picks, Mapping):
        raise RequestError(
            "Picks are an object of structures, for example {'liver': {'rule': "
            f"'consensus'}}}}; got {str(picks)[:60]}."
        )
    unknown = [str(name) for name in picks if name not in result.structures]
    if unknown:
        raise RequestError(f"These proposals hold no '{unknown[0][:60]}'; they hold {', '.join(result.structures)}.")
    return {str(name): MaskPick.from_params(pick, result.num_proposals) for name, pick in picks.items()}
