"""The working grid neither shifts nor mirrors nor loses anything on the way there and back."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from progidiff.errors import GeometryError, ImageError
from progidiff.images.volume import Volume
from progidiff.images.working_grid import BACKGROUND, WorkingGrid, plan_working_grid

HEIGHT, WIDTH = 64, 80


def make_grid(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    pixel: float,
    shift: tuple[float, float] = (0.0, 0.0),
) -> WorkingGrid:
    """A window in the middle of the stack, moved by `shift` (y, x) mm."""
    center = (shape[1] * spacing[1] / 2 + shift[0], shape[2] * spacing[2] / 2 + shift[1])
    return WorkingGrid(shape, spacing, center, pixel, HEIGHT, WIDTH)


def make_blob(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    center: tuple[float, float],
    radii: tuple[float, float],
) -> np.ndarray:
    """An elliptic cylinder on a (Z, Y, X) stack; centre (y, x) and radii in mm from the stack's outer corner."""
    y = (np.arange(shape[1]) + 0.5) * spacing[1] - center[0]
    x = (np.arange(shape[2]) + 0.5) * spacing[2] - center[1]
    inside = (y[:, None] / radii[0]) ** 2 + (x[None] / radii[1]) ** 2 <= 1
    return np.broadcast_to(inside, shape).astype(np.uint8)


def compute_dice(first: np.ndarray, second: np.ndarray) -> float:
    return float(2 * np.logical_and(first, second).sum() / (first.sum() + second.sum()))


def compute_centroid(mask: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """(y, x) in mm of a boolean stack or a stack of shares."""
    weights = mask.astype(np.float64)
    rows, cols = np.indices(weights.shape[1:])
    total = weights.sum()
    return np.array(
        [(weights * (rows + 0.5)).sum() / total * spacing[1], (weights * (cols + 0.5)).sum() / total * spacing[2]]
    )


STACKS = {
    "coarser than the grid": ((4, 40, 44), (5.0, 3.4, 3.4), 2.2),
    "the grid's own pixels": ((4, 64, 80), (5.0, 2.0, 2.0), 2.0),
    "finer than the grid": ((4, 256, 300), (1.0, 0.6, 0.6), 2.1),
    "anisotropic in plane": ((4, 70, 200), (7.7, 2.1, 0.9), 2.0),
    "odd size": ((4, 131, 97), (3.0, 1.19, 1.31), 1.9),
}


@pytest.mark.parametrize("name", STACKS)
def test_a_label_comes_back_in_place_and_in_shape(name: str) -> None:
    shape, spacing, pixel = STACKS[name]
    grid = make_grid(shape, spacing, pixel, shift=(3.3, -4.1))
    blob = make_blob(shape, spacing, (grid.center[0] + 11.3, grid.center[1] - 17.7), (21.0, 27.0))
    working = grid.extract_labels(blob, range(shape[0]), 1)
    restored = grid.restore_slices(working.float())
    mask = (restored >= 0.5).numpy()
    assert compute_dice(mask, blob > 0) > (0.94 if max(spacing[1:]) > 3 else 0.97)
    # Hard labels snap to whole pixels of the working grid; the ramps below show that the maps themselves do not.
    assert compute_centroid(restored.numpy(), spacing) == pytest.approx(
        compute_centroid(blob, spacing), abs=0.5 * pixel
    )


@given(
    size=st.tuples(st.integers(40, 150), st.integers(40, 150)),
    spacing=st.tuples(st.floats(0.6, 3.0), st.floats(0.6, 3.0)),
    pixel=st.floats(1.2, 3.0),
    place=st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2)),
)
@settings(max_examples=40, deadline=None)
def test_no_geometry_shifts_a_label(
    size: tuple[int, int], spacing: tuple[float, float], pixel: float, place: tuple[float, float]
) -> None:
    shape, edges = (1, *size), (3.0, *spacing)
    grid = make_grid(shape, edges, pixel, shift=(1.7, -2.9))
    extent = np.minimum((HEIGHT * pixel, WIDTH * pixel), (size[0] * spacing[0], size[1] * spacing[1]))
    center = np.array([size[0] * spacing[0], size[1] * spacing[1]]) / 2 + np.array(place) * extent
    blob = make_blob(shape, edges, (center[0], center[1]), (0.2 * extent[0], 0.2 * extent[1]))
    restored = grid.restore_slices(grid.extract_labels(blob, [0], 1).float()).numpy()
    tolerance = 0.5 * max(pixel, *spacing)
    assert np.abs(compute_centroid(restored, edges) - compute_centroid(blob, edges)).max() < tolerance


@pytest.mark.parametrize("name", STACKS)
def test_an_intensity_ramp_stays_where_it_is(name: str) -> None:
    shape, spacing, pixel = STACKS[name]
    grid = make_grid(shape, spacing, pixel, shift=(3.3, -4.1))
    y = (np.arange(shape[1]) + 0.5) * spacing[1]
    x = (np.arange(shape[2]) + 0.5) * spacing[2]
    stack = np.broadcast_to(y[:, None] + 2 * x[None], shape).astype(np.float32)
    pixels = grid.extract_slices(stack, [1], (0.0, 1000.0), 0, 5.0)[0, 0].numpy()
    rows = grid.center[0] + (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) * pixel
    cols = grid.center[1] + (np.arange(WIDTH) + 0.5 - WIDTH / 2) * pixel
    margin = 2 * max(pixel, *spacing[1:])
    inside = np.outer((rows > margin) & (rows < y[-1] - margin), (cols > margin) & (cols < x[-1] - margin))
    expected = (rows[:, None] + 2 * cols[None]) / 1000 * 2 - 1
    assert inside.sum() > 500
    assert np.abs(pixels - expected)[inside].max() < 1e-3


@pytest.mark.parametrize("name", STACKS)
def test_a_restored_ramp_stays_where_it_is(name: str) -> None:
    shape, spacing, pixel = STACKS[name]
    grid = make_grid(shape, spacing, pixel, shift=(3.3, -4.1))
    rows = grid.center[0] + (np.arange(HEIGHT) + 0.5 - HEIGHT / 2) * pixel
    cols = grid.center[1] + (np.arange(WIDTH) + 0.5 - WIDTH / 2) * pixel
    maps = torch.from_numpy(np.float32(rows[:, None] + 2 * cols[None]))[None]
    restored = grid.restore_slices(maps, fill=float("nan"))[0].numpy()
    y = (np.arange(shape[1]) + 0.5) * spacing[1]
    x = (np.arange(shape[2]) + 0.5) * spacing[2]
    inside = np.outer((y > rows[0]) & (y < rows[-1]), (x > cols[0]) & (x < cols[-1]))
    assert inside.sum() > 500
    assert np.abs(restored - (y[:, None] + 2 * x[None]))[inside].max() < 0.01


def test_outside_the_volume_is_background() -> None:
    grid = make_grid((2, 20, 20), (3.0, 1.0, 1.0), 2.0)
    pixels = grid.extract_slices(np.full((2, 20, 20), 50, np.int16), [0, 1], (0.0, 100.0), 0, 3.0)
    assert (pixels[:, :, 0] == BACKGROUND).all()
    assert pixels[:, :, HEIGHT // 2, WIDTH // 2].abs().max() < 1e-6


def test_intensities_are_clipped_to_the_window() -> None:
    grid = make_grid((1, 64, 80), (3.0, 2.0, 2.0), 2.0)
    stack = np.random.default_rng(0).integers(-1000, 2000, (1, 64, 80)).astype(np.int16)
    pixels = grid.extract_slices(stack, [0], (-125.0, 275.0), 0, 3.0)[0, 0].numpy()
    assert pixels == pytest.approx(np.clip((stack[0] + 125) / 200 - 1, -1, 1), abs=1e-4)


def test_channels_run_from_inferior_to_superior_and_repeat_the_last_slice() -> None:
    grid = make_grid((5, 64, 80), (2.5, 2.0, 2.0), 2.0)
    stack = np.broadcast_to(np.arange(5, dtype=np.float32)[:, None, None] * 10, (5, 64, 80))
    pixels = grid.extract_slices(stack, [0, 2, 4], (0.0, 100.0), 1, 5.0)
    middle = (pixels[:, :, HEIGHT // 2, WIDTH // 2] + 1) * 50
    assert torch.allclose(middle, torch.tensor([[0.0, 0.0, 20.0], [0.0, 20.0, 40.0], [20.0, 40.0, 40.0]]), atol=1e-4)


def test_the_same_slice_is_the_same_alone_and_in_a_batch() -> None:
    grid = make_grid((6, 90, 70), (3.0, 1.3, 1.3), 2.1)
    stack = np.random.default_rng(1).normal(0, 50, (6, 90, 70)).astype(np.float32)
    batch = grid.extract_slices(stack, [1, 3, 4], (-100.0, 100.0), 1, 3.0)
    assert torch.equal(batch[1:2], grid.extract_slices(stack, [3], (-100.0, 100.0), 1, 3.0))


def test_labels_that_touch_neither_overlap_nor_leave_gaps() -> None:
    shape, spacing = (2, 120, 150), (3.0, 1.0, 1.0)
    grid = make_grid(shape, spacing, 1.7)
    labels = np.zeros(shape, np.uint8)
    labels[:, 30:90, 30:75] = 1
    labels[:, 30:90, 75:120] = 2
    working = grid.extract_labels(labels, [0, 1], 2)
    together = grid.extract_labels((labels > 0).astype(np.uint8), [0, 1], 1)
    assert working.dtype == torch.uint8
    assert ((working > 0) != (together > 0)).float().mean() < 1e-3
    assert int((working == 1).sum()) == pytest.approx(int((working == 2).sum()), rel=0.05)


def test_restoring_fills_what_the_window_does_not_cover() -> None:
    grid = make_grid((1, 200, 200), (3.0, 1.0, 1.0), 1.0)
    restored = grid.restore_slices(torch.ones(1, HEIGHT, WIDTH), fill=-5.0)
    covered = restored != -5.0
    assert int(covered.sum()) == HEIGHT * WIDTH
    assert (restored[covered] == 1).all()


@pytest.mark.parametrize("codes", ["LPS", "RAS", "PIR", "RSA"])
def test_a_marker_on_the_patients_left_stays_on_the_left_in_any_acquisition(codes: str) -> None:
    from nibabel.orientations import axcodes2ornt

    extent = {0: 180.0, 1: 140.0, 2: 24.0}  # mm along R-L, A-P, I-S
    edges = (3.0, 2.5, 4.0)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    sizes = []
    for axis, (world, sign) in enumerate(axcodes2ornt(tuple(codes))):
        size = round(extent[int(world)] / edges[axis])
        sizes.append(size)
        affine[int(world), axis] = sign * edges[axis]
        affine[int(world), 3] = -sign * edges[axis] * (size - 1) / 2
    indices = np.stack(np.meshgrid(*[np.arange(size) for size in sizes], indexing="ij"), -1)
    world = indices @ affine[:3, :3].T + affine[:3, 3]
    body = (world[..., 0] / 80) ** 2 + (world[..., 1] / 60) ** 2 <= 1
    marker = (world[..., 0] + 40) ** 2 + (world[..., 1] + 15) ** 2 <= 20**2  # left and posterior in RAS
    volume = Volume(np.where(body, 50, -1000).astype(np.int16), affine, "CT", "option", codes)
    stack, spacing = volume.to_stack()
    grid = plan_working_grid(stack, spacing, -120, HEIGHT, WIDTH, (1.0, 4.0))
    labels = volume.arrange(marker.astype(np.uint8))
    working = grid.extract_labels(labels, range(len(labels)), 1)
    rows, cols = np.nonzero(working[len(labels) // 2].numpy())
    assert rows.mean() > HEIGHT / 2 + 5
    assert cols.mean() > WIDTH / 2 + 10
    back = volume.from_stack((grid.restore_slices(working.float()) >= 0.5).numpy())
    assert compute_dice(back, marker) > 0.92
    assert world[back].mean(axis=0) == pytest.approx(world[marker].mean(axis=0), abs=0.6)


def test_the_window_holds_the_body_in_the_middle() -> None:
    stack = np.full((10, 200, 200), -1000, np.int16)
    stack[:, 60:140, 30:110] = 40
    grid = plan_working_grid(stack, (3.0, 1.0, 1.0), -120, HEIGHT, WIDTH, (0.5, 4.0))
    assert grid.center == pytest.approx((100.0, 70.0))
    assert grid.spacing == pytest.approx(80 * 1.05 / HEIGHT)
    labels = (stack > 0).astype(np.uint8)
    restored = grid.restore_slices(grid.extract_labels(labels, range(10), 1).float()) >= 0.5
    assert compute_dice(restored.numpy(), labels) > 0.97


@pytest.mark.parametrize(("size", "pixel"), [(20, 1.5), (300, 3.0)])
def test_the_pixel_size_stays_in_its_range(size: int, pixel: float) -> None:
    stack = np.full((3, size, size), 40, np.int16)
    assert plan_working_grid(stack, (3.0, 1.5, 1.5), -120, HEIGHT, WIDTH, (1.5, 3.0)).spacing == pixel


def test_a_volume_of_air_gets_a_window_around_everything() -> None:
    stack = np.full((3, 50, 60), -1000, np.int16)
    grid = plan_working_grid(stack, (3.0, 2.0, 2.0), -120, HEIGHT, WIDTH, (0.5, 4.0))
    assert grid.center == (50.0, 60.0)


def test_a_grid_survives_json() -> None:
    grid = make_grid((4, 131, 97), (3.0, 1.19, 1.31), 1.9)
    assert WorkingGrid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_arrays_that_do_not_fit_the_grid_are_refused() -> None:
    grid = make_grid((2, 20, 20), (3.0, 1.0, 1.0), 2.0)
    with pytest.raises(GeometryError, match=r"the grid was planned for \(2, 20, 20\)"):
        grid.extract_slices(np.zeros((2, 20, 21)), [0], (0.0, 1.0), 0, 3.0)
    with pytest.raises(GeometryError, match="do not fit the working grid"):
        grid.restore_slices(torch.zeros(1, 10, 10))
    with pytest.raises(ImageError, match="needs three axes"):
        plan_working_grid(np.zeros((2, 3, 4, 5)), (1.0, 1.0, 1.0), 0, 8, 8, (1.0, 2.0))


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("shift", [(0.0, 0.0), (40.0, -55.0), (-900.0, 0.0)])
def test_the_pixels_in_the_stack_are_those_that_are_not_filled(name: str, shift: tuple[float, float]) -> None:
    shape, spacing, pixel = STACKS[name]
    grid = make_grid(shape, spacing, pixel, shift)
    full = grid.extract_slices(np.full(shape, 100, np.int16), [0], (0, 100), 0, 4.0)[0, 0].numpy()
    # At the edge a pixel mixes 1 with the filling, -1: half of each at most, and a quarter of the image in a corner.
    assert (full[grid.covered] > -0.55).all()
    assert (full[~grid.covered] < 0.05).all()
