"""Labelled data sets in the folders that others use: nnU-Net v2 and the Medical Segmentation Decathlon.

::

    Dataset001_Liver/                             Task03_Liver/
      dataset.json                                  dataset.json
      imagesTr/case1_0000.nii.gz                    imagesTr/case1.nii.gz      4-D where there are several channels
      labelsTr/case1.nii.gz                         labelsTr/case1.nii.gz
      imagesTs/case2_0000.nii.gz                    imagesTs/case2.nii.gz

Both have a `dataset.json` that names what the numbers in the labels mean. Here it is read, checked, and made into one
`Dataset`, whichever it was; no voxel is opened.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from progidiff.errors import NotFoundError, RequestError
from progidiff.images.formats import find_format, is_picture
from progidiff.images.modality import find_modality
from progidiff.storage.json_text import decode_json_file

Kind = Literal["nnU-Net v2", "Medical Segmentation Decathlon"]

DATASET_JSON = "dataset.json"
IGNORE = "ignore"
"""What nnU-Net calls voxels that nobody labelled."""

_MR_WORDS = frozenset(
    ["mri", "mr", "t1", "t1w", "t1gd", "t1c", "t1ce", "t2", "t2w", "flair", "adc", "dwi", "pd", "swi", "lge"]
)
_CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class DatasetCase:
    """One image of a data set.

    Attributes:
        name: As the data set calls it.
        image: Of the channel that was asked for.
        label: None if it has none.
        channel: Place along the fourth axis of the image; None if that has three.
    """

    name: str
    image: Path
    label: Path | None
    channel: int | None = None


@dataclass(frozen=True)
class Dataset:
    """A data set, as its own files describe it.

    Attributes:
        folder: Where it lies.
        kind: Whose format it has.
        names: Id in the labels -> name, without the background.
        ignore: The id of voxels that nobody labelled; None if there is none.
        channel: Name of the channel that was taken, for example "CT".
        modality: "CT" or "MR", if the channel's name says so; None otherwise.
        cases: Those for training, then those for testing if they were asked for.
        missing: What dataset.json names and the folder does not have, one sentence each.
    """

    folder: Path
    kind: Kind
    names: Mapping[int, str]
    ignore: int | None
    channel: str
    modality: str | None
    cases: tuple[DatasetCase, ...]
    missing: tuple[str, ...] = ()


def find_kind(folder: Path) -> Kind | None:
    """Whose format a folder has; None if it has no dataset.json.

    Raises:
        RequestError: if its dataset.json is none of either.
    """
    if not (folder / DATASET_JSON).is_file():
        return None
    values = _read_json(folder)
    if "channel_names" in values or "file_ending" in values:
        return "nnU-Net v2"
    if isinstance(values.get("training"), list) or "tensorImageSize" in values:
        return "Medical Segmentation Decathlon"
    raise RequestError(
        f"'{folder / DATASET_JSON}' has neither channel_names (nnU-Net v2) nor a list of training cases (Medical "
        "Segmentation Decathlon). Name the folder of a data set of either."
    )


def read_dataset(
    folder: Path, channel: str | None = None, told: Mapping[int, str] | None = None, with_test: bool = False
) -> Dataset:
    """Read what a data set says of itself.

    Args:
        folder: With dataset.json.
        channel: Which of several channels to take, by name or number; None where there is one.
        told: Id -> name, in place of what dataset.json says.
        with_test: Whether the images for testing are wanted too.

    Raises:
        NotFoundError: if there is no dataset.json.
        RequestError: if dataset.json is damaged, has labels that are regions of several ids, or several channels and
            none was chosen.
    """
    kind = find_kind(folder)
    if kind is None:
        raise NotFoundError(
            f"'{folder}' has no {DATASET_JSON}. Name the folder that holds it, with imagesTr beside it."
        )
    values = _read_json(folder)
    names, ignore = _read_labels(values.get("labels"), folder, told or {})
    if kind == "nnU-Net v2":
        channels = _read_channels(values.get("channel_names"), folder)
        index = _pick_channel(channels, channel, folder)
        cases, missing = _list_nnunet(folder, values, channels, index, with_test)
    else:
        channels = _read_channels(values.get("modality"), folder)
        index = _pick_channel(channels, channel, folder)
        cases, missing = _list_decathlon(folder, values, index if len(channels) > 1 else None, with_test)
    if not cases:
        raise RequestError(f"'{folder}' holds no image that its {DATASET_JSON} speaks of. Check that it was unpacked.")
    return Dataset(
        folder,
        kind,
        names,
        ignore,
        channels[index],
        find_channel_modality(channels[index]),
        tuple(cases),
        tuple(missing),
    )


def find_channel_modality(channel: str) -> str | None:
    """The modality that the name of a channel says; None if it says none.

    Example:
        >>> find_channel_modality("CT"), find_channel_modality("MRI"), find_channel_modality("T1w"), \
                find_channel_modality("zscore")
        ('CT', 'MR', 'MR', None)
    """
    row = find_modality(channel)
    if row is not None:
        return row.name
    words = set(re.split(r"[^a-z0-9]+", channel.lower()))
    return "MR" if words & _MR_WORDS else None


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / DATASET_JSON
    try:
        values = json.loads(decode_json_file(path.read_bytes()))
    except (OSError, ValueError) as err:
        raise RequestError(f"'{path}' cannot be read as JSON ({err}). Copy it again.") from err
    if not isinstance(values, dict):
        raise RequestError(f"'{path}' holds no JSON object. Copy it again from the data set.")
    return values


def _read_labels(labels: object, folder: Path, told: Mapping[int, str]) -> tuple[dict[int, str], int | None]:
    """Id -> name without the background, and the id of what nobody labelled."""
    if not isinstance(labels, Mapping) or not labels:
        raise RequestError(
            f'\'{folder / DATASET_JSON}\' has no "labels". Add them, for example {{"background": 0, "liver": 1}}.'
        )
    names: dict[int, str] = {}
    regions: dict[str, list[int]] = {}
    ignore: int | None = None
    for key, value in labels.items():
        if isinstance(value, (list, tuple)) and len(value) > 1:
            regions[str(key)] = [_read_id(part, folder) for part in value]
            continue
        single = value[0] if isinstance(value, (list, tuple)) and value else value
        # nnU-Net has {"liver": 1}; the Decathlon, and nnU-Net before version 2, {"1": "liver"}.
        number, name = (
            (int(key), str(single))
            if str(key).isdecimal() and isinstance(single, str) and not single.isdecimal()
            else (_read_id(single, folder), str(key))
        )
        if name.casefold() == IGNORE and number:
            ignore = number
        elif number and names.setdefault(number, name) != name:
            raise RequestError(
                f"'{folder / DATASET_JSON}' calls the id {number} both '{names[number]}' and '{name}'. Correct it."
            )
    covered = {number for ids in regions.values() for number in ids}
    unnamed = sorted(covered - told.keys())
    if regions and unnamed:
        listed = "; ".join(f"'{name}' is {', '.join(map(str, ids))}" for name, ids in regions.items())
        raise RequestError(
            f"The labels of '{folder.name}' are regions of several ids ({listed}), and a label here has one structure "
            "per voxel. Say what each id alone is, for example "
            + " ".join(f'--label {number}="..."' for number in unnamed)
            + "."
        )
    names = {**names, **{number: name for number, name in told.items() if number}}
    return dict(sorted(names.items())), ignore


def _read_id(value: object, folder: Path) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise RequestError(
            f"The labels in '{folder / DATASET_JSON}' have {str(value)[:40]!r} where an id belongs; ids are whole "
            "numbers "
            "from 0. Correct it."
        )
    return int(str(value))


def _read_channels(channels: object, folder: Path) -> list[str]:
    if not isinstance(channels, Mapping) or not channels:
        raise RequestError(
            f'\'{folder / DATASET_JSON}\' does not name its channels. Add "channel_names" (nnU-Net v2) or "modality" '
            '(Decathlon), for example {"0": "CT"}.'
        )
    return [
        str(name)
        for _, name in sorted(channels.items(), key=lambda item: int(item[0]) if str(item[0]).isdecimal() else 0)
    ]


def _pick_channel(channels: Sequence[str], wanted: str | None, folder: Path) -> int:
    """The place of the channel that is wanted."""
    listed = ", ".join(f"{index} {name}" for index, name in enumerate(channels))
    if wanted is None:
        if len(channels) > 1:
            raise RequestError(
                f"'{folder.name}' has {len(channels)} channels ({listed}), and an image here has one. Choose it, for "
                f"example --channel {channels[0]}."
            )
        return 0
    named = [index for index, name in enumerate(channels) if name.casefold() == wanted.casefold()]
    if named:
        return named[0]
    if wanted.isdecimal() and int(wanted) < len(channels):
        return int(wanted)
    raise RequestError(f"'{folder.name}' has no channel '{wanted[:40]}'; it has {listed}.")


def _list_nnunet(
    folder: Path, values: Mapping[str, Any], channels: Sequence[str], index: int, with_test: bool
) -> tuple[list[DatasetCase], list[str]]:
    ending = str(values.get("file_ending", ".nii.gz"))
    row = find_format(f"case{ending}")
    if row is None or "/" in ending:
        raise RequestError(
            f"Files of '{folder.name}' end in '{ending[:20]}', which is not read here. Convert them to .nii.gz, and "
            "say so "
            f"in {DATASET_JSON} (file_ending)."
        )
    listed = values.get("dataset")
    if isinstance(listed, Mapping) and listed:
        return _list_named(folder, listed, index)
    cases: list[DatasetCase] = []
    missing: list[str] = []
    for images, labels in [("imagesTr", "labelsTr"), *([("imagesTs", "")] if with_test else [])]:
        found: dict[str, dict[int, Path]] = {}
        for path in sorted((folder / images).glob(f"*{ending}")):
            match = _CHANNEL.fullmatch(path.name[: -len(ending)])
            if match and not path.name.startswith("."):
                found.setdefault(match[1], {})[int(match[2])] = path
        for name, files in found.items():
            # A colour picture has its three channels in one file.
            image = files.get(0 if is_picture(f"x{ending}") and len(files) == 1 else index)
            if image is None:
                missing.append(f"'{name}' has no file of channel {index} ({channels[index]}), so it is left out.")
                continue
            cases.append(DatasetCase(name, image, _find_label(folder, labels, name, ending, missing)))
    return cases, missing


def _find_label(folder: Path, labels: str, name: str, ending: str, missing: list[str]) -> Path | None:
    if not labels:
        return None
    label = folder / labels / f"{name}{ending}"
    if label.is_file():
        return label
    missing.append(f"'{name}' has no label in {labels}; its image comes without one.")
    return None


def _list_named(folder: Path, listed: Mapping[str, Any], index: int) -> tuple[list[DatasetCase], list[str]]:
    """The cases of a dataset.json that names every file, as nnU-Net v2 allows since 2.2."""
    cases: list[DatasetCase] = []
    missing: list[str] = []
    for name, entry in listed.items():
        images = entry.get("images") if isinstance(entry, Mapping) else None
        if not isinstance(images, list) or not images:
            raise RequestError(f"The case '{str(name)[:40]}' in '{folder / DATASET_JSON}' names no images. Correct it.")
        image = _resolve(folder, str(images[min(index, len(images) - 1)]))
        label = _resolve(folder, str(entry["label"])) if entry.get("label") else None
        if not image.is_file():
            missing.append(f"'{name}' has no image '{image.name}', so it is left out.")
            continue
        cases.append(DatasetCase(str(name), image, label if label is not None and label.is_file() else None))
    return cases, missing


def _list_decathlon(
    folder: Path, values: Mapping[str, Any], channel: int | None, with_test: bool
) -> tuple[list[DatasetCase], list[str]]:
    cases: list[DatasetCase] = []
    missing: list[str] = []
    training = values.get("training")
    test = values.get("test") if with_test else []
    for entry in [*(training if isinstance(training, list) else []), *(test if isinstance(test, list) else [])]:
        pair = entry if isinstance(entry, Mapping) else {"image": entry}
        if not isinstance(pair.get("image"), str):
            raise RequestError(
                f"'{folder / DATASET_JSON}' lists {str(entry)[:60]} where a case belongs, such as "
                '{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}.'
            )
        image = _resolve(folder, pair["image"])
        name = _strip(image)
        if not image.is_file():
            missing.append(f"'{name}' has no image at '{pair['image']}', so it is left out.")
            continue
        label = _resolve(folder, pair["label"]) if isinstance(pair.get("label"), str) else None
        if label is not None and not label.is_file():
            missing.append(f"'{name}' has no label at '{pair['label']}'; its image comes without one.")
            label = None
        cases.append(DatasetCase(name, image, label, channel))
    return cases, missing


def _strip(path: Path) -> str:
    row = find_format(path)
    return path.name if row is None else path.name[: -len(row.suffix)]


def _resolve(folder: Path, name: str) -> Path:
    """A file that dataset.json names; it must lie in the data set's folder."""
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts:
        raise RequestError(
            f"'{folder / DATASET_JSON}' names '{name[:80]}', which lies outside of the data set. Copy it in, and name "
            "it "
            "relative to the folder."
        )
    return folder / relative
