"""A model on disk: ``backbone/`` (Stable-Diffusion format) beside ``conditioning/`` (the branch, its card and its run).

::

    <model folder>/
      backbone/       model_index.json, vae/, unet/, text_encoder/, tokenizer/, scheduler/
      conditioning/   config.json, branch.safetensors, run.json, README.md

``config.json`` is read without loading a weight; it says which backbone the branch belongs to, by content.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from progidiff.errors import ModelError
from progidiff.model.backbone import Backbone
from progidiff.model.codec import MaskCodec
from progidiff.model.conditioning import ConditioningBranch, ConditioningConfig
from progidiff.model.pipeline import ProposalPipeline
from progidiff.storage.atomic import atomic_folder

FORMAT = 1


@dataclass(frozen=True)
class ModelCard:
    """``conditioning/config.json``: what the branch is, without its weights.

    Attributes:
        name, version: Of the model, shown as ``name@version``.
        modality: "CT" or "MR": the images it was trained on.
        structures: Names it was trained on, in training order.
        conditioning: Shapes of the branch and of the working grid.
        codec_mean, codec_std: Statistics of mask latents.
        scheduler: Overrides of the backbone's scheduler.
        gate: Evidence under which a structure counts as absent from a slice and is not denoised.
        num_inference_steps, guidance_scale: Defaults for inference.
        evidence_weight, evidence_spread: See `progidiff.model.pipeline.fuse_evidence` and
            `ProposalPipeline.draw_offsets`.
        backbone_digest: Content of the backbone it was trained with, see `compute_backbone_digest`.
    """

    name: str
    version: str
    modality: str
    structures: tuple[str, ...]
    conditioning: ConditioningConfig
    codec_mean: tuple[float, ...]
    codec_std: tuple[float, ...]
    scheduler: dict[str, Any] = field(default_factory=dict)
    gate: float = 0.2
    num_inference_steps: int = 2
    guidance_scale: float = 1.0
    evidence_weight: float = 0.0
    evidence_spread: tuple[float, float] = (0.0, 0.0)
    backbone_digest: str = ""

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {"format": FORMAT, **values, "conditioning": self.conditioning.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """The inverse of `to_dict`."""
        if values.get("format") != FORMAT:
            raise ModelError(
                f"This model has format {values.get('format')}, this program reads "
                f"{FORMAT}; install the version that wrote it."
            )
        plain = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        for key in ("structures", "codec_mean", "codec_std"):
            plain[key] = tuple(plain[key])
        plain["evidence_spread"] = tuple(plain.get("evidence_spread", cls.evidence_spread))
        plain["conditioning"] = ConditioningConfig.from_dict(plain["conditioning"])
        return cls(**plain)


def load_card(folder: Path) -> ModelCard:
    """Read ``conditioning/config.json`` of a model folder.

    Raises:
        ModelError: if it is missing or cannot be read.
    """
    path = folder / "conditioning" / "config.json"
    try:
        return ModelCard.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as err:
        raise ModelError(
            f"'{folder}' holds no trained conditioning ('{path.name}' is missing in "
            "conditioning/); train one with `progidiff train`."
        ) from err
    except (ValueError, KeyError, TypeError) as err:
        raise ModelError(f"'{path}' cannot be read: {err}. Restore it from the version it came with.") from err


def load_pipeline(
    folder: Path, backbone: Backbone, autocast: torch.dtype | None = None
) -> tuple[ModelCard, ProposalPipeline]:
    """Load the conditioning of a model folder onto a backbone.

    Raises:
        ModelError: if a file is missing, a tensor is left over or missing, or the branch belongs to another backbone.
    """
    card = load_card(folder)
    digest = compute_backbone_digest(backbone.folder)
    if card.backbone_digest and card.backbone_digest != digest:
        raise ModelError(
            f"Conditioning '{card.full_name}' was trained with another backbone (content "
            f"{card.backbone_digest[:12]}) than '{backbone.source}' (content {digest[:12]}). Train one for this "
            f"backbone with `progidiff train --backbone {backbone.source}`, or leave the backbone option out."
        )
    path = folder / "conditioning" / "branch.safetensors"
    try:
        tensors = load_file(path)
    except FileNotFoundError as err:
        raise ModelError(f"'{path}' is missing; restore the model folder from the version it came with.") from err
    except Exception as err:  # safetensors raises its own untyped error for a truncated file
        raise ModelError(f"'{path}' is damaged ({err}); restore it from the version it came with.") from err
    branch = ConditioningBranch(card.conditioning)
    check_tensors(tensors, branch.state_dict(), path)
    branch.load_state_dict({k: v.float() for k, v in tensors.items()})
    branch.to(backbone.device).eval().requires_grad_(False)
    codec = MaskCodec(backbone.vae, card.codec_mean, card.codec_std)
    return card, ProposalPipeline(
        backbone,
        branch,
        codec,
        card.scheduler,
        autocast=autocast,
        evidence_weight=card.evidence_weight,
        evidence_spread=card.evidence_spread,
    )


def check_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> None:
    """Check that a file holds exactly the tensors of a module.

    Raises:
        ModelError: naming what is missing, unknown or of another shape.
    """
    problems = {
        "missing": [n for n in wanted if n not in found],
        "unknown": [n for n in found if n not in wanted],
        "of another shape": [n for n in wanted if n in found and found[n].shape != wanted[n].shape],
    }
    if any(problems.values()):
        told = "; ".join(
            f"{kind}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for kind, names in problems.items()
            if names
        )
        raise ModelError(f"'{path}' does not fit its config.json ({told}). Restore both from one version.")


def save_conditioning(
    folder: Path, card: ModelCard, branch: ConditioningBranch, run: dict[str, Any], readme: str, half: bool = True
) -> Path:
    """Write ``conditioning/`` of a model folder; an existing one is moved aside, never overwritten.

    Args:
        folder: The model folder.
        run: What made it (configuration, data, metrics), kept as run.json.
        readme: The model card for people.
        half: Store fp16, half the size.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = torch.float16 if half else torch.float32
    target = folder / "conditioning"
    with _replaced(target) as scratch:
        save_file(
            {k: v.detach().to("cpu", dtype).contiguous() for k, v in branch.state_dict().items()},
            scratch / "branch.safetensors",
        )
        (scratch / "config.json").write_text(json.dumps(card.to_dict(), indent=1) + "\n", encoding="utf-8")
        (scratch / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(readme, encoding="utf-8")
    return target


def save_backbone_part(folder: Path, part: str, model: Any, shard: str = "15MB") -> None:
    """Replace one network of a backbone folder, in fp16 shards; the old one is moved aside first."""
    dtype = next(model.parameters()).dtype
    with _replaced(folder / part) as scratch:
        model.half().save_pretrained(scratch, max_shard_size=shard, safe_serialization=True)
        model.to(dtype)
        drop_derived_settings(scratch)


def drop_derived_settings(folder: Path) -> None:
    """Remove from config.json the path a model was loaded from, and what `AutoencoderTiny` writes but warns about when
    it reads it back.
    """
    path = folder / "config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("_name_or_path", None)
    if values.get("_class_name") == "AutoencoderTiny":
        values.pop("block_out_channels", None)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replaced(target: Path) -> AbstractContextManager[Path]:
    """A folder to write to, in the place of `target` afterwards; what was there is kept as ``.<name>.previous``."""
    return atomic_folder(target, existing="replace", previous=target.with_name(f".{target.name}.previous"))


def compute_backbone_digest(folder: Path) -> str:
    """SHA-256 over the weights of the autoencoder and the denoiser: the identity of a backbone, wherever it lies."""
    files = tuple(sorted(p for part in ("vae", "unet") for p in (folder / part).glob("*.safetensors")))
    state = hashlib.sha256()
    for path in files:
        stat = path.stat()
        state.update(path.name.encode() + _file_digest(path, stat.st_size, stat.st_mtime_ns))
    return state.hexdigest()


def compute_conditioning_digest(folder: Path) -> str:
    """SHA-256 of the weights in ``conditioning/`` of a model folder; read once, then remembered until the file changes.

    Raises:
        ModelError: if the file is missing.
    """
    path = folder / "conditioning" / "branch.safetensors"
    try:
        stat = path.stat()
        return _file_digest(path, stat.st_size, stat.st_mtime_ns).hex()
    except OSError as err:
        raise ModelError(f"'{path}' is missing; restore the model folder from the version it came with.") from err


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
