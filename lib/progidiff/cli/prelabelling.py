"""The command line before annotating: ``progidiff prelabel``."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli.options import (
    AdapterOption,
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
    from progidiff.evaluation.prelabel import ImageOutcome, Item, PrelabelSettings
    from progidiff.prelabelling.claims import Supply
    from progidiff.prelabelling.pipeline import Job

FAILED_EXIT_CODE = 1
"""`progidiff prelabel` ends with it if some images failed; 2 is an error that stopped it."""


def _optional(*names: str, text: str, **bounds: Any) -> Any:
    """An option that says itself what holds without it."""
    return typer.Option(*names, help=text, show_default=False, **bounds)


def register(app: Any) -> None:
    """Add the command to the command line `app` (a `typer.Typer`)."""
    app.command()(prelabel)


# long because it declares two dozen options
def prelabel(
    studies: Annotated[
        str | None,
        _optional(
            text="Folder of images, as `progidiff serve` serves it; with --out any folder or address (s3://...)."
        ),
    ] = None,
    manifest: Annotated[
        str | None,
        _optional(text="Table of images (CSV, TSV, JSON lines, Parquet; path or address): column image; id, modality."),
    ] = None,
    out: Annotated[
        str | None, _optional(text="Folder or address (s3://...) for labels and report. Default: into STUDIES.")
    ] = None,
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
    modality: Annotated[str | None, _optional(text="CT or MR for all images. Default: found out for each.")] = None,
    clean_up: CleanUpOption = DEFAULT_CLEAN_UP,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace labels of this tag that this command did not make.")
    ] = False,
    report_file: Annotated[
        str | None,
        _optional(
            "--report", text="Folder or address for the report as Parquet; or a .json file for the summary of a folder."
        ),
    ] = None,
    model: ModelOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
    store: Annotated[
        Path | None, _optional(text="State folder of the server (--conf store). Default: STUDIES/.progidiff.")
    ] = None,
    readers: Annotated[int, typer.Option(help="Threads that read ahead.", min=1, max=64)] = 2,
    writers: Annotated[int, typer.Option(help="Threads that write.", min=1, max=64)] = 1,
    prefetch: Annotated[
        int, typer.Option(help="Images that wait before the model, and as many after it.", min=0, max=64)
    ] = 2,
    retries: Annotated[int, typer.Option(help="Tries more, where a network fails or a device is busy.", min=0)] = 2,
    max_failures: Annotated[
        str | None, _optional(text="End the run when more images fail: a number, or a share like 5%. Default: never.")
    ] = None,
    claims: Annotated[
        Path | None,
        _optional(text="Folder that all processes see, where they claim images. Default: with the labels."),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option("--ray", help="Spread over a Ray cluster (pip install 'progidiff[ray]')."),
    ] = False,
    ray_address: Annotated[str | None, _optional(text="Of the cluster. Default: one on this machine.")] = None,
    workers: Annotated[
        int | None, _optional(text="With --ray: models at work. Default: as many as the cluster holds.", min=1)
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        _optional(text="With --ray: GPUs of each model; 0.5 puts two on one. Default: 1, if any."),
    ] = None,
) -> None:
    """Label many images ahead of time: they open with a first mask, and in a folder that is served their proposals are
    there.

    Give the same command again and it continues: what is done is not repeated, what failed is tried again, and what a
    changed image or another model version asks for is redone. Labels that it did not make stay. Given several times at
    once, or by `accelerate launch --num_processes N -m progidiff.cli prelabel ...`, the processes (and GPUs) share the
    images: whoever is free takes the next. Exit code 0: all labelled. 1: some failed, the report says why. 2: an error
    or too many failures ended it.
    """
    from progidiff.evaluation.prelabel import PrelabelSettings
    from progidiff.prelabelling.pipeline import Depths, Job, parse_budget, run_stages

    settings = PrelabelSettings(
        prompt, out_tag, num_proposals, steps, seed, adapter, modality, overwrite, check_clean_up(clean_up)
    )
    settings.check()
    _check_ray(ray, {"--ray-address": ray_address, "--workers": workers, "--gpus-per-worker": gpus_per_worker})
    out = None if out is None else _settle(out)
    items = _find_items(studies, manifest, out)
    budget = parse_budget(max_failures, len(items))
    ranks = _Ranks.read()
    folder = None if out is not None else Path(studies or "").resolve()
    job = Job(find_model(model), settings, backbone, device or ranks.device, folder, store, out, retries)
    places = _Places.find(job, report_file, claims, ranks)
    job.make()  # What cannot work for any image is refused before anything begins.

    def run(supply: Supply) -> Iterator[ImageOutcome]:
        if not ray:
            return run_stages(job.make(), supply, Depths(readers, writers, prefetch))
        from progidiff.prelabelling import cluster

        cluster.connect(ray_address)
        return cluster.run_on_ray(job, supply, workers, gpus_per_worker)

    _run(items, run, job, places, ranks, budget)


def _run(
    items: list[Item],
    run: Callable[[Supply], Iterator[ImageOutcome]],
    job: Job,
    places: _Places,
    ranks: _Ranks,
    budget: int | None,
) -> None:
    """Follow a run to its end, and say what came of it."""
    from progidiff.evaluation import prelabel as work
    from progidiff.prelabelling.claims import Claims, Supply
    from progidiff.prelabelling.pipeline import record
    from progidiff.prelabelling.report import ParquetReport

    outcomes: list[ImageOutcome] = []

    def show(outcome: ImageOutcome) -> None:
        outcomes.append(outcome)
        typer.echo(f"{len(outcomes)}/{len(items)} {outcome.image}: {outcome.state} {outcome.reason}".rstrip(), err=True)

    started = time.monotonic()
    typer.echo(f"{len(items)} images; the report is in {places.report}", err=True)
    with Claims(places.claims) as claims:
        report = ParquetReport(
            places.report, places.about, lambda done: claims.finish(outcome.image for outcome in done)
        )
        supply = Supply(items, claims, ranks.index, ranks.count, report.flush)
        try:
            record(run(supply), report, supply, claims, budget, show)
        finally:
            report.flush()
    result = work.build_report(outcomes, job.settings, places.about["model"], time.monotonic() - started)
    typer.echo(json.dumps(result["counts"]))
    if places.summary is not None:
        written = work.write_report(result, places.summary, ranks.index, ranks.count)
        typer.echo(f"The summary is in {written}", err=True)
    if result["counts"]["failed"]:
        raise typer.Exit(FAILED_EXIT_CODE)


def _check_ray(ray: bool, given: dict[str, object]) -> None:
    """Refuse what is only for a cluster where none is asked for: one machine would do the work of all."""
    named = [name for name, value in given.items() if value is not None]
    if named and not ray:
        raise RequestError(f"{', '.join(named)} counts only on a Ray cluster. Add --ray, or leave it out.")


def _find_items(studies: str | None, manifest: str | None, out: str | None) -> list[Item]:
    """The images that the options name."""
    from progidiff.evaluation.prelabel import Item, list_images
    from progidiff.images.formats import strip_suffix
    from progidiff.prelabelling import sources
    from progidiff.storage.addresses import is_remote

    if (studies is None) == (manifest is None):
        raise RequestError("Name the images by one of --studies FOLDER and --manifest TABLE.")
    if out is None:
        if studies is None or is_remote(studies):
            raise RequestError("Name where labels go with --out: a folder, or an address such as s3://bucket/labels.")
        return [Item(strip_suffix(path), str(path.resolve())) for path in list_images(Path(studies))]
    if manifest is None:
        return sources.find_images(str(studies), out)
    items = sources.read_manifest(_settle(manifest))
    sources.check_there(items)
    return items


def _settle(address: str) -> str:
    """An address that means the same in every process, wherever it stands."""
    from progidiff.storage.addresses import check_address, is_remote, to_path

    return address if is_remote(check_address(address)) else str(to_path(address))


@dataclass(frozen=True)
class _Ranks:
    """What accelerate and torchrun tell their processes; they need to know nothing else of each other."""

    index: int
    count: int
    local: int
    local_count: int

    @classmethod
    def read(cls) -> _Ranks:
        count = max(1, _read_number("WORLD_SIZE", 1))
        return cls(_read_number("RANK"), count, _read_number("LOCAL_RANK"), _read_number("LOCAL_WORLD_SIZE", count))

    @property
    def device(self) -> str | None:
        return f"cuda:{self.local}" if self.count > 1 and _has_cuda() else None


@dataclass(frozen=True)
class _Places:
    """Where things go.

    Attributes:
        report: Address of the report's folder.
        summary: JSON file; None if there is none.
        claims: Folder.
        about: What the report says of the run.
    """

    report: str
    summary: Path | None
    claims: Path
    about: dict[str, Any]

    @classmethod
    def find(cls, job: Job, report: str | None, claims: Path | None, ranks: _Ranks) -> _Places:
        from progidiff.proposals.engine import Engine
        from progidiff.storage.addresses import is_remote, join, to_path
        from progidiff.storage.state import default_store

        about = _describe_run(job.settings, Engine(job.model).model_version)
        name = f"{job.settings.tag}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]}"
        summary = None
        if report is not None and report.endswith(".json") and not is_remote(report):
            summary, report = Path(report), None
        if job.out is None:
            root = job.store or default_store(str(job.studies))
            summary = summary or root / "prelabel.json"
            place, claimed = str(root / "prelabel-reports" / name), root / "prelabel-claims" / name
        else:
            place = join(job.out, "reports", name)
            state = Path.home() / ".cache" / "progidiff" / hashlib.sha256(job.out.encode()).hexdigest()[:16]
            here = state if is_remote(job.out) else to_path(job.out) / ".progidiff"
            claimed = here / "prelabel-claims" / name
            if is_remote(job.out) and claims is None and ranks.count > ranks.local_count:
                raise RequestError(
                    "Processes on several machines share their images through a folder that all of them see. Name one "
                    "with --claims."
                )
        return cls(report or place, summary, claims or claimed, about)


def _describe_run(settings: PrelabelSettings, model: str) -> dict[str, Any]:
    """What two runs that share a report have in common."""
    return {"model": model, **{name: value for name, value in asdict(settings).items() if name != "overwrite"}}


def _read_number(name: str, default: int = 0) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
