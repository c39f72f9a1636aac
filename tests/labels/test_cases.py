"""The labelled images of a folder, and every way in which its labels.json is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from progidiff.errors import RequestError
from progidiff.labels.cases import list_labelled, load_label_names
from progidiff.labels.saving import load_label_ids
from support.labelled_phantoms import write_case

NAMES = {1: "liver", 2: "spleen"}


@pytest.mark.parametrize(
    "text",
    [
        '{"1": "liver", "2": "spleen"}',
        '{"0": "background", "1": "liver", "2": "spleen"}',
        '\ufeff{"1": "liver", "2": "spleen"}',
        '{"background": 0, "liver": 1, "spleen": 2}',
        '{"liver": "1", "spleen": "2"}',
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1, "spleen": 2}}),
    ],
    ids=["ours", "background", "byte order mark", "nnU-Net v2", "ids as text", "dataset.json"],
)
def test_a_table_of_labels_is_read_in_every_order(tmp_path: Path, text: str):
    (tmp_path / "labels.json").write_text(text, encoding="utf-8")
    assert load_label_names(tmp_path) == NAMES
    assert load_label_ids(tmp_path) == {"liver": 1, "spleen": 2}


def test_a_table_of_labels_may_be_written_as_windows_writes_text(tmp_path: Path):
    (tmp_path / "labels.json").write_text('{"1": "liver", "2": "spleen"}', encoding="utf-16")
    assert load_label_names(tmp_path) == NAMES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"0": "liver"}', "ids below 1"),
        ('{"-1": "liver"}', "ids below 1"),
        ('{"liver": 1, "spleen": 1}', "Give each its own"),
        ('{"liver": true}', "does not map label ids"),
        ('{"liver": {"1": 2}}', "does not map label ids"),
        ("[]", "does not map label ids to structures .it holds a JSON list and no object"),
        ('{"1": "liver", "1": "spleen"}', "'1' is in it twice"),
        ('{"labels": {"liver": 1, "liver": 2}}', "'liver' is in it twice"),
        ('{"1.0": "liver"}', "neither '1.0' nor 'liver' beside it is a whole number"),
    ],
)
def test_a_table_that_means_nothing_is_refused_with_a_reason(tmp_path: Path, text: str, message: str):
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(RequestError, match=message):
        load_label_names(tmp_path)
    with pytest.raises(RequestError, match=message):
        load_label_ids(tmp_path)


def test_an_id_that_no_mask_can_hold_is_refused_when_a_label_is_saved(tmp_path: Path):
    (tmp_path / "labels.json").write_text('{"liver": 256}')
    assert load_label_names(tmp_path) == {256: "liver"}
    with pytest.raises(RequestError, match="outside 1 to 255"):
        load_label_ids(tmp_path)


def test_a_segmentation_of_a_viewer_is_the_label_of_its_image(tmp_path: Path):
    write_case(tmp_path, "a", {}, slices=4)
    final = tmp_path / "labels" / "final"
    (final / "a.nii.gz").rename(final / "a.seg.nrrd")
    (case,) = list_labelled(tmp_path)
    assert (case.name, case.label.name) == ("a", "a.seg.nrrd")
