"""How long a close-up takes beside diffusers' stock ControlNet pipeline with 20 steps at the same widths, by turns in
one process: the ratio is what counts.

    python benchmarks/stock_controlnet.py --repeats 5 --out benchmarks/results/stock_controlnet.json

Four proposals of one structure in one window (`--windows`): the close-up that ships encodes a window once and draws all
its proposals in one step. The stock pipeline is `StableDiffusionControlNetPipeline` on a copy of the same denoiser,
with `ControlNetModel.from_unet` of it, the same prompt, and latents of the same size; once as it comes (guidance 7.5),
once without guidance, which halves its work. It stops at the latents: decoding them, which the close-up needs no
network for, would take longer still. Text is encoded beforehand for both.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor

from progidiff.model.backbone import Backbone
from progidiff.model.close_up import CloseUpNetwork, WindowBatch
from progidiff.model.close_up_folder import load_close_up, load_close_up_card
from progidiff.model.close_up_pipeline import CloseUpPipeline
from progidiff.model.folder import find_backbone

ROOT = Path(__file__).resolve().parents[1]
STRIDE = 8
"""Pixels of the stock pipeline per latent pixel."""


def make_batch(network: CloseUpNetwork, count: int, size: int, pooled: Tensor) -> WindowBatch:
    """Windows of noise: what they show costs nothing."""
    config, generator = network.config, torch.Generator().manual_seed(0)
    return WindowBatch(
        images=torch.rand(count, 2 * config.num_neighbours + 1, size, size, generator=generator) * 2 - 1,
        evidence=torch.rand(count, 2 * config.evidence_neighbours + 1, size, size, generator=generator),
        is_found=torch.ones(count),
        edits=None,
        pooled=pooled.expand(count, -1),
        spacing=torch.tensor([[0.9, 3.0]]).expand(count, 2),
    )


def build_stock(network: CloseUpNetwork, backbone: Backbone) -> StableDiffusionControlNetPipeline:
    """diffusers' own pipeline on a copy of the close-up's denoiser."""
    unet = copy.deepcopy(network.unet)
    stock = StableDiffusionControlNetPipeline(
        backbone.vae,
        backbone.text_encoder,
        None,
        unet,
        ControlNetModel.from_unet(unet).eval(),
        DDIMScheduler.from_config(network.scheduler.config, prediction_type="epsilon", rescale_betas_zero_snr=False),
        None,
        None,
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    return stock


def measure(model: Path, counts: Sequence[int], proposals: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of seconds and ratios, one per number of windows."""
    backbone = Backbone(find_backbone(model), "cpu", dtype="fp32")
    _, network = load_close_up(model, torch.device("cpu"), backbone)
    rules, pipeline = load_close_up_card(model).rules, CloseUpPipeline(network)
    tokens, mask, pooled = backbone.encode_text(["liver", ""])
    stock = build_stock(network, backbone)
    noise, levels = pipeline.draw_noise(proposals, 0), pipeline.draw_levels(proposals, 0)
    side = rules.size // network.config.latent_stride * STRIDE
    rows = []
    for count in counts:
        batch = make_batch(network, count, rules.size, pooled[:1])
        picture = torch.rand(1, 3, side, side).expand(count, -1, -1, -1)
        named = tokens[:1].expand(count, -1, -1)
        token_mask = None if mask is None else mask[:1].expand(count, -1)

        def draw_stock(
            scale: float, named: Tensor = named, picture: Tensor = picture, count: int = count
        ) -> Callable[[], Any]:
            return lambda: stock(
                prompt_embeds=named,
                negative_prompt_embeds=tokens[1:].expand(count, -1, -1),
                image=picture,
                num_inference_steps=steps,
                num_images_per_prompt=proposals,
                guidance_scale=scale,
                height=side,
                width=side,
                output_type="latent",
            )

        ways: dict[str, Callable[[], Any]] = {
            "close-up": lambda: pipeline.propose(batch, named, token_mask, noise, levels),  # noqa: B023
            "stock": draw_stock(7.5),
            "stock without guidance": draw_stock(1.0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                with torch.no_grad():
                    way()
                if repeat:  # the first one warms up
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(taken) for name, taken in seconds.items()}
        rows.append(
            {
                "windows": count,
                "seconds": {name: round(value, 4) for name, value in medians.items()},
                "times as long": {
                    name: round(medians[name] / medians["close-up"], 1) for name in medians if name != "close-up"
                },
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--windows", type=int, nargs="+", default=[1])
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="of the stock pipeline")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.model, options.windows, options.num_proposals, options.steps, options.repeats)
    report = {"command": " ".join(sys.argv), "steps": options.steps, "proposals": options.num_proposals, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
