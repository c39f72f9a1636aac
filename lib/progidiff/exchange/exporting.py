"""The labels in force of a folder of studies, written as a data set that other programs read.

A label here says on which slices, and of which structures, somebody vouches for it. nnU-Net has a number for voxels
that nobody labelled (`ignore`) and gets the other slices so; the Decathlon has none, and labels of a part of their
image stay out. Who exported which image, and when, goes into the history.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from progidiff import __version__
from progidiff.errors import ProGiDiffError, RequestError, StoreError
from progidiff.exchange.datasets import IGNORE
from progidiff.exchange.pseudonyms import Pseudonyms
from progidiff.images.folders import list_volumes
from progidiff.images.formats import find_format
from progidiff.images.geometry import Grid
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.sidecars import find_stated_modality
from progidiff.images.writing import save_mask
from progidiff.labels.cases import LABELS_JSON, LabelledCase, list_labelled
from progidiff.labels.folder_structures import FolderStructures
from progidiff.labels.history import AnnotationStore
from progidiff.labels.in_force import find_meaning
from progidiff.labels.saving import MAX_LABEL_ID, load_label_ids
from progidiff.labels.segments import Look, load_label_map
from progidiff.labels.slicer import save_segmentation
from progidiff.prompts.parser import canonical_name
from progidiff.prompts.structures import number_structures
from progidiff.storage.atomic import atomic_folder

Target = Literal["nnunet", "msd", "slicer", "files"]
TARGETS: tuple[Target, ...] = ("nnunet", "msd", "slicer", "files")

NIFTI = ".nii.gz"
_TAKEN = ("background", IGNORE)
"""Names that are no structures there."""
_NNUNET_FOLDER = re.compile(r"Dataset\d{3}_\w+")


@dataclass(frozen=True)
class ExportSettings:
    """What is exported, and how.

    Attributes:
        target: One of `TARGETS`.
        images: Ids; None for all that have a label.
        structures: Only these; empty for all that any of the labels speaks about.
        with_unlabelled: Whether images without a label go along, as those to test on.
        assume_absent: Whether a structure that a label does not speak about counts as absent.
        modality: Only images of this one; None for all, which must then be of one.
        user: Who exports, for the history.
        link: Whether images are links to the same bytes, where they are not rewritten.
    """

    target: Target
    images: tuple[str, ...] | None = None
    structures: tuple[str, ...] = ()
    with_unlabelled: bool = False
    assume_absent: bool = False
    modality: str | None = None
    user: str = ""
    link: bool = False


@dataclass(frozen=True)
class ExportOutcome:
    """What became of an image: "exported" or "left out", and why, sentences."""

    image: str
    state: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Label:
    """A label in force, read.

    Attributes:
        case: Image and label.
        grid: Of the image.
        array: Ids in file order.
        names: Id -> structure.
        spoken: Structure -> axial slices that are vouched for, None for all; None as a whole if it was made elsewhere
            and everything counts.
    """

    case: LabelledCase
    grid: Grid
    array: NDArray[Any]
    names: Mapping[int, str]
    spoken: Mapping[str, frozenset[int] | None] | None


def export_dataset(
    studies: Path, state: Path, out: Path, settings: ExportSettings, pseudonyms: Pseudonyms | None = None
) -> list[ExportOutcome]:
    """Write the labelled images of a folder as a data set.

    Args:
        studies: The folder.
        state: The server's own folder of it.
        out: New, or empty; it appears complete or not at all.
        settings: What and how.
        pseudonyms: Names in place of the images'; with them every file is written anew, without what headers said. None
            to leave names and images as they are.

    Returns:
        What became of each image.

    Raises:
        RequestError: if nothing can be exported, or `out` will not do.
        StoreError: if the disk refuses.
    """
    _check_folder(out, settings.target)
    annotations = AnnotationStore(state / "annotations", studies / "labels" / "final")
    table = FolderStructures(studies, state, annotations)  # Labels go out with the names of now.
    cases = list_labelled(studies, settings.images)
    folder_ids = load_label_ids(studies)
    structures = settings.structures or _list_structures(cases, annotations, folder_ids)
    outcomes: list[ExportOutcome] = []
    written: list[str] = []
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_folder(out) as scratch:
            writer = _Writer(scratch, settings, structures, pseudonyms, table.looks())
            for case in cases:
                try:
                    notes = writer.add(_read_label(case, annotations, folder_ids))
                    written.append(case.name)
                    outcomes.append(ExportOutcome(case.name, "exported", notes))
                except StoreError:
                    raise
                except ProGiDiffError as err:
                    outcomes.append(ExportOutcome(case.name, "left out", (str(err),)))
            if settings.with_unlabelled:
                for name, path in _list_others(studies, cases, settings):
                    writer.add_unlabelled(name, path)
                    written.append(name)
                    outcomes.append(ExportOutcome(name, "exported", ("It has no label.",)))
            if not written:
                reasons = "; ".join(f"{entry.image}: {' '.join(entry.notes)}" for entry in outcomes[:5])
                raise RequestError(f"No image of '{studies}' could be exported. {reasons}")
            writer.finish(out.name)
            # Before anything is seen outside: no copy without its line, and none without its key.
            if pseudonyms is not None:
                pseudonyms.save()
            how = ", de-identified" if pseudonyms is not None else ""
            for name in written:
                annotations.note_export(name, settings.user, f"{settings.target}{how}, one of {len(written)} images")
    except OSError as err:
        raise StoreError(f"'{out}' could not be written ({err}). Free some disk space or name another folder.") from err
    return outcomes


class _Writer:
    """Files of one data set, in a folder that appears when it is complete."""

    def __init__(
        self,
        folder: Path,
        settings: ExportSettings,
        structures: Sequence[str],
        pseudonyms: Pseudonyms | None,
        looks: Mapping[str, Look],
    ) -> None:
        self._folder = folder
        self._looks = looks
        self._settings = settings
        self._pseudonyms = pseudonyms
        self._ids = self._number(structures)
        self._ignore = max(self._ids.values(), default=0) + 1
        self._has_ignored = False
        self._modality: str | None = None
        self._modalities: dict[str, str] = {}
        self._labelled: list[str] = []
        self._others: list[str] = []

    def _number(self, structures: Sequence[str]) -> dict[str, int]:
        """nnU-Net and the Decathlon count from 1 without gaps; elsewhere a structure keeps its number."""
        if self._settings.target in ("nnunet", "msd"):
            taken = [name for name in structures if name.casefold() in _TAKEN]
            if taken:
                raise RequestError(
                    f"A structure is called '{taken[0]}', which in such a data set means something else. Rename it "
                    "(POST /progidiff/annotations/<image>/rename), or leave it out with --structures."
                )
            order = sorted(structures, key=lambda name: (number_structures(structures)[name], name))
            return {name: index for index, name in enumerate(order, start=1)}
        ids = number_structures(structures)
        if self._settings.target == "files" and max(ids.values(), default=0) > MAX_LABEL_ID:
            raise RequestError(
                f"The labels speak about {len(ids)} structures, more than the {MAX_LABEL_ID} ids of a label hold. "
                "Export fewer --structures at a time."
            )
        return ids

    def add(self, label: _Label) -> tuple[str, ...]:
        """Write an image with its label; sentences about it."""
        name = self._name(label.case.name)
        labels, notes = self._draw(label)
        self._take_modality(label.case.image, name)
        self._write_image(label.case.image, name, "imagesTr")
        ids = self._ids
        target = self._settings.target
        if target == "slicer":
            save_segmentation(labels, label.grid, self._folder / f"{name}.seg.nrrd", ids, self._looks)
        elif target == "files":
            save_mask(labels, label.grid, self._make("labels/final") / f"{name}{NIFTI}")
        else:
            save_mask(labels, label.grid, self._make("labelsTr") / f"{name}{NIFTI}")
        self._labelled.append(name)
        return tuple(notes)

    def add_unlabelled(self, image: str, path: Path) -> None:
        """Write an image that has no label."""
        name = self._name(image)
        self._take_modality(path, name)
        self._write_image(path, name, "imagesTs")
        self._others.append(name)

    def finish(self, name: str) -> None:
        """Write what describes the data set. The order of other names must not be that of the names they stand for."""
        self._labelled.sort()
        self._others.sort()
        target = self._settings.target
        if target == "files":
            self._write_json(LABELS_JSON, {str(number): structure for structure, number in self._ids.items()})
            for case, modality in self._modalities.items():
                self._write_json(f"{case}.json", {"modality": modality})
        if target not in ("nnunet", "msd"):
            return
        channels = {"0": "MRI" if self._modality == "MR" and target == "msd" else self._modality or "unknown"}
        common = {
            "name": name,
            "description": f"Labels of {', '.join(self._ids)}; written by ProGiDiff Label {__version__}.",
            "reference": "",
            "licence": "",
        }
        if target == "nnunet":
            labels = {"background": 0, **self._ids, **({"ignore": self._ignore} if self._has_ignored else {})}
            numbers = {"numTraining": len(self._labelled), "file_ending": NIFTI}
            self._write_json("dataset.json", {"channel_names": channels, "labels": labels, **numbers, **common})
            return
        pairs = [
            {"image": f"./imagesTr/{case}{NIFTI}", "label": f"./labelsTr/{case}{NIFTI}"} for case in self._labelled
        ]
        names = {"0": "background", **{str(number): structure for structure, number in self._ids.items()}}
        values = {
            **common,
            "release": "1.0",
            "tensorImageSize": "3D",
            "modality": channels,
            "labels": names,
            "numTraining": len(pairs),
            "numTest": len(self._others),
            "training": pairs,
            "test": [f"./imagesTs/{case}{NIFTI}" for case in self._others],
        }
        self._write_json("dataset.json", values)

    def _name(self, image: str) -> str:
        return image if self._pseudonyms is None else self._pseudonyms.of_image(image)

    def _draw(self, label: _Label) -> tuple[NDArray[Any], list[str]]:
        """The label in the numbers of this data set."""
        notes: list[str] = []
        unspoken = [name for name in self._ids if label.spoken is not None and not _speaks(label.spoken, name)]
        if unspoken and not self._settings.assume_absent:
            raise RequestError(
                f"Its label does not say whether there is {', '.join(unspoken[:6])}. Export other --structures, or "
                "take "
                "what labels do not speak about for absent (--assume-absent)."
            )
        labels = np.zeros(label.array.shape, np.min_scalar_type(self._ignore))
        for number, name in label.names.items():
            if name in self._ids:
                labels[label.array == number] = self._ids[name]
        left = self._find_unlabelled(label)
        if left.any():
            if self._settings.target != "nnunet":
                raise RequestError(
                    f"{int(left.sum())} of its {len(left)} axial slices are not labelled, and only nnU-Net knows "
                    "voxels that "
                    "are to be ignored. Export it with --as nnunet, or label it to the end."
                )
            label.grid.arrange(labels)[left] = self._ignore
            self._has_ignored = True
            notes.append(f"{int(left.sum())} of its {len(left)} axial slices are not labelled and are to be ignored.")
        return labels, notes

    def _find_unlabelled(self, label: _Label) -> NDArray[np.bool_]:
        """Axial slices on which a structure of the data set is not vouched for."""
        left = np.zeros(label.grid.num_slices, dtype=bool)
        for name in self._ids if label.spoken is not None else ():
            slices = _find_spoken(label.spoken or {}, name)
            if slices is not None and slices:
                missing = np.ones_like(left)
                missing[sorted(slices)] = False
                left |= missing
        return left

    def _take_modality(self, path: Path, name: str) -> None:
        stated = find_stated_modality(path)
        modality = stated[0] if stated is not None else load_volume(path).modality
        wanted = self._settings.modality
        if wanted is not None and modality != wanted:
            raise RequestError(f"It is {modality}, and only {wanted} was asked for.")
        if self._settings.target in ("nnunet", "msd") and self._modality not in (None, modality):
            raise RequestError(
                f"It is {modality}, and the images before it are {self._modality}; a data set has one kind of image. "
                "Export "
                f"them one after the other, with --modality {modality}."
            )
        self._modality = self._modalities[name] = modality

    def _write_image(self, path: Path, name: str, part: str) -> None:
        target = self._settings.target
        if target == "nnunet":
            place = self._make(part) / f"{name}_0000{NIFTI}"
        elif target == "msd":
            place = self._make(part) / f"{name}{NIFTI}"
        else:
            row = find_format(path)
            kept = row.suffix if row is not None and self._pseudonyms is None else NIFTI
            place = self._folder / f"{name}{kept}"
        if self._pseudonyms is None and path.name.lower().endswith(place.name[len(name) :].removeprefix("_0000")):
            _copy(path, place, self._settings.link)
            return
        # Written anew: voxels and their place, and nothing else of what the header said.
        volume = load_volume(path)
        save_mask(volume.array, volume.grid, place)

    def _make(self, part: str) -> Path:
        folder = self._folder / part
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        (self._folder / name).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_folder(out: Path, target: Target) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"'{out}' is not empty. Name a new folder, so that no file of another data set stays in it.")
    if target == "nnunet" and not _NNUNET_FOLDER.fullmatch(out.name):
        raise RequestError(
            f"nnU-Net does not find a folder called '{out.name}': it takes Dataset, three digits and a name. Write for "
            f"example {out.with_name('Dataset501_' + (re.sub(r'[^A-Za-z0-9]', '', out.name) or 'Mine'))}."
        )


def _list_structures(
    cases: Iterable[LabelledCase], annotations: AnnotationStore, folder_ids: Mapping[str, int]
) -> tuple[str, ...]:
    """What the labels in force speak about, all together."""
    found: dict[str, None] = {}
    for case in cases:
        for save in annotations.in_force(case.name):
            found |= dict.fromkeys(map(canonical_name, save.structures or [name for name, _ in save.label_ids]))
    return tuple(found) or tuple(folder_ids)


def _read_label(case: LabelledCase, annotations: AnnotationStore, folder_ids: Mapping[str, int]) -> _Label:
    grid = read_grid(case.image)
    label = load_label_map(case.label, grid)
    saves = annotations.in_force(case.name)
    names = find_meaning(label, saves[-1] if saves else None, folder_ids, annotations.find_renamed())
    spoken: dict[str, frozenset[int] | None] | None = {} if saves else None
    for save in saves:
        for name in [canonical_name(text) for text in save.structures] or [""]:
            before = (spoken or {}).get(name, frozenset())
            slices = None if before is None or save.slices is None else before | frozenset(save.slices)
            spoken = {**(spoken or {}), name: slices}
    return _Label(case, grid, label.array, names, spoken)


def _speaks(spoken: Mapping[str, frozenset[int] | None], name: str) -> bool:
    return name in spoken or "" in spoken


def _find_spoken(spoken: Mapping[str, frozenset[int] | None], name: str) -> frozenset[int] | None:
    """The slices on which a structure is vouched for; None for all, empty for none."""
    found = [spoken[key] for key in (name, "") if key in spoken]
    if any(slices is None for slices in found):
        return None
    return frozenset().union(*(slices or frozenset() for slices in found))


def _list_others(studies: Path, cases: Iterable[LabelledCase], settings: ExportSettings) -> Iterator[tuple[str, Path]]:
    known = {case.name for case in cases}
    for name, path in list_volumes(studies).items():
        if name not in known and (settings.images is None or name in settings.images):
            yield name, path


def _copy(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError as err:
            raise StoreError(
                f"'{target.name}' cannot be a link to '{source}' ({err}). Links need both on one disk; export with "
                "--images "
                "copy."
            ) from err
    shutil.copyfile(source, target)
