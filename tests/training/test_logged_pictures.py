"""Pictures of validation slices: truth and answers side by side, in the structures' colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from progidiff.model.conditioning import ConditioningConfig
from progidiff.prompts.structures import COLORS
from progidiff.training.logged_pictures import draw_answers, paint, pick_telling_slices
from progidiff.training.slice_cache import SliceCache, list_cases
from support.labelled_phantoms import write_case, write_table

CONFIG = ConditioningConfig(
    height=32, width=64, spacing_range=(4.0, 12.0), text_features=8, slot_channels=(4,), slot_strides=(8,)
)


def open_cache(folder: Path) -> SliceCache:
    write_table(folder, {6: "liver", 8: "aorta"})
    write_case(folder, "a case", {6: np.s_[6:16, 6:20, 1:19], 8: np.s_[24:28, 10:16, 4:6]})
    write_case(folder, "other", {6: np.s_[6:16, 6:20, 1:19]})
    return SliceCache(list_cases(folder), ("aorta", "liver"), CONFIG, folder / "cache")


def test_a_mask_is_tinted_in_its_structures_colour_and_the_rest_is_grey():
    masks = torch.zeros(2, 4, 6, dtype=torch.bool)
    masks[1, 1:3, 2:4] = True
    picture = paint(torch.zeros(4, 6), masks, ("aorta", "liver"))
    assert picture.shape == (4, 6, 3)
    assert picture.dtype == np.uint8
    color = [int(COLORS["liver"][i : i + 2], 16) for i in (1, 3, 5)]
    np.testing.assert_allclose(picture[1, 2], (127.5 + np.array(color)) / 2, atol=1)
    assert (picture[0] == 128).all()


def test_the_slices_that_show_most_are_picked_from_everywhere(tmp_path: Path):
    cache = open_cache(tmp_path)
    picked = [cache.index[i] for i in pick_telling_slices(cache)]
    assert picked[0] in {(0, 4), (0, 5)}
    assert {v for v, _ in picked} == {0, 1}
    assert pick_telling_slices(cache) == pick_telling_slices(cache)


def test_answers_stand_beside_the_truth(tmp_path: Path):
    cache = open_cache(tmp_path)

    def answer(images: torch.Tensor) -> list[torch.Tensor]:
        return [torch.zeros(len(images), 2, 32, 64, dtype=torch.bool)]

    pictures = draw_answers(cache, answer)
    assert len(pictures) == 4
    name = next(iter(pictures))
    assert name.startswith("slices/a_case ")
    truth, empty = pictures[name][:, :64].astype(int), pictures[name][:, 64:].astype(int)
    assert np.ptp(empty, axis=2).max() == 0
    assert np.ptp(truth, axis=2).max() > 20
