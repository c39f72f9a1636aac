"""The training half of the command line: ``progidiff pretrain | train | adapt`` and ``progidiff adapters``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from progidiff.errors import RequestError
from progidiff.storage.state import EMBEDDED_MODEL

if TYPE_CHECKING:
    from progidiff.model.adapters import AdapterStore

StudiesOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images with labels/final and labels.json (label id -> structure). Required.", show_default=False
    ),
]
ModelFolderOption = Annotated[
    Path | None, typer.Option("--model", help="Model folder to write into. Required.", show_default=False)
]
WorkOption = Annotated[
    Path,
    typer.Option(
        "--work", help="Checkpoints, curves and cached slices. The same command continues a run that was stopped."
    ),
]
HoldOutOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hold-out",
        help="A case that training never sees, for validation; may be repeated. Split by patient.",
        show_default=False,
    ),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with settings; those it leaves out keep their defaults.", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="A setting, name=value, for example evidence.steps=500; may be repeated.", show_default=False
    ),
]
ShowConfigOption = Annotated[
    bool, typer.Option("--show-config", help="Print all settings as a commented YAML file, train nothing.")
]
SeedOption = Annotated[
    int | None, typer.Option(help="Run seed; the seed of step i is a function of it and i.", show_default=False)
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1. Default: CUDA if there is one.", show_default=False)
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)]
BaseOption = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Folder of the model. Default: apps/progidiff/model of this checkout.", show_default=False
    ),
]
AdaptersOption = Annotated[
    Path | None,
    typer.Option("--adapters", help="Folder of adapters. Default: adapters/ in the model folder.", show_default=False),
]

T = TypeVar("T")

KEPT_EXIT_CODE = 3
"""`progidiff adapt` ends with it if the new version was kept but not published."""


def register(app: Any) -> None:
    """Add the training commands to the command line `app` (a `typer.Typer`)."""
    app.command()(pretrain)
    app.command()(train)
    app.command()(adapt)
    adapters = typer.Typer(
        no_args_is_help=True, help="Versions of adapters: list, show, use, rollback.", rich_markup_mode=None
    )
    adapters.command("list")(list_adapters)
    adapters.command("show")(show_adapter)
    adapters.command("use")(use_adapter)
    adapters.command("rollback")(roll_back_adapter)
    app.add_typer(adapters, name="adapters")


def pretrain(
    studies: StudiesOption = None,
    model: ModelFolderOption = None,
    work: WorkOption = Path("runs/pretrain"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    hold_out: HoldOutOption = None,
    codec_steps: Annotated[int | None, typer.Option(help="Same as --set codec.steps=N.", show_default=False)] = None,
    refine_steps: Annotated[int | None, typer.Option(help="Same as --set refine.steps=N.", show_default=False)] = None,
    denoiser_steps: Annotated[
        int | None, typer.Option(help="Same as --set denoiser.steps=N.", show_default=False)
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train an embedded backbone from scratch: the mask codec, then a text-to-image model of slices and their masks.

    Prints the codec's ceiling: encode-decode Dice of the held-out masks per structure.
    """
    from progidiff.training.recipe_settings import PretrainConfig
    from progidiff.training.settings import load_config

    flags = {"codec.steps": codec_steps, "refine.steps": refine_steps, "denoiser.steps": denoiser_steps, "seed": seed}
    settings = load_config(PretrainConfig, config, changes or [], flags)
    if show_config:
        _print_config(settings, "pretrain")
        return
    from progidiff.training.recipes import run_pretrain

    _use_threads(threads)
    result = run_pretrain(
        _require(studies, "--studies"),
        _require(model, "--model"),
        work,
        settings,
        held_out=hold_out or [],
        device=device,
    )
    if _is_first():
        typer.echo(json.dumps(result, indent=1))


def train(
    studies: StudiesOption = None,
    model: ModelFolderOption = None,
    work: WorkOption = Path("runs/train"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    continue_from: Annotated[
        Path | None,
        typer.Option(
            help=(
                "A model folder to start from instead of random weights; it stays as it "
                "is. The result needs a new --version."
            ),
            show_default=False,
        ),
    ] = None,
    hold_out: HoldOutOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default=False)] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the model; shown as name@version.", show_default=False)
    ] = None,
    evidence_steps: Annotated[
        int | None, typer.Option(help="Same as --set evidence.steps=N.", show_default=False)
    ] = None,
    proposal_steps: Annotated[
        int | None, typer.Option(help="Same as --set proposals.steps=N.", show_default=False)
    ] = None,
    modality: Annotated[str | None, typer.Option(help="CT or MR: what the images are.", show_default=False)] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help=(
                "A Stable-Diffusion folder or hub id that stays frozen. Default: the "
                "model folder's own, trained jointly."
            ),
            show_default=False,
        ),
    ] = None,
    freeze_denoiser: Annotated[
        bool | None,
        typer.Option(
            "--freeze-denoiser/--train-denoiser",
            help="Train the conditioning only, or the denoiser too.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train the conditioning on labelled volumes: first encoder and query head, then the denoiser's proposals.

    Several GPUs or machines: accelerate launch --multi_gpu --num_processes N -m progidiff.cli train ... (N processes on
    CPUs too). Every process computes its own micro-batches: halve accumulate when you double the processes, to get the
    same run.
    """
    from progidiff.training.recipe_settings import TrainConfig
    from progidiff.training.settings import load_config

    flags = {
        "name": name,
        "version": version,
        "evidence.steps": evidence_steps,
        "proposals.steps": proposal_steps,
        "modality": modality,
        "freeze_denoiser": freeze_denoiser,
        "seed": seed,
    }
    settings = load_config(TrainConfig, config, changes or [], flags)
    if show_config:
        _print_config(settings, "train")
        return
    from progidiff.training.recipes import run_train

    _use_threads(threads)
    folder = _require(model, "--model")
    card = run_train(
        _require(studies, "--studies"),
        folder,
        work,
        settings,
        held_out=hold_out or [],
        backbone_source=backbone,
        continue_from=continue_from,
        device=device,
    )
    if _is_first():
        typer.echo(f"{card.full_name} is in {folder}")


def adapt(
    studies: StudiesOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the adapter. Default: the modality of the images, mr or ct.", show_default=False),
    ] = None,
    model: BaseOption = None,
    adapters: AdaptersOption = None,
    work: WorkOption = Path("runs/adapt"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", help="Train on this case; may be repeated. Default: all.", show_default=False),
    ] = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out",
            help=(
                "Hold this case back to choose the number of steps and to decide about publishing; may be repeated. "
                "Default: 1, of 5 or more 2."
            ),
            show_default=False,
        ),
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="Train on so many of the volumes that are not held back.", show_default=False)
    ] = None,
    slices: Annotated[
        int | None, typer.Option(help="Train on so many labelled slices, evenly spaced.", show_default=False)
    ] = None,
    structures: Annotated[
        list[str] | None,
        typer.Option(
            "--structures", help="Train only these; may be repeated. Default: all labelled ones.", show_default=False
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(help="Of the updates: more can learn more, and overfit more. Default: 8.", show_default=False),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Scale of the updates is alpha / rank. Default: twice the rank.", show_default=False),
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            help="What is adapted: some of encoder,query_head,injection,denoiser. Default: encoder,query_head.",
            show_default=False,
        ),
    ] = None,
    norms: Annotated[
        bool | None,
        typer.Option(
            "--norms/--no-norms", help="Train the encoder's group norms too. Default: yes.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Largest number of steps; validation stops earlier. Default: 200.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate. Default: 0.002.", show_default=False)
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Slices per step. Default: 12.", show_default=False)] = None,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations. Default: 25.", show_default=False)
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Validations without a gain after which training stops. Default: 4.", show_default=False),
    ] = None,
    augmentation: Annotated[
        float | None, typer.Option(help="Strength of augmentation, 0 to 3. Default: 1.", show_default=False)
    ] = None,
    bias_field: Annotated[
        float | None,
        typer.Option(help="Strength of simulated shading, 0 to 2. Default: 0.3 for MR, 0 for CT.", show_default=False),
    ] = None,
    proposal_steps: Annotated[
        int | None,
        typer.Option(
            help=(
                "Then train the proposals for so many steps; needs a target injection or "
                "denoiser. Kept only if it pays. Default: 0."
            ),
            show_default=False,
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish/--no-publish", help="Serve the new version if it is better.")
    ] = True,
    backbone: Annotated[
        str | None, typer.Option(help="Folder or hub id of the backbone. Default: the model's own.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    seed: SeedOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Adapt the model to another modality or site with a few labelled volumes; one is enough.

    Structures are matched by the names in labels.json. Validation on held-back volumes (of a single volume: held-back
    slices) stops the training. The new version is published, and served from the next request on, if it beats both what
    is served and the model itself on the held-back slices. Exit code 0: published. 3: kept but not published. 2: an
    error, nothing written. The same command continues a run that was stopped or killed.
    """
    from progidiff.training.adapt import run_adapt
    from progidiff.training.processes import find_team
    from progidiff.training.recipe_settings import AdaptConfig
    from progidiff.training.settings import load_config

    flags = {
        "lora.rank": rank,
        "lora.alpha": alpha if alpha is not None or rank is None else 2.0 * rank,
        "lora.target_modules": None
        if targets is None
        else [part.strip() for part in targets.split(",") if part.strip()],
        "lora.norms": norms,
        "steps": steps,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "validate_every": validate_every,
        "patience": patience,
        "augmentation": augmentation,
        "bias_field": bias_field,
        "proposal_steps": proposal_steps,
        "seed": seed,
    }
    settings = load_config(AdaptConfig, config, changes or [], flags)
    if show_config:
        _print_config(settings, "adapt")
        return
    if find_team().count > 1:
        raise RequestError(
            "An adapter is a matter of minutes and is trained by one process; start this "
            "command without accelerate launch."
        )
    _use_threads(threads)
    result = run_adapt(
        _require(studies, "--studies"),
        _model_folder(model),
        name,
        work,
        settings,
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
    model: BaseOption = None,
    adapters: AdaptersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
    reference: Annotated[
        str, typer.Argument(help="NAME for the version that is served, or NAME@VERSION.", show_default=False)
    ],
    model: BaseOption = None,
    adapters: AdaptersOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print adapter.json, run.json and the history as JSON.")
    ] = False,
) -> None:
    """Print the card of a version."""
    store = _store(model, adapters)
    card = store.find(reference)
    if as_json:
        typer.echo(
            json.dumps(
                {"adapter": card.to_dict(), "run": store.run(card), "history": store.history(card.name)}, indent=1
            )
        )
    else:
        typer.echo((store.folder(card) / "README.md").read_text(encoding="utf-8"))


def use_adapter(
    reference: Annotated[str, typer.Argument(help="NAME@VERSION.", show_default=False)],
    model: BaseOption = None,
    adapters: AdaptersOption = None,
) -> None:
    """Serve this version; a running server picks it up with the next request."""
    store = _store(model, adapters)
    if "@" not in reference:
        raise RequestError(
            f"Name the version too, for example {reference}@1; `progidiff adapters list` shows what there is."
        )
    card = store.find(reference)
    store.publish(card.name, card.version)
    typer.echo(f"{card.full_name} is served.")


def roll_back_adapter(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    model: BaseOption = None,
    adapters: AdaptersOption = None,
) -> None:
    """Serve what was served before; from the first version back to the model itself."""
    version = _store(model, adapters).rollback(name)
    typer.echo(
        f"{name}@{version} is served."
        if version is not None
        else f"No version of {name} is served: the model itself answers."
    )


def _model_folder(model: Path | None) -> Path:
    return model or EMBEDDED_MODEL


def _store(model: Path | None, adapters: Path | None) -> AdapterStore:
    from progidiff.model.adapters import AdapterStore

    return AdapterStore(adapters or _model_folder(model) / "adapters")


def _print_config(settings: Any, recipe: str) -> None:
    from progidiff.training.settings import render_config

    typer.echo(render_config(settings, recipe), nl=False)


def _require(value: T | None, option: str) -> T:
    """The value of an option that only --show-config can do without."""
    if value is None:
        raise RequestError(f"Option {option} is missing; `--help` says what it is for.")
    return value


def _is_first() -> bool:
    """Whether this process speaks for all that ``accelerate launch`` started."""
    from progidiff.training.processes import find_team

    return find_team().is_first


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
