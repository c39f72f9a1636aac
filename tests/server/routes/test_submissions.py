"""Submissions of the review page that are large, too much, or race with another one, on the real app."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from progidiff.server.routes import submissions
from support.apps import connect, open_app
from support.phantoms import write_phantom

SHAPE = (30, 32, 6)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[TestClient]:
    studies = tmp_path_factory.mktemp("submissions") / "studies"
    studies.mkdir()
    for seed, name in enumerate(("large", "many", "raced")):
        write_phantom(studies / f"{name}.nii.gz", shape=SHAPE, seed=seed)
    with open_app(studies, tiny_model, "login", "off"):
        yield connect()


def paint(*slices: int, names: tuple[str, ...] = ("liver",), column: int = 0) -> dict[str, Any]:
    """One voxel of each structure on each slice."""
    depth, height, width = SHAPE[::-1]
    entries = [{"structure": name, "box": [0, 1, column, column + 1], "runs": [0, 1]} for name in names]
    return {"shape": [depth, height, width], "slices": {str(z): entries for z in slices}}


def submit(client: TestClient, image: str, **decisions: Any) -> Any:
    return client.post(f"/progidiff/review/{image}", json=decisions)


def test_a_submission_may_be_as_large_as_its_address_says(client: TestClient):
    painted = paint(1)
    body = json.dumps({"painted": painted, "base": 0}) + " " * (2 << 20)
    answer = client.post("/progidiff/review/large", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    refused = client.post("/progidiff/annotations/large/rename", content=body)
    assert refused.status_code == 413


def test_more_structures_than_a_label_has_ids_are_refused_and_nothing_is_saved(client: TestClient):
    painted = paint(1, names=tuple(f"lesion {number}" for number in range(255)))
    answer = submit(client, "many", painted=painted)
    assert (answer.status_code, "255 ids" in answer.json()["detail"]) == (422, True), answer.text
    assert client.get("/progidiff/review/many").json()["label"] is None


@pytest.mark.parametrize(("other", "status"), [(paint(2, column=3), 409), (paint(4), 200)], ids=["same", "another"])
def test_a_save_between_the_comparison_and_the_save_is_not_overwritten(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any], status: int
):
    base = client.get("/progidiff/review/raced").json()["sequence"]
    draw, waiting = submissions._share_effort, [other]

    def draw_while_somebody_saves(*told: Any) -> Any:  # After the comparison with what is in force.
        if waiting:
            assert submit(client, "raced", painted=waiting.pop(), base=base).status_code == 200
        return draw(*told)

    monkeypatch.setattr(submissions, "_share_effort", draw_while_somebody_saves)
    mine = submit(client, "raced", painted=paint(2, column=7), base=base)
    assert mine.status_code == status, mine.text
    if status == 409:
        assert "was saved meanwhile" in mine.json()["detail"]
    saved = client.get("/progidiff/review/raced/label/2").content
    assert (saved[7] == 6) is (status == 200)
