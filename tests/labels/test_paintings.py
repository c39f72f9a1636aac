"""Slices drawn by hand: what was sent is what is drawn, and what cannot be meant is refused with the cure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from progidiff.errors import GeometryError, RequestError
from progidiff.labels.paintings import Paintings

SHAPE = (5, 30, 40)
IDS = {"liver": 6, "spleen": 1, "lesion": 14}


def pack(mask: np.ndarray) -> dict[str, Any]:
    """Box and runs of a mask of shape (Y, X), by the format's description and not by anybody's code."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return {"box": None, "runs": []}
    box = [int(rows[0]), int(rows[-1]) + 1, int(cols[0]), int(cols[-1]) + 1]
    runs, value = [0], False
    for drawn in mask[box[0] : box[1], box[2] : box[3]].ravel():
        if drawn != value:
            runs.append(0)
            value = drawn
        runs[-1] += 1
    return {"box": box, "runs": runs}


def send(z: int = 2, shape: Any = SHAPE, **entry: Any) -> dict[str, Any]:
    whole = {"structure": "liver", "box": [1, 3, 4, 7], "runs": [0, 2, 1, 3], "edits": 3, **entry}
    return {"shape": list(shape) if isinstance(shape, tuple) else shape, "slices": {str(z): [whole]}}


def read(params: object) -> Paintings:
    return Paintings.from_params(params, SHAPE, "scan")


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 0.98, 1.0])
def test_a_mask_comes_out_as_it_was_drawn(density: float):
    mask = np.random.default_rng(3).random(SHAPE[1:]) < density
    stack = np.zeros(SHAPE, np.uint8)
    read({"shape": list(SHAPE), "slices": {"3": [{"structure": "Liver", **pack(mask)}]}}).draw_on(stack, IDS)
    assert np.array_equal(stack[3] == 6, mask)
    assert not np.delete(stack, 3, axis=0).any()


def test_what_is_listed_last_lies_on_top_and_everything_over_what_was_picked():
    stack = np.full(SHAPE, 9, np.uint8)
    box = {"box": [0, 1, 0, 4]}
    paintings = read(
        {
            "shape": list(SHAPE),
            "slices": {
                "1": [
                    {"structure": "liver", **box, "runs": [0, 4], "edits": 5},
                    {"structure": "lesion", **box, "runs": [1, 2, 1]},
                ],
                "0": [{"structure": "liver", "box": None, "edits": 2}],
            },
        }
    )
    paintings.draw_on(stack, IDS)
    assert stack[1, 0, :5].tolist() == [6, 14, 14, 6, 9]
    assert (stack[0] == 9).all()
    assert paintings.structures == ("liver", "lesion")
    assert paintings.count_edits(["liver", "spleen"]) == {"liver": 7}


def test_nothing_painted_is_nothing():
    assert read(None).structures == ()


@pytest.mark.parametrize(
    "params, error, reason",
    [
        ([], RequestError, "painted must be an object"),
        ({"shape": list(SHAPE)}, RequestError, "painted must be an object"),
        (send(shape=(5, 40, 30)), GeometryError, "5 x 40 x 30 voxels, and image 'scan' has 5 x 30 x 40"),
        (send(shape=None), GeometryError, "Open this image and draw on it"),
        (send(shape="5x30x40"), GeometryError, "Open this image and draw on it"),
        (send(shape=[5, 30, True]), GeometryError, "Open this image and draw on it"),
        (send(z=5), RequestError, "from 0 to 4"),
        ({"shape": list(SHAPE), "slices": {"1": "liver"}}, RequestError, "must be a list of objects"),
        ({"shape": list(SHAPE), "slices": {"1": ["liver"]}}, RequestError, "must be a list of objects"),
        (send(structure=""), RequestError, "printable characters"),
        (send(structure=7), RequestError, "printable characters"),
        (send(edits=-1), RequestError, "edits is -1"),
        (send(box=[1, 3, 4]), RequestError, "four whole numbers"),
        (send(box=[1, 3, 4, 41]), RequestError, "does not lie in the slice, which has 30 x 40"),
        (send(box=[3, 3, 4, 7]), RequestError, "half-open and not empty"),
        (send(box=[-1, 3, 4, 7]), RequestError, "does not lie in the slice"),
        (send(runs=[0, 2, 1]), RequestError, "add up to the 6 voxels of its box; they add up to 3"),
        (send(runs=[-1, 7]), RequestError, "must not be negative"),
        (send(runs=[6.0]), RequestError, "whole numbers"),
        (send(runs="6"), RequestError, "whole numbers"),
        (send(runs=[0] * 8), RequestError, "at most one more than its box has voxels"),
        (send(runs=[2**70, 2]), RequestError, "must not be negative"),
        (send(box=None, runs=[1]), RequestError, "whole numbers|add up"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_cure(params: object, error: type[Exception], reason: str):
    with pytest.raises(error, match=reason):
        read(params)


def test_a_structure_painted_twice_on_a_slice_is_refused():
    entry = send()["slices"]["2"][0]
    with pytest.raises(RequestError, match="'liver' is painted twice on slice 2"):
        read({"shape": list(SHAPE), "slices": {"2": [entry, {**entry, "structure": "LIVER"}]}})
