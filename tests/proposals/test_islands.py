"""Dropping islands: what counts as one, in three dimensions, and where it happens on the way from the engine to the
store.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from progidiff.errors import RequestError
from progidiff.images.reading import load_volume
from progidiff.prompts.parser import Query
from progidiff.proposals.engine import Engine
from progidiff.proposals.islands import CLEAN_UPS, LARGEST, OFF, SMALL, drop_islands, find_islands
from progidiff.proposals.request import ProposalRequest
from progidiff.proposals.volume_proposals import VolumeProposals
from progidiff.proposals.work import Work

SHAPE = (6, 20, 24)
LIVER, SPLEEN = Query("liver", "liver"), Query("spleen", "spleen")


def box(z: tuple[int, int], y: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[slice(*z), slice(*y), slice(*x)] = True
    return mask


FAR = (10.0, 10.0, 10.0)
"""Spacing in mm at which all parts below lie apart."""

BODY = box((0, 4), (0, 5), (0, 5))  # 100 voxels
TENTH = box((0, 1), (10, 12), (0, 5))  # exactly a tenth of it
SPECK = box((5, 6), (10, 13), (15, 18))  # a little less


def cleaned(masks: np.ndarray, clean_up: str, covered: np.ndarray | None = None) -> np.ndarray:
    """The masks (K, Z, H, W) of one structure after the clean-up."""
    probabilities = np.where(masks, 200, 0).astype(np.uint8)[None]
    drop_islands(probabilities, clean_up, FAR, covered)
    return probabilities[0] >= 128


def test_parts_under_a_tenth_of_the_largest_are_small_islands():
    np.testing.assert_array_equal(find_islands(BODY | TENTH | SPECK, SMALL, FAR), SPECK)
    np.testing.assert_array_equal(find_islands(BODY | TENTH | SPECK, LARGEST, FAR), TENTH | SPECK)
    assert not find_islands(BODY | TENTH | SPECK, OFF, FAR).any()


def test_a_small_part_near_the_rest_stays_and_one_beyond_ten_millimetres_goes():
    piece = box((0, 1), (0, 2), (7, 9))  # two voxels of nothing, so three steps, from the body
    assert not find_islands(BODY | piece, SMALL, (5.0, 3.0, 3.3)).any()
    np.testing.assert_array_equal(find_islands(BODY | piece, SMALL, (5.0, 3.0, 3.4)), piece)
    below = box((5, 6), (0, 2), (0, 2))  # beyond one slice that was missed
    assert not find_islands(BODY | below, SMALL, (5.0, 1.0, 1.0)).any()
    np.testing.assert_array_equal(find_islands(BODY | below, SMALL, (5.1, 1.0, 1.0)), below)
    assert find_islands(BODY | below, LARGEST, (0.1, 0.1, 0.1)).any()


@pytest.mark.parametrize("clean_up", CLEAN_UPS)
def test_an_empty_mask_and_one_part_have_no_islands(clean_up: str):
    assert not find_islands(np.zeros(SHAPE, dtype=bool), clean_up, FAR).any()
    assert not find_islands(SPECK, clean_up, FAR).any()


def test_a_spot_that_touches_the_rest_on_the_next_slice_is_no_island():
    top = box((4, 5), (2, 3), (2, 3))
    assert not find_islands(BODY | top, LARGEST, FAR).any()
    assert find_islands(BODY | np.roll(top, 1, axis=0), LARGEST, FAR).any()


def test_a_vessel_that_runs_aslant_through_the_slices_stays_whole():
    vessel = np.zeros(SHAPE, dtype=bool)
    vessel[range(6), range(3, 9), range(4, 10)] = True
    assert not find_islands(vessel, LARGEST, FAR).any()


def test_every_proposal_of_every_structure_is_cleaned_by_itself():
    masks = np.stack([BODY | SPECK, SPECK, np.zeros(SHAPE, dtype=bool)])
    np.testing.assert_array_equal(cleaned(masks, SMALL), np.stack([BODY, SPECK, np.zeros(SHAPE, dtype=bool)]))


def test_off_changes_nothing():
    masks = np.stack([BODY | TENTH | SPECK])
    np.testing.assert_array_equal(cleaned(masks, OFF), masks)


def test_the_soft_edge_of_an_island_goes_with_it_and_the_rest_keeps_its_values():
    generator = np.random.default_rng(0)
    drawn = BODY | SPECK | box((5, 6), (9, 10), (20, 24))  # the last: too far from SPECK to touch it, still an island
    soft = ndimage.binary_dilation(drawn, np.ones((1, 3, 3)), iterations=2) & ~drawn
    probabilities = np.where(
        drawn, generator.integers(128, 256, SHAPE), np.where(soft, generator.integers(1, 128, SHAPE), 0)
    ).astype(np.uint8)
    before = probabilities.copy()
    drop_islands(probabilities[None, None], SMALL, FAR)
    assert not probabilities[5].any()
    np.testing.assert_array_equal(probabilities[:4], before[:4])


def test_an_island_beside_the_organ_costs_the_organ_no_voxel():
    beside = box((0, 1), (0, 1), (6, 7))
    np.testing.assert_array_equal(cleaned(np.stack([BODY | beside]), SMALL)[0], BODY)


def test_what_lies_beyond_the_edge_of_the_image_is_not_the_largest_part():
    beyond = box((0, 6), (0, 20), (10, 24))
    covered = np.zeros(SHAPE[1:], dtype=bool)
    covered[:, :8] = True
    kept = cleaned(np.stack([BODY | beyond]), LARGEST, covered)[0]
    np.testing.assert_array_equal(kept & covered, BODY)


def test_an_unknown_clean_up_is_refused():
    with pytest.raises(RequestError, match="off, small, largest"):
        find_islands(BODY, "medium", FAR)
    with pytest.raises(RequestError, match="off, small, largest"):
        drop_islands(np.zeros((1, 1, *SHAPE), dtype=np.uint8), "medium", FAR)


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine(tiny_model, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def volume(tmp_path_factory, phantom_writer):
    return load_volume(phantom_writer(tmp_path_factory.mktemp("clean-up") / "phantom.nii.gz"), modality="CT")


def count_parts(proposals: VolumeProposals) -> list[int]:
    """Parts that hang together, of every structure and proposal."""
    drawn = (proposals.probabilities >= 128) & proposals.grid.covered
    return [ndimage.label(mask, np.ones((3, 3, 3)))[1] for structure in drawn for mask in structure]


def test_the_engine_cleans_a_whole_volume_as_asked(engine: Engine, volume):
    raw = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=3), volume)
    assert raw.clean_up == OFF
    assert max(count_parts(raw)) > 1, "the toy model draws one blot, which proves nothing"
    for clean_up in (SMALL, LARGEST):
        result = engine.propose(ProposalRequest(queries=[LIVER, SPLEEN], num_proposals=3, clean_up=clean_up), volume)
        assert result.clean_up == clean_up
        assert result.summary()["clean_up"] == clean_up
        expected = raw.probabilities.copy()
        drop_islands(
            expected, clean_up, (raw.grid.stack_spacing[0], raw.grid.spacing, raw.grid.spacing), raw.grid.covered
        )
        np.testing.assert_array_equal(result.probabilities, expected)
        drawn = [bool(((p >= 128) & raw.grid.covered).any()) for structure in raw.probabilities for p in structure]
        if clean_up == LARGEST:
            assert count_parts(result) == [int(anything) for anything in drawn]


def test_some_slices_alone_are_not_cleaned(engine: Engine, volume):
    some = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, slices=[2, 3, 5], clean_up=LARGEST), volume)
    assert some.clean_up == OFF
    np.testing.assert_array_equal(
        some.probabilities,
        engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, slices=[2, 3, 5]), volume).probabilities,
    )


def test_all_slices_by_their_numbers_are_a_whole_volume(engine: Engine, volume):
    depth = len(volume.to_stack()[0])
    named = engine.propose(
        ProposalRequest(queries=[LIVER], num_proposals=2, slices=range(depth), clean_up=LARGEST), volume
    )
    np.testing.assert_array_equal(
        named.probabilities,
        engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, clean_up=LARGEST), volume).probabilities,
    )
    assert named.clean_up == LARGEST


def test_the_engine_refuses_an_unknown_clean_up_before_it_computes(engine: Engine, volume):
    told: list[int] = []
    with pytest.raises(RequestError, match="clean_up is 'medium'"):
        engine.propose(
            ProposalRequest(queries=[LIVER], clean_up="medium"),
            volume,
            Work(on_progress=lambda done, total: told.append(done)),
        )
    assert told == []


def test_kept_proposals_say_how_they_were_cleaned(engine: Engine, volume, tmp_path: Path):
    result = engine.propose(ProposalRequest(queries=[LIVER], num_proposals=2, clean_up=SMALL), volume)
    result.to_files(tmp_path / "new")
    assert VolumeProposals.from_files(tmp_path / "new").clean_up == SMALL
    replace(result, clean_up=OFF).to_files(tmp_path / "old")
    card = (tmp_path / "old" / "proposals.json").read_text(encoding="utf-8")
    (tmp_path / "old" / "proposals.json").write_text(card.replace('"clean_up": "off",', ""), encoding="utf-8")
    assert VolumeProposals.from_files(tmp_path / "old").clean_up == OFF
