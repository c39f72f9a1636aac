"""What is known while something new is learned beside it, and how long that takes.

    python benchmarks/known_structures.py --studies <BTCV folder> --model <folder> --held-out img0024 img0033 img0039 \
        --work runs/known --out benchmarks/results/known_structures.json

Bone has no labels in the set, so a simple rule draws it: what is brighter than `BRIGHT_HU`, no labelled organ, and in
pieces of at least `SMALLEST_ML`. On a few slices of every other patient it is labelled beside the structures that the
model knows, as somebody would who corrects proposals and adds one row of their own; `progidiff adapt` learns from that,
gate and all. Reported, on patients that neither the model nor the version has learned from: Dice of what is served
(`progidiff evaluate`) for what was known, before and after, and for bone; and the seconds of the training and of the
first answer after it.

The model must not have seen the held-out patients, or what it knows of them is not what it will know of others.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import nibabel
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from progidiff.evaluation.evaluate import evaluate
from progidiff.images.reading import load_volume
from progidiff.labels.segments import load_label_map
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.training.adapt import run_adapt
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.slice_cache import Case, list_cases

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "apps" / "progidiff" / "model"

NEW = "bone"
BRIGHT_HU = 250.0
SMALLEST_ML = 1.0


def draw_bone(stack: NDArray[np.float32], truth: NDArray[np.integer[Any]], voxel_ml: float) -> NDArray[np.bool_]:
    """Bone by the rule above, with its marrow.

    Args:
        stack: (Z, Y, X) in HU.
        truth: Label ids of organs, on the same grid.
    """
    organs = ndimage.binary_dilation(truth > 0, iterations=3)
    pieces, _ = ndimage.label((stack > BRIGHT_HU) & ~organs)
    sizes = np.bincount(pieces.ravel()) * voxel_ml
    sizes[0] = 0
    bright = (sizes >= SMALLEST_ML)[pieces]
    closed = ndimage.binary_closing(bright, np.ones((1, 5, 5), bool), iterations=2)
    return np.stack([ndimage.binary_fill_holes(plane) for plane in closed]) & ~organs


def prepare(cases: Sequence[Case], folder: Path) -> None:
    """A folder of studies with the same images, whose labels have bone too."""
    final = folder / "labels" / "final"
    final.mkdir(parents=True, exist_ok=True)
    value = max(value for case in cases for value in case.structures) + 1
    names = {**{v: name for case in cases for v, name in case.structures.items()}, value: NEW}
    (folder / "labels.json").write_text(json.dumps(names), encoding="utf-8")
    for case in cases:
        target = final / f"{case.name}.nii.gz"
        if target.is_file():
            continue
        volume = load_volume(case.image, info=case.info)
        stack, spacing = volume.to_stack()
        labels = load_label_map(case.label, volume.grid).array.astype(np.uint8)
        drawn = volume.arrange(labels)  # a view: what is written into it is written into the labels
        bone = draw_bone(np.asarray(stack, np.float32), drawn, float(np.prod(spacing)) / 1000)
        drawn[bone & (drawn == 0)] = value
        (folder / case.image.name).symlink_to(case.image.resolve())
        (folder / f"{case.name}.json").write_text(json.dumps({"modality": volume.modality}), encoding="utf-8")
        scratch = final / f".{case.name}.{os.getpid()}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(labels, volume.affine), scratch)
        scratch.replace(target)


def choose_slices(case: Case, count: int) -> list[int]:
    """So many axial slices, evenly spaced over those that show a labelled structure."""
    volume = load_volume(case.image, info=case.info)
    shown = np.flatnonzero(volume.arrange(load_label_map(case.label, volume.grid).array).any(axis=(1, 2)))
    places = (np.arange(count) + 0.5) / count * len(shown)
    return [int(z) for z in shown[places.astype(int)]]


def measure(engine: Engine, studies: Path, cases: Sequence[str], adapter: str) -> dict[str, float]:
    """Dice of the consensus by structure, mean over the patients."""
    report = evaluate(engine, studies, cases=cases, adapter=adapter, num_proposals=1, hd95=False, clean_up="off")
    found: dict[str, float] = report["summary"]["consensus"]["dice"]
    return {name: dice for name, dice in found.items() if name != "mean" and dice is not None}


def run(options: argparse.Namespace) -> dict[str, Any]:
    """One training per kind of version."""
    studies = options.work / "studies"
    prepare(list_cases(options.studies), studies)
    rest = [case for case in list_cases(studies) if case.name not in options.held_out][: options.volumes]
    annotated = {case.name: choose_slices(case, options.slices_each) for case in rest}
    before = measure(Engine(options.model), studies, options.held_out, "none")
    report: dict[str, Any] = {"command": options.command, "held_out": options.held_out, "before": before}
    report["annotated_slices"] = sum(map(len, annotated.values()))
    for kind in options.kinds:
        adapters = options.work / f"adapters-{kind}"
        shutil.rmtree(adapters, ignore_errors=True)  # of a run that was stopped: its versions would be rivals
        began = time.monotonic()
        config = replace(AdaptConfig(), kind=kind, seed=options.seed)
        work = options.work / kind
        result = run_adapt(
            studies, options.model, None, work, config, adapters=adapters, annotated=annotated, declared=(NEW,)
        )
        trained = time.monotonic() - began
        # A server of its own, as after a restart: what a running one has loaded already is counted.
        engine = Engine(options.model, adapters=adapters)
        volume = load_volume(studies / f"{options.held_out[0]}.nii.gz")
        request = ProposalRequest(queries=parse_prompt(NEW, (NEW,)), adapter=result.card.full_name)
        engine.propose(request, volume)
        answered = time.monotonic() - began - trained
        after = measure(engine, studies, options.held_out, result.card.full_name)
        report[kind] = {
            "verdict": result.message,
            "published": result.published,
            "after": after,
            "mean_loss": mean(before[name] - after[name] for name in before),
            "training_seconds": round(trained, 1),
            "first_answer_seconds": round(answered, 1),
        }
        print(kind, json.dumps(report[kind]), file=sys.stderr, flush=True)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True, help="CT with labels of organs")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--held-out", nargs="+", required=True, help="patients that are measured")
    parser.add_argument("--volumes", type=int, default=10, help="volumes with annotated slices")
    parser.add_argument("--slices-each", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "known_structures")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "benchmarks/known_structures.py", *(arguments or sys.argv[1:])])
    torch.set_num_threads(options.threads)
    report = run(options)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
