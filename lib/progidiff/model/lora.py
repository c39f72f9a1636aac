"""Low-rank adapters on the conditioning branch and, where asked, on the denoiser's attention; built with peft.

An adapter's tensors are named after what they change: ``branch.<module>.lora_A.weight``,
``branch.<module>.lora_B.weight`` (``unet.`` for the denoiser), and ``branch.<module>.weight`` / ``.bias`` for norm
layers that were trained along. The names follow from the settings and the base alone, so loading compares two complete
lists and refuses anything between.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from progidiff.errors import ModelError, RequestError
from progidiff.model.conditioning import ConditioningBranch
from progidiff.model.folder import check_tensors

TARGETS = ("encoder", "query_head", "injection", "denoiser")
"""Parts that can be adapted: the image encoder, the text-query head, the layers that feed the denoiser, the denoiser's
attention.
"""

INJECTION = ("evidence_in", "image_in", "evidence_down", "mix", "zero")

_ADAPTER = "default"


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and with how many parameters.

    Attributes:
        rank: Of the update of every adapted layer, 1..128.
        alpha: The update counts alpha / rank times.
        target_modules: Some of `TARGETS`.
        norms: Train the gains and offsets of the encoder's group norms too: another modality is first of all another
            distribution of intensities.
    """

    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] = ("encoder", "query_head")
    norms: bool = True

    def check(self) -> None:
        """Refuse settings out of range.

        Raises:
            RequestError: naming the setting.
        """
        if not 1 <= self.rank <= 128:
            raise RequestError(f"The rank must lie in 1..128, got {self.rank}; 4 to 16 are useful.")
        if not 0 < self.alpha <= 1024:
            raise RequestError(
                f"alpha must lie above 0 and up to 1024, got {self.alpha}; once or twice the rank is useful."
            )
        unknown = [t for t in self.target_modules if t not in TARGETS]
        if unknown or not self.target_modules:
            raise RequestError(
                f"Targets {', '.join(unknown) or '(none)'} cannot be adapted; choose some of {', '.join(TARGETS)}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "target_modules": list(self.target_modules)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraSettings:
        """The inverse of `to_dict`."""
        return cls(
            int(values["rank"]),
            float(values["alpha"]),
            tuple(map(str, values["target_modules"])),
            bool(values["norms"]),
        )


def inject_lora(
    branch: ConditioningBranch, unet: nn.Module | None, settings: LoraSettings, seed: int = 0
) -> dict[str, nn.Module]:
    """Put adapters into the networks, in place; everything but them (and the norms) is frozen.

    A fresh adapter changes nothing: the second factor of every update is zero.

    Args:
        branch: Of the base model.
        unet: The denoiser; only changed if "denoiser" is a target.
        settings: What to adapt.
        seed: Of the first factors.

    Returns:
        The networks that now hold something to train, by the prefix of their tensors: "branch", "unet".
    """
    from peft import LoraConfig, inject_adapter_in_model

    settings.check()
    branch.requires_grad_(False)
    networks: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for prefix, network, names in (
            ("branch", branch, _branch_targets(branch, settings)),
            (
                "unet",
                unet,
                _denoiser_targets(unet) if unet is not None and "denoiser" in settings.target_modules else [],
            ),
        ):
            if network is None or not names:
                continue
            network.requires_grad_(False)
            config = LoraConfig(
                r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=names, bias="none"
            )
            inject_adapter_in_model(config, network, adapter_name=_ADAPTER)
            networks[prefix] = network
    for parameter in _norm_parameters(branch, settings).values():
        parameter.requires_grad_(True)
        networks.setdefault("branch", branch)
    return networks


def named_adapter_parameters(
    branch: nn.Module, unet: nn.Module | None, settings: LoraSettings
) -> dict[str, nn.Parameter]:
    """The parameters that an adapter consists of, in networks that `inject_lora` has changed."""
    found: dict[str, nn.Parameter] = {}
    for prefix, network in (("branch", branch), ("unet", unet)):
        if network is not None:
            for name, parameter in network.named_parameters():
                if ".lora_" in name:
                    found[f"{prefix}.{name.replace(f'.{_ADAPTER}.', '.')}"] = parameter
    found.update({f"branch.{name}": p for name, p in _norm_parameters(branch, settings).items()})
    return found


def collect_tensors(
    branch: nn.Module, unet: nn.Module | None, settings: LoraSettings, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """The adapter's tensors on the CPU, as they are kept on disk."""
    return {
        n: p.detach().to("cpu", dtype).contiguous().clone()
        for n, p in named_adapter_parameters(branch, unet, settings).items()
    }


@torch.no_grad()
def load_tensors(
    tensors: Mapping[str, Tensor], branch: nn.Module, unet: nn.Module | None, settings: LoraSettings, path: Path
) -> None:
    """Copy an adapter's tensors into networks that `inject_lora` has changed.

    Args:
        path: Where the tensors come from, for the message.

    Raises:
        ModelError: if any tensor is missing, left over, of another shape or not finite; nothing is changed then.
    """
    wanted = named_adapter_parameters(branch, unet, settings)
    check_tensors(tensors, wanted, path)
    _check_finite(tensors, path)
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name].to(parameter.dtype))


def merge_lora(
    tensors: Mapping[str, Tensor],
    branch: ConditioningBranch,
    unet: nn.Module | None,
    settings: LoraSettings,
    path: Path,
) -> tuple[ConditioningBranch, nn.Module | None]:
    """Adapted copies of the networks, with the updates merged into their weights.

    Merged and not kept beside the weights: inference then costs exactly what the base costs (two further convolutions
    per layer would make the encoder about 1.4 times slower), and nothing of peft is left in a network that serves. Into
    copies and not in
    place: the base stays bit for bit what it was, so requests may go back and forth between adapters, and no rounding
    piles up from merging and unmerging. A copy of the branch takes some 20 MB.

    Returns:
        The branch, and the denoiser if the adapter changes it, else None.
    """
    adapted = copy.deepcopy(branch)
    denoiser = copy.deepcopy(unet) if unet is not None and "denoiser" in settings.target_modules else None
    inject_lora(adapted, denoiser, settings)
    load_tensors(tensors, adapted, denoiser, settings, path)
    for network in (adapted, denoiser):
        if network is not None:
            _merge(network)
            network.eval().requires_grad_(False)
    return adapted, denoiser


def load_full(
    tensors: Mapping[str, Tensor], branch: ConditioningBranch, unet: nn.Module | None, path: Path
) -> tuple[ConditioningBranch, nn.Module | None]:
    """Copies of the networks with all weights replaced, for a version of kind "full".

    Raises:
        ModelError: if any tensor is missing, left over, of another shape or not finite.
    """
    adapted = copy.deepcopy(branch)
    denoiser = copy.deepcopy(unet) if unet is not None and any(name.startswith("unet.") for name in tensors) else None
    copy_full(tensors, adapted, denoiser, path)
    return adapted, denoiser


@torch.no_grad()
def copy_full(tensors: Mapping[str, Tensor], branch: nn.Module, unet: nn.Module | None, path: Path) -> None:
    """Replace all weights of the networks, in place.

    Raises:
        ModelError: if any tensor is missing, left over, of another shape or not finite; nothing is changed then.
    """
    wanted = {f"branch.{n}": t for n, t in branch.state_dict().items()}
    if unet is not None:
        wanted.update({f"unet.{n}": t for n, t in unet.state_dict().items()})
    check_tensors(tensors, wanted, path)
    _check_finite(tensors, path)
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name].to(tensor.dtype))


def collect_full(
    branch: nn.Module, unet: nn.Module | None = None, dtype: torch.dtype = torch.float16
) -> dict[str, Tensor]:
    """All tensors of the branch (and of the denoiser), for a version of kind "full"."""
    networks = {"branch": branch} if unet is None else {"branch": branch, "unet": unet}
    return {
        f"{p}.{n}": t.detach().to("cpu", dtype).contiguous().clone()
        for p, m in networks.items()
        for n, t in m.state_dict().items()
    }


def _check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"'{path}' holds numbers that are not finite ({broken[0]} and {len(broken) - 1} more); use another version."
        )


def _merge(network: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, module.get_base_layer())


def _branch_targets(branch: nn.Module, settings: LoraSettings) -> list[str]:
    """Full names of the branch's linear and convolution layers that are targets; transposed ones are left as they
    are.
    """
    roots: list[str] = []
    for target in settings.target_modules:
        roots += {"encoder": ["encoder"], "query_head": ["query_head"], "injection": list(INJECTION)}.get(target, [])
    return [
        name
        for name, module in branch.named_modules()
        if type(module) in (nn.Conv2d, nn.Linear) and name.split(".")[0] in roots
    ]


def _denoiser_targets(unet: nn.Module) -> list[str]:
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    return [name for name, module in unet.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]


def _norm_parameters(branch: nn.Module, settings: LoraSettings) -> dict[str, nn.Parameter]:
    if not settings.norms or "encoder" not in settings.target_modules:
        return {}
    return {
        f"{name}.{kind}": parameter
        for name, module in branch.named_modules()
        if isinstance(module, nn.GroupNorm) and name.startswith("encoder.")
        for kind, parameter in module.named_parameters(recurse=False)
    }
