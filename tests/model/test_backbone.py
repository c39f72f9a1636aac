"""Any Stable-Diffusion folder: what is missing is named, what is there is read lazily, and what is exported runs in
plain diffusers.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel

from progidiff.errors import BackboneError
from progidiff.model.backbone import Backbone, check_backbone_folder, export_backbone, pick_device, pick_dtype
from progidiff.training.build_model import MINILM, create_branch
from support.toy_stable_diffusion import SD15_SCHEDULER, write_clip

SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""unet/config.json of Stable Diffusion 1.5."""

SD15_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
    "scaling_factor": 0.18215,
}
"""vae/config.json of Stable Diffusion 1.5."""


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the toy backbone that a test may damage."""
    return Path(shutil.copytree(tiny_model / "backbone", tmp_path / "backbone"))


def write_settings_only(folder: Path, unet: dict[str, Any], vae: dict[str, Any]) -> Path:
    """A folder that is complete by its file names; its weight files are empty, so only settings can be read."""
    for part, settings in {"unet": unet, "vae": vae, "text_encoder": {"hidden_size": 768}}.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(settings))
        (folder / part / "model.safetensors").touch()
    for part, name, settings in (
        ("tokenizer", "tokenizer_config.json", {}),
        ("scheduler", "scheduler_config.json", SD15_SCHEDULER),
    ):
        (folder / part).mkdir()
        (folder / part / name).write_text(json.dumps(settings))
    return folder


EMBEDDED_UNET = {
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 384,
    "norm_num_groups": 16,
}


@pytest.mark.parametrize("settings", [SD15_UNET, EMBEDDED_UNET], ids=["Stable Diffusion 1.5", "embedded"])
@torch.no_grad()
def test_residual_slots_are_those_of_diffusers_controlnet(tmp_path: Path, settings: dict[str, Any]):
    channels, strides = Backbone(
        write_settings_only(tmp_path / "sd", settings, SD15_VAE), device="cpu"
    ).residual_slots()
    with torch.device("meta"):  # shapes without 860 M numbers
        controlnet = ControlNetModel.from_unet(UNet2DConditionModel(**settings), load_weights_from_unet=False)
        width = settings["cross_attention_dim"]
        down, middle = controlnet(
            torch.zeros(1, 4, 64, 64),
            torch.zeros(1),
            torch.zeros(1, 3, width),
            torch.zeros(1, 3, 512, 512),
            return_dict=False,
        )
    assert channels == tuple(r.shape[1] for r in [*down, middle])
    assert strides == tuple(512 // r.shape[-1] for r in [*down, middle])


def test_nothing_is_loaded_until_it_is_used(tmp_path: Path):
    backbone = Backbone(write_settings_only(tmp_path / "sd", SD15_UNET, SD15_VAE), device="cpu")
    assert (backbone.latent_stride, backbone.text_features) == (8, 768)
    assert backbone.scheduler_config["beta_end"] == 0.012
    with pytest.raises(BackboneError, match="Part 'unet' of the backbone .* cannot be loaded"):
        _ = backbone.unet


def test_every_missing_part_is_named_at_once(folder: Path):
    shutil.rmtree(folder / "tokenizer")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    next((folder / "unet").glob("*.safetensors")).unlink()
    with pytest.raises(
        BackboneError,
        match=(
            r"Missing: "
            r"(?=.*tokenizer/)(?=.*scheduler/scheduler_config\.json)"
            r"(?=.*unet/\*\.safetensors).*leave the backbone option out"
        ),
    ) as err:
        Backbone(folder, device="cpu")
    assert "vae/" not in str(err.value)
    assert "text_encoder/" not in str(err.value)


def test_an_empty_folder_is_missing_everything(tmp_path: Path):
    with pytest.raises(BackboneError, match="(?=.*vae/)(?=.*unet/)(?=.*text_encoder/)(?=.*tokenizer/)(?=.*scheduler/)"):
        check_backbone_folder(tmp_path)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(folder: Path):
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        BackboneError, match=r"unet/\*\.safetensors \(there is a \.bin: .*convert it with .*safe_serialization=True"
    ):
        Backbone(folder, device="cpu")


def test_damaged_weights_are_named(folder: Path):
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BackboneError, match="Part 'unet' of the backbone .* cannot be loaded"):
        _ = Backbone(folder, device="cpu").unet


def test_settings_that_are_no_json_are_named(folder: Path):
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(BackboneError, match=r"unet/config\.json' cannot be read as JSON"):
        Backbone(folder, device="cpu").residual_slots()


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(BackboneError, match="does not exist. Give a folder in diffusers format or a hub id"):
        Backbone(tmp_path / "nowhere", device="cpu")


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(
        BackboneError,
        match=(
            "'someone/some-model' is no local folder and could not be fetched .*Download "
            "it on a machine with network access"
        ),
    ):
        Backbone("someone/some-model", device="cpu")


@pytest.mark.parametrize(
    "pointer, message",
    [
        (
            {"package": "no_such_package", "path": "model", "pip": "no-such-package==1"},
            "'no_such_package', which is not installed; run `pip install no-such-package==1`",
        ),
        ({"package": "no_such_package", "path": "model"}, "which is not installed; run `pip install no_such_package`"),
        ({"package": "no_such_package.part", "path": "model"}, r"'no_such_package\.part', which is not installed"),
        ({"package": MINILM["package"], "path": "elsewhere"}, "has no folder 'elsewhere'"),
        ({"path": "model"}, "must name a Python package and a path in it"),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "tokenizer"])
def test_a_part_in_a_package_that_is_not_there_says_what_to_install(
    folder: Path, part: str, pointer: dict[str, str], message: str
):
    (folder / part / "package.json").write_text(json.dumps(pointer))
    with pytest.raises(BackboneError, match=message):
        Backbone(folder, device="cpu").encode_text(["liver"])


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x"])
def test_an_unknown_device_is_refused_and_an_empty_one_picks(device: str):
    if device:
        with pytest.raises(BackboneError, match="is not one that torch knows; use 'cpu', 'cuda'"):
            pick_device(device)
    else:
        assert pick_device(device) == pick_device(None)


def test_a_device_that_torch_knows_but_cannot_compute_on_is_refused():
    with pytest.raises(BackboneError, match="'meta' is not supported; use 'cpu', 'cuda'"):
        pick_device("meta")


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackboneError, match="'cuda:0' was asked for, but torch sees no CUDA device"):
        pick_device("cuda:0")


def test_precision_follows_the_device_and_the_option():
    cpu = torch.device("cpu")
    assert (pick_dtype(cpu), pick_dtype(cpu, "bf16")) == (torch.float32, torch.bfloat16)
    assert pick_dtype(torch.device("cuda"), "fp16") == torch.float16
    with pytest.raises(BackboneError, match="'fp16' is not usable on the CPU; use 'bf16' or 'fp32'"):
        pick_dtype(cpu, "fp16")
    with pytest.raises(BackboneError, match="dtype 'int8' is unknown; use one of fp32, bf16, fp16"):
        pick_dtype(cpu, "int8")


def test_text_is_encoded_with_its_padding_masked(tiny_model: Path):
    backbone = Backbone(tiny_model / "backbone", device="cpu", dtype="fp32")
    tokens, mask, pooled = backbone.encode_text(["mask of the liver", "mask of the portal and splenic veins", ""])
    assert tokens.shape == (3, mask.shape[1], 384)
    assert mask.sum(1).tolist() == [6, 11, 2]
    alone = backbone.encode_text(["mask of the liver"])
    torch.testing.assert_close(alone[0][0], tokens[0, :6], atol=1e-4, rtol=0)
    torch.testing.assert_close(alone[2][0], pooled[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_clip_encoder_reads_its_own_padding(folder: Path):
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    write_clip(folder, width=384, layers=1, heads=6)
    backbone = Backbone(folder, device="cpu", dtype="fp32")
    tokens, mask, pooled = backbone.encode_text(["mask of the liver", ""])
    assert tokens.shape == (2, 77, 384)
    assert mask is None
    assert torch.isfinite(pooled).all()
    assert backbone.text_features == 384
    assert backbone.unet(torch.zeros(2, 4, 4, 8), 1, tokens).sample.shape == (2, 4, 4, 8)


def test_longer_text_than_the_encoder_reads_is_cut(tiny_model: Path):
    tokens, _, _ = Backbone(tiny_model / "backbone", device="cpu").encode_text(["liver " * 300])
    assert tokens.shape[1] == 77


def run_exported(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_backbone(tiny_model / "backbone", tmp_path_factory.mktemp("export") / "exported")


def test_an_exported_backbone_runs_in_plain_diffusers(exported: Path):
    generator = torch.Generator().manual_seed(0)
    images = run_exported(exported)(
        "mask of the liver",
        height=32,
        width=64,
        num_inference_steps=2,
        guidance_scale=2.0,
        generator=generator,
        output_type="np",
    ).images
    assert images.shape == (1, 32, 64, 3)
    assert float(images.std()) > 0


def test_an_exported_backbone_needs_no_package_and_reads_text_as_before(exported: Path, tiny_model: Path):
    assert not list(exported.rglob("package.json"))
    assert (exported / "text_encoder" / "model.safetensors").is_file()
    inside, outside = (
        Backbone(f, device="cpu", dtype="fp32").encode_text(["mask of the aorta"])
        for f in (tiny_model / "backbone", exported)
    )
    assert torch.equal(inside[0], outside[0])
    pipeline = run_exported(exported)
    embedded = pipeline.encode_prompt("mask of the aorta", "cpu", 1, False)[0]
    torch.testing.assert_close(embedded[:, : inside[0].shape[1]], inside[0], atol=1e-4, rtol=0)


def test_an_export_is_readable_by_others_and_leaves_no_old_versions_in(folder: Path, tmp_path: Path):
    shutil.copytree(folder / "unet", folder / ".unet.previous")
    target = export_backbone(folder, tmp_path / "out" / "exported")
    assert target.stat().st_mode & 0o777 == 0o755
    assert not [p.name for p in target.iterdir() if p.name.startswith(".")]
    assert [p.name for p in target.parent.iterdir()] == ["exported"]


def test_an_export_overwrites_nothing(exported: Path, tiny_model: Path):
    with pytest.raises(BackboneError, match="exists; give a folder that does not, nothing is overwritten"):
        export_backbone(tiny_model / "backbone", exported)


def test_an_export_that_fails_leaves_nothing_behind(folder: Path, tmp_path: Path):
    (folder / "text_encoder" / "package.json").write_text(json.dumps({"package": "no_such_package", "path": "model"}))
    with pytest.raises(BackboneError, match="which is not installed"):
        export_backbone(folder, tmp_path / "out" / "exported")
    assert not (tmp_path / "out").exists()


MEASURE = """
import json, pathlib, re, resource, sys, time
import torch
from progidiff.backbone import Backbone
from progidiff.codec import MaskCodec
from progidiff.pipeline import ProposalPipeline
from progidiff.training.architecture import create_branch

def peak():
    # getrusage would start from the peak of the process that started this one.
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

figures = {"imported_gb": peak()}
started = time.monotonic()
backbone = Backbone(sys.argv[1], device="cpu", dtype="bf16")
figures["parameters_m"] = sum(p.numel() for p in backbone.unet.parameters()) / 1e6
parts = (backbone.vae, backbone.text_encoder)
branch = create_branch(backbone, 512, 512, (0.5, 1.0)).eval()
pipeline = ProposalPipeline(backbone, branch, MaskCodec(backbone.vae))
figures |= {"load_seconds": time.monotonic() - started, "loaded_gb": peak()}

started = time.monotonic()
features = pipeline.encode_slices(torch.rand(1, 3, 512, 512) * 2 - 1)
prompts = pipeline.encode_prompts(["liver"])
evidence = pipeline.predict_evidence(features, prompts)
down, middle = branch.compute_residuals(features, evidence)
noise = pipeline.draw_noise(1, seed=0)
figures["condition_seconds"] = time.monotonic() - started

started = time.monotonic()
with torch.no_grad():
    timestep = torch.tensor(999)
    conditioned = pipeline._predict(noise, timestep, prompts.tokens, prompts.mask, down, middle)
    figures["denoise_seconds"] = time.monotonic() - started
    plain = backbone.unet(noise.bfloat16(), timestep, prompts.tokens).sample.float()
figures |= {"latent": list(conditioned.shape), "finite": bool(conditioned.isfinite().all())}
figures |= {"unchanged": bool(torch.equal(conditioned, plain))}
figures["denoised_gb"] = peak()
started = time.monotonic()
proposals = pipeline.propose(features, evidence, prompts, [(0, 0)], noise, 1)
figures |= {"propose_seconds": time.monotonic() - started, "proposals": list(proposals.shape), "peak_gb": peak()}
print(json.dumps(figures))
"""


def write_stable_diffusion(folder: Path, dtype: torch.dtype) -> Path:
    """Stable Diffusion 1.5 in every width, with random weights."""
    from diffusers import AutoencoderKL

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        UNet2DConditionModel(**SD15_UNET).save_pretrained(folder / "unet")
        AutoencoderKL(**SD15_VAE).save_pretrained(folder / "vae")
    finally:
        torch.set_default_dtype(before)
    write_clip(folder, width=768, layers=12, heads=12, dtype=dtype)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SD15_SCHEDULER))
    return folder


@pytest.mark.slow
def test_stable_diffusion_1_5_at_its_true_width_denoises_a_64_x_64_latent_on_the_cpu(
    tmp_path: Path, record_property: Callable[[str, object], None]
):
    started = time.monotonic()
    folder = write_stable_diffusion(tmp_path / "sd15", torch.bfloat16)
    written = time.monotonic() - started
    # In a process of its own, so that the peak is that of loading and denoising, not that of making weights up.
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    figures = {"write_seconds": written, **json.loads(result.stdout.splitlines()[-1])}
    for name, value in figures.items():
        record_property(name, value)
    print(json.dumps({k: round(v, 2) if isinstance(v, float) else v for k, v in figures.items()}))
    assert figures["parameters_m"] == pytest.approx(859.5, abs=0.1)
    assert figures["latent"] == [1, 4, 64, 64]
    assert figures["finite"]
    assert figures["unchanged"]
    assert figures["proposals"] == [1, 1, 512, 512]
    assert figures["peak_gb"] < 8


def test_a_branch_for_stable_diffusion_1_5_has_its_thirteen_slots(tmp_path: Path):
    backbone = Backbone(write_settings_only(tmp_path / "sd", SD15_UNET, SD15_VAE), device="cpu")
    branch = create_branch(backbone, 512, 512, (0.5, 1.0))
    assert branch.config.slot_channels == (320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280)
    assert branch.config.slot_strides == (8, 8, 8, 16, 16, 16, 32, 32, 32, 64, 64, 64, 64)
    assert DDIMScheduler.from_config(backbone.scheduler_config).config.num_train_timesteps == 1000
