"""A plain U-Net of as many processor minutes as a fold of ours, on the same patients: its level sets and MC dropout.

    python benchmarks/rivals.py --studies <BTCV folder> --work <folder of folds.py> --folds 0 --minutes 40
    python benchmarks/folds.py table --studies <BTCV folder> --work <folder of folds.py> --folds 0 --name unet \
        --out benchmarks/results/rivals_unet.json

Writes what `benchmarks/folds.py close-up` writes of its networks, so that its `table` reads both. In the U-Net's rows
"evidence" and "sharpened" are its one answer, "level" and "best_level" the level sets of that, "consensus", "single"
and "best" K answers of MC dropout (`baselines.UNet.sample`). A fold that is finished is not repeated, one that was
stopped goes on at its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines import Budget, UNet, compute_unet_loss, draw_slices, train_for
from folds import MODEL, list_folds, make_row
from progidiff.model.backbone import Backbone
from progidiff.model.calibration import Reliability
from progidiff.model.conditioning import ConditioningConfig
from progidiff.storage.atomic import atomic_file
from progidiff.training.build_model import create_branch
from progidiff.training.out_of_fold import load_pooled_volume, split_by_patient
from progidiff.training.recipe_settings import TrainConfig
from progidiff.training.slice_cache import SliceCache, list_cases
from progidiff.training.window_pool import PooledVolume

NAME = "unet"
"""Of the folds in the work folder."""


def run_fold(options: argparse.Namespace, fold: int) -> None:
    """Train the U-Net of one fold, and measure the cases that it did not see."""
    structures, grid = TrainConfig().structures, TrainConfig().grid
    backbone = Backbone(MODEL / "backbone", "cpu", dtype="fp32")
    config = create_branch(backbone, grid.height, grid.width, grid.spacing_range).config
    folds = split_by_patient(list_cases(options.studies), options.num_folds)
    folder = options.work / f"{NAME}{fold}"
    network = load_network(folder, config)
    if network is None:
        rest = [case for other, part in enumerate(folds) if other != fold for case in part]
        network = train(SliceCache(rest, structures, config, options.work / "cache"), folder, options, fold)
    for case in folds[fold]:
        target = folder / f"{case.name}.json"
        if target.is_file():
            continue
        volume = load_pooled_volume(case, structures, config, options.work)
        cache = SliceCache([case], structures, config, options.work / "cache")
        rows = measure_volume(network, volume, cache, options.num_proposals)
        with atomic_file(target) as path:
            path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        print(case.name, round(float(np.mean([row["evidence"] for row in rows.values()])), 4), flush=True)


def load_network(folder: Path, config: ConditioningConfig) -> UNet | None:
    """The fold's U-Net, or None where it is not trained."""
    file = folder / "unet.safetensors"
    if not file.is_file():
        return None
    network = UNet(2 * config.num_neighbours + 1, len(TrainConfig().structures))
    network.load_state_dict(load_file(file))
    return network.eval()


def train(cache: SliceCache, folder: Path, options: argparse.Namespace, fold: int) -> UNet:
    """Spend the minutes."""
    budget = Budget(minutes=options.minutes, validate_minutes=options.minutes / 8, seed=options.seed + fold)
    torch.manual_seed(budget.seed)
    network = UNet(2 * cache.config.num_neighbours + 1, len(cache.structures))

    def compute_loss(step: int, generator: torch.Generator) -> Tensor:
        images, labels, _ = draw_slices(cache, budget.slices, generator)
        return compute_unet_loss(network(images), labels)

    train_for(network, compute_loss, dict, budget, folder, lambda text: print(text, flush=True))
    tensors = {k: v.contiguous() for k, v in network.state_dict().items()}
    with atomic_file(folder / "unet.safetensors") as path:
        save_file(tensors, path, {"cases": json.dumps(cache.names), "budget": json.dumps(asdict(budget))})
    return network


def measure_volume(
    network: UNet, volume: PooledVolume, cache: SliceCache, num_proposals: int
) -> dict[str, dict[str, Any]]:
    """Per structure of the volume, at its own pixels: as `folds.measure_volume`."""
    assert volume.grid is not None
    structures = cache.structures
    answers: list[NDArray[np.uint8]] = []
    for start in range(0, len(cache.index), 16):
        images, _ = cache.read(list(range(start, min(start + 16, len(cache.index)))))
        each = [network.predict(images), *(network.sample(images, k) for k in range(num_proposals))]
        answers.append((torch.stack(each) * 255).round().to(torch.uint8).numpy())
    drawn = np.concatenate(answers, axis=1)  # (1 + K, Z, P, H, W)
    found: dict[str, dict[str, Any]] = {}
    for p, name in enumerate(structures):
        truth = volume.labels == p + 1
        if not truth.any():
            continue
        one, *several = (volume.grid.restore_slices(torch.from_numpy(maps[:, p]).float() / 255) for maps in drawn)
        masks = np.stack([maps.numpy() >= 0.5 for maps in several])
        plain, tallied = one.numpy(), Reliability.tally(masks, truth)
        found[name] = make_row(truth, plain >= 0.5, plain, masks, volume.spacing, tallied)
    return found


def parse_options() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="of folds.py")
    parser.add_argument("--folds", type=int, nargs="*", help="only these; by default all")
    parser.add_argument("--num-folds", type=int, default=6)
    parser.add_argument("--minutes", type=float, default=40.0, help="of one core, validation not counted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-proposals", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Train and measure."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    for fold in list_folds(options):
        run_fold(options, fold)


if __name__ == "__main__":
    main()
