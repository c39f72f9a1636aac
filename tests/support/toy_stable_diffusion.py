"""Stable Diffusion in every part and at toy width: KL autoencoder, CLIP, a denoiser that predicts the noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.close_up_backbone import create_network_on
from progidiff.model.close_up_folder import CloseUpCard, save_close_up
from progidiff.model.folder import ModelCard, compute_backbone_digest, save_conditioning
from progidiff.prompts.structures import STRUCTURES
from progidiff.training.build_model import create_branch

SD15_SCHEDULER: dict[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
"""scheduler/scheduler_config.json of Stable Diffusion 1.5."""

TOY_UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
"""8 x 8 latents, 64 x 64 pixels."""

TOY_VAE: dict[str, Any] = {
    "block_out_channels": (8,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 64,
    "scaling_factor": 0.18215,
}


def write_clip(folder: Path, width: int, layers: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
    """A CLIP text encoder with random weights and a tokenizer that knows single letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = {
        t: i for i, t in enumerate([*letters, *(f"{c}</w>" for c in letters), "li", "<|startoftext|>", "<|endoftext|>"])
    }
    source = folder / "letters"
    source.mkdir(parents=True)
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\nl i\n")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    CLIPTokenizer.from_pretrained(source).save_pretrained(folder / "tokenizer")
    shutil.rmtree(source)
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=77,
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
        pad_token_id=vocabulary["<|endoftext|>"],
    )
    CLIPTextModel(config).to(dtype).save_pretrained(folder / "text_encoder")


def write_toy_stable_diffusion(
    folder: Path, seed: int = 0, scheduler: dict[str, Any] | None = None, **unet: Any
) -> Path:
    """A complete folder in diffusers format; `unet` and `scheduler` change settings of the denoiser and its noise."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(seed)
    UNet2DConditionModel(**{**TOY_UNET, **unet}).save_pretrained(folder / "unet")
    AutoencoderKL(**TOY_VAE).save_pretrained(folder / "vae")
    write_clip(folder, width=32, layers=1, heads=2)
    (folder / "scheduler").mkdir()
    settings = {**SD15_SCHEDULER, **(scheduler or {})}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings))
    return folder


def write_toy_model(folder: Path, source: Path) -> Path:
    """A model folder as of ``progidiff train --backbone source``: conditioning and close-up, random in every layer that
    starts as zero; about half of an image looks like whatever is asked for.
    """
    backbone = Backbone(source, "cpu", "fp32")
    branch = create_branch(backbone, 32, 64, (4.0, 12.0), 0, channels=(8, 8, 16, 16, 16), evidence_channels=16)
    network = create_network_on(backbone, channels=(8, 8, 16, 16, 16), condition_width=16, injection_width=8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        branch.query_head.text[-1].get_parameter("bias")[-1] = 0.5
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    digest = compute_backbone_digest(source)
    card = ModelCard(
        name="toy-sd",
        version="1",
        modality="CT",
        structures=STRUCTURES,
        conditioning=branch.config,
        codec_mean=(0.0,) * 4,
        codec_std=(1.0,) * 4,
        gate=0.1,
        backbone_digest=digest,
    )
    save_conditioning(folder, card, branch, {"note": "random weights"}, "# Random weights for tests\n", half=False)
    rules = WindowRules().at_size(network.config.native_size)
    drawing = CloseUpCard(network.config, rules, structures=STRUCTURES, backbone_digest=digest)
    save_close_up(folder, drawing, network, half=False)
    return folder
