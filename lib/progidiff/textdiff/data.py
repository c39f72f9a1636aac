"""Labelled pictures in the layouts people have them in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.images.formats import Use, is_picture, list_suffixes
from progidiff.textdiff.pictures import read_label
from progidiff.textdiff.sentences import find_sentence, read_sentences

IMAGE_FOLDERS = ("images", "image", "imgs", "img")
LABEL_FOLDERS = (
    "labels", "masks", "ground-truths", "ground_truths", "groundtruths", "label", "mask",
    "labelcol", "gts", "gt", "ground-truth", "ground_truth", "groundtruth", "ground truths", "ground truth",
)  # fmt: skip
TEXT_NAMES = ("text.csv", "text.xlsx", "texts.csv", "sentences.csv")


@dataclass(frozen=True)
class PictureCase:
    """A picture with what is known of it.

    Attributes:
        name: File name without suffix.
        image: Where it lies.
        label: Its mask; None if there is none.
        sentence: What a report says of it; None if there is none.
        unknown: Numbers of the classes that the label says nothing about: what it shows as background may be one of
            them.
    """

    name: str
    image: Path
    label: Path | None = None
    sentence: str | None = None
    unknown: tuple[int, ...] = ()


def find_cases(images: Path, labels: Path | None = None, text: Path | None = None) -> list[PictureCase]:
    """Find pictures, their masks and sentences.

    Layouts, recognised by what is there (folder names in any case):

    * ``images/ labels/ text.csv`` (MoNuSeg): give `images` and, if they lie elsewhere, `labels` and `text`;
    * ``Images/ Masks/``, ``Images/ Ground-truths/mask_<name>.png`` or ``Images/ GTs/`` with a table of "Image" and
      "Description" (QaTa-COVID19), and ``img/ labelcol/`` as LViT's code lays it out;
    * a MONAI Label local datastore: pictures at the top, ``labels/final/``, ``text.csv`` beside them.

    Args:
        images: The folder of the pictures, or the folder above it.
        labels: Folder of the masks; None to look for it. Matched by name without suffix, ``mask_`` before it or
            ``_mask`` after it allowed.
        text: Table of the sentences, see `sentences.read_sentences`; None to look for it.

    Returns:
        Cases by name; those without a label or a sentence too.

    Raises:
        RequestError: if a folder or table does not exist, there are no pictures, two files claim one name, or none of
            the labels or sentences that were asked for belongs to a picture.
    """
    folder = _find_pictures(images)
    pictures = _by_name(_list_pictures(folder), folder)
    # The folder that labels and table lie in: that of the pictures in a datastore, else the one above.
    above = folder.parent if folder.name.lower() in IMAGE_FOLDERS else folder
    masks: dict[str, Path] = {}
    label_folder = labels if labels is not None else _find_below(above, LABEL_FOLDERS)
    if label_folder is not None:
        if not label_folder.is_dir():
            raise RequestError(f"The folder of labels '{label_folder}' does not exist; check its path.")
        if not _list_pictures(label_folder) and (label_folder / "final").is_dir():
            label_folder /= "final"
        masks = _match_masks(_list_pictures(label_folder), pictures, label_folder)
        if labels is not None and not masks:
            raise RequestError(
                f"No label in '{label_folder}' has the name of a picture in '{folder}'; "
                "labels and pictures are matched by name."
            )
    table = text if text is not None else _find_table(above, folder)
    sentences = {} if table is None else read_sentences(table)
    found = {
        name: find_sentence(sentences, path.name) or _find_masked_sentence(sentences, masks.get(name))
        for name, path in pictures.items()
    }
    if text is not None and not any(found.values()):
        raise RequestError(
            f"No row of '{text}' names a picture in '{folder}'; its column 'image' must hold file names."
        )
    return [PictureCase(name, path, masks.get(name), found[name]) for name, path in sorted(pictures.items())]


def pick_cases(cases: Sequence[PictureCase], names: Sequence[str]) -> list[PictureCase]:
    """Cases by name, with or without suffix, in the order of `names`.

    Raises:
        RequestError: naming those there are not.
    """
    known = {case.name: case for case in cases} | {case.image.name: case for case in cases}
    strange = [name for name in names if name not in known]
    if strange:
        raise RequestError(
            f"There is no picture {', '.join(repr(n) for n in strange[:5])}; there are: "
            f"{_some(case.name for case in cases)}."
        )
    return list({known[name].name: known[name] for name in names}.values())


def read_classes(case: PictureCase, size: tuple[int, int], classes: int) -> NDArray[Any]:
    """The mask of a case as class numbers.

    0 stays background. With one class everything above 0 is it (masks of 0 and 255); with more, values are class
    numbers.

    Args:
        case: With a label.
        size: (H, W) of its picture.
        classes: Foreground classes.

    Returns:
        (H, W) uint8; all zero is a mask like any other.

    Raises:
        GeometryError: if picture and mask differ in size.
        ImageError: if the mask cannot be read or holds a number below 0 or above `classes`.
    """
    if case.label is None:
        raise ImageError(f"The picture '{case.name}' has no label; add one, or leave it out.")
    values, _ = read_label(case.label)
    if values.shape != tuple(size):
        raise GeometryError(
            f"The label '{case.label.name}' has {values.shape[0]} x {values.shape[1]} pixels, its picture "
            f"'{case.image.name}' {size[0]} x {size[1]} (height x width); they must lie on one grid."
        )
    if values.min() < 0:
        raise ImageError(
            f"The label '{case.label.name}' holds {values.min()}; class numbers start at 0, the background."
        )
    if classes == 1:
        return (values > 0).astype(np.uint8)
    if values.max() > classes:
        raise ImageError(
            f"The label '{case.label.name}' holds class {values.max()}; {classes} were "
            "named. Name all with --classes, in their order."
        )
    return values.astype(np.uint8)


def _find_pictures(images: Path) -> Path:
    if not images.is_dir():
        raise RequestError(f"The folder of pictures '{images}' does not exist; check its path.")
    if _list_pictures(images):
        return images
    below = _find_below(images, IMAGE_FOLDERS)
    if below is not None and _list_pictures(below):
        return below
    suffixes = ", ".join(list_suffixes(Use.UPLOAD, "picture"))
    raise RequestError(f"'{images}' holds no pictures ({suffixes}); name the folder they lie in.")


def _list_pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if is_picture(p) and p.is_file() and not p.name.startswith("."))


def _find_below(folder: Path, names: Sequence[str]) -> Path | None:
    there = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _find_table(*folders: Path) -> Path | None:
    """A table by one of the usual names, else the only one that has "text" in its name."""
    for folder in dict.fromkeys(folders):
        there = {p.name.lower(): p for p in sorted(folder.iterdir()) if p.is_file()}
        for name in TEXT_NAMES:
            if name in there:
                return there[name]
        other = [p for name, p in there.items() if "text" in name and p.suffix.lower() in (".csv", ".xlsx")]
        if len(other) == 1:
            return other[0]
    return None


def _by_name(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for path in paths:
        if path.stem in named:
            raise RequestError(
                f"'{named[path.stem].name}' and '{path.name}' in '{folder}' have one name without suffix, by which "
                "labels are matched; rename one."
            )
        named[path.stem] = path
    return named


def _match_masks(masks: Sequence[Path], pictures: dict[str, Path], folder: Path) -> dict[str, Path]:
    matched: dict[str, Path] = {}
    for path in masks:
        stem = path.stem
        name = next((n for n in (stem, stem.removeprefix("mask_"), stem.removesuffix("_mask")) if n in pictures), None)
        if name is None:
            continue
        if name in matched:
            raise RequestError(
                f"'{matched[name].name}' and '{path.name}' in '{folder}' are both labels of '{name}'; keep one."
            )
        matched[name] = path
    return matched


def _find_masked_sentence(sentences: dict[str, str], mask: Path | None) -> str | None:
    """QaTa-COVID19's table names masks, not pictures."""
    return None if mask is None else find_sentence(sentences, mask.name)


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
