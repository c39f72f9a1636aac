"""How good are the proposals of a model on labelled volumes?

Three numbers per structure, because they answer different questions:

* **single**: the mean over the K proposals of each one's score. What one draw gives.
* **consensus**: the score of the consensus. What the server shows first.
* **best**: the score of the proposal with the highest Dice against the ground truth, per case and structure. What an
  expert who picks gets at most; it rises with K for any noisy model, so compare at equal K only.

Rules, also written into every report:

* Each structure is scored as asked alone, on the input's own grid; overlaps between structures are not resolved.
* A structure without a voxel in the ground truth of a case has no Dice and no HD95 there. It counts for the false
  positives instead: the share of such cases, and of slices without the structure, on which it is drawn all the same.
* An empty prediction of a present structure has Dice 0 and no HD95; it is left out of the HD95 means and counted as
  missed.
* HD95 is as MONAI defines it: the larger of the two directed 95th percentiles of surface distances, in mm.
"""

from __future__ import annotations

import functools
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from progidiff.errors import ImageError, PromptError, RequestError, StoreError
from progidiff.evaluation.metrics import compute_dice, compute_hd95, keep_largest_component
from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.labels.cases import LABELS_JSON, LabelledCase, list_labelled, load_label_names
from progidiff.labels.segments import LabelMap, load_label_map, read_names
from progidiff.prompts.parser import Query, parse_prompt
from progidiff.proposals.request import AUTO, DEFAULT_CLEAN_UP, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work
from progidiff.storage.atomic import replace_text
from progidiff.storage.provenance import describe_versions

if TYPE_CHECKING:
    from progidiff.proposals.engine import Engine

TRANSUNET_STRUCTURES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
"""The eight structures that TransUNet and its successors report on BTCV."""

Kind = Literal["single", "consensus", "best"]
KINDS: tuple[Kind, ...] = ("single", "consensus", "best")

RULES = {
    "single": "mean over the K proposals of each one's score",
    "consensus": "voxels that at least half of the proposals draw",
    "best": (
        "the proposal with the highest Dice against the ground truth, per case and "
        "structure; its HD95 is that proposal's"
    ),
    "overlaps": "each structure is scored as asked alone; overlaps between structures are not resolved",
    "absent": (
        "a structure without a voxel in the ground truth of a case is left out of Dice "
        "and HD95; it counts for the false positives"
    ),
    "missed": (
        "an empty prediction of a present structure has Dice 0 and no HD95; it is left "
        "out of the HD95 means and counted as missed"
    ),
    "hd95": "as monai.metrics: the larger of the two directed 95th percentiles of surface distances, mm",
    "false_positives": (
        "slices: share of the slices without the structure on which it is drawn; cases: share of the cases without the "
        "structure"
    ),
    "disagreement": (
        "1 - mean pairwise Dice of the proposals, mean over the slices on which any proposal draws the structure"
    ),
}

Progress = Callable[[int, int, str, int, int], None]
"""Called with (cases done, cases in all, name of the case, slices done, slices in all)."""


def match_structures(
    label_names: Mapping[int, str], known: Sequence[str], wanted: Sequence[str] = ()
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Which label ids are which structure of the model, by name.

    A name of labels.json that is none of the model's is read as a prompt ("kidney_left" is the left kidney); several
    ids of one structure are taken together.

    Args:
        label_names: Label id -> name.
        known: Structures of the model.
        wanted: Structures or synonyms to keep; empty for all.

    Returns:
        (structure -> label ids, notes on what was left out), in the order of `known`.

    Raises:
        PromptError: if a wanted structure is unknown to the model.
        RequestError: if nothing is left.
    """
    ids: dict[str, list[int]] = {}
    notes = []
    for value, name in sorted(label_names.items()):
        structure = name
        if name not in known:
            try:
                queries = parse_prompt(name, known)
            except PromptError:
                queries = ()
            if len(queries) != 1:
                notes.append(f"label {value} '{name}' is no structure of the model; skipped")
                continue
            structure = queries[0].name
            notes.append(f"label {value} '{name}' is taken as '{structure}'")
        ids.setdefault(structure, []).append(value)
    chosen = (
        list(dict.fromkeys(query.name for text in wanted for query in parse_prompt(text, known)))
        if wanted
        else list(known)
    )
    notes += [f"'{name}' has no label in labels.json; skipped" for name in chosen if name not in ids]
    matched = {name: tuple(ids[name]) for name in known if name in ids and name in chosen}
    if not matched:
        labelled = ", ".join(label_names.values()) or "nothing"
        raise RequestError(
            f"None of the structures {', '.join(chosen)} has a label; labels.json names "
            f"{labelled}. Choose structures that are labelled."
        )
    return matched, notes


def score_case(
    volume: Volume,
    labels: NDArray[Any],
    proposals: VolumeProposals,
    structures: Mapping[str, Sequence[int]],
    hd95: bool = True,
    largest_component: bool = False,
) -> dict[str, dict[str, Any]]:
    """Compare the proposals of one volume with its ground truth.

    Args:
        volume: The image.
        labels: Label ids on its grid, shape (I, J, K) in file order.
        proposals: Of the volume, holding at least `structures`.
        structures: Structure -> label ids.
        hd95: Compute HD95; most of the time goes there.
        largest_component: Keep the largest connected part of every mask first.

    Returns:
        Per structure a dict of plain values; NaN for what is not defined.
    """
    _, spacing = volume.to_stack()
    truth_stack = volume.arrange(labels)
    scores: dict[str, dict[str, Any]] = {}
    for name, ids in structures.items():
        truth = np.isin(truth_stack, list(ids))
        empty_slices = ~np.asarray(truth.any(axis=(1, 2)))
        present = bool(truth.any())

        def score(
            shown: str | int, name: str = name, truth: NDArray[Any] = truth, empty: NDArray[Any] = empty_slices
        ) -> dict[str, Any]:
            mask = volume.arrange(proposals.mask(volume.grid, name, shown)).astype(bool)
            if largest_component:
                mask = keep_largest_component(mask)
            return {
                "dice": compute_dice(mask, truth),
                "hd95": compute_hd95(mask, truth, spacing) if hd95 else math.nan,
                "voxels": int(np.count_nonzero(mask)),
                "false_positive_slices": int(np.count_nonzero(mask.any(axis=(1, 2)) & empty)),
            }

        each = [score(k + 1) for k in range(proposals.num_proposals)]
        consensus = score("consensus")
        # Without the structure there is no Dice; the best answer is then the one that draws least.
        worth = [entry["dice"] if present else -entry["voxels"] for entry in each]
        best = worth.index(max(worth))
        index = proposals.structures.index(name)
        scores[name] = {
            "present": present,
            "single": _average_scores(each),
            "consensus": consensus,
            "best": {**each[best], "proposal": best + 1},
            "proposals": {key: [entry[key] for entry in each] for key in ("dice", "hd95", "voxels")},
            "truth_voxels": int(np.count_nonzero(truth)),
            "slices_without": int(np.count_nonzero(empty_slices)),
            "mean_disagreement": float(proposals.mean_disagreement[index]),
        }
    return scores


def summarise(cases: Sequence[Mapping[str, Any]], structures: Sequence[str]) -> dict[str, Any]:
    """Means over cases.

    Args:
        cases: Entries with `structures` as `score_case` returns them.
        structures: Names to report.

    Returns:
        ``{single|consensus|best: {dice|hd95: {structure: mean}}}`` and, beside these, `mean` (over structures),
        `missed`, `false_positives`, `disagreement` and `cases_with`. A structure that no case holds has no Dice; NaN
        where a mean has no values.
    """
    summary: dict[str, Any] = {}
    found = {name: [case["structures"][name] for case in cases if name in case["structures"]] for name in structures}
    holding = {name: [entry for entry in entries if entry["present"]] for name, entries in found.items()}
    reported = [name for name in structures if holding[name]]
    for kind in KINDS:
        summary[kind] = {
            metric: {name: _mean(entry[kind][metric] for entry in holding[name]) for name in reported}
            for metric in ("dice", "hd95")
        }
    groups = {"transunet_8": [name for name in TRANSUNET_STRUCTURES if name in reported], "all": reported}
    summary["mean"] = {
        kind: {
            metric: {group: _mean(summary[kind][metric][name] for name in names) for group, names in groups.items()}
            for metric in ("dice", "hd95")
        }
        for kind in KINDS
    }
    summary["mean_over"] = groups
    summary["missed"] = {
        kind: {
            name: sum(
                entry[kind]["missed"] if kind == "single" else int(entry[kind]["voxels"] == 0)
                for entry in holding[name]
            )
            for name in reported
        }
        for kind in KINDS
    }
    summary["false_positives"] = {}
    for kind in KINDS:
        slices, shares, drawn_slices, empty_slices = {}, {}, 0.0, 0
        for name in structures:
            drawn = sum(entry[kind]["false_positive_slices"] for entry in found[name])
            without = sum(entry["slices_without"] for entry in found[name])
            drawn_slices, empty_slices = drawn_slices + drawn, empty_slices + without
            slices[name] = drawn / without if without else math.nan
            absent = [entry for entry in found[name] if not entry["present"]]
            shares[name] = _mean(
                entry[kind]["drawn"] if kind == "single" else float(entry[kind]["voxels"] > 0) for entry in absent
            )
        summary["false_positives"][kind] = {
            "slices": slices,
            "cases": shares,
            "all_slices": drawn_slices / empty_slices if empty_slices else math.nan,
        }
    summary["disagreement"] = {name: _mean(entry["mean_disagreement"] for entry in found[name]) for name in structures}
    summary["cases_with"] = {name: len(holding[name]) for name in structures}
    return summary


def evaluate(
    engine: Engine,
    studies: str | os.PathLike[str],
    *,
    structures: Sequence[str] = (),
    cases: Sequence[str] | None = None,
    num_proposals: int = 4,
    num_inference_steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    adapter: str | None = None,
    modality: str | None = None,
    hd95: bool = True,
    clean_up: str = DEFAULT_CLEAN_UP,
    largest_component: bool = False,
    progress: Progress | None = None,
    command: str | None = None,
) -> dict[str, Any]:
    """Evaluate a model on a local datastore.

    A case that cannot be read is reported in `cases` with its error and left out of the means; everything else raises.

    Args:
        engine: The model.
        studies: Folder with images, `labels/final` and `labels.json` (label id -> structure).
        structures: Names or synonyms; empty for all that the model and its versions know and the datastore labels.
        cases: Names of cases, with or without suffix; None for all that have a label.
        num_proposals: K.
        num_inference_steps: None for the model's default.
        seed: Of the noise.
        guidance_scale: None for the model's default.
        adapter: Name of an adapter.
        modality: "CT" or "MR" for all cases; None to find out.
        hd95: Compute HD95.
        clean_up: How islands are dropped from every proposal, as the server does it; see `progidiff.proposals.islands`.
        largest_component: Beyond that keep the largest connected part of every mask, the consensus too, before it is
            scored.
        progress: Called after every batch of slices.
        command: What to record as the command; by default that of this process.

    Returns:
        The report: plain values, None for what is not defined. `save_report` writes it.

    Raises:
        RequestError: if there is nothing to evaluate, or an option is wrong.
        ModelError: if the model cannot be loaded.
    """
    started = time.monotonic()
    folder = Path(studies)
    chosen = list_labelled(folder, cases)
    known = _find_known(engine, adapter)
    meanings, notes = _read_meanings(folder, chosen, known, structures)
    asked = [name for name in known if any(name in ids for ids in meanings.values())]
    request = ProposalRequest(
        queries=tuple(Query(name, name) for name in asked),
        num_proposals=num_proposals,
        num_inference_steps=num_inference_steps,
        seed=seed,
        guidance_scale=guidance_scale,
        adapter=adapter,
        clean_up=clean_up,
    )
    rules = {"hd95": hd95, "largest_component": largest_component}
    results, settings = _score_cases(engine, request, folder, chosen, meanings, notes, modality, progress, **rules)
    return _build_report(
        results,
        asked,
        {
            "command": command if command is not None else shlex.join(sys.argv),
            "studies": str(studies),
            "num_proposals": num_proposals,
            "seed": seed,
            **settings,
            "options": {**rules, "modality": modality},
            "notes": notes,
            "seconds": round(time.monotonic() - started, 1),
        },
    )


def _find_known(engine: Engine, adapter: str | None) -> tuple[str, ...]:
    """What the model knows, and what the versions that would answer have learned beside it."""
    if adapter in (None, "", AUTO):
        return engine.find_known()
    chosen = engine.pick_adapter(adapter, "")
    return tuple(dict.fromkeys((*engine.structures, *(() if chosen is None else chosen.structures))))


def _score_cases(
    engine: Engine,
    request: ProposalRequest,
    folder: Path,
    cases: Sequence[LabelledCase],
    meanings: Mapping[str, Mapping[str, tuple[int, ...]]],
    notes: list[str],
    modality: str | None,
    progress: Progress | None,
    *,
    hd95: bool,
    largest_component: bool,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Propose and score, case by case; what there is to say of a case is added to `notes`.

    Returns:
        The entries of the cases in the report, and what was asked of the model.
    """
    results: list[dict[str, Any]] = []
    settings: dict[str, Any] = {}
    for number, case in enumerate(cases):
        _report(progress, number, len(cases), case.name, 0, 1)
        try:
            volume = load_volume(case.image, modality)
            labels = load_label_map(case.label, volume.grid)
            watched = Work(on_progress=functools.partial(_report, progress, number, len(cases), case.name))
            proposals = engine.propose(request, volume, watched)
        except ImageError as err:
            results.append({"case": case.name, "error": str(err), "structures": {}})
            notes.append(f"case {case.name} could not be read and is left out: {err}")
            continue
        ids = meanings[case.name]
        notes += _note_labels(folder, case, labels, ids)
        settings = {key: value for key, value in proposals.summary().items() if key in _SETTINGS}
        scores = score_case(volume, labels.array, proposals, ids, hd95, largest_component)
        results.append(_describe_case(case.name, volume, proposals.seconds, scores))
    _report(progress, len(cases), len(cases), "", 1, 1)
    return results, settings


def _build_report(
    results: Sequence[Mapping[str, Any]], structures: Sequence[str], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """What `evaluate` answers; `origin` says how it came about."""
    told = {**origin, "created": datetime.now(UTC).isoformat(timespec="seconds"), "rules": RULES}
    told |= {
        "versions": describe_versions(),
        "num_cases": sum("error" not in case for case in results),
        "summary": summarise(results, structures),
        "cases": results,
    }
    order = ("command", "created", "studies", "num_proposals", "seed")
    return {key: _without_nan(told[key]) for key in dict.fromkeys((*order, *told))}


def _report(progress: Progress | None, number: int, count: int, name: str, done: int, total: int) -> None:
    if progress is not None:
        progress(number, count, name, done, total)


def _read_meanings(
    folder: Path, cases: Sequence[LabelledCase], known: Sequence[str], wanted: Sequence[str]
) -> tuple[dict[str, dict[str, tuple[int, ...]]], list[str]]:
    """Case -> structure -> its ids there, and notes: by labels.json, and by what the file of a label itself says."""
    own = {case.name: _read_own_names(case) for case in cases}
    named = [case.name for case in cases if own[case.name]]
    table = load_label_names(folder) if len(named) < len(cases) or (folder / LABELS_JSON).is_file() else {}
    shared, notes = match_structures(table, known, wanted) if len(named) < len(cases) else ({}, [])
    meanings = dict.fromkeys((case.name for case in cases), shared)
    refused: RequestError | None = None
    for name in named:
        try:
            meanings[name], told = match_structures({**table, **own[name]}, known, wanted)
        except RequestError as err:
            meanings[name], told, refused = {}, [str(err)], err
        notes += [f"case {name}: {note}" for note in told]
    if refused is not None and not any(meanings.values()):
        raise refused
    return meanings, notes


def _read_own_names(case: LabelledCase) -> dict[int, str]:
    try:
        return read_names(case.label)
    except ImageError:
        return {}  # Told where the label is read.


def _note_labels(folder: Path, case: LabelledCase, labels: LabelMap, ids: Mapping[str, Sequence[int]]) -> list[str]:
    """Sentences about the label of a case: what the file gave rise to, and ids that nothing names."""
    known = {value for values in ids.values() for value in values} | set(labels.names)
    if (folder / LABELS_JSON).is_file():
        known |= set(load_label_names(folder))
    strangers = sorted(set(np.unique(labels.array).tolist()) - {0} - known)
    notes = [f"case {case.name}: {note}" for note in labels.notes]
    if strangers:
        notes.append(
            f"case {case.name} holds label ids that labels.json does not name: {strangers}; taken as background"
        )
    return notes


def _describe_case(name: str, volume: Volume, seconds: float, scores: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "case": name,
        "modality": volume.modality,
        "modality_source": volume.modality_source,
        "shape": list(volume.array.shape),
        "spacing_mm": [round(edge, 4) for edge in volume.spacing],
        "seconds": round(seconds, 3),
        "structures": dict(scores),
    }


_SETTINGS = ("num_proposals", "seed", "num_inference_steps", "guidance_scale", "model_version", "adapter", "clean_up")


def save_report(report: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a report as JSON, whole or not at all.

    Raises:
        StoreError: if the disk refuses.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(report, indent=1, allow_nan=False) + "\n")
    except OSError as err:
        raise StoreError(
            f"The report could not be written to '{path}' ({err}). Choose another place or free some space."
        ) from err
    return path


def _average_scores(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over proposals; `missed` = how many are empty, `drawn` = the share that is not."""
    return {
        "dice": _mean(entry["dice"] for entry in each),
        "hd95": _mean(entry["hd95"] for entry in each),
        "false_positive_slices": _mean(entry["false_positive_slices"] for entry in each),
        "missed": sum(entry["voxels"] == 0 for entry in each),
        "drawn": _mean(float(entry["voxels"] > 0) for entry in each),
    }


def _mean(values: Iterable[float]) -> float:
    """Mean of the values that are numbers; NaN if none is."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: null says "not defined"."""
    if isinstance(value, Mapping):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value
