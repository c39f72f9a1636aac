"""The training half of the command line: ``progidiff pretrain | train | adapt`` and ``progidiff adapters``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli import versions
from progidiff.cli.options import (
    AdaptersOption,
    ConfigOption,
    DeviceOption,
    JsonOption,
    ModelOption,
    RunSeedOption,
    SetOption,
    ShowConfigOption,
    ThreadsOption,
    find_model,
    load_settings,
    make_steps_option,
    require,
    use_threads,
)
from progidiff.cli.progress import make_step_report
from progidiff.errors import RequestError

if TYPE_CHECKING:
    from progidiff.model.adapters import AdapterStore

StudiesOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of images with labels/final and labels.json (label id -> structure). Required.", show_default=False
    ),
]
NewModelOption = Annotated[
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
ContinueOption = Annotated[
    Path | None,
    typer.Option(
        "--continue-from",
        help="A model folder to start from instead of random weights; it stays as it is. The result needs a new "
        "--version.",
        show_default=False,
    ),
]
FrozenBackboneOption = Annotated[
    str | None,
    typer.Option(
        "--backbone",
        help="A Stable-Diffusion folder or hub id that stays frozen. Default: the model folder's own, trained jointly.",
        show_default=False,
    ),
]
FreezeOption = Annotated[
    bool | None,
    typer.Option(
        "--freeze-denoiser/--train-denoiser",
        help="Train the conditioning only, or the denoiser too.",
        show_default=False,
    ),
]
BackboneOption = Annotated[
    str | None,
    typer.Option("--backbone", help="Folder or hub id of the backbone. Default: the model's own.", show_default=False),
]

AlsoOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--also",
        help="A further labelled folder, whose structures the close-up learns to draw from clicks; may be repeated.",
        show_default=False,
    ),
]
ShapesOption = Annotated[
    Path | None,
    typer.Option(
        "--shapes",
        help="A folder of label volumes without images, with labels.json, from which the close-up learns what anatomy "
        "looks like.",
        show_default=False,
    ),
]
ReadersOption = Annotated[
    Path | None,
    typer.Option(
        "--readers",
        help="An npz file of crops with several readers' masks (images, masks_packed, key), from which the close-up "
        "learns how readers differ.",
        show_default=False,
    ),
]

# --- what `progidiff adapt` learns from, and its settings by their own names ---

AdapterNameOption = Annotated[
    str | None,
    typer.Option(
        "--name", help="Name of the adapter. Default: the modality of the images, mr or ct.", show_default=False
    ),
]
CaseOption = Annotated[
    list[str] | None,
    typer.Option("--case", help="Train on this case; may be repeated. Default: all.", show_default=False),
]
KeepBackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hold-out",
        help="Hold this case back to choose the number of steps and to decide about publishing; may be repeated. "
        "Default: 1, of 5 or more 2.",
        show_default=False,
    ),
]
ShotsOption = Annotated[
    int | None,
    typer.Option("--shots", help="Train on so many of the volumes that are not held back.", show_default=False),
]
SlicesOption = Annotated[
    int | None,
    typer.Option("--slices", help="Train on so many labelled slices, evenly spaced.", show_default=False),
]
StructuresOption = Annotated[
    list[str] | None,
    typer.Option(
        "--structures", help="Train only these; may be repeated. Default: all labelled ones.", show_default=False
    ),
]
RankOption = Annotated[
    int | None,
    typer.Option(
        "--rank", help="Of the updates: more can learn more, and overfit more. Default: 8.", show_default=False
    ),
]
AlphaOption = Annotated[
    float | None,
    typer.Option("--alpha", help="Scale of the updates is alpha / rank. Default: twice the rank.", show_default=False),
]
TargetsOption = Annotated[
    str | None,
    typer.Option(
        "--targets",
        help="What is adapted: some of encoder,query_head,injection,denoiser. Default: encoder,query_head.",
        show_default=False,
    ),
]
NormsOption = Annotated[
    bool | None,
    typer.Option("--norms/--no-norms", help="Train the encoder's group norms too. Default: yes.", show_default=False),
]
MaxStepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Largest number of steps; validation stops earlier. Default: 200, more for something new.",
        show_default=False,
    ),
]
RateOption = Annotated[
    float | None, typer.Option("--learning-rate", help="Peak learning rate. Default: 0.002.", show_default=False)
]
BatchOption = Annotated[
    int | None, typer.Option("--batch-size", help="Slices per step. Default: 12.", show_default=False)
]
ValidateOption = Annotated[
    int | None,
    typer.Option("--validate-every", help="Steps between validations. Default: 25.", show_default=False),
]
PatienceOption = Annotated[
    int | None,
    typer.Option(
        "--patience", help="Validations without a gain after which training stops. Default: 4.", show_default=False
    ),
]
AugmentationOption = Annotated[
    float | None,
    typer.Option(
        "--augmentation",
        help="Strength of augmentation, 0 to 3. Default: 1, and 2 for something new.",
        show_default=False,
    ),
]
ShadingOption = Annotated[
    float | None,
    typer.Option(
        "--bias-field",
        help="Strength of simulated shading, 0 to 2. Default: 0.3 for MR, 0 for CT.",
        show_default=False,
    ),
]
ProposalStepsOption = Annotated[
    int | None,
    typer.Option(
        "--proposal-steps",
        help="Then train the proposals for so many steps; needs a target injection or denoiser. Kept only if it pays. "
        "Default: 0.",
        show_default=False,
    ),
]
PublishOption = Annotated[bool, typer.Option("--publish/--no-publish", help="Serve the new version if it is better.")]

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
    model: NewModelOption = None,
    work: WorkOption = Path("runs/pretrain"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    hold_out: HoldOutOption = None,
    codec_steps: Annotated[int | None, make_steps_option("codec.steps")] = None,
    refine_steps: Annotated[int | None, make_steps_option("refine.steps")] = None,
    denoiser_steps: Annotated[int | None, make_steps_option("denoiser.steps")] = None,
    seed: RunSeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train an embedded backbone from scratch: the mask codec, then a text-to-image model of slices and their masks.

    Prints the codec's ceiling: encode-decode Dice of the held-out masks per structure.
    """
    from progidiff.training.recipe_settings import PretrainConfig

    flags = {"codec.steps": codec_steps, "refine.steps": refine_steps, "denoiser.steps": denoiser_steps, "seed": seed}
    settings = load_settings(PretrainConfig, "pretrain", config, changes, show_config, flags)
    from progidiff.training.recipes import run_pretrain

    use_threads(threads)
    place = require(studies, "--studies"), require(model, "--model")
    result = run_pretrain(*place, work, settings, held_out=hold_out or [], device=device, report=make_step_report())
    if _is_first():
        typer.echo(json.dumps(result, indent=1))


def train(
    studies: StudiesOption = None,
    model: NewModelOption = None,
    work: WorkOption = Path("runs/train"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    continue_from: ContinueOption = None,
    hold_out: HoldOutOption = None,
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default=False)] = None,
    version: Annotated[
        str | None, typer.Option(help="Version of the model; shown as name@version.", show_default=False)
    ] = None,
    evidence_steps: Annotated[int | None, make_steps_option("evidence.steps")] = None,
    proposal_steps: Annotated[int | None, make_steps_option("proposals.steps")] = None,
    modality: Annotated[str | None, typer.Option(help="CT or MR: what the images are.", show_default=False)] = None,
    backbone: FrozenBackboneOption = None,
    freeze_denoiser: FreezeOption = None,
    also: AlsoOption = None,
    shapes: ShapesOption = None,
    readers: ReadersOption = None,
    seed: RunSeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train the conditioning on labelled volumes: first encoder and query head, then the denoiser's proposals, then, if
    the setting stages names it, the close-up.

    Several GPUs or machines: accelerate launch --multi_gpu --num_processes N -m progidiff.cli train ... (N processes on
    CPUs too). Every process computes its own micro-batches: halve accumulate when you double the processes, to get the
    same run.
    """
    from progidiff.training.recipe_settings import TrainConfig

    flags = {
        "name": name,
        "version": version,
        "evidence.steps": evidence_steps,
        "proposals.steps": proposal_steps,
        "modality": modality,
        "freeze_denoiser": freeze_denoiser,
        "seed": seed,
    }
    settings = load_settings(TrainConfig, "train", config, changes, show_config, flags)
    from progidiff.training.recipes import run_train

    use_threads(threads)
    folder = require(model, "--model")
    card = run_train(
        require(studies, "--studies"),
        folder,
        work,
        settings,
        held_out=hold_out or [],
        backbone_source=backbone,
        continue_from=continue_from,
        device=device,
        also=also or [],
        shapes=shapes,
        readers=readers,
        report=make_step_report(),
    )
    if _is_first():
        typer.echo(f"{card.full_name} is in {folder}")


def adapt(
    studies: StudiesOption = None,
    name: AdapterNameOption = None,
    model: ModelOption = None,
    adapters: AdaptersOption = None,
    work: WorkOption = Path("runs/adapt"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    case: CaseOption = None,
    hold_out: KeepBackOption = None,
    shots: ShotsOption = None,
    slices: SlicesOption = None,
    structures: StructuresOption = None,
    rank: RankOption = None,
    alpha: AlphaOption = None,
    targets: TargetsOption = None,
    norms: NormsOption = None,
    steps: MaxStepsOption = None,
    learning_rate: RateOption = None,
    batch_size: BatchOption = None,
    validate_every: ValidateOption = None,
    patience: PatienceOption = None,
    augmentation: AugmentationOption = None,
    bias_field: ShadingOption = None,
    proposal_steps: ProposalStepsOption = None,
    publish: PublishOption = True,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    seed: RunSeedOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Adapt the model to another modality or site with a few labelled volumes; one is enough.

    Structures are matched by the names in labels.json. Validation on held-back volumes (of a single volume: held-back
    slices) stops the training. The new version is published, and served from the next request on, if it beats both what
    is served and the model itself on the held-back slices. Exit code 0: published. 3: kept but not published. 2: an
    error, nothing written. The same command continues a run that was stopped or killed.
    """
    from progidiff.training.adapt import run_adapt
    from progidiff.training.recipe_settings import AdaptConfig

    flags = {
        "lora.rank": rank,
        "lora.alpha": alpha if alpha is not None or rank is None else 2.0 * rank,
        "lora.target_modules": None if targets is None else [t.strip() for t in targets.split(",") if t.strip()],
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
    settings = load_settings(AdaptConfig, "adapt", config, changes, show_config, flags)
    _refuse_several_processes()
    use_threads(threads)
    place = require(studies, "--studies"), find_model(model), name, work
    result = run_adapt(
        *place,
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
        report=make_step_report(),
    )
    typer.echo(json.dumps(result.figures, indent=1))
    typer.echo(result.message, err=True)
    if not result.published:
        raise typer.Exit(KEPT_EXIT_CODE)


def list_adapters(model: ModelOption = None, adapters: AdaptersOption = None, as_json: JsonOption = False) -> None:
    """List the adapters: name, versions, and the one that is served (*)."""
    versions.print_versions(_store(model, adapters), as_json)


def show_adapter(
    reference: versions.ReferenceArgument,
    model: ModelOption = None,
    adapters: AdaptersOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print adapter.json, run.json and the history as JSON.")
    ] = False,
) -> None:
    """Print the card of a version."""
    versions.print_version(_store(model, adapters), reference, as_json)


def use_adapter(
    reference: versions.ExactReferenceArgument, model: ModelOption = None, adapters: AdaptersOption = None
) -> None:
    """Serve this version; a running server picks it up with the next request."""
    versions.serve_version(_store(model, adapters), reference)


def roll_back_adapter(
    name: Annotated[str, typer.Argument(help="Name of the adapter.", show_default=False)],
    model: ModelOption = None,
    adapters: AdaptersOption = None,
) -> None:
    """Serve what was served before; from the first version back to the model itself."""
    without = f"No version of {name} is served: the model itself answers."
    versions.roll_back(_store(model, adapters), name, without)


def _store(model: Path | None, adapters: Path | None) -> AdapterStore:
    from progidiff.model.adapters import AdapterStore

    return AdapterStore(adapters or find_model(model) / "adapters")


def _refuse_several_processes() -> None:
    from progidiff.training.processes import find_team

    if find_team().count > 1:
        raise RequestError(
            "An adapter is a matter of minutes and is trained by one process; start this "
            "command without accelerate launch."
        )


def _is_first() -> bool:
    """Whether this process speaks for all that ``accelerate launch`` started."""
    from progidiff.training.processes import find_team

    return find_team().is_first
