"""The command line around annotating: ``progidiff prelabel`` before it, ``progidiff report`` while it goes on."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.active_learning.settings import DEFAULT_STRATEGY
from progidiff.cli.options import (
    AdapterOption,
    AdaptersOption,
    BackboneOption,
    CleanUpOption,
    DeviceOption,
    ModelOption,
    NoiseSeedOption,
    StepsOption,
    find_model,
)
from progidiff.errors import RequestError
from progidiff.proposals.islands import check_clean_up
from progidiff.proposals.request import DEFAULT_CLEAN_UP

if TYPE_CHECKING:
    from progidiff.evaluation.prelabel import ImageOutcome

StudiesOption = Annotated[
    Path, typer.Option(help="Folder of images, as `progidiff serve` serves it.", show_default=False)
]
StoreOption = Annotated[
    Path | None,
    typer.Option(help="State folder of the server (--conf store). Default: STUDIES/.progidiff.", show_default=False),
]

ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        help="JSON: what became of every image. Default: prelabel.json in the state folder.",
        show_default=False,
    ),
]
RayOption = Annotated[
    bool,
    typer.Option(
        "--ray", help="Spread over a Ray cluster (pip install 'progidiff[ray]'); every machine sees the folders."
    ),
]

FAILED_EXIT_CODE = 1
"""`progidiff prelabel` ends with it if some images failed; 2 is an error that stopped it."""


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    app.command()(prelabel)
    app.command()(report)


def prelabel(
    studies: StudiesOption,
    prompt: Annotated[str, typer.Option(help="What to segment on every image: 'liver and spleen', 'all'.")] = "all",
    out_tag: Annotated[
        str, typer.Option(help="Tag of the labels; viewers open `original` by themselves.")
    ] = "original",
    num_proposals: Annotated[
        int, typer.Option("--num-proposals", "-k", help="K; the server's default, so that its first answers are there.")
    ] = 4,
    steps: StepsOption = None,
    seed: NoiseSeedOption = 0,
    adapter: AdapterOption = None,
    modality: Annotated[
        str | None, typer.Option(help="CT or MR for all images. Default: found out for each.", show_default=False)
    ] = None,
    clean_up: CleanUpOption = DEFAULT_CLEAN_UP,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace labels of this tag that this command did not make.")
    ] = False,
    report_file: ReportOption = None,
    model: ModelOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    store: StoreOption = None,
    ray: RayOption = False,
    ray_address: Annotated[
        str | None, typer.Option(help="Of the cluster. Default: one on this machine.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(help="With --ray: models at work at the same time.", min=1)] = 2,
) -> None:
    """Label a whole folder ahead of time: images open with a first mask, and their proposals are there.

    The same command continues where it was stopped and redoes what a changed image or another model version asks for.
    Labels that it did not make stay. Start it with `accelerate launch --num_processes N -m progidiff.cli prelabel ...`
    to share the images among processes (and GPUs); each writes its own report. Exit code 0: all labelled. 1: some
    failed, the report says why. 2: an error stopped it.
    """
    from progidiff.evaluation import prelabel as work
    from progidiff.proposals.engine import Engine
    from progidiff.storage.state import default_store

    settings = work.PrelabelSettings(
        prompt, out_tag, num_proposals, steps, seed, adapter, modality, overwrite, check_clean_up(clean_up)
    )
    settings.check()
    images = work.list_images(studies)
    folder = find_model(model)
    # What accelerate and torchrun tell their processes; they need to know nothing else of each other.
    index, count = _read_rank("RANK"), max(1, _read_rank("WORLD_SIZE", 1))
    chosen = device or (f"cuda:{_read_rank('LOCAL_RANK')}" if count > 1 and _has_cuda() else None)

    def make() -> work.Prelabeller:
        return work.Prelabeller(Engine(folder, backbone=backbone, device=chosen), studies.resolve(), settings, store)

    version = Engine(folder).model_version
    started = time.monotonic()
    if ray:
        _start_ray(ray_address, workers)
        outcomes = work.run_on_ray([path.resolve() for path in images], make, workers, 1.0 if _has_cuda() else 0.0)
        total = len(images)
        index, count = 0, 1
    else:
        outcomes = work.run_here(images, make, index, count)
        total = len(work.pick_share(images, index, count))
    done = _follow(outcomes, total)
    result = work.build_report(done, settings, version, time.monotonic() - started)
    target = report_file or (store or default_store(str(studies))) / "prelabel.json"
    written = work.write_report(result, target, index, count)
    typer.echo(json.dumps(result["counts"]))
    typer.echo(f"The report is in {written}", err=True)
    if result["counts"]["failed"]:
        raise typer.Exit(FAILED_EXIT_CODE)


def _follow(outcomes: Iterable[ImageOutcome], total: int) -> list[ImageOutcome]:
    """Say of each image what became of it."""
    done = []
    for outcome in outcomes:
        done.append(outcome)
        typer.echo(f"{len(done)}/{total} {outcome.image}: {outcome.state} {outcome.reason}".rstrip(), err=True)
    return done


def report(
    studies: StudiesOption,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, .html or .json. Default: JSON to standard output.", show_default=False),
    ] = None,
    model: ModelOption = None,
    adapters: AdaptersOption = None,
    store: StoreOption = None,
    limit: Annotated[int, typer.Option(help="Images of the queue.", min=1, max=500)] = 20,
    textdiff: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the models for pictures. Default: textdiff/ in the model folder.", show_default=False
        ),
    ] = None,
    next_strategy: Annotated[str, typer.Option(help="As the server's --conf next_strategy.")] = DEFAULT_STRATEGY,
    acquisition: Annotated[str, typer.Option(help="As the server's --conf acquisition, for example noise=off.")] = "",
) -> None:
    """Say what annotating has brought: Dice against annotated slices, unchanged masks, minutes per slice, what is next,
    when to stop.
    """
    from progidiff.active_learning import report as work
    from progidiff.active_learning.scores import SliceScoreStore
    from progidiff.active_learning.settings import AcquisitionConfig
    from progidiff.evaluation.evaluate import save_report
    from progidiff.labels.history import AnnotationStore
    from progidiff.model.adapters import AdapterStore
    from progidiff.storage.state import default_store

    if out is not None and out.suffix not in (".html", ".json"):
        raise RequestError(f"'{out}' must end in .html or .json.")
    images = _list_pool(studies)
    root = store or default_store(str(studies))
    annotations = AnnotationStore(root / "annotations", studies / "labels" / "final")
    folder = find_model(model)
    trained, pictured = AdapterStore(adapters or folder / "adapters"), _open_textdiff(textdiff or folder / "textdiff")
    rounds = work.count_rounds(work.list_versions(trained, pictured, []), {*images, *annotations.annotated_images()})
    queue = work.list_queue(
        SliceScoreStore(root / "scores"),
        annotations,
        images,
        limit,
        next_strategy,
        AcquisitionConfig.from_text(acquisition),
        work.find_served(folder, trained, pictured),
        rounds,
    )
    result = work.build_report(annotations, trained, queue, textdiff=pictured)
    if out is None:
        typer.echo(json.dumps(result.model_dump(), indent=1))
    elif out.suffix == ".json":
        save_report(result.model_dump(), out)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(work.format_html(result), encoding="utf-8")


def _list_pool(studies: Path) -> list[str]:
    """The ids of all images of a local datastore, volumes and pictures."""
    from progidiff.evaluation.prelabel import list_images
    from progidiff.images.formats import is_picture, strip_suffix

    pictures = [path for path in studies.iterdir() if is_picture(path) and path.is_file()] if studies.is_dir() else []
    try:
        volumes = list_images(studies)
    except RequestError:
        if not pictures:
            raise
        volumes = []
    return sorted({strip_suffix(path) for path in [*volumes, *pictures] if not path.name.startswith(".")})


def _open_textdiff(folder: Path) -> Any:
    """The versions of models for pictures; None without a folder of them, and nothing is imported then."""
    if not folder.is_dir():
        return None
    from progidiff.textdiff.versions import TextDiffStore

    return TextDiffStore(folder)


def _start_ray(address: str | None, workers: int) -> None:
    try:
        import ray
    except ImportError as err:
        raise RequestError(
            "Ray is not installed. `pip install 'progidiff[ray]'` brings it, or leave --ray out."
        ) from err
    if not ray.is_initialized():
        ray.init(
            address=address, num_cpus=None if address else max(workers, 1), include_dashboard=False, log_to_driver=False
        )


def _read_rank(name: str, default: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
