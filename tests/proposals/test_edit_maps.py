"""What a person drew, as the maps that the network reads."""

from __future__ import annotations

import numpy as np
import torch

from progidiff.model.close_up import EDIT_CHANNELS
from progidiff.proposals.edit_maps import draw_edit_maps


def at(row: int, column: int, size: int = 32) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[row, column] = True
    return mask


def test_nothing_drawn_is_nothing():
    assert not draw_edit_maps(32).any()
    assert draw_edit_maps(32).shape == (len(EDIT_CHANNELS), 32, 32)
    assert not draw_edit_maps(32, wanted=np.zeros((32, 32), bool)).any()


def test_clicks_are_strongest_where_they_are_and_each_kind_has_its_own_maps():
    maps = draw_edit_maps(32, wanted=at(5, 7), unwanted=at(20, 21))
    assert maps[0, 5, 7] == maps[2, 5, 7] == 1
    assert maps[1, 20, 21] == maps[3, 20, 21] == 1
    assert maps[0, 20, 21] < 1e-6 < maps[2, 20, 21], "a click is felt far away, its disc is not"
    assert torch.equal(maps[4:], torch.zeros(3, 32, 32))


def test_a_frame_says_inside_and_outside():
    frame = np.zeros((32, 32), bool)
    frame[4:20, 6:10] = True
    maps = draw_edit_maps(32, frame=frame)
    assert maps[4, 10, 8] == 1
    assert maps[4, 0, 0] == -1


def test_a_neighbour_counts_less_the_farther_it_is():
    mask = np.zeros((32, 32), np.float32)
    mask[8:16, 8:16] = 1
    near, far = (draw_edit_maps(32, neighbour=mask, neighbour_mm=mm) for mm in (3.0, 15.0))
    assert near[5, 10, 10] > far[5, 10, 10] > 0 > far[5, 0, 0] > near[5, 0, 0]
    assert near[6].unique().numel() == 1


def test_a_click_is_as_wide_in_mm_in_a_window_of_more_pixels():
    usual, fine = (draw_edit_maps(size, wanted=at(size // 2, size // 2, size)) for size in (128, 512))
    for row in (0, 2):
        assert fine[row, 256, 256 + 4 * 3] == usual[row, 64, 64 + 3]
