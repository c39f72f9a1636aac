"""The close-up on a Stable-Diffusion folder: its autoencoder, its text encoder, and its denoiser at its native size.

The backbone stays as it is. What is new is a `CloseUpNetwork` whose latents are those that the denoiser was trained on
(`progidiff.model.codec.AutoencoderCodec`) and whose injection fits its skips and its middle, as a ControlNet's does
(arXiv 2302.05543). Fresh, the injection is zero: the denoiser answers bit for bit what it answers without it.

A close-up fills the canvas, as in the pictures that such a denoiser was trained on: windows show the same part of the
body as those of the embedded denoiser, in as many pixels as the denoiser is made for (`WindowRules.at_size`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from progidiff.errors import ModelError, RequestError
from progidiff.model.backbone import Backbone
from progidiff.model.close_up import CloseUpConfig, CloseUpNetwork
from progidiff.model.codec import AutoencoderCodec

TIMES = 1000
"""Timesteps that `CloseUpConfig.start_time` is one of."""

LARGEST = 2048
"""Pixels along both axes of a window, at most."""


def create_network_on(
    backbone: Backbone, pixels: int | None = None, seed: int = 0, **changes: object
) -> CloseUpNetwork:
    """A fresh close-up network on a backbone's own denoiser, which is frozen and shared.

    Args:
        backbone: Any Stable-Diffusion folder whose denoiser is conditioned on text alone.
        pixels: Of a window along both axes; None for the denoiser's native size.
        seed: Of encoder and injection.
        changes: Further fields of `CloseUpConfig`.

    Raises:
        ModelError: if the parts of the backbone do not fit together, or the denoiser wants more than latents and text.
        RequestError: if windows cannot have so many pixels, or the backbone names no size.
    """
    from diffusers import DDIMScheduler

    config = plan_network_on(backbone, pixels, **changes)
    torch.manual_seed(seed)
    return build_network_on(config, backbone, DDIMScheduler.from_config(backbone.scheduler_config))


def plan_network_on(backbone: Backbone, pixels: int | None = None, **changes: object) -> CloseUpConfig:
    """Shapes of `create_network_on`, with the same arguments and errors; loads no denoiser."""
    check_denoiser(backbone)
    size = find_native_size(backbone) if pixels is None else pixels
    config = CloseUpConfig.from_dict({**_list_shapes(backbone), "native_size": size, **changes})
    if "channels" not in changes:
        # The denoiser's coarsest slots read a level of their own stride.
        missing = max(config.slot_strides).bit_length() - len(config.channels)
        config = replace(config, channels=(*config.channels, *config.channels[-1:] * missing))
    step = max(*config.slot_strides, 2 ** (len(config.channels) - 1))
    if not step <= size <= LARGEST or size % step:
        raise RequestError(
            f"Windows of {size} pixels do not fit this denoiser: close_up.pixels must be a multiple of {step} from "
            f"{step} to {LARGEST}."
        )
    return config


def _list_shapes(backbone: Backbone) -> dict[str, Any]:
    """Fields of `CloseUpConfig` that a backbone decides."""
    channels, strides = backbone.residual_slots()
    return {
        "text_features": backbone.text_features,
        "slot_channels": channels,
        "slot_strides": strides,
        "latent_channels": int(backbone.unet_config["in_channels"]),
        "latent_stride": backbone.latent_stride,
    }


def build_network_on(config: CloseUpConfig, backbone: Backbone, scheduler: Any) -> CloseUpNetwork:
    """The network of a configuration on a backbone; encoder and injection as created, on the backbone's device.

    Args:
        config: Shapes.
        backbone: Whose denoiser draws.
        scheduler: Of diffusers, with the noise levels and the kind of prediction that the denoiser was trained with.

    Raises:
        ModelError: if they do not fit, or the parts of the backbone do not fit together.
    """
    check_denoiser(backbone)
    other = [
        f"{name} {getattr(config, name)} and not {value}"
        for name, value in _list_shapes(backbone).items()
        if getattr(config, name) != value
    ]
    if other:
        raise ModelError(
            f"This close-up does not fit the backbone '{backbone.source}': it was made for {'; '.join(other)}. Name "
            "the backbone that it was trained with."
        )
    unet, codec = _freeze(backbone)
    return CloseUpNetwork(config, unet, codec, scheduler, shares_denoiser=True).to(backbone.device)


def lend_denoiser(network: CloseUpNetwork, backbone: Backbone) -> None:
    """Have a network draw with the parts of a backbone as they are now, frozen."""
    network.lend(*_freeze(backbone))


def _freeze(backbone: Backbone) -> tuple[Any, AutoencoderCodec]:
    """Denoiser and codec of a backbone, which nothing trains."""
    unet, vae = (part.eval().requires_grad_(False) for part in (backbone.unet, backbone.vae))
    return unet, AutoencoderCodec(vae)


@contextlib.contextmanager
def recomputing(network: CloseUpNetwork) -> Iterator[None]:
    """Keep only what enters the blocks of the backbone's networks for the backward pass, and compute the rest again
    (gradient checkpointing): the gradients are the same.
    """
    parts = (network.unet, network.codec.vae) if isinstance(network.codec, AutoencoderCodec) else (network.unet,)
    for part in parts:
        part.enable_gradient_checkpointing()
    try:
        yield
    finally:
        for part in parts:
            part.disable_gradient_checkpointing()


def find_native_size(backbone: Backbone) -> int:
    """Pixels along both axes that the denoiser of a backbone is made for: its `sample_size` in pixels, 512 of Stable
    Diffusion 1.5.

    Raises:
        RequestError: if the backbone does not say.
    """
    size = backbone.unet_config.get("sample_size")
    if isinstance(size, (list, tuple)) and size:
        size = min(size)  # Windows are square.
    if not isinstance(size, int) or size < 1:
        raise RequestError(
            f"The denoiser of '{backbone.source}' names no sample_size, so nobody knows what size it is made for: set "
            "close_up.pixels, for example close_up.pixels=256."
        )
    return size * backbone.latent_stride


def check_denoiser(backbone: Backbone) -> None:
    """Check that a backbone's parts fit together, and that its denoiser wants latents, a time and text alone.

    Raises:
        ModelError: saying what is in the way.
    """
    config, vae = backbone.unet_config, backbone.vae.config
    more = [name for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type") if config.get(name)]
    found, wanted = int(config["in_channels"]), int(vae.latent_channels)
    text = config.get("cross_attention_dim", backbone.text_features)
    times = int(backbone.scheduler_config.get("num_train_timesteps", TIMES))
    problem = ""
    if more:
        problem = f"wants more than text ({', '.join(more)}), as that of Stable Diffusion XL does"
    elif found != wanted or int(config["out_channels"]) != wanted:
        problem = f"reads {found} channels and the autoencoder makes {wanted}, as those that paint over pictures do"
    elif text != backbone.text_features:
        problem = f"reads texts of {text} features and the text encoder makes {backbone.text_features}"
    elif times < TIMES:
        problem = f"was trained with {times} timesteps, and close-ups name theirs of {TIMES}"
    if problem:
        raise ModelError(
            f"The denoiser of '{backbone.source}' {problem}. Close-ups are drawn by text-to-image models like Stable "
            "Diffusion 1.5 and 2.1; or set close_up.denoiser=own for the small one."
        )
