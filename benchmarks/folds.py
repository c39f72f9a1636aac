"""Cross-validation by patient: the way to decide anything about the model; three volumes decide nothing under 0.01.

    python benchmarks/folds.py evidence --studies <BTCV folder> --work <folder>
    python benchmarks/folds.py close-up --studies <BTCV folder> --work <folder>
    python benchmarks/folds.py measure --studies <BTCV folder> --work <folder> --model <folder> --cases img0024 ... \
        --name split
    python benchmarks/folds.py table --studies <BTCV folder> --work <folder> --out benchmarks/results/folds.json

Every case is held out once. `evidence` trains one evidence network per fold on the other folds and keeps what it says
of the cases that it never saw (*out-of-fold evidence*): the honest input of whatever is trained on top of it.
`close-up` trains one close-up network per fold on the other folds, with that evidence, and measures the held-out cases
at their own resolution: evidence, sharpened evidence, proposals. `measure` does the same for a model folder with a
close-up, whose own evidence it reads, on cases that it has not seen. `table` pairs them patient by patient. A fold that
is finished is not repeated, one that was stopped goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from progidiff.evaluation.metrics import compute_dice, compute_hd95
from progidiff.images.close_up import WindowRules, plan_windows
from progidiff.model.backbone import Backbone
from progidiff.model.calibration import Calibration, Reliability, compute_error
from progidiff.model.close_up import create_network
from progidiff.model.close_up_folder import FOLDER, load_close_up
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.conditioning import ConditioningConfig
from progidiff.model.folder import find_backbone, load_pipeline
from progidiff.model.pipeline import EncodedPrompts
from progidiff.proposals.agreement import compute_disagreement_per_slice
from progidiff.proposals.close_ups import Drawing, Subject, draw_close_ups, place_on_stack
from progidiff.storage.atomic import atomic_file
from progidiff.training.build_model import create_branch
from progidiff.training.close_up_stage import CloseUpObjective, CloseUpOptions
from progidiff.training.evidence_stage import EvidenceOptions, PhraseTable
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.out_of_fold import (
    find_evidence,
    keep_evidence,
    load_pooled_volume,
    split_by_patient,
    train_fold,
)
from progidiff.training.recipe_settings import TrainConfig
from progidiff.training.slice_cache import Case, list_cases
from progidiff.training.window_pool import PooledVolume, VolumeSource, WindowPool

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "apps" / "progidiff" / "model"
EIGHT = ("spleen", "right kidney", "left kidney", "gallbladder", "liver", "stomach", "aorta", "pancreas")
"""The structures that TransUNet reports."""


def train_evidence_of(options: argparse.Namespace, fold: int) -> None:
    """Train the evidence of one fold and keep its answers about the held-out cases."""
    config = TrainConfig()
    backbone = Backbone(MODEL / "backbone", "cpu", dtype="fp32")
    grid = config.grid
    branch = create_branch(backbone, grid.height, grid.width, grid.spacing_range, options.seed + fold)
    folds = split_by_patient(list_cases(options.studies), options.num_folds)
    rest = [case for other, part in enumerate(folds) if other != fold for case in part]
    loop = make_loop(options, fold)
    train_fold(branch, backbone, rest, config.structures, loop, EvidenceOptions(), options.work, f"fold{fold}")
    for name, dice in keep_evidence(branch, backbone, folds[fold], config.structures, options.work):
        print(name, json.dumps({"mean": round(float(np.mean(list(dice.values()))), 4), **dice}), flush=True)


def list_folds(options: argparse.Namespace) -> Sequence[int]:
    """The folds that are asked for."""
    return options.folds if options.folds else range(options.num_folds)


def make_loop(options: argparse.Namespace, fold: int) -> LoopConfig:
    """Length and rate of a fold's training."""
    return LoopConfig(
        steps=options.steps,
        learning_rate=options.rate,
        warmup=100,
        ema_decay=0.995,
        checkpoint_every=250,
        seed=options.seed + fold,
        tensorboard=False,
        log_every=25,
    )


def train_close_up(options: argparse.Namespace, fold: int) -> None:
    """Train the close-up of one fold, and measure its held-out cases."""
    structures = TrainConfig().structures
    folder = options.work / f"{options.name}{fold}"
    done = folder / "close_up.safetensors"
    backbone = Backbone(MODEL / "backbone", "cpu", dtype="fp32")
    grid = TrainConfig().grid
    config = create_branch(backbone, grid.height, grid.width, grid.spacing_range, 0).config
    prompts = PhraseTable(backbone, structures).pick_canonical()
    folds = split_by_patient(list_cases(options.studies), options.num_folds)
    network = create_network(backbone.text_features, seed=options.seed + fold)
    if not done.is_file():
        rest = [case for other, part in enumerate(folds) if other != fold for case in part]
        rest = [case for case in rest if find_evidence(options.work, case.name).is_file()]
        pool = WindowPool([VolumeSource([load_pooled_volume(case, structures, config, options.work) for case in rest])])
        objective = CloseUpObjective(network, pool, prompts, CloseUpOptions(**json.loads(options.settings)))
        loop = make_loop(options, fold)
        started = time.process_time()
        run_loop({"network": network}, objective, loop, folder)
        tensors = {k: v.detach().half().contiguous() for k, v in network.state_dict().items()}
        facts = {"cases": json.dumps([case.name for case in rest]), "cpu_seconds": str(time.process_time() - started)}
        with atomic_file(done) as path:
            save_file(tensors, path, facts)
    network.load_state_dict({k: v.float() for k, v in load_file(done).items()})
    network.config = replace(network.config, **json.loads(options.served))
    if options.measured_as:
        folder = options.work / f"{options.measured_as}{fold}"
        folder.mkdir(exist_ok=True)
    cases = [case for case in folds[fold] if find_evidence(options.work, case.name).is_file()]
    pipeline = CloseUpPipeline(network, torch.bfloat16, options.presence)
    measure_cases(pipeline, cases, config, prompts, options.work, folder, options)


def measure_model(options: argparse.Namespace) -> None:
    """Measure a model folder on cases that it has not seen."""
    card, pipeline = load_pipeline(options.model, Backbone(find_backbone(options.model), "cpu", dtype="fp32"))
    close_up, network = load_close_up(options.model, torch.device("cpu"), pipeline.backbone)
    folder = options.work / f"{options.name}0"
    cases = [case for case in list_cases(options.studies) if case.name in options.cases]
    for name, dice in keep_evidence(pipeline.branch, pipeline.backbone, cases, card.structures, folder):
        print(name, json.dumps(dice), flush=True)
    prompts = PhraseTable(pipeline.backbone, card.structures).pick_canonical()
    drawing = CloseUpPipeline(network, torch.bfloat16, close_up.presence)
    measure_cases(drawing, cases, card.conditioning, prompts, folder, folder, options)


def measure_cases(
    pipeline: CloseUpPipeline,
    cases: Sequence[Case],
    config: ConditioningConfig,
    prompts: EncodedPrompts,
    work: Path,
    folder: Path,
    options: argparse.Namespace,
) -> None:
    """Measure cases whose evidence is in `work`, one JSON each in `folder`."""
    structures = TrainConfig().structures
    for case in cases:
        target = folder / f"{case.name}.json"
        if target.is_file():
            continue
        volume = load_pooled_volume(case, structures, config, work)
        rows = measure_volume(pipeline, volume, prompts, structures, options.num_proposals)
        with atomic_file(target) as path:
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        means = {
            what: round(float(np.mean([row[what] for row in rows.values() if row])), 4)
            for what in ("evidence", "sharpened", "consensus", "single", "best", "best_level")
        }
        print(case.name, means, flush=True)


def draw_structures(
    pipeline: CloseUpPipeline,
    volume: PooledVolume,
    prompts: EncodedPrompts,
    structures: Sequence[str],
    num_proposals: int,
    rules: WindowRules | None = None,
) -> Iterator[tuple[int, str, NDArray[np.bool_], list[Drawing]]]:
    """Number, name, truth (Z, Y, X) and close-ups of every structure that the volume has."""
    assert volume.evidence is not None
    assert volume.grid is not None
    noise, levels = pipeline.draw_noise(num_proposals, 0), pipeline.draw_levels(num_proposals, 0)
    for p, name in enumerate(structures):
        truth = volume.labels == p + 1
        if not truth.any():
            continue
        evidence = np.ascontiguousarray(volume.evidence[:, p])
        windows = plan_windows(evidence >= 0.3 * 255, volume.grid, rules or WindowRules())
        mask = None if prompts.mask is None else prompts.mask[p]
        subject = Subject(volume.image, (0.0, 255.0), evidence, volume.grid, prompts.pooled[p], prompts.tokens[p], mask)
        yield p, name, truth, list(draw_close_ups(pipeline, subject, windows, noise, levels))


def measure_volume(
    pipeline: CloseUpPipeline,
    volume: PooledVolume,
    prompts: EncodedPrompts,
    structures: Sequence[str],
    num_proposals: int,
) -> dict[str, dict[str, Any]]:
    """Per structure of the volume, at its own pixels: `measure_masks`, `measure_slices`, and how reliable
    their agreement is.
    """
    assert volume.evidence is not None
    assert volume.grid is not None
    found: dict[str, dict[str, Any]] = {}
    for p, name, truth, drawings in draw_structures(pipeline, volume, prompts, structures, num_proposals):
        evidence = torch.from_numpy(np.ascontiguousarray(volume.evidence[:, p]))
        coarse = volume.grid.restore_slices(evidence.float() / 255).numpy() >= 0.5
        sharpened = np.zeros(truth.shape, np.float32)
        for z, ((rows, columns), maps) in place_on_stack(drawings, lambda drawing: drawing.sharpened).items():
            sharpened[z, rows, columns] = maps.numpy()
        drawn = np.zeros((num_proposals, *truth.shape), bool)
        reliability = Reliability(np.zeros(256, np.int64), np.zeros(256, np.int64))
        for z, ((rows, columns), maps) in place_on_stack(drawings, lambda drawing: drawing.probabilities).items():
            drawn[:, z, rows, columns] = shown = (maps >= 0.5).numpy()
            reliability += Reliability.tally(shown, truth[z, rows, columns])
        found[name] = make_row(truth, coarse, sharpened, drawn, volume.spacing, reliability)
    return found


def make_row(
    truth: NDArray[np.bool_],
    coarse: NDArray[np.bool_],
    sharpened: NDArray[np.float32],
    drawn: NDArray[np.bool_],
    spacing: tuple[float, float, float],
    reliability: Reliability,
) -> dict[str, Any]:
    """What `make_table` reads of a structure of a volume; for the first five see `measure_masks`."""
    return {
        **measure_masks(truth, coarse, sharpened, drawn, spacing),
        "slices": measure_slices(truth, drawn),
        "reliability": {"count": reliability.count.tolist(), "positive": reliability.positive.tolist()},
    }


def measure_masks(
    truth: NDArray[np.bool_],
    coarse: NDArray[np.bool_],
    sharpened: NDArray[np.float32],
    drawn: NDArray[np.bool_],
    spacing: tuple[float, float, float],
) -> dict[str, float]:
    """Dice of evidence, sharpened evidence, proposals, and of level sets of the sharpened evidence, which vary without
    any diffusion; HD95 of three, mm; share of the empty slices that something is drawn on.

    Args:
        truth: (Z, Y, X).
        coarse: The evidence, on the same pixels.
        sharpened: In [0, 1].
        drawn: (K, Z, Y, X).
        spacing: (z, y, x), mm.
    """
    consensus, fine = drawn.mean(0) >= 0.5, sharpened >= 0.5
    each = [compute_dice(one, truth) for one in drawn]
    levels = [compute_dice(sharpened >= (k + 0.5) / len(drawn), truth) for k in range(len(drawn))]
    empty = ~truth.any(axis=(1, 2))
    return {
        "evidence": compute_dice(coarse, truth),
        "sharpened": compute_dice(fine, truth),
        "consensus": compute_dice(consensus, truth),
        "single": float(np.mean(each)),
        "best": float(np.max(each)),
        "level": float(np.mean(levels)),
        "best_level": float(np.max(levels)),
        "evidence_hd95": compute_hd95(coarse, truth, spacing),
        "sharpened_hd95": compute_hd95(fine, truth, spacing),
        "consensus_hd95": compute_hd95(consensus, truth, spacing),
        "evidence_false": float(coarse[empty].any(axis=(1, 2)).mean()),
        "consensus_false": float(consensus[empty].any(axis=(1, 2)).mean()),
    }


def measure_slices(truth: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Disagreement of the proposals, and Dice of their consensus, of every slice on which any proposal draws.

    Args:
        truth: (Z, Y, X).
        drawn: (K, Z, Y, X).
    """
    rows = np.flatnonzero(drawn.any(axis=(0, 2, 3)))
    consensus = drawn.mean(0) >= 0.5
    disagreement = compute_disagreement_per_slice(torch.from_numpy(drawn[:, rows])).tolist() if len(rows) else []
    dice = [
        compute_dice(consensus[z], truth[z])
        if truth[z].any()
        else float(not consensus[z].any())  # drawn where it is not
        for z in rows
    ]
    return {"disagreement": [round(value, 4) for value in disagreement], "dice": [round(float(d), 4) for d in dice]}


def make_table(options: argparse.Namespace) -> dict[str, Any]:
    """Means over patients, and paired differences from the evidence with their standard error."""
    files = [path for fold in list_folds(options) for path in (options.work / f"{options.name}{fold}").glob("*.json")]
    volumes = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    if not volumes:
        raise SystemExit(
            f"There is no finished fold of '{options.name}' in {options.work}; run the stage close-up first."
        )
    kinds = ("evidence", "sharpened", "consensus", "single", "best", "level", "best_level")
    names = [name for name in TrainConfig().structures if any(name in rows for rows in volumes.values())]
    structures = {
        name: {
            what: float(np.nanmean([rows[name][what] for rows in volumes.values() if name in rows]))
            for what in (
                *kinds,
                "evidence_hd95",
                "sharpened_hd95",
                "consensus_hd95",
                "evidence_false",
                "consensus_false",
            )
        }
        for name in names
    }
    per_patient = {
        what: np.array([np.mean([row[what] for row in rows.values()]) for rows in volumes.values()]) for what in kinds
    }
    paired = {}
    for what in kinds[1:]:
        difference = per_patient[what] - per_patient["evidence"]
        error = float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else float("nan")
        paired[what] = {
            "mean": float(difference.mean()),
            "standard_error": error,
            "better": int((difference > 0).sum()),
            "of": len(difference),
        }
    means = {
        what: {
            "13": float(np.mean([row[what] for row in structures.values()])),
            "8": float(np.mean([structures[name][what] for name in EIGHT if name in structures])),
        }
        for what in next(iter(structures.values()))
    }
    return {
        "command": " ".join(sys.argv),
        "patients": sorted(volumes),
        "structures": structures,
        "means": means,
        "minus_evidence": paired,
        "reliability": measure_reliability(files),
        "error_prediction": measure_error_prediction(volumes.values()),
    }


def measure_reliability(files: Sequence[Path]) -> dict[str, Any]:
    """Expected calibration error of the agreement, as it is and after a curve that the other patients gave: of every
    patient, their mean, and of all voxels together (`pooled`); and the curve of all.
    """
    patients: dict[str, Reliability] = {}
    for path in files:
        rows = json.loads(path.read_text(encoding="utf-8")).values()
        tallied = [row["reliability"] for row in rows]
        patients[path.stem] = sum_up([Reliability(np.array(t["count"]), np.array(t["positive"])) for t in tallied])
    if len(patients) < 2:
        return {}
    raw, fitted, curves = {}, {}, {}
    for name, counted in patients.items():
        others = sum_up([other for key, other in patients.items() if key != name])
        curves[name] = Calibration.fit(others)
        raw[name] = counted.compute_error()
        fitted[name] = counted.compute_error(curves[name])
    return {
        "error": float(np.mean(list(raw.values()))),
        "error_calibrated_on_others": float(np.mean(list(fitted.values()))),
        "pooled": sum_up(list(patients.values())).compute_error(),
        "pooled_calibrated_on_others": compute_error(
            np.sum([counted.bin(curves[name]) for name, counted in patients.items()], axis=0)
        ),
        "per_patient": {name: [raw[name], fitted[name]] for name in patients},
        "calibration": Calibration.fit(sum_up(list(patients.values()))).to_dict(),
    }


def give_calibration(model: Path, table: dict[str, Any]) -> None:
    """Write the table's curve into the close-up of a model folder."""
    path = model / FOLDER / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["calibration"] = table["reliability"]["calibration"]
    with atomic_file(path) as target:
        target.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def sum_up(counted: Sequence[Reliability]) -> Reliability:
    """All counts together."""
    total = counted[0]
    for more in counted[1:]:
        total = total + more
    return total


def measure_error_prediction(volumes: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Spearman's rank correlation of disagreement with 1 - Dice of the consensus over the slices of a structure, and
    the mean over structures.
    """
    pairs: dict[str, list[list[float]]] = {}
    for rows in volumes:
        for name, row in rows.items():
            slices = row["slices"]
            pairs.setdefault(name, []).extend(map(list, zip(slices["disagreement"], slices["dice"], strict=True)))
    per_structure = {
        name: float(-spearmanr(np.array(found)).statistic) for name, found in pairs.items() if len(found) > 2
    }
    return {"mean": float(np.mean(list(per_structure.values()))), **per_structure}


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["evidence", "close-up", "measure", "table"])
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="keeps networks, answers and cached slices")
    parser.add_argument("--folds", type=int, nargs="*", help="only these; by default all")
    parser.add_argument("--model", type=Path, default=MODEL, help="of `measure`")
    parser.add_argument("--cases", nargs="*", default=[], help="of `measure`")
    parser.add_argument("--num-folds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="close_up", help="of the close-up runs in the work folder: one per ablation")
    parser.add_argument("--settings", default="{}", help="of CloseUpOptions, as JSON")
    parser.add_argument("--served", default="{}", help="of CloseUpConfig, as JSON: what is measured, not trained, with")
    parser.add_argument("--presence", type=float, default=0.0, help="of CloseUpPipeline; `measure` takes the model's")
    parser.add_argument("--measured-as", default="", help="name for `table`, where a run is measured once more")
    parser.add_argument("--num-proposals", type=int, default=8)
    parser.add_argument("--out", type=Path, help="JSON of the table")
    parser.add_argument("--calibrate", type=Path, help="model folder that gets the table's curve of the agreement")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Run a stage."""
    options = parse_options()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    if options.stage == "table":
        table = make_table(options)
        text = json.dumps(table, indent=1)
        print(text)
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")
        if options.calibrate:
            give_calibration(options.calibrate, table)
        return
    if options.stage == "measure":
        measure_model(options)
        return
    for fold in list_folds(options):
        (train_evidence_of if options.stage == "evidence" else train_close_up)(options, fold)


if __name__ == "__main__":
    main()
