"""What an adapter is trained on and judged by: which volumes, which slices, and whether their labels can be used at
all.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, PromptError, RequestError
from progidiff.images.formats import strip_suffix
from progidiff.images.intensities import compute_body_threshold
from progidiff.images.reading import load_volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.folder_structures import find_near, fold_name, means_several
from progidiff.labels.segments import is_unnamed, load_label_map
from progidiff.model.conditioning import ConditioningConfig
from progidiff.model.folder import ModelCard
from progidiff.prompts.parser import canonical_name, parse_prompt
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.accepted_labels import EVERYTHING, find_local_cases
from progidiff.training.slice_cache import Case, SliceCache

HELD_BACK_SHARE = 0.25
"""Of the labelled slices, where there is one labelled volume only."""

NEEDED_SLICES = 4
"""Labelled slices of one volume from which something can be learned and judged."""

NEWEST = "newest"
"""As a modality: that of the label that was saved last."""


@dataclass
class AdaptData:
    """What a run trains on and is judged by.

    Attributes:
        training, validation: Slices of different patients, unless `same_patient`.
        modality: "CT" or "MR".
        held_out: Names of the held-back volumes.
        unused: Labelled volumes that were neither trained on nor held back.
        same_patient: One volume only: some of its slices are held back.
        notes: Sentences about what was left out.
        new: Structures that the model itself does not know.
        grid: See `model.adapters.AdapterCard`.
    """

    training: SliceCache
    validation: SliceCache
    modality: str
    held_out: list[str]
    unused: list[str]
    same_patient: bool
    notes: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    grid: Mapping[str, Any] | None = None


def prepare_data(
    studies: Path | Sequence[Case],
    card: ModelCard,
    cache: Path,
    cases: Sequence[str] = (),
    held_out: Sequence[str] = (),
    shots: int | None = None,
    slices: int | None = None,
    structures: Sequence[str] = (),
    annotated: Mapping[str, Collection[int] | None] | None = None,
    seed: int = 0,
    *,
    modality: str | None = None,
    parent: Mapping[str, Any] | None = None,
    declared: Collection[str] = (),
) -> AdaptData:
    """Choose and check the labelled volumes; see `run_adapt` for the other arguments.

    Args:
        parent: See `choose_cases`.
        declared: Names of new structures that somebody meant as they stand, see `labels.folder_structures`.

    Raises:
        RequestError: if a case, structure or number makes no sense.
        ImageError: if a label holds unknown ids or nothing, or the volumes are of several modalities.
    """
    for option, value in (("shots", shots), ("slices", slices)):
        if value is not None and value < 1:
            raise RequestError(f"Option {option} must be at least 1, got {value}.")
    labelled = find_cases(studies, annotated)
    everything = labelled if modality is None else keep_modality(labelled, modality)
    training, kept_back = choose_cases(everything, cases, held_out, parent or {}, seed, "volume")
    if not training:
        raise RequestError("All labelled volumes are held back; leave at least one for training.")
    if shots is not None:
        if shots > len(training):
            raise RequestError(
                f"{shots} volumes were asked for, but {len(training)} are labelled and "
                f"not held back: {_names(training)}."
            )
        training = training[:shots]
    drawn_names = {fold_name(name) for case in everything for name in case.structures.values()}
    names = [
        name_structure(s, card, declared) if fold_name(s) in drawn_names else parse_structure(s, card)
        for s in structures
    ] or None
    used, found_modality, notes, drawn = check_cases([*training, *kept_back], card, names, declared)
    held_names = {c.name for c in kept_back}
    training = [c for c in used if c.name not in held_names]
    kept_back = [c for c in used if c.name in held_names]
    if not training:
        raise ImageError(f"No volume is left to train on. {' '.join(notes)}")
    new, few = find_new(drawn, card)
    if few:
        names = [s for s in (*card.structures, *new) if names is None or s in names]
        notes += few
    if new and not held_out and not cases:
        training, kept_back = share_out(training, kept_back, new, drawn)
    grid = fit_grid(used, card.conditioning) if new else None
    shapes = card.conditioning if grid is None else replace(card.conditioning, **grid)
    order = [*card.structures, *new]
    train, valid = _cache_slices(training, kept_back, (order, new), shapes, names, cache, slices)
    unused = [c.name for c in labelled if c.name not in {u.name for u in used}]
    held = [c.name for c in kept_back]
    new = tuple(s for s in new if s in train.structures)
    return AdaptData(train, valid, found_modality, held, unused, not kept_back, tuple(notes), new, grid)


def find_new(drawn: Mapping[str, Mapping[str, int]], card: ModelCard) -> tuple[tuple[str, ...], list[str]]:
    """Structures that the model does not know and that can be learned.

    Args:
        drawn: Case -> structure -> slices that show it.

    Returns:
        Their names; and a sentence about each of which too little is drawn, unless there is nothing else.

    Raises:
        ImageError: if too little is drawn of each, and nothing else.
    """
    counts: dict[str, list[int]] = {}
    for shown in drawn.values():
        for name, count in shown.items():
            counts.setdefault(name, []).append(count)
    new = sorted(set(counts) - set(card.structures))
    few = {name: sum(counts[name]) for name in new if len(counts[name]) == 1 and sum(counts[name]) < NEEDED_SLICES}
    told = [
        f"'{name}' has {count} labelled slice{'' if count == 1 else 's'}; train with at least {NEEDED_SLICES}, or "
        "label it in a second image."
        for name, count in few.items()
    ]
    if len(few) == len(counts):
        raise ImageError(" ".join(told))
    return tuple(name for name in new if name not in few), told


def share_out(
    training: Sequence[Case], kept_back: Sequence[Case], new: Sequence[str], drawn: Mapping[str, Mapping[str, int]]
) -> tuple[list[Case], list[Case]]:
    """Have every new structure on both sides where its volumes allow it, and never on the held-back side alone.

    Args:
        drawn: Case -> structure -> slices that show it.

    Returns:
        Both lists; nothing is held back where a new structure is drawn in one volume only: some of its slices are then.
    """
    learned, held = list(training), list(kept_back)

    def carry(cases: Sequence[Case], name: str) -> list[Case]:
        return [case for case in cases if name in drawn[case.name]]

    for name in new:
        carriers = [*carry(learned, name), *carry(held, name)]
        if len(carriers) == 1:
            return [*learned, *held], []
        if carriers and not carry(learned, name):
            held.remove(carriers[0])
            learned.append(carriers[0])
        elif carriers and not carry(held, name):
            learned.remove(carriers[-1])
            held.append(carriers[-1])
    return (learned, held) if learned else (held, [])


def fit_grid(cases: Sequence[Case], shapes: ConditioningConfig) -> dict[str, Any] | None:
    """Settings of the working grid for images that are smaller than the base's: a hippocampus of 35 x 51 voxels would
    be 5 pixels wide on a grid of bodies.

    Returns:
        See `model.adapters.AdapterCard`; None if all images fill the base's own grid.
    """
    low, high = shapes.spacing_range
    found = [_find_pixel_size(case, shapes) for case in cases]
    smallest = float(np.round(min(found), 4))
    if smallest >= low:
        return None
    # What lies between neighbouring channels shrinks with the pixels.
    return {"spacing_range": (smallest, high), "neighbour_mm": round(shapes.neighbour_mm * smallest / low, 4)}


def _find_pixel_size(case: Case, shapes: ConditioningConfig) -> float:
    """Pixel of the working grid, mm, with which the body in an image fills it."""
    volume = load_volume(case.image, info=case.info)
    stack, spacing = volume.to_stack()
    anything = (1e-3, shapes.spacing_range[1])
    threshold = compute_body_threshold(volume)
    return plan_working_grid(stack, spacing, threshold, shapes.height, shapes.width, anything).spacing


def choose_cases(
    cases: Sequence[Case],
    wanted: Sequence[str],
    held_out: Sequence[str],
    parent: Mapping[str, Any],
    seed: int,
    noun: str,
) -> tuple[list[Case], list[Case]]:
    """Choose what is trained on and what is held back.

    Args:
        wanted: Train on these; empty for all that are not held back.
        held_out: Hold these back; empty to pick 1, of 5 or more 2, but never the only one.
        parent: run.json of the version that is served now. What it held back is held back again, and what it was
            trained on is the last to be: it would look better there than it is.
        seed: Of the order.
        noun: What a case is, for messages: "volume" or "image".

    Returns:
        Both lists in an order that depends on names and seed alone: the same are picked on every machine.

    Raises:
        RequestError: if a name is not among the cases, or in both lists.
    """
    kept_back, chosen = pick_named(cases, held_out), pick_named(cases, wanted)
    both = {c.name for c in kept_back} & {c.name for c in chosen}
    if both:
        raise RequestError(
            f"{', '.join(sorted(both))} cannot be trained on and held back at once; name each {noun} once."
        )
    shuffled = sorted(cases, key=lambda c: hashlib.sha256(f"{seed}:{c.name}".encode()).digest())
    if not kept_back:
        held_before, trained_before = set(parent.get("held_out_cases", ())), set(parent.get("training_cases", ()))
        free = [c for c in shuffled if c.name not in {t.name for t in chosen}]
        free.sort(key=lambda c: 2 if c.name in held_before else 0 if c.name in trained_before else 1)
        spare = len(free) if chosen else len(free) - 1
        kept_back = free[-min(2 if len(cases) >= 5 else 1, spare) :] if spare > 0 else []
    return chosen or [c for c in shuffled if c.name not in {k.name for k in kept_back}], kept_back


def _cache_slices(
    training: Sequence[Case],
    kept_back: Sequence[Case],
    structures: tuple[Sequence[str], Sequence[str]],
    shapes: ConditioningConfig,
    only: Sequence[str] | None,
    folder: Path,
    slices: int | None,
) -> tuple[SliceCache, SliceCache]:
    """Prepare the slices of the structures that the training labels show.

    Args:
        structures: All that can be trained, and those of them that are new.
        shapes: Decides the working grid.
        only: Structures to train; None for all.
        slices: Train on so many.

    Returns:
        Those to train on and those that are held back; of other volumes if there are any, else of the same one.
    """
    order, new = structures
    known = {s for c in training for s in (*c.structures.values(), *(c.annotated or ()))}
    chosen = [s for s in order if s in known and (only is None or s in only)]
    first = SliceCache(training, chosen, shapes, folder)
    present = [s for s, positions in zip(chosen, first.by_structure, strict=True) if len(positions)]
    if not present:
        raise ImageError(
            f"The training labels hold none of {', '.join(chosen or only or ())}; accept at least one label that is "
            "not empty."
        )
    train = SliceCache(training, present, shapes, folder)
    if kept_back:
        valid = SliceCache(kept_back, present, shapes, folder)
    else:
        train, valid = split_slices(train, new=[s for s in new if s in present])
    if slices is not None:
        train = restrict_cache(train, pick_evenly(train, slices))
    if not any(len(p) for p in train.by_structure):
        raise ImageError("None of the slices to train on holds a structure; label more slices.")
    if not any(len(p) for p in valid.by_structure):
        raise ImageError(
            f"The held-back volumes ({_names(kept_back)}) hold none of "
            f"{', '.join(present)}; hold back others with --hold-out."
        )
    return train, valid


def find_cases(
    studies: Path | Sequence[Case], annotated: Mapping[str, Collection[int] | None] | None = None
) -> list[Case]:
    """The labelled volumes of a folder, or those that were collected from a datastore.

    Args:
        annotated: case -> axial slices that count, instead of what the cases say; None for the whole volume.

    Raises:
        RequestError: if there are none.
    """
    cases = find_local_cases(studies) if isinstance(studies, Path) else list(studies)
    if annotated is not None:
        limits = {name: None if slices is None else frozenset(map(int, slices)) for name, slices in annotated.items()}
        cases = [
            replace(c, annotated={EVERYTHING: limits[c.name]})
            for c in cases
            if c.name in limits and limits[c.name] != frozenset()
        ]
    if not cases:
        raise RequestError(
            "No slice is labelled yet. Save a label with tag final (Submit Label in 3D Slicer), then train."
        )
    return cases


def pick_named(cases: Sequence[Case], names: Sequence[str]) -> list[Case]:
    """The cases of these names, with or without file suffix, in this order.

    Raises:
        RequestError: if one is not among them.
    """
    found = {c.name: c for c in cases}
    wanted = [strip_suffix(name) for name in names]
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise RequestError(
            f"Among the labelled images there is no image {', '.join(unknown)}; there are {_names(cases)}."
        )
    return [found[name] for name in wanted]


def keep_modality(cases: Sequence[Case], modality: str) -> list[Case]:
    """The cases of one modality.

    Args:
        modality: "CT", "MR", or "newest" for that of the label that was saved last.

    Raises:
        RequestError: if there are none.
    """
    found = {c.name: load_volume(c.image, info=c.info).modality for c in cases}
    wanted = found[max(cases, key=lambda c: c.label.stat().st_mtime_ns).name] if modality == NEWEST else modality
    kept = [c for c in cases if found[c.name] == wanted]
    if not kept:
        raise RequestError(
            f"No labelled image is {wanted}: "
            f"{', '.join(f'{n} is {m}' for n, m in found.items())}. Leave the option modality out."
        )
    return kept


def parse_structure(text: str, card: ModelCard) -> str:
    """The model's structure that a label's name means.

    Raises:
        PromptError: if it is none or several; the message names the nearest.
    """
    queries = parse_prompt(text, card.structures, model=card.full_name)
    if len(queries) != 1:
        raise PromptError(
            f"'{text}' means {len(queries)} structures ({', '.join(q.name for q in queries)}); a label can be one only."
        )
    return queries[0].name


def name_structure(text: str, card: ModelCard, declared: Collection[str] = ()) -> str:
    """The structure that a label's name means: the model's, or a new one, which is called as the label calls it.

    Args:
        declared: Names that somebody meant as they stand.

    Raises:
        PromptError: if it means several structures, or is nearly a known one; the message names that.
    """
    try:
        return parse_structure(text, card)
    except PromptError:
        name = canonical_name(text)
        name = next((meant for meant in declared if fold_name(meant) == fold_name(name)), name)
        if name not in STRUCTURES and means_several(text):
            raise
        near = None if name in declared else find_near(name, [*card.structures, *declared])
        if near is None:
            return name
        raise PromptError(
            f"'{text}' is nearly '{near}', which is known already; if it is something else, add it as a structure of "
            "its own.",
            (near,),
        ) from None


def check_cases(
    cases: Sequence[Case], card: ModelCard, only: Sequence[str] | None = None, declared: Collection[str] = ()
) -> tuple[list[Case], str, list[str], dict[str, dict[str, int]]]:
    """Read every label and image once, before anything is trained.

    A segment whose name says nothing ("Segment_1") is left out. It may be any structure, so nothing that its volume
    does not draw counts as absent there.

    Args:
        only: Structures to train; the others may have any name and count as background.
        declared: See `name_structure`.

    Returns:
        The cases with the model's own names for their structures, without those of which nothing is left; their
        modality; sentences about what is left out; and case -> structure -> axial slices that show it.

    Raises:
        ImageError: for a label that cannot be read, lies on another grid, has unknown ids, no foreground or numbers
            that are no ids; for volumes of several modalities.
        RequestError: if a label has a name that is nearly one that is known, or means several.
    """
    checked = []
    notes = []
    shown: dict[str, dict[str, int]] = {}
    modalities: dict[str, str] = {}
    for case in cases:
        volume = load_volume(case.image, info=case.info)
        modalities[case.name] = volume.modality
        drawn = load_label_map(case.label, volume.grid).array
        values = [int(v) for v in np.unique(drawn) if v != 0]
        named = sorted(set(case.annotated or ()) - {EVERYTHING})
        if not values and not named:
            raise ImageError(f"The label of '{case.name}' is empty; label a structure, or remove '{case.label}'.")
        strange = [v for v in values if v not in case.structures]
        if strange:
            raise ImageError(
                f"The label of '{case.name}' holds ids "
                f"{', '.join(map(str, strange[:5]))}, which neither the label's record (label_info) nor "
                "labels.json names. Write them into labels.json in the studies folder, "
                f'for example {{"{strange[0]}": "liver"}}, or remove '
                "them from the label."
            )
        unnamed = [case.structures[value] for value in values if is_unnamed(case.structures[value])]
        if unnamed:
            notes.append(_tell_unnamed(case.name, unnamed))
        telling = [value for value in values if not is_unnamed(case.structures[value])]
        names = _match_names(case, telling, card, only, declared)
        if unnamed and not names and not named:
            continue
        if not names and not named:
            raise ImageError(
                f"The label of '{case.name}' holds none of {', '.join(only or ())}; leave "
                "this volume out or choose other structures."
            )
        # What is not asked for, or absent from this volume, keeps its place in the table as background.
        absent = _absent(case, card, only, names, declared) if case.names_all and not unnamed else {}
        stack = volume.arrange(drawn)
        shown[case.name] = {name: int((stack == value).any(axis=(1, 2)).sum()) for value, name in names.items()}
        case = _narrow_new(case, names, card, stack)
        checked.append(replace(case, structures={**dict.fromkeys(values, ""), **names, **absent}))
    if not checked:
        raise ImageError(f"No volume is left to train on. {' '.join(notes)}")
    modalities = {case.name: modalities[case.name] for case in checked}
    if len(set(modalities.values())) > 1:
        told = "; ".join(
            f"{m}: {', '.join(n for n, k in modalities.items() if k == m)}" for m in sorted(set(modalities.values()))
        )
        raise ImageError(
            f"One adapter is for one modality, but the volumes are {told}. Choose some "
            "with --case or the option modality, or, if the guess is "
            'wrong, write {"modality": "MR"} into a file <name>.json beside the image.'
        )
    return checked, next(iter(modalities.values())), notes, shown


def _match_names(
    case: Case, values: Sequence[int], card: ModelCard, only: Sequence[str] | None, declared: Collection[str]
) -> dict[int, str]:
    """Label id -> structure, of those that are trained.

    Raises:
        RequestError: for a name that is nearly a known one or means several, unless only some structures are trained.
    """
    names: dict[int, str] = {}
    for value in values:
        try:
            found = name_structure(case.structures[value], card, declared)
        except PromptError as err:
            if only is not None:
                continue
            hint = f" (did you mean {err.suggestions[0]!r}?)" if err.suggestions else ""
            raise RequestError(
                f"Label id {value} of '{case.name}' is named '{case.structures[value]}', which '{card.full_name}' does "
                f"not know{hint}. {_RENAME.format(case=case.name)} It knows {', '.join(card.structures)}. If it is a "
                "structure of its own, add it under this name (`progidiff structures add`). Or choose what to train "
                "with --structures."
            ) from err
        if only is None or found in only:
            names[value] = found
    return names


def _narrow_new(case: Case, names: Mapping[int, str], card: ModelCard, stack: NDArray[Any]) -> Case:
    """The case with what its label says of structures that are new: where a person saved a whole volume, the slices
    that draw one. Who begins with something new has drawn it on a few slices, and nobody has said that it is absent
    from those in between; slices that a save names count as it says.

    Args:
        names: Label id -> structure, of those that are drawn.
        stack: Label ids (Z, Y, X).
    """
    if case.annotated is None:
        return case
    spoken = dict(case.annotated)
    for value, name in names.items():
        if name in card.structures:
            continue
        said = spoken.get(name, spoken.get(EVERYTHING, frozenset()))
        drawn = frozenset(int(z) for z in np.flatnonzero((stack == value).any(axis=(1, 2))))
        spoken[name] = drawn if said is None else said
    return replace(case, annotated=spoken)


_RENAME = (
    "Rename it in labels.json if it is named there, and in a label that was saved here with POST "
    "/progidiff/annotations/{case}/rename."
)


def _tell_unnamed(case: str, unnamed: Sequence[str]) -> str:
    listed = ", ".join(f"'{name}'" for name in unnamed[:8])
    return f"{listed} of '{case}' does not say what it is, and is left out. {_RENAME.format(case=case)}"


def _absent(
    case: Case, card: ModelCard, only: Sequence[str] | None, present: Mapping[int, str], declared: Collection[str]
) -> dict[int, str]:
    """Names in the table that do not occur in this label: whoever labelled it says that they are absent. Of a structure
    that this folder began to label by itself nothing is known where it is not drawn.
    """
    found = {}
    for value, text in case.structures.items():
        try:
            name = name_structure(text, card, declared)
        except PromptError:
            continue
        if name in declared:
            continue
        if name not in present.values() and (only is None or name in only):
            found[value] = name
    return found


def restrict_cache(cache: SliceCache, kept: Sequence[int]) -> SliceCache:
    """The same slices with their neighbours, but only some of them to draw from.

    Args:
        kept: Positions in `cache.index`.
    """
    part = copy.copy(cache)
    part.index = [cache.index[i] for i in sorted(kept)]
    part.pixels = [np.zeros_like(p) for p in cache.pixels]
    for v, z in part.index:
        part.pixels[v][z] = cache.pixels[v][z]
    part.by_structure = [
        np.array([i for i, (v, z) in enumerate(part.index) if part.pixels[v][z, s] > 0], dtype=np.int64)
        for s in range(len(part.structures))
    ]
    return part


def split_slices(
    cache: SliceCache, share: float = HELD_BACK_SHARE, new: Collection[str] = ()
) -> tuple[SliceCache, SliceCache]:
    """Hold back short runs of neighbouring slices, evenly spread over the labelled part of a volume.

    Runs and not single slices: a slice between two that were trained on is no test.

    Args:
        new: Structures of which some slices are held back in any case.

    Raises:
        ImageError: if fewer than 4 slices are labelled, or of something new.
    """
    labelled = [i for i, (v, z) in enumerate(cache.index) if cache.pixels[v][z].any()]
    of_new = {name: cache.by_structure[cache.structures.index(name)].tolist() for name in new}
    for name, slices in of_new.items():
        if len(slices) < NEEDED_SLICES:
            raise ImageError(
                f"'{name}' has {len(slices)} labelled slices in one volume; train with at least {NEEDED_SLICES}, so "
                "that some can be held back, or label it in a second volume."
            )
    if len(labelled) < NEEDED_SLICES:
        raise ImageError(
            f"Only one volume is labelled, with {len(labelled)} slices that hold a structure. Label at least 4 slices, "
            "so that some can be held back, or a second volume."
        )
    count = max(1, round(share * len(labelled)))
    runs = max(1, count // 3)
    length = max(1, count // runs)
    held: set[int] = set()
    for r in range(runs):
        start = round((r + 0.5) * len(labelled) / runs - length / 2)
        held |= set(labelled[max(0, start) : start + length])
    for slices in of_new.values():
        if not held & set(slices):
            length = max(1, round(share * len(slices)))
            start = (len(slices) - length) // 2
            held |= set(slices[start : start + length])
    return restrict_cache(cache, [i for i in range(len(cache)) if i not in held]), restrict_cache(cache, sorted(held))


def pick_evenly(cache: SliceCache, count: int) -> list[int]:
    """So many of the slices that hold a structure, evenly spaced.

    Raises:
        RequestError: if there are fewer.
    """
    labelled = [i for i, (v, z) in enumerate(cache.index) if cache.pixels[v][z].any()]
    if count > len(labelled):
        raise RequestError(
            f"{count} slices were asked for, but only {len(labelled)} of the training "
            "slices hold a structure; lower --slices."
        )
    return [labelled[int(i)] for i in np.floor((np.arange(count) + 0.5) * len(labelled) / count)]


def _names(cases: Sequence[Case]) -> str:
    return ", ".join(c.name for c in cases)
