"""How long two model folders take for one volume, in turns in one process: the ratio is what counts.

    python benchmarks/model_cost.py --image IMAGE --models <former folder> apps/progidiff/model \\
        --out benchmarks/results/model_cost.json

Every model proposes all its structures (K = 4, its own number of steps), once to warm up on a few slices and then
`--repeats` times on the whole volume; medians. The first folder is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

import torch

from progidiff.images.reading import load_volume
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--models", type=Path, nargs="+", required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    volume = load_volume(options.image)
    engines = [Engine(folder, device="cpu") for folder in options.models]
    seconds: list[list[float]] = [[] for _ in engines]
    for repeat in range(options.repeats + 1):
        for engine, taken in zip(engines, seconds, strict=True):
            slices = [0, 1] if repeat == 0 else None
            queries = parse_prompt("all", engine.structures)
            request = ProposalRequest(queries=queries, num_proposals=4, seed=repeat, slices=slices, adapter="none")
            started = time.perf_counter()
            engine.propose(request, volume)
            if repeat:
                taken.append(time.perf_counter() - started)
            print(engine.card.full_name, f"{time.perf_counter() - started:.1f} s", flush=True)
    medians = [statistics.median(taken) for taken in seconds]
    report = {
        "command": " ".join(sys.argv),
        "shape": list(volume.grid.shape),
        "models": [engine.card.full_name for engine in engines],
        "seconds": seconds,
        "times_faster": [medians[0] / median for median in medians],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
