"""Which image is found among the files of an archive."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from progidiff.errors import RequestError
from progidiff.images.choosing import keep_one_image
from progidiff.images.reading import load_volume
from support.images import SHAPE, make_affine, make_image, write_dicom
from support.phantoms import write_phantom

UID, OTHER = "1.2.826.0.1.1", "1.2.826.0.1.2"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study as people pack it: one series among companions."""
    write_dicom(tmp_path / "study" / "CT", make_image(), make_affine("LPS"))
    for name in ("__MACOSX/study/CT/._000.dcm", "study/.DS_Store", "study/DICOMDIR", "README.txt", "VIEWER/run.exe"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\26\7 no image " * 20)
    return tmp_path


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_series_is_found_among_its_companions(folder: Path):
    keep_one_image(folder)
    assert len(list_files(folder)) == SHAPE[2]
    assert all(name.startswith("study/CT/") for name in list_files(folder))
    assert load_volume(folder / "study" / "CT").array.shape == SHAPE


def test_scouts_previews_and_empty_folders_do_not_count(folder: Path):
    write_dicom(folder / "study" / "scout", make_image(shape=(9, 9, 1)), make_affine("LPS"), uid=OTHER)
    (folder / "study" / "preview.jpg").write_bytes(b"x")
    (folder / "empty").mkdir()
    keep_one_image(folder)
    assert [path.name for path in folder.iterdir()] == ["study"]
    assert len(list_files(folder)) == SHAPE[2]


def test_several_series_are_listed_to_choose_from(folder: Path):
    write_dicom(folder / "study" / "MR", make_image(1), make_affine("LPS"), uid=OTHER, **{"0008x0060": "MR"})
    write_phantom(folder / "study" / "case.nii.gz", shape=(8, 8, 4))
    before = list_files(folder)
    expected = rf"3 images were sent: .*{UID} \(CT, abdomen, 7 files\).*{OTHER} \(MR, abdomen, 7 files\).*case.nii.gz"
    with pytest.raises(RequestError, match=expected + ".*series="):
        keep_one_image(folder)
    with pytest.raises(RequestError, match="None of them is called '1.2.3'"):
        keep_one_image(folder, "1.2.3")
    assert list_files(folder) == before
    keep_one_image(folder, OTHER)
    assert np.array_equal(load_volume(folder / "study" / "MR").to_stack()[0], write_and_load(folder.parent, 1))


def write_and_load(folder: Path, seed: int) -> np.ndarray:
    return load_volume(write_dicom(folder / "reference", make_image(seed), make_affine("LPS"))).to_stack()[0]


def test_a_file_is_chosen_by_its_path(folder: Path):
    write_phantom(folder / "study" / "case.nii.gz", shape=(8, 8, 4))
    keep_one_image(folder, "study/case.nii.gz")
    assert list_files(folder) == ["study/case.nii.gz"]


def test_a_series_in_several_subfolders_is_brought_together(tmp_path: Path):
    write_dicom(tmp_path / "a", make_image(), make_affine("LPS"))
    for number, path in enumerate(sorted((tmp_path / "a").iterdir())):
        if number % 2:
            (tmp_path / f"part{number}").mkdir()
            path.rename(tmp_path / f"part{number}" / path.name)
    keep_one_image(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["series"]
    assert load_volume(tmp_path / "series").array.shape == SHAPE


def test_without_any_image_the_files_are_named(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(RequestError, match=r"No image is among the 1 files that were sent \(notes.txt\)"):
        keep_one_image(tmp_path)
