"""Out-of-fold evidence: what networks say of volumes that they never saw.

A close-up that is trained on the evidence of a network which knows the answer learns to copy it. So the cases are split
into folds by patient, each fold is answered by a network that was trained on the others, and what it says, with all its
real errors, is kept as a cache for everything that is trained on top of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from progidiff.errors import RequestError
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.segments import load_label_map
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.storage.atomic import atomic_file
from progidiff.training.dice_tally import compute_area_shares
from progidiff.training.evidence_stage import EvidenceOptions, PhraseTable, train_evidence
from progidiff.training.loop import LoopConfig, Report
from progidiff.training.processes import find_team
from progidiff.training.slice_cache import Case, SliceCache
from progidiff.training.window_pool import PooledVolume


def split_by_patient(cases: Sequence[Case], num_folds: int) -> list[list[Case]]:
    """Every `num_folds`-th case in the order of names; each case is in one fold. One case is one patient.

    Raises:
        RequestError: if there are fewer than two folds, or fewer cases than folds.
    """
    if not 2 <= num_folds <= len(cases):
        raise RequestError(
            f"{len(cases)} labelled cases cannot be split into {num_folds} folds; use 2 to {len(cases)}."
        )
    ordered = sorted(cases, key=lambda case: case.name)
    return [ordered[fold::num_folds] for fold in range(num_folds)]


def train_fold(
    branch: ConditioningBranch,
    backbone: Backbone,
    training: Sequence[Case],
    structures: Sequence[str],
    loop: LoopConfig,
    options: EvidenceOptions,
    work: Path,
    name: str,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> None:
    """Train a fresh branch's evidence on some cases; a fold that is finished is loaded.

    Args:
        branch: Fresh; holds the trained weights afterwards.
        backbone: For the text.
        training: The cases of the other folds.
        structures: What is learned.
        loop, options: As for the evidence that is shipped.
        work: Cached slices, checkpoints and finished folds.
        name: Of the fold, for its folder.
        is_cancelled, report: See `run_loop`.
    """
    folder = work / name
    done = folder / "evidence.safetensors"
    if not done.is_file():
        shared = find_team()
        cache = SliceCache(training, structures, branch.config, work / "cache", options.supersampling, shared)
        described = {"cases": sorted(case.name for case in training), "data": cache.digests}
        train_evidence(branch, backbone, cache, None, loop, folder, options, is_cancelled, report, described)
        kept = {k: v.half().contiguous() for k, v in branch.state_dict().items() if _is_evidence(k)}
        with shared.first_alone():
            if shared.is_first:
                with atomic_file(done) as path:
                    save_file(kept, path, {"cases": json.dumps(described["cases"])})
    branch.load_state_dict({k: v.float() for k, v in load_file(done).items()}, strict=False)
    branch.eval()


def _is_evidence(name: str) -> bool:
    """Whether a tensor of a branch belongs to what `train_evidence` trains."""
    return name.startswith(("encoder.", "query_head."))


@torch.no_grad()
def keep_evidence(
    branch: ConditioningBranch, backbone: Backbone, cases: Sequence[Case], structures: Sequence[str], work: Path
) -> Iterator[tuple[str, dict[str, float]]]:
    """Write what a branch says of every slice of some cases: uint8 (Z, P, H, W) of 0..255, one file per case.

    Yields:
        The case, and its Dice per structure on the working grid.
    """
    cache = SliceCache(cases, structures, branch.config, work / "cache", supersampling=2)
    phrases = PhraseTable(backbone, structures)
    pooled = phrases.pooled[phrases.canonical()]
    for v, name in enumerate(cache.names):
        target = find_evidence(work, name)
        if target.is_file():
            continue
        rows = [i for i, (volume, _) in enumerate(cache.index) if volume == v]
        answers: list[NDArray[np.uint8]] = []
        overlap, total = np.zeros(len(structures)), np.zeros(len(structures))
        for start in range(0, len(rows), 16):
            images, labels = cache.read(rows[start : start + 16])
            with torch.autocast(pooled.device.type, torch.bfloat16):
                features = branch.encode_slices(images.to(pooled.device))
                logits = branch.predict_evidence(features, pooled).float().cpu()
            truth = compute_area_shares(labels, len(structures), 2) >= 0.5
            overlap += ((logits > 0) & truth).sum((0, 2, 3)).numpy()
            total += (logits > 0).sum((0, 2, 3)).numpy() + truth.sum((0, 2, 3)).numpy()
            answers.append((logits.sigmoid() * 255).round().to(torch.uint8).numpy())
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as path, path.open("wb") as file:
            np.save(file, np.concatenate(answers))
        yield name, {s: float(2 * o / t) for s, o, t in zip(structures, overlap, total, strict=True) if t}


def find_evidence(work: Path, case: str) -> Path:
    """Where the out-of-fold evidence of a case is, or will be."""
    return work / "oof" / f"{case}.npy"


def load_pooled_volume(
    case: Case, structures: Sequence[str], config: ConditioningConfig, work: Path | None
) -> PooledVolume:
    """A labelled case at its own pixels, for close-ups.

    Args:
        case: The labelled volume.
        structures: P names, ids 1..P.
        config: Of the conditioning whose evidence it is.
        work: Where `keep_evidence` wrote; None for windows from the truth.

    Raises:
        RequestError: if the evidence belongs to another working grid.
    """
    volume = load_volume(case.image, info=case.info)
    stack, spacing = volume.to_stack()
    low, high = compute_window(volume, config.mr_headroom)
    raw = load_label_map(case.label, volume.grid).array
    table = np.zeros(max(int(raw.max()), *case.structures) + 1, np.uint8)
    for value, name in case.structures.items():
        if name in structures:
            table[value] = structures.index(name) + 1
    found: dict[str, Any] = {}
    if work is not None:
        grid = plan_working_grid(
            stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
        )
        evidence = np.load(find_evidence(work, case.name), mmap_mode="r")
        shape = (len(stack), len(structures), config.height, config.width)
        if evidence.shape != shape:
            raise RequestError(
                f"The out-of-fold evidence of {case.name} has shape {evidence.shape}, not {shape}; it was made with "
                f"other settings. Remove '{find_evidence(work, case.name)}' to make it again."
            )
        found = {"evidence": evidence, "grid": grid}
    return PooledVolume(
        name=case.name,
        patient=case.name,
        image=np.round(np.clip((stack.astype(np.float32) - low) / (high - low), 0, 1) * 255).astype(np.uint8),
        labels=np.ascontiguousarray(volume.arrange(table[raw])),
        spacing=spacing,
        known=tuple(p + 1 for p, name in enumerate(structures) if name in case.structures.values()),
        **found,
    )
