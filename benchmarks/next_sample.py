"""How long "what next" takes for a pool of so many images, from score files on disk; no server and no model involved.

    python benchmarks/next_sample.py --images 1000 --out benchmarks/results/next_sample.json

Generated scores (13 structures, 60 to 180 slices, about a third of each drawn) are written, then read by a fresh store: the first call
reads all files, later ones only look whether they have changed. A call is what the server does for one request without HTTP: newest
scores of every image, the pool, the best image, its best eight slices.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from progidiff.acquisition import ImageScores, Pool, build_pool, pick_slices
from progidiff.prompts import STRUCTURES
from progidiff.slice_scores import ScoredImage, SliceScoreStore


def write_scores(root: Path, images: int) -> None:
    store = SliceScoreStore(root)
    for number in range(images):
        rng = np.random.default_rng(number)
        depth = int(rng.integers(60, 180))
        drawn = rng.random((len(STRUCTURES), depth)) < 0.33
        disagreement, entropy, foreground = (rng.random((len(STRUCTURES), depth)) * drawn * scale for scale in (1.0, 0.1, 0.05))
        arrays = (values.astype(np.float32) for values in (disagreement, entropy, foreground))
        store.save(ScoredImage(ImageScores(f"image{number:05}", STRUCTURES, *arrays, slice_mm=3.0, version="base@1"), "", "CT", float(number)))


class Server:
    """What the server keeps between requests."""

    def __init__(self, root: Path) -> None:
        self.store = SliceScoreStore(root)
        self.known: list[ScoredImage] = []
        self.pool: Pool = build_pool([])

    def pick(self, round_index: int) -> float:
        """One request. Returns milliseconds of processor time: a machine that does other things too must not change the figure."""
        started = time.process_time()
        entries = self.store.pick_newest(lambda modality: "base@1")
        ordered = [entries[image] for image in sorted(entries)]
        if len(ordered) != len(self.known) or any(a is not b for a, b in zip(ordered, self.known, strict=True)):
            self.known, self.pool = ordered, build_pool([entry.scores for entry in ordered])
        image = pick_slices(self.pool, 1, one_per_image=True, round_index=round_index)[0].image
        pick_slices(self.pool, 8, within=image, round_index=round_index)
        return (time.process_time() - started) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_scores(root, options.images)
        server = Server(root)
        first = server.pick(0)
        later = sorted(server.pick(0) for _ in range(options.repeats))
        another_round = server.pick(1)
        slices = len(server.pool)
    result = {
        "command": shlex.join(sys.argv),
        "images": options.images,
        "slices": slices,
        "first_ms": round(first, 1),
        "median_ms": round(later[len(later) // 2], 1),
        "slowest_ms": round(later[-1], 1),
        "first_after_a_training_ms": round(another_round, 1),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
