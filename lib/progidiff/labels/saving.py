"""A label before it counts: opened, checked against its image, its ids translated, and joined with the label before it.

Ids. What a number in a file means is said by, in this order: the file itself (see `segments`), the table that came with
the save (`label_info`; 3D Slicer numbers its segments by position), the fixed ids of this program if the save names the
proposal that it was made from, the folder's labels.json, and without that the fixed ids again. A table that contradicts
the file is refused: nobody can tell which of them the person meant. Kept labels use one set of ids: labels.json, or
without it the fixed ids; structures that neither knows get the next free id. A file whose ids say otherwise is
rewritten, and only then.

Joining. A save replaces what it speaks about: its slices, if it names slices; its structures, if it names structures.
All else of the label in force stays, so that work slice by slice, or structure by structure, never loses what was done
before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, NotFoundError, RequestError
from progidiff.images.formats import Use, find_format, is_picture, list_suffixes
from progidiff.images.geometry import Grid
from progidiff.images.writing import save_mask
from progidiff.labels.cases import LABELS_JSON, read_label_names
from progidiff.labels.history import Annotation, Source
from progidiff.labels.segments import (
    MAX_NAME,
    LabelMap,
    Look,
    clean_text,
    combine_names,
    is_unnamed,
    load_label_map,
    name_code,
    read_color,
)
from progidiff.params import read_bool, read_choice, read_float, read_int
from progidiff.prompts.parser import canonical_name
from progidiff.prompts.structures import LAST_LABEL_ID, Code, fixed_ids
from progidiff.proposals.request import BEST, CONSENSUS
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals

MERGED = "merged"
"""What `shown` says of a mask that a person put together from several proposals."""

MAX_LABEL_ID = 255
"""Masks are 8 bits for every viewer."""

REVIEW_PAGE = "review page"
"""The client of what is decided on the review page. It speaks about one structure after the other, so that a save of a
whole volume does not say that nothing is left to do on it.
"""

RENAMED = "rename"
"""The client of a save that gave a structure another name."""

UNKNOWN_SEED = -1
"""Of a `Source` whose proposals are no longer kept."""

_KEY = re.compile(r"[0-9a-f]{64}")
_MAX_NAMES = 255
_MAX_SECONDS = 7 * 24 * 3600.0
_MAX_CLICKS = 10**6
_MAX_EDITS = 10**9


@dataclass(frozen=True)
class SaveOptions:
    """What a save says about its label; everything may be left out.

    Attributes:
        slices: Axial slices that it annotates, ascending; None if not said.
        structures: Structures that it speaks about; None if not said.
        proposals: Key of the proposals that it was made from; "" if not said.
        shown: Which of them: "consensus", "best", a number, or `MERGED`.
        edited: Whether the person changed it; None if not said.
        seconds: Time spent; None if not said.
        label_names: Id in the file -> structure; None if not said.
        client: What sent it.
        effort: (structure, seconds, clicks) that a person spent.
        edits: Strokes and other changes with which it was drawn by hand; None if not said.
        is_as_proposed: Whether it was drawn from these proposals and nothing else, however they overlap, so that there
            is nothing to compare.
        confirm: Whether names that are nearly known ones are meant as they stand.
        looks: Structure -> colour and code, of those that came with one.
    """

    slices: tuple[int, ...] | None = None
    structures: tuple[str, ...] | None = None
    proposals: str = ""
    shown: str = CONSENSUS
    edited: bool | None = None
    seconds: float | None = None
    label_names: Mapping[int, str] | None = None
    client: str = ""
    effort: tuple[tuple[str, float, int], ...] = ()
    is_as_proposed: bool = False
    edits: int | None = None
    confirm: bool = False
    looks: Mapping[str, Look] = field(default_factory=dict)

    @classmethod
    def from_params(cls, params: Mapping[str, Any], num_slices: int) -> SaveOptions:
        """Read the parameters of a save; names that mean nothing here are left to the datastore.

        Args:
            params: As sent: slices, structures, proposals, shown, edited, seconds, label_info, client_id, effort,
                as_proposed, confirm.
            num_slices: Axial slices of the image.

        Raises:
            RequestError: if one of them is malformed or out of range.

        Example:
            >>> options = SaveOptions.from_params({"slices": [4, "3"], "label_info": [{"name": "Liver", "idx": 1}]}, 8)
            >>> options.slices, options.label_names
            ((3, 4), {1: 'liver'})
        """
        given = {name: value for name, value in params.items() if value is not None and value != ""}
        proposals = given.get("proposals", "")
        if proposals and not (isinstance(proposals, str) and _KEY.fullmatch(proposals)):
            raise RequestError(
                "Option proposals is no key of kept proposals; send the `proposals` of "
                "the answer that the mask came with, or nothing."
            )
        return cls(
            slices=_read_slices(given.get("slices"), num_slices),
            structures=_read_structures(given.get("structures")),
            proposals=proposals,
            shown=_read_shown(given.get("shown", CONSENSUS)),
            edited=None if "edited" not in given else read_bool(given["edited"], "edited"),
            seconds=None if "seconds" not in given else read_float(given["seconds"], "seconds", 0, _MAX_SECONDS),
            label_names=_read_label_info(given.get("label_info"), given.get("label_names")),
            client=str(given.get("client_id", ""))[:MAX_NAME],
            effort=read_effort(given.get("effort")),
            is_as_proposed=read_bool(given.get("as_proposed", False), "as_proposed"),
            edits=None if "edits" not in given else read_int(given["edits"], "edits", 0, _MAX_EDITS),
            confirm=read_bool(given.get("confirm", False), "confirm"),
            looks=_read_looks(given.get("label_info")),
        )


@dataclass(frozen=True)
class CheckedLabel:
    """A label that was opened and fits its image.

    Attributes:
        file: Where it lies.
        array: Ids as kept labels use them, shape (I, J, K) in file order.
        label_ids: Structure -> id, of everything that the file draws or its table names.
        kept_ids: Structure -> id as kept labels use them, whether drawn or not.
        is_as_sent: Whether the file itself can be kept; False if ids were translated, layers joined, or the format is
            not kept.
        notes: Sentences for the person who saved.
    """

    file: Path
    array: NDArray[Any]
    label_ids: dict[str, int]
    kept_ids: Mapping[str, int]
    is_as_sent: bool
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Previous:
    """The label in force before a save.

    Attributes:
        file: On the image's grid.
        label_ids: Structure -> id; empty if it was made elsewhere.
        slices: Axial slices annotated so far; None for all.
        structures: That it speaks about.
    """

    file: Path
    label_ids: Mapping[str, int]
    slices: frozenset[int] | None
    structures: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReadyLabel:
    """A label as it is to be kept, and what `AnnotationStore.record` is to say about it.

    Attributes:
        file: What was sent, or a new file in the scratch folder.
        slices, structures, source, edited, seconds, client, num_slices, effort, edits: See
            `annotations.Annotation`.
        label_ids: Structure -> id.
        warnings: Sentences for the person who saved.
        looks: Structure -> colour and code that came with it.
        confirm: See `SaveOptions`.
    """

    file: Path
    slices: tuple[int, ...] | None
    structures: tuple[str, ...]
    source: Source | None
    edited: bool | None
    seconds: float | None
    client: str
    num_slices: int
    label_ids: dict[str, int]
    warnings: tuple[str, ...] = ()
    effort: tuple[tuple[str, float, int], ...] = ()
    edits: int | None = None
    looks: Mapping[str, Look] = field(default_factory=dict)
    confirm: bool = False


def load_label_ids(folder: Path, served_ids: Mapping[str, int] | None = None) -> dict[str, int]:
    """Structure -> id as labels of a folder use them: its labels.json, or the ids that answers use.

    Args:
        served_ids: Those of answers about a picture; None for the fixed ids.

    Raises:
        RequestError: if labels.json is something else.
    """
    path = folder / LABELS_JSON
    if not path.exists():
        return fixed_ids() if served_ids is None else dict(served_ids)
    names = {canonical_name(name): value for value, name in read_label_names(path).items()}
    if any(value > MAX_LABEL_ID for value in names.values()):
        raise RequestError(
            f"'{path}' has ids outside 1 to {MAX_LABEL_ID}, so no label can be saved. Number the structures from 1."
        )
    return names


def combine_ids(folder_ids: Mapping[str, int], previous: Previous | None, names: Iterable[str] = ()) -> dict[str, int]:
    """The ids of a folder, and those of the label in force for structures that the folder does not name.

    A folder may bring more structures than a label has ids. Where those of others leave no room for a label's, it has
    numbers of its own: what they mean is kept beside each label.

    Args:
        folder_ids: Structure -> id.
        previous: The label in force; None if there is none.
        names: What the label draws or speaks of.

    Example:
        >>> combine_ids({"liver": 1}, Previous(Path("x"), {"liver": 6, "tumour": 14, "cyst": 1}, None))
        {'liver': 1, 'tumour': 14, 'cyst': 15}
    """
    ids = _add_previous(folder_ids, previous)
    missing = [name for name in dict.fromkeys(names) if name not in ids]
    if max([LAST_LABEL_ID, *ids.values()]) + len(missing) > MAX_LABEL_ID:
        ids = _add_previous({name: ids[name] for name in fixed_ids() if name in folder_ids}, previous)
    return ids


def _add_previous(folder_ids: Mapping[str, int], previous: Previous | None) -> dict[str, int]:
    ids = dict(folder_ids)
    others = {} if previous is None else {name: value for name, value in previous.label_ids.items() if name not in ids}
    ids |= {name: value for name, value in others.items() if value not in folder_ids.values()}
    return {**ids, **_number_next(others, ids)}


def open_label(file: Path, grid: Grid) -> LabelMap:
    """Read a label that somebody sent, and nothing else: it may take long, so whoever holds a lock has it done before.

    Args:
        file: As sent.
        grid: Of its image.

    Raises:
        ImageError: if it cannot be read, or holds anything but whole numbers.
        GeometryError: if it is not on the image's grid.
    """
    _check_suffix(file)
    try:
        return load_label_map(file, grid)
    except OverflowError as err:
        raise ImageError(
            f"'{file.name}' holds infinite values, so it is no label map; save it with whole numbers."
        ) from err


def check_label(
    file: Path,
    label: LabelMap,
    options: SaveOptions,
    kept_ids: Mapping[str, int],
    served_ids: Mapping[str, int] | None = None,
) -> CheckedLabel:
    """Refuse a label that cannot count, and translate its ids.

    Args:
        file: As sent.
        label: What `open_label` read from it.
        options: What was sent along.
        kept_ids: Structure -> id as kept labels use them, see `combine_ids`.
        served_ids: Structure -> id as answers use them; None for the fixed ids.

    Raises:
        ImageError: if it holds ids that nothing names.
        RequestError: if the file and `label_info` name an id differently.
    """
    _check_agreement(label, options)
    present = _find_present(label.array)
    meaning = _find_meaning(label, options, kept_ids, served_ids)
    strange = [value for value in present if value not in meaning]
    if strange:
        known = ", ".join(f"{value} {name}" for value, name in sorted(meaning.items()))
        raise ImageError(
            f"The label holds the ids {', '.join(map(str, strange[:8]))}, which nothing "
            f"names. Known are {known[:600]}. Send a table of the others "
            'with it, for example params={"label_info": [{"name": "liver", "idx": 6}]}, or name them in labels.json.'
        )
    tables = [label.names, *([options.label_names or {}] if label.is_as_stored else [])]
    spoken_of = sorted({*present, *(value for table in tables for value in table)})
    ids = _assign_ids([meaning[value] for value in spoken_of], kept_ids)
    table = {value: ids[meaning[value]] for value in present}
    is_same = all(value == number for value, number in table.items())
    array = label.array if is_same else translate(label.array, table)
    is_as_sent = is_same and label.is_as_stored and _is_kept(file)
    return CheckedLabel(file, array, ids, kept_ids, is_as_sent, (*label.notes, *_note_unnamed(meaning, present)))


def prepare_label(
    checked: CheckedLabel,
    grid: Grid,
    options: SaveOptions,
    image: str,
    previous: Previous | None,
    proposals: ProposalStore | None,
    scratch: Path,
) -> ReadyLabel:
    """Find out what a label annotates and join it with the one in force.

    Args:
        checked: Of `check_label`.
        grid: Of the image.
        options: What was sent along.
        image: Its id.
        previous: The label in force; None if there is none.
        proposals: Where proposals are kept; None if nowhere.
        scratch: Folder for a file that has to be written.

    Raises:
        RequestError: if the proposals are of another image, or there is no such proposal.
        ImageError: if the label in force cannot be read.
    """
    warnings = list(checked.notes)
    num_slices = grid.num_slices
    source, result = _find_source(options, image, proposals, warnings)
    ids = dict(checked.label_ids)
    if options.structures is not None:
        ids = _assign_ids([*ids, *options.structures], {**checked.kept_ids, **ids})
    differing = _find_differing(checked.array, grid, options, result, {**checked.kept_ids, **ids})
    slices = options.slices
    if slices is None and differing:
        slices = differing
    edited = options.edited
    if differing is not None:
        edited = bool(differing if slices is None else set(differing) & set(slices))
    structures = _find_structures(checked, options, result, previous if slices is None else None)

    array = checked.array
    is_partial = slices is not None or options.structures is not None
    if is_partial:
        chosen = None if options.structures is None else [ids[name] for name in options.structures]
        # Slices that were only found by comparing came with a whole label: the rest of it counts where nobody annotated
        # before.
        replaced = (
            slices if options.slices is not None or slices is None else _add_untouched(slices, previous, num_slices)
        )
        array = _join(array, previous, grid, replaced, chosen, checked.kept_ids)
        if previous is not None:
            ids = {**{name: checked.kept_ids[name] for name in previous.label_ids}, **ids}
    if checked.is_as_sent and (array is checked.array or np.array_equal(array, checked.array)):
        file = checked.file
    else:
        file = save_mask(array, grid, scratch / ("label.png" if is_picture(checked.file) else "label.nii.gz"))
    return ReadyLabel(
        file,
        slices,
        structures,
        source,
        edited,
        options.seconds,
        options.client,
        num_slices,
        ids,
        tuple(warnings),
        options.effort,
        options.edits,
    )


def prepare_renamed(
    old: str,
    new: str,
    grid: Grid,
    saves: Sequence[Annotation],
    previous: Previous,
    kept_ids: Mapping[str, int],
    scratch: Path,
) -> ReadyLabel:
    """The label in force with another name for one of its structures, as a save of its own.

    It speaks about the new name only, on the slices on which somebody spoke about the old one; what the other saves say
    stays. If both names are drawn already they are one structure then.

    Args:
        old: As the label has it, in any spelling.
        new: A name that says what it is.
        grid: Of the image.
        saves: In force, oldest first.
        previous: What they say together.
        kept_ids: Structure -> id as kept labels use them, see `combine_ids`.
        scratch: Folder for the file.

    Raises:
        RequestError: if the new name is none.
        NotFoundError: if the label has no structure of the old name.
    """
    name = _read_name(new, "new")
    if is_unnamed(name):
        raise RequestError(f"'{name}' does not say what is drawn either. Give a name such as 'liver'.")
    wanted = canonical_name(old).casefold()
    found = next((own for own in previous.label_ids if canonical_name(own).casefold() == wanted), None)
    if found is None:
        raise NotFoundError(
            f"The label has no structure '{old[:60]}'; it has {', '.join(previous.label_ids) or 'none'}."
        )
    ids = {own: kept_ids[own] for own in previous.label_ids if own != found}
    ids |= _assign_ids([name], kept_ids)
    array = translate(_load_previous(previous, grid, kept_ids), {kept_ids[found]: ids[name]})
    speaking = [save for save in saves if not save.structures or found in map(canonical_name, save.structures)] or saves
    slices = None
    if all(save.slices is not None for save in speaking):
        slices = tuple(sorted({z for save in speaking for z in save.slices or ()}))
    suffix = "label.png" if is_picture(previous.file) else "label.nii.gz"
    file = save_mask(array, grid, scratch / suffix)
    return ReadyLabel(file, slices, (name,), saves[-1].source, True, None, RENAMED, grid.num_slices, ids)


def translate(array: NDArray[Any], table: Mapping[int, int]) -> NDArray[Any]:
    """Other ids in a label map; what the table does not name stays.

    Example:
        >>> translate(np.array([[[0, 1, 2]]], np.uint8), {1: 6, 2: 1}).tolist()
        [[[0, 6, 1]]]
    """
    result = array.astype(np.uint8 if max([int(array.max()), *table.values()]) <= MAX_LABEL_ID else np.uint32)
    for value, number in table.items():
        result[array == value] = number
    return result


def _join(
    new: NDArray[Any],
    previous: Previous | None,
    grid: Grid,
    slices: Iterable[int] | None,
    chosen: list[int] | None,
    kept_ids: Mapping[str, int],
) -> NDArray[Any]:
    """`new` on the slices (None: all) and for the ids (None: all), and the label in force elsewhere."""
    before = np.zeros_like(new) if previous is None else _load_previous(previous, grid, kept_ids)
    result = before.astype(np.promote_types(before.dtype, new.dtype))
    target, source = grid.arrange(result), grid.arrange(new)
    for z in range(len(target)) if slices is None else slices:
        if chosen is None:
            target[z] = source[z]
        else:
            target[z][np.isin(target[z], chosen)] = 0
            drawn = np.isin(source[z], chosen)
            target[z][drawn] = source[z][drawn]
    return result


def _load_previous(previous: Previous, grid: Grid, kept_ids: Mapping[str, int]) -> NDArray[Any]:
    """The label in force, in the ids that kept labels use now: labels.json may have changed since."""
    try:
        label = load_label_map(previous.file, grid)
    except ImageError as err:
        raise ImageError(
            f"The label in force cannot be joined with this one ({err}) Save a label of the whole volume, without "
            "slices and structures, or delete the old one first."
        ) from err
    names = combine_names(label.names, {value: name for name, value in previous.label_ids.items()})
    table = {value: kept_ids[name] for value, name in names.items() if kept_ids.get(name, value) != value}
    return translate(label.array, table) if table else label.array


def _add_untouched(slices: tuple[int, ...], previous: Previous | None, num_slices: int) -> list[int]:
    kept: frozenset[int] | set[int] = frozenset()
    if previous is not None:
        kept = set(range(num_slices)) if previous.slices is None else previous.slices
    return sorted((set(range(num_slices)) - kept) | set(slices))


def _find_source(
    options: SaveOptions, image: str, proposals: ProposalStore | None, warnings: list[str]
) -> tuple[Source | None, VolumeProposals | None]:
    if not options.proposals:
        return None, None
    entries = {} if proposals is None else {entry.key: entry for entry in proposals.list()}
    entry = entries.get(options.proposals)
    if entry is not None and entry.image_id != image:
        raise RequestError(
            f"These proposals are of image '{entry.image_id}', not of '{image}'. Save the label under its own image."
        )
    result = proposals.load(options.proposals) if proposals is not None and entry is not None else None
    if result is None:
        warnings.append(
            "The proposals that this label was made from are no longer kept; whether it "
            "was edited is taken from the request."
        )
        return Source(options.proposals, options.shown, "", "", UNKNOWN_SEED), None
    return Source(
        options.proposals, options.shown, result.model_version, result.adapter, result.seed, result.steering
    ), result


def _find_differing(
    array: NDArray[Any], grid: Grid, options: SaveOptions, result: VolumeProposals | None, ids: Mapping[str, int]
) -> tuple[int, ...] | None:
    """Axial slices where a label is not what was served; None if that is not known."""
    if result is None or options.shown == MERGED or options.is_as_proposed:
        return None
    served = result.label_map(grid, options.shown, _assign_ids(result.structures, ids))
    if options.structures is not None:
        chosen = [ids[name] for name in options.structures]
        array, served = (np.where(np.isin(part, chosen), part, 0) for part in (array, served))
    differs = grid.arrange(array != served).any(axis=(1, 2))
    return tuple(int(z) for z in np.flatnonzero(differs))


def _find_structures(
    checked: CheckedLabel, options: SaveOptions, result: VolumeProposals | None, replaced: Previous | None
) -> tuple[str, ...]:
    """What a label speaks about: what it names; else all that it draws, that was asked for, and that it takes the place
    of.
    """
    if options.structures is not None:
        return options.structures
    asked = () if result is None else result.structures
    return tuple(dict.fromkeys([*checked.label_ids, *asked, *(() if replaced is None else replaced.structures)]))


def _find_present(array: NDArray[Any]) -> list[int]:
    """The ids in a label map, ascending, without 0; several times faster than sorting all voxels where ids are
    small.
    """
    if array.dtype == np.uint8:
        return [int(value) for value in np.flatnonzero(np.bincount(array.ravel(), minlength=256)) if value]
    return [int(value) for value in np.unique(array) if value]


def _check_agreement(label: LabelMap, options: SaveOptions) -> None:
    """Refuse a table that gives a number of the file another name than the file itself."""
    if not label.is_as_stored:
        return  # What a table says by number cannot be compared: layers repeat them.
    for value, own in label.names.items():
        told = (options.label_names or {}).get(value, own)
        if told.casefold() != own.casefold() and not is_unnamed(told) and not is_unnamed(own):
            raise RequestError(
                f"The file says that {value} is '{own}', and label_info says '{told}'. Leave label_info out, or make "
                "the two agree: 3D Slicer numbers label_info by the order of its segments, and the file keeps the "
                "numbers they had before they were moved. Saved as .nii.gz, both go by the order."
            )


def _note_unnamed(meaning: Mapping[int, str], present: Iterable[int]) -> list[str]:
    names = [meaning[value] for value in present if is_unnamed(meaning[value])]
    return [
        f"Segment '{name}' has no name that says what it is; it is kept, and no training learns from it. Rename it in "
        "the viewer and save again, or with POST /progidiff/annotations/<image>/rename."
        for name in names
    ]


def _find_meaning(
    label: LabelMap, options: SaveOptions, kept_ids: Mapping[str, int], served_ids: Mapping[str, int] | None
) -> dict[int, str]:
    """Id in the file -> structure."""
    if label.names or not label.is_as_stored:
        return combine_names(label.names, (options.label_names or {}) if label.is_as_stored else {})
    base = kept_ids if not options.proposals else fixed_ids() if served_ids is None else served_ids
    meaning = {value: name for name, value in base.items()}
    if options.label_names is None:
        return meaning
    own = dict(options.label_names)
    # A table in the ids of the folder may be short; one in ids of its own must name all.
    return {**meaning, **own} if all(base.get(name, value) == value for value, name in own.items()) else own


def _assign_ids(names: Iterable[str], kept_ids: Mapping[str, int]) -> dict[str, int]:
    """The id of each structure: the kept one, or the next that is free.

    Raises:
        ImageError: if there are more than a label has ids.
    """
    ids = _number_next(names, kept_ids)
    if max([*kept_ids.values(), *ids.values()], default=0) > MAX_LABEL_ID:
        raise ImageError(f"The label names more structures than fit into {MAX_LABEL_ID} ids. Save fewer structures.")
    return ids


def _number_next(names: Iterable[str], kept_ids: Mapping[str, int]) -> dict[str, int]:
    ids: dict[str, int] = {}
    last = max([*kept_ids.values(), LAST_LABEL_ID])
    for name in names:
        if name in kept_ids:
            ids[name] = kept_ids[name]
        elif name not in ids:
            last += 1
            ids[name] = last
    return ids


def _check_suffix(file: Path) -> None:
    if find_format(file, Use.LABEL) is None:
        raise ImageError(f"A label named '{file.name[-40:]}' is not read. Send {', '.join(list_suffixes(Use.LABEL))}.")


def _is_kept(file: Path) -> bool:
    """Whether a label is kept byte for byte; in other formats it is rewritten, because the host does not list them."""
    return find_format(file.with_name(file.name.lower().replace(".seg.", ".")), Use.ANSWER) is not None


def _read_slices(value: object, num_slices: int) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not value:
        raise RequestError(
            "Option slices must be a list of axial slice numbers, for example [12, 13]; "
            "leave it out for the whole volume."
        )
    if len(value) > num_slices * 2:
        raise RequestError(f"Option slices names {len(value)} slices, and the image has {num_slices}. Name each once.")
    return tuple(sorted({read_int(item, "slices", 0, num_slices - 1) for item in value}))


def _read_structures(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not items or len(items) > _MAX_NAMES:
        raise RequestError(
            'Option structures must be a list of names, for example ["liver"]; leave it '
            "out for all that the label draws."
        )
    return tuple(dict.fromkeys(_read_name(item, "structures") for item in items))


def read_structure(value: object, option: str) -> str:
    """The name of a structure as somebody sent it: the table's own where it means one of its.

    Raises:
        RequestError: if it is no name.

    Example:
        >>> read_structure("Kidney_left", "painted"), read_structure("Lesion 2", "painted")
        ('left kidney', 'Lesion 2')
    """
    return _read_name(value, option)


def _read_name(value: object, option: str) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
        raise RequestError(
            f"Option {option} holds {str(value)[:40]!r}; a structure is named by up to {MAX_NAME} printable characters."
        )
    return canonical_name(value)


def read_effort(value: object) -> tuple[tuple[str, float, int], ...]:
    """What a person spent on each structure, as sent: {structure: {"seconds", "clicks"}}; None for nothing.

    Raises:
        RequestError: if it is something else, or out of range.

    Example:
        >>> read_effort({"Liver": {"seconds": 12.5, "clicks": 7}})
        (('liver', 12.5, 7),)
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping) or len(value) > _MAX_NAMES or not all(map(_is_effort, value.values())):
        raise RequestError(
            'Option effort must be an object such as {"liver": {"seconds": 12.5, "clicks": 7}}; leave it out if nobody '
            "measured."
        )
    return tuple(
        (
            _read_name(name, "effort"),
            read_float(spent.get("seconds", 0), "effort seconds", 0, _MAX_SECONDS),
            read_int(spent.get("clicks", 0), "effort clicks", 0, _MAX_CLICKS),
        )
        for name, spent in value.items()
    )


def _is_effort(value: object) -> bool:
    return isinstance(value, Mapping)


def _read_looks(entries: object) -> dict[str, Look]:
    """Structure -> look, from a list of {"name", "idx", "color", "code"}; what is no colour or code is passed over,
    since it decides nothing about the label.
    """
    looks = {}
    for entry in entries if isinstance(entries, (list, tuple)) else ():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        sent = entry.get("code")
        value = str(sent.get("value", "")) if isinstance(sent, Mapping) else ""
        meaning = clean_text(str(sent.get("meaning") or entry["name"])) if isinstance(sent, Mapping) else ""
        look = Look(read_color(entry.get("color")), name_code(Code(value, meaning)) if value else None)
        if look != Look():
            looks[canonical_name(entry["name"])] = look
    return looks


def _read_shown(value: object) -> str:
    if (isinstance(value, str) and value.strip().isdecimal()) or (
        isinstance(value, int) and not isinstance(value, bool)
    ):
        return str(read_int(value, "shown", 1, 64))
    return read_choice(value, "shown", (CONSENSUS, BEST, MERGED))


def _read_label_info(entries: object, table: object) -> dict[int, str] | None:
    """Id -> structure, from a viewer's list of {"name", "idx"} or from an object {name: id}, as our own answers hold
    it.
    """
    if isinstance(table, Mapping) and entries is None:
        pairs = list(table.items())
    elif entries is None or entries == []:
        return None
    elif isinstance(entries, (list, tuple)) and all(
        isinstance(entry, Mapping) and "name" in entry and "idx" in entry for entry in entries
    ):
        pairs = [(entry["name"], entry["idx"]) for entry in entries]
    else:
        raise RequestError(
            f"Option label_info must be a list such as {_LABEL_INFO}; leave it out if the "
            "label uses the ids of labels.json."
        )
    if len(pairs) > _MAX_NAMES:
        raise RequestError(f"Option label_info names {len(pairs)} structures; at most {_MAX_NAMES} are kept.")
    names: dict[int, str] = {}
    for name, value in pairs:
        structure, number = _read_name(name, "label_info"), read_int(value, "label_info", 0, 65535)
        if number == 0:
            continue  # The background, which some viewers list.
        if names.setdefault(number, structure) != structure:
            raise RequestError(
                f"Option label_info gives id {number} to two structures, "
                f"'{names[number]}' and '{structure}'. Give each its own."
            )
    return names or None


_LABEL_INFO = '[{"name": "liver", "idx": 6}]'
