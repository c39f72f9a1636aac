"""The command line around annotating: ``progidiff report`` while it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.active_learning.settings import DEFAULT_STRATEGY
from progidiff.cli.options import (
    AdaptersOption,
    ModelOption,
    find_model,
)
from progidiff.errors import RequestError

if TYPE_CHECKING:
    pass

StudiesOption = Annotated[
    Path, typer.Option(help="Folder of images, as `progidiff serve` serves it.", show_default=False)
]
StoreOption = Annotated[
    Path | None,
    typer.Option(help="State folder of the server (--conf store). Default: STUDIES/.progidiff.", show_default=False),
]


def register(app: Any) -> None:
    """Add the command to the command line `app` (a `typer.Typer`)."""
    app.command()(report)


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
