"""Do proposals differ as readers do? Lung nodules with the masks of four readers each (LIDC-IDRI).

    python benchmarks/readers.py --readers <lidc.npz> --work <folder> --out benchmarks/results/readers.json

Three answers of the same encoder, trained for the same CPU time on the same patients: *level sets* of its probability
(p > u_k, one u per proposal: the baseline that costs nothing), *proposals* of the close-up's denoiser, trained with the
energy score, and the level sets of that same network. Beside them two floors: the readers' majority as the only answer,
and {union, nothing}. Because {union, nothing} has a small GED, GED never stands alone: Hungarian-matched IoU and the
Dice of the consensus with the readers' majority stand beside it. Patients are split 70 / 10 / 20; three seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment

from progidiff.model.close_up import CloseUpNetwork, WindowBatch, create_network
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.pipeline import EncodedPrompts
from progidiff.storage.atomic import atomic_file
from progidiff.training.close_up_stage import CloseUpLosses, CloseUpObjective, CloseUpOptions
from progidiff.training.loop import LoopConfig, run_loop
from progidiff.training.reader_masks import ReaderMasks, ReaderSource, load_reader_masks, split_patients
from progidiff.training.simulated_edits import EditHabits
from progidiff.training.window_pool import Jitter, WindowPool

TEXT = 32
"""Numbers in the text vector: there is one structure, so it says nothing."""

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


def make_options(arm: str, windows: int) -> CloseUpOptions:
    """`levels` trains the encoder alone, `proposals` the denoiser with it."""
    losses = CloseUpLosses() if arm == "proposals" else CloseUpLosses(energy=0, denoising=0)
    return CloseUpOptions(
        windows_per_step=windows,
        proposed=windows if arm == "proposals" else 1,
        samples=4 if arm == "proposals" else 2,
        denoising_share=0.1 if arm == "proposals" else 0.0,
        edit_share=0.0,
        neighbour_share=0.0,
        text_dropout=0.0,
        losses=losses,
    )


def train(arm: str, seed: int, masks: ReaderMasks, options: argparse.Namespace) -> tuple[CloseUpNetwork, float]:
    """Train an arm for the CPU time of a run, or load what was trained. Returns the network and its CPU seconds."""
    folder = options.work / f"{arm}{seed}"
    done = folder / "network.safetensors"
    network = create_network(TEXT, seed=seed)
    if not done.is_file():
        pool = WindowPool([ReaderSource(masks, label=1, jitter=Jitter(shift=0.03, zoom=0.1, bend=0.008))])
        # Nobody edits here: what is measured is what the image alone says.
        objective = CloseUpObjective(
            network, pool, make_prompts(), make_options(arm, options.windows), EditHabits(clicks=0, frames=0)
        )
        seconds = measure_step(objective, seed)
        steps = max(20, int(options.seconds / seconds))
        loop = LoopConfig(
            steps=steps,
            learning_rate=1e-3,
            warmup=min(50, steps // 4),
            ema_decay=0.99,
            checkpoint_every=100,
            seed=seed,
            tensorboard=False,
        )
        started = time.process_time()
        run_loop({"network": network}, objective, loop, folder)
        with atomic_file(done) as path:
            save_file(
                network.state_dict(), path, {"cpu_seconds": str(time.process_time() - started), "steps": str(steps)}
            )
    network.load_state_dict(load_file(done))
    from safetensors import safe_open

    with safe_open(done, "pt") as file:
        return network, float(file.metadata()["cpu_seconds"])


def measure_step(objective: CloseUpObjective, seed: int) -> float:
    """CPU seconds of one step, the median of five."""
    generator, spent = torch.Generator().manual_seed(seed), []
    for _ in range(5):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = objective.compute_loss(objective.draw_batch(generator), generator)
        loss.backward()
        spent.append(time.process_time() - started)
    objective.network.zero_grad(set_to_none=True)
    return float(np.median(spent))


@torch.no_grad()
def draw(network: CloseUpNetwork, images: NDArray[np.uint8], count: int, steps: int) -> tuple[Masks, Masks]:
    """Level sets and proposals of some crops, each (N, K, Y, X)."""
    pipeline = CloseUpPipeline(network, torch.bfloat16)
    noise, levels = pipeline.draw_noise(count, 0), pipeline.draw_levels(count, 0)
    shape = (len(images), 1, *images.shape[1:])
    unit = torch.from_numpy(images).float().view(shape) / 127.5 - 1
    batch = WindowBatch(
        images=unit.expand(-1, 5, -1, -1),
        evidence=torch.zeros(len(images), 3, *images.shape[1:]),
        is_found=torch.zeros(len(images)),
        edits=None,
        pooled=torch.zeros(len(images), TEXT),
        spacing=torch.tensor([[0.7, 3.0]]).expand(len(images), -1),
    )
    sharpened, drawn = pipeline.propose(batch, torch.zeros(len(images), 1, TEXT), None, noise, levels, steps)
    cuts = (torch.arange(count) + 0.5) / count
    return (sharpened[:, None] > cuts[None, :, None, None]).numpy(), (drawn >= 0.5).numpy()


def measure(
    network: CloseUpNetwork, masks: ReaderMasks, chosen: NDArray[np.int64], options: argparse.Namespace
) -> dict[str, Any]:
    """Means over the test crops of a network's level sets and proposals."""
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


def main() -> None:
    """Train and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=Path, required=True, help="npz with images, masks_packed and key")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=600, help="CPU seconds of a training")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--crops", type=int, default=400, help="test crops, evenly spaced")
    parser.add_argument("--num-proposals", type=int, default=16)
    parser.add_argument("--denoising-steps", type=int, default=1)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    masks = load_reader_masks(options.readers)
    training, _, test = split_patients(masks.patients, [0.7, 0.1, 0.2])
    chosen = np.flatnonzero(test)[:: max(1, int(test.sum()) // options.crops)][: options.crops]
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "machine": platform.processor() or platform.machine(),
        "crops": len(chosen),
        "patients": {
            "training": len(np.unique(masks.patients[training])),
            "test": len(np.unique(masks.patients[test])),
        },
        "floors": measure_floors(masks, chosen, options.num_proposals),
        "runs": [],
    }
    for seed in options.seeds:
        for arm in ("levels", "proposals"):
            network, seconds = train(arm, seed, masks.pick(training), options)
            found = measure(network, masks, chosen, options)
            kinds = {"levels": found["levels"]} if arm == "levels" else found
            result["runs"].append({"seed": seed, "trained": arm, "cpu_seconds": round(seconds), **kinds})
            print(json.dumps(result["runs"][-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["floors"]))


if __name__ == "__main__":
    main()
