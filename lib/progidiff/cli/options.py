"""Options that several commands have, each declared once, and what commands do with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from progidiff.errors import RequestError
from progidiff.storage import app_folder

T = TypeVar("T")

# --- the model and where it runs ---

ModelOption = Annotated[
    Path | None,
    typer.Option("--model", help="Folder of the model. Default: the one that comes with the app.", show_default=False),
]
BackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Another Stable-Diffusion folder or hub id, as the model was trained with. Default: the model's own.",
        show_default=False,
    ),
]
AdaptersOption = Annotated[
    Path | None,
    typer.Option("--adapters", help="Folder of adapters. Default: adapters/ in the model folder.", show_default=False),
]
DeviceOption = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:1. Default: CUDA if there is one.", show_default=False)
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores.", show_default=False)]

# --- proposals ---

ProposalsOption = Annotated[
    int,
    typer.Option(
        "--num-proposals",
        "-k",
        help="K, how many masks are drawn, each from its own noise. 4 to 8 are useful; time grows with K.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(
        "--steps",
        help="Denoising steps, 1 to 50. More is slower and rarely better. Default: the model's.",
        show_default=False,
    ),
]
NoiseSeedOption = Annotated[int, typer.Option("--seed", help="Of the noise. The same seed gives the same proposals.")]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        help="How strongly the text is enforced; 1 is off and twice as fast. Default: the model's.", show_default=False
    ),
]
AdapterOption = Annotated[
    str | None,
    typer.Option(
        help="Name of an adapter, name@version, or none. Default: by the image's modality.", show_default=False
    ),
]
ModalityOption = Annotated[
    str | None,
    typer.Option(
        help="CT or MR. Default: from DICOM or a sidecar <name>.json, else guessed from the intensities.",
        show_default=False,
    ),
]
CleanUpOption = Annotated[
    str,
    typer.Option(
        help=(
            "Islands to drop from every proposal: off, small (parts under a tenth of the "
            "largest, over 10 mm away) or largest (all but that)."
        )
    ),
]

# --- trainings ---

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config", help="YAML file with settings; those it leaves out keep their defaults.", show_default=False
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A setting, name=value, for example seed=1; may be repeated. --show-config prints all names.",
        show_default=False,
    ),
]
ShowConfigOption = Annotated[
    bool, typer.Option("--show-config", help="Print all settings as a commented YAML file, train nothing.")
]
RunSeedOption = Annotated[
    int | None,
    typer.Option("--seed", help="Run seed; the seed of step i is a function of it and i.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def make_steps_option(setting: str) -> Any:
    """An option that is short for a setting which counts steps."""
    return typer.Option(help=f"Same as --set {setting}=N.", show_default=False)


def load_settings(
    kind: type[T],
    recipe: str,
    file: Path | None,
    changes: Sequence[str] | None,
    show: bool,
    flags: Mapping[str, Any],
) -> T:
    """The settings of a training from its options, see `training.settings.load_config`.

    Args:
        recipe: Name of its commented file.
        show: Print that file with these settings and end the command.
    """
    from progidiff.training.settings import load_config, render_config

    settings = load_config(kind, file, changes or [], flags)
    if show:
        typer.echo(render_config(settings, recipe), nl=False)
        raise typer.Exit
    return settings


def require(value: T | None, option: str) -> T:
    """The value of an option that only --show-config can do without."""
    if value is None:
        raise RequestError(f"Option {option} is missing; `--help` says what it is for.")
    return value


def use_threads(threads: int | None) -> None:
    """Compute with so many threads; None leaves it as it is."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def find_model(model: Path | None) -> Path:
    """The model folder that --model names, else the one that comes with the app."""
    return model or app_folder.find_model()


def split_commas(values: list[str] | None) -> list[str]:
    """The values of an option that may be repeated and may hold several, separated by commas."""
    return [part.strip() for value in values or [] for part in value.split(",") if part.strip()]


def make_slug(name: str) -> str:
    """A name as a part of a file name."""
    return "".join(character if character.isalnum() else "_" for character in name)[:60]
