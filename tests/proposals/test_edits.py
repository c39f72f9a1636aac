"""What a person draws: read strictly, placed exactly, drawn into windows where it belongs."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from progidiff.errors import GeometryError, RequestError
from progidiff.images.close_up import CloseUpWindow, WindowRules
from progidiff.images.geometry import Grid
from progidiff.proposals.edits import MAX_EDITS, Edit, read_edits
from progidiff.proposals.placed_edits import place_edits

# x runs to the patient's left, y to the front, z to the head: the stack flips y.
GRID = Grid((40, 50, 12), np.diag([-2.0, 2.0, 4.0, 1.0]), "scan")
WINDOW = CloseUpWindow((12, 50, 40), (4.0, 2.0, 2.0), (50.0, 40.0), 1.0, 64, 2, 8)


def click(i: int, j: int, k: int, **more: object) -> dict[str, object]:
    return {"kind": "click", "points": [[i, j, k]], **more}


def paint(mask: np.ndarray, z: int) -> dict[str, object]:
    return {"kind": "paint", "slice": z, "mask": base64.b64encode(np.packbits(mask).tobytes()).decode()}


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_no_edits_are_none(nothing: object):
    assert read_edits(nothing) == ()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"kind": "click"}, "must be a list"),
        ("{", "Option edits"),
        ([{"kind": "click"}], "Edit 1 .* 1 or more points"),
        ([click(1, 2, 3), {"kind": "box", "points": [[1, 2, 3]]}], "Edit 2 .* 2 or more"),
        ([{"kind": "tap", "points": [[1, 2, 3]]}], "Edit 1 .*kind"),
        ([{"kind": "click", "points": [[1, 2]]}], "Edit 1"),
        ([{"kind": "click", "points": [[1, 2, 3]], "colour": "red"}], "colour"),
        ([{"kind": "paint", "slice": 3}], "mask and slice"),
        ([click(0, 0, 0)] * (MAX_EDITS + 1), "at most"),
        ([{"kind": "scribble", "points": [[0, 0, 0]] * 5000}], "5000 points"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_number(value: object, told: str):
    with pytest.raises(RequestError, match=told):
        read_edits(value)


def test_edits_are_the_same_as_a_list_and_as_its_text():
    value = [click(1, 2, 3), click(4, 5, 3, positive=False, structure="liver")]
    assert read_edits(value) == read_edits(json.dumps(value))


def test_a_click_lands_on_its_voxel_of_the_stack():
    placed = place_edits(read_edits([click(3, 7, 5), click(9, 7, 5, positive=False)]), "liver", GRID)
    # The stack's columns run to the patient's left as the file's do here, its rows against them.
    assert set(placed.pins()) == {(*GRID.locate((3, 7, 5)), True), (*GRID.locate((9, 7, 5)), False)}


def test_edits_of_other_structures_are_left_out_and_nameless_ones_count():
    edits = read_edits([click(3, 7, 5, structure="spleen"), click(4, 7, 5)])
    assert len(place_edits(edits, "liver", GRID).pins()) == 1
    assert len(place_edits(edits, "spleen", GRID).pins()) == 2
    assert not place_edits(read_edits([click(3, 7, 5, structure="spleen")]), "liver", GRID)


def test_clicks_that_contradict_each_other_mean_outside():
    edits = read_edits([click(3, 7, 5), click(3, 7, 5, positive=False)])
    assert [inside for *_, inside in place_edits(edits, "", GRID).pins()] == [False]


def test_what_lies_outside_of_the_image_or_on_two_slices_is_refused():
    with pytest.raises(GeometryError, match=r"\(40, 0, 0\) is outside of 'scan'"):
        place_edits(read_edits([click(40, 0, 0)]), "", GRID)
    line = {"kind": "scribble", "points": [[1, 1, 3], [2, 2, 4]]}
    with pytest.raises(GeometryError, match="Edit 1 .* several axial slices"):
        place_edits(read_edits([line]), "", GRID)


def test_a_painted_slice_of_another_image_is_refused():
    with pytest.raises(GeometryError, match="50 x 40 pixels, 250 bytes"):
        place_edits(read_edits([paint(np.ones((8, 8), bool), 3)]), "", GRID)
    with pytest.raises(GeometryError, match="paints slice 12"):
        place_edits(read_edits([paint(np.ones((50, 40), bool), 12)]), "", GRID)
    with pytest.raises(RequestError, match="no base64"):
        place_edits((Edit(kind="paint", slice=3, mask="%%"),), "", GRID)


def test_a_click_shows_in_the_window_where_its_voxel_lies():
    placed = place_edits(read_edits([click(20, 24, 5)]), "", GRID)
    maps = placed.draw(WINDOW, 5)
    assert maps is not None
    _, y, x = GRID.locate((20, 24, 5))
    row, column = np.unravel_index(int(maps[0].argmax()), (64, 64))
    assert abs((row + 0.5 - 32) * 1.0 + 50 - (y + 0.5) * 2) <= 1
    assert abs((column + 0.5 - 32) * 1.0 + 40 - (x + 0.5) * 2) <= 1
    assert placed.draw(WINDOW, 6) is None


def test_a_box_and_a_lasso_fill_what_they_enclose():
    box = place_edits(read_edits([{"kind": "box", "points": [[12, 20, 5], [27, 29, 5]]}]), "", GRID).draw(WINDOW, 5)
    assert box is not None
    # 16 x 10 voxels of 2 mm are 32 x 20 pixels of 1 mm.
    assert float((box[4] > 0).sum()) == pytest.approx(640, rel=0.1)
    line = {"kind": "lasso", "positive": False, "points": [[12, 20, 5], [27, 20, 5], [27, 29, 5], [12, 29, 5]]}
    hole = place_edits(read_edits([line]), "", GRID).draw(WINDOW, 5)
    assert hole is not None
    assert not hole[4].any()
    assert float((hole[1] == 1).sum()) == pytest.approx(30 * 18, rel=0.15)


def test_a_scribble_is_a_line_through_its_points():
    line = {"kind": "scribble", "points": [[12, 24, 5], [26, 24, 5]]}
    placed = place_edits(read_edits([line]), "", GRID)
    assert len(placed.pins()) == 15
    maps = placed.draw(WINDOW, 5)
    assert maps is not None
    assert int((maps[0] == 1).sum()) >= 28


def test_a_painted_slice_is_a_neighbour_of_the_slices_around_it():
    mask = np.zeros((50, 40), bool)
    mask[20:30, 15:25] = True
    placed = place_edits(read_edits([paint(mask, 4)]), "", GRID)
    near, far = placed.draw(WINDOW, 5), placed.draw(WINDOW, 8)
    assert near is not None
    assert far is not None
    assert float(near[6].mean()) > float(far[6].mean()) > 0
    assert 2 * int((near[5] > 0).sum()) == pytest.approx(2 * 400, rel=0.1)
    assert placed.draw(WINDOW, 12) is None


def test_edits_where_nothing_was_found_get_a_window_of_their_own():
    rules = WindowRules()
    placed = place_edits(read_edits([click(20, 24, 5)]), "", GRID)
    (made,) = placed.plan_windows([], (12, 50, 40), rules)
    assert made.first <= 5 <= made.last
    assert placed.plan_windows([WINDOW], (12, 50, 40), rules) == [WINDOW]
    large = {"kind": "box", "points": [[0, 0, 5], [39, 49, 5]]}
    (wide,) = place_edits(read_edits([large]), "", GRID).plan_windows([], (12, 50, 40), rules)
    assert wide.size * wide.spacing > 100
