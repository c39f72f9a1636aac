"""K proposals for a batch of windows. Knows tensors; knows nothing of volumes, DICOM or HTTP."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from progidiff.model.close_up import CloseUpNetwork, WindowBatch
from progidiff.model.sampling import draw_balanced_levels, seed_generator

LATTICE = 48
"""Latent pixels of the noise of a proposal along both axes, at least; a window takes the middle."""


class CloseUpPipeline:
    """The close-up network in working order.

    Args:
        network: Trained.
        autocast: Precision for the networks; None for the weights' own.
        presence: Probability that the sharpened evidence must reach somewhere in a window, else the structure is not
            taken to be on that slice: only generous proposals draw it there, so that the consensus does not and the
            doubt stays visible. Where a person drew, or nothing looked for it before, this is not asked.
    """

    def __init__(self, network: CloseUpNetwork, autocast: torch.dtype | None = None, presence: float = 0.0) -> None:
        self.network = network.eval().requires_grad_(False)
        self._autocast_dtype = autocast
        self._presence = presence

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def draw_noise(self, num_proposals: int, seed: int) -> Float[Tensor, "K c l l"]:
        """The noise of proposals 0..K-1; 0 does without.

        Proposal k depends on (seed, k) alone: it is the same on every slice of a window, so that proposal k is one
        coherent volume, and the same for every K and in any batch.
        """
        config = self.network.config
        lattice = max(LATTICE, config.native_size // config.latent_stride)
        shape = (config.latent_channels, lattice, lattice)
        return torch.stack(
            [torch.randn(shape, generator=seed_generator(f"{seed}:{k}:close-up")) for k in range(num_proposals)]
        )

    def draw_levels(self, num_proposals: int, seed: int) -> Float[Tensor, " K"]:
        """The levels of proposals 0..K-1, in logits: the plain answer, then cautious and generous ones by turns."""
        return torch.stack(draw_balanced_levels(num_proposals, seed)) * self.network.config.level_spread

    @torch.no_grad()
    def propose(
        self,
        batch: WindowBatch,
        tokens: Float[Tensor, "N L D"],
        token_mask: Tensor | None,
        noise: Float[Tensor, "K c l l"],
        levels: Float[Tensor, " K"],
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
        empty: tuple[Tensor, Tensor | None] | None = None,
    ) -> tuple[Float[Tensor, "N S S"], Float[Tensor, "N K S S"]]:
        """Sharpened evidence and K proposals of N windows.

        Args:
            batch: What the network sees.
            tokens, token_mask: Of each window's prompt.
            noise, levels: Of the proposals. One with level 0 is the sharpened evidence, whatever its noise, where the
                structure is present.
            num_inference_steps: T.
            guidance_scale: Strength of the text; 1 costs nothing, other values double the work.
            empty: Tokens (1, L', D) and mask of the empty text, for guidance.

        Returns:
            Both as probabilities in [0, 1], fp32 on the CPU.
        """
        count, drawn_rows = len(batch), torch.nonzero(levels)[:, 0]
        each = len(drawn_rows)
        with self._autocast():
            features = self.network.encode(batch)
        logits = features.logits.float()
        drawn = logits[:, None].repeat(1, len(levels), 1, 1)
        if each:
            with self._autocast():
                found = self.network.draw(
                    logits,
                    tokens,
                    token_mask,
                    self._cut(noise[drawn_rows], batch.images.shape[-1]).repeat(count, 1, 1, 1),
                    levels[drawn_rows].to(self.device).repeat(count),
                    self.network.compute_residuals(features),
                    num_inference_steps,
                    guidance_scale,
                    empty,
                )
            drawn[:, drawn_rows.to(self.device)] = found.float().view(count, each, *logits.shape[-2:])
        sharpened, proposed = logits.sigmoid().cpu(), drawn.sigmoid().cpu()
        if self._presence > 0:
            is_doubtful = self._doubt(sharpened, batch)
            proposed[is_doubtful[:, None] & (levels <= 0).cpu()[None]] = 0
        return sharpened, proposed

    def _doubt(self, sharpened: Float[Tensor, "N S S"], batch: WindowBatch) -> Tensor:
        """(N,) bool on the CPU, the windows in which the structure is not taken to be present."""
        is_doubtful = (sharpened.amax(dim=(1, 2)) < self._presence) & (batch.is_found.cpu() > 0)
        if batch.edits is not None:
            is_doubtful &= ~(batch.edits != 0).flatten(1).any(dim=1).cpu()
        return is_doubtful

    def _cut(self, noise: Tensor, pixels: int) -> Tensor:
        """The middle of the lattice that a window shows, where the network is."""
        size = pixels // self.network.config.latent_stride
        start = (noise.shape[-1] - size) // 2
        if start < 0:
            noise, start = F.pad(noise, (0, -2 * start, 0, -2 * start), mode="reflect"), 0
        return noise[:, :, start : start + size, start : start + size].to(self.device)
