"""A trained version's tensors as the files that others read: PEFT folders for low-rank updates, diffusers' for whole
networks.

::

    kind "lora"   adapter_config.json, adapter_model.safetensors           of the conditioning branch
                  unet/adapter_config.json, unet/adapter_model.safetensors if the denoiser is adapted
    kind "full"   config.json, diffusion_pytorch_model.safetensors         of the conditioning branch

``PeftModel.from_pretrained(ConditioningModel.from_pretrained(...), folder)`` loads the one,
``ConditioningModel.from_pretrained(folder)`` the other. Norm layers that were trained along are PEFT's
``modules_to_save``.

Inside the program tensors are named as in `progidiff.model.lora`, ``branch.<name>`` and ``unet.<name>``. PEFT is not
needed here: its files are JSON and safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from progidiff.errors import ModelError
from progidiff.model.conditioning import ConditioningConfig
from progidiff.model.folder import CONFIG, WEIGHTS, describe_branch
from progidiff.model.lora import LoraSettings

PEFT_CONFIG = "adapter_config.json"

PEFT_WEIGHTS = "adapter_model.safetensors"

NETWORKS = {"branch": "", "unet": "unet/"}
"""The prefixes of tensors, and where in a version's folder they lie."""

_PEFT_PREFIX = "base_model.model."

_CLASSES = {
    "branch": ("ConditioningModel", "progidiff.model.conditioning_model"),
    "unet": ("UNet2DConditionModel", "diffusers"),
}


def list_weights(kind: str, networks: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the files with weights.

    Example:
        >>> list_weights("lora", ("branch", "unet"))
        ('adapter_model.safetensors', 'unet/adapter_model.safetensors')
    """
    return tuple(NETWORKS[network] + (PEFT_WEIGHTS if kind == "lora" else WEIGHTS) for network in networks)


def list_configs(kind: str, networks: tuple[str, ...]) -> tuple[str, ...]:
    """The names of the files beside them.

    Example:
        >>> list_configs("full", ("branch",))
        ('config.json',)
    """
    return tuple(NETWORKS[network] + (PEFT_CONFIG if kind == "lora" else CONFIG) for network in networks)


def find_networks(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The prefixes that occur.

    Raises:
        ModelError: if a tensor has none of `NETWORKS`.
    """
    found = {name.partition(".")[0] for name in tensors}
    if not found or found - set(NETWORKS):
        strange = ", ".join(sorted(found - set(NETWORKS))[:3]) or "nothing"
        raise ModelError(f"A version holds tensors of {' and '.join(NETWORKS)}, got {strange}.")
    return tuple(network for network in NETWORKS if network in found)


def pack_weights(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The files with weights, by name.

    Args:
        kind: "lora" or "full".
        tensors: From `lora.collect_tensors` or `lora.collect_full`.
    """
    inner = _PEFT_PREFIX if kind == "lora" else ""
    networks = find_networks(tensors)
    return {
        name: save_safetensors({inner + n: t.contiguous() for n, t in _of(tensors, network)}, metadata={"format": "pt"})
        for network, name in zip(networks, list_weights(kind, networks), strict=True)
    }


def unpack_weights(kind: str, networks: tuple[str, ...], contents: Mapping[str, bytes]) -> dict[str, Tensor]:
    """The inverse of `pack_weights`.

    Raises:
        ModelError: if a tensor is not named as PEFT names them.
    """
    tensors = {}
    for network, file in zip(networks, list_weights(kind, networks), strict=True):
        for name, tensor in load_safetensors(contents[file]).items():
            if kind == "lora" and not name.startswith(_PEFT_PREFIX):
                raise ModelError(f"'{file}' holds '{name}', which is no tensor of a PEFT adapter; restore the version.")
            tensors[f"{network}.{name.removeprefix(_PEFT_PREFIX) if kind == 'lora' else name}"] = tensor
    return tensors


def describe_lora(tensors: Mapping[str, Tensor], settings: LoraSettings, base_name: str) -> dict[str, Any]:
    """adapter_config.json of every network that is adapted, by file name.

    Which layers are adapted follows from the tensors: a pair of factors, or a norm layer as a whole.
    """
    networks = find_networks(tensors)
    found = {}
    for network, file in zip(networks, list_configs("lora", networks), strict=True):
        names = [name for name, _ in _of(tensors, network)]
        whole = sorted({name.rpartition(".")[0] for name in names if ".lora_" not in name})
        base_class, library = _CLASSES[network]
        found[file] = {
            "peft_type": "LORA",
            "auto_mapping": {"base_model_class": base_class, "parent_library": library},
            "base_model_name_or_path": base_name,
            "r": settings.rank,
            "lora_alpha": settings.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted(name.partition(".lora_A.")[0] for name in names if ".lora_A." in name),
            "modules_to_save": whole or None,
            "inference_mode": True,
            "task_type": None,
        }
    return found


def describe_full(shapes: ConditioningConfig) -> dict[str, Any]:
    """config.json of a branch whose weights are all replaced, by file name."""
    return {CONFIG: describe_branch(shapes)}


def pack_configs(configs: Mapping[str, Any]) -> dict[str, bytes]:
    """JSON files, by name."""
    return {name: (json.dumps(values, indent=2) + "\n").encode() for name, values in configs.items()}


def _of(tensors: Mapping[str, Tensor], network: str) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition(".")
        if prefix == network:
            yield rest, tensor
