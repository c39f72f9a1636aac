"""Real models of toy width, for tests: the same classes and files as the embedded model, random weights."""

from __future__ import annotations

from pathlib import Path

import torch

from progidiff.backbone import Backbone
from progidiff.codec import MaskCodec
from progidiff.model_files import ModelCard, compute_backbone_digest, drop_derived_settings, save_conditioning
from progidiff.prompts import STRUCTURES
from progidiff.training.architecture import BackboneWidths, create_backbone, create_branch

TOY_WIDTHS = BackboneWidths(codec_channels=8, codec_blocks=(1, 1, 1, 1), latent_channels=4, denoiser_channels=(32, 32), heads=2)


def build_tiny_model(folder: str | Path, seed: int = 0, evidence_bias: float = 0.5) -> Path:
    """Write a complete model folder of toy width, whose masks are blots.

    Args:
        folder: Where to write; must not exist.
        seed: Of the random weights.
        evidence_bias: Shifts the text-query head so that about half of the pixels pass the presence gate; a fresh head finds
            everything absent, which would leave the denoiser untested.
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


def _spread_answers(codec: MaskCodec, seed: int) -> None:
    """Spread what the random decoder answers around 0.5: as created, it lies close together on the side of "nothing here"."""
    latents = torch.randn(16, codec.mean.shape[1], 4, 8, generator=torch.Generator().manual_seed(seed))
    answers = codec.decode_signed(latents)
    gain = 1 / float(answers.std())
    last = codec.vae.decoder.layers[-1]
    last.weight.mul_(gain)
    last.bias.mul_(gain).add_(0.5 - gain * (float(answers.median()) + 1) / 2)
