"""What annotating has brought so far: validation Dice against annotated slices, how often masks were accepted as they
were, how long a slice takes, what is queued and why, and whether to go on. From the label history and the versions on
disk; no network, no server.
"""

from __future__ import annotations

import html
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from progidiff.active_learning.advice import Advice, CurvePoint, advise
from progidiff.active_learning.answers import (
    AllSaves,
    AnnotatedSoFar,
    ListedVersion,
    Report,
    SaveFigures,
    StructureEffort,
    SuggestedImage,
    SuggestedSlice,
    TrainedVersion,
    VersionSaves,
)
from progidiff.active_learning.scores import SliceScoreStore, name_version
from progidiff.active_learning.settings import BY_SCORE, DEFAULT_STRATEGY, AcquisitionConfig
from progidiff.active_learning.strategies import build_pool, pick_slices, summarise_reasons
from progidiff.errors import ModelError, NotFoundError
from progidiff.images.pictures import PICTURE
from progidiff.labels.history import Annotation, AnnotationStore
from progidiff.model.adapters import AdapterStore, compute_base_digest
from progidiff.model.folder import load_card
from progidiff.storage.versions import VersionCard, VersionStore

logger = logging.getLogger(__name__)

BATCH = 20
"""Slices that the expected gain is about if trainings do not start by themselves."""

SLICES_SHOWN = 8


def build_report(
    annotations: AnnotationStore,
    adapters: AdapterStore,
    queue: Sequence[SuggestedImage],
    batch: int = BATCH,
    textdiff: VersionStore[Any] | None = None,
) -> Report:
    """Everything there is to tell.

    Args:
        annotations: The label history.
        adapters: The trained versions.
        queue: What is next, see `list_queue`.
        batch: Slices until the next training.
        textdiff: The trained versions for pictures; None if there are none.
    """
    problems: list[str] = []
    saves = [save for save in annotations.list() if save.tag == "final"]
    state = annotations.annotated_images()
    known = {*state, *(save.image for save in saves)}
    versions = [
        ListedVersion(**dict(version), here=is_trained_on(version, known))
        for version in list_versions(adapters, textdiff, problems)
    ]
    newest = max((v for v in versions if v.here), key=lambda v: v.created, default=None)
    for_pictures = {v.name for v in versions if v.modality == PICTURE}
    by_model = {}
    for name in dict.fromkeys(v.name for v in versions if v.here):
        # A shipped version of the same name learned from other images: its Dice is no point of this curve.
        curve = [
            CurvePoint(v.version, v.slices, v.mean)
            for v in versions
            if v.here and v.name == name and v.mean is not None
        ]
        edited = [save.edited for save in saves if save.edited is not None and _is_about(save, name, for_pictures)]
        by_model[name] = advise(edited, curve, batch)
    about = newest.name if newest else ""
    return Report(
        annotated=AnnotatedSoFar(
            images=len(state),
            whole_images=sum(slices is None for slices in state.values()),
            slices=annotations.count_slices_since(0),
        ),
        saves=_count_saves(saves),
        versions=versions,
        advice=by_model[about]
        if about
        else advise([save.edited for save in saves if save.edited is not None], [], batch),
        advice_about=about,
        advice_by_model=by_model,
        queue=list(queue),
        problems=problems + annotations.verify(),
        set_aside=annotations.list_torn(),
        effort=measure_effort(saves),
    )


def list_queue(
    scores: SliceScoreStore,
    annotations: AnnotationStore,
    images: Collection[str],
    limit: int = 20,
    strategy: str = DEFAULT_STRATEGY,
    config: AcquisitionConfig | None = None,
    wanted: Callable[[str], str] = lambda modality: "",
    rounds: Mapping[str, int] | None = None,
) -> list[SuggestedImage]:
    """The images that are worth annotating next by the scores on disk, best first, as a server without clients would
    list them.

    Args:
        scores: Of the background scorer.
        annotations: What is annotated.
        images: Of the datastore; what else has scores is left out.
        limit: So many images at most.
        strategy, config: As the server has them.
        wanted: Modality -> the version that is served, see `find_served`; where it has no scores the newest ones count.
        rounds: See `count_rounds`; None for a model that was not trained here.

    Raises:
        RequestError: if there is no such strategy or a setting is out of range.
    """
    entries = {image: entry for image, entry in scores.pick_newest(wanted).items() if image in images}
    pool = build_pool([entry.scores for entry in entries.values()])
    annotated = annotations.annotated_images()
    counts = {entry.modality: (rounds or {}).get(entry.modality, 0) for entry in entries.values()}
    seed = 0 if strategy in BY_SCORE else annotations.last_sequence()
    order = pick_slices(
        pool,
        limit,
        strategy,
        config,
        annotated=annotated,
        one_per_image=True,
        round_index=min(counts.values(), default=0),
        seed=seed,
    )
    found = []
    for first in order:
        entry = entries[first.image]
        picks = pick_slices(
            pool,
            SLICES_SHOWN,
            strategy,
            config,
            annotated=annotated,
            within=first.image,
            round_index=counts[entry.modality],
            seed=seed,
        )
        found.append(
            SuggestedImage(
                image=first.image,
                slices=[SuggestedSlice.of(pick) for pick in picks],
                reason=summarise_reasons(picks),
                scores_from=entry.scores.version,
            )
        )
    return found


def find_served(
    model_dir: Path, adapters: AdapterStore, textdiff: VersionStore[Any] | None = None
) -> Callable[[str], str]:
    """Which version a server with these models would answer with: modality -> version, "" if there is none. Nothing is
    loaded.
    """

    def find(modality: str) -> str:
        try:
            if modality == PICTURE:
                newest = textdiff.find_newest() if textdiff else None
                return f"{newest.name}@{newest.current}" if newest else ""
            adapter = adapters.pick_for(modality, compute_base_digest(model_dir))
            return name_version(load_card(model_dir).full_name, adapter.full_name if adapter else "")
        except ModelError as err:
            logger.warning("%s", err)
            return ""

    return find


def format_html(report: Report, title: str = "ProGiDiff Label: progress") -> str:
    """The report as one page without scripts or anything from elsewhere."""
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{_tell_advice(report.advice_about, report.advice)}</b></p>",
    ]
    parts += [
        f"<p>{_tell_advice(name, advice)}</p>"
        for name, advice in report.advice_by_model.items()
        if name != report.advice_about
    ]
    annotated, saves = report.annotated, report.saves
    parts.append(
        f"<p>{annotated.slices} slices of {annotated.images} images are annotated; "
        f"{annotated.whole_images} images wholly.</p>"
    )
    parts += [f"<p class=problem>{html.escape(problem)}</p>" for problem in [*report.problems, *report.set_aside]]
    parts.append("<h2>Validation Dice against annotated slices</h2>")
    versions = report.versions
    if versions:
        parts.append(draw_curves(versions))
        structures = list(dict.fromkeys(name for version in versions for name in version.dice))
        header = ["version", "slices", "mean", "before", *structures, "verdict"]
        rows = [
            [
                version.version + (" (served)" if version.served else ""),
                version.slices,
                _number(version.mean),
                _number(version.base_mean),
                *(_number(version.dice.get(name)) for name in structures),
                version.verdict,
            ]
            for version in versions
        ]
        parts.append(_table(header, rows))
        parts.append(
            "<p>Of the consensus on held-back slices, which also chose the number of steps: no test result.</p>"
        )
    else:
        parts.append("<p>No version was trained yet.</p>")
    parts.append("<h2>Masks accepted as they were</h2>")
    rows = [
        [entry.version, entry.saves, _percent(entry.unchanged), _number(entry.minutes_per_slice)]
        for entry in saves.by_version
    ]
    parts.append(
        _table(["proposals by", "saves", "unchanged", "minutes per slice"], rows)
        if rows
        else "<p>No label was saved yet.</p>"
    )
    if report.effort:
        parts.append("<h2>A person's work by structure</h2>")
        rows = [
            [entry.structure, entry.slices, f"{entry.seconds_per_slice:.1f}", f"{entry.clicks_per_slice:.1f}"]
            for entry in report.effort
        ]
        parts.append(_table(["structure", "slices", "seconds per slice", "clicks per slice"], rows))
        parts.append("<p>Seconds in which somebody used the review page; clicks and keys.</p>")
    parts.append("<h2>Next</h2>")
    rows = [
        [entry.image, ", ".join(str(item.index + 1) for item in entry.slices), entry.reason] for entry in report.queue
    ]
    parts.append(_table(["image", "slices", "why"], rows) if rows else "<p>Nothing is queued.</p>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 "
        "1em}table{border-collapse:collapse}td,th{border:1px solid #8888;padding:.2em "
        ".6em;text-align:left}.problem{color:#b00}:root{color-scheme:light dark}"
    )
    head = (
        "<meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>{html.escape(title)}</title><style>{style}</style>"
    )
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def draw_curves(versions: Sequence[TrainedVersion], width: int = 640, height: int = 260) -> str:
    """Dice per structure and their mean (bold) against training slices, as SVG; every adapter has lines of its own."""
    left, right, top, bottom = 40, 130, 10, 30
    most = max(1, max(version.slices for version in versions))
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for version in versions:
        for name, dice in {**version.dice, "mean": version.mean}.items():
            if dice is not None:
                x = left + (width - left - right) * version.slices / most
                lines.setdefault((version.name, name), []).append((x, top + (height - top - bottom) * (1 - dice)))
    colours = (
        "#1f77b4",
        "#ff7f0e",
        "#2ca02c",
        "#d62728",
        "#9467bd",
        "#8c564b",
        "#e377c2",
        "#7f7f7f",
        "#bcbd22",
        "#17becf",
    )
    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + (height - top - bottom) * (1 - share)
        drawn.append(
            f"<line x1={left} x2={width - right} y1={y:.0f} y2={y:.0f} stroke=#8884 "
            f"/><text x=4 y={y + 4:.0f}>{share:g}</text>"
        )
    for number, ((adapter, name), points) in enumerate(sorted(lines.items())):
        colour = "currentColor" if name == "mean" else colours[number % len(colours)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(points))
        thick = 3 if name == "mean" else 1.2
        drawn.append(f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width={thick} />")
        drawn += [f"<circle cx={x:.1f} cy={y:.1f} r={thick + 1} fill='{colour}'/>" for x, y in points]
        x, y = max(points)
        drawn.append(f"<text x={x + 8:.0f} y={y + 4:.0f} fill='{colour}'>{html.escape(f'{adapter}: {name}')}</text>")
    drawn.append(
        f"<text x={left} y={height - 6}>0</text><text x={width - right - 60} y={height - 6}>{most} slices</text>"
    )
    return (
        f"<svg viewBox='0 0 {width} {height}' style='max-width:{width}px;font-size:11px' "
        f"fill=currentColor role=img>{''.join(drawn)}</svg>"
    )


def list_versions(
    adapters: AdapterStore, textdiff: VersionStore[Any] | None, problems: list[str]
) -> list[TrainedVersion]:
    """All trained versions in one form; adapters first, in the order in which they were trained. What is damaged goes
    to `problems`. Of a version for pictures, "slices" are images and "dice" is empty: its mean is over the images.
    """
    found = []
    stores: list[VersionStore[Any]] = [adapters] if textdiff is None else [adapters, textdiff]
    for store in stores:
        for entry in store.entries():
            for number in entry.versions:
                try:
                    card = store.card(entry.name, number)
                    found.append(_describe_version(store, card, store.run(card), served=entry.current == number))
                except (ModelError, NotFoundError) as err:
                    problems.append(str(err))
    return found


def _describe_version(
    store: VersionStore[Any], card: VersionCard, run: Mapping[str, Any], served: bool
) -> TrainedVersion:
    dice = store.read_dice(run)
    adapted, base = dice.get("adapted") or {}, dice.get("base") or {}
    return TrainedVersion(
        version=card.full_name,
        name=card.name,
        modality=card.modality,
        created=card.created,
        served=served,
        slices=store.count_slices(run),
        dice={name: adapted[f"consensus {name}"] for name in card.structures if f"consensus {name}" in adapted},
        mean=adapted.get("consensus"),
        base_mean=base.get("consensus"),
        accepted=bool(run.get("accepted")),
        verdict=str(run.get("verdict", "")),
        cases=list(run.get("training_cases") or run.get("training_slices") or ()),
    )


def is_trained_on(version: TrainedVersion, images: Collection[str]) -> bool:
    """Whether all images that a version of `list_versions` learned from are among these."""
    return bool(version.cases) and set(version.cases).issubset(images)


def count_rounds(versions: Sequence[TrainedVersion], images: Collection[str]) -> dict[str, int]:
    """How often the model was improved by labels of these images, per modality ("CT", "MR", "picture"): accepted
    versions.

    Versions that came with the package, or that the gate refused, are no rounds: the choice of slices has learned
    nothing from them.
    """
    return dict(
        Counter(version.modality for version in versions if version.accepted and is_trained_on(version, images))
    )


def _is_about(save: Annotation, name: str, for_pictures: Collection[str]) -> bool:
    """Whether a save says how good proposals of a model are: those of its versions, and for an adapter those of the
    model without one.
    """
    if save.source is None:
        return False
    model, adapter = (reference.partition("@")[0] for reference in (save.source.model, save.source.adapter))
    if name in for_pictures:
        return model == name
    return model not in for_pictures and adapter in ("", name)


def _count_saves(saves: Sequence[Annotation]) -> AllSaves:
    by_version: dict[str, list[Annotation]] = {}
    for save in saves:
        version = "no proposal" if save.source is None else name_version(save.source.model, save.source.adapter)
        by_version.setdefault(version, []).append(save)
    rates = [VersionSaves(version=version, **dict(_measure(part))) for version, part in by_version.items()]
    return AllSaves(**dict(_measure(saves)), by_version=rates)


def measure_effort(saves: Sequence[Annotation]) -> list[StructureEffort]:
    """What people spent on each structure: the saves that were measured, together."""
    spent: dict[str, tuple[int, float, int]] = {}
    for save in saves:
        for name, seconds, clicks in save.effort:
            slices, before, pressed = spent.get(name, (0, 0.0, 0))
            spent[name] = (slices + _count_slices(save), before + seconds, pressed + clicks)
    found = [
        StructureEffort(
            structure=name,
            slices=slices,
            seconds=round(seconds, 1),
            clicks=clicks,
            seconds_per_slice=round(seconds / slices, 2),
            clicks_per_slice=round(clicks / slices, 2),
        )
        for name, (slices, seconds, clicks) in spent.items()
        if slices
    ]
    return sorted(found, key=lambda entry: -entry.seconds)


def _measure(saves: Sequence[Annotation]) -> SaveFigures:
    known = [save.edited for save in saves if save.edited is not None]
    timed = [(save.seconds, _count_slices(save)) for save in saves if save.seconds is not None and _count_slices(save)]
    minutes = sum(seconds for seconds, _ in timed) / 60 / sum(count for _, count in timed) if timed else None
    return SaveFigures(
        saves=len(saves),
        known=len(known),
        unchanged=None if not known else round(sum(not edited for edited in known) / len(known), 4),
        minutes_per_slice=None if minutes is None else round(minutes, 3),
    )


def _count_slices(save: Annotation) -> int:
    return len(save.slices) if save.slices is not None else save.num_slices or 0


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _tell_advice(name: str, advice: Advice) -> str:
    return html.escape(f"{name}: {advice.message}" if name else advice.message)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0%}"
