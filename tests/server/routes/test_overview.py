"""An image and its consensus with fewer voxels."""

from __future__ import annotations

import numpy as np
import pytest

from progidiff.errors import RequestError
from progidiff.server.routes.overview import find_steps, sample, sample_consensus
from support.proposals import make_proposals


def test_few_voxels_are_all_shown_and_many_are_thinned_out_evenly():
    assert find_steps((300, 512, 512)) == (1, 4, 4)
    assert find_steps((900, 2048, 160)) == (3, 13, 13)
    stack = np.arange(7 * 9 * 5).reshape(7, 9, 5)
    assert np.array_equal(stack[sample((1, 1, 1))], stack)
    assert stack[sample((3, 4, 2))].tolist() == stack[1::3, 2::4, 1::2].tolist()


def test_the_consensus_of_a_structure_is_that_of_its_slices():
    proposals = make_proposals()
    mask = sample_consensus(proposals, "liver")
    assert mask.shape == proposals.grid.shape
    for z in (0, 3):
        assert np.array_equal(mask[z], proposals.slice_masks("liver", z).sum(axis=0) >= 2)
    assert mask.any()


def test_a_structure_that_the_result_does_not_hold_is_refused_with_those_that_it_does():
    with pytest.raises(RequestError, match="hold no 'aorta'; they hold liver, spleen, pancreas"):
        sample_consensus(make_proposals(), "aorta")
