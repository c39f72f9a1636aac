"""What the shipped weights propose for generated images: the requests, and their results as plain arrays.

`tests/data/make_proposals.py` wrote the results of ct-base@3 down; `test_shipped_proposals.py` compares with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import nibabel
import numpy as np
import torch

from progidiff.images.volume import Volume
from progidiff.prompts.parser import parse_prompt

# Everything that may move is imported here and nowhere else.
from progidiff.proposals.engine import Engine
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.store import ProposalStore
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.server.options import ServerOptions
from progidiff.server.tasks.slices import SliceInferTask
from progidiff.server.tasks.volumes import ProposalInferTask
from progidiff.textdiff.model import load_textdiff
from support.servers import APP
from support.tissue import SENTENCES, draw_tissue

MODEL = APP / "model"
REFERENCE = Path(__file__).resolve().parents[1] / "data" / "proposals_ct_base_3.npz"
SHAPE, EDGES, LOWEST = (128, 96, 3), (3.0, 3.0, 8.0), -13.0
"""Voxels and millimetres of the drawn abdomen, and the height of its lowest slice."""

CT = {
    "fat": -100,
    "muscle": 55,
    "bone": 180,
    "liver": 105,
    "spleen": 115,
    "stomach": 40,
    "kidney": 165,
    "aorta": 150,
    "cava": 130,
    "pancreas": 95,
}
T2 = {
    "fat": 40,
    "muscle": 90,
    "bone": 60,
    "liver": 150,
    "spleen": 420,
    "stomach": 330,
    "kidney": 520,
    "aorta": 20,
    "cava": 30,
    "pancreas": 200,
}
"""HU, and intensities of a fat-suppressed T2 image in no unit."""

ENDLESS = 1e6
ORGANS = (
    ("fat", (0, 0, 0), (165, 115, ENDLESS)),
    ("muscle", (0, 0, 0), (148, 98, ENDLESS)),
    ("fat", (0, -8, 0), (134, 84, ENDLESS)),
    ("bone", (0, 62, 0), (24, 24, ENDLESS)),
    ("liver", (-60, -8, 30), (76, 68, 72)),
    ("spleen", (92, 30, 38), (28, 40, 50)),
    ("stomach", (52, -22, 38), (44, 34, 46)),
    ("kidney", (-50, 44, -34), (27, 24, 52)),
    ("kidney", (56, 42, -20), (27, 24, 54)),
    ("aorta", (16, 32, 0), (11, 11, ENDLESS)),
    ("cava", (-20, 30, 0), (12, 10, ENDLESS)),
    ("pancreas", (4, 4, 6), (56, 11, 13)),
)
"""What it is, centre and radii in millimetres to Left, Posterior, Superior; later ones cover earlier ones."""


@dataclass(frozen=True)
class Case:
    """One result.

    Attributes:
        masks: Of K proposals, as a viewer shows them: bool, the last two axes are rows and columns.
        floats: Numbers that go with them.
        sha256: Of what the networks gave before a threshold was applied, where there is such a thing.
    """

    masks: np.ndarray
    floats: dict[str, np.ndarray]
    sha256: str = ""


def draw_abdomen(values: dict[str, int], air: int, noise: float) -> Volume:
    """An abdomen of ellipsoids in whole numbers, LPS, the same on every machine."""
    x, y, z = ((np.arange(size) - (size - 1) / 2) * edge for size, edge in zip(SHAPE, EDGES, strict=True))
    x, y, z = x[:, None, None], y[None, :, None], (LOWEST + np.arange(SHAPE[2]) * EDGES[2])[None, None, :]
    image = np.full(SHAPE, float(air))
    for name, centre, radii in ORGANS:
        distance = (
            ((x - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((z - centre[2]) / radii[2]) ** 2
        )
        image[distance <= 1] = values[name]
    image += np.random.default_rng(0).normal(0, noise, SHAPE)
    affine = np.diag([-EDGES[0], -EDGES[1], EDGES[2], 1.0])
    affine[:3, 3] = [EDGES[0] * (SHAPE[0] - 1) / 2, EDGES[1] * (SHAPE[1] - 1) / 2, LOWEST]
    modality = "CT" if air < 0 else "MR"
    return Volume(
        np.rint(image).clip(min=min(air, 0) - 100 if air < 0 else 0).astype(np.int16),
        affine,
        modality,
        "option",
        f"drawn_{modality}",
    )


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Networks in fp32 also on processors that are faster in bf16: results of two machines can be compared."""
    with mock.patch("torch.cpu._is_avx512_bf16_supported", return_value=False):
        yield


@lru_cache(maxsize=2)
def load_engine(full: bool) -> Engine:
    """The shipped weights; in fp32, or in what this processor is fast in."""
    with full_precision() if full else contextlib.nullcontext():
        engine = Engine(MODEL, device="cpu")
        engine.load()
        return engine


def propose(volume: Volume, prompt: str, full: bool = True, **options: Any) -> Case:
    """K = 4, 2 steps, seed 0."""
    engine = load_engine(full)
    with full_precision() if full else contextlib.nullcontext():
        request = ProposalRequest(
            queries=parse_prompt(prompt, engine.structures), num_proposals=4, num_inference_steps=2, seed=0, **options
        )
        return describe(engine.propose(request, volume))


def describe(result: VolumeProposals) -> Case:
    """Masks (P, K, Z, Y, X) on the image's grid, and what is derived from them."""
    depth = result.grid.shape[0]
    masks = np.stack(
        [np.stack([result.slice_masks(name, z) for z in range(depth)], axis=1) for name in result.structures]
    )
    floats = {
        "disagreement": result.disagreement,
        "mean_disagreement": result.mean_disagreement,
        "pairwise_dice": result.pairwise_dice,
        "agreement": masks.mean(axis=1).sum(axis=(2, 3)),
        "volumes_ml": result.volumes_ml,
    }
    return Case(
        masks,
        {name: np.asarray(values, np.float64) for name, values in floats.items()},
        hash_array(result.probabilities),
    )


def compute_ct() -> Case:
    """Two organs in CT, the whole volume, with the default clean-up."""
    return propose(draw_abdomen(CT, -1000, 12), "liver and spleen", adapter="none", clean_up="small")


def compute_ct_guided() -> Case:
    """Two organs with guidance, on one slice: the denoiser runs twice per step."""
    return propose(
        draw_abdomen(CT, -1000, 12), "spleen and left kidney", adapter="none", guidance_scale=3.0, slices=[2]
    )


def compute_ct_native() -> Case:
    """One slice in the precision that this processor is fast in; see `native_precision`."""
    return propose(draw_abdomen(CT, -1000, 12), "liver and left kidney", full=False, adapter="none", slices=[2])


def native_precision() -> str:
    """What `compute_ct_native` computes in."""
    return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"


def compute_mr() -> Case:
    """The shipped adapter, on one slice."""
    return propose(draw_abdomen(T2, 0, 10), "liver, spleen and left kidney", adapter="mr@2", slices=[2])


def compute_clicks(folder: Path) -> Case:
    """One slice steered by clicks, as 3D Slicer asks for it: the mask of the answer, and its numbers."""
    volume = draw_abdomen(CT, -1000, 12)
    path = folder / "drawn.nii.gz"
    nibabel.save(nibabel.Nifti1Image(volume.array, volume.affine), path)
    engine = load_engine(True)
    options = ServerOptions.from_conf({"store": str(folder / "store"), "device": "cpu"}, str(folder))
    whole = ProposalInferTask(engine, ProposalStore(options.store), options, lambda: None)
    params = {"label": "liver", "num_proposals": 4, "rounds": 2, "steps": 2, "seed": 0, "modality": "CT", "slice": 2}
    params |= {"foreground": [[43, 45, 2], [60, 45, 2]], "background": [[64, 68, 2]]}
    with full_precision():
        file, answer = SliceInferTask(whole)({"image": str(path), "image_id": "", "params": params})
    mask = np.asarray(nibabel.load(file).dataobj)
    os.unlink(file)
    names = ("axial_slice", "missed_clicks", "kept_proposals", "num_proposals", "area_cm2")
    return Case(mask.transpose(2, 1, 0) > 0, {name: np.asarray(answer[name], np.float64) for name in names})


def compute_nuclei() -> Case:
    """The served head on a drawn picture, with a sentence and two draws."""
    picture, _ = draw_tissue(0)
    with full_precision():
        result = load_textdiff(MODEL / "textdiff" / "nuclei" / "3", "cpu").predict(picture, SENTENCES["left"], 2)
    floats = {
        "disagreement": result.disagreement,
        "probability": result.probabilities.mean(axis=(1, 2)),
        "spread": result.disagreement_map.mean(),
    }
    return Case(
        result.masks > 0,
        {name: np.asarray(values, np.float64) for name, values in floats.items()},
        hash_array(result.probabilities),
    )


def hash_array(array: np.ndarray) -> str:
    """SHA-256 of its bytes, in C order."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def hash_masks(masks: np.ndarray) -> str:
    """SHA-256 of masks, packed."""
    return hash_array(np.packbits(masks))


def hash_inputs() -> dict[str, str]:
    """SHA-256 of the generated images: results can be compared only if these are the same."""
    images = {
        "ct": draw_abdomen(CT, -1000, 12).array,
        "t2": draw_abdomen(T2, 0, 10).array,
        "tissue": draw_tissue(0)[0],
    }
    return {name: hash_array(image) for name, image in images.items()}


CASES = ("ct", "ct_guided", "ct_native", "mr", "clicks", "nuclei")


def compute(name: str, folder: Path) -> Case:
    """The result of a case; `folder` is for files that it needs."""
    return compute_clicks(folder) if name == "clicks" else globals()[f"compute_{name}"]()
