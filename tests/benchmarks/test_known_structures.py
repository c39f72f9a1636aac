"""The script on what is known beside something new: what it calls bone, and which slices are annotated."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pytest

from progidiff.training.slice_cache import list_cases
from support.labelled_phantoms import write_case, write_table
from support.servers import ROOT, load_script


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return load_script("known_structures")


def test_bone_is_bright_in_one_piece_and_no_organ(known: ModuleType):
    stack = np.zeros((4, 40, 40), np.float32)
    stack[:, 5:20, 5:20] = 400
    stack[:, 9:16, 9:16] = 100  # marrow
    stack[1, 30, 30] = 400  # a speck
    stack[:, 25:35, 5:15] = 400  # a vessel full of contrast
    truth = np.zeros(stack.shape, np.uint8)
    truth[:, 25:35, 5:15] = 8
    bone = known.draw_bone(stack, truth, voxel_ml=0.01)
    assert bone[:, 5:20, 5:20].all()
    assert bone.sum() == 4 * 15 * 15


def test_labels_get_bone_beside_what_they_have(known: ModuleType, tmp_path: Path):
    folder = tmp_path / "studies"
    folder.mkdir()
    write_case(folder, "a", {1: np.s_[6:16, 6:20, 2:5]}, slices=8)
    (folder / "a.json").write_text(json.dumps({"modality": "CT"}))
    write_table(folder, {1: "liver"})
    image = nibabel.load(folder / "a.nii.gz")
    values = np.asarray(image.dataobj).astype(np.int16)
    values[22:34, 8:20, 1:7] = 900
    nibabel.save(nibabel.Nifti1Image(values, image.affine), folder / "a.nii.gz")
    known.prepare(list_cases(folder), tmp_path / "bones")
    (case,) = list_cases(tmp_path / "bones")
    assert case.structures == {1: "liver", 2: "bone"}
    labels = np.asarray(nibabel.load(case.label).dataobj)
    np.testing.assert_array_equal(labels == 1, np.asarray(nibabel.load(folder / "labels/final/a.nii.gz").dataobj) == 1)
    assert (labels[22:34, 8:20, 1:7] == 2).all()
    slices = known.choose_slices(case, 2)
    assert len(set(slices)) == 2
    assert all(1 <= z < 7 for z in slices)
