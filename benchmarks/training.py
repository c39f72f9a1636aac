"""What the training loop costs beside the networks, and what a large pool of volumes costs in memory.

    python benchmarks/training.py --out benchmarks/results/training.json

Step time: the loop of a recipe (drawing, reading and augmenting slices, forward, backward, clipping, AdamW, averaged
weights, log) against the same networks in a bare PyTorch loop (forward, backward, clipping, AdamW) on batches that lie
ready in memory. Blocks of both alternate within one process; the figure is the ratio of medians. Memory: a fresh
process per pool draws and augments batches; resident memory before and after. Volumes are generated; a pool is made of
links to a few of them, each prepared on its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import torch

from progidiff.model.backbone import Backbone
from progidiff.model.folder import load_card, load_pipeline
from progidiff.model.lora import INJECTION
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.augment import augment
from progidiff.training.evidence_stage import EvidenceObjective, EvidenceOptions, PhraseTable
from progidiff.training.loop import LoopConfig, find_autocast_dtype, run_loop
from progidiff.training.proposal_stage import ProposalObjective, ProposalOptions
from progidiff.training.slice_cache import SliceCache, list_cases

ROOT = Path(__file__).resolve().parents[1]
ORGANS = {
    "liver": ((-0.35, 0.0), 0.35),
    "spleen": ((0.5, -0.2), 0.2),
    "aorta": ((0.05, -0.35), 0.08),
    "left kidney": ((0.4, -0.3), 0.15),
}


def write_pool(folder: Path, count: int, distinct: int = 4, shape: tuple[int, int, int] = (96, 96, 32)) -> Path:
    """A local datastore of `count` labelled volumes, links to a few generated ones."""
    labels = folder / "labels" / "final"
    labels.mkdir(parents=True, exist_ok=True)
    sources = folder / "sources"
    sources.mkdir(exist_ok=True)
    i, j, _ = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    affine = np.array([[-3.5, 0, 0, 168], [0, 3.5, 0, -168], [0, 0, 4.0, 0], [0, 0, 0, 1.0]])
    for n in range(min(distinct, count)):
        rng = np.random.default_rng(n)
        image = np.where((i / 0.9) ** 2 + (j / 0.75) ** 2 < 1, 30.0, -1000.0)
        label = np.zeros(shape, np.uint8)
        for value, ((x, y), radius) in enumerate(ORGANS.values(), start=1):
            inside = (i - x) ** 2 + (j - y) ** 2 < (radius * rng.uniform(0.8, 1.1)) ** 2
            inside[..., : rng.integers(2, 8)] = False
            image[inside], label[inside] = 80 + 30 * value, value
        image += rng.normal(0, 10, shape)
        nibabel.save(nibabel.Nifti1Image(image.astype(np.int16), affine), sources / f"image{n}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), sources / f"label{n}.nii.gz")
    for n in range(count):
        for kind, place in (("image", folder), ("label", labels)):
            link = place / f"case{n:03d}.nii.gz"
            if not link.exists():
                link.symlink_to(sources / f"{kind}{n % distinct}.nii.gz")
    (folder / "labels.json").write_text(json.dumps(dict(enumerate(ORGANS, start=1))), encoding="utf-8")
    return folder


class Stopwatch:
    """Times of the steps of both loops; handed to `run_loop` as its question whether to stop, it comes by before every
    step.
    """

    def __init__(self, bare_step: Callable[[], None], per_block: int) -> None:
        self.wall: dict[str, list[float]] = {"loop": [], "bare": []}
        self.processor: dict[str, list[float]] = {"loop": [], "bare": []}
        self._bare_step, self._per_block = bare_step, per_block
        self._asked = 0
        self._mark = (0.0, 0.0)

    def __call__(self) -> bool:
        """Note the step that has just ended; now and then, run a block of bare steps. Never asks to stop."""
        if self._asked:
            self._note("loop")
        if self._asked % self._per_block == 0:
            for _ in range(self._per_block):
                self._mark = (time.perf_counter(), time.process_time())
                self._bare_step()
                self._note("bare")
        self._asked += 1
        self._mark = (time.perf_counter(), time.process_time())
        return False

    def _note(self, kind: str) -> None:
        self.wall[kind].append(time.perf_counter() - self._mark[0])
        self.processor[kind].append(time.process_time() - self._mark[1])

    def summarise(self) -> dict[str, Any]:
        """Medians over the steps, without the first of each loop, and their ratios."""
        wall = {kind: statistics.median(times[1:]) for kind, times in self.wall.items()}
        processor = {kind: statistics.median(times[1:]) for kind, times in self.processor.items()}
        return {
            "steps": {kind: len(times) - 1 for kind, times in self.wall.items()},
            "seconds_loop": round(wall["loop"], 4),
            "seconds_bare": round(wall["bare"], 4),
            "ratio": round(wall["loop"] / wall["bare"], 4),
            "processor_seconds_loop": round(processor["loop"], 4),
            "processor_seconds_bare": round(processor["bare"], 4),
            "processor_ratio": round(processor["loop"] / processor["bare"], 4),
        }


def measure_steps(
    modules: Mapping[str, torch.nn.Module],
    objective: Any,
    bare_modules: Mapping[str, torch.nn.Module],
    bare_objective: Any,
    blocks: int,
    per_block: int,
) -> dict[str, Any]:
    """Alternate blocks of our loop and of a bare one on copies of the same networks."""
    parameters = [p for m in bare_modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99))
    device = parameters[0].device
    dtype = find_autocast_dtype("auto", device)
    batches = [bare_objective.draw_batch(torch.Generator().manual_seed(n)) for n in range(4)]
    generator = torch.Generator().manual_seed(0)
    done = 0

    def bare_step() -> None:
        nonlocal done
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss, _ = bare_objective.compute_loss(batches[done % len(batches)], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        done += 1

    watch = Stopwatch(bare_step, per_block)
    config = LoopConfig(blocks * per_block + 1, 1e-4, precision="auto", checkpoint_every=1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        run_loop(modules, objective, config, Path(folder), is_cancelled=watch)
    return watch.summarise()


def measure_recipes(model: Path, pool: Path, blocks: int, per_block: int, slices: int | None) -> dict[str, Any]:
    """Both recipes of `progidiff train` at the widths of a model."""
    backbone = Backbone(model / "backbone", dtype="fp32")
    card, pipeline = load_pipeline(model, backbone, find_autocast_dtype("auto", backbone.device))
    cache = SliceCache(list_cases(pool), tuple(ORGANS), card.conditioning, pool / "cache")
    phrases = PhraseTable(backbone, cache.structures)
    results = {}

    evidence = EvidenceOptions() if slices is None else EvidenceOptions(slices_per_step=slices)
    parts = []
    for branch in (pipeline.branch, copy.deepcopy(pipeline.branch)):
        modules = {"encoder": branch.encoder.requires_grad_(True), "query_head": branch.query_head.requires_grad_(True)}
        parts += [modules, EvidenceObjective(branch, phrases, cache, evidence)]
    results["evidence"] = {"slices_per_step": evidence.slices_per_step, **measure_steps(*parts, blocks, per_block)}

    proposals = ProposalOptions() if slices is None else ProposalOptions(slices_per_step=slices)
    parts = []
    for branch, unet in (
        (pipeline.branch, pipeline.unet),
        (copy.deepcopy(pipeline.branch), copy.deepcopy(pipeline.unet)),
    ):
        branch.requires_grad_(False)
        injection = torch.nn.ModuleDict({n: getattr(branch, n) for n in INJECTION})
        modules = {"unet": unet.requires_grad_(True), "injection": injection.requires_grad_(True)}
        networks = ProposalPipeline(backbone, branch, pipeline.codec, card.scheduler, unet=unet)
        parts += [modules, ProposalObjective(networks, phrases, cache, proposals)]
    results["proposals"] = {"slices_per_step": proposals.slices_per_step, **measure_steps(*parts, blocks, per_block)}
    return results


def measure_memory(model: Path, pool: Path, count: int, batches: int) -> dict[str, Any]:
    """Resident memory of this process when it opened a pool, and after it drew from it."""
    card = load_card(model)
    process = psutil.Process()
    cases = list_cases(pool)[:count]
    before = process.memory_info().rss
    cache = SliceCache(cases, tuple(ORGANS), card.conditioning, pool / "cache")
    opened = process.memory_info().rss
    rng, generator, seen = np.random.default_rng(0), torch.Generator().manual_seed(0), set()
    resident = []
    for _ in range(batches):
        chosen = cache.draw_balanced(16, rng)
        seen.update(chosen)
        augment(*cache.read(chosen), generator)
        resident.append(process.memory_info().rss)
    size = sum(path.stat().st_size for case in cases for path in (pool / "cache").glob(f"{case.name}-*/*.npy"))
    return {
        "volumes": len(cases),
        "pool_mb": round(size / 1e6, 1),
        "slices_drawn_share": round(len(seen) / len(cache), 3),
        "resident_mb_before": round(before / 1e6, 1),
        "resident_mb_opened": round(opened / 1e6, 1),
        "resident_mb_median_while_drawing": round(statistics.median(resident) / 1e6, 1),
        "resident_mb_largest_while_drawing": round(max(resident) / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=ROOT / "apps" / "progidiff" / "model", help="the widths that are measured"
    )
    parser.add_argument("--blocks", type=int, default=6, help="alternations of the two loops")
    parser.add_argument("--steps", type=int, default=4, help="steps per block")
    parser.add_argument("--slices", type=int, help="slices per step (default: the recipes' own)")
    parser.add_argument("--pools", type=int, nargs=2, default=(10, 100), help="volumes of the two pools")
    parser.add_argument("--batches", type=int, default=400, help="batches of 16 slices that are drawn from each pool")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)  # what the process of one pool is started with
    parser.add_argument("--pool", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(json.dumps(measure_memory(options.model, options.pool, options.memory_of, options.batches)))
        return

    with tempfile.TemporaryDirectory() as folder:
        pool = write_pool(Path(folder), max(options.pools))
        card = load_card(options.model)
        # Prepared beforehand, so that the processes that are measured only open what is there.
        SliceCache(list_cases(pool), tuple(ORGANS), card.conditioning, pool / "cache")
        command = [
            sys.executable,
            __file__,
            "--model",
            str(options.model),
            "--pool",
            str(pool),
            "--batches",
            str(options.batches),
        ]
        memory = [
            json.loads(
                subprocess.run(
                    [*command, "--memory-of", str(count)], capture_output=True, text=True, encoding="utf-8", check=True
                ).stdout
            )
            for count in options.pools
        ]
        steps = measure_recipes(options.model, pool, options.blocks, options.steps, options.slices)
    few, many = memory
    result = {
        "command": shlex.join(
            ["python", "benchmarks/training.py", *[Path(a).name if a.startswith("/") else a for a in sys.argv[1:]]]
        ),
        "model": card.full_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "step_time": steps,
        "memory": {
            "pools": memory,
            "kb_per_further_volume": round(
                1e3
                * (many["resident_mb_largest_while_drawing"] - few["resident_mb_largest_while_drawing"])
                / (many["volumes"] - few["volumes"]),
                1,
            ),
        },
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
