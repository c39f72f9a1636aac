"""The last stage of `progidiff train`: out-of-fold evidence, then the close-up, written beside the conditioning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from progidiff.errors import RequestError
from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.close_up import CloseUpConfig, CloseUpNetwork, create_network
from progidiff.model.close_up_backbone import create_network_on, plan_network_on, recomputing
from progidiff.model.close_up_folder import (
    CloseUpCard,
    Denoiser,
    compute_close_up_digest,
    has_close_up,
    load_close_up,
    load_close_up_card,
    save_close_up,
)
from progidiff.model.folder import ModelCard, compute_backbone_digest, compute_conditioning_digest, load_card
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
from progidiff.training.shapes import ShapeSource, load_shapes
from progidiff.training.slice_cache import Case, list_cases
from progidiff.training.window_pool import VolumeSource, WindowPool, WindowSource

logger = logging.getLogger(__name__)

NODULE = "lung nodule"
"""What the crops of readers show."""

TRAINED = {name: getattr(CloseUpConfig, name) for name in ("level_spread", "noise_scale")}
"""What every network is trained with, however the proposals of the model that is written or continued are spread."""


@dataclass(frozen=True)
class FurtherWindows:
    """What close-ups learn from beside the labelled volumes that the evidence is trained on.

    Attributes:
        also: Further labelled folders; their windows come from the truth, with edits or worn evidence.
        shapes: Folder of label volumes without images, see `load_shapes`.
        readers: File of crops with several readers' masks, see `load_reader_masks`.
    """

    also: Sequence[Path] = ()
    shapes: Path | None = None
    readers: Path | None = None


def train_close_up_of(
    model_dir: Path,
    backbone: Backbone,
    cases: Sequence[Case],
    config: TrainConfig,
    work: Path,
    more: FurtherWindows | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
    continue_from: Path | None = None,
    denoiser: Denoiser = "own",
) -> CloseUpNetwork:
    """Train the close-up of a model folder and write it there.

    Args:
        model_dir: With ``conditioning/``, whose evidence the close-up will read.
        backbone: For the text; its denoiser and its autoencoder too, if that is the denoiser.
        cases: The labelled volumes of training.
        config: Settings; `close_up`, and `evidence` for the folds.
        work: Checkpoints, cached slices, and the out-of-fold evidence.
        more: What windows come from beside the cases.
        is_cancelled, report: See `run_loop`.
        continue_from: Model folder whose close-up is trained further; one without a close-up, or None, for a fresh one.
        denoiser: Whose draws, see `pick_denoiser`.

    Raises:
        RequestError: if there are fewer cases than folds.
        ModelError: if the close-up that is continued cannot be read.
    """
    card, stage = load_card(model_dir), config.close_up
    find_out_of_fold(card, backbone, cases, config, work, is_cancelled, _tell(report, "folds"))
    structures, names = list(card.structures), sorted(case.name for case in cases)
    network, started = _create_or_continue(backbone, config, continue_from, denoiser)
    given = {name: getattr(stage, name) for name in TRAINED if getattr(stage, name) is not None}
    served, network.config = replace(network.config, **given), replace(network.config, **TRAINED)
    native = network.config.native_size
    rules = WindowRules().at_size(native) if native else WindowRules()
    more = more or FurtherWindows()
    told = _tell(report, "close_up")
    for number, part in enumerate(stage.list_parts()):
        pool = _open_pool(card, structures, cases, part, rules, work, more)
        prompts = PhraseTable(backbone, structures).pick_canonical()
        options = CloseUpOptions(**{f.name: getattr(part, f.name) for f in fields(CloseUpOptions)})
        objective = CloseUpObjective(network, pool, prompts, options)
        settings = {"options": to_values(options), "cases": names, "structures": structures, **started}
        loop = replace(LoopConfig.of(part, config), seed=config.seed + number)
        folder = work / ("close_up" if number == 0 else f"close_up_{number + 1}")
        saving = network.shares_denoiser and part.recompute
        with recomputing(network) if saving else contextlib.nullcontext():
            run_loop({"network": network}, objective, loop, folder, None, is_cancelled, told, settings=settings)
        del pool, objective  # before the next ones are opened: a pool is gigabytes
    network.config = served
    if find_team().is_first:
        shared = {name: getattr(card, name) for name in ("backbone_digest", "backbone_copies")}
        written = CloseUpCard(
            network.config,
            rules,
            finder=compute_conditioning_digest(model_dir),
            structures=tuple(structures),
            facts={**_describe(stage, cases, more), **started},
            presence=_pick_presence(stage, continue_from),
            **(shared if network.shares_denoiser else {}),
        )
        save_close_up(model_dir, written, network)
    return network


def _open_pool(
    card: ModelCard,
    structures: list[str],
    cases: Sequence[Case],
    stage: CloseUpStage,
    rules: WindowRules,
    work: Path,
    more: FurtherWindows,
) -> WindowPool:
    """What windows are drawn from; `structures` grow by what further folders and readers show."""
    pooled = [load_pooled_volume(case, structures, card.conditioning, work) for case in cases]
    sources: list[WindowSource] = [VolumeSource(pooled, rules.size, rules=rules)]
    weights = [1.0]
    for folder in more.also:
        others = list_cases(folder)
        structures += [name for case in others for name in case.structures.values() if name not in structures]
        pooled = [load_pooled_volume(case, structures, card.conditioning, None) for case in others]
        sources.append(VolumeSource(pooled, rules.size, rules=rules, worn_share=stage.worn_share))
        weights.append(stage.also_share / len(more.also))
    if more.shapes is not None:
        sources.append(ShapeSource(load_shapes(more.shapes, structures), rules.size, rules=rules))
        weights.append(stage.shapes_share)
    if more.readers is not None:
        structures += [NODULE] if NODULE not in structures else []
        source = ReaderSource(load_reader_masks(more.readers), structures.index(NODULE) + 1, size=rules.size)
        # What a crop shows is the same in any number of pixels.
        sources.append(replace(source, shown_mm=source.pixel_mm * WindowRules.size / rules.size))
        weights.append(stage.readers_share)
    weights[0] = max(0.1, 1 - sum(weights[1:]))
    return WindowPool(sources, weights)


def pick_denoiser(
    config: TrainConfig, backbone: Backbone, is_named: bool, continue_from: Path | None = None
) -> Denoiser:
    """Whose denoiser draws: what the settings say, else the backbone's where one is named, else its own.

    Asked before anything is trained, so that what does not fit is refused at once.

    Args:
        config: Settings; without the stage close_up nothing is checked.
        backbone: Of the model.
        is_named: Whether it was given by name, as a real Stable Diffusion is.
        continue_from: Model folder whose close-up, if it has one, keeps the denoiser that it has.

    Raises:
        RequestError: if the settings want another one than the close-up that is continued has, keep an encoder that
            nobody trained, or want windows of a size that the backbone's denoiser cannot draw.
        ModelError: if close-ups cannot be drawn by the backbone's denoiser.
    """
    stage = config.close_up
    if "close_up" not in config.stages:
        return "own"
    continues = continue_from is not None and has_close_up(continue_from)
    if stage.keep_encoder and not continues:
        raise RequestError(
            "Setting close_up.keep_encoder needs a close-up whose encoder was trained before: name its model with "
            "--continue-from."
        )
    if continue_from is not None and continues:
        card = load_close_up_card(continue_from)
        kept = {"denoiser": card.denoiser, "pixels": card.network.native_size}
        other = [name for name, value in kept.items() if getattr(stage, name) not in (None, value)]
        if other:
            raise RequestError(
                f"The close-up of '{continue_from}' was trained with {other[0]} {kept[other[0]]} and keeps it: leave "
                f"close_up.{other[0]} out, or start from a model without a close-up."
            )
        return card.denoiser
    if stage.denoiser == "own" or (stage.denoiser is None and not is_named):
        return "own"
    plan_network_on(backbone, stage.pixels)
    return "backbone"


def _create_or_continue(
    backbone: Backbone, config: TrainConfig, continue_from: Path | None, denoiser: Denoiser
) -> tuple[CloseUpNetwork, dict[str, str]]:
    """A fresh network, or that of a model folder; and what says which, for checkpoints and the card."""
    if continue_from is not None and has_close_up(continue_from):
        _, network = load_close_up(continue_from, backbone.device, backbone)
        return network.train().requires_grad_(True), {"continued": compute_close_up_digest(continue_from)}
    if denoiser == "own":
        return create_network(backbone.text_features, seed=config.seed).to(backbone.device), {}
    network = create_network_on(backbone, config.close_up.pixels, config.seed)
    return network, {"backbone": compute_backbone_digest(backbone.folder), "pixels": str(network.config.native_size)}


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


def _pick_presence(stage: CloseUpStage, continue_from: Path | None) -> float:
    """What the settings say, else what a close-up that is continued has, else nothing."""
    if stage.presence is None and continue_from is not None and has_close_up(continue_from):
        return load_close_up_card(continue_from).presence
    return stage.presence or 0.0


def _tell(report: Report | None, stage: str) -> Report | None:
    """Name the stage in what is reported."""
    return None if report is None else lambda entry: report({"stage": stage, **entry})


def _describe(stage: CloseUpStage, cases: Sequence[Case], more: FurtherWindows) -> dict[str, Any]:
    """Where the weights come from."""
    return {
        "settings": to_values(stage),
        "cases": sorted(case.name for case in cases),
        "also": [folder.name for folder in more.also],
        "shapes": "" if more.shapes is None else more.shapes.name,
        "readers": "" if more.readers is None else more.readers.name,
    }
