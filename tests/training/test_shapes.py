"""Label volumes without images: what close-ups learn of anatomy from them."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from progidiff.errors import RequestError
from progidiff.images.close_up import WindowRules
from progidiff.training.shapes import ShapeSource, load_shapes
from support.labelled_phantoms import write_table

SHAPE = (40, 36, 10)


def write_masks(folder: Path, name: str, values: np.ndarray) -> Path:
    """A label volume in voxels of 2 x 2 x 4 mm; axes as NIfTI has them, x, y, z."""
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([-2.0, -2, 4, 1])), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_table(tmp_path, {3: "liver", 7: "aorta", 9: "duodenum"})
    masks = np.zeros(SHAPE, np.uint8)
    masks[4:24, 6:26, 2:8], masks[28:32, 10:14], masks[6:10, 28:34, 4:6] = 3, 7, 9
    write_masks(tmp_path, "one", masks)
    write_masks(tmp_path, "two", np.roll(masks, 2, axis=0))
    return tmp_path


def test_labels_are_renumbered_by_name_and_others_keep_a_tone(folder: Path):
    volumes = load_shapes(folder, ["aorta", "liver"])
    assert [volume.name for volume in volumes] == ["one", "two"]
    first = volumes[0]
    assert first.known == (1, 2)
    assert first.labels.shape == (10, 36, 40)
    assert first.spacing == pytest.approx((4, 2, 2))
    assert ((first.labels == 1) == (first.image == 7)).all()
    assert ((first.labels == 2) == (first.image == 3)).all()
    assert (first.labels[first.image == 9] == 0).all()
    assert (first.image == 9).any()


def test_windows_are_painted_anew_and_their_evidence_is_nearly_the_truth(folder: Path):
    rules = WindowRules(size=32, large_size=32)
    source = ShapeSource(load_shapes(folder, ["liver", "aorta"]), 32, rules=rules, off_share=0.0)
    rng = np.random.default_rng(0)
    looks = [source.look(rng) for _ in range(24)]
    pictures = np.stack([look["images"].numpy() for look in looks])
    assert pictures.shape == (24, 5, 32, 32)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert all(look["is_found"] == 1 for look in looks)
    dices, contrasts = [], []
    for look in looks:
        truth, found = look["truth"][0] > 0.5, look["evidence"][1] > 0.5
        dices.append(float(2 * (truth & found).sum() / (truth.sum() + found.sum())))
        contrasts.append(float(abs(look["images"][2][truth].mean() - look["images"][2][~truth].mean())))
    assert 0.5 < np.mean(dices) < 0.99
    # Here the picture tells much, there next to nothing.
    assert min(contrasts) < 0.05
    assert max(contrasts) > 0.15
    again = source.look(np.random.default_rng(5))
    same = source.look(np.random.default_rng(5))
    assert (again["images"] == same["images"]).all()


def test_what_is_no_folder_of_labels_is_refused_with_a_cure(folder: Path, tmp_path: Path):
    with pytest.raises(RequestError, match=r"shows one of spleen; check the names in its labels\.json"):
        load_shapes(folder, ["spleen"])
    write_masks(folder, "ct", np.full(SHAPE, -400, np.int16) + np.arange(10, dtype=np.int16))
    with pytest.raises(RequestError, match=r"no label ids of 0..255 .*--also"):
        load_shapes(folder, ["liver"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RequestError, match=r"no labels\.json"):
        load_shapes(empty, ["liver"])
    write_table(empty, {1: "liver"})
    with pytest.raises(RequestError, match="no label volumes"):
        load_shapes(empty, ["liver"])
