"""Windows of fine pixels: planned around what was found, and the exact way there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from progidiff.errors import GeometryError
from progidiff.images.close_up import (
    CloseUpWindow,
    WindowRules,
    compute_fineness,
    count_looks,
    plan_windows,
    window_at,
)
from progidiff.images.working_grid import WorkingGrid

SHAPE = (20, 120, 140)
SPACING = (4.0, 1.5, 1.25)
GRID = WorkingGrid(SHAPE, SPACING, (90.0, 87.5), 2.0, 96, 96)


def window(**changes: object) -> CloseUpWindow:
    values: dict[str, object] = {
        "shape": SHAPE,
        "stack_spacing": SPACING,
        "center": (80.0, 90.0),
        "spacing": 1.0,
        "size": 64,
        "first": 3,
        "last": 9,
    }
    return CloseUpWindow(**{**values, **changes})  # type: ignore[arg-type]


def disc(center: tuple[float, float], radius: float) -> np.ndarray:
    """A disc in mm on the stack's pixels."""
    y = (np.arange(SHAPE[1]) + 0.5) * SPACING[1]
    x = (np.arange(SHAPE[2]) + 0.5) * SPACING[2]
    return (y[:, None] - center[0]) ** 2 + (x[None] - center[1]) ** 2 < radius**2


def found_at(*blobs: tuple[int, int, int, int]) -> np.ndarray:
    """Squares (first slice, row, column, side) on the working grid, two slices thick."""
    found = np.zeros((SHAPE[0], GRID.height, GRID.width), bool)
    for z, row, column, side in blobs:
        found[z : z + 2, row : row + side, column : column + side] = True
    return found


def test_a_disc_comes_back_where_it_was() -> None:
    stack = np.repeat(disc((80, 90), 18)[None], SHAPE[0], 0).astype(np.float32)
    close = window()
    rows, columns = close.box
    back = np.zeros(SHAPE[1:], bool)
    back[rows, columns] = close.restore(close.extract(stack, [5]))[0].numpy() >= 0.5
    truth = stack[5] > 0
    assert 2 * (back & truth).sum() / (back.sum() + truth.sum()) > 0.985


@pytest.mark.parametrize("spacing", [0.9, 1.3, 2.6, 4.0])
def test_the_middle_of_a_window_shows_the_place_that_it_is_centred_on(spacing: float) -> None:
    stack = np.repeat(disc((80, 90), 10)[None], SHAPE[0], 0).astype(np.float32)
    shown = window(spacing=spacing).extract(stack, [5])[0]
    places = torch.stack(torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")) + 0.5 - 32
    middle = (places * shown).sum((1, 2)) / shown.sum() * spacing
    assert middle.abs().max() < 0.15
    assert float(shown.sum()) * spacing**2 == pytest.approx(np.pi * 100, rel=0.03)


def test_beyond_the_image_a_window_shows_background() -> None:
    stack = np.ones(SHAPE, np.float32)
    shown = window(center=(0.0, 0.0)).extract(stack, [5])[0]
    assert shown[:31, :31].abs().max() == 0
    assert shown[34:, 34:].min() == pytest.approx(1)
    nothing = window(center=(-500.0, 0.0))
    assert nothing.extract(stack, [5, 6]).abs().max() == 0
    assert nothing.restore(torch.ones(2, 64, 64)).numel() == 0


def test_a_map_of_the_working_grid_and_the_stack_agree_in_a_window() -> None:
    stack = np.repeat(disc((80, 90), 18)[None], SHAPE[0], 0).astype(np.float32)
    evidence = GRID.extract_labels((stack > 0).astype(np.uint8), [5], 1).float()
    seen, meant = window().extract_map(evidence, GRID)[0] >= 0.5, window().extract(stack, [5])[0] >= 0.5
    assert 2 * (seen & meant).sum() / (seen.sum() + meant.sum()) > 0.95


def test_maps_go_to_the_pixels_of_a_working_grid_too() -> None:
    fine = GRID.refine(2)
    shown = window().extract(np.repeat(disc((80, 90), 18)[None], SHAPE[0], 0).astype(np.float32), [5])
    (rows, columns), maps = window().restore_to(shown, fine)
    mask = torch.zeros(fine.height, fine.width)
    mask[rows, columns] = (maps[0] >= 0.5).float()
    truth = fine.extract_labels(disc((80, 90), 18)[None].astype(np.uint8), [0], 1)[0]
    assert 2 * (mask * truth).sum() / (mask.sum() + truth.sum()) > 0.98


def test_one_place_gets_one_window_around_it() -> None:
    (found,) = plan_windows(found_at((4, 40, 50, 10)), GRID)
    # The corner of the working grid lies at (90 - 96, 87.5 - 96) mm; the square at rows 40 to 50, columns 50 to 60.
    assert found.center == pytest.approx((90 - 96 + 45 * 2.0, 87.5 - 96 + 55 * 2.0))
    assert found.first == 1
    assert found.last == 8
    assert found.spacing == WindowRules().finest_mm


def test_two_places_far_apart_get_two_windows_and_two_close_ones_share() -> None:
    apart = plan_windows(found_at((4, 10, 10, 12), (4, 70, 75, 8)), GRID)
    assert len(apart) == 2
    assert apart[0].center[0] < apart[1].center[0], "the larger part comes first"
    assert len(plan_windows(found_at((4, 40, 40, 12), (9, 48, 44, 8)), GRID)) == 1


def test_what_is_larger_than_a_window_gets_coarser_pixels_and_is_not_cut() -> None:
    (found,) = plan_windows(found_at((4, 0, 0, 96)), GRID)
    assert found.size * found.spacing >= 96 * 2.0
    size, spacing = WindowRules().fit(1000.0)
    assert size * spacing == pytest.approx(1000)


def test_specks_get_no_window_and_nothing_found_gives_none() -> None:
    assert plan_windows(found_at(), GRID) == []
    found = found_at((4, 10, 10, 20))
    found[4, 90, 90] = True
    assert len(plan_windows(found, GRID)) == 1


def test_windows_stay_inside_the_stack() -> None:
    thick = WorkingGrid((1, 120, 140), (8.0, 1.5, 1.25), (90.0, 87.5), 2.0, 96, 96)
    found = np.zeros((1, 96, 96), bool)
    found[0, 40:50, 40:50] = True
    (only,) = plan_windows(found, thick)
    assert (only.first, only.last) == (0, 0)
    with pytest.raises(GeometryError, match="outside a stack of 20 slices"):
        window(last=20)
    with pytest.raises(GeometryError, match="Slice 25"):
        window_at((25, 10.0, 10.0), 60.0, SHAPE, SPACING)


def test_a_window_at_a_click_reaches_as_far_as_asked() -> None:
    found = window_at((2, 60.0, 70.0), 60.0, SHAPE, SPACING, reach_mm=12.0)
    assert (found.first, found.last) == (0, 5)
    assert found.center == (60.0, 70.0)


def test_coarse_pixels_look_often_enough_to_average() -> None:
    assert [count_looks(spacing, 1.0) for spacing in (0.7, 1.1, 1.5, 2.6, 9.0)] == [1, 1, 2, 3, 4]


def test_overlapping_windows_blend_without_a_seam() -> None:
    taper = window().make_taper()
    assert float(taper.min()) > 0
    assert float(taper[32, 32]) == 1
    assert (taper[0] <= taper[10]).all()


@pytest.mark.parametrize("extent_mm", [40.0, 120.0, 200.0])
def test_windows_at_a_denoisers_size_show_what_windows_show(extent_mm: float) -> None:
    size, spacing = WindowRules().fit(extent_mm)
    native, fine = WindowRules().at_size(512).fit(extent_mm)
    assert native == 512
    assert native * fine == pytest.approx(size * spacing)


@pytest.mark.parametrize("extent_mm", [40.0, 120.0])
def test_any_mask_comes_back_voxel_for_voxel_from_a_window_at_a_denoisers_size(extent_mm: float) -> None:
    stack = np.random.default_rng(0).random(SHAPE) < 0.4
    size, spacing = WindowRules().at_size(512).fit(extent_mm)
    close = window(size=size, spacing=spacing)
    back = close.restore(close.extract(stack.astype(np.float32), close.slices)).numpy() >= 0.5
    rows, columns = close.box
    inner = (slice(rows.start + 1, rows.stop - 1), slice(columns.start + 1, columns.stop - 1))
    assert back.shape[1:] == (rows.stop - rows.start, columns.stop - columns.start)
    assert (back[:, 1:-1, 1:-1] == stack[close.first : close.last + 1][:, inner[0], inner[1]]).all()


def test_lengths_in_pixels_are_as_long_in_mm_in_a_large_window() -> None:
    assert [compute_fineness(size) for size in (32, 96, 128, 512)] == [1, 1, 1, 4]
    small, large = window(size=128).make_taper(), window(size=512, spacing=0.25).make_taper()
    assert int((small[64] < 1).sum()) == 16
    assert int((large[256] < 1).sum()) == 64
