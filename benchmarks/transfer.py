"""A model of CT on MR: as it is, after few-shot low-rank adaptation, after fine-tuning of all weights; with and without
shading.

    python benchmarks/transfer.py --studies ../shared/data/mr --out benchmarks/results/transfer_mr.json

Four volumes are for the test and nothing else, so that all rows compare. The others stand in one fixed order; seed s
starts two volumes further on, trains on the first 1, 3 or 5 and chooses the number of steps on the last. Rows with few
slices take them evenly from those five volumes. Training is `progidiff.training.adapt.run_adapt`, the code behind
`progidiff adapt`; nothing is published.

Tested as `progidiff evaluate` does, on the grid of the input: "single" is the mean over K proposals, "consensus" what
at least half of them draw, "best" the one with the highest Dice per volume and structure. These are computed on every
third slice, to save time. The "evidence", which the proposals start from, is computed on all slices; HD95 (mm), "false
slices" (those without the structure on which it is drawn) and the figures of each mask's largest connected part are of
the evidence.

Shading: the test volumes are multiplied by a smooth random field before anything else is done with them. Its strength
is the standard deviation of its logarithm over the volume: at 0.2, 95 % of the voxels keep between 0.67 and 1.5 of
their intensity. The strength in training is `AdaptConfig.bias_field`, the largest deviation at the control points of a
field drawn per slice. Evidence only.

Wider window: the networks see the MR through a window that reaches `ConditioningConfig.mr_headroom` times higher, so
that organs that are bright in MR lie where a model of CT expects organs. The rows with it use a copy of the model whose
config.json says so.

A run that is stopped goes on where it was: every (row, seed) is kept in the work folder when it is done. Several
processes may share that folder, each with its --rows; --collect then writes the tables of what is done.
"""

import argparse
import dataclasses
import hashlib
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.evaluation.evaluate import match_structures
from progidiff.evaluation.metrics import compute_dice, compute_hd95, keep_largest_component
from progidiff.images.intensities import compute_body_threshold, compute_window
from progidiff.images.reading import load_label, load_volume
from progidiff.images.volume import Volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.labels.cases import LabelledCase, list_labelled, load_label_names
from progidiff.model.adapters import AdapterStore, build_networks, compute_base_digest
from progidiff.model.backbone import Backbone
from progidiff.model.folder import ModelCard, copy_conditioning, load_card, load_pipeline
from progidiff.model.lora import LoraSettings
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.adapt import run_adapt
from progidiff.training.loop import find_autocast_dtype
from progidiff.training.recipe_settings import AdaptConfig

ROOT = Path(__file__).resolve().parents[1]

TEST = ("t2spir19", "t2spir33", "t2spir36", "t2spir38")
"""Four of the five volumes that the shipped adapter is measured on; the fifth is needed here for training on five."""

WIDER = ("unadapted, wider window", "LoRA, 5 volumes, wider window")
MAIN = (
    "unadapted",
    "LoRA, 10 slices",
    "LoRA, 30 slices",
    "LoRA, 1 volume",
    "LoRA, 3 volumes",
    "LoRA, 5 volumes",
    "full, 5 volumes",
    *WIDER,
    "LoRA, 5 volumes, half of the slices at random",
)
CROSSED = ("unadapted", "LoRA, 5 volumes, no shading", "LoRA, 5 volumes", "LoRA, 5 volumes, strong shading", *WIDER)


@dataclass(frozen=True)
class Row:
    """One way to adapt.

    Attributes:
        shots: Volumes to train on; 0 for the model as it is.
        slices: Train on so many slices of these volumes; None for all.
        kind: "lora" or "full".
        bias_field: Strength of simulated shading while training.
        fields: Whether it is tested under shading too.
        proposals: Whether proposals are computed at the test, or the evidence alone.
        headroom: See `ConditioningConfig.mr_headroom`.
        random_share: See `AdaptConfig`; None for its default.
    """

    shots: int
    slices: int | None = None
    kind: str = "lora"
    bias_field: float = 0.3
    fields: bool = False
    proposals: bool = True
    headroom: float = 1.0
    random_share: float | None = None


ROWS: Mapping[str, Row] = {
    "unadapted": Row(0, fields=True),
    "LoRA, 5 volumes": Row(5, fields=True),
    "full, 5 volumes": Row(5, kind="full"),
    "LoRA, 3 volumes": Row(3),
    "LoRA, 1 volume": Row(1),
    "LoRA, 10 slices": Row(5, 10),
    "LoRA, 30 slices": Row(5, 30),
    "unadapted, wider window": Row(0, fields=True, headroom=4.0),
    "LoRA, 5 volumes, wider window": Row(5, fields=True, headroom=4.0),
    "LoRA, 5 volumes, no shading": Row(5, bias_field=0.0, fields=True, proposals=False),
    "LoRA, 5 volumes, strong shading": Row(5, bias_field=0.8, fields=True, proposals=False),
    "LoRA, 5 volumes, half of the slices at random": Row(5, random_share=0.5),
}
"""In the order in which they are run, seed after seed."""


@dataclass(frozen=True)
class Setup:
    """Sizes of a run; everything that a result depends on beside code and data.

    Attributes:
        test: Volumes that are never trained on.
        steps, batch_size, validate_every, patience: See `AdaptConfig`.
        lora_rate, full_rate: Peak learning rates.
        rank: Of the low-rank updates; alpha is twice as large.
        num_proposals: K.
        every: Every how many slices proposals are computed.
        fields: Strengths of shading at the test; 0 is none.
    """

    test: tuple[str, ...] = TEST
    steps: int = 80
    batch_size: int = 8
    validate_every: int = 20
    patience: int = 4
    lora_rate: float = 2e-3
    full_rate: float = 3e-4
    rank: int = 8
    num_proposals: int = 4
    every: int = 3
    fields: tuple[float, ...] = (0.0, 0.2, 0.4)


def split_volumes(names: Sequence[str], test: Sequence[str], seed: int) -> tuple[list[str], str]:
    """The volumes to train on, in the order in which they are taken, and the one to choose the number of steps on."""
    rest = sorted((name for name in names if name not in test), key=lambda name: hashlib.sha256(name.encode()).digest())
    start = 2 * seed % len(rest)
    turned = rest[start:] + rest[:start]
    return turned[:-1], turned[-1]


def shade(volume: Volume, strength: float, seed: int) -> Volume:
    """The volume times a smooth random field.

    Args:
        strength: Standard deviation of the field's logarithm over the volume; its mean is 0.
        seed: Of the field; the same field in another strength keeps its shape.
    """
    if strength == 0:
        return volume
    coarse = torch.randn(1, 1, 4, 4, 3, generator=torch.Generator().manual_seed(seed))
    field = torch.nn.functional.interpolate(coarse, size=volume.array.shape, mode="trilinear", align_corners=True)[
        0, 0
    ].numpy()
    field = (field - field.mean()) / field.std()
    low = float(volume.array.min())
    return dataclasses.replace(
        volume, array=(low + (volume.array.astype(np.float32) - low) * np.exp(strength * field)).astype(np.float32)
    )


@torch.no_grad()
def draw_masks(
    pipeline: ProposalPipeline,
    card: ModelCard,
    volume: Volume,
    structures: Sequence[str],
    chosen: Sequence[int],
    num_proposals: int,
) -> np.ndarray:
    """What the model draws on some slices, on the grid of the input.

    Returns:
        bool (1 + K, P, N, Y, X): the evidence, then K proposals.
    """
    config = card.conditioning
    stack, spacing = volume.to_stack()
    grid = plan_working_grid(
        stack, spacing, compute_body_threshold(volume), config.height, config.width, config.spacing_range
    )
    window = compute_window(volume, config.mr_headroom)
    prompts = pipeline.encode_prompts(structures)
    noise, offsets = (
        (pipeline.draw_noise(num_proposals, 0), pipeline.draw_offsets(num_proposals, 0))
        if num_proposals
        else (None, None)
    )
    masks = np.zeros((1 + num_proposals, len(structures), len(chosen), *stack.shape[1:]), bool)
    for start in range(0, len(chosen), 16):
        part = list(chosen[start : start + 16])
        features = pipeline.encode_slices(
            grid.extract_slices(stack, part, window, config.num_neighbours, config.neighbour_mm)
        )
        evidence = pipeline.predict_evidence(features, prompts)
        for p in range(len(structures)):
            masks[0, p, start : start + len(part)] = (grid.restore_slices(evidence[:, p].cpu()) >= 0.5).numpy()
        if noise is None:
            continue
        pairs = [
            (n, p) for p in range(len(structures)) for n in range(len(part)) if float(evidence[n, p].max()) >= card.gate
        ]
        for at in range(0, len(pairs), 16):
            some = pairs[at : at + 16]
            drawn = pipeline.propose(
                features, evidence, prompts, some, noise, card.num_inference_steps, card.guidance_scale, offsets
            )
            for (n, p), proposals in zip(some, drawn, strict=True):
                masks[1:, p, start + n] = (grid.restore_slices(proposals) >= 0.5).numpy()
    return masks


def score(mask: np.ndarray, truth: np.ndarray, spacing: Sequence[float] | None = None) -> dict[str, float]:
    """Dice of one mask (N, Y, X); given the spacing of all slices in mm, also distances, false slices, and those of its
    largest part.
    """
    figures = {"dice": compute_dice(mask, truth)}
    if spacing is None:
        return figures
    without = ~truth.any(axis=(1, 2))
    largest = keep_largest_component(mask)
    return figures | {
        "hd95": compute_hd95(mask, truth, spacing),
        "dice largest": compute_dice(largest, truth),
        "hd95 largest": compute_hd95(largest, truth, spacing),
        "false slices": float((mask.any(axis=(1, 2)) & without).sum() / max(1, without.sum())),
    }


def measure_volume(
    pipeline: ProposalPipeline,
    card: ModelCard,
    volume: Volume,
    labels: np.ndarray,
    ids: Mapping[str, Sequence[int]],
    every: int,
    num_proposals: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Structure -> "evidence" and, if K > 0, "single", "consensus" and "best" -> figures.

    Args:
        labels: Label ids in file order, shape (I, J, K).
        ids: Structure -> its label ids.
        every: Every how many slices proposals are computed.
    """
    stack, spacing = volume.to_stack()
    truth = np.stack([np.isin(volume.arrange(labels), list(values)) for values in ids.values()])
    evidence = draw_masks(pipeline, card, volume, list(ids), range(len(stack)), 0)[0]
    found: dict[str, dict[str, dict[str, float]]] = {
        name: {"evidence": score(evidence[p], truth[p], spacing)} for p, name in enumerate(ids)
    }
    if not num_proposals:
        return found
    chosen = range(every // 2, len(stack), every)
    drawn = draw_masks(pipeline, card, volume, list(ids), chosen, num_proposals)[1:]
    for p, name in enumerate(ids):
        there = truth[p, list(chosen)]
        each = [score(mask, there) for mask in drawn[:, p]]
        found[name]["single"] = {key: average([entry[key] for entry in each]) for key in each[0]}
        found[name]["consensus"] = score(drawn[:, p].mean(axis=0) >= 0.5, there)
        found[name]["best"] = max(each, key=lambda entry: -1.0 if np.isnan(entry["dice"]) else entry["dice"])
    return found


def average(values: Sequence[float | None]) -> float:
    """Mean of what is a number (None is NaN as JSON holds it); NaN if nothing is."""
    numbers = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(numbers)) if numbers else float("nan")


def gather(volumes: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> dict[str, Any]:
    """Means over volumes per kind and structure, and over the structures under "mean"."""
    per_volume = list(volumes.values())
    figures: dict[str, Any] = {}
    for kind in next(iter(per_volume[0].values())):
        rows = {
            name: {key: average([entry[name][kind][key] for entry in per_volume]) for key in per_volume[0][name][kind]}
            for name in per_volume[0]
        }
        figures[kind] = {
            "mean": {key: average([row[key] for row in rows.values()]) for key in next(iter(rows.values()))},
            **rows,
        }
    return figures


class Bench:
    """Model, data and cells of a run.

    Args:
        tell: Receives a line per cell and strength.
    """

    def __init__(self, setup: Setup, studies: Path, model_dir: Path, work: Path, tell: Callable[[str], None]) -> None:
        self.setup, self.studies, self.model_dir, self.work, self.tell = setup, studies, model_dir, work, tell
        self.base_digest = compute_base_digest(model_dir)
        self._bases: dict[float, tuple[Path, ModelCard, ProposalPipeline]] = {}
        self.card = self.load_base(1.0)[1]
        self.cases: dict[str, LabelledCase] = {case.name: case for case in list_labelled(studies)}
        missing = [name for name in setup.test if name not in self.cases]
        if missing:
            sys.exit(f"The test volumes {', '.join(missing)} are not in '{studies}'; name others with --test.")
        self.ids, _ = match_structures(load_label_names(studies), self.card.structures)
        work.mkdir(parents=True, exist_ok=True)
        # What the numbers depend on names the folder, so that another size or other weights do not continue an old run.
        parts = json.dumps([asdict(setup), self.base_digest, sorted(self.cases)])
        self.folder = work / f"transfer-{hashlib.sha256(parts.encode()).hexdigest()[:12]}"

    def load_base(self, headroom: float) -> tuple[Path, ModelCard, ProposalPipeline]:
        """The model with this `mr_headroom`: its folder, card and networks."""
        if headroom not in self._bases:
            folder = self.model_dir
            if headroom != load_card(folder).conditioning.mr_headroom:
                folder = self.work / f"model-{self.base_digest[:12]}-{headroom:g}"
                shutil.copytree(self.model_dir / "backbone", folder / "backbone", dirs_exist_ok=True)
                card = load_card(self.model_dir)
                shapes = replace(card.conditioning, mr_headroom=headroom)
                copy_conditioning(self.model_dir, folder, replace(card, conditioning=shapes))
            backbone = Backbone(folder / "backbone", "cpu")
            self._bases[headroom] = (
                folder,
                *load_pipeline(folder, backbone, find_autocast_dtype("auto", backbone.device)),
            )
        return self._bases[headroom]

    def find_cell(self, name: str, row: Row, seed: int) -> Path:
        """Where a (row, seed) is kept."""
        return self.folder / f"{hashlib.sha256(f'{name} {asdict(row)}'.encode()).hexdigest()[:12]}-{seed}.json"

    def run_cell(self, name: str, row: Row, seed: int) -> dict[str, Any]:
        """Train and test one (row, seed), or read what it gave before."""
        file = self.find_cell(name, row, seed)
        if file.is_file():
            return dict(json.loads(file.read_text(encoding="utf-8")))
        training, validation = split_volumes(list(self.cases), self.setup.test, seed)
        if row.shots > len(training):
            sys.exit(
                f"Row '{name}' trains on {row.shots} volumes, but beside test and validation there are {len(training)}."
            )
        if row.shots:
            pipeline, cell = self._train(row, training[: row.shots], validation, seed)
        else:
            pipeline, cell = self.load_base(row.headroom)[2], {}
        tested = time.process_time()
        cell["tests"] = {
            f"{strength:g}": self._test(row, pipeline, strength)
            for strength in (self.setup.fields if row.fields else (0.0,))
        }
        told = {strength: found["means"]["evidence"]["mean"]["dice"] for strength, found in cell["tests"].items()}
        means = cell["tests"]["0"]["means"]
        shown = means.get("consensus", means["evidence"])["mean"]
        self.tell(
            f"{name}, seed {seed}: Dice {shown['dice']:.3f}, HD95 {means['evidence']['mean']['hd95']:.0f} mm; evidence "
            f"{', '.join(f'{v:.3f} at {k}' for k, v in told.items())}; {cell.get('seconds', 0):.0f} s of training, "
            f"{cell.get('seconds_gate', 0):.0f} of the gate, {time.process_time() - tested:.0f} of the test"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(".tmp")
        scratch.write_text(json.dumps(cell), encoding="utf-8")
        scratch.replace(file)
        return cell

    def _train(
        self, row: Row, training: Sequence[str], validation: str, seed: int
    ) -> tuple[ProposalPipeline, dict[str, Any]]:
        setup = self.setup
        model_dir, _, base = self.load_base(row.headroom)
        config = AdaptConfig(
            kind="full" if row.kind == "full" else "lora", lora=LoraSettings(setup.rank, 2.0 * setup.rank),
            steps=setup.steps,
            learning_rate=setup.full_rate if row.kind == "full" else setup.lora_rate, batch_size=setup.batch_size,
            validate_every=setup.validate_every, patience=setup.patience, bias_field=row.bias_field, num_proposals=1,
            seed=seed,
            random_share=AdaptConfig.random_share if row.random_share is None else row.random_share,
        )  # fmt: skip
        gate: list[float] = []

        def note(entry: Mapping[str, Any]) -> None:
            if entry["stage"] == "gate":
                gate.append(time.process_time())

        # Its own folder, so that the time is that of a whole training, never of the rest of one.
        with tempfile.TemporaryDirectory(dir=self.work) as scratch:
            store = AdapterStore(Path(scratch) / "adapters")
            started = time.process_time()
            result = run_adapt(
                self.studies, model_dir, "transfer", Path(scratch), config, adapters=store.root, cases=list(training),
                held_out=[validation],
                slices=row.slices, publish=False, device="cpu", report=note,
            )  # fmt: skip
            tensors = store.load(result.card, self.base_digest)
            branch, unet = build_networks(result.card, tensors, base.branch, base.unet, Path(scratch))
            run = store.run(result.card)
            size = sum(path.stat().st_size for path in store.folder(result.card).glob("*.safetensors"))
        cell = {
            "training": list(training),
            "training_slices": sum(map(len, run["training_slices"].values())),
            "validation": validation,
            "seconds": round(gate[0] - started, 1),
            "seconds_gate": round(time.process_time() - gate[0], 1),
            "steps": run["choice"]["steps"],
            "history": run["choice"]["history"],
            "megabytes": size / 1e6,
            "parameters": sum(t.numel() for t in tensors.values()),
        }
        return base.with_networks(branch, unet), cell

    def _test(self, row: Row, pipeline: ProposalPipeline, strength: float) -> dict[str, Any]:
        volumes = {}
        for name in self.setup.test:
            volume = load_volume(self.cases[name].image)
            labels = load_label(self.cases[name].label, volume.grid)
            # One field per volume, the same for all rows and in both strengths.
            shaded = shade(volume, strength, int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big"))
            count = self.setup.num_proposals if row.proposals and strength == 0 else 0
            volumes[name] = measure_volume(
                pipeline, self.load_base(row.headroom)[1], shaded, labels, self.ids, self.setup.every, count
            )
        return {"means": gather(volumes), "volumes": volumes}


def summarise(cells: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Per row the mean over its seeds, its lowest and highest seed, and its share of what full fine-tuning reaches."""
    rows: dict[str, Any] = {}
    for name, by_seed in cells.items():
        tests = [cell["tests"] for cell in by_seed.values()]
        plain = [test["0"]["means"] for test in tests]
        kind = "consensus" if "consensus" in plain[0] else "evidence"
        dice = [means[kind]["mean"]["dice"] for means in plain]
        rows[name] = {
            "seeds": len(dice),
            "shown": kind,
            "dice": {k: average([means[k]["mean"]["dice"] for means in plain]) for k in plain[0]},
            "dice_of_seeds": dice,
            "structures": {
                s: average([means[kind][s]["dice"] for means in plain]) for s in plain[0][kind] if s != "mean"
            },
            "evidence": {
                key: average([means["evidence"]["mean"][key] for means in plain])
                for key in plain[0]["evidence"]["mean"]
            },
            "evidence_under_shading": {
                strength: average([test[strength]["means"]["evidence"]["mean"]["dice"] for test in tests])
                for strength in tests[0]
            },
        }
        trained = [cell for cell in by_seed.values() if cell.get("training")]
        if trained:
            rows[name] |= {
                "minutes": average([cell["seconds"] / 60 for cell in trained]),
                **{
                    key: average([cell[key] for cell in trained])
                    for key in ("steps", "training_slices", "megabytes", "parameters")
                },
            }
    full = rows.get("full, 5 volumes")
    for row in rows.values():
        if full is not None:
            row["share_of_full"] = row["dice"][row["shown"]] / full["dice"][row["shown"]]
    return rows


def format_tables(rows: Mapping[str, Any]) -> str:
    """The summary in Markdown: the rows, and those under shading."""

    def describe(name: str) -> dict[str, str]:
        row, dice = rows[name], rows[name]["dice"]
        seeds = row["dice_of_seeds"]
        cells = {
            "row": name,
            "single": f"{dice['single']:.3f}",
            "consensus": f"{dice['consensus']:.3f}",
            "lowest to highest seed": f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "",
            "best": f"{dice['best']:.3f}",
            "evidence": f"{dice['evidence']:.3f}",
            "of full": f"{row['share_of_full']:.0%}" if "share_of_full" in row else "",
            **{structure: f"{value:.3f}" for structure, value in row["structures"].items()},
            "HD95, mm": f"{row['evidence']['hd95']:.0f}",
            "HD95 of largest part": f"{row['evidence']['hd95 largest']:.0f}",
            "Dice of largest part": f"{row['evidence']['dice largest']:.3f}",
            "false slices": f"{row['evidence']['false slices']:.0%}",
        }
        trained = {"MB": ("megabytes", ".2f"), "minutes": ("minutes", ".1f"), "steps": ("steps", ".0f")}
        return cells | {title: format(row[key], how) if key in row else "" for title, (key, how) in trained.items()}

    lines = []
    described = [describe(name) for name in MAIN if name in rows]
    if described:
        lines += [f"| {' | '.join(described[0])} |", f"|{'---|' * len(described[0])}"]
        lines += [f"| {' | '.join(cells.values())} |" for cells in described]
    crossed = {name: rows[name]["evidence_under_shading"] for name in CROSSED if name in rows}
    if crossed:
        strengths = list(next(iter(crossed.values())))
        lines += [
            "",
            f"| Dice of the evidence under shading of | {' | '.join(strengths)} |",
            f"|---|{'---|' * len(strengths)}",
        ]
        lines += [f"| {name} | {' | '.join(f'{dice[s]:.3f}' for s in strengths)} |" for name, dice in crossed.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, help="local datastore with labels/final and labels.json")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="names as in the tables (default: all)")
    parser.add_argument("--test", nargs="*", help=f"test volumes (default: {' '.join(TEST)})")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--every", type=int, help="proposals on every so many slices of the test volumes")
    parser.add_argument("--num-proposals", type=int)
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "transfer")
    parser.add_argument("--out", type=Path, help="JSON file to write, anew after every cell")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--smoke", action="store_true", help="a size for tests: 2 steps, 2 proposals, 1 volume or 2 slices"
    )
    parser.add_argument("--collect", action="store_true", help="train nothing: only what is done already")
    parser.add_argument("--summarise", type=Path, help="only the tables, from this JSON file")
    options = parser.parse_args(arguments)
    if options.summarise:
        print(format_tables(summarise(json.loads(options.summarise.read_text(encoding="utf-8"))["cells"])))
        return
    if options.studies is None:
        parser.error("--studies is needed, or --summarise")
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}; there are {', '.join(ROWS)}")
    torch.set_num_threads(options.threads)
    setup, rows = Setup(), {name: ROWS[name] for name in ROWS if name in options.rows}
    if options.smoke:
        setup = replace(setup, steps=2, batch_size=2, validate_every=1, num_proposals=2, every=4, fields=(0.0, 0.3))
        rows = {n: replace(row, shots=min(row.shots, 1), slices=row.slices and 2) for n, row in rows.items()}
    sizes = {name: getattr(options, name) for name in ("steps", "batch_size", "every", "num_proposals")}
    setup = replace(setup, **{name: value for name, value in sizes.items() if value is not None})
    if options.test:
        setup = replace(setup, test=tuple(options.test))
    bench = Bench(
        setup, options.studies, options.model, options.work, lambda text: print(text, file=sys.stderr, flush=True)
    )
    cells: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        for name, row in rows.items():
            is_missing = options.collect and not bench.find_cell(name, row, seed).is_file()
            if (
                row.shots or seed == options.seeds[0]
            ) and not is_missing:  # Nothing is random about the model as it is.
                cells.setdefault(name, {})[str(seed)] = bench.run_cell(name, row, seed)
                if options.out:
                    write_result(options.out, bench, rows, cells)
    if not cells:
        sys.exit(f"Nothing is done yet in '{bench.folder}'; leave --collect out to run it.")
    print(format_tables(summarise(cells)))


def write_result(path: Path, bench: Bench, rows: Mapping[str, Row], cells: Mapping[str, Mapping[str, Any]]) -> None:
    result = {
        # Where cells were kept and by how many processes they were made is nothing that the figures depend on.
        "command": re.sub(
            r" --collect| --work \S+", "", shlex.join(["python", "benchmarks/transfer.py", *sys.argv[1:]])
        ),
        "model": bench.card.full_name,
        "setup": asdict(bench.setup),
        "rows": {name: asdict(rows[name]) for name in cells},
        "summary": summarise(cells),
        "cells": cells,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(replace_nan(result), indent=1) + "\n", encoding="utf-8")


def replace_nan(value: Any) -> Any:
    """JSON has no NaN: null says "not defined"."""
    if isinstance(value, Mapping):
        return {key: replace_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [replace_nan(entry) for entry in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(value, 5)
    return value


if __name__ == "__main__":
    main()
