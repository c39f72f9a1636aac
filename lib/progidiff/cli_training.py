"""The training half of the command line: ``progidiff pretrain | train | adapt`` and ``progidiff adapters``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.errors import RequestError

if TYPE_CHECKING:
    from progidiff.adapters import AdapterStore

StudiesOption = Annotated[Path, typer.Option(help="Folder of images with labels/final and labels.json (label id -> structure).", show_default=False)]
ModelFolderOption = Annotated[Path, typer.Option("--model", help="Model folder to write into.", show_default=False)]
WorkOption = Annotated[Path, typer.Option("--work", help="Checkpoints and cached slices. The same command continues a run that was stopped.")]
HoldOutOption = Annotated[
    list[str] | None,
    typer.Option("--hold-out", help="A case that training never sees, for validation; may be repeated. Split by patient.", show_default=False),
]
SeedOption = Annotated[int, typer.Option(help="Run seed; the seed of step i is a function of it and i.")]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)]
BaseOption = Annotated[
    Path | None, typer.Option("--model", help="Folder of the model. Default: apps/progidiff/model of this checkout.", show_default=False)
]
AdaptersOption = Annotated[
    Path | None, typer.Option("--adapters", help="Folder of adapters. Default: adapters/ in the model folder.", show_default=False)
]

KEPT_EXIT_CODE = 3
"""`progidiff adapt` ends with it if the new version was kept but not published."""


def register(app: Any) -> None:
    """Add the training commands to the command line `app` (a `typer.Typer`)."""
    app.command()(pretrain)
    app.command()(train)
    app.command()(adapt)
    adapters = typer.Typer(no_args_is_help=True, help="Versions of adapters: list, show, use, rollback.", rich_markup_mode=None)
    adapters.command("list")(list_adapters)
    adapters.command("show")(show_adapter)
    adapters.command("use")(use_adapter)
    adapters.command("rollback")(roll_back_adapter)
    app.add_typer(adapters, name="adapters")


def pretrain(
    studies: StudiesOption,
    model: ModelFolderOption,
    work: WorkOption = Path("runs/pretrain"),
    hold_out: HoldOutOption = None,
    codec_steps: Annotated[int, typer.Option(help="Steps of the mask codec (30 crops of masks and 10 of slices each).")] = 1300,
    refine_steps: Annotated[int, typer.Option(help="Further steps of its decoder on the smallest structures.")] = 400,
    denoiser_steps: Annotated[int, typer.Option(help="Steps of the text-to-image denoiser (12 slices and about 11 masks each).")] = 500,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Train an embedded backbone from scratch: the mask codec, then a text-to-image model of slices and their masks.

    Prints the codec's ceiling: encode-decode Dice of the held-out masks per structure.
    """
    from progidiff.training.recipes import run_pretrain

    _use_threads(threads)
    result = run_pretrain(studies, model, work, hold_out or [], codec_steps, refine_steps, denoiser_steps, seed=seed)
    typer.echo(json.dumps(result, indent=1))


def train(
    studies: StudiesOption,
    model: ModelFolderOption,
    work: WorkOption = Path("runs/train"),
    hold_out: HoldOutOption = None,
    name: Annotated[str, typer.Option(help="Name of the model.")] = "ct-base",
    version: Annotated[str, typer.Option(help="Version of the model; shown as name@version.")] = "1",
    evidence_steps: Annotated[int, typer.Option(help="Steps of the image encoder and the text-query head (16 slices each).")] = 3000,
    proposal_steps: Annotated[int, typer.Option(help="Steps of the denoiser (6 slices, about 20 slice-structure pairs each).")] = 1000,
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


def adapt(
    studies: StudiesOption,
    name: Annotated[str, typer.Option(help="Name of the adapter, for example mr.", show_default=False)],
    model: BaseOption = None,
    adapters: AdaptersOption = None,
    work: WorkOption = Path("runs/adapt"),
    case: Annotated[list[str] | None, typer.Option("--case", help="Train on this case; may be repeated. Default: all.", show_default=False)] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out",
            help="Hold this case back to choose the number of steps and to decide about publishing; may be repeated. Default: 1, of 5 or more 2.",
            show_default=False,
        ),
    ] = None,
    shots: Annotated[int | None, typer.Option(help="Train on so many of the volumes that are not held back.", show_default=False)] = None,
    slices: Annotated[int | None, typer.Option(help="Train on so many labelled slices, evenly spaced.", show_default=False)] = None,
    structures: Annotated[
        list[str] | None, typer.Option("--structures", help="Train only these; may be repeated. Default: all labelled ones.", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(help="Of the updates: more can learn more, and overfit more.")] = 8,
    alpha: Annotated[float | None, typer.Option(help="Scale of the updates is alpha / rank. Default: twice the rank.", show_default=False)] = None,
    targets: Annotated[str, typer.Option(help="What is adapted: some of encoder,query_head,injection,denoiser.")] = "encoder,query_head",
    norms: Annotated[bool, typer.Option("--norms/--no-norms", help="Train gains and offsets of the encoder's group norms too.")] = True,
    steps: Annotated[int, typer.Option(help="Largest number of steps; validation stops earlier.")] = 200,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    batch_size: Annotated[int, typer.Option(help="Slices per step.")] = 12,
    validate_every: Annotated[int, typer.Option(help="Steps between validations.")] = 25,
    patience: Annotated[int, typer.Option(help="Validations without a gain after which training stops.")] = 4,
    augmentation: Annotated[float, typer.Option(help="Strength of augmentation, 0 to 3.")] = 1.0,
    bias_field: Annotated[
        float | None, typer.Option(help="Strength of simulated shading, 0 to 2. Default: 0.3 for MR, 0 for CT.", show_default=False)
    ] = None,
    proposal_steps: Annotated[
        int, typer.Option(help="Then train the proposals for so many steps; needs a target injection or denoiser. Kept only if it pays.")
    ] = 0,
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Serve the new version if it is better.")] = True,
    backbone: Annotated[str | None, typer.Option(help="Folder or hub id of the backbone. Default: the model's own.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: CUDA if there is one.", show_default=False)] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = None,
) -> None:
    """Adapt the model to another modality or site with a few labelled volumes; one is enough.

    Structures are matched by the names in labels.json. Validation on held-back volumes (of a single volume: held-back slices)
    stops the training. The new version is published, and served from the next request on, if it beats both what is served and
    the model itself on the held-back slices. Exit code 0: published. 3: kept but not published. 2: an error, nothing written.
    The same command continues a run that was stopped or killed.
    """
    from progidiff.lora import LoraSettings
    from progidiff.training.adapt import AdaptConfig, run_adapt

    _use_threads(threads)
    chosen = tuple(part.strip() for part in targets.split(",") if part.strip())
    config = AdaptConfig(
        lora=LoraSettings(rank, 2.0 * rank if alpha is None else alpha, chosen, norms),
        steps=steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        validate_every=validate_every,
        patience=patience,
        augmentation=augmentation,
        bias_field=bias_field,
        proposal_steps=proposal_steps,
        seed=seed,
    )
    result = run_adapt(
        studies,
        _model_folder(model),
        name,
        work,
        config,
        adapters=adapters,
        cases=case or [],
        held_out=hold_out or [],
        shots=shots,
        slices=slices,
        structures=structures or [],
        backbone_source=backbone,
        device=device,
        publish=publish,
    )
    typer.echo(json.dumps(result.figures, indent=1))
    typer.echo(result.message, err=True)
    if not result.published:
        raise typer.Exit(KEPT_EXIT_CODE)


def list_adapters(
    model: BaseOption = None, adapters: AdaptersOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """List the adapters: name, versions, and the one that is served (*)."""
    store = _store(model, adapters)
    entries = store.entries()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    if not entries:
        typer.echo(f"'{store.root}' holds no adapters; `progidiff adapt` trains one.", err=True)
    for entry in entries:
        numbers = " ".join(f"{v}*" if v == entry.current else str(v) for v in entry.versions)
        typer.echo(f"{entry.name}: {numbers}{'' if entry.current is not None else ' (none is served)'}")
        if entry.problem:
            typer.echo(f"  {entry.problem}", err=True)


def show_adapter(
    reference: Annotated[str, typer.Argument(help="NAME for the version that is served, or NAME@VERSION.", show_default=False)],
    model: BaseOption = None,
    adapters: AdaptersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print adapter.json, run.json and the history as JSON.")] = False,
) -> None:
    """Print the card of a version."""
    store = _store(model, adapters)
    card = store.find(reference)
    if as_json:
        typer.echo(json.dumps({"adapter": card.to_dict(), "run": store.run(card), "history": store.history(card.name)}, indent=1))
    else:
        typer.echo((store.folder(card) / "README.md").read_text())


def use_adapter(
    reference: Annotated[str, typer.Argument(help="NAME@VERSION.", show_default=False)], model: BaseOption = None, adapters: AdaptersOption = None
) -> None:
    """Serve this version; a running server picks it up with the next request."""
    store = _store(model, adapters)
    if "@" not in reference:
        raise RequestError(f"Name the version too, for example {reference}@1; `progidiff adapters list` shows what there is.")
    card = store.find(reference)
    store.publish(card.name, card.version)
    typer.echo(f"{card.full_name} is served.")


def roll_back_adapter(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)], model: BaseOption = None, adapters: AdaptersOption = None
) -> None:
    """Serve what was served before; from the first version back to the model itself."""
    version = _store(model, adapters).rollback(name)
    typer.echo(f"{name}@{version} is served." if version is not None else f"No version of {name} is served: the model itself answers.")


def _model_folder(model: Path | None) -> Path:
    return model or Path(__file__).resolve().parents[2] / "apps" / "progidiff" / "model"


def _store(model: Path | None, adapters: Path | None) -> AdapterStore:
    from progidiff.adapters import AdapterStore

    return AdapterStore(adapters or _model_folder(model) / "adapters")


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
