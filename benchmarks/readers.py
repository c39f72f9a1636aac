"""Do proposals differ as readers do? Lung nodules with the masks of four readers each (LIDC-IDRI).

    python benchmarks/readers.py --readers <lidc.npz> --work <folder> --out benchmarks/results/readers.json
    python benchmarks/readers.py --readers <lidc.npz> --work <folder> --picture docs/images/readers.png

For every seed an encoder learns the readers' mean (cross-entropy: its probabilities should mean what they say). From
there two go on for the same processor time: *longer*, the encoder, whose level sets (p > u_k, one u per proposal) are
the baseline that costs no diffusion, and *proposals*, the close-up's denoiser, with the encoder as it is, by the energy
score. The denoiser is fresh, so that at first its proposals are level sets too: "start" is before either.

Beside them two floors: the readers' majority as the only answer, and {union, nothing}. Because {union, nothing} has a
small GED, GED never stands alone: Hungarian-matched IoU and the Dice of the consensus with the readers' majority stand
beside it. Patients are split 70 / 10 / 20; settings were chosen on the 10 (`--part validation`).

Networks see the middle 64 x 64 of a crop's 96 x 96 pixels (0.1 % of what readers drew lies outside of it); everything
is measured on all 96.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from progidiff.model.close_up import CloseUpNetwork, WindowBatch, create_network
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.pipeline import EncodedPrompts
from progidiff.storage.atomic import atomic_file
from progidiff.training.close_up_stage import CloseUpBatch, CloseUpLosses, CloseUpObjective, CloseUpOptions
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.objective import Figures
from progidiff.training.reader_masks import ReaderMasks, ReaderSource, load_reader_masks, split_patients
from progidiff.training.simulated_edits import EditHabits
from progidiff.training.window_pool import Jitter, WindowPool

TEXT = 32
"""Numbers in the text vector: there is one structure, so it says nothing."""

SEEN = 64
"""Pixels along both sides of what networks see."""

Masks = NDArray[np.bool_]


def compute_iou(a: Masks, b: Masks) -> NDArray[np.float64]:
    """IoU of every mask (A, Y, X) with every mask (B, Y, X); 1 for two empty ones. Shape (A, B)."""
    first, second = a.reshape(len(a), -1).astype(np.float32), b.reshape(len(b), -1).astype(np.float32)
    overlap = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1)[None] - overlap
    return np.where(union > 0, overlap / np.maximum(union, 1), 1.0).astype(np.float64)


def compute_ged(drawn: Masks, readers: Masks) -> float:
    """Squared generalised energy distance with d = 1 - IoU (Kohl et al. 2018)."""
    between, within, among = compute_iou(drawn, readers), compute_iou(drawn, drawn), compute_iou(readers, readers)
    return float(2 * (1 - between).mean() - (1 - within).mean() - (1 - among).mean())


def compute_matched_iou(drawn: Masks, readers: Masks) -> float:
    """Mean IoU of the best one-to-one matching of proposals with readers, each reader as often as any other."""
    times = -(-len(drawn) // len(readers))
    iou = np.tile(compute_iou(drawn, readers), (1, times))
    rows, columns = linear_sum_assignment(-iou)
    return float(iou[rows, columns].mean())


def compute_consensus_dice(drawn: Masks, readers: Masks) -> float:
    """Dice of the proposals' majority with the readers' majority (at least half)."""
    mine, theirs = drawn.mean(0) >= 0.5, readers.mean(0) >= 0.5
    total = mine.sum() + theirs.sum()
    return float(2 * (mine & theirs).sum() / total) if total else 1.0


def score(drawn: Masks, readers: Masks) -> dict[str, float]:
    """All figures of one crop."""
    return {
        "ged": compute_ged(drawn, readers),
        "matched_iou": compute_matched_iou(drawn, readers),
        "consensus_dice": compute_consensus_dice(drawn, readers),
    }


def make_prompts() -> EncodedPrompts:
    """One structure without words."""
    return EncodedPrompts(torch.zeros(1, 1, TEXT), None, torch.zeros(1, TEXT), torch.zeros(1, 1, TEXT), None)


def make_options(options: argparse.Namespace, keep_encoder: bool) -> CloseUpOptions:
    """Nobody edits, and nothing is told: what is measured is what the image alone says."""
    windows = options.windows
    return CloseUpOptions(
        windows_per_step=windows,
        proposed=windows,
        samples=options.samples,
        denoising_share=0.0,
        edit_share=0.0,
        neighbour_share=0.0,
        text_dropout=0.0,
        steepness=options.steepness,
        keep_encoder=keep_encoder,
        losses=CloseUpLosses(cross_entropy=30, sharpened=0.1, energy=1, denoising=0),
    )


class EncoderObjective(CloseUpObjective):
    """The sharpened evidence alone: calibrated, so nearly all of it is cross-entropy."""

    def compute_loss(self, batch: CloseUpBatch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """See `CloseUpObjective`."""
        sharpened = self._compare(self.network.encode(batch.windows).logits, batch.mean_truth)
        return self.options.losses.sharpened * sharpened, {"sharpened": sharpened.detach()}


def create(seed: int) -> CloseUpNetwork:
    """A fresh network whose levels spread as a logistic variable does, like level sets at evenly spread u."""
    return create_network(TEXT, seed=seed, level_spread=1.8)


def train(
    folder: Path,
    start: CloseUpNetwork,
    kind: type[CloseUpObjective],
    masks: ReaderMasks,
    loop: LoopConfig,
    options: argparse.Namespace,
) -> float:
    """Train a network, or load what was trained; returns the seconds of processor time that it took.

    Args:
        kind: `EncoderObjective`, or `CloseUpObjective` for the denoiser alone.
    """
    done = folder / "network.safetensors"
    if not done.is_file():
        source = ReaderSource(masks, label=1, size=SEEN, jitter=Jitter(shift=0.03, zoom=0.1, bend=0.008))
        settings = make_options(options, kind is CloseUpObjective)
        objective = kind(start, WindowPool([source]), make_prompts(), settings, EditHabits(clicks=0, frames=0))
        started = time.process_time()
        run_loop({"network": start}, objective, loop, folder)
        with atomic_file(done) as path:
            save_file(start.state_dict(), path, {"cpu_seconds": str(time.process_time() - started)})
    start.load_state_dict(load_file(done))
    with safe_open(done, "pt") as file:
        return float(file.metadata()["cpu_seconds"])


def make_loop(steps: int, rate: float, seed: int, decay: float = 0.99) -> LoopConfig:
    """Length and rate of a training."""
    return LoopConfig(
        steps=steps,
        learning_rate=rate,
        warmup=min(50, steps // 4),
        ema_decay=decay,
        checkpoint_every=100,
        seed=seed,
        tensorboard=False,
    )


def train_seed(seed: int, masks: ReaderMasks, options: argparse.Namespace) -> dict[str, tuple[CloseUpNetwork, float]]:
    """All three of a seed, with the processor seconds of each, the start's included."""
    steps, work = options.encoder_steps, options.work
    start = create(seed)
    first = train(work / f"enc{seed}", start, EncoderObjective, masks, make_loop(steps, 2e-3, seed), options)
    found = {"start": (start, first)}
    proposals = create(seed)
    proposals.load_state_dict(start.state_dict())
    loop = make_loop(options.denoiser_steps, 1e-3, seed, 0.98)
    more = train(work / f"proposals{seed}", proposals, CloseUpObjective, masks, loop, options)
    found["proposals"] = (proposals, first + more)
    longer = create(seed)
    longer.load_state_dict(start.state_dict())
    loop = make_loop(max(20, round(steps * more / first)), 1e-3, seed + 100)
    rest = train(work / f"longer{seed}", longer, EncoderObjective, masks, loop, options)
    found["longer"] = (longer, first + rest)
    return found


@torch.no_grad()
def draw(network: CloseUpNetwork, images: NDArray[np.uint8], count: int, steps: int) -> tuple[Masks, Masks]:
    """Level sets and proposals of some crops (N, Y, X), each (N, K, Y, X); nothing outside of the middle."""
    edge = (images.shape[-1] - SEEN) // 2
    seen = images[:, edge : edge + SEEN, edge : edge + SEEN]
    pipeline = CloseUpPipeline(network, torch.bfloat16)
    noise, levels = pipeline.draw_noise(count, 0), pipeline.draw_levels(count, 0)
    shape = (len(images), 1, SEEN, SEEN)
    unit = torch.from_numpy(seen.copy()).float().view(shape) / 127.5 - 1
    batch = WindowBatch(
        images=unit.expand(-1, 5, -1, -1),
        evidence=torch.zeros(len(images), 3, SEEN, SEEN),
        is_found=torch.zeros(len(images)),
        edits=None,
        pooled=torch.zeros(len(images), TEXT),
        spacing=torch.tensor([[0.7, 3.0]]).expand(len(images), -1),
    )
    sharpened, drawn = pipeline.propose(batch, torch.zeros(len(images), 1, TEXT), None, noise, levels, steps)
    cuts = (torch.arange(count) + 0.5) / count
    around = ((0, 0), (0, 0), (edge, edge), (edge, edge))
    sets = (sharpened[:, None] > cuts[None, :, None, None]).numpy()
    return np.pad(sets, around), np.pad((drawn >= 0.5).numpy(), around)


def measure(
    network: CloseUpNetwork, masks: ReaderMasks, chosen: NDArray[np.int64], options: argparse.Namespace
) -> dict[str, Any]:
    """Means over crops of a network's level sets and proposals."""
    rows: dict[str, list[dict[str, float]]] = {"levels": [], "proposals": []}
    for start in range(0, len(chosen), 20):
        part = chosen[start : start + 20]
        found = draw(network, masks.images[part], options.num_proposals, options.denoising_steps)
        for kind, drawn in zip(rows, found, strict=True):
            rows[kind] += [score(one, masks.unpack(int(i)).astype(bool)) for one, i in zip(drawn, part, strict=True)]
    return {kind: average(found) for kind, found in rows.items()}


def average(rows: list[dict[str, float]]) -> dict[str, float]:
    """Mean of every figure."""
    return {name: round(float(np.mean([row[name] for row in rows])), 4) for name in rows[0]}


def measure_floors(masks: ReaderMasks, chosen: NDArray[np.int64], count: int) -> dict[str, dict[str, float]]:
    """What answers that see the readers' masks would score."""
    majority, silly = [], []
    for i in chosen:
        readers = masks.unpack(int(i)).astype(bool)
        majority.append(score(np.repeat((readers.mean(0) >= 0.5)[None], count, 0), readers))
        union = readers.any(0)[None]
        silly.append(
            score(np.concatenate([np.repeat(part, count // 2, 0) for part in (union, union & False)]), readers)
        )
    return {"readers' majority": average(majority), "{union, nothing}": average(silly)}


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Answer -> figure -> [mean over seeds, standard deviation]."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(run["answer"] for run in runs):
        mine = [run for run in runs if run["answer"] == name]
        figures = {key: [run[key] for run in mine] for key in ("ged", "matched_iou", "consensus_dice", "cpu_seconds")}
        found[name] = {
            key: [round(mean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0]
            for key, values in figures.items()
        }
    return found


def show(network: CloseUpNetwork, masks: ReaderMasks, chosen: Sequence[int], path: Path, count: int = 8) -> None:
    """Draw crops, their readers and proposals, in rows: the crop, four readers, the proposals, the share of them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    columns = 1 + masks.masks.shape[1] + count
    figure, axes = plt.subplots(len(chosen), columns, figsize=(columns * 0.95, len(chosen) * 1.0), squeeze=False)
    _, drawn = draw(network, masks.images[list(chosen)], count, 1)
    middle = slice(16, 80)
    for row, index, proposals in zip(axes, chosen, drawn, strict=True):
        readers = masks.unpack(int(index)).astype(bool)
        image = masks.images[index][middle, middle]
        for cell, (mask, color) in zip(
            row,
            [(None, ""), *((m, "#ffb000") for m in readers), *((m, "#40c0ff") for m in proposals)],
            strict=True,
        ):
            cell.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            if mask is not None and mask.any():
                cell.contour(mask[middle, middle], [0.5], colors=color, linewidths=0.9)
            cell.set_xticks([])
            cell.set_yticks([])
    for number, cell in enumerate(axes[0]):
        readers_end = 1 + masks.masks.shape[1]
        title = "image" if number == 0 else f"reader {number}" if number < readers_end else f"{number - readers_end}"
        cell.set_title(title, fontsize=7)
    figure.tight_layout(pad=0.15)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pick_shown(masks: ReaderMasks, chosen: NDArray[np.int64], count: int = 6) -> list[int]:
    """Crops on which readers agree from little to much: at even steps of their mean IoU, one a patient."""
    order = []
    for index in chosen:
        readers = masks.unpack(int(index)).astype(bool)
        if readers.sum() > 4 * 60:
            order.append((float(compute_iou(readers, readers).mean()), int(index)))
    order.sort()
    return [order[int(place)][1] for place in np.linspace(0.05, 0.95, count) * (len(order) - 1)]


def main() -> None:
    """Train, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, required=True, help="npz with images, masks_packed and key")
    parser.add_argument("--work", type=Path, required=True, help="keeps networks; a run that is stopped goes on")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path, help="PNG of nodules that the first seed has not seen")
    parser.add_argument("--part", choices=("validation", "test"), default="test", help="patients to measure on")
    parser.add_argument("--encoder-steps", type=int, default=700)
    parser.add_argument("--denoiser-steps", type=int, default=300)
    parser.add_argument("--steepness", type=float, default=4.0, help="of proposals in the energy score")
    parser.add_argument("--samples", type=int, default=4, help="proposals of a window in the energy score")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--crops", type=int, default=400, help="measured, evenly spaced")
    parser.add_argument("--num-proposals", type=int, default=16)
    parser.add_argument("--denoising-steps", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    masks = load_reader_masks(options.readers)
    training, validation, test = split_patients(masks.patients, [0.7, 0.1, 0.2])
    measured = test if options.part == "test" else validation
    chosen = np.flatnonzero(measured)[:: max(1, int(measured.sum()) // options.crops)][: options.crops]
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "crops": len(chosen),
        "patients": {
            "training": len(np.unique(masks.patients[training])),
            options.part: len(np.unique(masks.patients[measured])),
        },
        "floors": measure_floors(masks, chosen, options.num_proposals),
        "runs": [],
    }
    for seed in options.seeds:
        for name, (network, seconds) in train_seed(seed, masks.pick(training), options).items():
            if options.picture and name == "proposals" and seed == options.seeds[0]:
                show(network, masks, pick_shown(masks, chosen), options.picture)
            found = measure(network, masks, chosen, options)
            if name == "proposals":
                answer, figures = name, found["proposals"]
            else:
                answer, figures = f"level sets, {name}", found["levels"]
            result["runs"].append({"seed": seed, "answer": answer, "cpu_seconds": round(seconds), **figures})
            print(json.dumps(result["runs"][-1]), flush=True)
            result["summary"] = summarise(result["runs"])
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({**result["floors"], **result["summary"]}, indent=1))


if __name__ == "__main__":
    main()
