"""Images and labels of a data set from elsewhere, brought into a folder of studies.

Each image appears under its name by rename, then its label goes into the history as a save of its own (who, when, from
which data set), and only then into `labels/final/`: what a crash cuts off is finished by the server's next start, and a
server that runs meanwhile sees whole files only. What is there already stays: the same again changes nothing, another
image or label of that name is refused with a sentence.

A fresh folder takes the data set's own ids over into its `labels.json`, so labels stay what they are, byte for byte.
Elsewhere labels are translated to the ids of the folder, as every save is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ConflictError, ImageError, ProGiDiffError, RequestError, StoreError
from progidiff.exchange.datasets import Dataset, DatasetCase
from progidiff.images.formats import Use, find_format, is_picture, strip_suffix
from progidiff.images.geometry import Grid
from progidiff.images.ids import make_id
from progidiff.images.nifti import take_channel
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.writing import save_mask
from progidiff.labels.cases import LABELS_JSON
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.history import FINAL, AnnotationStore, hash_file
from progidiff.labels.in_force import find_previous, is_repeat, record_ready
from progidiff.labels.naming import declare_label, list_names, name_label
from progidiff.labels.saving import (
    MAX_LABEL_ID,
    ReadyLabel,
    SaveOptions,
    check_label,
    combine_ids,
    load_label_ids,
    open_label,
    prepare_label,
)
from progidiff.labels.segments import LabelMap, Look
from progidiff.prompts.parser import canonical_name
from progidiff.storage.atomic import atomic_file, replace_text, scratch_folder

Placing = Literal["copy", "link"]

STATES = ("imported", "there", "kept", "failed")
"""What became of a case: it is here now; it was here already, the same; another label of it is in force and stays; it
is not here.
"""


@dataclass(frozen=True)
class ImportSettings:
    """How a data set is brought in.

    Attributes:
        placing: "copy", or "link": a second name for the same bytes on the same disk.
        user: Who imports, for the history.
        replace: Whether imported labels go in force over others, which the history keeps.
    """

    placing: Placing = "copy"
    user: str = ""
    replace: bool = False


@dataclass(frozen=True)
class CaseOutcome:
    """What became of one case.

    Attributes:
        image: Its id in the folder of studies.
        state: One of `STATES`.
        notes: What to know about it, sentences.
    """

    image: str
    state: str
    notes: tuple[str, ...] = ()


def import_dataset(dataset: Dataset, studies: Path, state: Path, settings: ImportSettings) -> Iterator[CaseOutcome]:
    """Bring a data set into a folder of studies, one case after the other.

    Args:
        dataset: Of `datasets.read_dataset`.
        studies: The folder; made if absent.
        state: The server's own folder of it.
        settings: How.

    Yields:
        What became of each case; one that fails does not end the others.

    Raises:
        StoreError: if the disk refuses.
        RequestError: if labels.json of the folder cannot be read.
    """
    annotations = AnnotationStore(state / "annotations", studies / "labels" / FINAL)
    try:
        studies.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"'{studies}' could not be made ({err}). Check who may write there.") from err
    structures = FolderStructures(studies, state, annotations)
    is_taken = take_over_ids(studies, dataset.names)
    for case in dataset.cases:
        try:
            yield _import_case(case, dataset, studies, annotations, settings, structures)
        except StoreError:
            raise
        except ProGiDiffError as err:
            yield CaseOutcome(case.name, "failed", (str(err),))
    if is_taken and structures.own():
        names = ", ".join(f"'{row.name}'" for row in structures.own())
        annotations.note_structure(f"The ids of the imported data set are those of this folder: {names}", settings.user)


def take_over_ids(studies: Path, names: Mapping[int, str]) -> bool:
    """Write the ids of a data set into labels.json, if nothing in the folder has ids yet.

    Returns:
        Whether they are the folder's now.
    """
    path = studies / LABELS_JSON
    has_labels = any((studies / "labels").glob("*/*")) if (studies / "labels").is_dir() else False
    if path.exists() or has_labels or not names or max(names) > MAX_LABEL_ID:
        return False
    known = {number: canonical_name(name) for number, name in names.items()}
    if len(set(known.values())) < len(known):
        return False  # Two ids of one structure: the labels are translated.
    replace_text(path, json.dumps({str(number): name for number, name in known.items()}, indent=1, ensure_ascii=False))
    return True


def _import_case(
    case: DatasetCase,
    dataset: Dataset,
    studies: Path,
    annotations: AnnotationStore,
    settings: ImportSettings,
    structures: FolderStructures,
) -> CaseOutcome:
    image_id = make_id(case.name)
    with scratch_folder("import") as scratch:
        source = (
            case.image if case.channel is None else take_channel(case.image, case.channel, scratch / "image.nii.gz")
        )
        image, is_new = place_image(image_id, source, studies, settings.placing if source == case.image else "copy")
        if is_new:
            write_sidecar(image, {"modality": dataset.modality} if dataset.modality else {})
        if case.label is None:
            return CaseOutcome(image_id, "imported" if is_new else "there")
        ready = _prepare(case.label, dataset, image_id, image, studies, annotations, structures, scratch)
        if ready is None:
            note = "Every slice of its label has voxels to be ignored, so no slice counts as labelled."
            return CaseOutcome(image_id, "imported" if is_new else "there", (note,))
        client = f"import {dataset.kind} {dataset.folder.name}"[:100]
        label_state = put_in_force(image_id, ready, studies, annotations, settings, client)
        told = [] if is_picture(image) else declare_label(structures, ready, settings.user)[0]
    state = "imported" if is_new and label_state == "there" else label_state
    return CaseOutcome(image_id, state, (*ready.warnings, *told))


def place_image(image_id: str, source: Path, studies: Path, placing: Placing) -> tuple[Path, bool]:
    """Put an image into a folder of studies under an id.

    Returns:
        Its path, and whether it is new.

    Raises:
        ImageError: if it cannot be read.
        ConflictError: if another image has this id.
        StoreError: if the disk refuses.
    """
    row = find_format(source)
    if row is None:
        raise ImageError(f"'{source.name}' is no image format that is read here. Convert it to .nii.gz.")
    present = next((path for path in sorted(studies.glob(f"{image_id}.*")) if _is_image(path, image_id)), None)
    if Use.IMAGE in row.uses:
        target = studies / f"{image_id}{row.suffix}"
        if present is not None:
            if hash_file(present) == hash_file(source):
                return present, False
            raise _other_image(image_id, present)
        if not is_picture(source):
            read_grid(source)  # What no header says to be an image does not come in.
        _place(source, target, placing)
        return target, True
    volume = load_volume(source)  # MetaImage: read here, and not served from a folder.
    target = studies / f"{image_id}.nii.gz"
    if present is not None:
        found = load_volume(present)
        if found.digest == volume.digest or np.array_equal(found.array, volume.array):
            return present, False
        raise _other_image(image_id, present)
    save_mask(volume.array, volume.grid, target)
    return target, True


def put_in_force(
    image_id: str,
    ready: ReadyLabel,
    studies: Path,
    annotations: AnnotationStore,
    settings: ImportSettings,
    client: str,
) -> str:
    """Keep a label that is ready in the history, and place it.

    Returns:
        One of `STATES`: "imported", "there" or "kept".
    """
    saves = annotations.in_force(image_id)
    if saves and is_repeat(ready, saves):
        return "there"
    if saves and not settings.replace:
        last = saves[-1]
        who = f" by {last.user}" if last.user else ""
        raise ConflictError(
            f"Save {last.sequence}{who} of {last.time} is the label of '{image_id}' and stays. --replace puts the "
            "imported "
            "one in force; the history keeps both."
        )
    final = studies / "labels" / FINAL
    try:
        final.mkdir(parents=True, exist_ok=True)
        label = record_ready(annotations, image_id, ready, FINAL, settings.user, client)
        kept = annotations.label_file(label)
        row = find_format(kept)
        suffix = ".nii.gz" if row is None else row.suffix.removeprefix(".seg")
        target = final / f"{image_id}{suffix}"
        with atomic_file(target) as staged:
            shutil.copyfile(kept, staged)
        for other in final.glob(f"{image_id}.*"):
            if other != target and strip_suffix(other) == image_id:
                other.unlink()
    except OSError as err:
        raise StoreError(
            f"The label of '{image_id}' could not be written into '{final}' ({err}). Free some disk space and import "
            "again."
        ) from err
    return "imported"


def write_sidecar(image: Path, values: Mapping[str, Any]) -> None:
    """Say beside an image what is known about it; a sidecar that is there stays."""
    path = image.with_name(strip_suffix(image) + ".json")
    if values and not path.exists() and path.name not in (LABELS_JSON, "datastore_v2.json"):
        replace_text(path, json.dumps(dict(values), indent=1, ensure_ascii=False))


def _prepare(
    case_label: Path,
    dataset: Dataset,
    image_id: str,
    image: Path,
    studies: Path,
    annotations: AnnotationStore,
    structures: FolderStructures,
    scratch: Path,
) -> ReadyLabel | None:
    """A label as it is to be kept; None if all its slices have voxels that nobody labelled."""
    file, grid = case_label, read_grid(image)
    label = open_label(file, grid)
    slices: tuple[int, ...] | None = None
    if dataset.ignore is not None and (label.array == dataset.ignore).any():
        kept, slices = _drop_ignored(label.array, dataset.ignore, grid)
        if not slices:
            return None
        file = save_mask(kept, grid, scratch / "label.nii.gz")
        label = LabelMap(kept, label.names, label.is_as_stored, label.notes)
    _check_named(label, dataset, case_label.name)
    previous = find_previous(annotations, image_id, FINAL)
    names = {number: canonical_name(name) for number, name in dataset.names.items()}
    # It speaks about all that the data set labels, and what else is in force of the image stays.
    # What it calls nearly as something known is told, and not asked back: nobody waits to answer.
    options = SaveOptions(
        slices=slices, structures=tuple(dict.fromkeys(names.values())), label_names=names, confirm=True
    )
    looks: Mapping[str, Look] = {}
    if not is_picture(image):
        named = name_label(label, options, structures, previous)
        label, options, looks = named.label, named.options, named.looks
    kept_ids = combine_ids(load_label_ids(studies), previous, list_names(label, options))
    checked = check_label(file, label, options, kept_ids)
    if is_picture(file) and find_format(file, Use.ANSWER) is None:
        raise RequestError(f"'{file.name}' is a label of a picture, and those are kept as .png. Convert it.")
    return replace(prepare_label(checked, grid, options, image_id, previous, None, scratch), looks=looks)


def _check_named(label: LabelMap, dataset: Dataset, name: str) -> None:
    strange = sorted({int(value) for value in np.unique(label.array)} - {0} - dataset.names.keys() - label.names.keys())
    if strange:
        numbers = " ".join(f'--label {value}="..."' for value in strange[:8])
        raise ImageError(
            f"'{name}' holds the ids {', '.join(map(str, strange[:8]))}, which dataset.json does not name. Say what "
            "they are: "
            f"{numbers}."
        )


def _drop_ignored(array: NDArray[Any], ignore: int, grid: Grid) -> tuple[NDArray[Any], tuple[int, ...]]:
    """A label without the voxels that nobody labelled, and the axial slices that have none of them."""
    stack = grid.arrange(array == ignore).any(axis=(1, 2))
    return np.where(array == ignore, 0, array).astype(array.dtype), tuple(int(z) for z in np.flatnonzero(~stack))


def _is_image(path: Path, image_id: str) -> bool:
    row = find_format(path, Use.IMAGE)
    return row is not None and path.name[: -len(row.suffix)] == image_id and path.is_file()


def _other_image(image_id: str, present: Path) -> ConflictError:
    return ConflictError(
        f"'{present.name}' is another image of the id '{image_id}' and stays as it is. Import into another folder, or "
        "rename one of them."
    )


def _place(source: Path, target: Path, placing: Placing) -> None:
    try:
        with atomic_file(target) as staged:
            if placing == "link":
                staged.unlink(missing_ok=True)
                os.link(source.resolve(), staged)
            else:
                shutil.copyfile(source, staged)
    except OSError as err:
        cure = (
            "Links need both on one disk; import with --images copy." if placing == "link" else "Free some disk space."
        )
        raise StoreError(f"'{target}' could not be written ({err}). {cure}") from err
