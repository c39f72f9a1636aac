"""Proposals that no network made."""

from typing import Any

import numpy as np
import torch

from progidiff.images.volume import Volume
from progidiff.images.working_grid import WorkingGrid
from progidiff.prompts.parser import parse_prompt
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals

AFFINES = {
    "LAS": np.diag([-1.0, 1.0, 1.0, 1.0]),
    "LPS": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "RAS": np.eye(4),
    "sagittal": np.array([[0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]),
    "coronal": np.array([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]),
}


DEPTH, ROWS, COLS = 7, 40, 48


SPACING = (3.0, 1.5, 1.25)


STRUCTURES = ("liver", "spleen", "pancreas")


def make_volume(orientation: str = "LPS") -> Volume:
    """A volume whose axial stack has shape (7, 40, 48) and spacing (3, 1.5, 1.25) mm, whatever its file order."""
    direction = AFFINES[orientation][:3, :3]
    sizes = {0: (COLS, SPACING[2]), 1: (ROWS, SPACING[1]), 2: (DEPTH, SPACING[0])}
    along = [sizes[int(np.abs(direction[:, axis]).argmax())] for axis in range(3)]
    affine = np.eye(4)
    affine[:3, :3] = direction * np.array([edge for _, edge in along])
    array = np.random.default_rng(0).integers(-100, 200, [count for count, _ in along]).astype(np.int16)
    return Volume(array=array, affine=affine, modality="CT", modality_source="option", name="toy")


def make_grid() -> WorkingGrid:
    return WorkingGrid(
        shape=(DEPTH, ROWS, COLS), stack_spacing=SPACING, center=(29.0, 31.0), spacing=2.0, height=32, width=32
    )


def make_proposals(num_proposals: int = 4, seed: int = 0) -> VolumeProposals:
    """Smooth random blobs; the pancreas is absent, and liver and spleen overlap."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(3, num_proposals, DEPTH, 10, 10, generator=generator)
    smooth = torch.nn.functional.interpolate(noise.flatten(0, 1), size=(20, 22), mode="bilinear").reshape(
        3, num_proposals, DEPTH, 20, 22
    )
    probabilities = np.zeros((3, num_proposals, DEPTH, 32, 32), dtype=np.uint8)
    probabilities[0, :, 1:6, 4:24, 5:27] = (smooth[0, :, 1:6] * 255).numpy().astype(np.uint8)
    probabilities[1, :, 2:7, 8:28, 10:32] = (smooth[1, :, 2:7] * 255).numpy().astype(np.uint8)
    return VolumeProposals(
        structures=STRUCTURES,
        probabilities=probabilities,
        grid=make_grid(),
        seed=7,
        num_inference_steps=4,
        guidance_scale=1.0,
        model_version="toy@1",
        adapter="",
        modality="CT",
        modality_source="option",
        seconds=1.25,
    )


def make_request(prompt: str = "liver", **settings: Any) -> ProposalRequest:
    """A settled request."""
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "adapter": "none", **settings}
    return ProposalRequest(queries=parse_prompt(prompt), **settings)


def make_key(seed: int = 0, prompt: str = "liver") -> str:
    """The key of a result that no request made."""
    return make_request(prompt, seed=seed).key("image", "digest", "toy@1")
