"""`progidiff textdiff convert`: a checkpoint of OpenAI's guided-diffusion as a diffusers folder.

The denoisers of Dhariwal and Nichol (arXiv 2105.05233) and the many that were trained with the same program are `.pt`
files of names and tensors; what the network looks like is said by flags on a command line. TextDiff's own features come
from such a file. `diffusers.UNet2DModel` computes the same function under other names, so a conversion renames tensors,
takes the joined query-key-value matrices apart and changes no number. Almost every flag can be read off the tensors'
names and shapes; those that are given nevertheless are compared with what is found. Only the number of attention heads,
the noise schedule and the picture's size leave no trace.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from progidiff.errors import ModelError, RequestError
from progidiff.textdiff.pretrain import write_denoiser

NORM_GROUPS = 32
"""Of every group normalisation in guided-diffusion."""

RESIDUAL_NAMES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

OUTER_NAMES = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}

IGNORED_FLAGS = frozenset(
    (
        "dropout",
        "use_fp16",
        "use_checkpoint",
        "timestep_respacing",
        "use_kl",
        "rescale_learned_sigmas",
        "batch_size",
        "num_samples",
        "model_path",
    )
)
"""Flags of guided-diffusion's programs that change neither the network nor the noise of a given timestep."""


@dataclass(frozen=True)
class GuidedDiffusionOptions:
    """The flags of guided-diffusion, by their own names; None: as the weights say.

    Attributes:
        image_size: Side of the pictures it was trained on; `attention_resolutions` are in its pixels.
        num_channels: Width of the first level.
        num_res_blocks: Residual blocks per level.
        channel_mult: Width of each level as a multiple of `num_channels`.
        attention_resolutions: Sides (pixels) of the levels with self-attention.
        learn_sigma: Whether it also predicts a variance (six output channels).
        resblock_updown: Whether levels are joined by residual blocks rather than single convolutions.
        use_scale_shift_norm: Whether the timestep scales and shifts, rather than is added.
        num_head_channels: Channels of an attention head.
        num_heads: Attention heads at every width; either this or `num_head_channels` must be given.
        use_new_attention_order: How queries, keys and values are joined in the file.
        diffusion_steps: Length of the noise schedule.
        noise_schedule: "linear" or "cosine".
        predict_xstart: Whether it predicts the picture rather than the noise.
        rescale_timesteps: Whether timesteps are scaled to 0..1000 before the network sees them.
        class_cond: Whether it was told classes; such a denoiser is refused.
    """

    image_size: int | None = None
    num_channels: int | None = None
    num_res_blocks: int | None = None
    channel_mult: tuple[float, ...] | None = None
    attention_resolutions: tuple[int, ...] | None = None
    learn_sigma: bool | None = None
    resblock_updown: bool | None = None
    use_scale_shift_norm: bool | None = None
    num_head_channels: int | None = None
    num_heads: int | None = None
    use_new_attention_order: bool = False
    diffusion_steps: int = 1000
    noise_schedule: str = "linear"
    predict_xstart: bool = False
    rescale_timesteps: bool = False
    class_cond: bool = False

    def check(self) -> None:
        """Check what can be checked without the weights.

        Raises:
            RequestError: if a number is not positive or the schedule has no name here.
            ModelError: if such a denoiser cannot be converted.
        """
        for name in ("image_size", "num_head_channels", "num_heads", "diffusion_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RequestError(f"{name} must be at least 1, got {value}.")
        if self.noise_schedule not in ("linear", "cosine"):
            raise RequestError(f"noise_schedule must be linear or cosine, got '{self.noise_schedule}'.")
        if self.class_cond:
            raise ModelError(
                "A class-conditional denoiser (class_cond) needs a class for every "
                "picture, which pictures to be segmented do not have; give an unconditional one."
            )
        if self.rescale_timesteps and self.diffusion_steps != 1000:
            raise ModelError(
                f"rescale_timesteps with {self.diffusion_steps} diffusion_steps feeds the "
                "network fractions of timesteps, which diffusers does not; only 1000 steps can be converted."
            )


@dataclass(frozen=True)
class Layout:
    """What the tensors' names and shapes say about the network.

    Attributes:
        channels: Width per level, full resolution first.
        layers: Residual blocks per level of the encoder.
        attention: Per level, whether it has self-attention.
        updown: Whether levels are joined by residual blocks.
        scale_shift: Whether the timestep scales and shifts.
        out_channels: 3, or 6 with a predicted variance.
    """

    channels: tuple[int, ...]
    layers: int
    attention: tuple[bool, ...]
    updown: bool
    scale_shift: bool
    out_channels: int

    @property
    def per_level(self) -> int:
        """Blocks per level in the file: the residual ones and the one that leads to the next level."""
        return self.layers + 1


def convert_checkpoint(
    checkpoint: Path, target: Path, options: GuidedDiffusionOptions | None = None, half: bool = False
) -> dict[str, Any]:
    """Write a guided-diffusion denoiser as a diffusers folder (model_index.json, unet/, scheduler/, conversion.json).

    Args:
        checkpoint: `.pt` file of names and tensors, as guided-diffusion saves it (also inside {"state_dict": ...} or
            {"model": ...}).
        target: Folder to make; it must not exist.
        options: Flags it was trained with; the number of heads is required, the others are compared with the weights.
        half: Store half-precision numbers; half the size, and a rounding.

    Returns:
        What conversion.json says: the file's name and hash, the flags found, the number of parameters.

    Raises:
        RequestError: if `target` exists, the number of heads is not given, or a flag contradicts the weights.
        ModelError: if the file is no such checkpoint, or one of a kind that `UNet2DModel` cannot compute.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    options = options or GuidedDiffusionOptions()
    options.check()
    if target.exists():
        raise RequestError(f"'{target}' exists; give a folder that does not, nothing is overwritten.")
    tensors = read_checkpoint(checkpoint)
    layout = read_layout(tensors)
    check_options(options, layout)
    head_channels = find_head_channels(options, layout)
    unet = UNet2DModel(**make_config(options, layout, head_channels))
    converted = rename_tensors(tensors, layout, head_channels or 0, options.use_new_attention_order)
    _check_shapes(converted, unet.state_dict())
    unet.load_state_dict(converted)
    scheduler = DDPMScheduler(
        num_train_timesteps=options.diffusion_steps,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[options.noise_schedule],
        beta_start=0.1 / options.diffusion_steps,  # 0.0001 and 0.02 at 1000 steps; fewer steps are larger
        beta_end=20 / options.diffusion_steps,
        variance_type="learned_range" if layout.out_channels == 6 else "fixed_large",
        prediction_type="sample" if options.predict_xstart else "epsilon",
    )
    record = {
        "checkpoint": checkpoint.name,
        "sha256": _hash_file(checkpoint),
        "flags": describe_layout(layout, options.image_size)
        | {
            name: getattr(options, name)
            for name in (
                "num_head_channels",
                "num_heads",
                "use_new_attention_order",
                "diffusion_steps",
                "noise_schedule",
            )
        },
        "parameters": sum(p.numel() for p in unet.parameters()),
        "half": half,
    }
    write_denoiser(unet, scheduler, target, half=half, extra={"conversion.json": json.dumps(record, indent=1) + "\n"})
    return record


def parse_flags(text: str) -> GuidedDiffusionOptions:
    """Options from flags as they stand in guided-diffusion's instructions; what is not said there has that program's
    default.

    Args:
        text: For example "--attention_resolutions 32,16,8 --image_size 256 --num_head_channels 64 ...".

    Raises:
        RequestError: if a flag is unknown, has no value or one of the wrong kind.

    Example:
        >>> parse_flags("--image_size 256 --num_head_channels 64 --use_fp16 True").num_head_channels
        64
    """
    words = shlex.split(text.replace("=", " "))
    known = {f.name: str(f.type) for f in fields(GuidedDiffusionOptions)}
    values: dict[str, Any] = {}
    for flag, value in zip(words[::2], [*words[1::2], ""], strict=False):
        name = flag.removeprefix("--")
        if not flag.startswith("--") or not value or value.startswith("--"):
            raise RequestError(
                f"Flags must be pairs '--name value', as in guided-diffusion's instructions; '{flag} {value}' is none."
            )
        if name not in known:
            if name in IGNORED_FLAGS or (name == "num_heads_upsample" and value == "-1"):
                continue
            raise RequestError(
                f"'{flag}' is no flag of an unconditional guided-diffusion network that "
                "can be converted; leave it out if it only concerns its training."
            )
        try:
            values[name] = _parse_value(value, known[name])
        except ValueError as err:
            raise RequestError(
                f"'{flag} {value}' is not of the right kind ({known[name].removesuffix(' | None')})."
            ) from err
    values = {name: value for name, value in values.items() if value not in (-1, ())}  # guided-diffusion's "not said"
    if "num_head_channels" not in values:
        values.setdefault("num_heads", 4)
    return GuidedDiffusionOptions(**values)


def _parse_value(value: str, kind: str) -> Any:
    if kind.startswith("tuple"):
        return tuple(float(v) if "float" in kind else int(v) for v in value.split(",") if v)
    if kind.startswith("bool"):
        found = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(value.lower())
        if found is None:
            raise ValueError(value)
        return found
    return int(value) if kind.startswith("int") else value


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Names and float32 tensors of a `.pt` file; nothing else in it is executed.

    Raises:
        ModelError: if it cannot be read, or holds something else.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as err:
        raise ModelError(
            f"'{path}' cannot be read as a PyTorch checkpoint of tensors "
            f"({str(err).splitlines()[0] if str(err) else type(err).__name__}); give the "
            ".pt file that guided-diffusion saved."
        ) from err
    for wrapper in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise ModelError(
            f"'{path}' is not a mapping of names to tensors; give the model's or the "
            "averaged (ema) weights, not the optimiser's."
        )
    return {str(name).removeprefix("module."): tensor.float() for name, tensor in found.items()}


def read_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """The network that the names and shapes describe.

    Raises:
        ModelError: if they are not those of an unconditional RGB denoiser of guided-diffusion that `UNet2DModel` can
            compute.
    """
    absent = [f"{name}.weight" for name in OUTER_NAMES if f"{name}.weight" not in tensors]
    if absent:
        what = (
            "a classifier of guided-diffusion"
            if "out.2.c_proj.weight" in tensors or "out.2.positional_embedding" in tensors
            else "no guided-diffusion denoiser"
        )
        raise ModelError(
            f"The checkpoint is {what}: it has no tensor '{absent[0]}'. Give the weights of a diffusion model."
        )
    if "label_emb.weight" in tensors:
        raise ModelError(
            "The checkpoint is class-conditional (it has 'label_emb.weight'); pictures to be segmented have no class. "
            "Give an unconditional one."
        )
    in_channels, out_channels = tensors["input_blocks.0.0.weight"].shape[1], tensors["out.2.weight"].shape[0]
    if in_channels != 3 or out_channels not in (3, 6):
        raise ModelError(
            f"The network takes {in_channels} channels and gives {out_channels} (a "
            "super-resolution or single-channel one?); only RGB ones (3 in, 3 or 6 out) are converted."
        )
    encoder, decoder = (_count_blocks(tensors, side) for side in ("input_blocks", "output_blocks"))
    ups = [i for i in range(decoder) if _find_upsampler(tensors, i) is not None]
    per_level = ups[0] + 1 if ups else decoder
    if encoder != decoder or decoder % per_level or ups != list(range(per_level - 1, decoder - 1, per_level)):
        raise ModelError(
            f"The checkpoint has {encoder} blocks going down and {decoder} going up, with "
            f"upsampling after {ups}: not guided-diffusion's arrangement of levels of equal depth."
        )
    firsts = range(1, encoder, per_level) if per_level > 1 else range(0)
    try:
        channels = tuple(tensors[f"input_blocks.{i}.0.out_layers.3.weight"].shape[0] for i in firsts)
        doubled = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0] == 2 * channels[0]
    except (KeyError, IndexError) as err:
        raise ModelError(
            f"The checkpoint has no tensor {err} where guided-diffusion has a residual "
            "block; it was changed, or is of another program."
        ) from err
    model_channels = tensors["time_embed.0.weight"].shape[1]
    if channels[0] != model_channels or tensors["input_blocks.0.0.weight"].shape[0] != model_channels:
        raise ModelError(
            f"The first level has {channels[0]} channels and the timestep "
            f"{model_channels} (a channel_mult that does not begin with 1, as in the 512 x 512 model); diffusers' "
            "UNet2DModel has one number for both. Use a smaller model, such as the 256 x 256 one."
        )
    return Layout(
        channels=channels,
        layers=per_level - 1,
        attention=tuple(f"input_blocks.{i}.1.qkv.weight" in tensors for i in firsts),
        updown=bool(ups) and str(_find_upsampler(tensors, ups[0])).endswith("in_layers.0.weight"),
        scale_shift=doubled,
        out_channels=out_channels,
    )


def _count_blocks(tensors: Mapping[str, Tensor], side: str) -> int:
    """How many blocks of `side` there are; a block without weights is one that averages."""
    found = {int(m.group(1)) for name in tensors if (m := re.match(rf"{side}\.(\d+)\.", name))}
    gaps = sorted(set(range(max(found, default=-1) + 1)) - found)
    if gaps or not found:
        what = f"'{side}.{gaps[0]}' has no weights (conv_resample off?)" if gaps else f"there is no '{side}'"
        raise ModelError(
            f"The checkpoint cannot be converted: {what}. Levels must be joined by convolutions or residual blocks."
        )
    return len(found)


def _find_upsampler(tensors: Mapping[str, Tensor], block: int) -> str | None:
    """The first tensor of what leads up from a decoder block; None if it does not."""
    names = (
        f"output_blocks.{block}.{place}.{part}" for place in (1, 2) for part in ("conv.weight", "in_layers.0.weight")
    )
    return next((name for name in names if name in tensors), None)


def describe_layout(layout: Layout, image_size: int | None = None) -> dict[str, Any]:
    """The flags that the weights tell, by guided-diffusion's names; `attention_resolutions` only if the picture's size
    is known.
    """
    flags: dict[str, Any] = {
        "image_size": image_size,
        "num_channels": layout.channels[0],
        "num_res_blocks": layout.layers,
        "channel_mult": [c / layout.channels[0] for c in layout.channels],
        "learn_sigma": layout.out_channels == 6,
        "resblock_updown": layout.updown,
        "use_scale_shift_norm": layout.scale_shift,
    }
    if image_size is not None:
        flags["attention_resolutions"] = [image_size // 2**level for level, has in enumerate(layout.attention) if has]
    return flags


def check_options(options: GuidedDiffusionOptions, layout: Layout) -> None:
    """Compare the flags that were given with the weights.

    Raises:
        RequestError: if one contradicts them, naming both values.
    """
    found = describe_layout(layout, options.image_size)
    if len(layout.channels) == 1:
        found.pop("resblock_updown")  # nothing is joined
    for name, value in found.items():
        given = getattr(options, name)
        same = (
            sorted(given) == sorted(value)
            if isinstance(given, tuple) and name == "attention_resolutions"
            else given == (tuple(value) if isinstance(value, list) else value)
        )
        if given is not None and not same:
            raise RequestError(
                f"{name} is given as {given}, but the weights have {value}; leave the "
                "flag out, or check that this is the right file."
            )
    halvings = 2 ** (len(layout.channels) - 1)
    if options.image_size is not None and options.image_size % halvings:
        raise RequestError(
            f"image_size {options.image_size} cannot be halved {len(layout.channels) - 1} "
            "times, as the network does; give the size it was trained with."
        )


def find_head_channels(options: GuidedDiffusionOptions, layout: Layout) -> int | None:
    """Channels of an attention head; None for one head as wide as its level.

    Raises:
        RequestError: if the number of heads is not given, or the widths do not divide into heads.
        ModelError: if the same number of heads is asked for at several widths, which `UNet2DModel` cannot.
    """
    widths = sorted(
        {c for c, has in zip(layout.channels, layout.attention, strict=True) if has} | {layout.channels[-1]}
    )
    if options.num_head_channels is None:
        if options.num_heads is None:
            raise RequestError(
                "The weights do not tell the number of attention heads; give "
                "num_head_channels or num_heads as it was in training (guided-diffusion's default is num_heads 4)."
            )
        if options.num_heads == 1:
            return None
        if len(widths) > 1:
            raise ModelError(
                f"{options.num_heads} attention heads at each of the widths {widths} "
                "cannot be converted: diffusers' UNet2DModel has one width of a head for all levels. Checkpoints "
                "trained with num_head_channels, or with one head, can."
            )
        if widths[0] % options.num_heads:
            raise RequestError(f"{widths[0]} channels do not divide into {options.num_heads} heads; check num_heads.")
        return widths[0] // options.num_heads
    uneven = [w for w in widths if w % options.num_head_channels]
    if uneven:
        raise RequestError(
            f"{uneven[0]} channels do not divide into heads of {options.num_head_channels}; check num_head_channels."
        )
    return options.num_head_channels


def make_config(options: GuidedDiffusionOptions, layout: Layout, head_channels: int | None) -> dict[str, Any]:
    """Arguments of the `diffusers.UNet2DModel` that computes the same."""
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if layout.updown else ("DownBlock2D", "UpBlock2D")
    down, up = (
        tuple(attending if has else other for has in layout.attention)
        for attending, other in zip(("AttnDownBlock2D", "AttnUpBlock2D"), plain, strict=True)
    )
    return {
        "sample_size": options.image_size,
        "in_channels": 3,
        "out_channels": layout.out_channels,
        "block_out_channels": layout.channels,
        "layers_per_block": layout.layers,
        "down_block_types": down,
        "up_block_types": up[::-1],
        "downsample_type": "resnet" if layout.updown else "conv",
        "upsample_type": "resnet" if layout.updown else "conv",
        "attention_head_dim": head_channels,
        "norm_num_groups": NORM_GROUPS,
        "attn_norm_num_groups": NORM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
    }


def rename_tensors(
    tensors: Mapping[str, Tensor], layout: Layout, head_channels: int, new_order: bool
) -> dict[str, Tensor]:
    """The tensors under diffusers' names.

    Args:
        tensors: Of the checkpoint.
        layout: Of the network.
        head_channels: Of an attention head; 0 for one head as wide as its level.
        new_order: `use_new_attention_order`.

    Raises:
        ModelError: if a tensor of the checkpoint has no place.
    """
    prefixes = dict(name_blocks(layout))
    converted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        outer = OUTER_NAMES.get(stem)
        block = next((prefix for prefix in (".".join(stem.split(".")[:n]) for n in (3, 2)) if prefix in prefixes), None)
        part = stem[len(block) + 1 :] if block is not None else ""
        if outer is not None:
            converted[f"{outer}.{kind}"] = tensor
        elif block is not None and part in RESIDUAL_NAMES:
            converted[f"{prefixes[block]}.{RESIDUAL_NAMES[part]}.{kind}"] = tensor
        elif block is not None and part in ("op", "conv"):
            converted[f"{prefixes[block]}.conv.{kind}"] = tensor
        elif block is not None and part == "norm":
            converted[f"{prefixes[block]}.group_norm.{kind}"] = tensor
        elif block is not None and part == "proj_out":
            converted[f"{prefixes[block]}.to_out.0.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor
        elif block is not None and part == "qkv":
            split = split_heads(tensor.flatten(1) if kind == "weight" else tensor, head_channels, new_order)
            converted.update(
                {f"{prefixes[block]}.to_{letter}.{kind}": rows for letter, rows in zip("qkv", split, strict=True)}
            )
        else:
            raise ModelError(
                f"The checkpoint has a tensor '{name}' that has no place in "
                "guided-diffusion's network as its other tensors describe it; it was changed, or is of another program."
            )
    return converted


def name_blocks(layout: Layout) -> Iterator[tuple[str, str]]:
    """Pairs of the same module's name: in the checkpoint, in diffusers."""
    levels, per_level = len(layout.channels), layout.per_level
    downs, ups = ("downsamplers.0", "upsamplers.0")
    for level in range(levels):
        for layer in range(layout.layers):
            theirs = f"input_blocks.{1 + level * per_level + layer}"
            yield f"{theirs}.0", f"down_blocks.{level}.resnets.{layer}"
            yield f"{theirs}.1", f"down_blocks.{level}.attentions.{layer}"
        if level < levels - 1:
            yield f"input_blocks.{(level + 1) * per_level}.0", f"down_blocks.{level}.{downs}"
    yield from (
        ("middle_block.0", "mid_block.resnets.0"),
        ("middle_block.1", "mid_block.attentions.0"),
        ("middle_block.2", "mid_block.resnets.1"),
    )
    for level in range(levels):
        attends = layout.attention[levels - 1 - level]
        for layer in range(per_level):
            theirs = f"output_blocks.{level * per_level + layer}"
            yield f"{theirs}.0", f"up_blocks.{level}.resnets.{layer}"
            if attends:
                yield f"{theirs}.1", f"up_blocks.{level}.attentions.{layer}"
        if level < levels - 1:
            yield f"output_blocks.{(level + 1) * per_level - 1}.{1 + attends}", f"up_blocks.{level}.{ups}"


def split_heads(joined: Tensor, head_channels: int, new_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all heads, each (C, ...), from the (3 C, ...) rows of a joined projection.

    The old order is head by head (queries, keys and values of the first head, then of the second); the new one is all
    queries, all keys, all values.

    Example:
        >>> [rows.tolist() for rows in split_heads(torch.arange(12), 2, new_order=False)]
        [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    """
    width = joined.shape[0] // 3
    heads = width // (head_channels or width)
    grouped = (
        joined.unflatten(0, (3, width))
        if new_order
        else joined.unflatten(0, (heads, 3, width // heads)).transpose(0, 1).flatten(1, 2)
    )
    queries, keys, values = (rows.contiguous() for rows in grouped)
    return queries, keys, values


def _check_shapes(converted: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Every tensor of the new network, and no other, in its shape."""
    for name, tensor in wanted.items():
        if name not in converted:
            raise ModelError(
                f"The checkpoint lacks what diffusers calls '{name}', "
                f"{tuple(tensor.shape)}; it is incomplete or was changed."
            )
        if converted[name].shape != tensor.shape:
            raise ModelError(
                f"What diffusers calls '{name}' should have the shape {tuple(tensor.shape)}, the checkpoint has "
                f"{tuple(converted[name].shape)}; it was changed, or is of another program."
            )
    extra = sorted(set(converted) - set(wanted))
    if extra:
        raise ModelError(
            f"The checkpoint has what diffusers would call '{extra[0]}', which this "
            "network has not; it was changed, or is of another program."
        )


def _hash_file(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
