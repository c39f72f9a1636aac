"""What a CUDA box does with this program: answers, memory, seconds and how much of the card is used, in one run.

    python benchmarks/gpu.py --out benchmarks/results/gpu_<card>.json

Needs nothing but the checkout: images are drawn, the weights are the embedded ones, and Stable Diffusion 1.5 has its
true widths with random weights. Sections (`--sections` picks some): the machine, its peak in matrix products, answers
in bf16 and fp16 against the processor's in fp32, memory and what happens when it runs out, a whole CT with 13
structures and K = 4 in batches of several sizes and through torch.compile and CUDA graphs, single slices that could
share a batch, the same at Stable Diffusion's widths, diffusers' own ControlNet pipeline with 20 steps beside it,
close-ups with that denoiser, and the trainings.

Sections run in a process of their own with a budget of seconds each; one that fails or takes longer is recorded with
its error, and the rest runs, in a new process. The file is written again after every section. All of it stays under
`--budget` (290 s), so that with `make test-gpu` it is six minutes. Without CUDA, `--device cpu --size small` runs every
section at toy size: its figures mean nothing, but all of its lines run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

from progidiff.errors import CancelledError, MemoryFullError
from progidiff.images.close_up import WindowRules
from progidiff.images.volume import Volume
from progidiff.model.adapters import AdapterStore
from progidiff.model.backbone import Backbone, LoadedBackbone
from progidiff.model.close_up import DenoiserWidths, create_network
from progidiff.model.close_up_backbone import create_network_on, recomputing
from progidiff.model.close_up_folder import CloseUpCard
from progidiff.model.codec import MaskCodec
from progidiff.model.folder import ModelCard, load_pipeline
from progidiff.model.pipeline import ProposalPipeline
from progidiff.prompts.parser import parse_prompt
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals import walk
from progidiff.proposals.batches import BatchSize
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.storage.atomic import replace_text
from progidiff.testing import build_tiny_model
from progidiff.training.adapt_stages import KeepingObjective, Trainee
from progidiff.training.build_model import create_branch
from progidiff.training.close_up_recipe import load_pooled_volume
from progidiff.training.close_up_stage import CloseUpObjective, CloseUpOptions
from progidiff.training.evidence_stage import EvidenceObjective, EvidenceOptions, PhraseTable
from progidiff.training.loop import LoopConfig, find_autocast_dtype, run_loop
from progidiff.training.recipe_settings import AdaptConfig
from progidiff.training.slice_cache import SliceCache, list_cases
from progidiff.training.window_pool import VolumeSource, WindowPool

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "apps" / "progidiff" / "model"

HOLDS_FROM = 0.995
"""Dice with the processor's masks from which on an answer counts as the same."""

TISSUES = (
    (-100, (0, 0, 0), (165, 115, 1e6)),
    (55, (0, 0, 0), (148, 98, 1e6)),
    (-100, (0, -8, 0), (134, 84, 1e6)),
    (180, (0, 62, 0), (24, 24, 1e6)),
    (105, (-60, -8, 30), (76, 68, 90)),
    (115, (92, 30, 38), (28, 40, 60)),
    (40, (52, -22, 38), (44, 34, 56)),
    (165, (-50, 44, -34), (27, 24, 62)),
    (165, (56, 42, -20), (27, 24, 64)),
    (150, (16, 32, 0), (11, 11, 1e6)),
    (130, (-20, 30, 0), (12, 10, 1e6)),
    (95, (4, 4, 6), (56, 11, 23)),
)
"""HU, centre and radii in mm to Left, Posterior, Superior of what is drawn; later ones cover earlier ones."""

LABELS = {"liver": 4, "spleen": 5, "left kidney": 8, "aorta": 9}
"""Structure -> its row in `TISSUES`, for the trainings."""


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        shape, edges: Voxels and mm of the whole CT.
        prompt: What is asked of it.
        reference: Axial slices that the processor answers too.
        samples: Sizes of batches that are tried.
        matrix: Rows of the matrix product.
        unet, vae, text: Widths of the Stable Diffusion with random weights.
        frame: Pixels of its slices along both axes.
        sd_slices: Most slices that are answered at its widths.
        train_seconds: Of every training.
        shape_of_training: Voxels of a labelled volume.
        window, per_step: Pixels of a training's windows along both axes, and slices or windows of a step; 0 for the
            recipes' own.
        compiled: Ways of `torch.compile`, by name: its arguments.
    """

    shape: tuple[int, int, int]
    edges: tuple[float, float, float]
    prompt: str
    reference: int
    samples: tuple[int, ...]
    matrix: int
    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    frame: int
    sd_slices: int
    train_seconds: float
    shape_of_training: tuple[int, int, int]
    window: int
    per_step: int
    compiled: dict[str, dict[str, Any]]


_BLOCKS = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}

_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}

FULL = Size(
    shape=(256, 192, 120),
    edges=(1.5, 1.5, 2.5),
    prompt="all",
    reference=6,
    samples=(64, 256, 1024),
    matrix=8192,
    unet={
        **_BLOCKS,
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    vae={**_VAE, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512},
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    frame=512,
    sd_slices=8,
    train_seconds=8.0,
    shape_of_training=(256, 192, 48),
    window=0,
    per_step=0,
    compiled={
        "CUDA graphs": {"backend": "cudagraphs"},
        "inductor": {"backend": "inductor"},
        "inductor and CUDA graphs": {"backend": "inductor", "mode": "reduce-overhead"},
    },
)

SMALL = Size(
    shape=(32, 24, 3),
    edges=(12.0, 12.0, 40.0),
    prompt="liver and aorta",
    reference=1,
    samples=(4, 16),
    matrix=64,
    unet={
        **_BLOCKS,
        "sample_size": 8,
        "block_out_channels": (16, 16, 16, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    },
    vae={
        **_VAE,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    frame=64,
    sd_slices=1,
    train_seconds=0.1,
    shape_of_training=(32, 24, 3),
    window=16,
    per_step=2,
    compiled={"eager": {"backend": "eager"}},
)

SIZES = {"full": FULL, "small": SMALL}


def draw_abdomen(shape: Sequence[int], edges: Sequence[float], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """HU and label ids 1.. of `LABELS`, both of `shape`, of ellipsoids that differ a little with the seed."""
    rng = np.random.default_rng(seed)
    axes = [(np.arange(size) - (size - 1) / 2) * edge for size, edge in zip(shape, edges, strict=True)]
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    image, labels = np.full(shape, -1000.0), np.zeros(shape, np.uint8)
    ids = {row: value for value, row in enumerate(LABELS.values(), start=1)}
    for row, (value, centre, radii) in enumerate(TISSUES):
        scale = rng.uniform(0.92, 1.08) if seed else 1.0
        inside = sum(((a - c) / (r * scale)) ** 2 for a, c, r in zip((x, y, z), centre, radii, strict=True)) <= 1
        image[inside], labels[inside] = value, ids.get(row, 0)
    image += rng.normal(0, 12, shape)
    return np.rint(image).astype(np.int16), labels


def make_affine(shape: Sequence[int], edges: Sequence[float]) -> np.ndarray:
    affine = np.diag([-edges[0], -edges[1], edges[2], 1.0])
    affine[:3, 3] = [edges[0] * shape[0] / 2, edges[1] * shape[1] / 2, 0]
    return affine


@dataclass
class Bench:
    """What sections share.

    Attributes:
        device: Where everything runs.
        size: How large.
        size_name: What it is called.
        scratch: Folder for what is written meanwhile.
        results: Of the sections so far.
        note: Told what a section has found so far.
        deadline: On the monotonic clock, when the section has to be done.
    """

    device: torch.device
    size: Size
    size_name: str
    scratch: Path
    results: dict[str, Any] = field(default_factory=dict)
    note: Callable[[dict[str, Any]], None] = lambda found: None
    deadline: float = float("inf")

    @property
    def is_cuda(self) -> bool:
        """Whether there is somebody to wait for."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.monotonic()

    @cached_property
    def model(self) -> Path:
        """The embedded weights; toys in their place at the small size."""
        return MODEL if self.size_name == "full" else build_tiny_model(self.scratch / "model")

    @cached_property
    def volume(self) -> Volume:
        """The whole CT."""
        image, _ = draw_abdomen(self.size.shape, self.size.edges)
        return Volume(image, make_affine(self.size.shape, self.size.edges), "CT", "option", "drawn")

    @cached_property
    def half(self) -> str:
        """The precision that the device answers in."""
        return "fp16" if self.is_cuda and not torch.cuda.is_bf16_supported() else "bf16"

    def open_engine(self, dtype: str | None = None, device: torch.device | None = None, **options: Any) -> Engine:
        """The model on a device, loaded; by default in half precision."""
        engine = Engine(self.model, device=str(device or self.device), dtype=dtype or self.half, **options)
        engine.load()
        return engine

    def ask(self, engine: Engine | None = None, prompt: str = "", **options: Any) -> ProposalRequest:
        """A request with K = 4 to the model itself."""
        known = STRUCTURES if engine is None else engine.structures
        queries = parse_prompt(prompt or self.size.prompt, known)
        return ProposalRequest(queries=queries, num_proposals=4, adapter="none", **options)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds of a call until the device is done with it."""
        self.synchronize()
        started = time.perf_counter()
        call()
        self.synchronize()
        return time.perf_counter() - started

    @contextlib.contextmanager
    def peak_memory(self) -> Iterator[dict[str, float]]:
        """Largest memory of the device within the block, in GB; empty where it is not counted."""
        found: dict[str, float] = {}
        if self.is_cuda:
            self.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        yield found
        if self.is_cuda:
            self.synchronize()
            found["allocated_gb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e9, 3)
            found["reserved_gb"] = round(torch.cuda.max_memory_reserved(self.device) / 1e9, 3)

    def share_of_peak(self, tflops: float) -> float | None:
        """Of the card's own matrix products in half precision."""
        peak = self.results.get("matmul", {}).get("tflops", {}).get(self.half)
        return round(tflops / peak, 4) if peak else None


@contextlib.contextmanager
def whole_batches(samples: int) -> Iterator[None]:
    """Walks begin with batches of so many latents."""
    before = walk.WHOLE
    walk.WHOLE = BatchSize(max(before.slices, samples // 16), samples)
    try:
        yield
    finally:
        walk.WHOLE = before


def count_pairs(pipeline: ProposalPipeline, call: Callable[[], Any]) -> int:
    """(slice, structure) pairs that a call draws proposals for."""
    original, counted = pipeline.propose, 0

    def propose(features: Any, evidence: Any, prompts: Any, pairs: Any, *rest: Any) -> Any:
        nonlocal counted
        counted += len(pairs)
        return original(features, evidence, prompts, pairs, *rest)

    pipeline.propose = propose  # type: ignore[method-assign]
    try:
        call()
    finally:
        del pipeline.propose  # type: ignore[attr-defined]
    return counted


def count_tflop(call: Callable[[], Any]) -> float:
    """10^12 floating-point operations of the products and convolutions of a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 1e12


def measure_busy(device: torch.device, call: Callable[[], Any]) -> dict[str, float]:
    """How much of a call's time the device computes; of the processor, how much is inside of torch's operators."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=kinds) as profiled:
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
    wanted = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    spans = [(e.time_range.start, e.time_range.end) for e in profiled.events() if e.device_type == wanted]
    busy = min(1.0, compute_covered(spans) / 1e6 / seconds)
    return {"busy": round(busy, 3), "idle": round(1 - busy, 3)}


def compute_covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        covered += max(0.0, last - max(first, end))
        end = max(end, last)
    return covered


def compare_masks(found: VolumeProposals, wanted: VolumeProposals) -> dict[str, Any]:
    """Dice of all masks, pooled per structure over proposals and slices, and the largest difference."""
    per = {}
    for p, name in enumerate(wanted.structures):
        a, b = (each.probabilities[p] >= 128 for each in (found, wanted))
        size = int(a.sum()) + int(b.sum())
        if size:
            per[name] = round(2 * int((a & b).sum()) / size, 5)
    both = found.probabilities >= 128, wanted.probabilities >= 128
    total = sum(int(each.sum()) for each in both)
    pooled = 2 * int((both[0] & both[1]).sum()) / total if total else 1.0
    far = np.abs(found.probabilities.astype(np.int16) - wanted.probabilities.astype(np.int16)).max()
    return {
        "dice": round(pooled, 5),
        "dice_per_structure": per,
        "mask_pixels": total // 2,
        "largest_difference_of_255": int(far),
        "holds": pooled >= HOLDS_FROM,
    }


# Sections


def run_machine(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {
        "card": "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": platform.machine(),
    }
    if bench.is_cuda:
        about = torch.cuda.get_device_properties(bench.device)
        found |= {
            "card": about.name,
            "cards": torch.cuda.device_count(),
            "memory_gb": round(about.total_memory / 1e9, 1),
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return found


def run_matmul(bench: Bench) -> dict[str, Any]:
    """Products of square matrices, the best of several; what the card can do, for the shares below."""
    size, best = bench.size.matrix, {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=bench.device, dtype=dtype) for _ in range(2))
        rounds = 10 if bench.is_cuda else 2
        for _ in range(3 if bench.is_cuda else 1):
            a @ b
        seconds = [time_on_device(bench, lambda a=a, b=b: a @ b) for _ in range(rounds)]
        best[name] = round(2 * size**3 / min(seconds) / 1e12, 3)
    elements = size * size
    source = torch.empty(elements, device=bench.device)
    seconds = min(time_on_device(bench, source.clone) for _ in range(5))
    return {"rows": size, "tflops": best, "copy_gb_per_s": round(2 * 4 * elements / seconds / 1e9, 1)}


def time_on_device(bench: Bench, call: Callable[[], Any]) -> float:
    """Seconds between two events on the device; on the processor, of the call."""
    if not bench.is_cuda:
        return bench.time(call)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def run_answers(bench: Bench) -> dict[str, Any]:
    """Embedded weights: masks of the device in half precision against those of the processor in fp32."""
    middle = bench.size.shape[2] // 2
    slices = tuple(range(middle, middle + bench.size.reference))
    prompt = "liver, spleen, left kidney and aorta"
    reference = bench.open_engine("fp32", torch.device("cpu"))
    request = bench.ask(reference, prompt, slices=slices)
    wanted = reference.propose(request, bench.volume)
    found: dict[str, Any] = {"slices": len(slices), "reference": "fp32 on the processor"}
    # A processor computes no fp16; there, bf16 stands for both.
    for dtype in ("bf16", "fp16", "fp32") if bench.is_cuda else ("bf16", "fp32"):
        if dtype == "bf16" and bench.is_cuda and not torch.cuda.is_bf16_supported():
            found[dtype] = "this card has no bf16"
            continue
        found[dtype] = compare_masks(bench.open_engine(dtype).propose(request, bench.volume), wanted)
        bench.note(found)
    return found


def run_memory(bench: Bench) -> dict[str, Any]:
    """Peak memory of loading, and of a whole CT."""
    with bench.peak_memory() as loaded:
        engine = bench.open_engine()
    with bench.peak_memory() as whole:
        engine.propose(bench.ask(engine), bench.volume)
    return {"load": loaded, "whole_ct": whole}


class Rungs(logging.Handler):
    """Collects what an engine says it tries when memory is full."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        self.lines.append(record.getMessage())

    def __enter__(self) -> Rungs:
        logging.getLogger("progidiff.proposals.engine").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("progidiff.proposals.engine").removeHandler(self)


@contextlib.contextmanager
def limited_memory(bench: Bench, engine: Engine, gigabytes: float) -> Iterator[None]:
    """So little memory beside what is allocated now. On the processor, errors are raised as the device would."""
    if bench.is_cuda:
        bench.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(bench.device).total_memory
        allowed = torch.cuda.memory_reserved(bench.device) + gigabytes * 1e9
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), bench.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, bench.device)
        return
    pipeline, most = engine.load(), int(gigabytes * 100)
    original = pipeline.propose

    def propose(features: Any, evidence: Any, prompts: Any, pairs: Any, noise: Any, *rest: Any) -> Any:
        if len(pairs) * len(noise) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Injected.")
        return original(features, evidence, prompts, pairs, noise, *rest)

    pipeline.propose = propose  # type: ignore[method-assign]
    try:
        yield
    finally:
        del pipeline.propose  # type: ignore[attr-defined]


def run_ladder(bench: Bench) -> dict[str, Any]:
    """What is tried smaller when memory runs out: less and less of it, until even one proposal does not fit."""
    engine = bench.open_engine()
    middle = bench.size.shape[2] // 2
    request = bench.ask(engine, "liver, spleen and aorta", slices=tuple(range(max(0, middle - 16), middle)))
    wanted = engine.propose(request, bench.volume)
    found: dict[str, Any] = {}
    for gigabytes in (0.5, 0.1, 0.02, 0.0) if bench.is_cuda else (0.08, 0.02, 0.0):
        engine._free_memory()
        with Rungs() as rungs, limited_memory(bench, engine, gigabytes):
            try:
                answer = engine.propose(request, bench.volume)
                outcome: dict[str, Any] = compare_masks(answer, wanted)
            except MemoryFullError as err:
                outcome = {"refused": str(err), "retry_after_s": err.retry_after}
        found[f"{gigabytes} GB"] = {"tried": rungs.lines, **outcome}
        bench.note(found)
    again = compare_masks(engine.propose(request, bench.volume), wanted)
    return {**found, "afterwards": again}


def run_volume(bench: Bench) -> dict[str, Any]:
    """Embedded weights, a whole CT, 13 structures, K = 4: the first request and later ones, in batches of several
    sizes.
    """
    started = time.perf_counter()
    engine = bench.open_engine()
    bench.synchronize()
    found: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 2), "slices": bench.size.shape[2]}
    request = bench.ask(engine)
    found["first_request_seconds"] = round(bench.time(lambda: engine.propose(request, bench.volume)), 3)
    pipeline = engine.load()
    found["pairs"] = count_pairs(pipeline, lambda: engine.propose(request, bench.volume))
    engine._free_memory()
    tflop = count_tflop(lambda: engine.propose(request, bench.volume))
    found["tflop"] = round(tflop, 3)
    for samples in bench.size.samples:
        with whole_batches(samples), bench.peak_memory() as memory:
            engine._free_memory()
            engine.propose(request, bench.volume)  # Kernels for these sizes are picked and loaded.
            engine._free_memory()
            seconds = bench.time(lambda: engine.propose(request, bench.volume))
        found[f"{samples} at once"] = {
            "seconds": round(seconds, 3),
            "tflops": round(tflop / seconds, 3),
            "share_of_matmul_peak": bench.share_of_peak(tflop / seconds),
            **memory,
        }
        bench.note(found)
        if bench.left < 3 * seconds:
            break
    engine._free_memory()
    found["busy"] = measure_busy(bench.device, lambda: engine.propose(request, bench.volume))
    return found


def run_waiting(bench: Bench) -> dict[str, Any]:
    """What requests that wait could gain from one batch: four single slices, apart and together."""
    pipeline = bench.open_engine().load()
    config, generator = pipeline.branch.config, torch.Generator().manual_seed(0)
    shape = (4, 2 * config.num_neighbours + 1, config.height, config.width)
    prompts = pipeline.encode_prompts(("liver",))
    features = pipeline.encode_slices(torch.rand(shape, generator=generator) * 2 - 1)
    evidence = torch.rand(4, 1, config.height, config.width, generator=generator).pow(4).to(bench.device)
    noise, offsets = pipeline.draw_noise(4, 0), pipeline.draw_offsets(4, 0)

    def draw(rows: slice) -> torch.Tensor:
        pairs = [(n, 0) for n in range(len(evidence[rows]))]
        return pipeline.propose(features[rows], evidence[rows], prompts, pairs, noise, 2, 1.0, offsets)

    def apart() -> torch.Tensor:
        return torch.cat([draw(slice(n, n + 1)) for n in range(4)])

    def together() -> torch.Tensor:
        return draw(slice(0, 4))

    difference = float((apart() - together()).abs().max())
    seconds = [statistics.median(bench.time(call) for _ in range(3)) for call in (apart, together)]
    return {
        "seconds_apart": round(seconds[0], 4),
        "seconds_together": round(seconds[1], 4),
        "times_faster": round(seconds[0] / seconds[1], 3),
        "largest_difference": difference,
    }


def compile_denoiser(engine: Engine, **how: Any) -> None:
    """Have the denoisers of an engine compiled at their next call."""
    torch._dynamo.reset()
    pipeline = engine.load()
    pipeline.unet = torch.compile(pipeline.unet, **how)
    if engine._close_up is not None:
        network = engine._close_up.pipeline.network
        network.unet = torch.compile(network.unet, **how)


def measure_compiled(bench: Bench, make: Callable[[], Engine], request: ProposalRequest) -> dict[str, Any]:
    """Seconds of a request with the denoiser as it is, and through `torch.compile`."""
    engine = make()
    plain = engine.propose(request, bench.volume)
    engine._free_memory()
    seconds = bench.time(lambda: engine.propose(request, bench.volume))
    found: dict[str, Any] = {"as it is": {"seconds": round(seconds, 3)}}
    bench.note(found)
    for name, how in bench.size.compiled.items():
        try:
            engine = make()
            compile_denoiser(engine, **how)
            outcome: list[VolumeProposals] = []
            first = bench.time(lambda e=engine, o=outcome: o.append(e.propose(request, bench.volume)))
            engine._free_memory()
            again = bench.time(lambda e=engine: e.propose(request, bench.volume))
            found[name] = {
                "compile_seconds": round(first - again, 2),
                "seconds": round(again, 3),
                "times_faster": round(seconds / again, 3),
                **{k: v for k, v in compare_masks(outcome[0], plain).items() if k in ("dice", "holds")},
            }
        except Exception as err:  # Of the compiler: the other ways are measured all the same.
            found[name] = {"error": describe_error(err)}
        bench.note(found)
    return found


def run_compiled(bench: Bench) -> dict[str, Any]:
    """Embedded weights: a whole CT with and without torch.compile and CUDA graphs."""
    return measure_compiled(bench, bench.open_engine, bench.ask())


def build_backbone(bench: Bench) -> LoadedBackbone:
    """Stable Diffusion's widths, with random weights made on the device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    size, dtype = bench.size, torch.float16 if bench.half == "fp16" else torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with bench.device:
            unet = UNet2DConditionModel(**size.unet)
            text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, max_position_embeddings=77, **size.text))
        torch.set_default_dtype(torch.float32 if dtype == torch.float16 else dtype)
        with bench.device:
            vae = AutoencoderKL(**size.vae)
    finally:
        torch.set_default_dtype(before)
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
    }
    parts = [part.eval().requires_grad_(False) for part in (vae, unet, text)]
    return LoadedBackbone(*parts, LetterTokenizer(), scheduler)


def build_stable_diffusion(bench: Bench, close_up: bool = False) -> Engine:
    """An engine at Stable Diffusion's widths; all is "there".

    Args:
        close_up: Draw close-ups at its native size, with a fresh encoder and injection.
    """
    size, backbone = bench.size, build_backbone(bench)
    branch = create_branch(backbone, size.frame, size.frame, (0.5, 12.0))
    branch = branch.to(bench.device).eval().requires_grad_(False)
    card = ModelCard(
        "sd15-random", "1", "CT", STRUCTURES, branch.config, (0.0,) * 4, (1.0,) * 4, gate=0.0, num_inference_steps=2
    )
    pipeline = ProposalPipeline(backbone, branch, MaskCodec(backbone.vae))
    drawing = None
    if close_up:
        network = create_network_on(backbone)
        rules = WindowRules().at_size(network.config.native_size)
        drawing = CloseUpCard(network.config, rules, structures=STRUCTURES), network
    return Engine.from_networks(card, pipeline, AdapterStore(bench.scratch / "none"), "", drawing)


class LetterTokenizer:
    """Texts as the numbers of their letters: random weights know no words, and the checkout has no vocabulary."""

    model_max_length = 77

    def __call__(self, texts: Sequence[str], max_length: int, **_: Any) -> Any:
        """What CLIP's tokenizer answers, padded to the length."""
        from transformers import BatchEncoding

        rows = [[ord(c) % 49000 for c in text][: max_length - 1] for text in texts]
        padded = [[*row, *[49407] * (max_length - len(row))] for row in rows]
        masks = [[1] * (len(row) + 1) + [0] * (max_length - len(row) - 1) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(masks)})


def run_stable_diffusion(bench: Bench) -> dict[str, Any]:
    """Stable Diffusion 1.5's widths, random weights: seconds per slice with 13 structures and K = 4, as many slices as
    fit into the time, and what a whole CT takes at that rate.
    """
    with bench.peak_memory() as loaded:
        engine = build_stable_diffusion(bench)
    found: dict[str, Any] = {"memory_loaded": loaded, "frame": bench.size.frame}
    one = bench.ask(engine, slices=(0,))
    found["first_slice_seconds"] = round(bench.time(lambda: engine.propose(one, bench.volume)), 3)
    bench.note(found)
    engine._free_memory()
    tflop = count_tflop(lambda: engine.propose(one, bench.volume))
    engine._free_memory()
    second = bench.time(lambda: engine.propose(one, bench.volume))
    count = int(max(1, min(bench.size.sd_slices, bench.size.shape[2], bench.left / 2 / second)))
    request = bench.ask(engine, slices=tuple(range(count)))
    engine._free_memory()
    with bench.peak_memory() as memory:
        seconds = bench.time(lambda: engine.propose(request, bench.volume)) / count
    steps = engine.num_inference_steps
    return {
        **found,
        "slices": count,
        "pairs_per_slice": len(one.queries),
        "steps": steps,
        "seconds_per_slice": round(seconds, 4),
        "seconds_of_a_whole_ct_at_this_rate": round(seconds * bench.size.shape[2], 1),
        "seconds_per_pair": round(seconds / len(one.queries), 5),
        "tflops": round(tflop / seconds, 3),
        "share_of_matmul_peak": bench.share_of_peak(tflop / seconds),
        **memory,
    }


def open_training(engine: Engine, bench: Bench, samples: int) -> CloseUpObjective:
    """The training of the close-up of an engine, a window at a time, on drawn volumes."""
    tools = engine._close_up
    assert tools is not None
    cases = list_cases(write_labelled(bench))
    volumes = [load_pooled_volume(case, list(LABELS), engine.card.conditioning, None) for case in cases]
    pool = WindowPool([VolumeSource(volumes, tools.rules.size, rules=tools.rules)])
    prompts = PhraseTable(engine.load().backbone, tuple(LABELS)).pick_canonical()
    options = CloseUpOptions(windows_per_step=1, proposed=1, samples=samples, denoising_share=0.0)
    network = tools.pipeline.network.requires_grad_(True)
    return CloseUpObjective(network, pool, prompts, options)


def run_close_up_stable_diffusion(bench: Bench) -> dict[str, Any]:
    """Close-ups with the denoiser of Stable Diffusion's widths at its native size, random weights: one slice of one
    structure with K = 4, and the training of encoder and injection, a window and two proposals a step.
    """
    with bench.peak_memory() as loaded:
        engine = build_stable_diffusion(bench, close_up=True)
    tools = engine._close_up
    assert tools is not None
    request = bench.ask(engine, "liver", slices=(0,), num_inference_steps=1)
    first = bench.time(lambda: engine.propose(request, bench.volume))
    with bench.peak_memory() as memory:
        again = bench.time(lambda: engine.propose(request, bench.volume))
    found: dict[str, Any] = {
        "window": tools.rules.size,
        "memory_loaded": loaded,
        "first_request_seconds": round(first, 3),
        # Evidence is on the shelf: this is the drawing alone.
        "seconds_per_slice": round(again, 4),
        **memory,
    }
    bench.note(found)
    network, objective = tools.pipeline.network, open_training(engine, bench, 2)
    with recomputing(network):
        return {**found, "training": measure_training(bench, {"network": network}, objective, 1)}


def run_stock(bench: Bench) -> dict[str, Any]:
    """diffusers' own ControlNet pipeline on the same random denoiser: 20 steps, 4 pictures of one slice and structure,
    with its guidance of 7.5 and without guidance.
    """
    from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline

    engine = build_stable_diffusion(bench)
    pipeline = engine.load()
    backbone = pipeline.backbone
    with bench.device:
        control = ControlNetModel.from_unet(backbone.unet).to(backbone.unet.dtype).eval()
    stock = StableDiffusionControlNetPipeline(
        backbone.vae,
        backbone.text_encoder,
        None,
        backbone.unet,
        control,
        DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=False),
        None,
        None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    tokens, _, _ = backbone.encode_text(["liver", ""])
    picture = torch.rand(1, 3, bench.size.frame, bench.size.frame, device=bench.device, dtype=backbone.unet.dtype)
    steps = 20 if bench.size_name == "full" else 2
    found: dict[str, Any] = {"steps": steps, "pictures": 4}
    for name, scale in (("guidance 7.5", 7.5), ("no guidance", 1.0)):

        @torch.no_grad()
        def draw(scale: float = scale) -> Any:
            return stock(
                prompt_embeds=tokens[:1],
                negative_prompt_embeds=tokens[1:],
                image=picture,
                num_inference_steps=steps,
                num_images_per_prompt=4,
                guidance_scale=scale,
                height=bench.size.frame,
                width=bench.size.frame,
                output_type="pt",
            )

        draw()
        seconds = statistics.median(bench.time(draw) for _ in range(2))
        ours = bench.results.get("stable_diffusion", {}).get("seconds_per_pair")
        found[name] = {
            "seconds_per_pair": round(seconds, 4),
            "times_as_long_as_ours": round(seconds / ours, 2) if ours else None,
        }
        bench.note(found)
    return found


def write_labelled(bench: Bench, count: int = 4) -> Path:
    """A datastore of drawn and labelled volumes."""
    folder = bench.scratch / "pool"
    if folder.is_dir():
        return folder
    (folder / "labels" / "final").mkdir(parents=True)
    shape = bench.size.shape_of_training
    affine = make_affine(shape, bench.size.edges)
    for n in range(count):
        image, labels = draw_abdomen(shape, bench.size.edges, seed=n + 1)
        nibabel.save(nibabel.Nifti1Image(image, affine), folder / f"case{n}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), folder / "labels" / "final" / f"case{n}.nii.gz")
    (folder / "labels.json").write_text(json.dumps(dict(enumerate(LABELS, start=1))), encoding="utf-8")
    return folder


def measure_training(bench: Bench, modules: Any, objective: Any, per_step: int) -> dict[str, Any]:
    """Slices (or windows) per second of `run_loop`, and how long the device is idle in it."""
    marks: list[float] = []
    seconds = min(bench.size.train_seconds, max(0.1, bench.left / 3))

    def is_done() -> bool:
        # The loop asks before every step. Only at both ends of what is measured the device is waited for.
        if len(marks) == warm:
            bench.synchronize()
        marks.append(time.perf_counter())
        return len(marks) > warm + 1 and marks[-1] - marks[warm] > seconds

    warm = 5 if bench.size_name == "full" else 1
    config = LoopConfig(1_000_000, 1e-5, precision="auto", checkpoint_every=1_000_000, tensorboard=False)

    def train(steps: int | None = None) -> None:
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder, contextlib.suppress(CancelledError):
            if steps is None:
                run_loop(modules, objective, config, Path(folder), is_cancelled=is_done)
            else:
                run_loop(modules, objective, replace(config, steps=steps), Path(folder))

    with bench.peak_memory() as memory:
        train()
    done = len(marks) - 1 - warm
    taken = marks[-1] - marks[warm]
    precision = find_autocast_dtype("auto", bench.device)
    found = {
        "per_step": per_step,
        "steps": done,
        "seconds_per_step": round(taken / done, 4),
        "slices_per_second": round(done * per_step / taken, 1),
        "precision": str(precision or torch.float32).removeprefix("torch."),
        **memory,
    }
    bench.note(found)
    return {**found, **measure_busy(bench.device, lambda: train(20 if bench.is_cuda else 1))}


@dataclass
class Trained:
    """What trainings share: networks in fp32, slices and phrases."""

    pipeline: ProposalPipeline
    card: ModelCard
    cases: list[Any]
    cache: SliceCache
    phrases: PhraseTable

    @classmethod
    def open(cls, bench: Bench, supersampling: int) -> Trained:
        """The embedded networks, and slices of drawn volumes."""
        backbone = Backbone(bench.model / "backbone", str(bench.device), "fp32")
        card, pipeline = load_pipeline(bench.model, backbone, find_autocast_dtype("auto", bench.device))
        pool = write_labelled(bench)
        cases = list_cases(pool)
        cache = SliceCache(cases, tuple(LABELS), card.conditioning, pool / "cache", supersampling)
        return cls(pipeline, card, cases, cache, PhraseTable(backbone, cache.structures))


def run_train_evidence(bench: Bench) -> dict[str, Any]:
    options = EvidenceOptions(bench.size.per_step or EvidenceOptions.slices_per_step)
    trained = Trained.open(bench, options.supersampling)
    branch = trained.pipeline.branch
    modules = {"encoder": branch.encoder.requires_grad_(True), "query_head": branch.query_head.requires_grad_(True)}
    objective = EvidenceObjective(branch, trained.phrases, trained.cache, options)
    return measure_training(bench, modules, objective, options.slices_per_step)


def run_train_close_up(bench: Bench) -> dict[str, Any]:
    trained = Trained.open(bench, 1)
    backbone, count = trained.pipeline.backbone, bench.size.per_step
    options = CloseUpOptions(count, count) if count else CloseUpOptions()
    volumes = [load_pooled_volume(case, list(LABELS), trained.card.conditioning, None) for case in trained.cases]
    if bench.size_name == "full":
        network = create_network(backbone.text_features)
    else:
        widths = DenoiserWidths((16, 16), heads=2, text_features=backbone.text_features)
        network = create_network(backbone.text_features, widths, channels=(8, 8, 16))
    network.to(bench.device)
    pool = WindowPool([VolumeSource(volumes, size=bench.size.window or VolumeSource.size)])
    objective = CloseUpObjective(network, pool, trained.phrases.pick_canonical(), options)
    return measure_training(bench, {"network": network}, objective, options.windows_per_step)


def run_train_lora(bench: Bench) -> dict[str, Any]:
    config = AdaptConfig(batch_size=bench.size.per_step or AdaptConfig.batch_size)
    trained = Trained.open(bench, 1)
    base = trained.pipeline
    trainee = Trainee(config, config.lora.target_modules, base.branch, base.unet)
    trainee.select(config.lora.target_modules)
    others = [name for name in trained.card.structures if name not in LABELS]
    # The base's answers: of a second copy, since the first one is being changed.
    reference = load_pipeline(bench.model, base.backbone, base.autocast_dtype)[1].branch
    objective = KeepingObjective(
        EvidenceObjective(base.branch, trained.phrases, trained.cache, EvidenceOptions(config.batch_size)),
        reference,
        base.encode_prompts(others).pooled,
        config.keep,
    )
    return measure_training(bench, {"branch": base.branch}, objective, config.batch_size)


def run_compiled_stable_diffusion(bench: Bench) -> dict[str, Any]:
    """Stable Diffusion's widths: one slice, 13 structures, with and without torch.compile and CUDA graphs."""
    return measure_compiled(bench, lambda: build_stable_diffusion(bench), bench.ask(slices=(0,)))


@dataclass(frozen=True)
class Section:
    """One part of the run.

    Attributes:
        run: Measures.
        seconds: Its budget at full size.
    """

    run: Callable[[Bench], dict[str, Any]]
    seconds: float


SECTIONS = {
    "machine": Section(run_machine, 5),
    "matmul": Section(run_matmul, 8),
    "answers": Section(run_answers, 30),
    "memory": Section(run_memory, 15),
    "ladder": Section(run_ladder, 20),
    "volume": Section(run_volume, 35),
    "waiting": Section(run_waiting, 10),
    "stable_diffusion": Section(run_stable_diffusion, 30),
    "stock_controlnet": Section(run_stock, 25),
    "train_evidence": Section(run_train_evidence, 20),
    "train_close_up": Section(run_train_close_up, 20),
    "train_lora": Section(run_train_lora, 20),
    "compiled": Section(run_compiled, 60),
    "close_up_stable_diffusion": Section(run_close_up_stable_diffusion, 30),
    "compiled_stable_diffusion": Section(run_compiled_stable_diffusion, 80),
}
"""In this order; what comes last gets what time is left."""

BUDGET = 290.0
"""Seconds of everything, if nothing else is asked for."""


def plan_budgets(total: float) -> dict[str, float]:
    """Seconds of each section: its own, and in proportion more where all of them get more than `BUDGET`."""
    return {name: section.seconds * max(1.0, total / BUDGET) for name, section in SECTIONS.items()}


def describe_error(err: BaseException) -> str:
    """Its kind and its first lines."""
    lines = [line for line in str(err).splitlines() if line.strip()][:3]
    return f"{type(err).__name__}: {' '.join(lines)}"[:600]


def run_section(bench: Bench, name: str, seconds: float) -> dict[str, Any]:
    """What a section found, or its error; never raises but for what ends a process."""
    started = time.monotonic()
    bench.deadline = started + seconds
    partial: dict[str, Any] = {}
    told, bench.note = bench.note, lambda found: (partial.update(found), told(found))[1]  # type: ignore[func-returns-value]
    try:
        found = SECTIONS[name].run(bench)
    except Exception as err:  # Recorded: the other sections are measured all the same.
        logging.getLogger(__name__).debug("Section %s", name, exc_info=True)
        found = {**partial, "error": describe_error(err)}
    finally:
        bench.note = told
    bench.results[name] = found
    if bench.is_cuda:
        with contextlib.suppress(
            RuntimeError
        ):  # A device that an error left unusable: the next process finds a new one.
            torch.cuda.empty_cache()
    return {"took_seconds": round(time.monotonic() - started, 2), **found}


# The process that runs sections, and the one that watches it

KNOWN = "known.json"
"""What earlier processes found, beside the events: shares of the peak need it."""


def work(bench: Bench, names: Sequence[str], budgets: Sequence[float], events: Path) -> None:
    """Run sections and write what happens as lines of JSON."""

    def tell(kind: str, name: str, **found: Any) -> None:
        with events.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "name": name, **found}) + "\n")

    bench.results.update(json.loads(events.with_name(KNOWN).read_text(encoding="utf-8")))
    for name, seconds in zip(names, budgets, strict=True):
        tell("begins", name)
        bench.note = lambda found, name=name: tell("partial", name, found=found)
        found = run_section(bench, name, seconds)
        tell("ended", name, found=found)
        if "CUDA error" in found.get("error", ""):
            return  # After such an error nothing runs in this process any more.


def watch(command: Sequence[str], names: Sequence[str], budgets: dict[str, float], total: float, keep: Any) -> None:
    """Start a process for sections, again where it ended early or took too long, until every section is recorded.

    Args:
        command: To which ``--worker EVENTS --sections NAMES`` is added.
        names: Of the sections, in order.
        budgets: Seconds of each one.
        total: Seconds of all.
        keep: Called with a section's name and what is known of it.
    """
    todo, ends = list(names), time.monotonic() + total
    known: dict[str, Any] = {}

    def note(name: str, found: dict[str, Any]) -> None:
        known[name] = found
        keep(name, found)

    while todo:
        if time.monotonic() > ends - 5:
            for name in todo:
                keep(name, {"error": f"There was no time left: the {total:.0f} s of --budget were over."})
            return
        with tempfile.TemporaryDirectory() as folder:
            events = Path(folder) / "events.jsonl"
            events.touch()
            events.with_name(KNOWN).write_text(json.dumps(known), encoding="utf-8")
            process = subprocess.Popen([*command, "--worker", str(events), "--sections", *todo])
            try:
                todo = _follow(process, events, todo, budgets, ends, note)
            finally:
                process.kill()
                process.wait()


def _follow(
    process: subprocess.Popen[bytes], events: Path, todo: list[str], budgets: dict[str, float], ends: float, keep: Any
) -> list[str]:
    """Read what a process tells until it ends or is too late. Returns the sections that are still to be run."""
    left, current, partial, read = list(todo), "", {}, 0
    began = time.monotonic()  # Of the section, or of loading the program.
    while True:
        is_over = process.poll() is not None
        lines = events.read_text(encoding="utf-8").splitlines()
        for line in map(json.loads, lines[read:]):
            if line["kind"] == "begins":
                current, partial, began = line["name"], {}, time.monotonic()
            elif line["kind"] == "partial":
                partial = line["found"]
                keep(current, partial)
            else:
                keep(line["name"], line["found"])
                left.remove(line["name"])
                current, began = "", time.monotonic()
        read = len(lines)
        allowed = min(began + budgets.get(current, 120), ends) - time.monotonic()
        if is_over or allowed < 0:
            if not left:
                return left
            name = current or left[0]
            if is_over and not current and len(left) < len(todo):
                return left  # It stopped on purpose between two sections.
            why = f"its process ended with {process.returncode}" if is_over else "its seconds were over"
            keep(name, {**partial, "error": f"Not done: {why}."})
            return [other for other in left if other != name]
        time.sleep(0.1)


class Report:
    """The file that is written again after every section.

    Args:
        path: Where; None to print only.
        facts: What is known at the beginning.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self.values: dict[str, Any] = {**facts, "card": "", "sections": {}}

    def keep(self, name: str, found: dict[str, Any]) -> None:
        """Take what is known of a section."""
        self.values["sections"][name] = found
        if name == "machine":
            self.values["card"] = found.get("card", "")
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, json.dumps(self.values, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the first CUDA device)")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds of everything; more gives each section more"
    )
    parser.add_argument("--one-process", action="store_true", help="run here; nothing ends a section that hangs")
    parser.add_argument(
        "--worker", type=Path, help=argparse.SUPPRESS
    )  # what the process of the sections is started with
    options = parser.parse_args(arguments)
    if not 0 < options.budget < float("inf"):
        sys.exit(f"--budget {options.budget:g} must be seconds, more than 0.")
    name = options.device or ("cuda" if torch.cuda.is_available() else "")
    if not name:
        sys.exit("There is no CUDA device here. `--device cpu --size small` runs every section at toy size.")
    if torch.device(name).type == "cpu" and options.size == "full":
        sys.exit("Stable Diffusion's widths take hours on a processor; add --size small.")
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch sees no CUDA device, so there is no {name}. docs/how-to/gpu.md says which torch to install.")
    budgets = plan_budgets(options.budget)
    facts = {"command": shlex.join(["python", "benchmarks/gpu.py", *(arguments or sys.argv[1:])]), "size": options.size}
    report = Report(options.out, facts)
    if options.worker is None and not options.one_process:
        command = [sys.executable, __file__, "--device", name, "--size", options.size, "--budget", str(options.budget)]
        watch(command, options.sections, budgets, options.budget, report.keep)
    else:
        with tempfile.TemporaryDirectory(prefix="progidiff-gpu-") as folder:
            bench = Bench(torch.device(name), SIZES[options.size], options.size, Path(folder))
            if options.worker is not None:
                work(bench, options.sections, [budgets[key] for key in options.sections], options.worker)
                return
            for key in options.sections:
                report.keep(key, run_section(bench, key, budgets[key]))
    print(json.dumps(report.values, indent=1))


if __name__ == "__main__":
    main()
