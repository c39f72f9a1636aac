"""Which slices of a series the OHIF panel may accept one by one and go to."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from progidiff.images.volume import Volume
from progidiff.server.routes.ohif import _list_axial

SAGITTAL = np.array([[0, 0, 5.5, -160], [-6.5, 0, 0, 150], [0, -5.0, 0, 70], [0, 0, 0, 1.0]])


def make_volume(affine: np.ndarray) -> Volume:
    return Volume(np.zeros((6, 5, 4), np.float32), affine, "MR", "stated", "image")


@pytest.mark.parametrize(
    ("affine", "slices"),
    [(np.diag([-1.0, -1, 2, 1]), [0, 1, 2, 3]), (np.diag([-1.0, -1, -2, 1]), [3, 2, 1, 0]), (SAGITTAL, None)],
    ids=["upwards", "downwards", "sagittal"],
)
def test_slices_of_a_series_from_a_pacs_are_axial_or_have_no_index(affine: np.ndarray, slices: list[int] | None):
    context = cast(Any, SimpleNamespace(served=SimpleNamespace(is_remote=True)))
    assert _list_axial(context, make_volume(affine)) == slices


def test_a_folder_serves_the_axial_stack_whatever_the_order_in_the_file():
    context = cast(Any, SimpleNamespace(served=SimpleNamespace(is_remote=False)))
    assert _list_axial(context, make_volume(SAGITTAL)) == list(range(5))
