"""The close-up of a model on disk, beside ``conditioning/``.

::

    <model folder>/close_up/
      config.json           shapes, codec, rules of the windows, and the conditioning that finds for it
      branch.safetensors    encoder, sharpened evidence, injection
      unet/, scheduler/     the denoiser, as diffusers writes it

A close-up that draws with the denoiser of a backbone (`progidiff.model.close_up_backbone`) has no ``unet/``:
config.json says that denoiser and codec are the backbone's, and which backbone it is, by content.

A model folder without it answers from whole slices alone, as those of versions before 0.3 do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from progidiff.errors import ModelError
from progidiff.images.close_up import WindowRules
from progidiff.model.backbone import Backbone
from progidiff.model.calibration import Calibration
from progidiff.model.close_up import CloseUpConfig, CloseUpNetwork, ShuffleCodec
from progidiff.model.close_up_backbone import build_network_on
from progidiff.model.folder import check_tensors, check_trained_with, drop_derived_settings
from progidiff.storage.atomic import atomic_folder

Denoiser = Literal["own", "backbone"]

FORMATS = {"own": 1, "backbone": 2}
"""What is written, by whose the denoiser is. Programs that read the first alone refuse the second by its number."""

CODECS = {"own": "shuffle", "backbone": "autoencoder"}
"""The same of the codec: `ShuffleCodec` or `AutoencoderCodec`."""

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
        presence: What its sharpened evidence must reach on a slice, see `CloseUpPipeline`; 0 for anything.
        denoiser: Whose it is: of the close-up alone, or the backbone's, as the codec is then.
        backbone_digest: Content of the backbone, if the denoiser is that one's; see `compute_backbone_digest`.
        backbone_copies: Content of files that hold the same backbone, written again in another precision.
    """

    network: CloseUpConfig
    rules: WindowRules = field(default_factory=WindowRules)
    num_inference_steps: int = 1
    finder: str = ""
    structures: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    presence: float = 0.0
    denoiser: Denoiser = "own"
    backbone_digest: str = ""
    backbone_copies: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        whose: dict[str, Any] = {}
        if self.denoiser == "backbone":
            whose = {
                "denoiser": "backbone",
                "backbone_digest": self.backbone_digest,
                "backbone_copies": list(self.backbone_copies),
            }
        return {
            "format": FORMATS[self.denoiser],
            "codec": CODECS[self.denoiser],
            **whose,
            "network": self.network.to_dict(),
            "rules": asdict(self.rules),
            "num_inference_steps": self.num_inference_steps,
            "finder": self.finder,
            "structures": list(self.structures),
            "facts": self.facts,
            **({} if self.calibration is None else {"calibration": self.calibration.to_dict()}),
            **({"presence": self.presence} if self.presence else {}),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CloseUpCard:
        """The inverse of `to_dict`."""
        whose = values.get("denoiser", "own")
        if whose not in FORMATS or values.get("format") != FORMATS[whose]:
            raise ModelError(
                f"This close-up has format {values.get('format')} (denoiser: {whose}), this program reads "
                f"{' and '.join(map(str, FORMATS.values()))}; install the version that wrote it."
            )
        return cls(
            network=CloseUpConfig.from_dict(values["network"]),
            rules=WindowRules(**values["rules"]),
            num_inference_steps=int(values["num_inference_steps"]),
            finder=str(values["finder"]),
            structures=tuple(values["structures"]),
            facts=dict(values["facts"]),
            calibration=Calibration.from_dict(values["calibration"]) if "calibration" in values else None,
            presence=float(values.get("presence", 0.0)),
            denoiser=whose,
            backbone_digest=str(values["backbone_digest"]) if whose == "backbone" else "",
            backbone_copies=tuple(values["backbone_copies"]) if whose == "backbone" else (),
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


def load_close_up(
    folder: Path, device: torch.device, backbone: Backbone | None = None
) -> tuple[CloseUpCard, CloseUpNetwork]:
    """Load the close-up of a model folder, in fp32.

    Args:
        folder: The model folder.
        device: For the network; a backbone's denoiser stays where it is.
        backbone: Of the model. One whose close-up has a denoiser of its own does without.

    Raises:
        ModelError: if a file is missing or damaged, a tensor is left over or missing, or it draws with the denoiser of
            a backbone, and that is another one or none was given.
    """
    from diffusers import DDIMScheduler, UNet2DConditionModel

    place, card = folder / FOLDER, load_close_up_card(folder)
    with _reading(place):
        tensors = load_file(place / "branch.safetensors")
        scheduler = DDIMScheduler.from_pretrained(place / "scheduler", local_files_only=True)
    if card.denoiser == "own":
        with _reading(place):
            unet = UNet2DConditionModel.from_pretrained(place / "unet", use_safetensors=True, local_files_only=True)
        network = CloseUpNetwork(card.network, unet.float(), ShuffleCodec(card.network.latent_stride), scheduler)
    else:
        network = _build_shared(place, card, backbone, scheduler)
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith("unet.")}
    check_tensors(tensors, wanted, place / "branch.safetensors")
    network.load_state_dict({name: value.float() for name, value in tensors.items()}, strict=False)
    return card, network.to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Say what to do where files are missing or damaged."""
    try:
        yield
    except Exception as err:  # diffusers and safetensors raise errors of many types for missing and truncated files
        raise ModelError(f"'{place}' cannot be read ({err}); restore it from the version it came with.") from err


def _build_shared(place: Path, card: CloseUpCard, backbone: Backbone | None, scheduler: Any) -> CloseUpNetwork:
    """The network on the denoiser of the backbone that it was trained with."""
    if backbone is None:
        raise ModelError(
            f"The close-up in '{place}' draws with the denoiser of the backbone that it was trained with (content "
            f"{card.backbone_digest[:12]}), and none is at hand. Name it with --backbone (of the server: --conf "
            "backbone <folder or hub id>)."
        )
    check_trained_with(f"The close-up in '{place}'", card.backbone_digest, card.backbone_copies, backbone)
    return build_network_on(card.network, backbone, scheduler)


def save_close_up(folder: Path, card: CloseUpCard, network: CloseUpNetwork, half: bool = True) -> Path:
    """Write ``close_up/`` of a model folder; an existing one is moved aside, never overwritten.

    Args:
        folder: The model folder.
        card: What it is. Whose the denoiser is, the network says.
        network: Of a backbone's denoiser nothing is written.
        half: Store fp16, half the size.
    """
    card = replace(card, denoiser="backbone" if network.shares_denoiser else "own")
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
        if not network.shares_denoiser:
            unet = network.unet.half() if half else network.unet
            unet.save_pretrained(scratch / "unet", max_shard_size="15MB", safe_serialization=True)
            drop_derived_settings(scratch / "unet")
            network.unet.float()
        network.scheduler.save_pretrained(scratch / "scheduler")
        (scratch / "config.json").write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
    return target
