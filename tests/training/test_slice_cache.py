"""Slices for training: drawn evenly, labelled by name, never mirrored, prepared once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.model.conditioning import ConditioningConfig
from progidiff.training.augment import Tones, augment
from progidiff.training.slice_cache import SliceCache, list_cases
from support.labelled_phantoms import AFFINE, write_case, write_table

CONFIG = ConditioningConfig(
    height=32, width=64, spacing_range=(4.0, 12.0), text_features=8, slot_channels=(4,), slot_strides=(8,)
)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """The liver on 18 of 20 slices, the aorta on 10, the gallbladder on 2; slice 0 is empty."""
    folder = tmp_path / "studies"
    folder.mkdir()
    write_table(folder, {6: "liver", 4: "gallbladder", 8: "aorta"})
    for name in ("one", "two"):
        write_case(
            folder, name, {6: np.s_[6:16, 6:20, 1:19], 4: np.s_[18:22, 8:12, 9:11], 8: np.s_[24:28, 10:16, 3:13]}
        )
    return folder


STRUCTURES = ("gallbladder", "liver", "aorta")


def open_cache(studies: Path, structures: tuple[str, ...] = STRUCTURES) -> SliceCache:
    return SliceCache(list_cases(studies), structures, CONFIG, studies.parent / "cache")


def test_balanced_drawing_sees_each_structure_equally_often(studies: Path):
    cache = open_cache(studies)
    assert [len(s) for s in cache.by_structure] == [4, 36, 20]
    rng = np.random.default_rng(0)
    for random_share in (0.0, 0.15):
        drawn = cache.draw_balanced(6000, rng, random_share)
        # The gallbladder's slices are drawn as often as a third of all draws and then some: every one shows the liver
        # too.
        share = np.mean([cache.pixels[cache.index[i][0]][cache.index[i][1], 0] > 0 for i in drawn])
        wanted = (1 - random_share) * (1 / 3 + (1 / 3) * (2 / 18) + (1 / 3) * (2 / 10)) + random_share * 0.1
        assert share == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / 6000) ** 0.5)


def test_slices_without_any_structure_are_drawn_too(studies: Path):
    cache = open_cache(studies)
    drawn = Counter(cache.index[i] for i in cache.draw_balanced(4000, np.random.default_rng(0)))
    assert drawn[(0, 0)] > 0
    assert (0, 0) not in Counter(
        cache.index[i] for i in cache.draw_balanced(4000, np.random.default_rng(0), random_share=0.0)
    )


def test_drawing_follows_the_generator_alone(studies: Path):
    cache = open_cache(studies)
    assert cache.draw_balanced(50, np.random.default_rng(3)) == cache.draw_balanced(50, np.random.default_rng(3))
    assert cache.draw_balanced(50, np.random.default_rng(3)) != cache.draw_balanced(50, np.random.default_rng(4))


def test_a_structure_that_no_case_shows_is_not_waited_for(studies: Path):
    cache = open_cache(studies, (*STRUCTURES, "spleen"))
    assert len(cache.by_structure[3]) == 0
    assert len(cache.draw_balanced(20, np.random.default_rng(0))) == 20
    assert all(spoken.tolist() == [True, True, True, False] for spoken in cache.annotated[0])


def test_labels_without_any_known_structure_are_refused_when_drawn(studies: Path):
    with pytest.raises(ImageError, match="None of the training labels holds a structure"):
        open_cache(studies, ("spleen",)).draw_balanced(1, np.random.default_rng(0))


def test_labels_are_mapped_by_name_and_not_by_number(tmp_path: Path):
    boxes = {"liver": np.s_[6:16, 6:20, 2:8], "aorta": np.s_[24:28, 10:16, 2:8]}
    masks = []
    for number, table in enumerate([{1: "liver", 2: "aorta"}, {200: "liver", 7: "aorta", 3: "spleen"}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_table(folder, table)
        write_case(
            folder,
            "case",
            {next(k for k, v in table.items() if v == name): box for name, box in boxes.items()},
            slices=10,
        )
        cache = SliceCache(list_cases(folder), ("aorta", "liver"), CONFIG, tmp_path / "cache")
        masks.append(cache.read(range(len(cache)))[1])
    assert torch.equal(masks[0], masks[1])
    assert masks[0].unique().tolist() == [0, 1, 2]
    # id 1 is the aorta, in the file the smaller box at larger i, which is the patient's left: larger x.
    assert float((masks[0] == 1).sum()) < float((masks[0] == 2).sum())


def test_structures_not_asked_for_are_background(studies: Path):
    labels = open_cache(studies, ("liver",)).read(range(20))[1]
    assert labels.unique().tolist() == [0, 1]


def test_the_right_of_the_patient_is_on_the_left_of_the_slice(tmp_path: Path):
    # Voxel i runs towards the patient's left in one file and towards the right in the other; the liver lies right in
    # both.
    left_to_right = AFFINE @ np.diag([-1.0, 1, 1, 1])
    found = []
    for name, affine, box in (("a", AFFINE, np.s_[6:16, 6:20, 2:8]), ("b", left_to_right, np.s_[24:34, 6:20, 2:8])):
        folder = tmp_path / name
        folder.mkdir()
        write_table(folder, {1: "liver"})
        write_case(folder, "case", {1: box}, slices=10, affine=affine)
        cache = SliceCache(list_cases(folder), ("liver",), CONFIG, tmp_path / "cache")
        _, labels = cache.read([4])
        found.append(float(labels[0].nonzero()[:, 1].float().mean()))
    assert found[0] == pytest.approx(found[1], abs=1.0)
    assert found[0] < 32


def test_reading_gives_the_slice_between_its_neighbours(studies: Path):
    cache = open_cache(studies)
    images, labels = cache.read([0, 1, 10])
    assert images.shape == (3, 3, 32, 64)
    assert labels.shape == (3, 32, 64)
    assert -1 <= float(images.min()) < float(images.max()) <= 1
    assert torch.equal(images[0, 2], images[1, 1])
    # Slices are 5 mm apart: 4 mm rounds to the next one. The volume's first slice stands in for what is below it.
    assert torch.equal(images[0, 0], images[0, 1])
    liver = images[2, 1][labels[2] == 2]
    assert float(liver.median()) > float(images[2, 1][labels[2] == 0].median())


def test_prepared_slices_stay_on_disk_and_are_reused(studies: Path):
    first = open_cache(studies)
    assert not any(
        isinstance(value, np.ndarray) for file in (*first.images, *first.labels) for value in vars(file).values()
    )
    files = {p: p.stat().st_mtime_ns for p in (studies.parent / "cache").rglob("*.npy")}
    second = open_cache(studies)
    assert {p: p.stat().st_mtime_ns for p in (studies.parent / "cache").rglob("*.npy")} == files
    assert second.digests == first.digests
    assert torch.equal(first.read([5])[0], second.read([5])[0])


def test_a_changed_label_or_another_order_of_structures_is_prepared_anew(studies: Path):
    before = open_cache(studies)
    reordered = open_cache(studies, STRUCTURES[::-1])
    assert (before.read([5])[1] == 2).sum() == (reordered.read([5])[1] == 2).sum()
    assert (before.read([5])[1] == 3).sum() == (reordered.read([5])[1] == 1).sum() > 0
    write_case(studies, "one", {6: np.s_[6:8, 6:8, 1:19]})
    after = open_cache(studies)
    assert after.digests["one"] != before.digests["one"]
    assert after.digests["two"] == before.digests["two"]
    assert (after.read([5])[1] == 2).sum() < (before.read([5])[1] == 2).sum()
    assert not list((studies.parent / "cache").glob(".slices.*"))


def test_a_label_on_another_grid_is_refused(studies: Path):
    label = studies / "labels" / "final" / "one.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.ones((3, 3, 3), np.uint8), np.eye(4)), label)
    with pytest.raises(GeometryError, match="one"):
        open_cache(studies)


def test_cases_are_listed_with_or_without_suffix_in_the_order_asked_for(studies: Path):
    assert [c.name for c in list_cases(studies)] == ["one", "two"]
    assert [c.name for c in list_cases(studies, ["two.nii.gz", "one"])] == ["two", "one"]
    assert list_cases(studies)[0].structures == {4: "gallbladder", 6: "liver", 8: "aorta"}


def test_images_without_a_label_are_left_out(studies: Path):
    (studies / "labels" / "final" / "one.nii.gz").unlink()
    assert [c.name for c in list_cases(studies)] == ["two"]
    with pytest.raises(RequestError, match="one has no label in labels/final. The labelled cases are two"):
        list_cases(studies, ["one", "two", "three"])


def test_a_folder_without_label_names_says_how_to_write_them(tmp_path: Path):
    with pytest.raises(RequestError, match=r"has no labels\.json .* Write one"):
        list_cases(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"liver": [1]}'])
def test_label_names_that_cannot_be_read_are_refused(tmp_path: Path, text: str):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(RequestError, match=r"labels\.json' does not map label ids to structures"):
        list_cases(tmp_path)


def test_a_folder_without_labelled_images_is_refused(tmp_path: Path):
    write_table(tmp_path, {1: "liver"})
    with pytest.raises(RequestError, match="holds no image with a label of the same name"):
        list_cases(tmp_path)


def draw_markers(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 on the left, 2 on the right, 3 at the top."""
    labels = torch.zeros(count, 64, 80, dtype=torch.long)
    labels[:, 28:36, 18:26] = 1
    labels[:, 28:36, 54:62] = 2
    labels[:, 14:20, 36:44] = 3
    return (labels.float() / 3 * 2 - 1)[:, None].expand(-1, 3, -1, -1).clone(), labels


def test_augmentation_never_mirrors():
    _, labels = augment(*draw_markers(300), torch.Generator().manual_seed(0))
    turned = 0
    for moved in labels:
        where = {v: (moved == v).nonzero().float().mean(0) for v in (1, 2, 3) if (moved == v).sum() > 8}
        if len(where) == 3:
            (ay, ax), (by, bx), (cy, cx) = where[1], where[2], where[3]
            # The sign of the triangle's area is the same in every rotation, scale, shear and shift, and changes in a
            # mirror.
            assert (bx - ax) * (cy - ay) - (by - ay) * (cx - ax) < 0
            assert ax < bx
            turned += 1
    assert turned > 200


def test_the_same_generator_state_gives_the_same_augmentation():
    markers = draw_markers(4)
    first, second, other = (augment(*markers, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_augmentation_keeps_shapes_range_and_label_ids():
    images, labels = augment(*draw_markers(20), torch.Generator().manual_seed(0), strength=1.5)
    assert images.shape == (20, 3, 64, 80)
    assert labels.shape == (20, 64, 80)
    assert -1 <= float(images.min()) <= float(images.max()) <= 1
    assert set(labels.unique().tolist()) == {0, 1, 2, 3}


def test_no_strength_changes_nothing():
    images, labels = draw_markers(3)
    same, moved = augment(images, labels, torch.Generator().manual_seed(0), strength=0.0)
    torch.testing.assert_close(same, images, atol=1e-3, rtol=0)
    assert torch.equal(moved, labels)


def test_image_and_label_move_together():
    _, labels = draw_markers(30)
    moved_images, moved_labels = augment(
        (labels > 0).float()[:, None] * 2 - 1, labels, torch.Generator().manual_seed(0)
    )
    bright = moved_images[:, 0] > moved_images[:, 0].amax(dim=(1, 2), keepdim=True) - 0.7
    overlap = 2 * (bright & (moved_labels > 0)).sum() / (bright.sum() + (moved_labels > 0).sum())
    assert float(overlap) > 0.8


def shade(images: torch.Tensor, strength: float) -> torch.Tensor:
    tones = Tones.draw(torch.Generator().manual_seed(0), len(images), 0.0, strength)
    return ((images + 1) / 2 * tones.find_gain(*images.shape[-2:])).clamp(0, 1) * 2 - 1


def test_shading_is_smooth_positive_and_the_same_for_all_channels():
    images = torch.zeros(4, 3, 32, 64)
    shaded = shade(images, 0.3)
    assert torch.equal(shade(images, 0.0), images)
    assert torch.equal(shaded[:, 0], shaded[:, 2])
    assert float(shaded.std()) > 0.01
    assert float(shaded.min()) > -1
    assert float((shaded[..., 1:] - shaded[..., :-1]).abs().max()) < 0.1
    air = torch.full((4, 3, 32, 64), -1.0)
    assert torch.equal(shade(air, 0.3), air)
