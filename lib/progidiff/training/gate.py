"""The quality gate: what is served now and the new version are measured on the same held-back slices or pictures, and a
version is published only if it is better.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from progidiff.model.folder import ModelCard
from progidiff.model.pipeline import ProposalPipeline
from progidiff.storage.versions import VersionCard, VersionStore
from progidiff.training.dice_tally import DiceTally
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.proposal_stage import ProposalSampler
from progidiff.training.slice_cache import SliceCache

MAX_VALIDATION_SLICES = 96

_BATCH = 8

C = TypeVar("C", bound=VersionCard)


@dataclass(frozen=True)
class TrainedVersion(Generic[C]):
    """What a training came to.

    Attributes:
        card: The version that was written.
        published: Whether it is served now.
        message: The verdict in a sentence.
        figures: On what was held back, of "adapted", of "current" if a version was served, and of "base", the model
            itself, if versions are adapters of one.
        folder: What the run left behind, which nothing needs any more.
    """

    card: C
    published: bool
    message: str
    figures: dict[str, dict[str, float]]
    folder: Path


def judge_dice(dice: float, rivals: Mapping[str, float], held_back: str) -> tuple[bool, str]:
    """Whether a version may be published: it must beat all rivals, and without a rival find anything.

    Args:
        dice: Of the new version.
        rivals: Of the others, by name.
        held_back: What was measured on, "slices" or "images".

    Returns:
        The verdict, and why in a sentence.

    Example:
        >>> judge_dice(0.7, {"ct-base@1": 0.5}, "slices")
        (True, 'Dice 0.700 on the held-back slices, ct-base@1 has 0.500.')
        >>> judge_dice(0.0, {}, "images")
        (False, 'Dice 0.000 on the held-back images; there was no version before.')
    """
    told = f"Dice {dice:.3f} on the held-back {held_back}"
    if not rivals:
        return dice > 0, f"{told}; there was no version before."
    compared = " and ".join(f"{name} has {other:.3f}" for name, other in rivals.items())
    return all(dice > other for other in rivals.values()), f"{told}, {compared}."


def conclude(
    store: VersionStore[C], card: C, run: Mapping[str, Any], publish: bool, folder: Path, how: str, repeated: bool
) -> TrainedVersion[C]:
    """Publish a version if the gate accepted it; once, so that a rollback is not undone by repeating the training.

    Args:
        run: Its run.json, with "accepted", "verdict" and "validation".
        publish: False to keep it unpublished whatever the gate said.
        how: What serves it later, as the beginning of a sentence that ends with "it".
        repeated: It is an earlier run's.
    """
    name, verdict = card.full_name, run["verdict"]
    before = "This very training was done before. " if repeated else ""
    if not run["accepted"]:
        message = f"{before}{name} is kept but not published: {verdict}"
        return TrainedVersion(card, False, message, run["validation"], folder)
    if publish:
        store.publish_once(card)
    served = store.current(card.name) == card.version
    message = (
        f"{before}{name} is published: {verdict}"
        if served
        else f"{before}{name} is kept and not published, as asked; {how} it. {verdict}"
    )
    return TrainedVersion(card, served, message, run["validation"], folder)


@torch.no_grad()
def measure_dice(
    pipeline: ProposalPipeline,
    cache: SliceCache,
    phrases: PhraseTable,
    card: ModelCard,
    num_proposals: int = 0,
    limit: int = MAX_VALIDATION_SLICES,
    between: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Dice per structure, pooled over the slices of a volume, averaged over the volumes that have it.

    Args:
        num_proposals: K of the consensus; 0 measures the evidence alone, which is many times faster.
        limit: At most about so many slices, evenly spaced.
        between: Called between batches; may raise to end it.

    Returns:
        "evidence" and, if K > 0, "consensus": means over the structures; "evidence <structure>", "consensus
        <structure>".
    """
    pipeline.branch.eval()
    prompts = phrases.pick_canonical()
    sampler = (
        ProposalSampler(pipeline, num_proposals, card.gate, card.num_inference_steps, card.guidance_scale)
        if num_proposals
        else None
    )
    tally = DiceTally(cache)
    for batch in _spread_batches(cache, limit):
        between()
        images, labels = cache.read(batch)
        features = pipeline.encode_slices(images)
        evidence = pipeline.predict_evidence(features, prompts)
        masks = {"evidence": (evidence >= 0.5).cpu()}
        if sampler is not None:
            masks["consensus"] = sampler.draw(features, evidence, prompts).float().mean(2) >= 0.5
        tally.add(batch, labels, masks)
    figures: dict[str, float] = {}
    seen = np.asarray((tally.truth > 0).any(axis=0))
    for kind in ("evidence",) if sampler is None else ("evidence", "consensus"):
        dice = tally.compute_dice(kind)
        per = {s: float(np.nanmean(dice[:, i])) for i, s in enumerate(cache.structures) if seen[i]}
        figures[kind] = float(np.mean(list(per.values()))) if per else 0.0
        figures.update({f"{kind} {s}": d for s, d in per.items()})
    return figures


@torch.no_grad()
def measure_agreement(
    base: ProposalPipeline,
    adapted: ProposalPipeline,
    cache: SliceCache,
    structures: Sequence[str],
    between: Callable[[], object] = lambda: None,
) -> float | None:
    """How far the evidence for structures without labels is still the base's, on the slices of a cache.

    Args:
        structures: Names that the base was trained on.
        between: Called between batches; may raise to end it.

    Returns:
        Dice between the two, pooled over the slices, averaged over the structures that the base sees; None if it sees
        none.
    """
    prompts = base.encode_prompts(structures)
    overlap, total, seen = (torch.zeros(len(structures)) for _ in range(3))
    for batch in _spread_batches(cache, MAX_VALIDATION_SLICES):
        between()
        images = cache.read(batch)[0]
        one, two = (p.predict_evidence(p.encode_slices(images), prompts).cpu() >= 0.5 for p in (base, adapted))
        overlap += (one & two).sum((0, 2, 3))
        total += one.sum((0, 2, 3)) + two.sum((0, 2, 3))
        seen += one.sum((0, 2, 3))
    there = seen > 0
    return float((2 * overlap[there] / total[there]).mean()) if there.any() else None


def _spread_batches(cache: SliceCache, limit: int) -> Iterator[list[int]]:
    """At most about `limit` positions in a cache, evenly spaced, in batches."""
    chosen = list(range(0, len(cache), max(1, -(-len(cache) // limit))))
    return (chosen[start : start + _BATCH] for start in range(0, len(chosen), _BATCH))
