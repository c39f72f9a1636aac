"""The close-up of a model on disk, beside ``conditioning/``.

::

    <model folder>/close_up/
      config.json           shapes, codec, rules of the windows, and the conditioning that finds for it
      branch.safetensors    encoder, sharpened evidence, injection
      unet/, scheduler/     the denoiser, as diffusers writes it

A model folder without it answers from whole slices alone, as those of versions before 0.3 do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from progidiff.errors import ModelError
from progidiff.images.close_up import WindowRules
from progidiff.model.calibration import Calibration
from progidiff.model.close_up import CloseUpConfig, CloseUpNetwork, ShuffleCodec
from progidiff.model.folder import check_tensors, drop_derived_settings
from progidiff.storage.atomic import atomic_folder

FORMAT = 1
FOLDER = "close_up"


@dataclass(frozen=True)
class CloseUpCard:
    """``close_up/config.json``.

    Attributes:
        network: Shapes.
        rules: How windows are planned.
        num_inference_steps: Default for inference.
        finder: Digest of the conditioning whose evidence it was trained for; "" for any.
        structures: What it was trained on.
        facts: Where it comes from: data, command, figures.
        calibration: What turns the agreement of its proposals into a probability; None if nobody measured it.
    """

    network: CloseUpConfig
    rules: WindowRules = field(default_factory=WindowRules)
    num_inference_steps: int = 1
    finder: str = ""
    structures: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        return {
            "format": FORMAT,
            "codec": "shuffle",
            "network": self.network.to_dict(),
            "rules": asdict(self.rules),
            "num_inference_steps": self.num_inference_steps,
            "finder": self.finder,
            "structures": list(self.structures),
            "facts": self.facts,
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CloseUpCard:
        """The inverse of `to_dict`."""
        if values.get("format") != FORMAT:
            raise ModelError(
                f"This close-up has format {values.get('format')}, this program reads {FORMAT}; install the version "
                "that wrote it."
            )
        return cls(
            network=CloseUpConfig.from_dict(values["network"]),
            rules=WindowRules(**values["rules"]),
            num_inference_steps=int(values["num_inference_steps"]),
            finder=str(values["finder"]),
            structures=tuple(values["structures"]),
            facts=dict(values["facts"]),
            calibration=Calibration.from_dict(values["calibration"]) if "calibration" in values else None,
        )


def has_close_up(folder: Path) -> bool:
    """Whether a model folder has a close-up."""
    return (folder / FOLDER / "config.json").is_file()


def compute_close_up_digest(folder: Path) -> str:
    """SHA-256 of the weights in ``close_up/`` of a model folder.

    Raises:
        ModelError: if they cannot be read.
    """
    state = hashlib.sha256()
    try:
        for path in sorted((folder / FOLDER).rglob("*.safetensors")):
            state.update(path.name.encode() + path.read_bytes())
    except OSError as err:
        raise ModelError(
            f"'{folder / FOLDER}' cannot be read: {err}. Restore it from the version it came with."
        ) from err
    return state.hexdigest()


def load_close_up_card(folder: Path) -> CloseUpCard:
    """Read ``close_up/config.json`` of a model folder.

    Raises:
        ModelError: if it cannot be read.
    """
    path = folder / FOLDER / "config.json"
    try:
        return CloseUpCard.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"'{path}' cannot be read: {err}. Restore it from the version it came with.") from err


def load_close_up(folder: Path, device: torch.device) -> tuple[CloseUpCard, CloseUpNetwork]:
    """Load the close-up of a model folder, in fp32.

    Raises:
        ModelError: if a file is missing or damaged, or a tensor is left over or missing.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    place = folder / FOLDER
    card = load_close_up_card(folder)
    try:
        unet = UNet2DConditionModel.from_pretrained(place / "unet", use_safetensors=True, local_files_only=True)
        scheduler = DDIMScheduler.from_pretrained(place / "scheduler", local_files_only=True)
        tensors = load_file(place / "branch.safetensors")
    except Exception as err:  # diffusers and safetensors raise errors of many types for missing and truncated files
        raise ModelError(f"'{place}' cannot be read ({err}); restore it from the version it came with.") from err
    network = CloseUpNetwork(card.network, unet.float(), ShuffleCodec(card.network.latent_stride), scheduler)
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith("unet.")}
    check_tensors(tensors, wanted, place / "branch.safetensors")
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return card, network.to(device).eval().requires_grad_(False)


def save_close_up(folder: Path, card: CloseUpCard, network: CloseUpNetwork, half: bool = True) -> Path:
    """Write ``close_up/`` of a model folder; an existing one is moved aside, never overwritten.

    Args:
        folder: The model folder.
        half: Store fp16, half the size.
    """
    dtype = torch.float16 if half else torch.float32
    target = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target, existing="replace", previous=target.with_name(f".{FOLDER}.previous")) as scratch:
        save_file(
            {
                name: value.detach().to("cpu", dtype).contiguous()
                for name, value in network.state_dict().items()
                if not name.startswith("unet.")
            },
            scratch / "branch.safetensors",
        )
        unet = network.unet.half() if half else network.unet
        unet.save_pretrained(scratch / "unet", max_shard_size="15MB", safe_serialization=True)
        drop_derived_settings(scratch / "unet")
        network.unet.float()
        network.scheduler.save_pretrained(scratch / "scheduler")
        (scratch / "config.json").write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
    return target
