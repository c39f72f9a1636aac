"""The command line for what comes from elsewhere and goes elsewhere: ``progidiff import``, ``receive`` and
``export``."""

from __future__ import annotations

import getpass
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from progidiff.cli.options import ModalityOption, split_commas
from progidiff.errors import NotFoundError, RequestError
from progidiff.storage.state import default_store

if TYPE_CHECKING:
    from progidiff.exchange.exporting import Target

StudiesOption = Annotated[
    Path, typer.Option(help="Folder of images, as `progidiff serve` serves it.", show_default=False)
]
StoreOption = Annotated[
    Path | None,
    typer.Option(help="State folder of the server (--conf store). Default: STUDIES/.progidiff.", show_default=False),
]
UserOption = Annotated[
    str | None,
    typer.Option("--user", help="Who does it, for the history. Default: the name of this account.", show_default=False),
]
ImagesOption = Annotated[
    str, typer.Option("--images", help="copy, or link: another name for the same bytes, on the same disk only.")
]

FAILED_EXIT_CODE = 1
"""Ends a command of which some images failed; 2 is an error that stopped it."""

FACE_WARNING = (
    "Faces can be recognised in images of the head, with or without a name: use a defacing tool on them before they go "
    "out."
)


def register(app: Any) -> None:
    """Add the commands to the command line `app` (a `typer.Typer`)."""
    app.command("import")(import_)
    app.command("receive")(receive)
    app.command("export")(export)
    app.command("deidentify")(deidentify_)


def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of an nnU-Net v2 or Decathlon data set (with dataset.json), or of DICOM files.",
            show_default=False,
        ),
    ],
    studies: StudiesOption,
    images: ImagesOption = "copy",
    channel: Annotated[
        str | None, typer.Option(help="Which of several channels to take, by name or number.", show_default=False)
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="What an id of the labels means, ID=NAME, in place of dataset.json; may be repeated.",
            show_default=False,
        ),
    ] = None,
    with_test: Annotated[
        bool, typer.Option("--with-test", help="Bring the images for testing (imagesTs) too.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put imported labels in force over others; the history keeps both.")
    ] = False,
    user: UserOption = None,
    store: StoreOption = None,
) -> None:
    """Bring the images and labels of a data set, or DICOM series, into a folder of studies.

    Labels enter the history as imports. Structures are known by their names, those of TotalSegmentator too; other names
    are kept as they are. Of a folder of DICOM files every series of images becomes a NIfTI file on the grid of its
    slices, whatever the files are called. What is there already stays. Exit code 1: some failed, with the reason.
    """
    from progidiff.exchange.datasets import DATASET_JSON, read_dataset
    from progidiff.exchange.importing import STATES, ImportSettings, import_dataset

    if not source.is_dir():
        raise NotFoundError(
            f"There is no folder '{source}'. Name the folder with dataset.json, or one with DICOM files in it."
        )
    placing = _choose(images, "--images", ("copy", "link"))
    settings = ImportSettings(cast(Literal["copy", "link"], placing), _name_user(user), replace)
    if not (source / DATASET_JSON).is_file():
        _import_dicom(source, studies)
        return
    dataset = read_dataset(source, channel, _read_labels(label or []), with_test)
    for note in dataset.missing:
        typer.echo(note, err=True)
    counts: Counter[str] = Counter()
    for outcome in import_dataset(dataset, studies, store or default_store(str(studies)), settings):
        counts[outcome.state] += 1
        if outcome.notes or outcome.state == "failed":
            typer.echo(f"{outcome.image}: {outcome.state}. {' '.join(outcome.notes)}", err=True)
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    typer.echo(f"{dataset.kind} '{source.name}': {told}. Serve them: progidiff serve --studies {studies}")
    if counts["failed"]:
        raise typer.Exit(FAILED_EXIT_CODE)


def _import_dicom(source: Path, studies: Path) -> None:
    """Every series of a folder of DICOM files."""
    from progidiff.exchange.dicom_folders import find_series, import_series

    found = find_series(source)
    for note in found.notes:
        typer.echo(note, err=True)
    if not found.series:
        raise NotFoundError(
            f"'{source}' holds neither a dataset.json (nnU-Net v2, Decathlon) nor DICOM images. Name the folder of a "
            "data set, or one with DICOM files in it."
        )
    counts: Counter[str] = Counter()
    for series in found.series:
        outcome = import_series(series, studies)
        counts[outcome.state] += 1
        typer.echo(f"{outcome.image}: {outcome.state}. {' '.join(outcome.notes)}".rstrip(), err=True)
    told = ", ".join(f"{count} {state}" for state, count in counts.items())
    typer.echo(
        f"{len(found.series)} DICOM series in '{source.name}': {told}. Serve them: progidiff serve --studies {studies}"
    )
    if counts["failed"]:
        raise typer.Exit(FAILED_EXIT_CODE)


def receive(
    studies: StudiesOption,
    port: Annotated[int, typer.Option(help="TCP port to listen on.", min=1, max=65535)] = 11112,
    host: Annotated[str, typer.Option(help="Interface. 0.0.0.0 is every one, and needs --allow.")] = "127.0.0.1",
    ae_title: Annotated[str, typer.Option("--ae-title", help="What senders call this node.")] = "PROGIDIFF",
    allow: Annotated[
        list[str] | None,
        typer.Option(help="AE title of a sender; may be repeated. Default: any, on this machine.", show_default=False),
    ] = None,
    quiet: Annotated[
        float, typer.Option(help="Seconds without a new object after which a series is complete.", min=0.1)
    ] = 30.0,
    max_associations: Annotated[int, typer.Option(help="Senders at a time.", min=1, max=100)] = 4,
    max_gb: Annotated[
        float, typer.Option(help="Of objects that wait to be converted; more are refused.", min=0.001)
    ] = 20.0,
    store: StoreOption = None,
) -> None:
    """Listen for images of scanners and PACS (DICOM C-STORE) until Ctrl-C; every complete series appears in the folder.

    Objects wait in STUDIES/.progidiff/incoming until their series is quiet. What cannot be converted stays in refused/
    there, with the reason. AE titles are names and no passwords: keep the port to machines that may send.
    """
    import threading

    from progidiff.exchange.receiving import Receiver, ReceiveSettings
    from progidiff.images import decoding

    if not studies.is_dir():
        raise NotFoundError(f"There is no folder '{studies}'. Name the one that `progidiff serve` serves.")
    decoding.read_apart(True)
    settings = ReceiveSettings(host, port, ae_title, tuple(allow or ()), quiet, max_associations, max_gb)
    receiver = Receiver(
        studies,
        store or default_store(str(studies)),
        settings,
        lambda outcome: typer.echo(f"{outcome.image}: {outcome.state}. {' '.join(outcome.notes)}".rstrip()),
    )
    typer.echo(f"{ae_title} listens on {host}:{receiver.start()}. Ctrl-C stops it.", err=True)
    try:
        threading.Event().wait()
    finally:
        receiver.stop()


def export(
    out: Annotated[Path, typer.Argument(help="New folder, for nnU-Net such as Dataset501_Mine.", show_default=False)],
    studies: StudiesOption,
    target: Annotated[
        str,
        typer.Option(
            "--as",
            help="nnunet (v2), msd (Medical Segmentation Decathlon), slicer (.seg.nrrd beside each image) or files "
            "(images, labels/final and labels.json, as they are served here).",
        ),
    ] = "nnunet",
    structures: Annotated[
        list[str] | None,
        typer.Option(help="Only these; may be repeated. Default: all that any label speaks about.", show_default=False),
    ] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="Only these images; may be repeated. Default: all with a label.", show_default=False),
    ] = None,
    modality: ModalityOption = None,
    with_unlabelled: Annotated[
        bool, typer.Option("--with-unlabelled", help="Images without a label too, as those for testing.")
    ] = False,
    assume_absent: Annotated[
        bool, typer.Option("--assume-absent", help="A structure that a label does not speak about is taken for absent.")
    ] = False,
    images: ImagesOption = "copy",
    deidentify: Annotated[
        bool,
        typer.Option("--deidentify", help="Other names, headers without text, no sidecars; --key says who is who."),
    ] = False,
    key: Annotated[
        Path | None,
        typer.Option(
            help="With --deidentify: file of the pseudonyms (.csv), outside of what goes out.", show_default=False
        ),
    ] = None,
    user: UserOption = None,
    store: StoreOption = None,
) -> None:
    """Write the images with a label in force as a data set that other programs read.

    nnU-Net gets slices that nobody labelled as its label `ignore`; the others have none, and such images are left out
    with the reason (exit code 1). The history notes who exported which image.
    """
    from progidiff.exchange.exporting import TARGETS, ExportSettings, export_dataset
    from progidiff.exchange.pseudonyms import Pseudonyms, check_apart
    from progidiff.images.modality import check_modality
    from progidiff.prompts.parser import canonical_name

    if deidentify != (key is not None):
        raise RequestError(
            "--deidentify and --key belong together: the key is the only way back. Name a file with --key."
        )
    if key is not None:
        check_apart(key, out)
        if images == "link":
            raise RequestError("De-identified images are written anew and cannot be links. Leave --images out.")
    settings = ExportSettings(
        target=cast("Target", _choose(target, "--as", TARGETS)),
        images=tuple(split_commas(cases)) or None,
        structures=tuple(dict.fromkeys(canonical_name(name) for name in split_commas(structures))),
        with_unlabelled=with_unlabelled,
        assume_absent=assume_absent,
        modality=check_modality(modality, "Option --modality"),
        user=_name_user(user),
        link=_choose(images, "--images", ("copy", "link")) == "link",
    )
    pseudonyms = None if key is None else Pseudonyms(key)
    outcomes = export_dataset(studies, store or default_store(str(studies)), out, settings, pseudonyms)
    for outcome in outcomes:
        if outcome.notes:
            typer.echo(f"{outcome.image}: {outcome.state}. {' '.join(outcome.notes)}", err=True)
    if key is not None:
        typer.echo(FACE_WARNING, err=True)
        typer.echo(f"The key is '{key}'. Keep it where the data does not go.", err=True)
    done = sum(outcome.state == "exported" for outcome in outcomes)
    typer.echo(f"{done} of {len(outcomes)} images in {out}")
    if done < len(outcomes):
        raise typer.Exit(FAILED_EXIT_CODE)


def deidentify_(
    folder: Annotated[Path, typer.Argument(help="Folder of DICOM files, with subfolders.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder; one subfolder per series.", show_default=False)],
    key: Annotated[
        Path,
        typer.Option(help="File of the pseudonyms (.csv), outside of what goes out; it grows.", show_default=False),
    ],
) -> None:
    """Write DICOM images without what says whose they are: the Basic Profile of DICOM PS3.15.

    Names, dates, free text, private attributes and UIDs go or are replaced, at every depth; pixels and the place of the
    slices stay. Objects with text in their pixels are left out. --key says who is who: keep it where the data does not
    go.
    """
    from progidiff.exchange.deidentification import deidentify_folder
    from progidiff.exchange.pseudonyms import Pseudonyms

    outcomes, notes = deidentify_folder(folder, out, Pseudonyms(key))
    for note in [*notes, *(f"Left out: {outcome.note}" for outcome in outcomes if outcome.note), FACE_WARNING]:
        typer.echo(note, err=True)
    done = sum(bool(outcome.name) for outcome in outcomes)
    typer.echo(f"{done} of {len(outcomes)} series in {out}; the key is '{key}'. Keep it where the data does not go.")
    if done < len(outcomes):
        raise typer.Exit(FAILED_EXIT_CODE)


def _choose(value: str, option: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise RequestError(f"Option {option} is '{value[:20]}'; it must be {', '.join(choices[:-1])} or {choices[-1]}.")
    return value


def _name_user(user: str | None) -> str:
    if user is not None:
        return user
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # An account without a name, as containers have.
        return ""


def _read_labels(entries: list[str]) -> dict[int, str]:
    names: dict[int, str] = {}
    for entry in entries:
        number, equals, name = entry.partition("=")
        if not equals or not number.strip().isdecimal() or not name.strip():
            raise RequestError(f"Option --label needs ID=NAME, got '{entry[:40]}'. Write for example --label 1=liver.")
        names[int(number)] = name.strip()
    return names
