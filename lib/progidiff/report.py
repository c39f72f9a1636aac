"""What annotating has brought so far: validation Dice against annotated slices, how often masks were accepted as they were, how long a
slice takes, what is queued and why, and whether to go on. From the label history and the versions on disk; no network, no server.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from progidiff.acquisition import AcquisitionConfig, Pick, build_pool, pick_slices, summarise_reasons
from progidiff.adapters import AdapterStore
from progidiff.annotations import Annotation, AnnotationStore
from progidiff.errors import ModelError, NotFoundError
from progidiff.retrain import CurvePoint, advise
from progidiff.slice_scores import SliceScoreStore, name_version

logger = logging.getLogger(__name__)

BATCH = 20
"""Slices that the expected gain is about if trainings do not start by themselves."""

SLICES_SHOWN = 8


def build_report(annotations: AnnotationStore, adapters: AdapterStore, queue: Sequence[Mapping[str, Any]], batch: int = BATCH) -> dict[str, Any]:
    """Everything as plain values for JSON.

    Args:
        annotations: The label history.
        adapters: The trained versions.
        queue: What is next, see `list_queue`.
        batch: Slices until the next training.

    Returns:
        "annotated" {images, whole_images, slices}, "saves" {total, known, unchanged, minutes_per_slice, by_version}, "versions" [version,
        created, served, slices, dice {structure: Dice}, mean, base_mean, verdict], "advice" (see `retrain.Advice`), "queue", "problems".
    """
    problems: list[str] = []
    versions = _list_versions(adapters, problems)
    saves = [save for save in annotations.list() if save.tag == "final"]
    state = annotations.annotated_images()
    served = next((entry["name"] for entry in reversed(versions) if entry["served"]), versions[-1]["name"] if versions else "")
    curve = [CurvePoint(v["version"], v["slices"], v["mean"]) for v in versions if v["name"] == served and v["mean"] is not None]
    return {
        "annotated": {
            "images": len(state),
            "whole_images": sum(slices is None for slices in state.values()),
            "slices": annotations.count_slices_since(0),
        },
        "saves": _count_saves(saves),
        "versions": versions,
        "advice": advise([save.edited for save in saves if save.edited is not None], curve, batch).to_dict(),
        "queue": [dict(entry) for entry in queue],
        "problems": problems + annotations.verify(),
    }


def list_queue(scores: SliceScoreStore, annotations: AnnotationStore, images: Collection[str], limit: int = 20) -> list[dict[str, Any]]:
    """The images that are worth annotating next by the newest scores on disk, best first, as a server without clients would list them.

    Returns:
        Per image: "image", "slices" [{index, score, structures, reason}], "reason", "scores_from".
    """
    entries = {image: entry for image, entry in scores.pick_newest(lambda modality: "").items() if image in images}
    pool = build_pool([entry.scores for entry in entries.values()])
    annotated = annotations.annotated_images()
    config = AcquisitionConfig(noise=False)
    order = pick_slices(pool, limit, config=config, annotated=annotated, one_per_image=True)
    found = []
    for first in order:
        picks = pick_slices(pool, SLICES_SHOWN, config=config, annotated=annotated, within=first.image)
        slices = [_describe_pick(pick) for pick in picks]
        version = entries[first.image].scores.version
        found.append({"image": first.image, "slices": slices, "reason": summarise_reasons(picks), "scores_from": version})
    return found


def format_html(report: Mapping[str, Any], title: str = "ProGiDiff Label: progress") -> str:
    """The report as one page without scripts or anything from elsewhere."""
    parts = [f"<h1>{html.escape(title)}</h1>", f"<p><b>{html.escape(report['advice']['message'])}</b></p>"]
    annotated, saves = report["annotated"], report["saves"]
    parts.append(f"<p>{annotated['slices']} slices of {annotated['images']} images are annotated; {annotated['whole_images']} images wholly.</p>")
    parts += [f"<p class=problem>{html.escape(problem)}</p>" for problem in report["problems"]]
    parts.append("<h2>Validation Dice against annotated slices</h2>")
    versions = report["versions"]
    if versions:
        parts.append(draw_curves(versions))
        structures = list(dict.fromkeys(name for version in versions for name in version["dice"]))
        header = ["version", "slices", "mean", "before", *structures, "verdict"]
        rows = [
            [
                version["version"] + (" (served)" if version["served"] else ""),
                version["slices"],
                _number(version["mean"]),
                _number(version["base_mean"]),
                *(_number(version["dice"].get(name)) for name in structures),
                version["verdict"],
            ]
            for version in versions
        ]
        parts.append(_table(header, rows))
        parts.append("<p>Of the consensus on held-back slices, which also chose the number of steps: no test result.</p>")
    else:
        parts.append("<p>No version was trained yet.</p>")
    parts.append("<h2>Masks accepted as they were</h2>")
    rows = [[entry["version"], entry["saves"], _percent(entry["unchanged"]), _number(entry["minutes_per_slice"])] for entry in saves["by_version"]]
    parts.append(_table(["proposals by", "saves", "unchanged", "minutes per slice"], rows) if rows else "<p>No label was saved yet.</p>")
    parts.append("<h2>Next</h2>")
    rows = [[entry["image"], ", ".join(str(item["index"]) for item in entry["slices"]), entry["reason"]] for entry in report["queue"]]
    parts.append(_table(["image", "slices", "why"], rows) if rows else "<p>Nothing is queued.</p>")
    style = (
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #8888;padding:.2em .6em;text-align:left}.problem{color:#b00}:root{color-scheme:light dark}"
    )
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{html.escape(title)}</title><style>{style}</style>"
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def draw_curves(versions: Sequence[Mapping[str, Any]], width: int = 640, height: int = 260) -> str:
    """Dice per structure and their mean (bold) against training slices, as SVG; every adapter has lines of its own."""
    left, right, top, bottom = 40, 130, 10, 30
    most = max(1, max(version["slices"] for version in versions))
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for version in versions:
        for name, dice in {**version["dice"], "mean": version["mean"]}.items():
            if dice is not None:
                x = left + (width - left - right) * version["slices"] / most
                lines.setdefault((version["name"], name), []).append((x, top + (height - top - bottom) * (1 - dice)))
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
    drawn = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = top + (height - top - bottom) * (1 - share)
        drawn.append(f"<line x1={left} x2={width - right} y1={y:.0f} y2={y:.0f} stroke=#8884 /><text x=4 y={y + 4:.0f}>{share:g}</text>")
    for number, ((adapter, name), points) in enumerate(sorted(lines.items())):
        colour = "currentColor" if name == "mean" else colours[number % len(colours)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(points))
        thick = 3 if name == "mean" else 1.2
        drawn.append(f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width={thick} />")
        drawn += [f"<circle cx={x:.1f} cy={y:.1f} r={thick + 1} fill='{colour}'/>" for x, y in points]
        x, y = max(points)
        drawn.append(f"<text x={x + 8:.0f} y={y + 4:.0f} fill='{colour}'>{html.escape(f'{adapter}: {name}')}</text>")
    drawn.append(f"<text x={left} y={height - 6}>0</text><text x={width - right - 60} y={height - 6}>{most} slices</text>")
    return f"<svg viewBox='0 0 {width} {height}' style='max-width:{width}px;font-size:11px' fill=currentColor role=img>{''.join(drawn)}</svg>"


def _list_versions(adapters: AdapterStore, problems: list[str]) -> list[dict[str, Any]]:
    found = []
    for entry in adapters.entries():
        for number in entry.versions:
            try:
                card = adapters.card(entry.name, number)
                run = adapters.run(card)
            except (ModelError, NotFoundError) as err:
                problems.append(str(err))
                continue
            figures = run.get("validation") or {}
            adapted, base = figures.get("adapted") or {}, figures.get("base") or {}
            found.append(
                {
                    "version": card.full_name,
                    "name": entry.name,
                    "created": card.created,
                    "served": entry.current == number,
                    "slices": sum(len(slices) for slices in (run.get("training_slices") or {}).values()),
                    "dice": {name: adapted[f"consensus {name}"] for name in card.structures if f"consensus {name}" in adapted},
                    "mean": adapted.get("consensus"),
                    "base_mean": base.get("consensus"),
                    "verdict": str(run.get("verdict", "")),
                }
            )
    return found


def _count_saves(saves: Sequence[Annotation]) -> dict[str, Any]:
    by_version: dict[str, list[Annotation]] = {}
    for save in saves:
        version = "no proposal" if save.source is None else name_version(save.source.model, save.source.adapter)
        by_version.setdefault(version, []).append(save)
    rates = [{"version": version, **_measure(part)} for version, part in by_version.items()]
    return {**_measure(saves), "by_version": rates}


def _measure(saves: Sequence[Annotation]) -> dict[str, Any]:
    known = [save.edited for save in saves if save.edited is not None]
    timed = [(save.seconds, _count_slices(save)) for save in saves if save.seconds is not None and _count_slices(save)]
    minutes = sum(seconds for seconds, _ in timed) / 60 / sum(count for _, count in timed) if timed else None
    return {
        "saves": len(saves),
        "known": len(known),
        "unchanged": None if not known else round(sum(not edited for edited in known) / len(known), 4),
        "minutes_per_slice": None if minutes is None else round(minutes, 3),
    }


def _count_slices(save: Annotation) -> int:
    return len(save.slices) if save.slices is not None else save.num_slices or 0


def _describe_pick(pick: Pick) -> dict[str, Any]:
    return {"index": pick.index, "score": round(pick.score, 4), "structures": list(pick.structures), "reason": pick.reason}


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(str(cell))}" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(cell))}" for cell in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.0%}"
