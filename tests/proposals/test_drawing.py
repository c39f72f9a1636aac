"""Pictures: on the right side, of the right slice, in the right colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from nibabel.orientations import axcodes2ornt
from PIL import Image

from progidiff.errors import GeometryError, RequestError, StoreError
from progidiff.images.volume import Volume
from progidiff.images.working_grid import plan_working_grid
from progidiff.prompts.structures import COLORS, STRUCTURES, pick_color
from progidiff.proposals.drawing import draw_overlay, draw_proposals, pick_slices
from progidiff.proposals.volume_proposals import VolumeProposals

torch.set_num_threads(1)


def make_scene(codes: str = "LPS") -> tuple[Volume, np.ndarray]:
    """A body of 180 x 140 x 40 mm with label 1 on the patient's left, posterior, in the superior half."""
    extent, edges = {0: 192.0, 1: 152.0, 2: 40.0}, (4.0, 4.0, 4.0)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    sizes = []
    for axis, (world, sign) in enumerate(axcodes2ornt(tuple(codes))):
        sizes.append(round(extent[int(world)] / edges[axis]))
        affine[int(world), axis] = sign * edges[axis]
        affine[int(world), 3] = -sign * edges[axis] * (sizes[-1] - 1) / 2
    indices = np.stack(np.meshgrid(*[np.arange(size) for size in sizes], indexing="ij"), -1)
    x, y, z = np.moveaxis(indices @ affine[:3, :3].T + affine[:3, 3], -1, 0)
    array = np.where((x / 90) ** 2 + (y / 70) ** 2 <= 1, 40, -1000).astype(np.int16)
    labels = (((x + 45) ** 2 + (y + 25) ** 2 <= 20**2) & (z > 0)).astype(np.uint8)
    return Volume(array, affine, "CT", "option", "scene"), labels


def make_proposals(
    volume: Volume, labels: np.ndarray, structures: tuple[str, ...] = ("left kidney",)
) -> VolumeProposals:
    """Two proposals that agree and one that leaves out the anterior half; structures after the first are absent."""
    stack, spacing = volume.to_stack()
    grid = plan_working_grid(stack, spacing, -120, 48, 56, (2.0, 6.0))
    drawn = grid.extract_labels(volume.arrange(labels), range(len(stack)), 1).numpy() * 255
    partly = drawn.copy()
    rows = np.flatnonzero(drawn.any(axis=(0, 2)))
    partly[:, : int(rows.mean())] = 0
    first = np.stack([drawn, partly, drawn])
    probabilities = np.stack([first, *[np.zeros_like(first)] * (len(structures) - 1)])
    return VolumeProposals(structures, probabilities, grid, 0, 4, 1.0, "toy@1", "", "CT", "option", 0.1)


def find_color(path: Path, color: str) -> tuple[float, float]:
    """Mean (row, column) of the pixels of this colour, as shares of the picture, without its lowest fifth (the
    legend).
    """
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float) / 255
    near = np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.15
    rows, cols = np.nonzero(near[: int(len(near) * 0.8)])
    assert len(rows) > 20
    return rows.mean() / len(near), cols.mean() / near.shape[1]


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "RSA"])
def test_the_patients_left_is_at_the_right_and_the_back_at_the_bottom(tmp_path: Path, codes: str) -> None:
    volume, labels = make_scene(codes)
    path = draw_overlay(volume, labels, {1: "left kidney"}, tmp_path / "overlay.png", num_slices=1)
    row, column = find_color(path, COLORS["left kidney"])
    assert row > 0.5
    assert column > 0.6


def test_the_slices_of_the_overlay_are_those_with_labels() -> None:
    volume, labels = make_scene("RAS")
    assert pick_slices(volume.arrange(labels), 3) == [5, 7, 9]


def test_a_small_structure_counts_as_much_as_a_large_one() -> None:
    labels = np.zeros((20, 30, 30), np.uint8)
    labels[:12] = 1
    labels[17:19, 3, 3] = 2
    chosen = pick_slices(labels, 4)
    assert len(chosen) == 4
    assert set(chosen) & {17, 18}


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_no_more_slices_are_picked_than_there_are(depth: int) -> None:
    labels = np.ones((depth, 4, 4), np.uint8)
    assert pick_slices(labels, 5) == sorted(set(pick_slices(labels, 5)))
    assert len(pick_slices(labels, 5)) == min(5, depth)


def test_an_overlay_without_labels_is_still_a_picture(tmp_path: Path) -> None:
    volume, labels = make_scene()
    path = draw_overlay(volume, labels * 0, {}, tmp_path / "deep" / "overlay.png", title="nothing")
    assert Image.open(path).size[0] > Image.open(path).size[1]
    assert [file.name for file in path.parent.iterdir()] == ["overlay.png"]


def test_more_slices_make_a_wider_picture(tmp_path: Path) -> None:
    volume, labels = make_scene()
    widths = [Image.open(draw_overlay(volume, labels, {}, tmp_path / f"{n}.png", num_slices=n)).width for n in (1, 3)]
    assert widths[1] == 3 * widths[0]


def test_every_builtin_structure_has_its_own_colour() -> None:
    assert set(COLORS) == set(STRUCTURES)
    assert len(set(COLORS.values())) == len(STRUCTURES)
    assert pick_color("liver", 1) == pick_color("liver", 6)
    assert pick_color("tumour", 14) not in COLORS.values()


def test_proposals_are_drawn_where_they_are(tmp_path: Path) -> None:
    volume, labels = make_scene()
    proposals = make_proposals(volume, labels)
    path = draw_proposals(volume, proposals, tmp_path / "proposals.png")
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float) / 255
    near = np.abs(pixels - np.array(to_rgb(COLORS["left kidney"]))).max(axis=2) < 0.25
    columns = np.array_split(np.arange(near.shape[1]), 6)
    areas = [near[:, column].sum() for column in columns]
    assert areas[0] == 0  # the slice alone
    assert min(areas[1:5]) > 50  # three proposals and their consensus
    assert areas[2] < areas[1]  # the second draws half


def test_a_row_for_an_absent_structure_says_so_and_does_not_fail(tmp_path: Path) -> None:
    volume, labels = make_scene("PIR")
    proposals = make_proposals(volume, labels, ("left kidney", "liver"))
    both = Image.open(draw_proposals(volume, proposals, tmp_path / "both.png"))
    one = Image.open(draw_proposals(volume, proposals, tmp_path / "one.png", structures=["liver"], max_proposals=1))
    assert both.height > 1.5 * one.height
    assert both.width > one.width


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    volume, labels = make_scene()
    proposals = make_proposals(volume, labels)
    with pytest.raises(GeometryError, match="is not on the grid of 'scene'"):
        draw_overlay(volume, labels[1:], {}, tmp_path / "overlay.png")
    with pytest.raises(RequestError, match="no slice 10; this volume has the axial slices 0 to 9"):
        draw_overlay(volume, labels, {}, tmp_path / "overlay.png", slices=[10])
    with pytest.raises(RequestError, match="2 slices were given for 1 structures"):
        draw_proposals(volume, proposals, tmp_path / "proposals.png", slices=[1, 2])
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="choose another folder"):
        draw_overlay(volume, labels, {}, tmp_path / "file" / "overlay.png")
