"""Networks that the shipped model is compared with, and one plain loop that trains them for a given time.

* `UNet`: MONAI's BasicUNet on the working grid, all structures at once, with channel dropout where it is coarse, so
  that MC dropout (arXiv 1506.02142; its place after Bayesian SegNet, arXiv 1511.02680) gives it several answers.
* `LatentMapper`: after GMS (arXiv 2403.13198): the frozen codec turns slices into latents, a small CNN turns these and
  a prompt into the latent of a mask, the codec decodes it. No noise, no steps, one answer.

They see the cached slices, the augmentation and the balanced drawing of the shipped model.
"""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.model.codec import encode_pictures
from progidiff.model.pipeline import ProposalPipeline
from progidiff.training.augment import augment
from progidiff.training.dice_tally import one_hot
from progidiff.training.evidence_stage import PhraseTable
from progidiff.training.loop import AveragedWeights, derive_seed, named_parameters
from progidiff.training.losses import ProposalLosses, compute_mask_loss
from progidiff.training.proposal_stage import ProposalOptions, decode_crops, draw_pairs
from progidiff.training.slice_cache import SliceCache


class ChannelDropout(nn.Module):
    """Drops whole channels after a block; a generator makes it draw at inference too, one mask for all slices.

    Args:
        block: Any module with one tensor as output.
        share: Of the channels dropped, in [0, 1).
    """

    def __init__(self, block: nn.Module, share: float) -> None:
        super().__init__()
        self.block = block
        self.share = share
        self.generator: torch.Generator | None = None

    def forward(self, *inputs: Tensor) -> Tensor:
        """(N, C, H, W) of the block, with channels dropped while training or sampling."""
        x: Tensor = self.block(*inputs)
        if self.generator is None:
            return F.dropout2d(x, self.share, self.training)
        kept = torch.rand(1, x.shape[1], 1, 1, generator=self.generator) >= self.share
        return x * kept.to(x) / (1 - self.share)


class UNet(nn.Module):
    """A plain 2-D U-Net over all structures.

    Args:
        in_channels: Slices per sample.
        structures: P; the network has P + 1 outputs, background first.
        features: Widths of its five levels, full resolution first.
        dropout: Share of channels dropped after the two coarsest levels, on the way down and up.
    """

    def __init__(
        self, in_channels: int, structures: int, features: Sequence[int] = (16, 32, 64, 128, 256), dropout: float = 0.2
    ) -> None:
        super().__init__()
        from monai.networks.nets import BasicUNet

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its widths
            self.net = BasicUNet(
                spatial_dims=2, in_channels=in_channels, out_channels=structures + 1, features=(*features, features[0])
            )
        for name in ("down_3", "down_4", "upcat_4", "upcat_3"):
            setattr(self.net, name, ChannelDropout(getattr(self.net, name), dropout))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> logits (N, P + 1, H, W)."""
        logits: Tensor = self.net(images.contiguous(memory_format=torch.channels_last))
        return logits

    @torch.no_grad()
    def predict(self, images: Tensor, autocast: torch.dtype | None = torch.bfloat16) -> Tensor:
        """Membership (N, P, H, W) in [0, 1]: at least one half where the structure is the most probable of all,
        background included.
        """
        with torch.autocast(images.device.type, autocast, enabled=autocast is not None):
            logits = self(images)
        return rate_classes(logits.float())

    @torch.no_grad()
    def sample(self, images: Tensor, index: int, seed: int = 0, share: float | None = None) -> Tensor:
        """Answer `index` of MC dropout, like `predict`.

        Args:
            index: Which one; the same channels are dropped for it on every slice, so that it is one coherent volume, as
                a proposal is.
            seed: Of all of them.
            share: Of the channels; None for that of the training.
        """
        dropouts = [m for m in self.modules() if isinstance(m, ChannelDropout)]
        trained = [m.share for m in dropouts]
        generator = torch.Generator().manual_seed(derive_seed(seed, index, "dropout"))
        try:
            for m in dropouts:
                m.generator, m.share = generator, m.share if share is None else share
            return self.predict(images)
        finally:
            for m, usual in zip(dropouts, trained, strict=True):
                m.generator, m.share = None, usual


def rate_classes(logits: Tensor) -> Tensor:
    """(N, P + 1, H, W) logits, background first -> (N, P, H, W) in [0, 1].

    p / (p + the largest of the others): at least one half exactly where the class wins, so that a threshold of one half
    after resampling is the argmax.

    Example:
        >>> rate_classes(torch.tensor([0.0, 2.0, 1.0]).view(1, 3, 1, 1)).flatten() > 0.5
        tensor([ True, False])
    """
    best, winner = logits.max(dim=1, keepdim=True)
    second = logits.scatter(1, winner, -torch.inf).amax(dim=1, keepdim=True)
    rivals = torch.where(torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1) == winner, second, best)
    return torch.sigmoid(logits - rivals)[:, 1:]


def compute_unet_loss(logits: Tensor, labels: Tensor, cross_entropy: float = 1.0, smooth: float = 1e-5) -> Tensor:
    """MONAI's Dice + cross-entropy over the structures, pooled over the batch.

    Args:
        logits: (N, P + 1, H, W).
        labels: (N, H, W) in 0..P.
        cross_entropy: Weight of the cross-entropy.
        smooth: Added to both parts of the Dice, in pixels. Where it is not small beside a structure (10 beside the 60
            pixels of a gland), drawing nothing is a minimum that the softmax does not leave: the glands and the
            esophagus stayed at Dice 0.
    """
    from monai.losses import DiceCELoss

    loss = DiceCELoss(
        include_background=False,
        to_onehot_y=True,
        softmax=True,
        batch=True,
        smooth_nr=smooth,
        smooth_dr=smooth,
        lambda_ce=cross_entropy,
    )
    result: Tensor = loss(logits.float(), labels[:, None])
    return result


@dataclass(frozen=True)
class Budget:
    """How long and how a network is trained.

    Attributes:
        minutes: Processor time of one core for training steps; validations are not counted.
        validate_minutes: Between validations.
        slices: Per step.
        learning_rate: Constant after a short warm-up, so that training can be continued.
        anneal_minutes: Before the end, over which it falls to almost nothing.
        ema_decay: Of the averaged weights, which are what is validated and kept.
        seed: Of everything random.
    """

    minutes: float = 30.0
    validate_minutes: float = 3.0
    slices: int = 8
    learning_rate: float = 1.5e-3
    anneal_minutes: float = 4.0
    ema_decay: float = 0.995
    seed: int = 0


def train_for(
    network: nn.Module,
    compute_loss: Callable[[int, torch.Generator], Tensor],
    validate: Callable[[], dict[str, Any]],
    budget: Budget,
    folder: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Train until the budget is spent, continuing from `folder` if it holds a checkpoint.

    Args:
        network: On return it holds the averaged weights.
        compute_loss: (step, generator) -> loss.
        validate: Called with the averaged weights in place.
        folder: Gets ``checkpoint.pt``, after every validation.
        tell: Gets a line per validation.

    Returns:
        The curve: step, minutes of processor time, minutes by the clock, and what `validate` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "checkpoint.pt"
    modules = {"network": network}
    parameters = named_parameters(modules)
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=budget.learning_rate, weight_decay=1e-4, betas=(0.9, 0.99)
    )
    average = AveragedWeights(modules, budget.ema_decay)
    step, spent, waited = 0, 0.0, 0.0
    curve: list[dict[str, Any]] = []
    if path.is_file():
        kept = torch.load(path, weights_only=True)
        network.load_state_dict(kept["network"])
        optimizer.load_state_dict(kept["optimizer"])
        average.shadow = kept["average"]
        step, spent, waited, curve = kept["step"], kept["spent"], kept["waited"], json.loads(kept["curve"])
    mean_loss = 0.0
    while spent < budget.minutes * 60:
        until = min(budget.minutes * 60, (len(curve) + 1) * budget.validate_minutes * 60)
        network.train()
        first = step
        started, clock = time.process_time(), time.monotonic()
        while step == first or spent + time.process_time() - started < until:
            left = budget.minutes * 60 - spent - (time.process_time() - started)
            falling = max(0.02, left / (60 * budget.anneal_minutes)) if budget.anneal_minutes else 1.0
            for group in optimizer.param_groups:
                group["lr"] = budget.learning_rate * min(1.0, (step + 1) / 100, falling)
            torch.manual_seed(derive_seed(budget.seed, step, "global"))
            with torch.autocast("cpu", torch.bfloat16):
                loss = compute_loss(step, torch.Generator().manual_seed(derive_seed(budget.seed, step)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
            optimizer.step()
            average.update(parameters, step)
            mean_loss += (float(loss.detach()) - mean_loss) / min(50, step - first + 1)
            step += 1
        spent += time.process_time() - started
        waited += time.monotonic() - clock
        network.eval()
        average.swap(parameters)
        found = validate()
        average.swap(parameters)
        curve.append(
            {
                "step": step,
                "slices": step * budget.slices,
                "minutes": round(spent / 60, 2),
                "clock_minutes": round(waited / 60, 2),
                **found,
            }
        )
        tell(f"step {step}, {spent / 60:.1f} min, loss {mean_loss:.3f}: {json.dumps(found)}")
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "average": average.shadow}
        torch.save(
            {**state, "step": step, "spent": spent, "waited": waited, "curve": json.dumps(curve)},
            path.with_suffix(".tmp"),
        )
        path.with_suffix(".tmp").replace(path)
    network.eval()
    average.swap(parameters)
    return curve


def draw_slices(
    cache: SliceCache, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, np.random.Generator]:
    """Balanced, augmented slices (N, C, H, W) and labels (N, H, W), as the shipped model was trained on."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    images, labels = augment(*cache.read(cache.draw_balanced(count, rng)), generator)
    return images, labels, rng


class LatentMapper(nn.Module):
    """A latent-to-latent CNN: latents of a slice and its neighbours, and a prompt, to the latent of the prompt's mask.

    Residual blocks at the latents' resolution, dilated in turn, each scaled and shifted by the prompt.

    Args:
        image_channels: Latent channels of all slices of a sample together.
        mask_channels: Latent channels of a mask.
        text_features: Of a prompt's vector.
        width: Channels inside.
        depth: Residual blocks.
    """

    def __init__(
        self, image_channels: int, mask_channels: int, text_features: int, width: int = 128, depth: int = 8
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(image_channels, width, 3, padding=1)
        self.text = nn.Sequential(
            nn.LayerNorm(text_features), nn.Linear(text_features, width), nn.GELU(), nn.Linear(width, 2 * width * depth)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width, affine=False) for _ in range(depth))
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation),
                nn.GroupNorm(8, width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
            )
            for dilation in (1 + n % 4 for n in range(depth))
        )
        self.last = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, mask_channels, 3, padding=1))

    def forward(self, latents: Tensor, pooled: Tensor) -> Tensor:
        """(M, image_channels, h, w) and (M, text_features) -> standardised mask latents (M, mask_channels, h, w)."""
        x = self.first(latents)
        for norm, conv, wish in zip(
            self.norms, self.convs, self.text(pooled).chunk(len(self.norms), dim=1), strict=True
        ):
            scale, shift = wish[:, :, None, None].chunk(2, dim=1)
            x = x + conv(F.silu(norm(x) * (1 + scale) + shift))
        mask: Tensor = self.last(x)
        return mask


class LatentModel:
    """A `LatentMapper` between the frozen encoder and decoder of a model's codec.

    Args:
        pipeline: Whose codec and text encoder serve.
        structures: P names, asked for by their own names.
    """

    def __init__(self, pipeline: ProposalPipeline, structures: Sequence[str]) -> None:
        self.codec = pipeline.codec.requires_grad_(False)
        self.scale = float(self.codec.vae.config.scaling_factor)
        self.phrases = PhraseTable(pipeline.backbone, structures)
        config, channels = pipeline.branch.config, self.codec.vae.config.latent_channels
        self.mapper = LatentMapper((2 * config.num_neighbours + 1) * channels, channels, config.text_features)

    def encode_slices(self, images: Tensor) -> Tensor:
        """(N, C, H, W) in [-1, 1] -> (N, C * c, h, w), about unit variance."""
        with torch.no_grad():
            latents = encode_pictures(self.codec.vae, images.flatten(0, 1)[:, None].expand(-1, 3, -1, -1)) * self.scale
        return latents.view(len(images), -1, *latents.shape[-2:])

    def compute_loss(
        self, images: Tensor, labels: Tensor, rng: np.random.Generator, generator: torch.Generator
    ) -> Tensor:
        """The losses of the shipped denoiser, with the mean squared error of the latent in the place of that of v."""
        weights, options = ProposalLosses(), ProposalOptions()
        count = len(self.phrases.rows)
        rows, picked = draw_pairs(
            labels, torch.ones(len(labels), count), options.present_per_slice, options.absent_per_slice, rng
        )
        masks = one_hot(labels, count)[rows, picked]
        with torch.no_grad():
            clean = self.codec.encode_masks(masks).float()
        found = self.mapper(
            self.encode_slices(images)[rows], self.phrases.pooled[self.phrases.draw(generator)[picked]]
        ).float()
        decoded = torch.randperm(len(rows), generator=generator)[: max(1, round(options.decode_share * len(rows)))]
        mask = compute_mask_loss(*decode_crops(self.codec, found[decoded], masks[decoded], rng), weights.cross_entropy)
        return (
            weights.diffusion * F.mse_loss(found, clean)
            + weights.latent * F.l1_loss(found, clean)
            + weights.mask * mask
        )

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """(N, C, H, W) -> membership of every structure (N, P, H, W) in [0, 1]."""
        pooled = self.phrases.pooled[self.phrases.canonical()]
        with torch.autocast("cpu", torch.bfloat16):
            latents = self.encode_slices(images)
            pairs = latents.repeat_interleave(len(pooled), dim=0), pooled.repeat(len(images), 1)
            found = torch.cat([self.mapper(*part) for part in zip(*(t.split(64) for t in pairs), strict=True)])
            return self.codec.decode_latents(found.float()).float().view(len(images), len(pooled), *images.shape[-2:])
