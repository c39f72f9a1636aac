"""Pictures, masks and sentences are found in the layouts people have them in, and matched by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from progidiff.errors import GeometryError, ImageError, RequestError
from progidiff.textdiff.data import PictureCase, find_cases, pick_cases, read_classes


def write_mask(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array(values, np.uint8)).save(path)
    return path


def test_images_labels_and_sentences_are_found_beside_each_other(blobs: Path):
    cases = find_cases(blobs / "images")
    assert [c.name for c in cases] == ["a0", "a1", "a2", "a3"]
    assert cases[1].label == blobs / "labels" / "a1.png"
    assert cases[3].sentence == "The density in the lower right is high."
    assert find_cases(blobs) == cases
    assert find_cases(blobs / "images", blobs / "labels", blobs / "text.csv") == cases


def test_a_local_datastore_is_understood(blobs: Path, tmp_path: Path):
    for path in (blobs / "images").iterdir():
        shutil.copy(path, tmp_path / path.name)
    shutil.copytree(blobs / "labels", tmp_path / "labels" / "final")
    shutil.copy(blobs / "text.csv", tmp_path)
    cases = find_cases(tmp_path)
    assert [c.label for c in cases] == [tmp_path / "labels" / "final" / f"a{k}.png" for k in range(4)]
    assert all(c.sentence for c in cases)
    assert find_cases(tmp_path, tmp_path / "labels") == cases


def test_masks_with_a_prefix_and_a_table_that_names_them_are_matched(tmp_path: Path):
    write_mask(tmp_path / "Images" / "covid_1.png", np.zeros((4, 4, 3)))
    write_mask(tmp_path / "Ground-truths" / "mask_covid_1.png", np.zeros((4, 4)))
    (tmp_path / "train_text.csv").write_text(
        "Image,Description\nmask_covid_1.png,Unilateral infection\n", encoding="utf-8"
    )
    assert find_cases(tmp_path) == [
        PictureCase(
            "covid_1",
            tmp_path / "Images" / "covid_1.png",
            tmp_path / "Ground-truths" / "mask_covid_1.png",
            "Unilateral infection",
        )
    ]


def test_pictures_without_labels_or_sentences_are_cases_too(tmp_path: Path):
    write_mask(tmp_path / "b.png", np.zeros((4, 4)))
    (tmp_path / ".hidden.png").write_bytes(b"")
    assert find_cases(tmp_path) == [PictureCase("b", tmp_path / "b.png")]


def test_what_cannot_be_found_or_matched_is_refused(blobs: Path, tmp_path: Path):
    with pytest.raises(RequestError, match="does not exist"):
        find_cases(tmp_path / "none")
    with pytest.raises(RequestError, match="holds no pictures"):
        find_cases(tmp_path)
    with pytest.raises(RequestError, match="folder of labels"):
        find_cases(blobs / "images", tmp_path / "none")
    write_mask(tmp_path / "labels" / "z.png", np.zeros((4, 4)))
    with pytest.raises(RequestError, match="No label in"):
        find_cases(blobs / "images", tmp_path / "labels")
    (tmp_path / "t.csv").write_text("image,text\nz.png,Dense\n", encoding="utf-8")
    with pytest.raises(RequestError, match="No row of"):
        find_cases(blobs / "images", text=tmp_path / "t.csv")
    write_mask(tmp_path / "two" / "a.png", np.zeros((4, 4)))
    write_mask(tmp_path / "two" / "a.tif", np.zeros((4, 4)))
    with pytest.raises(RequestError, match="one name without suffix"):
        find_cases(tmp_path / "two")
    write_mask(tmp_path / "one" / "a.png", np.zeros((4, 4)))
    for name in ("a.png", "mask_a.png"):
        write_mask(tmp_path / "one" / "masks" / name, np.zeros((4, 4)))
    with pytest.raises(RequestError, match="both labels of 'a'"):
        find_cases(tmp_path / "one")


def test_cases_are_picked_by_name_with_or_without_suffix(cases: list[PictureCase]):
    assert [c.name for c in pick_cases(cases, ["a2", "a0.png", "a2.png"])] == ["a2", "a0"]
    with pytest.raises(RequestError, match="no picture 'a9'; there are: a0, a1"):
        pick_cases(cases, ["a9"])


def test_with_one_class_all_above_zero_is_it(tmp_path: Path):
    case = PictureCase("m", tmp_path / "m.png", write_mask(tmp_path / "l.png", [[0, 255], [1, 7]]))
    assert read_classes(case, (2, 2), 1).tolist() == [[0, 1], [1, 1]]


def test_with_several_classes_values_are_their_numbers(tmp_path: Path):
    case = PictureCase("m", tmp_path / "m.png", write_mask(tmp_path / "l.png", [[0, 2], [1, 1]]))
    assert read_classes(case, (2, 2), 2).tolist() == [[0, 2], [1, 1]]
    case = PictureCase("m", tmp_path / "m.png", write_mask(tmp_path / "l.png", [[0, 255], [1, 1]]))
    with pytest.raises(ImageError, match="holds class 255; 2 were named"):
        read_classes(case, (2, 2), 2)


def test_an_empty_mask_is_a_mask(tmp_path: Path):
    case = PictureCase("m", tmp_path / "m.png", write_mask(tmp_path / "l.png", np.zeros((3, 4))))
    assert not read_classes(case, (3, 4), 1).any()


def test_a_mask_of_another_size_or_none_is_refused(tmp_path: Path):
    case = PictureCase("m", tmp_path / "m.png", write_mask(tmp_path / "l.png", np.zeros((3, 4))))
    with pytest.raises(GeometryError, match=r"3 x 4 pixels, its picture 'm\.png' 4 x 3"):
        read_classes(case, (4, 3), 1)
    with pytest.raises(ImageError, match="has no label"):
        read_classes(PictureCase("m", tmp_path / "m.png"), (4, 3), 1)


@pytest.mark.parametrize(
    ("pictures", "labels", "table"),
    [
        ("Images", "GTs", "text.csv"),
        ("images", "gt", "text.csv"),
        ("img", "labelcol", "Train_text.csv"),
        ("Images", "Ground Truths", "Test_text.csv"),
    ],
)
def test_the_layouts_in_which_qata_is_passed_on_are_found(tmp_path: Path, pictures: str, labels: str, table: str):
    for name in ("covid_1.png", "covid_2.png"):
        write_mask(tmp_path / pictures / name, np.zeros((4, 4)))
        write_mask(tmp_path / labels / f"mask_{name}", np.zeros((4, 4)))
    (tmp_path / table).write_text("Image,Description\nmask_covid_1.png,Unilateral infection\n", encoding="utf-8")
    for place in (tmp_path, tmp_path / pictures):
        cases = find_cases(place)
        assert [case.label for case in cases] == [tmp_path / labels / f"mask_covid_{k}.png" for k in (1, 2)]
        assert [case.sentence for case in cases] == ["Unilateral infection", None]
