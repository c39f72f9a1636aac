"""Models that draw by edits, through the app: SmartEdit's clicks, Slicer's scribbles, and the history of both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from starlette.testclient import TestClient

from progidiff.errors import GeometryError, RequestError
from progidiff.images.geometry import Grid
from progidiff.proposals.edits import MAX_EDITS
from progidiff.proposals.placed_edits import place_edits
from progidiff.server.tasks.scribbles import read_roi, read_scribble_ids, read_scribbles
from progidiff.testing import add_tiny_close_up
from support.answers import read_answer, read_mask
from support.apps import connect, open_app
from support.phantoms import write_phantom

SAGITTAL = np.array([[0, 0, 5.0, -100], [6.5, 0, 0, -150], [0, 5.5, 0, -20], [0, 0, 0, 1.0]])
SEGMENTS = [
    {"name": "liver", "id": 1},
    {"name": "background_scribbles", "id": 2},
    {"name": "foreground_scribbles", "id": 3},
]


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    studies = tmp_path_factory.mktemp("scribbles") / "studies"
    studies.mkdir()
    write_phantom(studies / "plain.nii.gz")
    write_phantom(studies / "sagittal.nii.gz", shape=(10, 40, 30), seed=2, affine=SAGITTAL)
    return studies


@pytest.fixture(scope="module")
def client(studies: Path, tiny_model: Path) -> Iterator[TestClient]:
    model = studies.parent / "model"
    shutil.copytree(tiny_model, model)
    with open_app(studies, add_tiny_close_up(model), "login", "off"):
        yield connect()


def ask(client: TestClient, model: str, image: str, params: dict[str, Any], label: Path | None = None) -> Any:
    files: dict[str, Any] = {"params": (None, json.dumps({"num_proposals": 2, "steps": 1, **params}))}
    if label is not None:
        files["label"] = (label.name, label.read_bytes())
    return client.post(f"/infer/{model}", params={"image": image, "output": "all"}, files=files)


def draw(client: TestClient, model: str, image: str, params: dict[str, Any], label: Path | None = None) -> Any:
    answer, content, _ = read_answer(ask(client, model, image, params, label))
    return answer, np.asarray(read_mask(content).dataobj)


def write_segments(studies: Path, image: str, drawn: list[tuple[tuple[slice, ...], int]], file: Path) -> Path:
    """A label map on the grid of an image, as Slicer sends it."""
    like = nibabel.load(studies / f"{image}.nii.gz")
    array = np.zeros(like.shape, np.uint8)
    for place, value in drawn:
        array[place] = value
    nibabel.save(nibabel.Nifti1Image(array, like.affine), file)
    return file


def test_slicer_offers_the_task_under_scribbles(client: TestClient):
    task = client.get("/info/").json()["models"]["progidiff_scribbles"]
    assert (task["type"], task["dimension"], task["labels"]) == ("scribbles", 3, [])
    assert task["config"]["prompt"] == ""


@pytest.mark.parametrize("image", ["plain", "sagittal"])
def test_scribbles_are_kept_voxel_by_voxel_whatever_the_order_of_the_file(
    client: TestClient, studies: Path, tmp_path: Path, image: str
):
    inside, outside = (slice(3, 6), slice(10, 20), slice(4, 5)), (slice(3, 6), slice(24, 30), slice(4, 5))
    label = write_segments(studies, image, [(inside, 3), (outside, 2)], tmp_path / "segments.nii.gz")
    params = {"label_info": SEGMENTS, "selected_label_name": "liver", "roi": []}
    answer, mask = draw(client, "progidiff_scribbles", image, params, label)
    assert (mask[inside] == 6).all()
    assert not mask[outside].any()
    assert (answer["label_names"], answer["structures"].keys()) == ({"liver": 6}, {"liver"})
    other = draw(client, "progidiff", image, {"prompt": "liver"})[1]
    assert not (other[inside] == 6).all() or other[outside].any()  # without them it is otherwise


def test_a_segment_without_a_name_becomes_a_new_structure_inside_of_the_box(
    client: TestClient, studies: Path, tmp_path: Path
):
    inside = (slice(20, 24), slice(20, 24), slice(3, 4))
    segments = [{"name": "foreground_scribbles", "id": 1}, {"name": "Segment_1", "id": 2}]
    label = write_segments(studies, "plain", [(inside, 1)], tmp_path / "segments.nii.gz")
    box = [40, 10, 8, 40, 2, 6]
    params = {"label_info": segments, "selected_label_name": "Segment_1", "roi": box}
    answer, mask = draw(client, "progidiff_scribbles", "plain", params, label)
    assert answer["label_names"] == {"Segment_1": 1}
    assert (mask[inside] == 1).all()
    kept = np.zeros(mask.shape, bool)
    kept[10:40, 8:40, 2:6] = True
    assert not mask[~kept].any()


@pytest.mark.parametrize(
    ("params", "is_drawn", "told"),
    [
        ({"label_info": SEGMENTS}, False, "neither a foreground scribble"),
        ({"label_info": "segments"}, True, "list of the segments"),
        ({"roi": [1, 2, 3]}, True, "six voxel indices"),
        ({"roi": [900, 950, 0, 9, 0, 9]}, True, "outside of 'plain"),
        ({"selected_label_name": "livr"}, True, "livr"),
    ],
)
def test_scribbles_that_say_nothing_are_refused_with_the_cure(
    client: TestClient, studies: Path, tmp_path: Path, params: dict[str, Any], is_drawn: bool, told: str
):
    place = (slice(3, 6), slice(10, 20), slice(4, 5))
    label = write_segments(studies, "plain", [(place, 3)] if is_drawn else [], tmp_path / "segments.nii.gz")
    response = ask(client, "progidiff_scribbles", "plain", {"selected_label_name": "liver", **params}, label)
    assert response.status_code == 422, response.text
    assert told in response.json()["detail"]


def test_scribbles_of_another_image_are_refused(client: TestClient, studies: Path, tmp_path: Path):
    label = write_segments(studies, "sagittal", [], tmp_path / "segments.nii.gz")
    response = ask(client, "progidiff_scribbles", "plain", {"selected_label_name": "liver"}, label)
    assert response.status_code == 422
    assert "resample it" in response.json()["detail"]
    assert "form field label" in ask(client, "progidiff_scribbles", "plain", {}).json()["detail"]


def test_smartedit_draws_by_clicks_and_keeps_each_of_them(client: TestClient):
    wanted, unwanted = [[30, 20, 4], [5, 5, 4]], [[40, 30, 4]]
    clicks = {"foreground": wanted, "background": unwanted, "slice": 4}
    answer, mask = draw(client, "progidiff_slice", "plain", {"label": "liver", **clicks})
    assert (answer["fits"], answer["missed_clicks"], answer["num_proposals"]) == (True, 0, 2)
    assert answer["message"].startswith("2 proposals were drawn given all 3 clicks")
    assert all(mask[tuple(place)] == 6 for place in wanted)
    assert mask[tuple(unwanted[0])] == 0
    assert not np.delete(mask, 4, axis=2).any()


def test_smartedit_draws_what_has_no_name_and_says_where_clicks_contradict(client: TestClient):
    both = {"foreground": [[30, 20, 4]], "background": [[30, 20, 4]], "slice": 4}
    answer, mask = draw(client, "progidiff_slice", "plain", {"label": "Segment_1", **both})
    assert (answer["fits"], answer["missed_clicks"], answer["num_proposals"]) == (False, 1, 2)
    assert "background counts" in answer["message"]
    assert mask[30, 20, 4] == 0


def test_ten_thousand_clicks_are_refused_with_another_way(client: TestClient):
    clicks = [[x % 60, x // 60 % 40, 4] for x in range(10_000)]
    for model, params in (
        ("progidiff_slice", {"label": "liver", "foreground": clicks, "slice": 4}),
        ("progidiff", {"prompt": "liver", "edits": [{"kind": "click", "points": [place]} for place in clicks]}),
    ):
        response = ask(client, model, "plain", params)
        assert response.status_code == 422, model
        assert response.json()["detail"].startswith(f"10000 edits were sent, at most {MAX_EDITS} are read. Paint")


def test_clicks_that_contradict_each_other_are_answered_and_said_so(client: TestClient):
    edits = [{"kind": "click", "points": [[30, 20, 4]], "positive": inside} for inside in (True, False)]
    answer, mask = draw(client, "progidiff", "plain", {"prompt": "liver", "edits": edits})
    assert mask[30, 20, 4] == 0
    assert any("said to be inside and outside of liver; outside counts" in warning for warning in answer["warnings"])


def test_the_history_and_the_audit_say_who_steered_with_what(client: TestClient, studies: Path, tmp_path: Path):
    edits = [
        {"kind": "click", "points": [[30, 20, 4]]},
        {"kind": "click", "points": [[31, 20, 4]]},
        {"kind": "scribble", "points": [[5, 5, 4], [9, 5, 4]], "positive": False},
    ]
    answer, mask = draw(client, "progidiff", "plain", {"prompt": "liver", "edits": edits})
    plain, other = draw(client, "progidiff", "plain", {"prompt": "liver"})
    again, _ = draw(client, "progidiff", "plain", {"prompt": "liver", "edits": json.dumps(edits)})
    assert answer["proposals"] != plain["proposals"]  # Edits are part of the key,
    assert (again["proposals"], again["cached"]) == (answer["proposals"], True)  # whatever way they are sent.
    affine = nibabel.load(studies / "plain.nii.gz").affine
    for key, drawn in ((answer["proposals"], mask), (plain["proposals"], other)):
        file = tmp_path / "label.nii.gz"
        nibabel.save(nibabel.Nifti1Image(drawn, affine), file)
        saved = client.put(
            "/datastore/label",
            params={"image": "plain", "tag": "final"},
            files={"params": (None, json.dumps({"proposals": key})), "label": (file.name, file.read_bytes())},
        )
        assert saved.status_code == 200, saved.text
    saves = client.get("/progidiff/annotations", params={"image": "plain"}).json()["annotations"]
    told = {save["source"]["proposals"]: save["source"]["steering"] for save in saves}
    assert told == {answer["proposals"]: "2 clicks inside, 1 scribble outside", plain["proposals"]: ""}
    rows = client.get("/progidiff/annotations/export", params={"format": "csv"}).text.splitlines()
    assert rows[0].endswith(",steering")
    assert sum(row.endswith('"2 clicks inside, 1 scribble outside"') for row in rows) == 1


def test_ids_boxes_and_scribbles_are_read_as_slicer_sends_them():
    grid = Grid((8, 6, 4), np.diag([-1.0, 1.0, 3.0, 1.0]), "toy")
    assert read_scribble_ids(None) == {"background_scribbles": 2, "foreground_scribbles": 3}
    assert read_scribble_ids(SEGMENTS) == {"background_scribbles": 2, "foreground_scribbles": 3}
    assert read_roi([7, 2, 1, 3, -5, 9], grid) == ((2, 7), (1, 3), (0, 4))
    with pytest.raises(RequestError, match="six voxel indices"):
        read_roi([True] * 6, grid)
    with pytest.raises(GeometryError, match="outside of 'toy'"):
        read_roi([3, 3, 1, 2, 0, 2], grid)
    array = np.zeros(grid.shape, np.uint8)
    array[1:4, 2, 1], array[5, 5, 1] = 3, 2
    edits = read_scribbles(array, read_scribble_ids(SEGMENTS), None, grid)
    pins = place_edits(edits, "liver", grid).pins()
    assert {place[:3] for place in pins if place[3]} == {grid.locate((i, 2, 1)) for i in (1, 2, 3)}
    assert {place[:3] for place in pins if not place[3]} == {grid.locate((5, 5, 1))}
