"""A model as a MONAI bundle: ``python -m monai.bundle run`` segments a file with it.

::

    <bundle>/
      configs/metadata.json    what it is, what goes in and comes out, which packages it needs
      configs/inference.json   image, prompt and options -> mask, proposals, agreement
      docs/README.md           the model's card
      models/                  the whole model, see `ProGiDiffPipeline.save_pretrained`
      LICENSE

The bundle runs this package, which has to be installed: a prompt, K proposals and the way back to the image's grid are
no network that MONAI's own inferers could drive. So it answers as the server does, and MONAI can neither train it nor
export it to TorchScript.
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

import progidiff
from progidiff.errors import RequestError
from progidiff.images.reading import read_grid
from progidiff.images.writing import save_mask
from progidiff.prompts.structures import number_structures
from progidiff.storage.app_folder import find_model
from progidiff.storage.atomic import atomic_folder

if TYPE_CHECKING:
    from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
NEEDED = ("torch", "numpy", "nibabel", "diffusers", "transformers", "peft")

INFERENCE: dict[str, Any] = {
    "imports": [
        "$import torch",
        "$from progidiff.exchange.monai_bundle import open_pipeline",
        "$from progidiff.exchange.monai_bundle import segment",
    ],
    "bundle_root": ".",
    "device": "$'cuda' if torch.cuda.is_available() else 'cpu'",
    "image": "image.nii.gz",
    "prompt": "all",
    "modality": "auto",
    "num_proposals": 4,
    "seed": 0,
    "output_dir": "$@bundle_root + '/eval'",
    "pipeline": "$open_pipeline(@bundle_root + '/models', @device)",
    "run": ["$segment(@pipeline, @image, @prompt, @output_dir, @modality, @num_proposals, @seed)"],
}
"""``configs/inference.json``: names that a command may override, and what is run."""


def export_bundle(target: Path, model: Path | None = None) -> Path:
    """Write a model as a MONAI bundle.

    Args:
        target: Must not exist.
        model: A model folder; None for the shipped one.

    Raises:
        RequestError: if the target exists.
        ModelError: if the model cannot be loaded.
    """
    from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline

    if target.exists():
        raise RequestError(f"'{target}' exists; name a folder that does not, nothing is overwritten.")
    source = find_model() if model is None else model
    pipe = ProGiDiffPipeline.from_pretrained(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target) as scratch:
        pipe.save_pretrained(scratch / "models")
        for folder in ("configs", "docs"):
            (scratch / folder).mkdir()
        for name, values in (("metadata", describe_bundle(pipe)), ("inference", INFERENCE)):
            text = json.dumps(values, indent=4, ensure_ascii=False) + "\n"
            (scratch / "configs" / f"{name}.json").write_text(text, encoding="utf-8")
        card = scratch / "models" / "README.md"
        if card.is_file():
            shutil.copyfile(card, scratch / "docs" / "README.md")
        (scratch / "LICENSE").write_text(
            "The weights in models/ are under the terms that docs/README.md names. The program that runs them, "
            "progidiff, is under the Apache License, Version 2.0.\n",
            encoding="utf-8",
        )
    return target


def describe_bundle(pipe: ProGiDiffPipeline) -> dict[str, Any]:
    """``configs/metadata.json``, as MONAI's bundle specification has it."""
    card = pipe.card
    ids = dict(sorted(number_structures(card.structures).items(), key=lambda item: item[1]))
    place = {"num_channels": 1, "spatial_shape": ["*", "*", "*"], "is_patch_data": False}
    values = [-1024, 3071] if card.modality == "CT" else [0, 65535]
    return {
        "schema": SCHEMA,
        "version": f"{card.version}.0.0" if card.version.isdigit() else card.version,
        "changelog": {f"{card.version}.0.0" if card.version.isdigit() else card.version: f"export of {card.full_name}"},
        "monai_version": metadata.version("monai"),
        "pytorch_version": metadata.version("torch").partition("+")[0],
        "numpy_version": metadata.version("numpy"),
        "required_packages_version": {
            "progidiff": progidiff.__version__,
            **{name: metadata.version(name).partition("+")[0] for name in NEEDED if name not in ("torch", "numpy")},
        },
        "name": card.full_name,
        "task": f"Prompt-conditioned proposals of masks in {card.modality}",
        "description": f"Several plausible masks for a prompt; trained on {', '.join(card.structures)}.",
        "authors": "The ProGiDiff Label developers",
        "copyright": "See docs/README.md for the terms of the weights",
        "intended_use": "Research, to propose labels that a person corrects. Not a medical device.",
        "references": ["ProGiDiff: prompt-guided diffusion-based medical image segmentation, arXiv:2601.16060"],
        "network_data_format": {
            "inputs": {
                "image": {
                    "type": "image",
                    "format": "hounsfield" if card.modality == "CT" else "magnitude",
                    "modality": card.modality,
                    "dtype": "float32",
                    "value_range": values,
                    "channel_def": {"0": "image"},
                    **place,
                }
            },
            "outputs": {
                "pred": {
                    "type": "image",
                    "format": "segmentation",
                    "dtype": "uint8",
                    "value_range": [0, max(ids.values())],
                    "channel_def": {"0": "background", **{str(value): name for name, value in ids.items()}},
                    **place,
                }
            },
        },
    }


def open_pipeline(folder: str, device: str) -> ProGiDiffPipeline:
    """The model of a bundle, on a device."""
    from progidiff.proposals.diffusers_pipeline import ProGiDiffPipeline

    return ProGiDiffPipeline.from_pretrained(folder).to(device)


def segment(
    pipe: ProGiDiffPipeline,
    image: str,
    prompt: str,
    output_dir: str,
    modality: str = "auto",
    num_proposals: int = 4,
    seed: int = 0,
) -> dict[str, Path]:
    """Segment one file; what ``run`` of the bundle does.

    Args:
        pipe: The model.
        image: NIfTI, NRRD, MetaImage or a folder with one DICOM series.
        prompt: What to segment.
        output_dir: Made when needed.
        modality: "CT", "MR", or "auto" to find out.
        num_proposals: K.
        seed: Of the noise.

    Returns:
        The files written: "mask" (the consensus), "agreement", "proposal_1" and so on, and "result" (JSON: the label
        ids, volumes in ml, disagreement, warnings).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    found = pipe(image, prompt, num_proposals, generator=generator, modality=modality)
    grid, folder = read_grid(image), Path(output_dir)
    maps: dict[str, NDArray[Any]] = {"mask": found.consensus, "agreement": found.agreement}
    maps |= {f"proposal_{k}": mask for k, mask in enumerate(found.proposals, start=1)}
    files = {name: save_mask(array, grid, folder / f"{name}.nii.gz") for name, array in maps.items()}
    told = {"image": image, "labels": found.labels, **found.details.summary(), "warnings": list(found.warnings)}
    files["result"] = folder / "result.json"
    files["result"].write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return files
