"""The command line: ``progidiff serve | predict | evaluate | prompts`` and the training commands.

A `ProGiDiffError` becomes one line on standard error and exit code 2; a traceback is a bug. Progress and tables go to
standard error, so that standard output stays free for ``--json``.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

import progidiff
from progidiff.cli import (
    annotating,
    audit,
    exchanging,
    operations,
    prelabelling,
    serving,
    structures,
    textdiff,
    training,
    users,
)
from progidiff.cli.options import (
    AdapterOption,
    BackboneOption,
    CleanUpOption,
    DeviceOption,
    GuidanceOption,
    JsonOption,
    ModalityOption,
    ModelOption,
    NoiseSeedOption,
    ProposalsOption,
    StepsOption,
    find_model,
    make_slug,
    split_commas,
)
from progidiff.cli.progress import console, show_cases, show_count
from progidiff.errors import ProGiDiffError, RequestError
from progidiff.prompts.parser import Query, compute_label_ids, describe, parse_prompt, parse_prompts
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals.request import DEFAULT_CLEAN_UP, NONE, ProposalRequest

if TYPE_CHECKING:
    from progidiff.images.volume import Volume
    from progidiff.proposals.engine import Engine
    from progidiff.proposals.volume_proposals import VolumeProposals


class _Commands(TyperGroup):
    """Turns errors on purpose into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ProGiDiffError as err:
            if logging.getLogger().isEnabledFor(logging.DEBUG):
                logging.getLogger(__name__).debug("Where it happened", exc_info=True)
            typer.echo(f"Error: {' '.join(str(err).split())}", err=True)
            ctx.exit(2)


class _ManyValues(TyperCommand):
    """Lets ``--cases`` and ``--structures`` take several values: ``--cases a b``, ``--cases a --cases b`` and ``--cases
    a,b``.
    """

    several = ("--cases", "--structures")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        count = 0
        for word in args:
            if word.startswith("-"):
                option = word if word in self.several else ""
                count = 0
            elif option:
                count += 1
                if count > 1:
                    spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Type a prompt, get K proposals of a mask, keep one. ProGiDiff Label segments CT and MR volumes by text.",
)

# --- what `progidiff evaluate` measures ---

LabelledStudiesOption = Annotated[
    Path,
    typer.Option(
        "--studies",
        help="Folder of images with labels/final and labels.json (label id -> structure).",
        show_default=False,
    ),
]
StructuresOption = Annotated[
    list[str] | None,
    typer.Option(
        "--structures",
        help="Only these, by name or synonym; several values may follow. Default: all labelled ones.",
        show_default=False,
    ),
]
CasesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--cases",
        help="Only these, with or without .nii.gz; several values may follow. Default: all with a label.",
        show_default=False,
    ),
]
DistanceOption = Annotated[
    bool,
    typer.Option(
        "--hd95/--no-hd95", help="Compute the 95th percentile Hausdorff distance in mm; slow on large volumes."
    ),
]
LargestOption = Annotated[
    bool,
    typer.Option(
        "--largest-component",
        help="Keep only the largest connected part of every mask before scoring; the report says so.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"progidiff {progidiff.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what happens, with tracebacks of errors.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("matplotlib", "PIL", "urllib3", "filelock", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def load_engine(model: Path | None, backbone: str | None, device: str | None) -> Engine:
    """The engine that the options name; weights are loaded on first use."""
    from transformers.utils import logging as transformers_logging

    from progidiff.proposals.engine import Engine

    transformers_logging.disable_progress_bar()  # this command draws its own
    return Engine(model_dir=find_model(model), backbone=backbone, device=device)


app.command(cls=serving.HostWords)(serving.serve)


@app.command()
def predict(
    image: Annotated[
        Path,
        typer.Argument(help="NIfTI, NRRD or MetaImage file, or a folder with one DICOM series.", show_default=False),
    ],
    prompt: Annotated[
        list[str],
        typer.Option(
            help="What to segment: 'left kidney', 'liver and spleen', 'all'. May be repeated.", show_default=False
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; made if absent.", show_default=False)],
    num_proposals: ProposalsOption = 4,
    seed: NoiseSeedOption = 0,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    adapter: AdapterOption = None,
    modality: ModalityOption = None,
    allow_free_text: Annotated[
        bool, typer.Option("--allow-free-text", help="Send a prompt that names nothing known through the text encoder.")
    ] = False,
    clean_up: CleanUpOption = DEFAULT_CLEAN_UP,
    model: ModelOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
) -> None:
    """Segment one volume by prompt.

    Writes mask.nii.gz (the consensus), proposal_1..K.nii.gz (label maps; result.json names the ids, 0 is background),
    agreement.nii.gz (share of proposals per voxel, 0 to 1; of several structures the highest, and one file each),
    overlay.png and result.json (volumes in ml, disagreement per axial slice, settings, versions). Everything is on
    exactly the grid of the image.
    """
    from progidiff.images.reading import load_volume
    from progidiff.proposals.drawing import draw_overlay
    from progidiff.proposals.work import Work

    if out.exists() and not out.is_dir():
        raise RequestError(f"'{out}' is a file. Name a folder with --out.")
    engine = load_engine(model, backbone, device)
    known = engine.find_known()
    queries = parse_prompts(prompt, known, allow_free_text, engine.model_version)
    volume = load_volume(image, modality, detached=True)
    chosen = engine.pick_adapter(adapter, volume.modality, [query.name for query in queries])
    warnings = engine.find_warnings(volume, queries, chosen)
    for warning in warnings:
        console.print(warning, highlight=False, style="yellow")
    with show_count(volume.name, "slices") as show:
        request = ProposalRequest(
            queries=tuple(queries),
            num_proposals=num_proposals,
            num_inference_steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            adapter=chosen.full_name if chosen else NONE,
            clean_up=clean_up,
        )
        watched = Work(on_progress=show)
        proposals = engine.propose(request, volume, watched)
    ids = compute_label_ids(queries)
    out.mkdir(parents=True, exist_ok=True)
    earlier = _read_earlier_files(out)
    consensus = proposals.label_map(volume.grid, "consensus", ids)
    files = _save_masks(volume, proposals, queries, ids, consensus, out)
    title = (
        f"{volume.name}: consensus of {proposals.num_proposals} proposals, seed {seed}, "
        f"{proposals.adapter or proposals.model_version}"
    )
    files.append(
        draw_overlay(volume, consensus, {value: name for name, value in ids.items()}, out / "overlay.png", title=title)
    )
    summary = {**proposals.summary(), "warnings": warnings}
    names = [path.name for path in files]
    result = _describe_prediction(volume, image, prompt, queries, ids, summary, consensus, names)
    _save_json(result, out / "result.json")
    for name in set(earlier) - set(names) - {"result.json"}:
        (out / name).unlink(missing_ok=True)
    _print_prediction(result)
    typer.echo(str(out / "result.json"))


def _save_masks(
    volume: Volume,
    proposals: VolumeProposals,
    queries: tuple[Query, ...],
    ids: dict[str, int],
    consensus: Any,
    out: Path,
) -> list[Path]:
    """Write the consensus, the agreement (of several structures each one's too) and the proposals."""
    from progidiff.images.writing import save_mask

    grid = volume.grid
    masks = {"mask": consensus, "agreement": proposals.agreement(grid)}
    if len(queries) > 1:
        masks |= {f"agreement_{make_slug(query.name)}": proposals.agreement(grid, query.name) for query in queries}
    masks |= {f"proposal_{k}": proposals.label_map(grid, k, ids) for k in range(1, proposals.num_proposals + 1)}
    return [save_mask(mask, grid, out / f"{name}.nii.gz") for name, mask in masks.items()]


def _print_prediction(result: dict[str, Any]) -> None:
    table = Table("structure", "label", "consensus ml", "proposals ml", "disagreement", box=None, header_style="bold")
    for name, entry in result["structures"].items():
        spread = f"{min(entry['proposals_ml']):.1f} to {max(entry['proposals_ml']):.1f}"
        table.add_row(
            name,
            str(entry["label"]),
            f"{entry['consensus_ml']:.1f}" if entry["present"] else "absent",
            spread,
            f"{entry['mean_disagreement']:.2f}",
        )
    console.print(table)


@app.command(cls=_ManyValues)
def evaluate(
    studies: LabelledStudiesOption,
    out: Annotated[Path, typer.Option(help="JSON file to write.", show_default=False)],
    structures: StructuresOption = None,
    cases: CasesOption = None,
    num_proposals: ProposalsOption = 4,
    steps: StepsOption = None,
    seed: NoiseSeedOption = 0,
    guidance_scale: GuidanceOption = None,
    adapter: AdapterOption = None,
    modality: ModalityOption = None,
    hd95: DistanceOption = True,
    clean_up: CleanUpOption = DEFAULT_CLEAN_UP,
    largest_component: LargestOption = False,
    model: ModelOption = None,
    backbone: BackboneOption = None,
    device: DeviceOption = None,
) -> None:
    """Measure a model on labelled volumes: Dice (0 to 1) and HD95 (mm).

    "single" is the mean over the K proposals of each one's score, "consensus" the score of what at least half of them
    draw, "best" the score of the proposal with the highest Dice per case and structure: what an expert who picks gets
    at most. A structure that is absent from a case is left out of the means and counts for the false positives; an
    empty mask of a present structure has Dice 0, no HD95, and counts as missed.
    """
    from progidiff.evaluation import evaluate

    if out.is_dir():
        raise RequestError(f"'{out}' is a folder. Name a file with --out, for example {out / 'evaluate.json'}.")
    engine = load_engine(model, backbone, device)
    with show_cases() as report:
        result = evaluate.evaluate(
            engine,
            studies,
            structures=structures or [],
            cases=split_commas(cases) or None,
            num_proposals=num_proposals,
            num_inference_steps=steps,
            seed=seed,
            guidance_scale=guidance_scale,
            adapter=adapter,
            modality=modality,
            hd95=hd95,
            clean_up=clean_up,
            largest_component=largest_component,
            progress=report,
        )
    evaluate.save_report(result, out)
    _print_evaluation(result)
    typer.echo(str(out))
    if result["num_cases"] < len(result["cases"]):
        raise RequestError(
            f"{len(result['cases']) - result['num_cases']} cases could not be read and "
            f"are not in the means; see `notes` in '{out}'."
        )


@app.command()
def prompts(
    text: Annotated[
        str | None, typer.Argument(help="A prompt to try: prints the structures that it means.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
    model: ModelOption = None,
) -> None:
    """List the structures that the model knows and the words for them, or say what a prompt means."""
    engine = load_engine(model, None, None)
    try:
        known, source = engine.find_known(), engine.model_version
    except ProGiDiffError as err:
        known, source = STRUCTURES, "the vocabulary; no model is installed"
        console.print(f"[yellow]{' '.join(str(err).split())}[/yellow]", highlight=False)
    if text is not None:
        names = [query.name for query in parse_prompt(text, known, model=source)]
        typer.echo(json.dumps(names) if as_json else "\n".join(names))
        return
    entries = describe(known)
    if as_json:
        typer.echo(json.dumps(entries, indent=1))
        return
    for entry in entries:
        typer.echo(entry["structure"])
        if entry["synonyms"]:
            typer.echo(f"    {', '.join(entry['synonyms'])}")
    typer.echo(
        f"\n{len(known)} structures of {source}. 'all' means all of them, 'kidneys' both; "
        "'all except the liver' leaves one out."
    )


@app.command("export-dicom")
def export_dicom(
    image: Annotated[Path, typer.Argument(help="NIfTI, NRRD or MetaImage file.", show_default=False)],
    folder: Annotated[
        Path, typer.Argument(help="New folder for the DICOM files, one per axial slice.", show_default=False)
    ],
    modality: ModalityOption = None,
) -> None:
    """Write an image as a DICOM series, on the same grid and with the UIDs that the server gives it."""
    from progidiff.dicomweb.catalogue import describe_file
    from progidiff.dicomweb.export import export_series
    from progidiff.dicomweb.frames import Series
    from progidiff.images.formats import strip_suffix
    from progidiff.images.reading import load_volume

    volume = load_volume(image, modality, detached=True)
    entry = describe_file(strip_suffix(image), image, {"modality": volume.modality})
    files = export_series(Series.of(entry.identity, volume), folder)
    typer.echo(f"{len(files)} slices of series {entry.identity.series_uid} in {folder}")


@app.command("export-bundle")
def export_bundle(
    folder: Annotated[Path, typer.Argument(help="New folder for the bundle.", show_default=False)],
    model: ModelOption = None,
) -> None:
    """Write the model as a MONAI bundle, for `python -m monai.bundle run`."""
    from progidiff.exchange import monai_bundle

    typer.echo(str(monai_bundle.export_bundle(folder, find_model(model))))


def _describe_prediction(
    volume: Any,
    image: Path,
    texts: list[str],
    queries: tuple[Query, ...],
    ids: dict[str, int],
    summary: dict[str, Any],
    consensus: Any,
    files: list[str],
) -> dict[str, Any]:
    from progidiff.storage.provenance import describe_versions

    for name, entry in summary["structures"].items():
        entry["label"] = ids[name]
        entry["mask_ml"] = round(int((consensus == ids[name]).sum()) * volume.voxel_ml, 3)
    free = [query.name for query in queries if not query.known]
    return {
        "image": str(image),
        "prompts": texts,
        "labels": ids,
        **summary,
        "free_text": free,
        "shape": list(volume.array.shape),
        "spacing_mm": [round(edge, 6) for edge in volume.spacing],
        "affine": volume.affine.tolist(),
        "files": files,
        "units": {
            "mask_ml": "ml of the structure in mask.nii.gz, after overlaps were resolved",
            "consensus_ml": "ml of the structure's consensus, measured on the working grid",
            "proposals_ml": "ml of proposals 1..K, measured on the working grid",
            "disagreement_per_slice": "1 - mean pairwise Dice, 0 to 1, per axial slice from inferior to superior",
            "nearby_disagreement_per_slice": (
                "disagreement_per_slice, mean of the slice and its two neighbours; the better guide to errors"
            ),
            "agreement": "share of proposals that draw a voxel; not a calibrated probability",
        },
        "command": shlex.join(sys.argv),
        "versions": describe_versions(),
    }


def _print_evaluation(result: dict[str, Any]) -> None:
    summary = result["summary"]
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("structure", no_wrap=True)
    for header in (
        "n",
        *(f"{kind}\n{metric}" for kind in ("single", "consensus", "best") for metric in ("Dice", "HD95")),
    ):
        table.add_column(header, justify="right", no_wrap=True)

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    for name in summary["consensus"]["dice"]:
        cells = [
            cell(summary[kind][metric][name], digits)
            for kind in ("single", "consensus", "best")
            for metric, digits in (("dice", 3), ("hd95", 1))
        ]
        table.add_row(name, str(summary["cases_with"][name]), *cells)
    for group, names in summary["mean_over"].items():
        cells = [
            cell(summary["mean"][kind][metric][group], digits)
            for kind in ("single", "consensus", "best")
            for metric, digits in (("dice", 3), ("hd95", 1))
        ]
        table.add_row(f"mean of {group.replace('_', ' ')} ({len(names)})", "", *cells, style="bold")
    console.print(table)
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, style="yellow")


def _read_earlier_files(out: Path) -> list[str]:
    """What an earlier run wrote into the folder, so that none of it stays beside the new results."""
    try:
        names = json.loads((out / "result.json").read_text(encoding="utf-8"))["files"]
        return [
            name
            for name in names
            if isinstance(name, str) and Path(name).name == name and name.endswith((".nii.gz", ".png"))
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _save_json(values: dict[str, Any], path: Path) -> None:
    from progidiff.evaluation.evaluate import save_report

    save_report(values, path)


training.register(app)
prelabelling.register(app)
annotating.register(app)
users.register(app)
structures.register(app)
audit.register(app)
exchanging.register(app)
operations.register(app)
textdiff.register(app)
