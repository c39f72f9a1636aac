"""Any Stable-Diffusion folder in diffusers format: vae, unet, text_encoder, tokenizer, scheduler.

A component is loaded when it is first used. Weights are read from safetensors only. One extension of the format:
instead of weights, ``text_encoder/`` and ``tokenizer/`` may hold a ``package.json`` ``{"package": ..., "path": ...}``
that names an installed Python package which carries them; the embedded backbone does so with MiniLM, and
`export_backbone` writes a self-contained folder for use with plain diffusers.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from progidiff.errors import BackboneError
from progidiff.model.codec import find_stride
from progidiff.storage.atomic import atomic_folder

logger = logging.getLogger(__name__)

COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")

PROMPT_TEMPLATE = "mask of the {}"
"""How a structure's name becomes the text that conditions the denoiser, in training and in use alike."""


def pick_device(device: str | None = None) -> torch.device:
    """`device` if given, else the first CUDA device, else the CPU."""
    if device:
        try:
            picked = torch.device(device)
        except RuntimeError as err:
            raise BackboneError(
                f"Device '{device}' is not one that torch knows; use 'cpu', 'cuda' or 'cuda:1'."
            ) from err
        if picked.type == "cuda" and not torch.cuda.is_available():
            raise BackboneError(
                f"Device '{device}' was asked for, but torch sees no CUDA device; install "
                "a CUDA build of torch or use device 'cpu'."
            )
        if picked.type not in ("cpu", "cuda", "mps"):
            raise BackboneError(f"Device '{device}' is not supported; use 'cpu', 'cuda' or 'cuda:1'.")
        return picked
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(device: torch.device, dtype: str | None = None) -> torch.dtype:
    """Precision of the denoiser: bf16 where CUDA has it, fp16 on older CUDA, fp32 on the CPU unless bf16 is asked
    for.
    """
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype:
        if dtype not in known:
            raise BackboneError(f"dtype '{dtype}' is unknown; use one of {', '.join(known)}.")
        if dtype == "fp16" and device.type == "cpu":
            raise BackboneError("dtype 'fp16' is not usable on the CPU; use 'bf16' or 'fp32'.")
        return known[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.float32


class Backbone:
    """Lazy access to the parts of a text-to-image latent diffusion model.

    Args:
        source: A folder in diffusers format, or a hub id such as ``stable-diffusion-v1-5/stable-diffusion-v1-5``.
        device: See `pick_device`.
        dtype: Precision of U-Net and text encoder, see `pick_dtype`. The VAE stays in fp32 where fp16 is asked for:
            Stable Diffusion's VAEs overflow in fp16 and decode to black.

    Raises:
        BackboneError: if the folder is not complete; the message names what is missing.
    """

    def __init__(self, source: str | Path, device: str | None = None, dtype: str | None = None) -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(self.device, dtype)
        self.source = str(source)
        self.folder = _resolve_folder(self.source)
        check_backbone_folder(self.folder)

    @cached_property
    def vae(self) -> Any:
        """`diffusers.AutoencoderKL` (or `AutoencoderTiny`), in fp32 or bf16, never fp16."""
        import diffusers

        name = _class_name(self.folder / "vae", "AutoencoderKL")
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        return self._load(getattr(diffusers, name), "vae", dtype)

    @cached_property
    def unet(self) -> Any:
        """`diffusers.UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        return self._load(UNet2DConditionModel, "unet", self.dtype)

    @cached_property
    def text_encoder(self) -> Any:
        """Any transformers text encoder."""
        import transformers

        folder = _follow_package(self.folder / "text_encoder")
        config = _read_json(folder / "config.json")
        # CLIP checkpoints name a text-and-image class; only its text half belongs to the backbone.
        name = (config.get("architectures") or ["AutoModel"])[0]
        cls = getattr(
            transformers,
            name
            if name in {"CLIPTextModel", "CLIPTextModelWithProjection", "BertModel", "T5EncoderModel"}
            else "AutoModel",
        )
        try:
            model = cls.from_pretrained(folder, dtype=self.dtype, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError) as err:
            raise BackboneError(f"The text encoder in '{folder}' cannot be loaded: {err}") from err
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> Any:
        """The text encoder's tokenizer."""
        from transformers import AutoTokenizer

        folder = _follow_package(self.folder / "tokenizer")
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as err:
            raise BackboneError(f"The tokenizer in '{folder}' cannot be loaded: {err}") from err

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The backbone's own scheduler settings (betas, number of training steps, prediction type)."""
        return {
            k: v
            for k, v in _read_json(self.folder / "scheduler" / "scheduler_config.json").items()
            if not k.startswith("_")
        }

    @cached_property
    def latent_stride(self) -> int:
        """Image pixels per latent pixel."""
        return find_stride(_read_json(self.folder / "vae" / "config.json"))

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The denoiser's settings, without loading it."""
        return _read_json(self.folder / "unet" / "config.json")

    @cached_property
    def text_features(self) -> int:
        """D of the text tokens."""
        return _count_features(_read_json(_follow_package(self.folder / "text_encoder") / "config.json"))

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Encode prompts.

        Args:
            texts: P texts; the empty text is the one dropped for classifier-free guidance.

        Returns:
            tokens (P, L, D); mask (P, L) of real tokens, or None for a CLIP-like encoder, which is trained to read its
            own padding; pooled (P, D): the mean over real tokens, in fp32.
        """
        tokenizer, encoder = self.tokenizer, self.text_encoder
        is_clip = "clip" in type(encoder).__name__.lower()
        limit = min(77, tokenizer.model_max_length)
        batch = tokenizer(
            list(texts),
            padding="max_length" if is_clip else True,
            max_length=limit,
            truncation=True,
            return_tensors="pt",
        ).to(self.device)
        mask = batch["attention_mask"]
        tokens = encoder(input_ids=batch["input_ids"], attention_mask=None if is_clip else mask).last_hidden_state
        weight = mask[..., None].float()
        pooled = (tokens.float() * weight).sum(1) / weight.sum(1)
        return tokens, None if is_clip else mask.bool(), pooled

    def residual_slots(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Channels and image stride of every place where residuals may be added: all skips in order, then the middle.

        Derived from the U-Net's configuration as in `diffusers.ControlNetModel.from_unet`.
        """
        return list_residual_slots(self.unet_config, self.latent_stride)

    def _load(self, cls: Any, part: str, dtype: torch.dtype) -> Any:
        try:
            model = cls.from_pretrained(
                self.folder / part,
                torch_dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=True,
            )
        except (OSError, ValueError, RuntimeError) as err:
            raise BackboneError(f"Part '{part}' of the backbone '{self.source}' cannot be loaded: {err}") from err
        logger.info("Loaded %s of %s in %s on %s", part, self.source, dtype, self.device)
        return model.to(self.device).eval().requires_grad_(False)


def list_residual_slots(config: Mapping[str, Any], stride: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`Backbone.residual_slots` of a U-Net's configuration.

    Args:
        config: Of a `UNet2DConditionModel`.
        stride: Image pixels per latent pixel.
    """
    widths = list(config["block_out_channels"])
    layers = config.get("layers_per_block", 2)
    per_block = [layers] * len(widths) if isinstance(layers, int) else list(layers)
    channels, strides = [widths[0]], [stride]
    for i, width in enumerate(widths):
        channels += [width] * per_block[i]
        strides += [stride] * per_block[i]
        if i < len(widths) - 1:
            stride *= 2
            channels.append(width)
            strides.append(stride)
    return (*channels, widths[-1]), (*strides, stride)


class LoadedBackbone(Backbone):
    """A backbone whose parts are in memory.

    Args:
        vae, unet, text_encoder, tokenizer: The parts, on one device.
        scheduler_config: Settings of the scheduler.
        source: What to call it in messages, mostly the folder that it came from.
    """

    def __init__(
        self,
        vae: Any,
        unet: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler_config: Mapping[str, Any],
        source: str | Path = "memory",
    ) -> None:
        self.device, self.dtype = unet.device, unet.dtype
        self.source, self.folder = str(source), Path(source)
        self.vae, self.unet, self.text_encoder, self.tokenizer = vae, unet, text_encoder, tokenizer
        self.scheduler_config = {k: v for k, v in scheduler_config.items() if not k.startswith("_")}
        self.unet_config = dict(unet.config)

    @cached_property
    def latent_stride(self) -> int:
        """Image pixels per latent pixel."""
        return find_stride(self.vae.config)

    @cached_property
    def text_features(self) -> int:
        """D of the text tokens."""
        return _count_features(self.text_encoder.config.to_dict())


def check_backbone_folder(folder: Path) -> None:
    """Check that every component of a Stable-Diffusion folder is there.

    Raises:
        BackboneError: naming each missing part.
    """
    missing = []
    for part, files in {
        "vae": ("config.json",),
        "unet": ("config.json",),
        "text_encoder": ("config.json", "package.json"),
        "tokenizer": ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json", "package.json"),
        "scheduler": ("scheduler_config.json",),
    }.items():
        if not any((folder / part / f).is_file() for f in files):
            missing.append(f"{part}/{' or '.join(files)}")
    for part in ("vae", "unet", "text_encoder"):
        if (folder / part / "config.json").is_file() and not any((folder / part).glob("*.safetensors")):
            pickled = any((folder / part).glob("*.bin"))
            why = (
                " (there is a .bin: only safetensors are loaded; convert it with "
                "`save_pretrained(..., safe_serialization=True)`)"
                if pickled
                else ""
            )
            missing.append(f"{part}/*.safetensors{why}")
    if missing:
        raise BackboneError(
            f"'{folder}' is not a complete Stable-Diffusion folder in diffusers format. Missing: {'; '.join(missing)}. "
            "Give a folder that StableDiffusionPipeline.save_pretrained() wrote, or leave "
            "the backbone option out to use the embedded one."
        )


def export_backbone(folder: str | Path, target: str | Path) -> Path:
    """Write a self-contained copy of a backbone: parts that live in a Python package are copied in.

    ``diffusers.StableDiffusionPipeline.from_pretrained(target)`` loads and runs it. Plain diffusers masks the padding
    of a prompt in a text encoder that is not CLIP's only if its config.json says ``use_attention_mask``, which the copy
    does, and never in the denoiser: for the pictures that this package would draw, hand it ``prompt_embeds`` without
    padding.

    Args:
        folder: A complete backbone folder.
        target: Must not exist.

    Raises:
        BackboneError: if the target exists, the source is incomplete or a package is not installed.
    """
    source, target = Path(folder), Path(target)
    check_backbone_folder(source)
    if target.exists():
        raise BackboneError(f"'{target}' exists; give a folder that does not, nothing is overwritten.")
    parts = {part: _follow_package(source / part) for part in COMPONENTS}
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as scratch:
        for part, folder in parts.items():
            shutil.copytree(folder, scratch / part, ignore=shutil.ignore_patterns("1_Pooling", "*.md", ".git*"))
        for entry in source.iterdir():
            if entry.is_file():
                shutil.copy2(entry, scratch / entry.name)
        path = scratch / "text_encoder" / "config.json"
        config = _read_json(path)
        if not str(config.get("model_type", "")).startswith("clip"):
            path.write_text(json.dumps({**config, "use_attention_mask": True}, indent=2) + "\n", encoding="utf-8")
    return target


def _resolve_folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BackboneError(
            f"The backbone folder '{source}' does not exist. Give a folder in diffusers "
            "format or a hub id like 'owner/name'."
        )
    from huggingface_hub import snapshot_download

    patterns = [
        "model_index.json",
        "scheduler/*",
        "tokenizer/*",
        *(f"{p}/{f}" for p in ("vae", "unet", "text_encoder") for f in ("*.json", "*.safetensors")),
    ]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as err:  # the hub client raises a dozen unrelated types; the cure is the same for all
        raise BackboneError(
            f"The backbone '{source}' is no local folder and could not be fetched from "
            f"the model hub ({type(err).__name__}: {err}). Download it on a machine with "
            "network access and give its folder."
        ) from err


def _follow_package(folder: Path) -> Path:
    """The folder itself, or the one inside an installed package that its package.json names."""
    pointer = folder / "package.json"
    if not pointer.is_file():
        return folder
    return find_in_package(_read_json(pointer), folder)


def find_in_package(entry: Mapping[str, Any], what: object) -> Path:
    """The folder inside an installed Python package that ``{"package": ..., "path": ...}`` names.

    Args:
        entry: What a package.json holds; "pip" may say how to install it.
        what: For messages: what takes its files from there.

    Raises:
        BackboneError: if the entry is incomplete, or the package or the folder in it is not there.
    """
    package, path = entry.get("package"), entry.get("path")
    if not isinstance(package, str) or not isinstance(path, str):
        raise BackboneError(
            f'\'{what}/package.json\' must name a Python package and a path in it: {{"package": ..., "path": ...}}.'
        )
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # the parent of a dotted name is not there
        spec = None
    if spec is None or spec.origin is None:
        raise BackboneError(
            f"'{what}' takes its files from the Python package '{package}', which is not installed; run `pip install "
            f"{entry.get('pip', package)}`."
        )
    target = Path(spec.origin).parent / path
    if not target.is_dir():
        raise BackboneError(
            f"The Python package '{package}' has no folder '{path}'; run `pip install {entry.get('pip', package)}`."
        )
    return target


def _count_features(config: Mapping[str, Any]) -> int:
    return int(config.get("hidden_size") or config.get("d_model") or config["text_config"]["hidden_size"])


def _class_name(folder: Path, default: str) -> str:
    return str(_read_json(folder / "config.json").get("_class_name", default))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BackboneError(f"'{path}' cannot be read as JSON: {err}") from err
    if not isinstance(values, dict):
        raise BackboneError(f"'{path}' holds no JSON object.")
    return values
