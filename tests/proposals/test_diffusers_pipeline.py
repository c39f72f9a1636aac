"""The pipeline of diffusers: the engine's answers in the shape of the image; parts that come and go as folders."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from peft import PeftModel

from progidiff import ProGiDiffPipeline
from progidiff.errors import ImageError, ModelError, PromptError, RequestError
from progidiff.images.reading import load_volume
from progidiff.model.adapters import AdapterStore, compute_base_digest
from progidiff.model.lora import LoraSettings, collect_tensors, inject_lora
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.testing import add_tiny_close_up
from support.shipped import CT, draw_abdomen
from support.snippets import list_snippets

ROOT = Path(__file__).parents[2]
FORMER = ROOT / "tests" / "data" / "former_0_1_0" / "model"


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory: pytest.TempPathFactory, phantom_writer: Callable[..., Path]) -> Path:
    return phantom_writer(tmp_path_factory.mktemp("pipeline") / "phantom.nii.gz", shape=(40, 30, 4))


@pytest.fixture(scope="module")
def image(image_file: Path) -> Any:
    return nibabel.load(image_file)


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with an adapter for MR."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("pipeline") / "model"))
    networks = Engine(folder, device="cpu", dtype="fp32").load()
    settings = LoraSettings(rank=2, alpha=4)
    inject_lora(networks.branch, None, settings)
    with torch.no_grad():
        for name, parameter in networks.branch.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    store = AdapterStore(folder / "adapters")
    store.add(
        "mr", "lora", collect_tensors(networks.branch, None, settings), modality="MR", structures=("liver",),
        base=compute_base_digest(folder), base_name="tiny@1", run={}, readme=lambda card: card.full_name,
        lora=settings,
    )  # fmt: skip
    store.publish("mr", 1)
    return folder


@pytest.fixture(scope="module")
def pipe(model: Path) -> ProGiDiffPipeline:
    loaded = ProGiDiffPipeline.from_pretrained(model)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def saved(pipe: ProGiDiffPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "saved"
    pipe.save_pretrained(folder)
    return folder


def ask(model: Path, file: Path, modality: str = "CT", **options: Any) -> Any:
    """What the engine that the server uses says of a file."""
    request = ProposalRequest(queries=parse_prompt("liver and spleen"), clean_up="small", **options)
    return Engine(model, device="cpu").propose(request, load_volume(file, modality))


# What comes back


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_the_pipeline_says_what_the_engine_says(
    model: Path, pipe: ProGiDiffPipeline, image_file: Path, image: Any, modality: str
):
    wanted = ask(model, image_file, modality, num_proposals=3, seed=5)
    found = pipe(image, "liver and spleen", num_proposals=3, generator=seeded(5), modality=modality)
    assert found.details.adapter == wanted.adapter == ("mr@1" if modality == "MR" else "")
    assert wanted.probabilities.any()
    assert np.array_equal(found.details.probabilities, wanted.probabilities)
    grid = load_volume(image_file, modality).grid
    assert found.labels == {"liver": 6, "spleen": 1}
    assert np.array_equal(found.consensus, wanted.label_map(grid, "consensus", found.labels))
    assert all(
        np.array_equal(found.proposals[k], wanted.label_map(grid, k + 1, found.labels))
        for k in range(len(found.proposals))
    )
    assert np.array_equal(found.agreement, wanted.agreement(grid))
    assert np.allclose(found.disagreement * 100, wanted.disagreement_map(grid), atol=1e-4)
    assert (found.proposals.shape, found.consensus.shape) == ((3, *image.shape), image.shape)
    assert (found.proposals.dtype, found.agreement.dtype) == (np.uint8, np.float32)
    assert found.warnings == (("mr@1 was trained on liver, not on spleen.",) if modality == "MR" else ())


def test_an_image_as_a_path_an_array_or_of_nibabel_is_the_same(pipe: ProGiDiffPipeline, image_file: Path, image: Any):
    common = {"num_proposals": 2, "num_inference_steps": 1, "modality": "CT", "return_dict": False}
    first = pipe(image, "liver", generator=seeded(), **common)
    assert first[0].any()
    array = np.asarray(image.dataobj)
    for given in ({"image": image_file}, {"image": array, "affine": image.affine}):
        again = pipe(prompt="liver", generator=seeded(), **given, **common)
        assert all(np.array_equal(one, other) for one, other in zip(first[:4], again[:4], strict=True))


def test_a_slice_as_shown_is_the_slice_of_the_volume(pipe: ProGiDiffPipeline, image: Any):
    array = np.asarray(image.dataobj)[:, :, 1:2]  # i to the left, j to the front, as the affine says
    common = {"num_proposals": 2, "modality": "CT"}
    whole = pipe(array, "liver", affine=np.diag([-5.5, 6.5, 4.0, 1.0]), generator=seeded(), **common)
    shown = array[:, ::-1, 0].T
    alone = pipe(shown, "liver", spacing=(6.5, 5.5), generator=seeded(), **common)
    assert whole.proposals.any()
    assert alone.proposals.shape == (2, *shown.shape)
    assert np.array_equal(alone.proposals, np.swapaxes(whole.proposals[:, :, ::-1, 0], 1, 2))
    flat = pipe(array[:, :, 0], "liver", affine=np.diag([-5.5, 6.5, 4.0, 1.0]), generator=seeded(), **common)
    assert np.array_equal(flat.agreement, whole.agreement[:, :, 0])


def test_a_used_generator_goes_on_and_a_new_one_starts_again(pipe: ProGiDiffPipeline, image: Any):
    generator = seeded(3)
    seeds = [
        pipe(image, "liver", num_proposals=1, num_inference_steps=1, generator=generator, modality="CT").seed
        for _ in range(2)
    ]
    assert seeds[0] == 3 != seeds[1]
    torch.manual_seed(1)
    first = pipe(image, "liver", num_proposals=1, num_inference_steps=1, modality="CT").seed
    torch.manual_seed(1)
    assert pipe(image, "liver", num_proposals=1, num_inference_steps=1, modality="CT").seed == first != 3


# Folders


def test_a_saved_pipeline_is_whole_and_answers_the_same(
    pipe: ProGiDiffPipeline, saved: Path, image: Any, caplog: pytest.LogCaptureFixture
):
    assert {path.name for path in saved.iterdir()} == {
        "model_index.json", "vae", "unet", "text_encoder", "tokenizer", "scheduler", "conditioning", "adapters",
        "README.md",
    }  # fmt: skip
    with caplog.at_level(logging.WARNING):
        again = ProGiDiffPipeline.from_pretrained(saved)
    assert not caplog.records
    assert sorted(again.components) == sorted(pipe.components)
    for modality in ("CT", "MR"):
        found, wanted = (
            one(image, "liver", num_proposals=2, generator=seeded(), modality=modality) for one in (again, pipe)
        )
        assert np.array_equal(found.details.probabilities, wanted.details.probabilities)
        assert found.details.adapter == wanted.details.adapter


def test_the_engine_serves_a_saved_pipeline_with_its_adapters(model: Path, saved: Path, image_file: Path):
    for modality in ("CT", "MR"):
        found = ask(saved, image_file, modality, num_proposals=2)
        assert np.array_equal(found.probabilities, ask(model, image_file, modality, num_proposals=2).probabilities)
    assert compute_base_digest(saved) == compute_base_digest(model)


def test_a_model_of_a_former_version_is_loaded_and_saved_in_the_present_layout(tmp_path: Path, image_file: Path):
    pipe = ProGiDiffPipeline.from_pretrained(FORMER)
    pipe.save_pretrained(tmp_path / "saved")
    assert compute_base_digest(tmp_path / "saved") == compute_base_digest(FORMER)
    found, wanted = (ask(folder, image_file, "MR", num_proposals=2) for folder in (tmp_path / "saved", FORMER))
    assert found.adapter == wanted.adapter == "mr@2"
    assert np.array_equal(found.probabilities, wanted.probabilities)


def test_a_model_that_draws_close_ups_does_so_here_and_where_it_is_saved(
    tiny_model: Path, tmp_path: Path, image_file: Path, image: Any
):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    plain = ask(folder, image_file, num_proposals=2)
    wanted = ask(add_tiny_close_up(folder), image_file, num_proposals=2)
    pipe = ProGiDiffPipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "saved")
    again = ProGiDiffPipeline.from_pretrained(tmp_path / "saved")
    assert wanted.probabilities.shape != plain.probabilities.shape
    for one in (pipe, again):
        found = one(image, "liver and spleen", num_proposals=2, generator=seeded(), modality="CT").details
        assert np.array_equal(found.probabilities, wanted.probabilities)
        assert found.num_inference_steps == wanted.num_inference_steps
    assert np.array_equal(ask(tmp_path / "saved", image_file, num_proposals=2).probabilities, wanted.probabilities)
    again.to(torch.bfloat16)
    assert again(image, "liver", num_proposals=2, generator=seeded(), modality="CT").proposals.any()


def test_an_exchanged_part_is_used_and_adapters_of_the_old_one_are_not(model: Path, image: Any, tmp_path: Path):
    pipe = ProGiDiffPipeline.from_pretrained(model)
    common = {"num_proposals": 2, "modality": "MR"}
    wanted = pipe(image, "liver", generator=seeded(), **common)
    adapted = PeftModel.from_pretrained(pipe.conditioning, model / "adapters" / "mr" / "1")
    pipe.conditioning = adapted
    with pytest.raises(ModelError, match="cannot save; merge it first"):
        pipe.save_pretrained(tmp_path)
    pipe.conditioning = adapted.merge_and_unload()
    found = pipe(image, "liver", generator=seeded(), **common)
    assert (wanted.details.adapter, found.details.adapter) == ("mr@1", "")
    assert np.array_equal(found.details.probabilities, wanted.details.probabilities)
    with pytest.raises(RequestError, match="was exchanged or changed"):
        pipe(image, "liver", adapter="mr", **common)
    pipe.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapters").exists()
    assert compute_base_digest(tmp_path / "merged") != compute_base_digest(model)


def test_the_pipeline_computes_in_bf16_when_asked(model: Path, image: Any):
    pipe = ProGiDiffPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)
    assert (pipe.unet.dtype, pipe.conditioning.dtype) == (torch.bfloat16, torch.float32)
    assert pipe(image, "liver", num_proposals=2, generator=seeded(), modality="CT").proposals.any()
    pipe.to(torch.bfloat16)
    assert pipe.conditioning.dtype == torch.bfloat16
    found = pipe(image, "liver", num_proposals=2, generator=seeded(), modality="MR")
    assert found.proposals.any()
    assert found.details.adapter == "mr@1"


# Refusals


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": np.zeros((4, 5, 6))}, RequestError, "needs its affine"),
        ({"image": np.zeros((4, 5))}, RequestError, r"needs spacing=\(mm from row to row"),
        ({"image": np.zeros((4, 5)), "spacing": (1, 0)}, RequestError, "needs spacing="),
        ({"image": np.zeros((4, 5)), "spacing": (1, 1), "affine": np.eye(4)}, RequestError, "not both"),
        ({"image": np.zeros((4, 5, 6)), "affine": np.eye(3)}, RequestError, r"shape \(4, 4\)"),
        ({"image": np.zeros((4, 5, 6)), "affine": np.eye(4)}, ImageError, "All voxels have the value 0"),
        ({"image": np.full((4, 5, 6), np.nan), "affine": np.eye(4)}, ImageError, "not finite"),
        ({"image": np.ones((4, 5, 6, 3)), "affine": np.eye(4)}, ImageError, "holds 3 volumes"),
        ({"image": np.ones((1, 5, 6)), "affine": np.eye(4)}, ImageError, "sagittal or coronal"),
        ({"affine": np.eye(4)}, RequestError, "A nibabel image says where its voxels lie"),
        ({"prompt": "splen"}, PromptError, "spleen"),
        ({"num_proposals": 0}, RequestError, "num_proposals"),
        ({"adapter": "nobody"}, RequestError, "There are: mr"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_cure(
    pipe: ProGiDiffPipeline, image: Any, changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        pipe(**{"image": image, "prompt": "liver", "modality": "CT", **changes})


def test_another_scheduler_is_refused(model: Path, image: Any):
    pipe = ProGiDiffPipeline.from_pretrained(model)
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ModelError, match="DDPMScheduler; the model was trained for few steps of a DDIMScheduler"):
        pipe(image, "liver")


def test_a_source_that_is_none_is_refused_without_asking_the_hub(tmp_path: Path, model: Path):
    with pytest.raises(ModelError, match="There is no model folder"):
        ProGiDiffPipeline.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="could not be fetched from the model hub"):
        ProGiDiffPipeline.from_pretrained("owner/nobody", local_files_only=True)
    with pytest.raises(RequestError, match="no option variant"):
        ProGiDiffPipeline.from_pretrained(model, variant="fp16")


# The pages


@pytest.mark.parametrize("page", ["README.md", "docs/how-to/python.md"])
def test_the_python_of_the_pages_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str):
    """In a folder like the checkout, with the shipped weights and a small drawn abdomen in the place of the sample."""
    (tmp_path / "apps").symlink_to(ROOT / "apps")
    (tmp_path / "sample_datastore").mkdir()
    abdomen = draw_abdomen(CT, -1000, 12)
    nibabel.save(
        nibabel.Nifti1Image(abdomen.array, abdomen.affine), tmp_path / "sample_datastore" / "sample_ct_abdomen.nii.gz"
    )
    monkeypatch.chdir(tmp_path)
    snippets = list_snippets(ROOT / page)
    assert snippets
    assert len(snippets[0].splitlines()) <= 11
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})
    drawn = nibabel.load("kidney_and_liver.nii.gz")
    assert drawn.shape == abdomen.array.shape
    assert 6 in np.unique(np.asarray(drawn.dataobj))
    if page != "README.md":
        assert (tmp_path / "ct-base" / "model_index.json").is_file()
