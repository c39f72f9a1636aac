"""Nuclei from five labelled pictures: what more views, more steps, more noise draws and views at the end add.

    python benchmarks/few_labels.py --data ../shared/data/monuseg --out benchmarks/results/few_labels.json
    python benchmarks/few_labels.py --summarise benchmarks/results/few_labels.json

The head without its text branch and the recipe of `benchmarks/textdiff.py`, on the same choices of training pictures;
all validation pictures at their labels' own resolution, threshold 0.5. The forms below are compared on them, so the
best one flatters. Each form is a training (`ARMS`), and each trained head is measured with several draws: the picture
with another noise in each, mirrored as `TextDiffModel.predict` does, the answers averaged. "best threshold" is what
choosing it on these very pictures would give: the most that a better threshold could add.

"taught by the recipe" is self-training: the head of the recipe labels the training pictures that were not chosen (they
count as unlabelled; their labels are not read), and a fresh head learns from these answers and from the labels, each
labelled picture as often as `LABELLED_TIMES` of the others.

A training is kept in the work folder when it is done; a run that is stopped goes on where it was, and `--done-only`
makes the table of what is there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from progidiff.textdiff.data import PictureCase, find_cases, read_classes
from progidiff.textdiff.evaluate import compute_scores
from progidiff.textdiff.feature_cache import CachedFeatures, FeatureCache
from progidiff.textdiff.features import DiffusionFeatures, FeatureExtractor
from progidiff.textdiff.model import TextDiffModel, default_folder, pick_mirror
from progidiff.textdiff.pictures import pad, read_picture, resize, to_working
from progidiff.textdiff.train import THRESHOLDS, train_textdiff
from progidiff.training.loop import find_autocast_dtype
from textdiff import make_setup

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Arm:
    """A form of the training; the first one is the recipe of the published table.

    Attributes:
        views: Versions of each training picture: mirrored and tinted.
        steps: Of the head.
        averaged: Noise draws whose features are averaged, in training and in the answer.
        noises: The views go round so many noise draws.
        ema_decay: Of the averaged weights.
        crop: Working pixels.
        scale: Working pixels per pixel.
        teacher: Form whose head labels the other training pictures; "" for none, they are not used then.
    """

    views: int = 2
    steps: int = 120
    averaged: int = 1
    noises: int = 1
    ema_decay: float = 0.98
    crop: int = 96
    scale: float = 0.5
    teacher: str = ""


ARMS = {
    "recipe": Arm(),
    "300 steps": Arm(steps=300),
    "8 views": Arm(views=8),
    "8 views, 300 steps": Arm(views=8, steps=300),
    "8 views of 4 noises, 300 steps": Arm(views=8, steps=300, noises=4),
    "weights averaged for longer": Arm(steps=300, ema_decay=0.995),
    "features of 4 noises averaged": Arm(averaged=4),
    "features of 8 noises averaged": Arm(averaged=8),
    "working scale 0.75": Arm(scale=0.75, crop=144),
    "taught by the recipe": Arm(views=1, steps=200, teacher="recipe"),
}

LABELLED_TIMES = 4
"""A labelled picture beside one that a teacher labelled."""

DRAWS = (1, 4, 8)


class AveragedFeatures:
    """The mean of the features of several noise draws.

    Args:
        inner: What computes one draw.
        count: Of them; draw d averages the noises d * count to (d + 1) * count - 1.
    """

    def __init__(self, inner: FeatureExtractor, count: int) -> None:
        self.inner, self.count = inner, count
        self.channels, self.strides, self.options = inner.channels, inner.strides, inner.options
        self.key = hashlib.sha256(f"{inner.key}:mean of {count}".encode()).hexdigest()

    def __call__(self, pictures: Tensor, draw: int = 0) -> list[Tensor]:
        """See `FeatureExtractor`."""
        found = [self.inner(pictures, draw * self.count + number) for number in range(self.count)]
        return [torch.stack(maps).mean(dim=0) for maps in zip(*found, strict=True)]


def pick_training(cases: Sequence[PictureCase], size: int, seed: int) -> list[PictureCase]:
    """Those that `benchmarks/textdiff.py` picks."""
    return sorted(cases, key=lambda case: hashlib.sha256(f"{seed}:{case.name}".encode()).digest())[:size]


def name_run(work: Path, arm: str, size: int, seed: int) -> Path:
    """Folder of a training."""
    return work / f"{arm.replace(' ', '-').replace(',', '')}-{size}-{seed}"


def train(
    arm: Arm, cases: Sequence[PictureCase], seed: int, denoiser: Path, cache: FeatureCache, work: Path
) -> TextDiffModel:
    """A head of this form; its extractor looks into the cache."""
    base = make_setup(smoke=False).config
    whole = DiffusionFeatures.load(denoiser, replace(base.features, draws=arm.noises, scale=arm.scale))
    cached = CachedFeatures(whole, cache)
    extractor: FeatureExtractor = whole if arm.averaged == 1 else AveragedFeatures(cached, arm.averaged)
    config = replace(
        base,
        seed=seed,
        views=arm.views,
        use_text=False,
        crop=arm.crop,
        schedule=replace(base.schedule, steps=arm.steps, ema_decay=arm.ema_decay),
    )
    model = train_textdiff(cases, denoiser=extractor, work=work, cache=cache.folder, config=config).model
    model.extractor = CachedFeatures(whole, cache) if arm.averaged == 1 else extractor
    return model


def add_answers(
    teacher: TextDiffModel, cases: Sequence[PictureCase], others: Sequence[PictureCase], folder: Path
) -> list[PictureCase]:
    """Labelled pictures, each several times, and others with what a head answers (one draw) as their label."""
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        replace(case, name=f"{case.name}+{k}" if k else case.name) for k in range(LABELLED_TIMES) for case in cases
    ]
    for case in others:
        answer = predict(teacher, case, [1])[1] > 0.5
        label = folder / f"{case.name}.png"
        Image.fromarray(answer.numpy().astype("uint8") * 255).save(label)
        found.append(replace(case, label=label))
    return found


@torch.no_grad()
def predict(model: TextDiffModel, case: PictureCase, draws: Sequence[int]) -> dict[int, Tensor]:
    """Number of draws -> the foreground's mean probability over them, (H, W) at the picture's resolution."""
    options, coarsest = model.card.features, max(model.extractor.strides)
    dtype = find_autocast_dtype("auto", torch.device("cpu"))
    picture = read_picture(case.image)
    working = to_working(picture.pixels, options.scale, options.size, options.tone)
    total, answers = torch.zeros(picture.size), {}
    for draw in range(max(draws)):
        axes = pick_mirror(draw)
        features = model.extractor(pad(working.flip(axes), coarsest)[None], draw)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model.head(features)
        found = logits.float().softmax(dim=1)[:, 1:, : working.shape[1], : working.shape[2]].flip(axes)
        total += resize(found, picture.size)[0, 0].clamp(0, 1)
        if draw + 1 in draws:
            answers[draw + 1] = total / (draw + 1)
    return answers


def measure(model: TextDiffModel, cases: Sequence[PictureCase], draws: Sequence[int]) -> dict[str, dict[str, float]]:
    """Mean Dice per number of draws.

    Returns:
        draws -> {"dice" at 0.5, "best threshold" (its Dice), one entry per picture}.
    """
    scores: dict[int, list[list[float]]] = {count: [] for count in draws}
    for case in cases:
        answers = {count: answer.numpy() for count, answer in predict(model, case, draws).items()}
        truth = read_classes(case, read_picture(case.image).size, 1) > 0
        for count, answer in answers.items():
            scores[count].append([compute_scores(answer > t, truth)[0] for t in THRESHOLDS])
    report = {}
    for count, rows in scores.items():
        means = [mean(column) for column in zip(*rows, strict=True)]
        fixed = THRESHOLDS.index(0.5)
        report[str(count)] = {
            "dice": means[fixed],
            "best threshold": max(means),
            **{case.name: row[fixed] for case, row in zip(cases, rows, strict=True)},
        }
    return report


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All trainings that are asked for, each kept when it is done, and the table."""
    training, validation = (find_cases(options.data / part) for part in ("train", "val"))
    cache = FeatureCache(options.work / "features", options.cache_gb)
    options.work.mkdir(parents=True, exist_ok=True)
    cells = []
    for seed in options.seeds:
        for name in options.arms:
            folder = name_run(options.work, name, options.size, seed)
            path = folder.with_suffix(".json")
            if not path.is_file() and not options.done_only:
                cases = pick_training(training, options.size, seed)
                shown, teacher = cases, ARMS[name].teacher
                if teacher:
                    others = [case for case in training if case not in cases]
                    place = name_run(options.work, teacher, options.size, seed)
                    taught = train(ARMS[teacher], cases, seed, options.denoiser, cache, place)
                    shown = add_answers(taught, cases, others, folder / "answers")
                model = train(ARMS[name], shown, seed, options.denoiser, cache, folder)
                draws = options.draws if ARMS[name].averaged == 1 else options.draws[:1]
                found = {
                    "arm": name,
                    "size": options.size,
                    "seed": seed,
                    "setting": asdict(ARMS[name]),
                    "cases": [case.name for case in cases],
                    "scores": measure(model, validation, draws),
                }
                scratch = path.with_suffix(f".{os.getpid()}.tmp")
                scratch.write_text(json.dumps(found), encoding="utf-8")
                os.replace(scratch, path)
                told = ", ".join(f"{count}: {score['dice']:.4f}" for count, score in found["scores"].items())
                print(f"{name}, seed {seed}: {told} ({time.strftime('%H:%M:%S')})", file=sys.stderr, flush=True)
            if path.is_file():
                cells.append(json.loads(path.read_text(encoding="utf-8")))
    return {"command": options.command, "summary": summarise(cells), "cells": cells}


def summarise(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Form -> draws -> mean Dice over seeds, its standard deviation, the seeds, and the best threshold's Dice."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(cell["arm"] for cell in cells):
        mine = [cell for cell in cells if cell["arm"] == name]
        for count in mine[0]["scores"]:
            dices = [cell["scores"][count]["dice"] for cell in mine]
            found.setdefault(name, {})[count] = {
                "dice": mean(dices),
                "sd": stdev(dices) if len(dices) > 1 else 0.0,
                "seeds": {str(cell["seed"]): dice for cell, dice in zip(mine, dices, strict=True)},
                "best threshold": mean(cell["scores"][count]["best threshold"] for cell in mine),
            }
    return found


def format_table(summary: Mapping[str, Any]) -> str:
    """Markdown."""
    lines = ["| form | 1 draw | 4 | 8 | with the best threshold | seeds |", "|---|---|---|---|---|---|"]
    for name, row in summary.items():
        cells = [f"{row[c]['dice']:.3f}" if c in row else "" for c in map(str, DRAWS)]
        last = row[max(row, key=int)]
        seeds = ", ".join(f"{dice:.3f}" for dice in last["seeds"].values())
        lines.append(f"| {name} | {' | '.join(cells)} | {last['best threshold']:.3f} | {seeds} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/ and val/")
    parser.add_argument("--size", type=int, default=5, help="training pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--draws", type=int, nargs="+", default=list(DRAWS), help="measured, ascending")
    parser.add_argument("--denoiser", type=Path, default=default_folder() / "denoiser")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "few_labels")
    parser.add_argument("--cache-gb", type=float, default=20.0, help="of features on disk, the oldest dropped beyond")
    parser.add_argument("--done-only", action="store_true", help="train nothing; the table of what is done")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--summarise", type=Path, help="only the table of this JSON file")
    options = parser.parse_args(arguments)
    if options.summarise:
        print(format_table(json.loads(options.summarise.read_text(encoding="utf-8"))["summary"]))
        return
    if options.data is None:
        parser.error("--data is needed, or --summarise")
    torch.set_num_threads(options.threads)
    options.command = shlex.join(["python", "benchmarks/few_labels.py", *(arguments or sys.argv[1:])])
    report = run(options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(format_table(report["summary"]))


if __name__ == "__main__":
    main()
