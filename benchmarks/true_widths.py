"""Close-ups at their true widths, once each, with random weights: a window of a request, and a step of the training.

    python benchmarks/true_widths.py --out benchmarks/results/true_widths.json

*embedded* is the close-up that the program trains by itself (codec of stride 4, small denoiser, windows of 96 pixels),
*stable_diffusion* the one on a backbone of Stable Diffusion 1.5's widths (KL autoencoder, CLIP, a frozen denoiser of
320 to 1280 channels, windows of its native 512 pixels, weights in bf16 but for encoder and injection). Each runs in a
process of its own, so that peak memory is its own. Nothing but the checkout is needed, and no GPU; `gpu.py` measures
the same on one.

What is measured: parameters and shapes, seconds by the clock and of the processor (the first depend on what else the
machine does), peak memory, that the answer lies on the grid of the image, that any mask comes back from the windows
voxel for voxel, that a fresh injection leaves the denoiser's answer as it is to the bit, and what one step changes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu import SIZES, Bench, build_stable_diffusion, open_training
from progidiff.images.close_up import WindowRules, window_at
from progidiff.model.close_up import CloseUpNetwork, DenoiserWidths, WindowBatch, create_network
from progidiff.model.close_up_backbone import recomputing
from progidiff.model.close_up_folder import CloseUpCard
from progidiff.prompts.structures import STRUCTURES
from progidiff.proposals.close_up_walk import CloseUpTools
from progidiff.proposals.engine import Engine
from progidiff.storage.atomic import replace_text
from progidiff.training.loop import LoopConfig, pick_precision, run_loop

KINDS = ("embedded", "stable_diffusion")

PROPOSALS = 2
"""K: the sharpened evidence, and one that is denoised."""


def open_bench(size: str, scratch: Path) -> Bench:
    """The sizes of `gpu.py`, with one slice to answer and few to train on."""
    whole = SIZES[size]
    *plane, _ = whole.shape
    small = replace(whole, shape=(*plane, 1), shape_of_training=(*whole.shape_of_training[:2], 3))  # type: ignore[arg-type]
    return Bench(torch.device("cpu"), small, size, scratch)


def open_embedded(bench: Bench) -> Engine:
    """The embedded networks that find, and a fresh close-up of the widths that `progidiff train` makes."""
    engine = Engine(bench.model, device="cpu", dtype="fp32")
    pipeline = engine.load()
    widths = None if bench.size_name == "full" else DenoiserWidths((16, 16), heads=2)
    network = create_network(pipeline.backbone.text_features, widths)
    rules = WindowRules(large_size=WindowRules.size)
    drawing = CloseUpCard(network.config, rules, structures=STRUCTURES), network
    card = replace(engine.card, gate=0.0)  # All is "there".
    return Engine.from_networks(card, pipeline, engine.adapters, "", drawing)


def clocked(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives, and what it takes."""
    started, used = time.perf_counter(), time.process_time()
    found = call()
    return found, {
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - used, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }


def name_shape(*sizes: int) -> str:
    """Such as ``4 x 64 x 64``."""
    return " x ".join(map(str, sizes))


def count(*modules: Any) -> int:
    """Parameters."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def describe(engine: Engine, network: CloseUpNetwork, rules: WindowRules) -> dict[str, Any]:
    """Parameters and shapes."""
    config, denoiser = network.config, count(network.unet)
    branch = count(network) - (0 if network.shares_denoiser else denoiser)
    parts = {
        "encoder_and_injection": branch,
        "denoiser": denoiser,
        "text_encoder": count(engine.load().backbone.text_encoder),
    }
    if network.shares_denoiser:
        parts["autoencoder"] = count(engine.load().backbone.vae)
    return {
        "window": name_shape(rules.size, rules.size),
        "latents": name_shape(config.latent_channels, *[rules.size // config.latent_stride] * 2),
        "residuals": [
            name_shape(channels, *[rules.size // stride] * 2)
            for channels, stride in zip(config.slot_channels, config.slot_strides, strict=True)
        ],
        "parameters": parts,
        "trained_parameters": sum(p.numel() for p in network.parameters()),
        "weights": str(network.unet.dtype).removeprefix("torch."),
    }


def answer(engine: Engine, bench: Bench) -> dict[str, Any]:
    """A request for one structure on one slice, K = 2, 1 step; about half of the slice looks like it."""
    with torch.no_grad():
        engine.load().branch.query_head.text[-1].get_parameter("bias")[-1] = 0.5
    request = bench.ask(engine, "liver", num_inference_steps=1).model_copy(update={"num_proposals": PROPOSALS})
    result, taken = clocked(lambda: engine.propose(request, bench.volume))
    masks = np.stack([result.label_map(bench.volume.grid, k) for k in range(1, PROPOSALS + 1)])
    return {
        "proposals": name_shape(*masks.shape),
        "is_on_the_grid_of_the_image": masks.shape[1:] == bench.size.shape,
        "drawn_pixels": [int(mask.astype(bool).sum()) for mask in masks],
        **taken,
    }


def count_lost_voxels(rules: WindowRules) -> int:
    """Voxels of a random mask that are others after the way into a window and back; the outermost are left out."""
    stack, spacing = np.random.default_rng(0).random((1, 200, 180)) < 0.4, (4.0, 1.5, 1.25)
    window = window_at((0, 150.0, 112.0), 80.0, stack.shape, spacing, rules)
    back = window.restore(window.extract(stack.astype(np.float32), [0]))[0].numpy() >= 0.5
    rows, columns = window.box
    return int((back != stack[0, rows, columns])[1:-1, 1:-1].sum())


@torch.no_grad()
def check_fresh(network: CloseUpNetwork, tools: CloseUpTools) -> bool:
    """Whether the denoiser answers bit for bit what it answers without encoder and injection."""
    config, size, dtype = network.config, tools.rules.size, network.unet.dtype
    batch = WindowBatch(
        images=torch.rand(1, 2 * config.num_neighbours + 1, size, size) * 2 - 1,
        evidence=torch.rand(1, 2 * config.evidence_neighbours + 1, size, size),
        is_found=torch.ones(1),
        edits=None,
        pooled=tools.prompts.pooled[:1],
        spacing=torch.ones(1, 2),
    )
    latents = torch.randn(1, config.latent_channels, *[size // config.latent_stride] * 2).to(dtype)
    tokens, mask = tools.prompts.tokens[:1].to(dtype), tools.prompts.mask
    given = (latents, config.start_time, tokens)
    masked = {} if mask is None else {"encoder_attention_mask": mask[:1]}
    down, middle = network.compute_residuals(network.encode(batch))
    steered = network.unet(
        *given,
        **masked,
        down_block_additional_residuals=tuple(residual.to(dtype) for residual in down),
        mid_block_additional_residual=middle.to(dtype),
    ).sample
    return torch.equal(steered, network.unet(*given, **masked).sample)


def train_a_step(engine: Engine, network: CloseUpNetwork, bench: Bench) -> dict[str, Any]:
    """One step of the loop, a window with two proposals, and whose weights it changes."""
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    shared = sum_bits(engine.load().backbone.unet), sum_bits(engine.load().backbone.vae)
    objective = open_training(engine, bench, PROPOSALS)
    loop = LoopConfig(steps=1, warmup=0, precision="auto", tensorboard=False)

    def train() -> None:
        with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
            run_loop({"network": network}, objective, loop, Path(folder))

    with recomputing(network) if network.shares_denoiser else contextlib.nullcontext():
        _, taken = clocked(train)
    changed = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    return {
        "precision": pick_precision("auto", bench.device),
        "recomputes": network.shares_denoiser,
        "changes_the_injection": any(name.startswith("zero.") for name in changed),
        "changes_the_encoder": any(name.startswith("encoder.") for name in changed),
        "changes_the_backbone": shared != (sum_bits(engine.load().backbone.unet), sum_bits(engine.load().backbone.vae)),
        **taken,
    }


def sum_bits(module: Any) -> int:
    """Of all weights, as whole numbers: another one where any of them is another."""
    whole = {2: torch.int16, 4: torch.int32}
    return sum(int(p.detach().view(whole[p.element_size()]).sum(dtype=torch.int64)) for p in module.parameters())


def measure(kind: str, size: str) -> dict[str, Any]:
    """Everything of one kind, in this process."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="progidiff-widths-") as scratch:
        bench = open_bench(size, Path(scratch))
        engine, made = clocked(
            lambda: open_embedded(bench) if kind == "embedded" else build_stable_diffusion(bench, close_up=True)
        )
        tools = engine._close_up
        assert tools is not None
        network = tools.pipeline.network
        return {
            **describe(engine, network, tools.rules),
            "made": made,
            "voxels_lost_on_the_way_back": count_lost_voxels(tools.rules),
            "fresh_branch_changes_nothing": check_fresh(network, tools),
            "request": answer(engine, bench),
            "step": train_a_step(engine, network, bench),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--size", choices=SIZES, default="full", help="small: toys, for a try")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--here", action="store_true", help="in this process, so that peak memory is that of all kinds")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/true_widths.py", *(arguments or sys.argv[1:])]),
        "size": options.size,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": platform.machine(),
        "has_bf16": torch.cpu._is_avx512_bf16_supported(),
        "kinds": {},
    }
    for kind in options.kinds:
        if options.here or len(options.kinds) == 1:
            found["kinds"][kind] = measure(kind, options.size)
            continue
        command = [sys.executable, __file__, "--kinds", kind, "--size", options.size]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        found["kinds"] |= json.loads(output)["kinds"]
    text = json.dumps(found, indent=1) + "\n"
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.out, text)
    print(text, end="")


if __name__ == "__main__":
    main()
