"""Structures that no shipped weights have seen, taught from 1 to 40 annotated slices.

    python benchmarks/teach.py --data ../shared/data --work runs/teach --out benchmarks/results/teach.json \
        --picture docs/images/teach.png
    python benchmarks/teach.py --data ../shared/data --work runs/teach --sets hippocampus --slices 10 --seeds 0
    python benchmarks/teach.py --summarise benchmarks/results/teach.json

Sets: `heart` (short-axis MR: right ventricle, myocardium, left ventricle) and `hippocampus` (MR, 35 x 51 x 35 mm). A
person annotates single slices, spread over patients: one patient after another, a random slice that shows something.
Held-out patients are the same for all seeds, and no training patient is among them. Figures are the Dice of what the
text-query head finds, on the pixels of the image, per structure and patient, averaged over both.

* taught: `progidiff adapt`'s recipe on the shipped base, without held-back slices: with ten of them nobody would.
* u-net: MONAI's `BasicUNet` from scratch on the same slices, with the same input, augmentation and loss, for as much
  processor time as the first one took.
* "pool": every slice of every training patient, the ceiling.

A cell is kept in the work folder when it is done, so that the table may be made in pieces; `--done-only` makes the
table of what is there.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.segments import load_label_map
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningConfig
from progidiff.model.folder import find_backbone, load_pipeline
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.accepted_labels import EVERYTHING
from progidiff.training.adapt_stages import Trainee
from progidiff.training.evidence_stage import EvidenceObjective, PhraseTable
from progidiff.training.loop import LoopConfig, find_autocast_dtype, run_loop
from progidiff.training.losses import compute_evidence_loss
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.slice_cache import Case, SliceCache, list_cases
from progidiff.training.split import fit_grid

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "apps" / "progidiff" / "model"

POOL = "pool"
SLICES: tuple[int | str, ...] = (1, 5, 10, 20, 40, POOL)
ARMS = ("taught", "u-net")

FindEvidence = Callable[[Tensor], Tensor]
"""(N, C, H, W) slices -> (N, P, H, W) probabilities."""


@dataclass(frozen=True)
class Task:
    """A set that something is taught on.

    Attributes:
        held_out: Patients that are measured.
    """

    folder: str
    held_out: int


TASKS = {"heart": Task("heart", 20), "hippocampus": Task("hippocampus", 40)}


def order(cases: Sequence[Case], seed: int | str) -> list[Case]:
    """In an order that depends on seed and names alone."""
    return sorted(cases, key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())


def annotate(cases: Sequence[Case], count: int | str, seed: int) -> list[Case]:
    """The cases with so many annotated slices, one patient after another, each a random one that shows something.

    Args:
        count: Slices; `POOL` for all of all.
    """
    if count == POOL:
        return list(cases)
    rng = np.random.default_rng(seed)
    chosen: dict[str, set[int]] = {}
    free: dict[str, list[int]] = {}
    ordered = order(cases, seed)
    for number in range(int(count)):
        case = ordered[number % len(ordered)]
        if case.name not in free:
            volume = load_volume(case.image, info=case.info)
            drawn = volume.arrange(load_label_map(case.label, volume.grid).array).any(axis=(1, 2))
            free[case.name] = rng.permutation(np.flatnonzero(drawn)).tolist()
        if free[case.name]:
            chosen.setdefault(case.name, set()).add(free[case.name].pop())
    return [
        replace(case, annotated={EVERYTHING: frozenset(chosen[case.name])}) for case in ordered if case.name in chosen
    ]


@torch.no_grad()
def measure(find: FindEvidence, cases: Sequence[Case], structures: Sequence[str], shapes: ConditioningConfig) -> float:
    """Mean Dice over structures and patients, on the image's own pixels."""
    dices = []
    for case in cases:
        volume = load_volume(case.image, info=case.info)
        stack, spacing = volume.to_stack()
        threshold = compute_body_threshold(volume)
        grid = plan_working_grid(stack, spacing, threshold, shapes.height, shapes.width, shapes.spacing_range)
        window = compute_window(volume, shapes.mr_headroom)
        truth = volume.arrange(load_label_map(case.label, volume.grid).array)
        ids = {name: value for value, name in case.structures.items()}
        found = []
        for start in range(0, len(stack), 8):
            z = np.arange(start, min(start + 8, len(stack)))
            images = grid.extract_slices(stack, z, window, shapes.num_neighbours, shapes.neighbour_mm)
            maps = find(images).float()
            found.append(torch.stack([grid.restore_slices(maps[:, p]) for p in range(maps.shape[1])], 1) >= 0.5)
        masks = torch.cat(found).numpy()
        for p, name in enumerate(structures):
            there = truth == ids.get(name, -1)
            if there.any():
                dices.append(2.0 * (masks[:, p] & there).sum() / (masks[:, p].sum() + there.sum()))
    return float(mean(dices))


class Bench:
    """A set, prepared once."""

    def __init__(self, name: str, data: Path, work: Path, base: ProposalPipeline, shapes: ConditioningConfig) -> None:
        self.name, self.base = name, base
        self.work = work / name
        cases = order(list_cases(data / TASKS[name].folder), "held out")
        count = TASKS[name].held_out
        self.held_out, self.pool = cases[:count], cases[count:]
        self.structures = tuple(dict.fromkeys(cases[0].structures.values()))
        # Of every fourth patient: the grid follows the images, not the labels.
        grid = fit_grid(cases[::4], shapes)
        self.shapes = shapes if grid is None else replace(shapes, **grid)
        self.dtype = find_autocast_dtype("auto", base.device)

    def cache(self, count: int | str, seed: int) -> SliceCache:
        """The annotated slices on the working grid."""
        return SliceCache(annotate(self.pool, count, seed), self.structures, self.shapes, self.work / "cache", 2)

    def teach(self, cache: SliceCache, config: AdaptConfig, folder: Path) -> FindEvidence:
        """`progidiff adapt`'s recipe, see `AdaptConfig.complete`."""
        branch = copy.deepcopy(self.base.branch)
        trainee = Trainee(config, ("encoder", "query_head"), branch, self.base.unet)
        trainee.select(("encoder", "query_head"))
        phrases = PhraseTable(self.base.backbone, self.structures)
        objective = EvidenceObjective(branch, phrases, cache, config.choose_evidence_options(), config.random_share)
        run_loop({"branch": branch}, objective, make_loop(config), folder)
        branch.eval()
        pooled = phrases.pooled[phrases.canonical()]

        def find(images: Tensor) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                return branch.predict_evidence(branch.encode_slices(images), pooled).sigmoid()

        return find

    def train_unet(self, cache: SliceCache, config: AdaptConfig, seconds: float) -> FindEvidence:
        """A plain U-Net on the same slices for so many seconds of processor time."""
        from monai.networks.nets import BasicUNet

        torch.manual_seed(config.seed)
        channels = 2 * self.shapes.num_neighbours + 1
        widths = (16, 32, 64, 128, 256, 16)
        network = BasicUNet(2, channels, len(self.structures), features=widths)
        phrases = PhraseTable(self.base.backbone, self.structures)
        source = EvidenceObjective(
            self.base.branch, phrases, cache, config.choose_evidence_options(), config.random_share
        )
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(config.seed)
        began, average = time.process_time(), copy.deepcopy(network)
        while (spent := time.process_time() - began) < seconds:
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (0.5 + 0.5 * float(np.cos(np.pi * spent / seconds))) + 1e-5
            batch = source.draw_batch(generator)
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                logits = network(batch.images)
            loss, _ = compute_evidence_loss(logits, batch.targets, batch.spoken)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for shadow, live in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
                    if shadow.is_floating_point():
                        shadow.lerp_(live, 0.05)
                    else:
                        shadow.copy_(live)
        average.eval()

        def find(images: Tensor) -> Tensor:
            with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
                return average(images).sigmoid()

        return find


def make_loop(config: AdaptConfig) -> LoopConfig:
    steps = config.steps or 0
    return LoopConfig(
        steps=steps,
        learning_rate=config.learning_rate or 0.0,
        warmup=max(1, min(20, steps // 5)),
        ema_decay=config.ema_decay,
        seed=config.seed,
        precision=config.precision,
        checkpoint_every=steps,
        validate_every=steps,
    )


def run_cell(
    bench: Bench, config: AdaptConfig, count: int | str, seed: int, folder: Path, compare: bool
) -> dict[str, Any]:
    """Both arms on the same slices, or the first alone."""
    cache = bench.cache(count, seed)
    config = replace(config, seed=seed).complete("MR", is_new=True, num_slices=len(cache))
    began = time.process_time()
    find = bench.teach(cache, config, folder)
    seconds = time.process_time() - began
    cell = {"set": bench.name, "slices": count, "seed": seed, "steps": config.steps, "cpu_seconds": round(seconds, 1)}
    cell["annotated"] = len(cache)
    cell["taught"] = measure(find, bench.held_out, bench.structures, bench.shapes)
    if compare:
        other = bench.train_unet(cache, config, seconds)
        cell["u-net"] = measure(other, bench.held_out, bench.structures, bench.shapes)
    return cell


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cells that are asked for, each kept when it is done, and the table."""
    config = replace(
        AdaptConfig(),
        kind=options.kind,
        batch_size=options.batch_size,
        learning_rate=options.rate,
        steps=options.steps,
        lora=replace(AdaptConfig().lora, rank=options.rank, alpha=2.0 * options.rank),
    )
    benches: dict[str, Bench] = {}
    base: ProposalPipeline | None = None
    cells = []
    for name in options.sets:
        for count in options.slices:
            for seed in options.seeds:
                path = options.work / name / f"{count}-{seed}.json"
                if not path.is_file() and not options.done_only:
                    if base is None:
                        card, base = load_pipeline(options.model, Backbone(str(find_backbone(options.model))))
                    if name not in benches:
                        benches[name] = Bench(name, options.data, options.work, base, card.conditioning)
                    compare = isinstance(count, int) and count <= options.unet_up_to
                    cell = run_cell(benches[name], config, count, seed, path.with_suffix(""), compare)
                    scratch = path.with_suffix(f".{os.getpid()}.tmp")
                    scratch.write_text(json.dumps(cell), encoding="utf-8")
                    os.replace(scratch, path)
                    print(json.dumps(cell), file=sys.stderr, flush=True)
                if path.is_file():
                    cells.append(json.loads(path.read_text(encoding="utf-8")))
    return {"command": options.command, "summary": summarise(cells), "cells": cells}


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per set and number of slices: mean and standard deviation over seeds of both arms, and the seconds of the
    first.
    """
    rows = []
    for name, count in dict.fromkeys((cell["set"], cell["slices"]) for cell in cells):
        mine = [cell for cell in cells if (cell["set"], cell["slices"]) == (name, count)]
        row: dict[str, Any] = {"set": name, "slices": count, "seeds": len(mine)}
        row["cpu_seconds"] = mean(cell["cpu_seconds"] for cell in mine)
        for arm in ARMS:
            dices = [cell[arm] for cell in mine if arm in cell]
            deviation = stdev(dices) if len(dices) > 1 else 0.0
            row[arm] = {"dice": mean(dices), "sd": deviation, "seeds": len(dices)} if dices else None
        rows.append(row)
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| set | annotated slices | taught | U-Net from scratch | CPU seconds each | seeds (taught, U-Net) |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        told = [_tell(row[arm]) for arm in ARMS]
        lines.append(
            f"| {row['set']} | {row['slices']} | {' | '.join(told)} | {row['cpu_seconds']:.0f} | {row['seeds']}, "
            f"{row['u-net']['seeds'] if row['u-net'] else 0} |"
        )
    return "\n".join(lines)


def _tell(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['dice']:.3f}" + (f" ± {found['sd']:.3f}" if found["seeds"] > 1 else "")


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Dice against annotated slices, one column per set, with the pool as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = list(dict.fromkeys(row["set"] for row in rows))
    figure, axes = plt.subplots(1, len(sets), figsize=(4.8 * len(sets), 3.6), squeeze=False, sharey=True)
    for axis, name in zip(axes[0], sets, strict=True):
        mine = [row for row in rows if row["set"] == name and row["slices"] != POOL]
        slices = [row["slices"] for row in mine]
        for number, (arm, title) in enumerate(zip(ARMS, ("taught", "U-Net from scratch"), strict=True)):
            told = [row for row in mine if row[arm]]
            dices, deviations = ([row[arm][key] for row in told] for key in ("dice", "sd"))
            x = [row["slices"] for row in told]
            axis.errorbar(x, dices, deviations, color=f"C{number}", marker="o", capsize=3, label=title)
            for row in rows:
                if row["set"] == name and row["slices"] == POOL and row[arm]:
                    axis.axhline(row[arm]["dice"], color=f"C{number}", linewidth=0.9, linestyle=":")
        axis.set(title=name, xlabel="annotated slices", xscale="log", xticks=slices, ylim=(0, 1))
        axis.set_xticks(slices, [str(count) for count in slices])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("Dice on held-out patients")
    axes[0][-1].legend(loc="lower right", title="dotted: every slice of the pool", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _read_count(text: str) -> int | str:
    return POOL if text == POOL else int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with heart/ and hippocampus/")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--slices", nargs="+", type=_read_count, default=list(SLICES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kind", choices=("lora", "full"), default="full")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=None, help="learning rate; the recipe's own without it")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=None, help="the recipe's own without it")
    parser.add_argument("--unet-up-to", type=int, default=SLICES[-2], help="compare with a U-Net up to so many slices")
    parser.add_argument("--held-out", type=int, default=None, help="measure fewer patients")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "teach")
    parser.add_argument("--done-only", action="store_true", help="train nothing; the table of what is done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG of the curves")
    parser.add_argument("--summarise", type=Path, help="only the table (and --picture) of this JSON file")
    options = parser.parse_args(arguments)
    if options.summarise:
        show(json.loads(options.summarise.read_text(encoding="utf-8"))["summary"], options.picture)
        return
    if options.data is None:
        parser.error("--data is needed, or --summarise")
    torch.set_num_threads(options.threads)
    if options.held_out is not None:
        TASKS.update({name: replace(task, held_out=options.held_out) for name, task in TASKS.items()})
    options.command = shlex.join(["python", "benchmarks/teach.py", *(arguments or sys.argv[1:])])
    report = run(options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report["summary"], options.picture)


def show(rows: Sequence[Mapping[str, Any]], picture: Path | None) -> None:
    print(format_table(rows))
    if picture:
        draw(rows, picture)


if __name__ == "__main__":
    main()
