"""From noise to clean latents: what comes out depends on the arguments alone, whatever ran before."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Latents (M, c, h, w) and a timestep -> what the scheduler's `prediction_type` says, of the same shape."""


def seed_generator(text: str) -> torch.Generator:
    """A generator whose state follows from a text alone, for example "seed:k"."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1)


def draw_quantiles(count: int, seed: int) -> list[Tensor]:
    """Stratified numbers from the standard normal distribution: a golden-ratio sequence through its quantiles.

    Already four of them hold low and high ones; number k depends on (seed, k) alone.
    """
    start = float(torch.rand((), generator=seed_generator(f"{seed}:start")))
    places = [(start + k * (math.sqrt(5) - 1) / 2) % 1 for k in range(count)]
    return [torch.special.ndtri(torch.tensor(min(max(place, 0.02), 0.98))) for place in places]


def draw_balanced_levels(count: int, seed: int) -> list[Tensor]:
    """0, then a cautious (negative) and a generous (positive) number by turns: sizes by a golden-ratio sequence through
    the quantiles of the standard normal distribution's upper half.

    Because the cautious come first, what at least half of the level sets hold is what level 0 draws, for every count of
    them. Number k depends on (seed, k) alone.
    """
    start = float(torch.rand((), generator=seed_generator(f"{seed}:levels")))
    levels = [torch.tensor(0.0)]
    for pair in range(count // 2):
        # The first pair is in the outer half: already three proposals differ.
        place = (0.5 + start / 2 + pair * (math.sqrt(5) - 1) / 2) % 1
        size = torch.special.ndtri(torch.tensor(min(max(0.5 + place / 2, 0.54), 0.98)))
        levels += [-size, size]
    return levels[:count]


def guide(predict: Denoise, predict_without_text: Denoise, guidance_scale: float) -> Denoise:
    """Classifier-free guidance: away from what is predicted without the text.

    Args:
        predict: With the text.
        predict_without_text: The same network on the same image with an empty text.
        guidance_scale: 1 gives `predict` itself and costs nothing; other values double the work.
    """
    if guidance_scale == 1.0:
        return predict

    def guided(latents: Tensor, timestep: Tensor) -> Tensor:
        with_text = predict(latents, timestep)
        without = predict_without_text(latents, timestep)
        return without + guidance_scale * (with_text - without)

    return guided


def sample(
    denoise: Denoise, scheduler: Any, noise: Float[Tensor, "M c h w"], num_inference_steps: int
) -> Float[Tensor, "M c h w"]:
    """Denoise in T steps.

    Args:
        denoise: The network with everything else that it is told.
        scheduler: A scheduler of diffusers; its timesteps are set anew.
        noise: Where to start.
        num_inference_steps: T, at least 1.

    Returns:
        The clean latents as the last step predicts them: where T does not divide the training steps, the scheduler's
        own last sample stops just short of them.
    """
    # The scheduler looks its tables up with numbers of the processor: one on the device would make it wait, every step.
    scheduler.set_timesteps(num_inference_steps)
    on_device = scheduler.timesteps.to(noise.device)
    latents = clean = noise
    for timestep, same in zip(scheduler.timesteps, on_device, strict=True):
        step = scheduler.step(denoise(latents, same), timestep, latents)
        latents, clean = step.prev_sample, step.pred_original_sample
    return clean
