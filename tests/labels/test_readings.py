"""Two people's labels of one image: kept apart, compared, and whose turn it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from progidiff.errors import RequestError
from progidiff.labels.history import FINAL, AnnotationStore
from progidiff.labels.readings import Readings, compare_readings, make_tag


def read(store: AnnotationStore, folder: Path, user: str, slices: list[int] | None = None, *names: str) -> None:
    file = folder / "label.nii.gz"
    file.write_bytes(user.encode())
    structures = names or ("liver",)
    ids = {name: number for number, name in enumerate(structures, 1)}
    store.record("scan", file, tag=make_tag(user), user=user, slices=slices, structures=structures, label_ids=ids)


def test_two_people_read_and_the_third_decides(tmp_path: Path):
    store = AnnotationStore(tmp_path / "annotations")
    readings = Readings(store, is_on=True)
    assert readings.find_tag("scan", "anna") == "reading-anna"
    read(store, tmp_path, "ben")
    read(store, tmp_path, "anna")
    assert [reading.user for reading in readings.list("scan")] == ["ben", "anna"]
    assert [readings.find_tag("scan", user) for user in ("anna", "ben", "carl")] == [
        "reading-anna",
        "reading-ben",
        FINAL,
    ]
    assert [readings.is_open_for("scan", user) for user in ("anna", "ben", "carl", "")] == [False, False, True, False]
    assert store.current("scan") is None
    assert store.annotated_images() == {}


def test_without_the_option_everything_counts_as_before(tmp_path: Path):
    readings = Readings(AnnotationStore(tmp_path / "annotations"), is_on=False)
    assert readings.find_tag("scan", "") == FINAL


def test_a_reading_without_a_name_is_refused_with_the_cure(tmp_path: Path):
    readings = Readings(AnnotationStore(tmp_path / "annotations"), is_on=True)
    with pytest.raises(RequestError, match="Log in as a user"):
        readings.find_tag("scan", "")


def test_no_two_people_share_a_tag():
    names = ["anna", "Anna", "Dr. Ä", "Dr. Ö", "Dr.", "a" * 41, "a" * 42, "reading-anna", "a/b", "a_b"]
    tags = {make_tag(name) for name in names}
    assert len(tags) == len(names)
    assert all(len(tag) <= 64 for tag in tags)


def test_agreement_is_of_the_slices_that_both_read_the_worst_first(tmp_path: Path):
    store = AnnotationStore(tmp_path / "annotations")
    read(store, tmp_path, "anna", [0, 1, 2], "liver", "spleen")
    read(store, tmp_path, "ben", None, "liver")
    first, second = Readings(store, is_on=True).list("scan")
    mine, theirs = np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8)
    mine[0, :2] = theirs[0, :2] = 1  # the same
    mine[1, 0], theirs[1, :2] = 1, 1  # 4 of 4 and 8 pixels
    theirs[3] = 1  # not read by anna
    mine[2, 3] = 2  # spleen, not read by ben
    (liver,) = compare_readings((first, mine), (second, theirs))
    assert liver.structure == "liver"
    assert [(entry.index, entry.dice) for entry in liver.slices] == [(1, round(8 / 12, 4)), (0, 1.0)]
    assert liver.dice == round(2 * 12 / (12 + 16), 4)
