"""The conditioning branch as a model of diffusers: `from_pretrained`, `save_pretrained`, `config`.

A module of its own, because diffusers takes seconds to import: whoever only reads a model's card, or never opens the
networks, does without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from progidiff.errors import ModelError
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.model.folder import is_former, load_branch


class ConditioningModel(ConditioningBranch, ModelMixin, ConfigMixin):
    """`ConditioningBranch` as diffusers keeps its models: config.json and diffusion_pytorch_model.safetensors.

    Args:
        height, width, spacing_range, text_features, slot_channels, slot_strides, latent_stride, num_neighbours,
            neighbour_mm, mr_headroom, channels, query_level, evidence_channels: See `ConditioningConfig`.

    Example:
        >>> model = ConditioningModel(32, 64, (4.0, 12.0), 8, (4,), (8,), channels=(8, 8, 8, 8))
        >>> model.config.height, model.config["channels"]
        (32, (8, 8, 8, 8))
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        height: int,
        width: int,
        spacing_range: tuple[float, float],
        text_features: int,
        slot_channels: tuple[int, ...],
        slot_strides: tuple[int, ...],
        latent_stride: int = 8,
        num_neighbours: int = 1,
        neighbour_mm: float = 4.0,
        mr_headroom: float = 1.0,
        channels: tuple[int, ...] = (16, 32, 64, 128, 256, 256),
        query_level: int = 2,
        evidence_channels: int = 96,
    ) -> None:
        values = locals()
        super().__init__(ConditioningConfig.from_dict({name: values[name] for name in ConditioningConfig.names()}))

    @property
    def config(self) -> Any:
        """What it was made from, as diffusers gives it: by attribute and by key."""
        return ConfigMixin.config.fget(self)

    @classmethod
    def from_branch(cls, branch: ConditioningBranch) -> ConditioningModel:
        """A copy of a branch; its weights are those of the copy too until one of them is trained or moved."""
        model = cls(**branch.shapes.to_dict())
        model.load_state_dict(branch.state_dict(), assign=True)
        return model.eval().requires_grad_(False)  # type: ignore[no-any-return]

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Any:
        """Load weights, all of them or none.

        Args:
            source: ``conditioning/`` of a model folder, also as versions up to 0.2 wrote it, or the id of a repository
                on the model hub.
            options: As of every model of diffusers: ``torch_dtype``, ``subfolder``, ``device_map`` and so on.

        Raises:
            ModelError: if a tensor is missing, left over or of another shape.
        """
        folder = Path(source) / (options.get("subfolder") or "")
        if is_former(folder):
            model = cls.from_branch(load_branch(folder))
            nn.Module.to(model, options.get("torch_dtype") or options.get("dtype") or torch.float32)
            found: dict[str, Any] = {}
        else:
            is_told = options.pop("output_loading_info", False)
            try:
                model, found = super().from_pretrained(source, output_loading_info=True, **options)
            except ValueError as err:  # diffusers, of a tensor of another shape
                raise ModelError(f"'{folder}' cannot be loaded: {err}") from err
            if is_told:
                return model, found
        wrong = {kind: names for kind, names in found.items() if names}
        if wrong:
            told = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(map(str, names))}" for kind, names in wrong.items())
            raise ModelError(f"'{folder}' does not fit its config.json ({told[:300]}). Restore both from one version.")
        return model.eval().requires_grad_(False)
