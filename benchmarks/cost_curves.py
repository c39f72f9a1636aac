"""Time and memory against the number of slices, structures and proposals: ratios to one request of the same run.

    python benchmarks/cost_curves.py --image sample_datastore/sample_ct_abdomen.nii.gz \
        --out benchmarks/results/cost_curves.json

Every request is answered in a process of its own, whose peak resident memory is reported; loading the model is not
counted as time, and the first call of the networks is made beforehand. One thing is varied at a time, the rest is that
of the first row: all slices, all structures, K = 4.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from progidiff.images.reading import load_volume
from progidiff.images.volume import Volume
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cell:
    """A request.

    Attributes:
        slices: From the middle of the volume; 0 for all.
        structures: The first so many of the model; 0 for all.
        proposals: K.
    """

    slices: int = 0
    structures: int = 0
    proposals: int = 4


def list_cells(slices: list[int], structures: list[int], proposals: list[int]) -> list[Cell]:
    """The first row, and one with each other value."""
    start = Cell()
    return [
        start,
        *(replace(start, slices=n) for n in slices),
        *(replace(start, structures=n) for n in structures),
        *(replace(start, proposals=n) for n in proposals),
    ]


def cut_slices(volume: Volume, count: int) -> Volume:
    """The middle of a volume along its last axis."""
    total = volume.array.shape[2]
    first = (total - count) // 2
    affine = volume.affine.copy()
    affine[:3, 3] += affine[:3, 2] * first
    array = np.ascontiguousarray(volume.array[:, :, first : first + count])
    return Volume(array, affine, volume.modality, volume.modality_source, f"{volume.name} {count}")


def measure(model: Path, image: Path, cell: Cell, threads: int) -> dict[str, Any]:
    """Answer one request in this process."""
    torch.set_num_threads(threads)
    engine, whole = Engine(model, device="cpu"), load_volume(image)
    volume = cut_slices(whole, cell.slices) if cell.slices else whole
    queries = parse_prompt("all", engine.structures)[: cell.structures or None]
    asked: dict[str, Any] = {"queries": queries, "num_proposals": cell.proposals}
    # On another volume: what is found in one is remembered, and looking for it is part of the answer.
    engine.propose(ProposalRequest(**asked), cut_slices(whole, 2))
    started = time.perf_counter()
    engine.propose(ProposalRequest(**asked), volume)
    seconds = time.perf_counter() - started
    return {
        **asdict(cell),
        "slices": volume.array.shape[2],
        "structures": len(queries),
        "seconds": round(seconds, 3),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--slices", type=int, nargs="*", default=[28, 56])
    parser.add_argument("--structures", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--num-proposals", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for cell in list_cells(options.slices, options.structures, options.num_proposals):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(measure, options.model, options.image, cell, options.threads).result()
        first = rows[0] if rows else row
        ratios = {f"times {name}": round(row[name] / first[name], 2) for name in ("seconds", "peak_gb")}
        rows.append({**row, **ratios})
        print(rows[-1], flush=True)
    if options.out:
        report = {"command": " ".join(sys.argv), "rows": rows}
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
