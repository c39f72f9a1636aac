"""What a slice costs on its way to the networks: reading, augmentation, area shares, against version 0.1.

    python benchmarks/augmentation.py --out benchmarks/results/augmentation.json

Version 0.1 augmented floats and 64-bit labels (`former_augmentation.py`); now bytes are read, moved and toned in a
batch on the device. Blocks of both alternate within one process on the slices of the same cache (generated volumes, the
grid of the shipped model, evidence stage: labels of 2 x 2 fine pixels per pixel). Figures are medians of processor time
of one thread, so that other work on the machine does not count; on CUDA, of wall time with the device waited for. The
last step compares pictures: with the same parameters both give the same, but for the white noise, which is left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import former_augmentation as former
from progidiff.model.folder import load_card
from progidiff.training.augment import Augmentation
from progidiff.training.device_batches import move, pin
from progidiff.training.dice_tally import compute_area_shares
from progidiff.training.slice_cache import SliceCache, list_cases
from training import ORGANS, write_pool

ROOT = Path(__file__).resolve().parents[1]
FINE = 2
"""Fine pixels of a label per pixel of the image, along each axis."""


class Path01:
    """A batch as version 0.1 made it."""

    def __init__(self, cache: SliceCache, structures: int, bias_field: float) -> None:
        self._cache, self._structures, self._bias_field = cache, structures, bias_field

    def read(self, chosen: list[int]) -> Any:
        """Floats and 64-bit labels."""
        return self._cache.read(chosen)

    def augment(self, slices: Any, generator: torch.Generator) -> Any:
        """On the CPU."""
        return former.augment(*slices, generator, 1.0, self._bias_field)

    def find_targets(self, slices: Any) -> Any:
        """One plane of fine pixels per structure."""
        return former.compute_area_shares(slices[1], self._structures, FINE)


class PathNow:
    """A batch as it is made now."""

    def __init__(self, cache: SliceCache, structures: int, bias_field: float, device: torch.device) -> None:
        self._cache, self._structures, self._bias_field, self._device = cache, structures, bias_field, device
        self._size = (cache.config.height, cache.config.width)

    def read(self, chosen: list[int]) -> Any:
        """Bytes."""
        return pin(self._cache.read_bytes(chosen))

    def augment(self, slices: Any, generator: torch.Generator) -> Any:
        """On the device."""
        height, width = self._size
        drawn = Augmentation.draw(generator, len(slices[0]), width / height, 1.0, self._bias_field)
        drawn, (images, labels) = move((drawn, slices), self._device)
        return drawn.apply_to_images(images), drawn.warp.move_labels(labels, height, width)

    def find_targets(self, slices: Any) -> Any:
        """Every fine pixel adds its part."""
        return compute_area_shares(slices[1], self._structures, FINE)


def measure(device: torch.device, batch: int, blocks: int, structures: int, bias_field: float) -> dict[str, Any]:
    """Milliseconds per slice of every part, before and now, and what they are in proportion."""
    card = load_card(ROOT / "apps" / "progidiff" / "model")
    with tempfile.TemporaryDirectory() as folder:
        pool = write_pool(Path(folder), 8)
        cache = SliceCache(list_cases(pool), tuple(ORGANS), card.conditioning, pool / "cache", FINE)
        rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
        paths = {
            "0.1": Path01(cache, structures, bias_field),
            "now": PathNow(cache, structures, bias_field, device),
        }
        spent: dict[str, dict[str, list[float]]] = {name: {} for name in paths}
        for block in range(blocks + 1):  # the first one warms up
            chosen = cache.draw_balanced(batch, rng)
            for name, path in paths.items():
                parts = measure_parts(path, chosen, generator, device if name == "now" else torch.device("cpu"))
                for part, seconds in parts.items() if block else ():
                    spent[name].setdefault(part, []).append(1e3 * seconds / batch)
    found = {name: {part: statistics.median(times) for part, times in parts.items()} for name, parts in spent.items()}
    for parts in found.values():
        parts["all"] = sum(parts.values())
    ratios = {part: round(found["0.1"][part] / found["now"][part], 2) for part in found["now"]}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, one thread",
        "grid": [card.conditioning.height, card.conditioning.width],
        "batch": batch,
        "structures": structures,
        "ms_per_slice": {name: {k: round(v, 3) for k, v in parts.items()} for name, parts in found.items()},
        "times_faster": ratios,
        "largest_difference": compare(card.conditioning.height, card.conditioning.width),
    }


def measure_parts(path: Any, chosen: list[int], generator: torch.Generator, device: torch.device) -> dict[str, float]:
    """Seconds of reading, augmentation and targets of one batch."""
    parts: dict[str, float] = {}

    def timed(name: str, act: Callable[[], Any]) -> Any:
        clock = time.perf_counter if device.type == "cuda" else time.thread_time
        started = clock()
        result = act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        parts[name] = clock() - started
        return result

    slices = timed("reading", lambda: path.read(chosen))
    slices = timed("augmentation", lambda: path.augment(slices, generator))
    timed("targets", lambda: path.find_targets(slices))
    return parts


def compare(height: int, width: int) -> dict[str, float]:
    """How far both are apart with the same parameters, without noise: images in [0, 1], and share of label pixels."""
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (8, 3, height, width), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(0, 14, (8, FINE * height, FINE * width), dtype=np.uint8))
    one, two = (torch.Generator().manual_seed(1) for _ in range(2))
    grid = former.draw_warp(one, images.shape, 1.0)
    warp = Augmentation.draw(two, 8, width / height, 1.0).warp
    moved = former.move_images(images.float() / 255, grid)
    differ = warp.move_labels(labels, height, width) != former.move_labels(labels.long(), grid)
    return {
        "image": float((warp.move_images(images) / 255 - moved).abs().max()),
        "label_share": float(differ.float().mean()),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="where it is done now; version 0.1 knew the CPU only")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=15, help="batches of each of the two")
    parser.add_argument("--structures", type=int, default=13)
    parser.add_argument("--bias-field", type=float, default=0.0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(torch.device(options.device), options.batch, options.blocks, options.structures, options.bias_field)
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    found = {
        "command": shlex.join(["python", "benchmarks/augmentation.py", *words]),
        "torch": torch.__version__,
        **found,
    }
    print(json.dumps(found, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
