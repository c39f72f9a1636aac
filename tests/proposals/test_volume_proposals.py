"""Proposals of a volume, from the working grid to the input's grid."""

from dataclasses import replace

import nibabel
import numpy as np
import pytest
import torch

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.images.volume import Volume
from progidiff.proposals.agreement import compute_agreement, compute_disagreement, rank_proposals, resolve_overlaps
from progidiff.proposals.volume_proposals import VolumeProposals, check_shown
from support.proposals import AFFINES, DEPTH, STRUCTURES, make_proposals, make_volume


def restore_plainly(proposals: VolumeProposals, index: int) -> np.ndarray:
    """bool (K, Z, Y, X), the whole working grid of every slice at once."""
    maps = torch.from_numpy(proposals.probabilities[index]).float()
    restored = torch.stack([proposals.grid.restore_slices(proposal) for proposal in maps])
    return (restored >= 127.475).numpy()


@pytest.fixture
def proposals() -> VolumeProposals:
    return make_proposals()


@pytest.mark.parametrize("orientation", AFFINES)
def test_a_proposal_comes_back_on_the_grid_of_the_input(proposals, orientation):
    volume = make_volume(orientation)
    plain = restore_plainly(proposals, 0)
    for k in range(4):
        mask = proposals.mask(volume.grid, "liver", k + 1)
        assert mask.shape == volume.array.shape
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(volume.arrange(mask), plain[k])


@pytest.mark.parametrize("orientation", ["LPS", "sagittal"])
def test_the_masks_of_a_slice_are_those_of_the_volume(proposals, orientation):
    volume = make_volume(orientation)
    for name in STRUCTURES:
        stacks = np.stack([volume.arrange(proposals.mask(volume.grid, name, k + 1)) for k in range(4)])
        for z in range(DEPTH):
            assert np.array_equal(proposals.slice_masks(name, z), stacks[:, z] > 0)


def test_a_slice_beyond_the_image_is_refused(proposals):
    with pytest.raises(RequestError, match=f"no slice {DEPTH}.*0 to {DEPTH - 1}"):
        proposals.slice_masks("liver", DEPTH)


def test_restoring_only_the_box_is_restoring_everything(proposals):
    volume = make_volume()
    for index, name in enumerate(STRUCTURES):
        plain = restore_plainly(proposals, index)
        np.testing.assert_array_equal(
            volume.arrange(proposals.agreement(volume.grid, name)), plain.mean(0, dtype=np.float32)
        )
        np.testing.assert_array_equal(volume.arrange(proposals.mask(volume.grid, name)), plain.sum(0) * 2 >= 4)


@pytest.mark.parametrize("center", [(3.0, 5.0), (29.0, 31.0), (58.0, 61.0), (500.0, 500.0)])
def test_a_window_that_sticks_out_of_the_volume_is_cut(proposals, center):
    volume = make_volume()
    moved = replace(proposals, grid=replace(proposals.grid, center=center))
    for index, name in enumerate(STRUCTURES):
        np.testing.assert_array_equal(
            volume.arrange(moved.mask(volume.grid, name, 2)), restore_plainly(moved, index)[1]
        )


def test_overlaps_go_to_the_structure_with_the_higher_agreement(proposals):
    volume = make_volume()
    maps = torch.from_numpy(proposals.probabilities).float()
    restored = torch.stack([torch.stack([proposals.grid.restore_slices(k) for k in structure]) for structure in maps])
    agreement = torch.stack([compute_agreement(structure >= 127.475) for structure in restored])
    expected = resolve_overlaps(agreement, restored.mean(1) / 255)
    label_map = volume.arrange(proposals.label_map(volume.grid))
    assert ((agreement >= 0.5).sum(0) > 1).any(), "the example must have overlaps"
    # Two means that differ by less than rounding may go either way.
    assert (label_map != expected.numpy()).mean() < 1e-3
    assert set(np.unique(label_map)) == {0, 1, 2}


def test_label_ids_are_those_asked_for(proposals):
    volume = make_volume()
    default = proposals.label_map(volume.grid)
    named = proposals.label_map(volume.grid, label_ids={"liver": 6, "spleen": 1, "pancreas": 11})
    np.testing.assert_array_equal(named == 6, default == 1)
    np.testing.assert_array_equal(named == 1, default == 2)
    only = proposals.label_map(volume.grid, label_ids={"spleen": 9})
    np.testing.assert_array_equal(only == 9, proposals.mask(volume.grid, "spleen").astype(bool))


def test_a_label_id_beyond_eight_bits_is_refused(proposals):
    with pytest.raises(RequestError, match="1 to 255"):
        proposals.label_map(make_volume().grid, label_ids={"liver": 300})


@pytest.mark.parametrize("shown", [1, "4", "best"])
def test_the_label_map_of_a_proposal_shows_what_the_proposal_draws(proposals, shown):
    volume = make_volume()
    label_map = proposals.label_map(volume.grid, shown)
    liver, spleen = (proposals.mask(volume.grid, name, shown).astype(bool) for name in ("liver", "spleen"))
    np.testing.assert_array_equal(label_map > 0, liver | spleen)
    assert liver[label_map == 1].all()
    assert spleen[label_map == 2].all()


def test_an_absent_structure_is_an_empty_mask(proposals):
    volume = make_volume()
    assert not proposals.mask(volume.grid, "pancreas").any()
    assert not proposals.agreement(volume.grid, "pancreas").any()
    assert proposals.present() == ("liver", "spleen")
    assert proposals.volume_ml("pancreas") == 0
    assert not proposals.disagreement[2].any()


def test_best_is_the_proposal_nearest_to_the_others(proposals):
    volume = make_volume()
    for index, name in enumerate(("liver", "spleen")):
        ranking = rank_proposals(torch.from_numpy(proposals.probabilities[index] >= 128))
        assert list(proposals.ranking[index]) == ranking
        np.testing.assert_array_equal(
            proposals.mask(volume.grid, name, "best"), proposals.mask(volume.grid, name, ranking[0] + 1)
        )


def test_disagreement_per_slice_is_that_of_the_working_grid(proposals):
    assert proposals.disagreement.shape == (3, DEPTH)
    for z in range(DEPTH):
        drawn = torch.from_numpy(proposals.probabilities[0, :, z] >= 128)
        assert proposals.disagreement[0, z] == pytest.approx(compute_disagreement(drawn))


@pytest.mark.parametrize("center", [(3.0, 5.0), (58.0, 61.0), (500.0, 500.0)])
def test_what_is_drawn_beyond_the_edge_of_the_image_has_no_volume(proposals, center):
    volume = make_volume()
    moved = replace(proposals, grid=replace(proposals.grid, center=center))
    for index, name in enumerate(STRUCTURES):
        shown = [float(moved.mask(volume.grid, name, k + 1).sum()) * volume.voxel_ml for k in range(4)]
        np.testing.assert_allclose(moved.volumes_ml[index], shown, rtol=0.25, atol=0.05)  # of other pixels
    assert moved.present() == (() if center == (500.0, 500.0) else ("liver", "spleen"))
    assert moved.disagreement.any() == (center != (500.0, 500.0))


def test_mean_disagreement_counts_only_slices_with_the_structure(proposals):
    assert proposals.mean_disagreement[0] == pytest.approx(proposals.disagreement[0, 1:6].mean())
    assert proposals.mean_disagreement[2] == 0


def test_nearby_disagreement_is_the_mean_of_three_slices(proposals):
    alone = proposals.disagreement[0]
    expected = [alone[max(0, z - 1) : z + 2].mean() for z in range(DEPTH)]
    np.testing.assert_allclose(proposals.nearby_disagreement[0], expected, rtol=1e-5)
    assert proposals.nearby_disagreement[0, 0] > alone[0] == 0, "the slice before the first one that is drawn"
    assert proposals.nearby_disagreement.shape == (3, DEPTH)
    assert not proposals.nearby_disagreement[2].any(), "the pancreas is absent"


def test_one_proposal_has_nothing_to_disagree_with():
    single = make_proposals(num_proposals=1)
    volume = make_volume()
    assert not single.disagreement.any()
    assert single.ranking == ((0,), (0,), (0,))
    np.testing.assert_array_equal(single.mask(volume.grid, "liver"), single.mask(volume.grid, "liver", 1))


def test_a_proposal_is_the_same_alone_and_among_others(proposals):
    volume = make_volume()
    alone = replace(proposals, probabilities=proposals.probabilities[:, 2:3].copy())
    np.testing.assert_array_equal(alone.mask(volume.grid, "liver", 1), proposals.mask(volume.grid, "liver", 3))


def test_the_disagreement_map_is_highest_where_half_of_the_proposals_draw(proposals):
    volume = make_volume()
    agreement = proposals.agreement(volume.grid, "liver")
    percent = proposals.disagreement_map(volume.grid, "liver")
    assert percent.dtype == np.uint8
    assert set(percent[agreement == 0.5]) == {100}
    assert set(percent[agreement == 0.25]) == {75}
    assert not percent[(agreement == 0) | (agreement == 1)].any()


def test_agreement_of_several_structures_is_the_highest(proposals):
    volume = make_volume()
    expected = np.maximum(proposals.agreement(volume.grid, "liver"), proposals.agreement(volume.grid, "spleen"))
    np.testing.assert_array_equal(proposals.agreement(volume.grid), expected)


def test_millilitres_of_the_working_grid_are_those_of_the_mask():
    volume = make_volume()
    box = np.zeros((1, 1, DEPTH, 32, 32), dtype=np.uint8)
    box[0, 0, 1:5, 8:24, 6:26] = 255
    proposals = replace(make_proposals(), structures=("liver",), probabilities=box)
    exact = 4 * 16 * 20 * 2.0 * 2.0 * 3.0 / 1000
    assert proposals.volume_ml("liver", 1) == pytest.approx(exact)
    assert proposals.volume_ml("liver") == pytest.approx(exact)
    assert proposals.mask(volume.grid, "liver").sum() * volume.voxel_ml == pytest.approx(exact, rel=0.05)


def test_the_same_results_come_back_from_files(proposals, tmp_path):
    proposals.to_files(tmp_path)
    again = VolumeProposals.from_files(tmp_path)
    np.testing.assert_array_equal(again.probabilities, proposals.probabilities)
    assert again.grid == proposals.grid
    assert again.summary() == proposals.summary()
    volume = make_volume()
    np.testing.assert_array_equal(again.label_map(volume.grid), proposals.label_map(volume.grid))


def test_the_summary_is_plain_json(proposals):
    import json

    summary = json.loads(json.dumps(proposals.summary(), allow_nan=False))
    assert summary["seed"] == 7
    assert summary["structures"]["liver"]["best"] == proposals.ranking[0][0] + 1
    assert len(summary["structures"]["liver"]["disagreement_per_slice"]) == DEPTH
    assert summary["structures"]["pancreas"]["present"] is False


@pytest.mark.parametrize("name", ["probabilities.npz", "proposals.json"])
def test_damaged_files_are_an_error_that_says_to_compute_again(proposals, tmp_path, name):
    proposals.to_files(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match="compute them again"):
        VolumeProposals.from_files(tmp_path)


def test_another_volume_is_refused(proposals):
    volume = make_volume()
    other = Volume(volume.array[:-1], volume.affine, "CT", "option", "other")
    with pytest.raises(GeometryError, match="the image 'other' has"):
        proposals.mask(other.grid, "liver")


def test_an_unknown_structure_or_proposal_is_refused(proposals):
    with pytest.raises(RequestError, match="hold no 'aorta'"):
        proposals.mask(make_volume().grid, "aorta")
    for shown in ("5", 0, -1, "medoid", "", None, True, "1.5", "\u00b2"):
        with pytest.raises(RequestError, match="a proposal from 1 to 4"):
            proposals.mask(make_volume().grid, "liver", shown)


def test_what_to_show_is_read_as_clients_send_it():
    assert check_shown("Consensus", 4) == "consensus"
    assert check_shown(" best ", 4) == "best"
    assert check_shown("proposal 2", 4) == 2
    assert check_shown(4, 4) == 4


def test_probabilities_of_another_shape_are_refused(proposals):
    with pytest.raises(GeometryError, match="must be uint8"):
        replace(proposals, probabilities=proposals.probabilities[..., :-1])
    with pytest.raises(GeometryError, match="must be uint8"):
        replace(proposals, probabilities=proposals.probabilities.astype(np.float32))


def test_a_mask_can_be_saved_and_read_by_another_program(proposals, tmp_path):
    from progidiff.images.writing import save_mask

    volume = make_volume("sagittal")
    path = save_mask(proposals.mask(volume.grid, "liver"), volume.grid, tmp_path / "mask.nii.gz")
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, volume.affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), proposals.mask(volume.grid, "liver"))
