"""Guided-diffusion checkpoints as diffusers folders: the same numbers come out, and what cannot be converted says so.

`GuidedUNet` is that network written down again from its description (Dhariwal and Nichol, arXiv 2105.05233, sections 3
and B; Nichol and Dhariwal, arXiv 2102.09672), with the names that its files have, and random weights.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from progidiff.errors import ModelError, RequestError
from progidiff.textdiff.convert import (
    GuidedDiffusionOptions,
    Layout,
    check_options,
    convert_checkpoint,
    make_config,
    parse_flags,
    read_layout,
    rename_tensors,
)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice; the timestep is added between them, or scales and shifts the second norm's
    output.
    """

    def __init__(self, inside: int, outside: int, embedding: int, scale_shift: bool, resize: str | None = None) -> None:
        super().__init__()
        self.scale_shift, self.resize = scale_shift, resize
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inside), nn.SiLU(), nn.Conv2d(inside, outside, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outside if scale_shift else outside))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, outside), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outside, outside, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def _resized(self, x: Tensor) -> Tensor:
        if self.resize == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resize == "down" else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        hidden = self._resized(self.in_layers[:2](x))
        hidden = self.in_layers[2](hidden)
        told = self.emb_layers(embedding)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            hidden = self.out_layers[1:](self.out_layers[0](hidden) * (1 + scale) + shift)
        else:
            hidden = self.out_layers(hidden + told)
        return self.skip_connection(self._resized(x)) + hidden


class Attention(nn.Module):
    """Self-attention over all pixels, head by head."""

    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        flat = x.flatten(2)
        joined = self.qkv(self.norm(flat))
        size = x.shape[1] // self.heads
        found = []
        for head in range(self.heads):
            if self.new_order:  # all queries, all keys, all values
                starts = [part * x.shape[1] + head * size for part in range(3)]
            else:  # the first head's three, then the second's
                starts = [(3 * head + part) * size for part in range(3)]
            query, key, value = (joined[:, start : start + size] for start in starts)
            weights = torch.softmax(query.transpose(1, 2) @ key / math.sqrt(size), dim=2)
            found.append(value @ weights.transpose(1, 2))
        return x + self.proj_out(torch.cat(found, dim=1)).reshape(x.shape)


class Resample(nn.Module):
    """A convolution that halves, or one after doubling."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        if up:
            self.conv = nn.Conv2d(width, width, 3, padding=1)
        else:
            self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")) if hasattr(self, "conv") else self.op(x)


class GuidedUNet(nn.Module):
    """The whole network; tensors are named as in guided-diffusion's files."""

    def __init__(
        self, *, channels: int = 32, mult: tuple[int, ...] = (1, 2), layers: int = 1, attention: tuple[bool,
        ...] = (False, True),
        updown: bool = False, scale_shift: bool = False, head_channels: int | None = None, heads: int = 1,
        new_order: bool = False, outside: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.channels = channels
        wide = 4 * channels
        self.time_embed = nn.Sequential(nn.Linear(channels, wide), nn.SiLU(), nn.Linear(wide, wide))

        def attend(width: int) -> Attention:
            return Attention(width, width // head_channels if head_channels else heads, new_order)

        def join(width: int, up: bool) -> nn.Module:
            return Residual(width, width, wide, scale_shift, "up" if up else "down") if updown else Resample(width, up)

        width = channels * mult[0]
        down: list[list[nn.Module]] = [[nn.Conv2d(3, width, 3, padding=1)]]
        kept = [width]
        for level, factor in enumerate(mult):
            for _ in range(layers):
                down.append([Residual(width, channels * factor, wide, scale_shift)])
                width = channels * factor
                if attention[level]:
                    down[-1].append(attend(width))
                kept.append(width)
            if level < len(mult) - 1:
                down.append([join(width, up=False)])
                kept.append(width)
        middle = [Residual(width, width, wide, scale_shift), attend(width), Residual(width, width, wide, scale_shift)]
        up: list[list[nn.Module]] = []
        for level in reversed(range(len(mult))):
            for layer in range(layers + 1):
                up.append([Residual(width + kept.pop(), channels * mult[level], wide, scale_shift)])
                width = channels * mult[level]
                if attention[level]:
                    up[-1].append(attend(width))
                if level and layer == layers:
                    up[-1].append(join(width, up=True))
        self.input_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in down)
        self.middle_block = nn.ModuleList(middle)
        self.output_blocks = nn.ModuleList(nn.ModuleList(parts) for parts in up)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, outside, 3, padding=1))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        half = self.channels // 2
        angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half) / half)[None]
        embedding = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))

        def run(parts: nn.ModuleList, x: Tensor) -> Tensor:
            for part in parts:
                x = part(x) if isinstance(part, nn.Conv2d) else part(x, embedding)
            return x

        kept = []
        for parts in self.input_blocks:
            x = run(parts, x)
            kept.append(x)
        x = run(self.middle_block, x)
        for parts in self.output_blocks:
            x = run(parts, torch.cat([x, kept.pop()], dim=1))
        return self.out(x)


def make_network(seed: int = 0, **settings: Any) -> GuidedUNet:
    """With weights that are nowhere zero, so that every tensor counts."""
    torch.manual_seed(seed)
    network = GuidedUNet(**settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(
                torch.randn(parameter.shape) * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5)
                + (parameter.ndim == 1) * 0.2
            )
    return network.eval()


def save(network: nn.Module, folder: Path, **changes: Tensor) -> Path:
    torch.save(network.state_dict() | changes, folder / "model.pt")
    return folder / "model.pt"


NETWORKS: dict[str, tuple[dict[str, Any], GuidedDiffusionOptions]] = {
    "the 256 x 256 model's kind": (
        {
            "mult": (1, 2, 2),
            "layers": 2,
            "attention": (False, True, True),
            "updown": True,
            "scale_shift": True,
            "head_channels": 16,
            "outside": 6,
        },
        parse_flags(
            "--attention_resolutions 8,4 --channel_mult 1,2,2 --class_cond False "
            "--image_size 16 --learn_sigma True --noise_schedule linear --num_channels 32 --num_head_channels 16 "
            "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
        ),
    ),
    "plain": ({}, GuidedDiffusionOptions(num_heads=1)),
    "attention everywhere": (
        {"attention": (True, True), "head_channels": 8, "updown": True},
        GuidedDiffusionOptions(num_head_channels=8),
    ),
    "the new order of heads": (
        {"head_channels": 16, "new_order": True, "scale_shift": True},
        GuidedDiffusionOptions(num_head_channels=16, use_new_attention_order=True),
    ),
    "four heads at one width": ({"heads": 4}, GuidedDiffusionOptions(num_heads=4)),
    "one head at two widths": ({"heads": 1, "attention": (True, True)}, GuidedDiffusionOptions(num_heads=1)),
    "attention in the middle only": (
        {"attention": (False, False, False), "mult": (1, 1, 2)},
        GuidedDiffusionOptions(num_heads=1),
    ),
    "one level": (
        {"mult": (1,), "attention": (False,), "layers": 2},
        GuidedDiffusionOptions(num_heads=1, resblock_updown=False),
    ),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_converted_denoiser_computes_the_same(kind: str, tmp_path: Path):
    from diffusers import UNet2DModel

    settings, options = NETWORKS[kind]
    network = make_network(**settings)
    convert_checkpoint(save(network, tmp_path), tmp_path / "converted", options)
    unet = UNet2DModel.from_pretrained(tmp_path / "converted" / "unet").eval()
    noisy, times = torch.randn(2, 3, 16, 16), torch.tensor([50, 730])
    with torch.no_grad():
        wanted, found = network(noisy, times), unet(noisy, times).sample
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()


def test_the_order_of_heads_matters(tmp_path: Path):
    """Or the two tests of it above would say nothing."""
    from diffusers import UNet2DModel

    network = make_network(head_channels=16)
    noisy, times = torch.randn(1, 3, 16, 16), torch.tensor([50])
    path = save(network, tmp_path)
    differences = []
    for new_order in (False, True):
        convert_checkpoint(
            path,
            tmp_path / str(new_order),
            GuidedDiffusionOptions(num_head_channels=16, use_new_attention_order=new_order),
        )
        with torch.no_grad():
            found = UNet2DModel.from_pretrained(tmp_path / str(new_order) / "unet")(noisy, times).sample
            differences.append(float((found - network(noisy, times)).abs().max()))
    assert differences[0] < 1e-4
    assert differences[1] > 1e-2


def test_the_folder_is_a_diffusers_pipeline_with_the_schedule_of_the_flags(tmp_path: Path):
    from diffusers import DDPMPipeline

    path = save(make_network(outside=6), tmp_path)
    flags = (
        "--num_heads 1 --diffusion_steps 500 --predict_xstart True --learn_sigma True --image_size 16 "
        "--attention_resolutions 8 --num_channels 32"
    )
    record = convert_checkpoint(
        path, tmp_path / "converted", parse_flags(flags + " --num_res_blocks 1 --use_scale_shift_norm False")
    )
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "converted")
    betas = pipeline.scheduler.betas
    assert len(betas) == 500
    assert (float(betas[0]), float(betas[-1])) == pytest.approx(
        (0.0002, 0.04)
    )  # guided-diffusion keeps the amount of noise
    assert pipeline.scheduler.config.prediction_type == "sample"
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert json.loads((tmp_path / "converted" / "conversion.json").read_text()) == record
    assert record["flags"]["channel_mult"] == [1, 2]
    assert record["flags"]["attention_resolutions"] == [8]
    assert record["checkpoint"] == "model.pt"
    assert len(record["sha256"]) == 64


def test_the_cosine_schedule_is_that_of_the_paper(tmp_path: Path):
    from diffusers import DDPMScheduler

    convert_checkpoint(
        save(make_network(), tmp_path),
        tmp_path / "converted",
        GuidedDiffusionOptions(num_heads=1, noise_schedule="cosine"),
    )
    kept = DDPMScheduler.from_pretrained(tmp_path / "converted" / "scheduler").alphas_cumprod

    def wanted(t: int) -> float:  # equation 17 of arXiv 2102.09672
        return (math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2

    assert [float(kept[t]) for t in (49, 499, 899)] == pytest.approx([wanted(t + 1) for t in (49, 499, 899)], abs=1e-4)


def test_half_precision_halves_the_file_and_hardly_changes_the_result(tmp_path: Path):
    from diffusers import UNet2DModel

    path = save(make_network(), tmp_path)
    for name, half in (("full", False), ("half", True)):
        convert_checkpoint(path, tmp_path / name, GuidedDiffusionOptions(num_heads=1), half=half)
    sizes = [
        sum(f.stat().st_size for f in (tmp_path / name / "unet").glob("*.safetensors")) for name in ("full", "half")
    ]
    assert sizes[1] < 0.52 * sizes[0]
    noisy, times = torch.randn(1, 3, 16, 16), torch.tensor([50])
    with torch.no_grad():
        full, half = (
            UNet2DModel.from_pretrained(tmp_path / name / "unet", torch_dtype=torch.float32)(noisy, times).sample
            for name in ("full", "half")
        )
    assert 0 < (full - half).abs().max() < 0.02 * full.std()


@pytest.mark.parametrize("wrapper", ["state_dict", "model"])
def test_wrapped_names_and_tensors_are_found(wrapper: str, tmp_path: Path):
    tensors = {f"module.{name}": tensor for name, tensor in make_network().state_dict().items()}
    torch.save({wrapper: tensors, "step": 3}, tmp_path / "model.pt")
    assert (
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted", GuidedDiffusionOptions(num_heads=1))["flags"][
            "num_channels"
        ]
        == 32
    )


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ({"num_channels": 64}, "num_channels is given as 64, but the weights have 32"),
        ({"num_res_blocks": 2}, "num_res_blocks is given as 2, but the weights have 1"),
        ({"channel_mult": (1, 1)}, r"channel_mult is given as \(1, 1\), but the weights have \[1.0, 2.0\]"),
        (
            {"image_size": 16, "attention_resolutions": (16,)},
            r"attention_resolutions is given as \(16,\), but the weights have \[8\]",
        ),
        ({"learn_sigma": True}, "learn_sigma is given as True, but the weights have False"),
        ({"resblock_updown": True}, "resblock_updown"),
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm"),
        ({"image_size": 15}, "cannot be halved 1 times"),
        ({"num_heads": None}, "do not tell the number of attention heads"),
        ({"num_heads": None, "num_head_channels": 24}, "64 channels do not divide into heads of 24"),
        ({"num_heads": 5}, "64 channels do not divide into 5 heads"),
        ({"num_heads": 0}, "num_heads must be at least 1"),
        ({"noise_schedule": "sqrt"}, "noise_schedule must be linear or cosine"),
    ],
)
def test_a_flag_that_contradicts_the_weights_is_named(flags: dict[str, Any], complaint: str, tmp_path: Path):
    with pytest.raises(RequestError, match=complaint):
        convert_checkpoint(
            save(make_network(), tmp_path), tmp_path / "converted", GuidedDiffusionOptions(**({"num_heads": 1} | flags))
        )
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "settings, changes, options, complaint",
    [
        ({}, {"label_emb.weight": torch.zeros(10, 128)}, {}, "class-conditional"),
        ({}, {}, {"class_cond": True}, "class-conditional"),
        ({}, {}, {"diffusion_steps": 4000, "rescale_timesteps": True}, "rescale_timesteps with 4000"),
        ({}, {"input_blocks.0.0.weight": torch.zeros(32, 6, 3, 3)}, {}, "takes 6 channels and gives 3"),
        ({"mult": (2, 2)}, {}, {}, "channel_mult that does not begin with 1"),
        ({"attention": (True, True)}, {}, {"num_heads": 4}, r"4 attention heads at each of the widths \[32, 64\]"),
        ({}, {"middle_block.1.extra.weight": torch.zeros(3)}, {}, "'middle_block.1.extra.weight' that has no place"),
        (
            {},
            {"out.2.bias": torch.zeros(7)},
            {},
            r"'conv_out.bias' should have the shape \(3,\), the checkpoint has \(7,\)",
        ),
        ({}, {"input_blocks.2.1.qkv.weight": torch.zeros(192, 64, 1)}, {}, "has no place"),
    ],
)
def test_a_network_that_cannot_be_converted_is_refused_with_the_reason(
    settings: dict[str, Any], changes: dict[str, Tensor], options: dict[str, Any], complaint: str, tmp_path: Path
):
    path = save(make_network(**settings), tmp_path, **changes)
    with pytest.raises(ModelError, match=complaint):
        convert_checkpoint(path, tmp_path / "converted", GuidedDiffusionOptions(**({"num_heads": 1} | options)))
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    "removed, complaint",
    [
        ("input_blocks.2.", r"'input_blocks.2' has no weights \(conv_resample off\?\)"),
        ("middle_block.1.proj_out.bias", "lacks what diffusers calls 'mid_block.attentions.0.to_out.0.bias'"),
        ("out.2.", "no guided-diffusion denoiser: it has no tensor 'out.2.weight'"),
        ("input_blocks.1.0.out_layers.3.", "where guided-diffusion has a residual block"),
        ("output_blocks.3.", "4 blocks going down and 3 going up"),
    ],
)
def test_an_incomplete_checkpoint_says_what_is_missing(removed: str, complaint: str, tmp_path: Path):
    tensors = {name: tensor for name, tensor in make_network().state_dict().items() if not name.startswith(removed)}
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(ModelError, match=complaint):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted", GuidedDiffusionOptions(num_heads=1))


class Harmful:
    """Does something when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_checkpoint_that_runs_code_is_refused_and_runs_nothing(tmp_path: Path):
    torch.save({"weight": Harmful(tmp_path / "harm")}, tmp_path / "model.pt")
    with pytest.raises(ModelError, match="cannot be read as a PyTorch checkpoint"):
        convert_checkpoint(tmp_path / "model.pt", tmp_path / "converted")
    assert not (tmp_path / "harm").exists()


def test_other_files_are_refused(tmp_path: Path):
    (tmp_path / "text.pt").write_text("hello", encoding="utf-8")
    torch.save({"state": {0: {"step": 3}}}, tmp_path / "optimiser.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, complaint in (
        ("text", "cannot be read"),
        ("missing", "cannot be read"),
        ("optimiser", "not a mapping"),
        ("list", "not a mapping"),
    ):
        with pytest.raises(ModelError, match=complaint):
            convert_checkpoint(tmp_path / f"{name}.pt", tmp_path / "converted")


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "converted").mkdir()
    with pytest.raises(RequestError, match="nothing is overwritten"):
        convert_checkpoint(save(make_network(), tmp_path), tmp_path / "converted", GuidedDiffusionOptions(num_heads=1))


def test_flags_are_read_as_guided_diffusion_reads_them():
    flags = parse_flags(
        "--channel_mult 1,2.5 --num_head_channels=-1 --use_new_attention_order True "
        "--dropout 0.1 --num_heads_upsample -1"
    )
    assert flags == GuidedDiffusionOptions(channel_mult=(1.0, 2.5), num_heads=4, use_new_attention_order=True)
    assert parse_flags("").num_heads == 4


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("--num_channels", "must be pairs"),
        ("--num_channels --image_size 3", "must be pairs"),
        ("num_channels 3", "must be pairs"),
        ("--num_channels three", r"'--num_channels three' is not of the right kind \(int\)"),
        ("--learn_sigma perhaps", r"right kind \(bool\)"),
        ("--large_size 256", "'--large_size' is no flag"),
    ],
)
def test_flags_that_cannot_be_read_are_named(text: str, complaint: str):
    with pytest.raises(RequestError, match=complaint):
        parse_flags(text)


def test_the_published_256_pixel_model_fits_name_by_name_and_shape_by_shape():
    """552 million parameters as the paper counts them; without memory for any of them."""
    from diffusers import UNet2DModel

    options = parse_flags(
        "--attention_resolutions 32,16,8 --class_cond False --diffusion_steps 1000 "
        "--image_size 256 --learn_sigma True --noise_schedule linear --num_channels 256 --num_head_channels 64 "
        "--num_res_blocks 2 --resblock_updown True --use_fp16 True --use_scale_shift_norm True"
    )
    attention = (False, False, False, True, True, True)
    with torch.device("meta"):
        network = GuidedUNet(
            channels=256,
            mult=(1, 1, 2, 2, 4, 4),
            layers=2,
            attention=attention,
            updown=True,
            scale_shift=True,
            head_channels=64,
            outside=6,
        )
        tensors = network.state_dict()
        layout = read_layout(tensors)
        check_options(options, layout)
        wanted = UNet2DModel(**make_config(options, layout, 64)).state_dict()
    assert layout == Layout((256, 256, 512, 512, 1024, 1024), 2, attention, True, True, 6)
    renamed = rename_tensors(tensors, layout, 64, new_order=False)
    assert {name: tensor.shape for name, tensor in renamed.items()} == {
        name: tensor.shape for name, tensor in wanted.items()
    }
    assert 552e6 < sum(tensor.numel() for tensor in renamed.values()) < 553e6
