"""Are proposals worth having? How far they differ, whether they cover the truth, and whether their disagreement tells
where they are wrong.

    python benchmarks/proposal_quality.py --studies ../shared/data/ct --cases img0024 img0033 img0039 --out
    benchmarks/results/proposal_quality.json

K = 8 proposals of every structure, on the grid of the image, from the served setting on all slices (cleaned as the
server does it) and from other settings on every third slice (not cleaned: islands need all slices; the served setting
is in that table too, on the same slices):

* **diversity**: mean pairwise Dice of the proposals, and the squared generalised energy distance to the one ground
  truth, 2 E d(S, Y) - E d(S, S'), d = 1 - IoU (0 for two empty masks), S and S' drawn from the K proposals with
  repetition, as it is usually estimated; "unbiased" leaves out pairs of a proposal with itself. Per slice and structure
  where the truth or any proposal draws it, mean over slices, then over structures and cases. Settings: denoising steps,
  and what sets proposals apart (evidence offsets as served, half, twice, or none: noise alone).
* **disagreement against error**: Spearman's rank correlation of what is served (`disagreement_per_slice`, and its mean
  over three slices, `nearby_disagreement_per_slice`, see `progidiff.proposals.volume_proposals`) with 1 - Dice of the
  consensus, over pairs of slice and structure. "drawn": pairs where the truth or any proposal has something; "present":
  where the truth has; "all": all pairs, of which most are empty on both sides. What no proposal draws counts as
  certain. Other summaries of the same proposals stand beside it, and the size of the consensus alone.
* **where**: AUROC of the voxel's uncertainty (4 a (1 - a), a the agreement) for the consensus being wrong there.
  "band": voxels that any proposal draws; "band and truth": also those of the truth that none draws; "overall": every
  voxel of the slices.
* **calibration**: agreement against the share of voxels that are truly inside, per value of the agreement; ECE is the
  mean absolute difference, weighted by voxels. Beside it the mean probability of the proposals (20 bins).
* **picking**: Dice of a volume's consensus, of the medoid, of the proposal that is best for the volume, and of the best
  one slice by slice (also with the consensus among the choices), pooled over slices. What an expert gains at most.

`--keep FOLDER` keeps proposals between runs, so that a run that was stopped goes on; the report is written after every
case.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.stats import spearmanr

from progidiff.evaluation.evaluate import TRANSUNET_STRUCTURES, match_structures, save_report
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.islands import drop_islands
from progidiff.proposals.request import DEFAULT_CLEAN_UP, NONE, ProposalRequest
from progidiff.proposals.volume_proposals import THRESHOLD, VolumeProposals
from progidiff.storage.provenance import describe_versions

ROOT = Path(__file__).resolve().parents[1]

SERVED = "served"
SUMMARIES = (
    "disagreement (served)",
    "1 - mean Dice to the consensus",
    "1 - lowest pairwise Dice",
    "1 - Dice that the mean probability expects",
    "entropy / sum of the mean probability",
    "spread of sizes / mean size",
    "disagreement with an edge of one pixel counted as open",
    "1 / size of the consensus (no disagreement at all)",
)
"""Candidates for "how uncertain is this slice"."""
ALONE, NEARBY = "slice alone", "mean of 3 slices"
PROBABILITY_BINS = 20


@dataclass(frozen=True)
class Setting:
    """How proposals are drawn.

    Attributes:
        name: In tables.
        steps: Denoising steps; None for the model's.
        offsets: Factor on the model's evidence offsets; 0 for noise alone.
    """

    name: str
    steps: int | None = None
    offsets: float = 1.0


SETTINGS = (
    Setting(SERVED),
    Setting("1 step", 1),
    Setting("4 steps", 4),
    Setting("8 steps", 8),
    Setting("offsets halved", None, 0.5),
    Setting("offsets doubled", None, 2.0),
    Setting("noise alone", None, 0.0),
    Setting("noise alone, 1 step", 1, 0.0),
    Setting("noise alone, 4 steps", 4, 0.0),
    Setting("noise alone, 8 steps", 8, 0.0),
)


def draw(
    engine: Engine,
    volume: Volume,
    queries: Sequence[Query],
    setting: Setting,
    num_proposals: int,
    slices: Sequence[int],
    keep: Path | None,
) -> VolumeProposals:
    """The proposals of a volume by a setting, from `keep` if they are there."""
    folder = None if keep is None else keep / setting.name.replace(" ", "_").replace(",", "") / volume.name
    if folder is not None and (folder / "proposals.json").is_file():
        return VolumeProposals.from_files(folder)
    pipeline = engine.load()
    spread = engine.card.evidence_spread
    pipeline.evidence_spread = (
        (setting.offsets * spread[0], setting.offsets * spread[1]) if setting.offsets and any(spread) else None
    )
    # The model itself: an adapter's pipeline is a copy that this change does not reach.
    request = ProposalRequest(
        queries=queries, num_proposals=num_proposals, num_inference_steps=setting.steps, adapter=NONE, slices=slices
    )
    proposals = engine.propose(request, volume)
    if folder is not None:
        proposals.to_files(folder)
    return proposals


@dataclass
class Pair:
    """One structure on one slice: everything that the tables are made of. Voxels and Dice on the image's grid.

    Attributes:
        structure, z: Which.
        truth: Voxels of the truth.
        sizes, overlaps: Voxels of the K proposals, and those also in the truth.
        consensus, consensus_overlap: The same of the consensus.
        pairwise_dice: Mean over distinct pairs of proposals; 1 for two empty ones.
        distance_to_truth, distance, distance_with_self: Mean 1 - IoU to the truth, between distinct proposals, and with
            repetition.
        summaries: See `SUMMARIES`; 0 where no proposal draws anything.
        agreement_counts: (K + 1, 2) voxels by the number of proposals that draw them and by the truth.
        probability_counts: (PROBABILITY_BINS, 2) voxels by mean probability and by the truth.
        probability_errors: (256, 2) voxels by mean probability in 1/255 and by whether the consensus is wrong.
    """

    structure: str
    z: int
    truth: int
    sizes: np.ndarray
    overlaps: np.ndarray
    consensus: int
    consensus_overlap: int
    pairwise_dice: float
    distance_to_truth: float
    distance: float
    distance_with_self: float
    summaries: dict[str, float]
    agreement_counts: np.ndarray
    probability_counts: np.ndarray
    probability_errors: np.ndarray

    @property
    def error(self) -> float:
        """1 - Dice of the consensus; 0 if it and the truth are empty."""
        total = self.truth + self.consensus
        return 1 - 2 * self.consensus_overlap / total if total else 0.0

    @property
    def dice(self) -> np.ndarray:
        """Of the K proposals with the truth; 1 for two empty masks."""
        return _divide(2 * self.overlaps, self.sizes + self.truth, 1.0)


def _divide(above: np.ndarray, below: np.ndarray, otherwise: float) -> np.ndarray:
    return np.where(below > 0, above / np.maximum(below, 1e-12), otherwise)


def measure_pair(structure: str, z: int, maps: np.ndarray, truth: np.ndarray, disagreement: float) -> Pair | None:
    """Measure one structure on one slice.

    Args:
        structure, z: Which.
        maps: Probabilities on the scale 0..255, float32 of shape (K, Y, X).
        truth: bool of shape (Y, X).
        disagreement: As served, from the working grid.

    Returns:
        None if neither the truth nor any proposal has anything there.
    """
    drawn = maps >= THRESHOLD
    if not drawn.any() and not truth.any():
        return None
    count = len(maps)
    pixels = truth.size
    # Everything outside of this box is zero probability and not the structure.
    footprint = (maps > 0).any(axis=0) | truth
    rows, cols = (np.flatnonzero(footprint.any(axis=axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
    drawn, inside, mean = drawn[:, box[0], box[1]], truth[box], maps[:, box[0], box[1]].mean(axis=0) / 255
    flat = drawn.reshape(count, -1).astype(np.float64)
    overlap = flat @ flat.T
    sizes = overlap.diagonal()
    with_truth = flat @ inside.ravel()
    total = sizes[:, None] + sizes[None]
    dice = _divide(2 * overlap, total, 1.0)
    apart = 1 - _divide(overlap, total - overlap, 1.0)
    distinct = np.triu_indices(count, 1)
    number = drawn.sum(axis=0)
    consensus = number * 2 >= count
    wrong = consensus != inside

    agreement_counts = np.zeros((count + 1, 2), dtype=np.int64)
    np.add.at(agreement_counts, (number.ravel(), inside.ravel().astype(int)), 1)
    probability_counts = np.zeros((PROBABILITY_BINS, 2), dtype=np.int64)
    np.add.at(
        probability_counts,
        (np.minimum((mean.ravel() * PROBABILITY_BINS).astype(int), PROBABILITY_BINS - 1), inside.ravel().astype(int)),
        1,
    )
    probability_errors = np.zeros((256, 2), dtype=np.int64)
    np.add.at(probability_errors, (np.rint(mean.ravel() * 255).astype(int), wrong.ravel().astype(int)), 1)
    outside = pixels - inside.size
    agreement_counts[0, 0] += outside
    probability_counts[0, 0] += outside
    probability_errors[0, 0] += outside

    size = int(consensus.sum())
    summaries = dict.fromkeys(SUMMARIES, 0.0)  # what nobody draws looks certain, whatever the truth
    if drawn.any():
        edge = int((consensus & ~ndimage.binary_erosion(consensus)).sum())
        differing = float((total - 2 * overlap)[distinct].mean())
        to_consensus = _divide(2 * flat @ consensus.ravel(), sizes + size, 1.0)
        expected = consensus.sum() + mean.sum()
        values = (
            disagreement,
            1 - float(to_consensus.mean()),
            1 - float(dice[distinct].min()),
            float(1 - 2 * mean[consensus].sum() / expected),
            float(_entropy(mean).sum() / mean.sum()),
            float(sizes.std() / sizes.mean()),
            float((differing + edge) / (2 * sizes.mean() + edge)),
            1 / max(size, 0.5),
        )
        summaries = dict(zip(SUMMARIES, values, strict=True))
    return Pair(
        structure=structure,
        z=z,
        truth=int(truth.sum()),
        sizes=sizes,
        overlaps=with_truth,
        consensus=size,
        consensus_overlap=int((consensus & inside).sum()),
        pairwise_dice=float(dice[distinct].mean()),
        distance_to_truth=float((1 - _divide(with_truth, sizes + inside.sum() - with_truth, 1.0)).mean()),
        distance=float(apart[distinct].mean()),
        distance_with_self=float(apart.mean()),
        summaries=summaries,
        agreement_counts=agreement_counts,
        probability_counts=probability_counts,
        probability_errors=probability_errors,
    )


def _entropy(mean: np.ndarray) -> np.ndarray:
    clipped = mean.clip(1e-6, 1 - 1e-6)
    return -(clipped * np.log2(clipped) + (1 - clipped) * np.log2(1 - clipped))


def measure_case(
    volume: Volume,
    labels: np.ndarray,
    proposals: VolumeProposals,
    structures: Mapping[str, Sequence[int]],
    slices: Sequence[int],
) -> list[Pair]:
    """Every pair of structure and slice on which anything is, in the truth or a proposal."""
    stack = volume.arrange(labels)
    pairs = []
    for name, ids in structures.items():
        truth = np.isin(stack, list(ids))
        disagreement = proposals.disagreement[proposals.structures.index(name)]
        for z in slices:
            pair = measure_pair(name, z, proposals.slice_probabilities(name, z), truth[z], float(disagreement[z]))
            if pair is not None:
                pairs.append(pair)
    return pairs


def compute_auroc(counts: np.ndarray) -> float:
    """AUROC from counts of shape (levels, 2): negatives and positives at each level of the score, lowest first; ties
    count half.

    Example:
        >>> compute_auroc(np.array([[3, 0], [1, 1], [0, 2]]))
        0.9583333333333334
    """
    negatives, positives = counts[:, 0].astype(float), counts[:, 1].astype(float)
    if not negatives.sum() or not positives.sum():
        return math.nan
    below = np.concatenate([[0.0], np.cumsum(negatives)[:-1]])
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def sort_by_uncertainty(counts: np.ndarray, drawn_by: Iterable[int]) -> np.ndarray:
    """Counts by number of proposals and truth -> counts by uncertainty and error, least uncertain first.

    Args:
        counts: (K + 1, 2) voxels by the number of proposals and by the truth.
        drawn_by: Which numbers of proposals take part.
    """
    top = len(counts) - 1
    levels = np.zeros((top // 2 + 1, 2), dtype=np.int64)
    for number in drawn_by:
        consensus = int(number * 2 >= top)
        # min(a, 1 - a) sorts as 4 a (1 - a) does.
        level = min(number, top - number)
        levels[level, 0] += counts[number, consensus]
        levels[level, 1] += counts[number, 1 - consensus]
    return levels


def compute_ece(counts: np.ndarray, expected: np.ndarray) -> float:
    """Expected calibration error from counts (bins, 2) by the truth and the value that each bin claims; NaN without
    voxels.
    """
    total = counts.sum(axis=1)
    if not total.sum():
        return math.nan
    observed = _divide(counts[:, 1].astype(float), total, 0.0)
    return float((total * np.abs(expected - observed)).sum() / total.sum())


def summarise_diversity(pairs: Sequence[Pair]) -> dict[str, float]:
    """Means of one case: over slices, then over structures."""

    def average(value: Callable[[Pair], float]) -> float:
        names = {pair.structure for pair in pairs}
        return _mean(_mean(value(pair) for pair in pairs if pair.structure == name) for name in names)

    return {
        "pairwise_dice": average(lambda pair: pair.pairwise_dice),
        "ged": average(lambda pair: 2 * pair.distance_to_truth - pair.distance_with_self),
        "ged_unbiased": average(lambda pair: 2 * pair.distance_to_truth - pair.distance),
        "distance_to_truth": average(lambda pair: pair.distance_to_truth),
    }


def summarise_picking(pairs: Sequence[Pair], structures: Iterable[str]) -> dict[str, dict[str, float]]:
    """Dice of one case, pooled over its slices, per way of picking and structure; only structures that the truth has.

    The medoid is that of the slice; the served "best" is that of the volume, which has nearly the same Dice as a single
    proposal.
    """
    found: dict[str, dict[str, float]] = {}
    for name in structures:
        own = [pair for pair in pairs if pair.structure == name]
        truth = sum(pair.truth for pair in own)
        if not truth:
            continue

        def pool(chosen: Iterable[tuple[float, float]], truth: int = truth) -> float:
            values = np.array(list(chosen), dtype=float)
            return float(2 * values[:, 1].sum() / (values[:, 0].sum() + truth))

        def pick(pair: Pair, with_consensus: bool) -> tuple[float, float]:
            choices = list(zip(pair.sizes, pair.overlaps, strict=True))
            if with_consensus:
                choices.insert(0, (pair.consensus, pair.consensus_overlap))
            # On a slice without the structure the best answer is the smallest one.
            return max(
                choices, key=lambda choice: 2 * choice[1] / (choice[0] + pair.truth) if pair.truth else -choice[0]
            )

        each = [pool((pair.sizes[k], pair.overlaps[k]) for pair in own) for k in range(len(own[0].sizes))]
        found[name] = {
            "single": _mean(each),
            "consensus": pool((pair.consensus, pair.consensus_overlap) for pair in own),
            "best of K per volume": max(each),
            "best of K per slice": pool(pick(pair, False) for pair in own),
            "best of K and consensus per slice": pool(pick(pair, True) for pair in own),
        }
    return {way: {name: values[way] for name, values in found.items()} for way in next(iter(found.values()), {})}


def summarise_correlation(
    cases: Mapping[str, Sequence[Pair]], depths: Mapping[str, int], structures: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Spearman of every summary with the error of the consensus, of the slice alone and averaged with its neighbours.

    Args:
        cases: Pairs per case, of all slices.
        depths: Slices per case.
        structures: Names; pairs that are not in `cases` are empty, certain and right.
    """
    tables = {case: _tabulate(pairs, depths[case], structures) for case, pairs in cases.items()}
    result: dict[str, dict[str, Any]] = {}
    for summary in SUMMARIES:
        result[summary] = {}
        for kind in (ALONE, NEARBY):
            values = {
                case: table[summary] if kind == ALONE else average_neighbours(table[summary])
                for case, table in tables.items()
            }

            def correlate(
                mask: str | None,
                rows: slice = slice(None),
                only: str | None = None,
                values: dict[str, np.ndarray] = values,
            ) -> float:
                chosen = [case for case in tables if only in (None, case)]
                keep = {
                    case: tables[case][mask][rows].astype(bool)
                    if mask
                    else np.ones_like(values[case][rows], dtype=bool)
                    for case in chosen
                }
                return _spearman(
                    np.concatenate([values[case][rows][keep[case]] for case in chosen]),
                    np.concatenate([tables[case]["error"][rows][keep[case]] for case in chosen]),
                )

            result[summary][kind] = {
                "drawn": correlate("drawn"),
                "present": correlate("present"),
                "all": correlate(None),
                "within structures": _mean(correlate("drawn", slice(row, row + 1)) for row in range(len(structures))),
                "drawn by case": {case: correlate("drawn", only=case) for case in tables},
            }
    return result


def _tabulate(pairs: Sequence[Pair], depth: int, structures: Sequence[str]) -> dict[str, np.ndarray]:
    """Error, summaries and masks of one case as arrays of shape (structures, depth)."""
    table = {name: np.zeros((len(structures), depth)) for name in (*SUMMARIES, "error", "drawn", "present")}
    for pair in pairs:
        place = structures.index(pair.structure), pair.z
        for name, value in pair.summaries.items():
            table[name][place] = value
        table["error"][place], table["drawn"][place], table["present"][place] = pair.error, 1, pair.truth > 0
    return table


def average_neighbours(values: np.ndarray) -> np.ndarray:
    """Mean of every slice and its neighbours, along the last axis, as `VolumeProposals.nearby_disagreement` has it.

    Example:
        >>> average_neighbours(np.array([[0.0, 3.0, 0.0, 0.0]])).tolist()
        [[1.5, 1.0, 1.0, 0.0]]
    """
    around = np.ones(3)
    neighbours = np.convolve(np.ones(values.shape[-1]), around)[1:-1]
    return np.stack([np.convolve(row, around)[1:-1] / neighbours for row in values])


def _spearman(values: np.ndarray, errors: np.ndarray) -> float:
    if len(values) < 3 or np.ptp(values) == 0 or np.ptp(errors) == 0:
        return math.nan
    return float(spearmanr(values, errors)[0])


def summarise_voxels(pairs: Sequence[Pair], empty_voxels: int) -> dict[str, Any]:
    """AUROC and calibration over all voxels of some pairs.

    Args:
        pairs: Of one or all structures.
        empty_voxels: Voxels of the pairs without anything: agreement 0 and right.
    """
    counts = sum((pair.agreement_counts for pair in pairs), np.zeros_like(pairs[0].agreement_counts))
    probability = sum((pair.probability_counts for pair in pairs), np.zeros_like(pairs[0].probability_counts))
    errors = sum((pair.probability_errors for pair in pairs), np.zeros_like(pairs[0].probability_errors))
    top = len(counts) - 1
    banded = counts.copy()
    banded[0, 0] = 0  # leaves the voxels of the truth that nobody draws
    counts[0, 0] += empty_voxels
    probability[0, 0] += empty_voxels
    errors[0, 0] += empty_voxels
    # Uncertainty of the mean probability: how near it is to one half.
    folded = np.zeros((128, 2), dtype=np.int64)
    np.add.at(folded, np.minimum(np.arange(256), 255 - np.arange(256)), errors)
    levels = np.arange(top + 1) / top
    middles = (np.arange(PROBABILITY_BINS) + 0.5) / PROBABILITY_BINS
    return {
        "auroc": {
            "band": compute_auroc(sort_by_uncertainty(counts, range(1, top + 1))),
            "band and truth": compute_auroc(sort_by_uncertainty(banded, range(top + 1))),
            "overall": compute_auroc(sort_by_uncertainty(counts, range(top + 1))),
            "overall, mean probability": compute_auroc(folded),
        },
        "ece": {
            "band": compute_ece(counts[1:], levels[1:]),
            "band and truth": compute_ece(banded, levels),
            "overall": compute_ece(counts, levels),
            "mean probability from 0.05": compute_ece(probability[1:], middles[1:]),
        },
        "reliability": [
            {
                "agreement": float(level),
                "voxels": int(row.sum()),
                "inside": float(row[1] / row.sum()) if row.sum() else None,
            }
            for level, row in zip(levels, counts, strict=True)
        ],
        "reliability_probability": [
            {
                "probability": float(middle),
                "voxels": int(row.sum()),
                "inside": float(row[1] / row.sum()) if row.sum() else None,
            }
            for middle, row in zip(middles, probability, strict=True)
        ],
    }


def _mean(values: Iterable[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cases and settings; the report is written after every case."""
    engine = Engine(options.model, device=options.device)
    matched, notes = match_structures(load_label_names(options.studies), engine.structures, options.structures or ())
    queries = [Query(name, name) for name in matched]
    chosen = [setting for setting in SETTINGS if not options.settings or setting.name in options.settings]
    served: dict[str, list[Pair]] = {}
    empty: dict[str, int] = {}
    depths: dict[str, int] = {}
    empty_voxels = 0
    diversity: dict[str, dict[str, dict[str, float]]] = {setting.name: {} for setting in chosen}
    picking: dict[str, dict[str, dict[str, float]]] = {}
    started = time.monotonic()
    report: dict[str, Any] = {}
    for case in list_labelled(options.studies, options.cases):
        volume = load_volume(case.image)
        labels = load_label(case.label, like=volume.grid)
        depth, height, width = volume.to_stack()[0].shape
        some = list(range(options.stride // 2, depth, options.stride))
        for setting in chosen:
            if setting.name == SERVED:
                proposals = draw(engine, volume, queries, setting, options.num_proposals, range(depth), options.keep)
                raw = measure_case(volume, labels, proposals, matched, some)
                grid = proposals.grid
                # A copy without what was derived before the clean-up.
                proposals = dataclasses.replace(proposals, probabilities=proposals.probabilities.copy())
                drop_islands(
                    proposals.probabilities,
                    DEFAULT_CLEAN_UP,
                    (grid.stack_spacing[0], grid.spacing, grid.spacing),
                    grid.covered,
                )
                served[case.name] = measure_case(volume, labels, proposals, matched, range(depth))
                depths[case.name] = depth
                empty[case.name] = depth * len(matched) - len(served[case.name])
                empty_voxels += empty[case.name] * height * width
                picking[case.name] = summarise_picking(served[case.name], matched)
            else:
                proposals = draw(engine, volume, queries, setting, options.num_proposals, some, options.keep)
                raw = measure_case(volume, labels, proposals, matched, some)
            names = sorted({pair.structure for pair in raw})
            ways = summarise_picking(raw, names)
            diversity[setting.name][case.name] = {
                **summarise_diversity(raw),
                **{f"dice, {way}": _mean(values.values()) for way, values in ways.items()},
            }
            print(f"{case.name}, {setting.name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        report = {
            "command": options.command,
            "model": engine.model_version,
            "num_proposals": options.num_proposals,
            "seed": 0,
            "stride": options.stride,
            "clean_up": DEFAULT_CLEAN_UP,
            "steps": engine.card.num_inference_steps,
            "evidence_spread": list(engine.card.evidence_spread),
            "notes": notes,
            "versions": describe_versions(),
            "diversity": {
                name: {"mean": _average(list(values.values())), "cases": values} for name, values in diversity.items()
            },
        }
        if served:
            every = [pair for pairs in served.values() for pair in pairs]
            report |= {
                "pairs": {
                    "drawn": len(every),
                    "present": sum(pair.truth > 0 for pair in every),
                    "empty": sum(empty.values()),
                },
                "disagreement_against_error": summarise_correlation(served, depths, list(matched)),
                "voxels": summarise_voxels(every, empty_voxels),
                "voxels_by_structure": {
                    name: {key: values for key, values in summarise_voxels(own, 0).items() if key in ("auroc", "ece")}
                    for name in matched
                    if (own := [pair for pair in every if pair.structure == name])
                },
                "picking": {
                    way: _group({case: values[way] for case, values in picking.items() if way in values})
                    for way in PICKS
                },
            }
        if options.out:
            save_report(_plain(report), options.out)
    return report


PICKS = ("single", "consensus", "best of K per volume", "best of K per slice", "best of K and consensus per slice")


def _average(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: _mean(entry[key] for entry in entries if key in entry) for key in (entries[0] if entries else ())}


def _group(cases: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Mean per structure over cases, and over groups of structures."""
    names = list(dict.fromkeys(name for values in cases.values() for name in values))
    structures = {name: _mean(values[name] for values in cases.values() if name in values) for name in names}
    return {
        "transunet_8": _mean(structures[name] for name in names if name in TRANSUNET_STRUCTURES),
        "all": _mean(structures.values()),
        "structures": structures,
    }


def _plain(value: Any) -> Any:
    """Rounded, and null where there is no value: JSON has no NaN."""
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 5), parse_constant=lambda _: None)


def print_tables(report: Mapping[str, Any]) -> None:
    """Markdown."""

    def cell(value: float | None) -> str:
        return "-" if value is None or math.isnan(value) else f"{value:.3f}"

    columns = ("pairwise_dice", "ged", "ged_unbiased", *(f"dice, {way}" for way in PICKS[:4]))
    print(
        "| setting | pairwise Dice | GED^2 | unbiased | single | consensus | best of K per volume | per slice "
        "|\n|---|---|---|---|---|---|---|---|"
    )
    for name, values in report["diversity"].items():
        if values["mean"]:
            print(f"| {name} | {' | '.join(cell(values['mean'].get(column)) for column in columns)} |")
    if "voxels" not in report:
        return
    print(
        "\n| summary of the proposals | of | drawn | present | all | within structures | "
        "drawn, by case |\n|---|---|---|---|---|---|---|"
    )
    for name, kinds in report["disagreement_against_error"].items():
        for kind, values in kinds.items():
            by_case = ", ".join(cell(value) for value in values["drawn by case"].values())
            print(
                f"| {name} | {kind} |  | ".join(
                    cell(values[key]) for key in ("drawn", "present", "all", "within structures")
                )
                + f" | {by_case} |"
            )
    print(
        "\n| | "
        + " | ".join(report["voxels"]["auroc"])
        + " |\n|---" * 1
        + "|---" * len(report["voxels"]["auroc"])
        + "|"
    )
    print("| AUROC | " + " | ".join(cell(value) for value in report["voxels"]["auroc"].values()) + " |")
    print("\n| | " + " | ".join(report["voxels"]["ece"]) + " |\n|---" + "|---" * len(report["voxels"]["ece"]) + "|")
    print("| ECE | " + " | ".join(cell(value) for value in report["voxels"]["ece"].values()) + " |")
    print("\n| agreement | voxels | truly inside |\n|---|---|---|")
    for row in report["voxels"]["reliability"]:
        print(f"| {row['agreement']:.3f} | {row['voxels']} | {cell(row['inside'])} |")
    print("\n| picked | 8 structures | all |\n|---|---|---|")
    for way, values in report["picking"].items():
        print(f"| {way} | {cell(values['transunet_8'])} | {cell(values['all'])} |")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="local datastore with labels/final and labels.json")
    parser.add_argument("--cases", nargs="*", help="only these cases (default: all)")
    parser.add_argument("--structures", nargs="*", help="only these structures (default: all)")
    parser.add_argument(
        "--settings",
        nargs="*",
        choices=[setting.name for setting in SETTINGS],
        help="only these settings (default: all)",
    )
    parser.add_argument("--num-proposals", type=int, default=8)
    parser.add_argument(
        "--stride", type=int, default=3, help="every so many slices, for all settings but the served one"
    )
    parser.add_argument("--keep", type=Path, help="folder to keep proposals in")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--device")
    parser.add_argument("--smoke", action="store_true", help="K = 3, every fourth slice, three settings: does it run?")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.num_proposals, options.stride = 3, 4
        options.settings = options.settings or [SERVED, "1 step", "noise alone"]
    named = ["--studies", str(options.studies), *(["--cases", *options.cases] if options.cases else [])]
    named += ["--settings", *options.settings] if options.settings else []
    options.command = shlex.join(
        [
            "python",
            "benchmarks/proposal_quality.py",
            *named,
            "--num-proposals",
            str(options.num_proposals),
            "--stride",
            str(options.stride),
        ]
    )
    print_tables(_plain(run(options)))


if __name__ == "__main__":
    main()
