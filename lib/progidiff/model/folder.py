"""A model on disk: ``backbone/`` (Stable-Diffusion format) beside ``conditioning/`` (the branch, its card and its run).

::

    <model folder>/
      backbone/       model_index.json, vae/, unet/, text_encoder/, tokenizer/, scheduler/
      conditioning/   config.json, diffusion_pytorch_model.safetensors, card.json, run.json, README.md

``config.json`` and the weights are as diffusers writes them (`progidiff.model.conditioning_model`). ``card.json`` says
what the branch was trained on and which backbone it belongs to, by content; both are read without loading a weight.

In a folder that `ProGiDiffPipeline.save_pretrained` wrote, the parts of the backbone lie beside ``conditioning/``, with
one model_index.json for all.

Versions up to 0.2 kept the weights as ``branch.safetensors`` and the card with the shapes in it as ``config.json``.
Such folders are read as they are, and written anew when the model is trained further or saved.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
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

FORMAT = 2

READ = (1, 2)
"""Formats that can be read. In the first, config.json was the card."""

WEIGHTS = "diffusion_pytorch_model.safetensors"

FORMER_WEIGHTS = "branch.safetensors"

CARD = "card.json"

CONFIG = "config.json"


@dataclass(frozen=True)
class ModelCard:
    """What the branch in ``conditioning/`` is, without its weights: card.json and config.json together.

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
        backbone_copies: Content of files that hold the same backbone, written again in another precision.
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
    backbone_copies: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """``name@version``."""
        return f"{self.name}@{self.version}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return {"format": FORMAT, **values, "conditioning": self.conditioning.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelCard:
        """The inverse of `to_dict`."""
        if values.get("format") not in READ:
            raise ModelError(
                f"This model has format {values.get('format')}, this program reads "
                f"{' and '.join(map(str, READ))}; install the version that wrote it."
            )
        plain = {k: v for k, v in values.items() if k in cls.__dataclass_fields__}
        for key in ("structures", "codec_mean", "codec_std"):
            plain[key] = tuple(plain[key])
        plain["backbone_copies"] = tuple(plain.get("backbone_copies", ()))
        plain["evidence_spread"] = tuple(plain.get("evidence_spread", cls.evidence_spread))
        plain["conditioning"] = ConditioningConfig.from_dict(plain["conditioning"])
        return cls(**plain)


def load_card(folder: Path) -> ModelCard:
    """Read what the conditioning of a model folder is.

    Raises:
        ModelError: if it is missing or cannot be read.
    """
    return _read_card(folder / "conditioning")


def _read_card(conditioning: Path) -> ModelCard:
    path = conditioning / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if "format" not in values:
            path = path.with_name(CARD)
            values = {**json.loads(path.read_text(encoding="utf-8")), "conditioning": values}
        return ModelCard.from_dict(values)
    except FileNotFoundError as err:
        raise ModelError(
            f"'{conditioning.parent}' holds no trained conditioning ('{path.name}' is missing in "
            f"{conditioning.name}/); train one with `progidiff train`."
        ) from err
    except (ValueError, KeyError, TypeError) as err:
        raise ModelError(f"'{path}' cannot be read: {err}. Restore it from the version it came with.") from err


def is_former(conditioning: Path) -> bool:
    """Whether a ``conditioning/`` folder is as versions up to 0.2 wrote it.

    Args:
        conditioning: The folder itself; one that is not there is not former.
    """
    return not (conditioning / CARD).is_file() and (conditioning / FORMER_WEIGHTS).is_file()


def load_branch(conditioning: Path) -> ConditioningBranch:
    """The branch in a ``conditioning/`` folder of any version, in fp32 on the CPU, every tensor checked.

    Raises:
        ModelError: if a file is missing or damaged, or a tensor is left over or missing.
    """
    branch = ConditioningBranch(_read_card(conditioning).conditioning)
    path = _find_weights(conditioning)
    try:
        tensors = load_file(path)
    except FileNotFoundError as err:
        raise ModelError(f"'{path}' is missing; restore the model folder from the version it came with.") from err
    except Exception as err:  # safetensors raises its own untyped error for a truncated file
        raise ModelError(f"'{path}' is damaged ({err}); restore it from the version it came with.") from err
    check_tensors(tensors, branch.state_dict(), path)
    branch.load_state_dict({k: v.float() for k, v in tensors.items()})
    return branch.eval().requires_grad_(False)


def find_backbone(folder: Path) -> Path:
    """Where the backbone of a model folder lies: in ``backbone/``, or its parts beside ``conditioning/``."""
    apart = folder / "backbone"
    return folder if not apart.is_dir() and (folder / "model_index.json").is_file() else apart


def load_pipeline(
    folder: Path, backbone: Backbone, autocast: torch.dtype | None = None
) -> tuple[ModelCard, ProposalPipeline]:
    """Load the conditioning of a model folder onto a backbone.

    Raises:
        ModelError: if a file is missing, a tensor is left over or missing, or the branch belongs to another backbone.
    """
    card = load_card(folder)
    check_backbone(card, backbone)
    branch = load_branch(folder / "conditioning").to(backbone.device)
    return card, make_pipeline(card, backbone, branch, autocast)


def check_backbone(card: ModelCard, backbone: Backbone) -> None:
    """Check that a conditioning was trained with a backbone.

    Raises:
        ModelError: naming both.
    """
    check_trained_with(f"Conditioning '{card.full_name}'", card.backbone_digest, card.backbone_copies, backbone)


def check_trained_with(what: str, digest: str, copies: Sequence[str], backbone: Backbone) -> None:
    """Check that something was trained with a backbone.

    Args:
        what: For messages.
        digest: Content of the backbone that it was trained with; "" for any.
        copies: Content of files that hold the same backbone.
        backbone: That it is to be used with.

    Raises:
        ModelError: naming both.
    """
    found = compute_backbone_digest(backbone.folder)
    if digest and found not in (digest, *copies):
        raise ModelError(
            f"{what} was trained with another backbone (content {digest[:12]}) than '{backbone.source}' (content "
            f"{found[:12]}). Train one for this backbone with `progidiff train --backbone {backbone.source}`, or leave "
            "the backbone option out."
        )


def make_pipeline(
    card: ModelCard, backbone: Backbone, branch: ConditioningBranch, autocast: torch.dtype | None = None
) -> ProposalPipeline:
    """Networks in working order, with what the card says of their use."""
    return ProposalPipeline(
        backbone,
        branch,
        MaskCodec(backbone.vae, card.codec_mean, card.codec_std),
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
            scratch / WEIGHTS,
        )
        write_card(scratch, card)
        (scratch / "run.json").write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        (scratch / "README.md").write_text(readme, encoding="utf-8")
    return target


def copy_conditioning(folder: Path, target: Path, card: ModelCard) -> Path:
    """Write ``conditioning/`` of another model folder with the very same weights, in the present layout.

    Args:
        folder: The model folder to copy from, of any version.
        target: The model folder to write to; a ``conditioning/`` there is moved aside.
        card: Of the copy.
    """
    source = folder / "conditioning"
    target.mkdir(parents=True, exist_ok=True)
    with _replaced(target / "conditioning") as scratch:
        shutil.copyfile(_find_weights(source), scratch / WEIGHTS)
        for name in ("run.json", "README.md"):
            if (source / name).is_file():
                shutil.copyfile(source / name, scratch / name)
        write_card(scratch, card)
    return target / "conditioning"


def write_card(conditioning: Path, card: ModelCard) -> None:
    """Write config.json, as diffusers does for `ConditioningModel`, and card.json with all else."""
    values = card.to_dict()
    del values["conditioning"]
    for name, content in ((CONFIG, describe_branch(card.conditioning)), (CARD, values)):
        (conditioning / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def describe_branch(config: ConditioningConfig) -> dict[str, Any]:
    """What diffusers writes into config.json of a `ConditioningModel`."""
    return {
        "_class_name": "ConditioningModel",
        "_diffusers_version": metadata.version("diffusers"),
        **config.to_dict(),
    }


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
    path = _find_weights(folder / "conditioning")
    try:
        stat = path.stat()
        return _file_digest(path, stat.st_size, stat.st_mtime_ns).hex()
    except OSError as err:
        raise ModelError(f"'{path}' is missing; restore the model folder from the version it came with.") from err


def _find_weights(conditioning: Path) -> Path:
    return conditioning / (FORMER_WEIGHTS if is_former(conditioning) else WEIGHTS)


@lru_cache(maxsize=64)
def _file_digest(path: Path, size: int, modified: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
