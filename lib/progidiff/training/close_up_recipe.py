"""The last stage of `progidiff train`: out-of-fold evidence, then the close-up, written beside the conditioning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from progidiff.errors import RequestError
from progidiff.model.backbone import Backbone
from progidiff.model.close_up import CloseUpNetwork, create_network
from progidiff.model.close_up_folder import (
    CloseUpCard,
    compute_close_up_digest,
    has_close_up,
    load_close_up,
    save_close_up,
)
from progidiff.model.folder import ModelCard, compute_conditioning_digest, load_card
from progidiff.training.build_model import create_branch
from progidiff.training.close_up_stage import CloseUpObjective, CloseUpOptions
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.loop import LoopConfig, Report, run_loop
from progidiff.training.out_of_fold import (
    find_evidence,
    keep_evidence,
    load_pooled_volume,
    split_by_patient,
    train_fold,
)
from progidiff.training.processes import find_team
from progidiff.training.reader_masks import ReaderSource, load_reader_masks
from progidiff.training.recipe_settings import CloseUpStage, TrainConfig
from progidiff.training.settings import to_values
from progidiff.training.slice_cache import Case, list_cases
from progidiff.training.window_pool import VolumeSource, WindowPool, WindowSource

logger = logging.getLogger(__name__)

NODULE = "lung nodule"
"""What the crops of readers show."""


def train_close_up_of(
    model_dir: Path,
    backbone: Backbone,
    cases: Sequence[Case],
    config: TrainConfig,
    work: Path,
    also: Sequence[Path] = (),
    readers: Path | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    continue_from: Path | None = None,
) -> CloseUpNetwork:
    """Train the close-up of a model folder and write it there.

    Args:
        model_dir: With ``conditioning/``, whose evidence the close-up will read.
        backbone: For the text.
        cases: The labelled volumes of training.
        config: Settings; `close_up`, and `evidence` for the folds.
        work: Checkpoints, cached slices, and the out-of-fold evidence.
        also: Further labelled folders; their windows come from the truth, with edits and without evidence.
        readers: File of crops with several readers' masks.
        is_cancelled, report: See `run_loop`.
        continue_from: Model folder whose close-up is trained further; one without a close-up, or None, for a fresh one.

    Raises:
        RequestError: if there are fewer cases than folds.
        ModelError: if the close-up that is continued cannot be read.
    """
    card, stage = load_card(model_dir), config.close_up
    find_out_of_fold(card, backbone, cases, config, work, is_cancelled, _tell(report, "folds"))
    structures = list(card.structures)
    sources: list[WindowSource] = [
        VolumeSource([load_pooled_volume(case, structures, card.conditioning, work) for case in cases])
    ]
    weights = [1.0]
    for folder in also:
        more = list_cases(folder)
        structures += [name for case in more for name in case.structures.values() if name not in structures]
        pooled = [load_pooled_volume(case, structures, card.conditioning, None) for case in more]
        sources.append(VolumeSource(pooled, worn_share=stage.worn_share))
        weights.append(stage.also_share / len(also))
    if readers is not None:
        structures += [NODULE] if NODULE not in structures else []
        sources.append(ReaderSource(load_reader_masks(readers), label=structures.index(NODULE) + 1))
        weights.append(stage.readers_share)
    weights[0] = max(0.1, 1 - sum(weights[1:]))
    prompts = PhraseTable(backbone, structures).pick_canonical()
    network, started = _create_or_continue(backbone, config.seed, continue_from)
    options = CloseUpOptions(**{f.name: getattr(stage, f.name) for f in fields(CloseUpOptions)})
    objective = CloseUpObjective(network, WindowPool(sources, weights), prompts, options)
    settings = {
        "options": to_values(options),
        "cases": sorted(case.name for case in cases),
        "structures": structures,
        **started,
    }
    loop = LoopConfig.of(stage, config)
    told = _tell(report, "close_up")
    run_loop({"network": network}, objective, loop, work / "close_up", None, is_cancelled, told, settings=settings)
    if find_team().is_first:
        written = CloseUpCard(
            network.config,
            finder=compute_conditioning_digest(model_dir),
            structures=tuple(structures),
            facts={**_describe(stage, cases, also, readers), **started},
        )
        save_close_up(model_dir, written, network)
    return network


def _create_or_continue(
    backbone: Backbone, seed: int, continue_from: Path | None
) -> tuple[CloseUpNetwork, dict[str, str]]:
    """A fresh network, or that of a model folder; and what says which, for checkpoints and the card."""
    if continue_from is None or not has_close_up(continue_from):
        return create_network(backbone.text_features, seed=seed).to(backbone.device), {}
    _, network = load_close_up(continue_from, backbone.device)
    return network.train().requires_grad_(True), {"continued": compute_close_up_digest(continue_from)}


def find_out_of_fold(
    card: ModelCard,
    backbone: Backbone,
    cases: Sequence[Case],
    config: TrainConfig,
    work: Path,
    is_cancelled: Callable[[], bool] | None,
    report: Report | None,
) -> None:
    """Have every case answered by a network that did not see it; what is there is kept."""
    if len(cases) < config.close_up.folds:
        raise RequestError(
            f"{len(cases)} labelled cases cannot be split into {config.close_up.folds} folds; set close_up.folds to at "
            "most their number."
        )
    conditioning = card.conditioning
    for number, part in enumerate(split_by_patient(cases, config.close_up.folds)):
        team = find_team()
        if team.agree(all(find_evidence(work, case.name).is_file() for case in part), backbone.device):
            continue
        rest = [case for case in cases if case not in part]
        branch = create_branch(
            backbone,
            conditioning.height,
            conditioning.width,
            conditioning.spacing_range,
            config.seed + number,
            **{
                name: getattr(conditioning, name)
                for name in (
                    "num_neighbours",
                    "neighbour_mm",
                    "mr_headroom",
                    "channels",
                    "query_level",
                    "evidence_channels",
                )
            },
        ).to(backbone.device)
        loop = LoopConfig.of(config.evidence, config)
        steps = config.close_up.fold_steps or loop.steps
        loop = replace(loop, steps=steps, validate_every=0, seed=config.seed + number)
        train_fold(
            branch, backbone, rest, card.structures, loop, config.evidence, work, f"fold{number}", is_cancelled, report
        )
        for name, dice in keep_evidence(branch, backbone, team.share(part), card.structures, work):
            mean = sum(dice.values()) / max(1, len(dice))
            logger.info("Out-of-fold evidence of %s: Dice %.3f", name, mean)
        team.wait()


def _tell(report: Report | None, stage: str) -> Report | None:
    """Name the stage in what is reported."""
    return None if report is None else lambda entry: report({"stage": stage, **entry})


def _describe(stage: CloseUpStage, cases: Sequence[Case], also: Sequence[Path], readers: Path | None) -> dict[str, Any]:
    """Where the weights come from."""
    return {
        "settings": to_values(stage),
        "cases": sorted(case.name for case in cases),
        "also": [folder.name for folder in also],
        "readers": "" if readers is None else readers.name,
    }
