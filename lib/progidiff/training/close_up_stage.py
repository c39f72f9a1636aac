"""Recipe 3 of `progidiff train`: close-ups, from windows with out-of-fold evidence, simulated edits and readers' masks.

The loss has three parts. *Sharpened evidence*: cross-entropy and Dice against the readers' mean. *Energy score* of the
proposals, E d(X, Y) - E d(X, X') / 2 with two or more proposals X per window and each reader's mask Y
(Gneiting and Raftery 2007, equation 22): it is smallest where proposals are distributed as readers' masks are, so that
variety is learned, and not a width that somebody set. *Denoising*: from a reader's own mask with noise back to that
mask, which several steps need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from progidiff.model.close_up import CloseUpNetwork, WindowBatch, WindowFeatures
from progidiff.model.pipeline import EncodedPrompts
from progidiff.training.augment import Tones
from progidiff.training.device_batches import move
from progidiff.training.losses import compute_dice_loss
from progidiff.training.objective import Figures, Objective
from progidiff.training.settings import Range
from progidiff.training.simulated_edits import EditHabits, simulate_edits
from progidiff.training.window_pool import WindowPool, WindowSample

Weight = Annotated[float, Range(0, 1e4)]


@dataclass(frozen=True)
class CloseUpLosses:
    """Weights of the parts.

    Attributes:
        cross_entropy: Beside every Dice.
        sharpened: Cross-entropy and Dice of the sharpened evidence.
        energy: Energy score of the proposals.
        denoising: Cross-entropy and Dice of what is denoised from a reader's own mask.
    """

    cross_entropy: Weight = 3.0
    sharpened: Weight = 1.0
    energy: Weight = 1.0
    denoising: Weight = 0.5


@dataclass(frozen=True)
class CloseUpOptions:
    """What a step sees.

    Attributes:
        windows_per_step: Windows of a micro-batch.
        proposed: Windows of a micro-batch that proposals are drawn on; the others train the encoder alone, which learns
            slowest.
        samples: Proposals of a window in the energy score, at least 2.
        denoising_share: Share of the steps that start from a reader's noised mask.
        edit_share: Share of windows with edits.
        neighbour_share: Share of windows with an accepted slice nearby.
        text_dropout: Share of windows without a prompt.
        evidence_dropout: Share of windows without evidence; they always have edits.
        steepness: Factor on the proposals' logits in the energy score. What counts are masks: the steeper, the nearer
            is what is compared to them.
        keep_encoder: Train the denoiser and its injection alone: the encoder, and with it the consensus, stays as it
            is.
        augmentation: Strength of intensity augmentation.
        bias_field: Strength of simulated shading.
        losses: Their weights.
    """

    windows_per_step: Annotated[int, Range(1, 1024)] = 16
    proposed: Annotated[int, Range(1, 1024)] = 8
    samples: Annotated[int, Range(2, 16)] = 2
    denoising_share: Annotated[float, Range(0, 1)] = 0.25
    edit_share: Annotated[float, Range(0, 1)] = 0.35
    neighbour_share: Annotated[float, Range(0, 1)] = 0.15
    text_dropout: Annotated[float, Range(0, 1)] = 0.15
    evidence_dropout: Annotated[float, Range(0, 1)] = 0.1
    augmentation: Annotated[float, Range(0, 3)] = 1.0
    bias_field: Annotated[float, Range(0, 2)] = 0.0
    steepness: Annotated[float, Range(0.1, 100)] = 1.0
    keep_encoder: bool = False
    losses: CloseUpLosses = CloseUpLosses()


@dataclass(frozen=True)
class CloseUpDraw:
    """N windows on the CPU, and what will be done to them.

    Attributes:
        sample: Windows with their truth.
        tones: How intensities will change.
        is_found: (N,) 1 where the network sees evidence.
        is_named: (N,) bool, whether it sees a prompt.
        rows: (N,) the prompts.
        reader: (N,) whose mask is denoised.
        edits: (N, D, S, S) of somebody who looked at truth and evidence.
    """

    sample: WindowSample
    tones: Tones
    is_found: Tensor
    is_named: Tensor
    rows: Tensor
    reader: Tensor
    edits: Tensor


@dataclass(frozen=True)
class CloseUpBatch:
    """N windows as the network reads them, with their truth, where the network is.

    Attributes:
        windows: What the network sees.
        tokens: (N, L, D) of the prompts; of the empty text where there is none.
        mask: (N, L), or None.
        truth: (N, R, S, S) in [0, 1].
        weight: (N, R), 0 where there is no such reader.
        reader: (N,) whose mask is denoised.
    """

    windows: WindowBatch
    tokens: Tensor
    mask: Tensor | None
    truth: Tensor
    weight: Tensor
    reader: Tensor

    def first(self, count: int) -> CloseUpBatch:
        """Some of them, without what the encoder has read."""
        mask = None if self.mask is None else self.mask[:count]
        kept = (part[:count] for part in (self.truth, self.weight, self.reader))
        return CloseUpBatch(self.windows, self.tokens[:count], mask, *kept)

    @property
    def mean_truth(self) -> Tensor:
        """(N, S, S), the readers' mean."""
        weight = self.weight[:, :, None, None]
        return (self.truth * weight).sum(1) / weight.sum(1)


class CloseUpObjective(Objective):
    """Loss of the close-up network on a batch of windows.

    Args:
        network: What is trained.
        pool: What is drawn from.
        prompts: One per label id of the pool, id 1 first.
        options: What a step sees.
        habits: Of the simulated person.
    """

    def __init__(
        self,
        network: CloseUpNetwork,
        pool: WindowPool,
        prompts: EncodedPrompts,
        options: CloseUpOptions | None = None,
        habits: EditHabits | None = None,
    ) -> None:
        self.network, self.pool, self.prompts = network, pool, prompts
        self.options, self.habits = options or CloseUpOptions(), habits or EditHabits()
        if self.options.keep_encoder:
            for part in network.encoding_parts:
                part.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    def draw(self, generator: torch.Generator) -> CloseUpDraw:
        """Draw windows and how their intensities change, and let somebody edit."""
        options = self.options
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        sample = self.pool.draw(options.windows_per_step, rng)
        tones = Tones.draw(generator, options.windows_per_step, options.augmentation, options.bias_field)
        return self._dress(sample, tones, rng, generator)

    def _dress(
        self, sample: WindowSample, tones: Tones, rng: np.random.Generator, generator: torch.Generator
    ) -> CloseUpDraw:
        """Drop text and evidence here and there, and add edits."""
        options, count = self.options, len(sample.images)
        is_found = sample.is_found * torch.from_numpy(rng.random(count) >= options.evidence_dropout).float()
        is_named = torch.from_numpy(rng.random(count) >= options.text_dropout)
        maps = []
        readers = sample.weight.sum(1).long()
        for n in range(count):
            truth = (sample.truth[n, int(rng.integers(int(readers[n])))] >= 0.5).numpy()
            drawn = (sample.evidence[n, self.pool.evidence_neighbours] >= 0.5).numpy() & bool(is_found[n])
            has_neighbour = rng.random() < options.neighbour_share and float(sample.neighbour_mm[n]) > 0
            edited = rng.random() < options.edit_share or not is_found[n]
            habits = self.habits if edited else EditHabits(clicks=0, frames=0)
            maps.append(
                simulate_edits(
                    truth,
                    drawn if edited else truth,
                    rng,
                    habits,
                    sample.neighbour[n] if has_neighbour else None,
                    float(sample.neighbour_mm[n]),
                )
            )
        rows = torch.tensor(sample.labels) - 1
        reader = torch.multinomial(sample.weight, 1, generator=generator)[:, 0]
        return CloseUpDraw(sample, tones, is_found, is_named, rows, reader, torch.stack(maps))

    def prepare(self, drawn: CloseUpDraw) -> CloseUpBatch:
        """Change intensities on the device, and put text beside the windows."""
        there = move(drawn, self.device)
        sample, named, rows, prompts = there.sample, there.is_named, there.rows, move(self.prompts, self.device)
        images = there.tones.apply(sample.images)
        pooled = prompts.pooled[rows].float() * named[:, None]
        length = prompts.tokens.shape[1]
        tokens = torch.where(named[:, None, None], prompts.tokens[rows], _pad(prompts.empty_tokens, length))
        mask = None
        if prompts.mask is not None and prompts.empty_mask is not None:
            mask = torch.where(named[:, None], prompts.mask[rows], _pad(prompts.empty_mask, length))
        windows = WindowBatch(images, sample.evidence, there.is_found, there.edits, pooled, sample.spacing)
        return CloseUpBatch(windows, tokens, mask, sample.truth, sample.weight, there.reader)

    def draw_batch(self, generator: torch.Generator) -> CloseUpBatch:
        """Draw windows, let somebody edit, and change their intensities."""
        return self.prepare(self.draw(generator))

    def compute(self, drawn: CloseUpDraw, step: int, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Loss and figures of windows that were drawn, for `run_loop`."""
        return self.compute_loss(self.prepare(drawn), generator)

    def compute_loss(self, batch: CloseUpBatch, generator: torch.Generator) -> tuple[Tensor, Figures]:
        """Encode once, draw several proposals, compare with every reader."""
        losses = self.options.losses
        features = self._encode(batch)
        sharpened = self._compare(features.logits, batch.mean_truth)
        batch, features = batch.first(self.options.proposed), features.first(self.options.proposed)
        if float(torch.rand((), generator=generator)) < self.options.denoising_share:
            denoising = self._denoise(batch, features, generator)
            loss = losses.sharpened * sharpened + losses.denoising * denoising
            return loss, {"sharpened": sharpened.detach(), "denoising": denoising.detach()}
        energy = self.compute_energy(batch, features, generator)
        loss = losses.sharpened * sharpened + losses.energy * energy
        return loss, {"sharpened": sharpened.detach(), "energy": energy.detach()}

    def _encode(self, batch: CloseUpBatch) -> WindowFeatures:
        """Run the encoder; without dropout and gradients where it stays as it is."""
        if not self.options.keep_encoder:
            return self.network.encode(batch.windows)
        for part in self.network.encoding_parts:
            part.eval()
        with torch.no_grad():
            return self.network.encode(batch.windows)

    def compute_energy(self, batch: CloseUpBatch, features: WindowFeatures, generator: torch.Generator) -> Tensor:
        """Energy score of new proposals, the mean over windows."""
        logits = self._propose(batch, features, generator).float()  # (N, M, S, S)
        probabilities = (logits * self.options.steepness).sigmoid()
        return compute_energy_score(probabilities, batch.truth, batch.weight).mean()

    def _compare(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Dice + cross-entropy per window."""
        logits = logits.float()
        cross_entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
        dice = compute_dice_loss(logits.sigmoid(), truth, (1, 2), smooth=20.0)
        return dice + self.options.losses.cross_entropy * cross_entropy

    def _propose(self, batch: CloseUpBatch, features: WindowFeatures, generator: torch.Generator) -> Tensor:
        """(N, M, S, S) logits of proposals, drawn as in use."""
        config, count = self.network.config, self.options.samples
        size = batch.truth.shape[-1] // config.latent_stride
        total = len(batch.truth) * count
        noise = move(torch.randn(total, config.latent_channels, size, size, generator=generator), self.device)
        levels = move(torch.randn(total, generator=generator) * config.level_spread, self.device)
        residuals = self.network.compute_residuals(features)
        drawn = self.network.draw(features.logits, batch.tokens, batch.mask, noise, levels, residuals)
        return drawn.view(len(batch.truth), count, *drawn.shape[-2:])

    def _denoise(self, batch: CloseUpBatch, features: WindowFeatures, generator: torch.Generator) -> Tensor:
        """From a reader's noised mask back to it, at a random time."""
        network, config = self.network, self.network.config
        count = len(batch.truth)
        truth = batch.truth[torch.arange(count, device=self.device), batch.reader]
        times = move(torch.randint(1, config.start_time + 1, (count,), generator=generator), self.device)
        clean = network.codec.encode_masks(truth)
        signal, strength = network.noise_level(times)
        noise = move(torch.randn(clean.shape, generator=generator), self.device)
        predicted = network.predict(
            signal * clean + strength * noise, times, batch.tokens, batch.mask, network.compute_residuals(features)
        )
        logits = features.logits + config.noise_scale * network.codec.decode_signed(predicted)
        return self._compare(logits, truth)


def compute_energy_score(
    drawn: Float[Tensor, "N M S S"], truth: Float[Tensor, "N R S S"], weight: Float[Tensor, "N R"]
) -> Float[Tensor, " N"]:
    """E d(X, Y) - E d(X, X') / 2 with d = 1 - soft IoU (Ruzicka), the distance of the GED.

    Args:
        drawn: M proposals per window in [0, 1], M at least 2.
        truth: R readers' masks in [0, 1].
        weight: 0 where there is no such reader.
    """
    count = drawn.shape[1]
    to_truth = compute_soft_distance(drawn[:, :, None], truth[:, None])  # (N, M, R)
    share = weight / weight.sum(1, keepdim=True)
    first = (to_truth * share[:, None]).sum((1, 2)) / count
    among = compute_soft_distance(drawn[:, :, None], drawn[:, None])  # (N, M, M)
    return first - 0.5 * among.sum((1, 2)) / (count * (count - 1))


def compute_soft_distance(
    a: Float[Tensor, "*leading S S"], b: Float[Tensor, "*#leading S S"], smooth: float = 4.0
) -> Float[Tensor, "*leading"]:
    """1 - sum min / sum max; two empty masks are at distance 0."""
    return 1 - (torch.minimum(a, b).sum((-2, -1)) + smooth) / (torch.maximum(a, b).sum((-2, -1)) + smooth)


def _pad(values: Tensor, length: int) -> Tensor:
    """(1, L', ...) -> (1, length, ...) with zeros behind."""
    missing = length - values.shape[1]
    if missing <= 0:
        return values[:, :length]
    shape = (values.shape[0], missing, *values.shape[2:])
    return torch.cat([values, torch.zeros(shape, dtype=values.dtype, device=values.device)], dim=1)
