"""TextDiff on the command line: ``progidiff textdiff pretrain | convert | train | teach | predict | evaluate |
versions``.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from progidiff.cli import versions
from progidiff.cli.options import (
    ConfigOption,
    DeviceOption,
    JsonOption,
    RunSeedOption,
    SetOption,
    ShowConfigOption,
    ThreadsOption,
    load_settings,
    make_slug,
    make_steps_option,
    require,
    split_commas,
    use_threads,
)
from progidiff.cli.progress import make_step_report, show_count
from progidiff.errors import RequestError, StoreError

if TYPE_CHECKING:
    from progidiff.textdiff.data import PictureCase
    from progidiff.textdiff.model import TextDiffModel, TextDiffResult
    from progidiff.textdiff.versions import TextDiffStore

ImagesOption = Annotated[
    Path | None,
    typer.Option(help="Folder of PNG, JPEG or TIFF pictures, or the folder above it. Required.", show_default=False),
]
LabelsOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of masks, matched by name. Default: labels/, masks/ ... beside the pictures.", show_default=False
    ),
]
TextOption = Annotated[
    Path | None,
    typer.Option(
        help="Table (CSV or XLSX) with columns image,text. Default: text.csv beside the pictures.", show_default=False
    ),
]
PictureModelOption = Annotated[
    Path | None,
    typer.Option(
        "--model", help="Folder of a model, or of its versions. Default: the shipped one, nuclei.", show_default=False
    ),
]
DenoiserOption = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub id of a diffusers denoiser. Default: the shipped one, or the model's own.",
        show_default=False,
    ),
]
CaseOption = Annotated[
    list[str] | None,
    typer.Option("--case", help="Learn from this picture; may be repeated. Default: all.", show_default=False),
]
HoldOutOption = Annotated[
    list[str] | None,
    typer.Option(
        "--hold-out",
        help="Keep this picture back, to choose the threshold and for the figures; may be repeated.",
        show_default=False,
    ),
]
ValidationOption = Annotated[
    Path | None,
    typer.Option(
        "--validation",
        help="Folder with images/, labels/ and text.csv, all of which are kept back.",
        show_default=False,
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option(
        "--classes",
        help="Names of the classes in the masks, comma-separated, value 1 first. Default: foreground.",
        show_default=False,
    ),
]
UseTextOption = Annotated[
    bool | None,
    typer.Option("--with-text/--without-text", help="Read the sentences. Default: yes.", show_default=False),
]
EncoderOption = Annotated[
    str | None,
    typer.Option(
        "--encoder",
        help="Folder or hub id of a transformers text encoder. Default: MiniLM from PyPI.",
        show_default=False,
    ),
]
PhrasesOption = Annotated[
    Path | None,
    typer.Option(
        "--phrases",
        help="Table (CSV or XLSX) with columns text,structures: what sentences ask for. The sentence then selects "
        "which classes are drawn, and the pictures' own sentences are not read. Default: none.",
        show_default=False,
    ),
]
DrawsOption = Annotated[
    int | None,
    typer.Option(
        help="Noises to average over and compare, 1 to 64; time grows with it. Default: the model's.",
        show_default=False,
    ),
]
StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder of models. Default: the shipped one.", show_default=False)
]


class ControlName(StrEnum):
    """Values of --control; the same as `textdiff.evaluate.CONTROLS`."""

    NONE = "none"
    EMPTY = "empty"
    SHUFFLED = "shuffled"
    NO_TEXT = "no-text"


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    group = typer.Typer(
        no_args_is_help=True,
        help="2-D pictures with a report sentence: pretrain, convert, train, teach, predict, evaluate, versions.",
        rich_markup_mode=None,
    )
    for command in (pretrain, convert, train, teach, predict, evaluate):
        group.command()(command)
    group_of_versions = typer.Typer(
        no_args_is_help=True, help="Versions of TextDiff models: list, show, add, use, rollback.", rich_markup_mode=None
    )
    group_of_versions.command("list")(list_versions)
    group_of_versions.command("show")(show_version)
    group_of_versions.command("add")(add_version)
    group_of_versions.command("use")(use_version)
    group_of_versions.command("rollback")(roll_back)
    group.add_typer(group_of_versions, name="versions")
    app.add_typer(group, name="textdiff")


def pretrain(
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of pictures; labels are not looked at. May be repeated. Required.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make, in diffusers format. Required.", show_default=False)
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Checkpoints and curves. The same command continues a run that was stopped.")
    ] = Path("runs/textdiff-pretrain"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    steps: Annotated[int | None, make_steps_option("schedule.steps")] = None,
    seed: RunSeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Train a small denoiser on pictures without labels; `train` takes its features."""
    from progidiff.textdiff.pretrain import DenoiserConfig, run_pretrain

    flags = {"schedule.steps": steps, "seed": seed}
    settings = load_settings(DenoiserConfig, "textdiff_pretrain", config, changes, show_config, flags)
    from progidiff.model.backbone import pick_device
    from progidiff.textdiff.data import find_cases

    _prepare(threads)
    target = require(out, "--out")
    pictures = [case.image for folder in require(images, "--images") for case in find_cases(folder)]
    found = run_pretrain(pictures, target, work, settings, str(pick_device(device)))
    typer.echo(json.dumps(found, indent=1))


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The .pt file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder to make, in diffusers format.", show_default=False)],
    flags: Annotated[
        str,
        typer.Option(
            help='The flags it was trained with, in quotes, for example "--image_size 256 --num_head_channels 64 ...".',
            show_default=False,
        ),
    ],
    half: Annotated[
        bool, typer.Option("--half", help="Store half-precision numbers: half the size, and a rounding.")
    ] = False,
) -> None:
    """Make a diffusers folder of a checkpoint of OpenAI's guided-diffusion; no number is changed."""
    from progidiff.textdiff.convert import convert_checkpoint, parse_flags

    typer.echo(json.dumps(convert_checkpoint(checkpoint, out, parse_flags(flags), half), indent=1))


def train(
    images: ImagesOption = None,
    labels: LabelsOption = None,
    text: TextOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make; the model. Required.", show_default=False)] = None,
    case: CaseOption = None,
    hold_out: HoldOutOption = None,
    validation: ValidationOption = None,
    work: Annotated[
        Path, typer.Option(help="Checkpoints, curves and features. The same command continues a run that was stopped.")
    ] = Path("runs/textdiff"),
    config: ConfigOption = None,
    changes: SetOption = None,
    show_config: ShowConfigOption = False,
    name: Annotated[str | None, typer.Option(help="Name of the model.", show_default=False)] = None,
    classes: ClassesOption = None,
    steps: Annotated[int | None, make_steps_option("schedule.steps")] = None,
    use_text: UseTextOption = None,
    phrases: PhrasesOption = None,
    denoiser: DenoiserOption = None,
    encoder: EncoderOption = None,
    seed: RunSeedOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Learn to segment from a few labelled pictures and their sentences; one is enough, minutes on a CPU.

    Pictures without a sentence are learned from without one. With pictures kept back the figures are printed and the
    threshold is chosen on them; without any it is 0.5.
    """
    from progidiff.textdiff.phrases import read_phrases
    from progidiff.textdiff.train import TextDiffTrainConfig, train_textdiff

    flags = {
        "name": name,
        "classes": None if classes is None else split_commas([classes]),
        "schedule.steps": steps,
        "use_text": use_text,
        "seed": seed,
    }
    if phrases is not None:
        flags |= {"head.gate": True, "features.mirror": False}
    settings = load_settings(TextDiffTrainConfig, "textdiff_train", config, changes, show_config, flags)
    _prepare(threads)
    chosen, held = _choose_pictures(require(images, "--images"), labels, text, case, hold_out, validation)
    steps_told = make_step_report()
    with show_count("features", "pictures") as show:

        def report(entry: dict[str, Any]) -> None:
            if entry["stage"] == "features":
                show(entry["step"], entry["total"])
            elif steps_told is not None:
                steps_told(entry)

        result = train_textdiff(
            chosen,
            held,
            denoiser=denoiser,
            encoder=encoder,
            phrases=() if phrases is None else read_phrases(phrases, settings.classes),
            out=require(out, "--out"),
            work=work,
            config=settings,
            device=device,
            report=report,
        )
    _print_notes(result.notes)
    typer.echo(json.dumps({"model": str(out), "figures": result.figures, "seconds": result.run["seconds"]}, indent=1))


def teach(
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Folder of a model whose sentence selects. Required.", show_default=False),
    ] = None,
    phrases: PhrasesOption = None,
    out: Annotated[Path | None, typer.Option(help="Folder to make; the model. Required.", show_default=False)] = None,
    validation: ValidationOption = None,
    work: Annotated[Path, typer.Option(help="Features of the --validation pictures.")] = Path("runs/textdiff"),
    steps: Annotated[int, typer.Option(help="Of the training, 128 phrases each.")] = 600,
    seed: Annotated[int, typer.Option(help="Of the order of the phrases.")] = 0,
    denoiser: DenoiserOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Teach a model that selects another table of phrases, in a minute: what it draws where stays as it is.

    With --validation the threshold is chosen on those pictures and the figures are printed; without, the threshold
    stays.
    """
    from progidiff.textdiff.data import find_cases
    from progidiff.textdiff.model import load_textdiff
    from progidiff.textdiff.phrases import read_phrases
    from progidiff.textdiff.teach import TeachConfig, measure_taught, teach_phrases
    from progidiff.textdiff.weights import read_json
    from progidiff.training.recipes import describe_run

    table, target = require(phrases, "--phrases"), require(out, "--out")
    _prepare(threads)
    source = load_textdiff(require(model, "--model"), device, denoiser)
    config = TeachConfig(steps=steps, seed=seed)
    taught, run = teach_phrases(source, read_phrases(table, source.card.classes), config, report=make_step_report())
    held = [] if validation is None else find_cases(validation)
    figures = measure_taught(taught, held, work / "features") if held else {}
    before = {} if source.folder is None else read_json(source.folder / "run.json")
    record = {
        **before,
        **describe_run(),
        **run,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "before": {name: before.get(name) for name in ("command", "config", "date")},
        "validation": figures,
        "held_out_cases": [case.name for case in held] or before.get("held_out_cases", []),
    }
    taught.save(target, record)
    typer.echo(json.dumps({"model": str(target), "figures": figures, "misread": run["misread"]}, indent=1))


def _choose_pictures(
    images: Path,
    labels: Path | None,
    text: Path | None,
    case: list[str] | None,
    hold_out: list[str] | None,
    validation: Path | None,
) -> tuple[list[PictureCase], list[PictureCase]]:
    """The pictures to learn from, and those to keep back."""
    from progidiff.textdiff.data import find_cases, pick_cases

    cases = find_cases(images, labels, text)
    held = pick_cases(cases, split_commas(hold_out))
    names = {c.name for c in held}
    chosen = (
        pick_cases(cases, split_commas(case))
        if case
        else [c for c in cases if c.name not in names and c.label is not None]
    )
    return chosen, held if validation is None else [*held, *find_cases(validation)]


def predict(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or TIFF.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for mask.png, probability.png, result.json.", show_default=False)],
    sentence: Annotated[str | None, typer.Option(help="What a report says of the picture.", show_default=False)] = None,
    text: Annotated[
        Path | None, typer.Option(help="Table to take the sentence from, by file name.", show_default=False)
    ] = None,
    model: PictureModelOption = None,
    draws: DrawsOption = None,
    denoiser: DenoiserOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Segment one picture: its mask, the probability of each class and, from several draws, where they disagree."""
    from progidiff.evaluation.evaluate import save_report
    from progidiff.textdiff.model import load_textdiff
    from progidiff.textdiff.pictures import read_picture
    from progidiff.textdiff.sentences import find_sentence, read_sentences

    if sentence is not None and text is not None:
        raise RequestError("Give --sentence or --text, not both.")
    if text is not None:
        sentence = find_sentence(read_sentences(text), image.name)
    picture = read_picture(image)
    _prepare(threads)
    loaded = load_textdiff(model, device, denoiser)
    with show_count(image.name, "tiles") as show:
        result = loaded.predict(picture, sentence, draws, on_progress=show)
    files = _save_answer(loaded.card.classes, result, out)
    save_report(_describe_answer(image, loaded, result, files), out / "result.json")
    _print_notes(result.notes)
    typer.echo(f"{', '.join(files)} and result.json are in {out}")


def _save_answer(classes: tuple[str, ...], result: TextDiffResult, out: Path) -> list[str]:
    """Write mask, probabilities and disagreement as PNG. Returns their names."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        _save_gray(out / "mask.png", result.mask * 255 if len(classes) == 1 else result.mask)
        files = ["mask.png"]
        for name, probabilities in zip(classes, result.probabilities, strict=True):
            files.append("probability.png" if len(classes) == 1 else f"probability_{make_slug(name)}.png")
            _save_gray(out / files[-1], (probabilities * 255).round().astype("uint8"))
        if len(result.masks) > 1:
            files.append("disagreement.png")
            _save_gray(out / files[-1], (result.disagreement_map * 255).round().astype("uint8"))
    except OSError as err:
        raise StoreError(
            f"The result could not be written to '{out}' ({err}). Choose another place or free some space."
        ) from err
    return files


def _describe_answer(image: Path, model: TextDiffModel, result: TextDiffResult, files: list[str]) -> dict[str, Any]:
    """What result.json says."""
    classes = model.card.classes
    return {
        "image": str(image),
        "sentence": result.sentence,
        "model": model.card.full_name,
        "classes": {name: 255 if len(classes) == 1 else number for number, name in enumerate(classes, start=1)},
        "share": {name: float((result.mask == number).mean()) for number, name in enumerate(classes, start=1)},
        "threshold": model.card.threshold,
        "draws": len(result.masks),
        "disagreement": result.disagreement,
        "notes": list(result.notes),
        "files": files,
        "seconds": round(result.seconds, 2),
        "units": {
            "classes": "value of a class in mask.png; 0 is background",
            "share": "of the picture's pixels",
            "probability": "0..255 for 0..1, mean over the draws; not calibrated",
            "disagreement": "1 - mean pairwise Dice of the draws' masks",
        },
    }


def evaluate(
    images: ImagesOption = None,
    labels: LabelsOption = None,
    text: TextOption = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write. Required.", show_default=False)] = None,
    model: PictureModelOption = None,
    control: Annotated[
        ControlName,
        typer.Option(help="Of the text: each image's own, empty, another image's, or left out of the network."),
    ] = ControlName.NONE,
    case: Annotated[
        list[str] | None,
        typer.Option("--case", help="Only this picture; may be repeated. Default: all.", show_default=False),
    ] = None,
    draws: DrawsOption = None,
    seed: Annotated[int, typer.Option(help="Of the shuffling.")] = 0,
    denoiser: DenoiserOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
) -> None:
    """Measure a model on labelled pictures: Dice and IoU per image and their means, at the resolution of the masks."""
    from progidiff.evaluation.evaluate import save_report
    from progidiff.storage.provenance import describe_versions
    from progidiff.textdiff.data import find_cases, pick_cases
    from progidiff.textdiff.evaluate import evaluate as measure
    from progidiff.textdiff.model import load_textdiff

    target = require(out, "--out")
    cases: list[PictureCase] = find_cases(require(images, "--images"), labels, text)
    if case:
        cases = pick_cases(cases, split_commas(case))
    _prepare(threads)
    loaded = load_textdiff(model, device, denoiser)
    with show_count("pictures", "pictures") as show:
        found = measure(loaded, cases, control.value, draws=draws, seed=seed, on_progress=show)
    found |= {"command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]), "versions": describe_versions()}
    save_report(found, target)
    for entry in found["images"]:
        typer.echo(f"{entry['name']}: Dice {entry['dice']:.4f}, IoU {entry['iou']:.4f}", err=True)
    _print_notes(found["notes"])
    summary = found["summary"]
    typer.echo(
        f"{summary['images']} pictures, control {control.value}: mean Dice "
        f"{summary['dice']:.4f}, mean IoU {summary['iou']:.4f}; {target}"
    )


def list_versions(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the models: name, versions, and the one that is served (*)."""
    versions.print_versions(_store(store), as_json)


def show_version(
    reference: versions.ReferenceArgument,
    store: StoreOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print card.json, run.json and the history as JSON.")] = False,
) -> None:
    """Print the card of a version."""
    versions.print_version(_store(store), reference, as_json)


def add_version(
    folder: Annotated[Path, typer.Argument(help="What `train` made.", show_default=False)],
    name: Annotated[
        str | None,
        typer.Option(help="Whose next version it becomes. Default: the name it was trained under.", show_default=False),
    ] = None,
    readme: Annotated[
        Path | None,
        typer.Option(
            help="Model card for people, Markdown. Default: one written from what is known.", show_default=False
        ),
    ] = None,
    data: Annotated[str, typer.Option(help="What it was trained on, by name, for the card.")] = "",
    licence: Annotated[str, typer.Option(help="Of the weights, for the card.")] = "",
    publish: Annotated[bool, typer.Option("--publish/--no-publish", help="Serve it.")] = True,
    store: StoreOption = None,
) -> None:
    """Put a trained model among those that a server offers; the folder stays as it is."""
    from progidiff.textdiff.model import load_textdiff
    from progidiff.textdiff.weights import read_json

    _prepare(None)
    model = load_textdiff(folder, "cpu")
    model.card = replace(model.card, data=data or model.card.data, licence=licence or model.card.licence)
    try:
        text = None if readme is None else readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise RequestError(f"The model card '{readme}' cannot be read ({err}); give a text file in UTF-8.") from err
    found = _store(store)
    card = found.add(name or model.card.name, model, read_json((model.folder or folder) / "run.json"), text)
    if publish:
        found.publish(card.name, card.version)
    typer.echo(f"{card.full_name} is in {found.folder(card)}{' and is served' if publish else ''}.")


def use_version(reference: versions.ExactReferenceArgument, store: StoreOption = None) -> None:
    """Serve this version; a running server picks it up with the next request."""
    versions.serve_version(_store(store), reference)


def roll_back(
    name: Annotated[str, typer.Argument(help="Name of the model.", show_default=False)], store: StoreOption = None
) -> None:
    """Serve what was served before."""
    versions.roll_back(_store(store), name, f"No version of {name} is served now.")


def _store(root: Path | None) -> TextDiffStore:
    from progidiff.textdiff.model import default_folder
    from progidiff.textdiff.versions import TextDiffStore

    return TextDiffStore(root or default_folder())


def _save_gray(path: Path, pixels: Any) -> None:
    """A gray PNG, by rename."""
    from PIL import Image

    scratch = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(scratch, format="PNG")
    scratch.replace(path)


def _print_notes(notes: Any) -> None:
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def _prepare(threads: int | None) -> None:
    """Set the number of threads; keep libraries from drawing bars of their own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    use_threads(threads)
