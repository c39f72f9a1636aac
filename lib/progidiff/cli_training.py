"""The training half of the command line: ``progidiff pretrain | train``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

StudiesOption = Annotated[Path, typer.Option(help="Folder of images with labels/final and labels.json (label id -> structure).", show_default=False)]
ModelFolderOption = Annotated[Path, typer.Option("--model", help="Model folder to write into.", show_default=False)]
WorkOption = Annotated[Path, typer.Option("--work", help="Checkpoints and cached slices. The same command continues a run that was stopped.")]
HoldOutOption = Annotated[
    list[str] | None,
    typer.Option("--hold-out", help="A case that training never sees, for validation; may be repeated. Split by patient.", show_default=False),
]
SeedOption = Annotated[int, typer.Option(help="Run seed; the seed of step i is a function of it and i.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)]


def register(app: Any) -> None:
    """Add the training commands to the command line `app` (a `typer.Typer`)."""
    app.command()(pretrain)
    app.command()(train)


def pretrain(
    studies: StudiesOption,
    model: ModelFolderOption,
    work: WorkOption = Path("runs/pretrain"),
    hold_out: HoldOutOption = None,
    codec_steps: Annotated[int, typer.Option(help="Steps of the mask codec (30 crops of masks and 10 of slices each).")] = 1800,
    denoiser_steps: Annotated[int, typer.Option(help="Steps of the text-to-image denoiser (12 slices and about 11 masks each).")] = 600,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train an embedded backbone from scratch: the mask codec, then a text-to-image model of slices and their masks.

    Prints the codec's ceiling: encode-decode Dice of the held-out masks per structure.
    """
    from progidiff.training.recipes import run_pretrain

    _use_threads(threads)
    result = run_pretrain(studies, model, work, hold_out or [], codec_steps, denoiser_steps, seed=seed)
    typer.echo(json.dumps(result, indent=1))


def train(
    studies: StudiesOption,
    model: ModelFolderOption,
    work: WorkOption = Path("runs/train"),
    hold_out: HoldOutOption = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "ct-base",
    version: Annotated[str, typer.Option(help="Version of the model; shown as name@version.")] = "1",
    evidence_steps: Annotated[int, typer.Option(help="Steps of the image encoder and the text-query head (16 slices each).")] = 3000,
    proposal_steps: Annotated[int, typer.Option(help="Steps of the denoiser (10 slices, about 35 slice-structure pairs each).")] = 1500,
    modality: Annotated[str, typer.Option(help="CT or MR: what the images are.")] = "CT",
    backbone: Annotated[
        str | None,
        typer.Option(
            help="A Stable-Diffusion folder or hub id that stays frozen. Default: the model folder's own, trained jointly.", show_default=False
        ),
    ] = None,
    freeze_denoiser: Annotated[bool, typer.Option("--freeze-denoiser", help="Train the conditioning only.")] = False,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train the conditioning on labelled volumes: first encoder and query head, then the denoiser's proposals."""
    from progidiff.training.recipes import run_train

    _use_threads(threads)
    card = run_train(
        studies,
        model,
        work,
        name=name,
        version=version,
        held_out=hold_out or [],
        evidence_steps=evidence_steps,
        proposal_steps=proposal_steps,
        modality=modality,
        backbone_source=backbone,
        freeze_denoiser=freeze_denoiser,
        seed=seed,
    )
    typer.echo(f"{card.full_name} is in {model}")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
