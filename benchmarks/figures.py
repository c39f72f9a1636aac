"""The figures that go with the tables, and the worst cases.

    python benchmarks/figures.py charts --out docs/images
    python benchmarks/figures.py worst --studies ../shared/data/ct --cases img0039 --structures pancreas --out
    runs/worst.png python benchmarks/figures.py worst --studies sample_datastore --cases sample_ct_dicom --unlabelled
    --rows 4 --out docs/images/disagreements.png

`charts` draws from the JSON files in `benchmarks/results` and nothing else; no model, no image:

* `figures_segmentation.png`: Dice per structure of one proposal, the consensus and the best of K
  (`evaluate_ct_heldout.json`), the U-Net (`segmentation.json`, whole volumes as drawn), and the consensus of every
  single volume.
* `figures_quality.png`: how many of the voxels with this agreement are truly inside, and the rank correlation of the
  error with the disagreement (`proposal_quality.json`, which holds no single slices, so there is no cloud of points to
  draw).
* `figures_text.png`: Dice by what the prompt says (`text_controls.json`), with a point for every structure.
* `figures_transfer.png`: Dice in MR by what the model was adapted with, a point for every seed, and the evidence's Dice
  under shading (`transfer_mr.json`; rows that it does not hold are left out).

`worst` draws proposals with the shipped model and shows where they are worst, one row each. A candidate is a structure
on a slice of a volume. With labels its score is

    (1 - Dice of the consensus) * min(1, a / A)

where a is the area of the truth or of the consensus on the slice, whichever is larger, and A the largest area of the
truth on any slice of the volume, but at least 100 mm2. So a slice counts in full where the structure is about as large
as it gets, hardly where it is a few pixels of its end, whatever the size of the organ. Dice is that of the slice; where
only one of the two draws anything it is 0. Without labels, or with `--unlabelled`, the disagreement of the slice (1 -
mean pairwise Dice) stands for 1 - Dice, a is the mean area of the proposals, and A is the largest area of the
consensus. Only the slice with the highest score stays of each structure and volume, then the N highest are drawn.

**Pictures of the research data sets (BTCV, CHAOS, MoNuSeg and whatever else is in ../shared) must not be committed**:
their licences do not allow to pass images on. Write them to `runs/`, which git ignores. Those of sample_datastore
(TotalSegmentator, Apache-2.0) may be.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from progidiff.errors import ProGiDiffError, RequestError
from progidiff.evaluation.evaluate import match_structures
from progidiff.images.formats import Use, find_kind, strip_suffix
from progidiff.images.intensities import compute_window
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.labels.cases import LabelledCase, list_labelled, load_label_names
from progidiff.prompts.parser import Query, parse_prompt
from progidiff.proposals import drawing
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import DEFAULT_CLEAN_UP, ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work

ROOT = Path(__file__).resolve().parents[1]

# Okabe and Ito's palette: told apart with any colour vision, and in grey by their lightness.
BLACK, ORANGE, SKY, GREEN, BLUE, RED, GREY = "#222222", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#9a9a9a"
MIN_AREA_MM2 = 100.0


# Charts


def load_result(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of `benchmarks/results`.

    Raises:
        RequestError: if it is absent or no JSON.
    """
    path = folder / f"{name}.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise RequestError(
            f"'{path}' cannot be read ({err}). Write it with its benchmark, or name the "
            "folder that has it with --results."
        ) from err
    return report


def make_chart(*widths: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure with plots side by side, widths and height in inches."""
    figure = Figure(figsize=(sum(widths), height), dpi=drawing.DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    plots = list(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    for plot in plots:
        plot.spines[["top", "right"]].set_visible(False)
        plot.tick_params(labelsize=8, length=3)
    return figure, plots


def name_rows(plot: Any, names: Sequence[str]) -> None:
    """Names on the left of a plot, the first on top."""
    plot.set_yticks(range(len(names)), names)
    plot.set_ylim(len(names) - 0.4, -0.6)
    plot.tick_params(axis="y", length=0)


def set_titles(plot: Any, title: str, x: str, y: str = "") -> None:
    plot.set_title(title, fontsize=9, loc="left")
    plot.set_xlabel(x, fontsize=8)
    plot.set_ylabel(y, fontsize=8)


def chart_segmentation(heldout: Mapping[str, Any], rivals: Mapping[str, Any]) -> Figure:
    """Dice per structure, best consensus on top, means below.

    Args:
        heldout: A report of `progidiff evaluate`.
        rivals: A report of `benchmarks/segmentation.py`; may be without whole volumes of the U-Net.
    """
    summary, count = heldout["summary"], heldout["num_proposals"]
    consensus = summary["consensus"]["dice"]
    structures = sorted(consensus, key=lambda name: -consensus[name])
    groups = {
        "transunet_8": f"mean of {len(summary['mean_over']['transunet_8'])}",
        "all": f"mean of all {len(summary['mean_over']['all'])}",
    }
    rows = [*structures, *groups.values()]

    def collect(part: Mapping[str, Any], kind: str) -> list[float]:
        values = part[kind]["dice"]
        return [values.get(name) for name in structures] + [part["mean"][kind]["dice"][group] for group in groups]

    figure, (plot,) = make_chart(7.2, height=0.7 + 0.27 * len(rows))
    for kind, marker, size, label in (
        ("single", "|", 60, "single proposal (mean)"),
        ("consensus", "o", 26, f"consensus of {count}"),
        ("best", ">", 26, f"best of {count}, picked with the truth"),
    ):
        color = GREEN if kind == "best" else BLUE
        plot.scatter(
            collect(summary, kind), range(len(rows)), s=size, marker=marker, color=color, label=label, zorder=4
        )
    drawn = rivals.get("volumes", {}).get("networks", {}).get("U-Net")
    if drawn is not None:
        values = collect(drawn["as drawn"]["summary"], "consensus")
        plot.scatter(
            values, range(len(rows)), s=46, marker="D", facecolors="none", edgecolors=RED, label="U-Net", zorder=5
        )
    cases = [case["structures"] for case in heldout["cases"] if "error" not in case]
    points = [
        (case[name]["consensus"]["dice"], row)
        for row, name in enumerate(structures)
        for case in cases
        if case[name]["present"]
    ]
    plot.scatter(*zip(*points, strict=True), s=9, color=GREY, linewidths=0, label="consensus of each volume", zorder=2)
    plot.axhline(len(structures) - 0.5, color=GREY, linewidth=0.6)
    plot.grid(axis="both", color="#e8e8e8", linewidth=0.6)
    plot.set_axisbelow(True)
    name_rows(plot, rows)
    plot.set_xlim(0, 1)
    set_titles(plot, f"{heldout['model_version']} on {len(cases)} held-out CT volumes, no clean-up", "Dice")
    plot.legend(fontsize=7.5, frameon=False, loc="upper left")
    return figure


def chart_quality(report: Mapping[str, Any]) -> Figure:
    """Calibration of the agreement, and what ranks slices by their error."""
    voxels, count = report["voxels"], report["num_proposals"]
    figure, (calibration, ranking) = make_chart(3.9, 5.4, height=3.6)
    calibration.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="calibrated")
    for key, field, color, marker, label, ece in (
        ("reliability", "agreement", BLUE, "o", f"agreement of {count}", "band"),
        ("reliability_probability", "probability", ORANGE, "s", "mean probability", "mean probability from 0.05"),
    ):
        points = [(row[field], row["inside"]) for row in voxels[key] if row["inside"] is not None]
        label = f"{label}, ECE {voxels['ece'][ece]:.3f}"
        calibration.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, linewidth=1, label=label)
    calibration.set_xlim(0, 1.02)
    calibration.set_ylim(0, 1.02)
    calibration.set_aspect("equal")
    calibration.legend(fontsize=7.5, frameon=False, loc="upper left")
    set_titles(calibration, "Is it a probability?", "claimed", "share of voxels truly inside")

    table = report["disagreement_against_error"]
    names = list(table)
    kinds = list(next(iter(table.values())))
    for kind, color, shift in zip(kinds, (SKY, BLUE), (-0.17, 0.17), strict=True):
        places = [row + shift for row in range(len(names))]
        ranking.scatter(
            [table[name][kind]["drawn"] for name in names],
            places,
            s=32,
            color=color,
            label=f"{kind}, all volumes",
            zorder=3,
        )
        single = [
            (v, place)
            for name, place in zip(names, places, strict=True)
            for v in table[name][kind]["drawn by case"].values()
            if v is not None
        ]
        ranking.scatter(
            *zip(*single, strict=True),
            s=12,
            marker="|",
            color=color,
            label="each volume" if kind == kinds[-1] else None,
        )
    ranking.grid(axis="x", color="#e8e8e8", linewidth=0.6)
    ranking.set_axisbelow(True)
    ranking.set_xlim(0, 1)
    name_rows(ranking, [shorten(name) for name in names])
    ranking.legend(fontsize=7.5, frameon=False, loc="upper left")
    set_titles(
        ranking,
        f"Does it rank {report['pairs']['drawn']} pairs of slice and structure by 1 - Dice?",
        "Spearman's rank correlation",
    )
    return figure


def shorten(name: str) -> str:
    """The name of a summary of `proposal_quality.py` in few letters."""
    names = {
        "1 - Dice that the mean probability expects": "1 - Dice expected of the\nmean probability",
        "entropy / sum of the mean probability": "entropy / sum of the\nmean probability",
        "disagreement with an edge of one pixel counted as open": "disagreement, edge of\none pixel open",
        "1 / size of the consensus (no disagreement at all)": "1 / size alone",
    }
    return names.get(name, name)


PROMPTS = {
    "right": "the structure's name",
    "unseen synonyms": "synonyms never trained",
    "empty": "nothing",
    "shuffled": "another structure's name",
    "any other name": "any other name, mean",
}
SIDED = {
    "right": "the side that is meant",
    "swapped": "the other side",
    "swapped, other side": "the other side,\nscored against that side",
}
"""Control of `text_controls.py` -> what it is called; the others keep their names."""


def chart_text(report: Mapping[str, Any]) -> Figure:
    """Dice against the structure that was meant, by what the prompt says; those with a side apart."""
    controls = report["summary"]["controls"]
    names = [name for name in controls if not name.startswith("swapped")]
    figure, (all_plot, side_plot) = make_chart(5.2, 3.8, height=3.0)
    for plot, rows, labels, group, color in (
        (all_plot, names, [PROMPTS.get(name, name) for name in names], "all", BLUE),
        (side_plot, list(SIDED), list(SIDED.values()), "with a side", GREEN),
    ):
        for row, name in enumerate(rows):
            structures = {key: value for key, value in controls[name]["structures"].items() if value is not None}
            if group == "with a side":
                structures = {key: value for key, value in structures.items() if key.startswith(("left", "right"))}
            mean = controls[name][group]
            plot.barh(row, mean, height=0.62, color=color, alpha=0.45)
            plot.scatter(
                list(structures.values()),
                [row] * len(structures),
                s=12,
                color=BLACK,
                alpha=0.7,
                linewidths=0,
                zorder=3,
                clip_on=False,
            )
            plot.text(1.04, row, f"{mean:.2f}", fontsize=8, va="center")
        plot.set_xlim(0, 1)
        name_rows(plot, labels)
    count = len(controls["right"]["structures"])
    set_titles(all_plot, f"What the prompt says, mean of {count} structures", "Dice")
    set_titles(side_plot, "Which side it says, kidneys and adrenals", "Dice")
    return figure


LABELS = {
    "unadapted": "as it is",
    "LoRA, 10 slices": "10 slices",
    "LoRA, 30 slices": "30 slices",
    "LoRA, 1 volume": "1 volume",
    "LoRA, 3 volumes": "3 volumes",
    "LoRA, 5 volumes": "5 volumes",
    "full, 5 volumes": "5 volumes,\nall weights",
}
"""Row of `benchmarks/transfer.py` -> place on the axis."""
WIDER = ", wider window"
SHADED = {
    "unadapted": ("as it is", GREY, "-"),
    f"unadapted{WIDER}": ("as it is, wider window", GREY, "--"),
    "LoRA, 5 volumes, no shading": ("5 volumes, no shading in training", ORANGE, "-"),
    "LoRA, 5 volumes": ("5 volumes", BLUE, "-"),
    f"LoRA, 5 volumes{WIDER}": ("5 volumes, wider window", BLUE, "--"),
    "LoRA, 5 volumes, strong shading": ("5 volumes, strong shading in training", GREEN, "-"),
}
"""Row -> what it is called under shading, its colour and its line."""


def chart_transfer(report: Mapping[str, Any]) -> Figure:
    """Dice in MR by training data, a point for every seed, and under shading; only the rows that there are."""
    summary = report["summary"]
    figure, (amount, shading) = make_chart(5.2, 4.0, height=3.4)
    places = [name for name in LABELS if name in summary or name + WIDER in summary]
    for suffix, color, marker, label, shift in (
        ("", BLUE, "o", "window as in training", -0.08),
        (WIDER, ORANGE, "D", "wider window", 0.08),
    ):
        found = [
            (place + shift, summary[name + suffix]) for place, name in enumerate(places) if name + suffix in summary
        ]
        if not found:
            continue
        seeds = [(x, dice) for x, row in found for dice in row["dice_of_seeds"]]
        means = [(x, row["dice"][row["shown"]]) for x, row in found]
        if len(seeds) > len(means):
            amount.scatter(
                *zip(*seeds, strict=True),
                s=12,
                color=color,
                alpha=0.6,
                linewidths=0,
                label="each seed" if not suffix else None,
            )
        amount.scatter(*zip(*means, strict=True), s=40, marker=marker, color=color, label=label, zorder=3)
        for x, row in found:
            # Below the lowest seed and above the highest one, so that no label lies on a point.
            place = max(row["dice_of_seeds"]) if suffix else min(row["dice_of_seeds"])
            text = f"{row['dice'][row['shown']]:.2f}"
            amount.annotate(
                text,
                (x, place),
                (0, 9 if suffix else -9),
                textcoords="offset points",
                fontsize=7.5,
                ha="center",
                va="center",
            )
    amount.set_xticks(range(len(places)), [LABELS[name] for name in places])
    amount.set_xlim(-0.6, max(len(places) - 0.4, 0.6))
    tests = len(report["setup"]["test"])
    set_titles(amount, f"Consensus of {report['setup']['num_proposals']} on {tests} MR volumes", "adapted with", "Dice")

    for name, (label, color, line) in SHADED.items():
        if name in summary:
            under = {
                float(strength): dice
                for strength, dice in summary[name]["evidence_under_shading"].items()
                if dice is not None
            }
            shading.plot(
                list(under),
                list(under.values()),
                color=color,
                linestyle=line,
                marker="o",
                markersize=4,
                linewidth=1.3,
                label=label,
            )
            shading.set_xticks(list(under))
    set_titles(shading, "Evidence alone, test volumes shaded", "strength of the shading", "Dice")
    for plot in (amount, shading):
        plot.set_ylim(0, 1)
        plot.grid(axis="y", color="#e8e8e8", linewidth=0.6)
        plot.set_axisbelow(True)
        plot.legend(fontsize=7.5, frameon=False, loc="lower left" if plot is shading else "lower right")
    return figure


CHARTS: Mapping[str, tuple[Callable[..., Figure], tuple[str, ...]]] = {
    "segmentation": (chart_segmentation, ("evaluate_ct_heldout", "segmentation")),
    "quality": (chart_quality, ("proposal_quality",)),
    "text": (chart_text, ("text_controls",)),
    "transfer": (chart_transfer, ("transfer_mr",)),
}
"""Name -> what draws it, and from which results."""


def draw_charts(options: argparse.Namespace) -> None:
    """The figures of the tables, from the committed results alone."""
    for name in options.only or CHARTS:
        chart, sources = CHARTS[name]
        path = drawing._save(
            chart(*(load_result(options.results, source) for source in sources)), options.out / f"figures_{name}.png"
        )
        print(
            f"Wrote {path} ({path.stat().st_size / 1000:.0f} kB) from "
            f"{', '.join(f'{source}.json' for source in sources)}."
        )


# Worst cases


@dataclass(frozen=True)
class Candidate:
    """One structure on one slice of a volume, with all that is drawn of it.

    Attributes:
        case, structure, z: Which.
        score: See the top of this file, from 0 to 1.
        disagreement: 1 - mean pairwise Dice of the proposals on the slice.
        masks: The K proposals, bool of shape (K, Y, X).
        truth: bool of shape (Y, X); None without labels.
        pixels: The slice, shape (Y, X).
        body: Rows and columns of the body in the volume.
        spacing: Of the stack (z, y, x) in mm.
        window: Lowest and highest intensity shown.
    """

    case: str
    structure: str
    z: int
    score: float
    disagreement: float
    masks: np.ndarray
    truth: np.ndarray | None
    pixels: np.ndarray
    body: tuple[slice, slice]
    spacing: tuple[float, float, float]
    window: tuple[float, float]

    @property
    def share(self) -> np.ndarray:
        """Share of the proposals that draw a pixel, of shape (Y, X)."""
        return self.masks.mean(axis=0)

    @property
    def consensus(self) -> np.ndarray:
        """What at least half of the proposals draw, as in `progidiff.proposals.volume_proposals`."""
        return find_consensus(self.masks)


def find_consensus(masks: np.ndarray) -> np.ndarray:
    """Of K masks (K, Y, X) the pixels that at least half of them draw."""
    return masks.sum(axis=0) * 2 >= len(masks)


def compute_slice_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two masks of a slice; 1 if both are empty, 0 if one is."""
    total = int(mask.sum()) + int(truth.sum())
    return 2 * int((mask & truth).sum()) / total if total else 1.0


def weigh(error: float, area: float, largest: float) -> float:
    """The score of a slice, from 0 to 1.

    Args:
        error: 1 - Dice or the disagreement, from 0 to 1.
        area: Of what is drawn on the slice, mm2.
        largest: Of the structure on any slice of the volume, mm2; taken as `MIN_AREA_MM2` if smaller.

    Example:
        >>> weigh(0.5, 300, 400), weigh(1.0, 9, 9), weigh(0.5, 900, 400)
        (0.375, 0.09, 0.5)
    """
    return error * min(1.0, area / max(largest, MIN_AREA_MM2))


def find_worst(
    name: str,
    volume: Volume,
    proposals: VolumeProposals,
    labels: np.ndarray | None = None,
    ids: Mapping[str, Sequence[int]] | None = None,
) -> list[Candidate]:
    """Per structure the slice with the highest score, if any is above 0.

    Args:
        name: Of the volume.
        volume: The image.
        proposals: Of the volume.
        labels: Label ids on its grid, shape (I, J, K) in file order; None to rank by disagreement.
        ids: Structure -> label ids; needed with labels.
    """
    stack, spacing = volume.to_stack()
    pixel = spacing[1] * spacing[2]
    truths = None if labels is None else volume.arrange(labels)
    body, window = drawing._find_body(volume, stack, None, spacing), compute_window(volume)
    found = []
    for index, structure in enumerate(proposals.structures):
        truth = None if truths is None or ids is None else np.isin(truths, list(ids[structure]))
        entries = []  # z, error, area
        largest = 0.0
        for z in range(len(stack)):
            masks = proposals.slice_masks(structure, z)
            inside = None if truth is None else truth[z]
            if not masks.any() and (inside is None or not inside.any()):
                continue
            consensus = find_consensus(masks)
            if inside is None:
                entries.append((z, float(proposals.disagreement[index, z]), float(masks.sum() / len(masks) * pixel)))
                largest = max(largest, float(consensus.sum() * pixel))
            else:
                entries.append(
                    (z, 1 - compute_slice_dice(consensus, inside), float(max(consensus.sum(), inside.sum()) * pixel))
                )
                largest = max(largest, float(inside.sum() * pixel))
        # Of two slices with the same score the one where more is drawn, then the lower one.
        ranked = sorted(
            entries, key=lambda entry, largest=largest: (-weigh(entry[1], entry[2], largest), -entry[2], entry[0])
        )  # type: ignore[misc]
        if ranked and weigh(ranked[0][1], ranked[0][2], largest) > 0:
            z, error, area = ranked[0]
            score, disagreement = weigh(error, area, largest), float(proposals.disagreement[index, z])
            masks, inside = proposals.slice_masks(structure, z), None if truth is None else truth[z]
            found.append(
                Candidate(name, structure, z, score, disagreement, masks, inside, stack[z], body, spacing, window)
            )
    return found


def draw_worst(candidates: Sequence[Candidate], path: Path, max_proposals: int = 4) -> Path:
    """One row per candidate: the slice, the truth (if any has one), proposals, their consensus and agreement, with Dice
    in the titles.

    Args:
        candidates: Rows, in this order.
        path: PNG to write.
        max_proposals: Columns of proposals.
    """
    shown = min(max_proposals, min(len(one.masks) for one in candidates))
    labelled = any(one.truth is not None for one in candidates)
    proportion = float(np.mean([drawing._proportion(*one.body, one.spacing) for one in candidates]))
    figure, axes = drawing._make_figure(
        len(candidates), shown + 3 + labelled, proportion, extra_inches=0.1 + 0.2 * len(candidates)
    )
    for one, row in zip(candidates, axes, strict=True):
        color = drawing.pick_color(one.structure)
        marked = one.share > 0 if one.truth is None else (one.share > 0) | one.truth
        frame = drawing._frame_around(marked, one.body, one.spacing)
        columns = np.delete(row, 1) if labelled else row
        masks = list(one.masks[:shown])
        heat = drawing._draw_row(columns, one.pixels, one.share, masks, one.body, frame, one.spacing, one.window, color)
        titles = [f"proposal {k + 1}" for k in range(shown)] + [f"consensus of {len(one.masks)}"]
        if one.truth is not None:
            drawing._show_slice(row[1], one.pixels, *frame, one.spacing, one.window)
            drawing._paint(row[1], one.truth, *frame, one.spacing, "#ffffff")
            row[1].set_title("truth" if one.truth.any() else "truth: not there", color=drawing.TEXT, fontsize=9, pad=4)
            for axis in (columns[-2], columns[-1]):
                if one.truth.any():
                    drawing._outline(axis, one.truth, *frame, one.spacing, "#ffffff")
            titles = [
                f"{t}, Dice {compute_slice_dice(m, one.truth):.2f}"
                for t, m in zip(titles, [*masks, one.consensus], strict=True)
            ]
        for axis, title in zip(columns[1:], [*titles, f"agreement, disagreement {one.disagreement:.2f}"], strict=True):
            axis.set_title(title, color=drawing.TEXT, fontsize=9, pad=4)
        row[0].set_ylabel(one.structure, color=drawing.TEXT, fontsize=9)
        row[0].set_xlabel(f"{one.case}, z = {one.z}", color=drawing.TEXT, fontsize=7)
    bar = figure.colorbar(heat, ax=axes[:, -1].tolist(), fraction=0.05, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("share of the proposals", color=drawing.TEXT, fontsize=7)
    bar.ax.tick_params(colors=drawing.TEXT, labelsize=7)
    bar.outline.set_visible(False)
    return drawing._save(figure, path)


def list_unlabelled(studies: Path, names: Sequence[str] | None) -> list[LabelledCase]:
    """The volumes of a folder by name; nothing is asked about labels.

    Raises:
        RequestError: if there is none, or no such one.
    """
    files = sorted(studies.iterdir()) if studies.is_dir() else []
    images = {
        strip_suffix(path.name): path
        for path in files
        if find_kind(path, Use.UPLOAD) == "volume" and not path.name.startswith(".")
    }
    wanted = [strip_suffix(name) for name in names or images]
    unknown = [name for name in wanted if name not in images]
    if unknown or not wanted:
        there = ", ".join(images) or "no image"
        raise RequestError(
            f"In '{studies}' there is no image {', '.join(unknown)}; it holds {there}. "
            "`make setup` fills sample_datastore."
        )
    return [LabelledCase(name, images[name], images[name]) for name in images if name in wanted]


def show_worst(options: argparse.Namespace) -> None:
    """Where the proposals are worst, or, without labels, where they differ most."""
    unlabelled = options.unlabelled or not (options.studies / "labels" / "final").is_dir()
    engine = Engine(options.model, device=options.device)
    ids: Mapping[str, Sequence[int]] | None = None
    if unlabelled:
        cases = list_unlabelled(options.studies, options.cases)
        queries = [q for text in options.structures or engine.structures for q in parse_prompt(text, engine.structures)]
    else:
        cases = list_labelled(options.studies, options.cases)
        ids, _ = match_structures(load_label_names(options.studies), engine.structures, options.structures or ())
        queries = [Query(name, name) for name in ids]
    candidates: list[Candidate] = []
    settings: dict[str, Any] = {}
    for case in cases:
        volume = load_volume(case.image, options.modality)
        labels = None if unlabelled else load_label(case.label, like=volume.grid)
        request = ProposalRequest(
            queries=tuple(dict.fromkeys(queries)),
            num_proposals=options.num_proposals,
            seed=options.seed,
            clean_up=DEFAULT_CLEAN_UP,
        )
        proposals = engine.propose(request, volume, Work(remember=False))
        settings = proposals.summary()
        candidates += find_worst(case.name, volume, proposals, labels, ids)
        print(f"{case.name}: {proposals.seconds:.0f} s", file=sys.stderr, flush=True)
    worst = sorted(candidates, key=lambda one: -one.score)[: options.rows]
    if not worst:
        raise RequestError(
            "Nothing is drawn and nothing is labelled on these images, so there is no "
            "worst slice. Choose other cases or structures."
        )
    path = draw_worst(worst, options.out)
    print("| volume | structure | z | Dice of the consensus | disagreement | score |\n|---|---|---|---|---|---|")
    for one in worst:
        dice = "-" if one.truth is None else f"{compute_slice_dice(one.consensus, one.truth):.3f}"
        print(f"| {one.case} | {one.structure} | {one.z} | {dice} | {one.disagreement:.3f} | {one.score:.3f} |")
    model = f"{settings['model_version']}{' with ' + settings['adapter'] if settings['adapter'] else ''}"
    print(
        f"Wrote {path} ({path.stat().st_size / 1000:.0f} kB): {model}, K = {settings['num_proposals']}, "
        f"{settings['num_inference_steps']} steps, seed {settings['seed']}, clean-up {settings['clean_up']}, ranked by "
        f"{'disagreement' if unlabelled else 'error'}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    part = commands.add_parser("charts", help=draw_charts.__doc__)
    part.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the JSON files")
    part.add_argument("--out", type=Path, default=ROOT / "docs" / "images", help="folder to write figures_*.png into")
    part.add_argument("--only", nargs="*", choices=list(CHARTS), help="only these (default: all)")
    part.set_defaults(run=draw_charts)
    part = commands.add_parser("worst", help=show_worst.__doc__)
    part.add_argument(
        "--studies",
        type=Path,
        required=True,
        help="folder of images; with labels/final and labels.json they are the truth",
    )
    part.add_argument("--cases", nargs="*", help="only these volumes (default: all)")
    part.add_argument(
        "--structures", nargs="*", help="only these (default: all that the model knows and the labels name)"
    )
    part.add_argument("--unlabelled", action="store_true", help="rank by disagreement even if there are labels")
    part.add_argument("--rows", type=int, default=6, help="N, how many are drawn (default 6)")
    part.add_argument("--num-proposals", type=int, default=4, help="K (default 4)")
    part.add_argument("--seed", type=int, default=0)
    part.add_argument("--modality", help="CT or MR for all volumes (default: found out)")
    part.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    part.add_argument("--device", help="cpu or cuda (default: what there is)")
    part.add_argument(
        "--out",
        type=Path,
        default=ROOT / "runs" / "worst.png",
        help="PNG to write; never commit one of a research data set",
    )
    part.set_defaults(run=show_worst)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ProGiDiffError as err:
        sys.exit(str(err))


if __name__ == "__main__":
    main()
