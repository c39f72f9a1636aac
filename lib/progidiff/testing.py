"""Real models of toy width, for tests: the same classes and files as the embedded model, random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.calibration import Calibration
from progidiff.model.close_up import DenoiserWidths, create_network
from progidiff.model.close_up_folder import CloseUpCard, save_close_up
from progidiff.model.codec import MaskCodec
from progidiff.model.folder import ModelCard, compute_backbone_digest, drop_derived_settings, save_conditioning
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.build_model import BackboneWidths, create_backbone, create_branch

TOY_WIDTHS = BackboneWidths(
    codec_channels=8, codec_blocks=(1, 1, 1, 1), latent_channels=4, denoiser_channels=(32, 32), heads=2
)


def build_tiny_model(folder: str | Path, seed: int = 0, evidence_bias: float = 0.5) -> Path:
    """Write a complete model folder of toy width, whose masks are blots.

    Args:
        folder: Where to write; must not exist.
        seed: Of the random weights.
        evidence_bias: Shifts the text-query head so that about half of the pixels pass the presence gate; a fresh head
            finds everything absent, which would leave the denoiser untested.
    """
    folder = Path(folder)
    create_backbone(folder / "backbone", TOY_WIDTHS, seed)
    backbone = Backbone(folder / "backbone", device="cpu")
    branch = create_branch(backbone, 32, 64, (4.0, 12.0), seed, channels=(8, 8, 16, 16, 16), evidence_channels=16)
    with torch.no_grad():
        branch.query_head.text[-1].get_parameter("bias")[-1] = evidence_bias
        for conv in branch.zero:
            conv.get_parameter("weight").normal_(std=0.05)
    codec = MaskCodec(backbone.vae)
    with torch.no_grad():
        codec.fit_statistics([(torch.rand(4, 32, 64, generator=torch.Generator().manual_seed(seed)) > 0.5).float()])
        _spread_answers(codec, seed)
    backbone.vae.save_pretrained(folder / "backbone" / "vae")
    drop_derived_settings(folder / "backbone" / "vae")
    card = ModelCard(
        name="tiny",
        version="1",
        modality="CT",
        structures=STRUCTURES,
        conditioning=branch.config,
        codec_mean=tuple(codec.mean.flatten().tolist()),
        codec_std=tuple(codec.std.flatten().tolist()),
        gate=0.1,
        backbone_digest=compute_backbone_digest(folder / "backbone"),
    )
    save_conditioning(folder, card, branch, {"note": "random weights"}, "# Random weights for tests\n", half=False)
    return folder


def add_tiny_close_up(folder: str | Path, seed: int = 0, calibration: Calibration | None = None) -> Path:
    """Give a model folder a close-up of toy width, with random weights in every layer that starts as zero.

    Args:
        folder: Of `build_tiny_model`.
        seed: Of the random weights.
        calibration: Of their agreement.
    """
    widths = DenoiserWidths(channels=(16, 16), heads=2)
    network = create_network(384, widths, seed, channels=(8, 8, 16), condition_width=16, injection_width=8)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    rules = WindowRules(size=32, large_size=48)
    note = {"note": "random weights"}
    card = CloseUpCard(network.config, rules, structures=STRUCTURES, facts=note, calibration=calibration)
    save_close_up(Path(folder), card, network, half=False)
    return Path(folder)


def build_tiny_denoiser(folder: str | Path, seed: int = 0, channels: tuple[int, ...] = (8, 16, 16, 16)) -> Path:
    """Write a pixel-space denoiser of toy width in diffusers format, for TextDiff.

    Args:
        folder: Where to write; must not exist.
        seed: Of the random weights.
        channels: Features per level, full resolution first; multiples of 8.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    from progidiff.textdiff.pretrain import write_denoiser

    torch.manual_seed(seed)
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels),
        norm_num_groups=8,
        add_attention=False,
    )
    write_denoiser(unet, DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear"), Path(folder))
    return Path(folder)


def write_blob_pictures(folder: str | Path, count: int = 4, size: int = 48, seed: int = 0) -> Path:
    """Write a toy MoNuSeg: ``images/``, ``labels/`` (0 and 255) and ``text.csv``; dark blobs on a pale, noisy ground.

    Args:
        folder: Made when needed.
        count: Pictures, ``a0.png`` upwards.
        size: Their sides.
        seed: Of the places of the blobs; each picture's sentence names the quarter where most of them lie.
    """
    import numpy as np
    from PIL import Image

    folder = Path(folder)
    rng = np.random.default_rng(seed)
    rows = ["image,text"]
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:size, :size]
    for number in range(count):
        right, lower = number % 2, number // 2 % 2
        mask = np.zeros((size, size), bool)
        for k in range(6):
            corner = (lower, right) if k < 5 else (1 - lower, 1 - right)
            centre = (rng.uniform(0.15, 0.4, 2) + 0.45 * np.array(corner)) * size
            mask |= (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (0.08 * size) ** 2
        picture = np.where(mask[..., None], (90, 50, 130), (230, 190, 215)) + rng.normal(0, 8, (size, size, 3))
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"a{number}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "labels" / f"a{number}.png")
        rows.append(f"a{number}.png,The density in the {('upper', 'lower')[lower]} {('left', 'right')[right]} is high.")
    (folder / "text.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _spread_answers(codec: MaskCodec, seed: int) -> None:
    """Spread what the random decoder answers around 0.5: as created, it lies close together on the side of "nothing
    here".
    """
    latents = torch.randn(16, codec.mean.shape[1], 4, 8, generator=torch.Generator().manual_seed(seed))
    answers = codec.decode_signed(latents)
    gain = 1 / float(answers.std())
    last = codec.vae.decoder.layers[-1]
    last.weight.mul_(gain)
    last.bias.mul_(gain).add_(0.5 - gain * (float(answers.median()) + 1) / 2)
