"""Next sample, queue and background scoring on a real server process with a model of toy width."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
from fastapi import FastAPI
from monailabel.client import MONAILabelClient
from starlette.testclient import TestClient

from progidiff.server.background.next_sample import Suggestion
from progidiff.server.gate import guard
from progidiff.server.gate.auth import Authenticator
from progidiff.server.gate.endpoints import EndpointTable
from progidiff.server.options import ServerOptions
from progidiff.server.routes import next_sample
from progidiff.users import Role, Token
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

IMAGES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("selection")
    studies = folder / "studies"
    studies.mkdir()
    for seed, name in enumerate(IMAGES):
        write_phantom(studies / f"{name}.nii.gz", shape=(40, 40, 12), seed=seed)
    (studies / "broken.nii.gz").write_bytes(b"this is no image")
    conf = (
        "model_dir",
        str(tiny_model),
        "device",
        "cpu",
        "score_pool",
        "on",
        "score_prompt",
        "liver; spleen",
        "acquisition",
        "noise=off",
    )
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        yield running


def ask(server: Server, strategy: str = "random", **params: Any) -> dict[str, Any]:
    import requests

    response = requests.post(f"{server.url}/activelearning/{strategy}", json=params, timeout=60)
    assert response.status_code == 200, response.text
    return dict(response.json())


def wait_for_scores(server: Server, scored: int = len(IMAGES), seconds: float = 120.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        progress = server.get("/progidiff/scoring").json()
        if progress["state"] == "done" and progress["scored"] == scored:
            return dict(progress)
        assert time.monotonic() < deadline, progress
        time.sleep(0.2)


@pytest.fixture(scope="module")
def scored(server: Server) -> dict[str, Any]:
    """The answer that came before there were scores, and the progress when there are."""
    return {"early": ask(server, client_id="early"), "progress": wait_for_scores(server)}


def test_the_pool_is_scored_in_the_background_and_what_cannot_be_is_named(scored: dict[str, Any]):
    progress = scored["progress"]
    assert (progress["images"], progress["scored"], progress["outdated"]) == (5, 4, 0)
    assert list(progress["failed"]) == ["broken"]
    assert scored["early"]["id"] in IMAGES
    assert len(scored["early"]["slices"]) == 8


def test_scored_proposals_answer_the_first_request_at_once(server: Server, scored: dict[str, Any]):
    from support.answers import read_answer

    params, _, _ = read_answer(server.infer("a", {"prompt": "liver; spleen"}))
    assert params["cached"] is True


def test_the_next_sample_names_slices_with_scores_structures_and_reasons(server: Server, scored: dict[str, Any]):
    answer = ask(server, "proposal_disagreement", client_id="anna")
    assert Path(answer["path"]).name == f"{answer['id']}.nii.gz"
    assert answer["name"] == f"{answer['id']}.nii.gz"  # what the datastore knows is there as in the stock answer
    assert answer["strategy"]["proposal_disagreement"]["client_id"] == "anna"
    assert answer["scores_from"] == "tiny@1"
    assert answer["modality"] == "CT"
    indices = [entry["index"] for entry in answer["slices"]]
    assert len(set(indices)) == len(indices) == 8
    assert all(0 <= index < 12 for index in indices)
    assert {name for entry in answer["slices"] for name in entry["structures"]} <= {"liver", "spleen"}
    assert answer["slices"][0]["score"] > 0
    assert "disagree on slice" in answer["reason"]


def test_two_clients_get_different_images_and_the_next_request_gives_another(server: Server, scored: dict[str, Any]):
    first, second = ask(server, client_id="anna"), ask(server, client_id="ben")
    assert first["id"] != second["id"]
    again = ask(server, client_id="anna")
    assert again["id"] not in (first["id"], second["id"])
    owners = {entry["image"]: entry["reserved_by"] for entry in server.get("/progidiff/queue").json()}
    assert owners[again["id"]] == "anna"
    assert owners[second["id"]] == "ben"
    assert owners[first["id"]] is None


@pytest.mark.parametrize(
    "strategy", ["random", "proposal_disagreement", "uniform_random", "foreground_random", "evenly_spaced", "entropy"]
)
def test_every_strategy_answers(server: Server, scored: dict[str, Any], strategy: str):
    assert strategy in server.get("/info/").json()["strategies"]
    answer = ask(server, strategy, client_id="anna", num_slices=3)
    assert answer["id"] in IMAGES
    assert len(answer["slices"]) == 3
    assert answer["reason"]


def test_the_queue_lists_every_readable_image_once_best_first(server: Server, scored: dict[str, Any]):
    queue = server.get("/progidiff/queue", params={"limit": 10}).json()
    assert sorted(entry["image"] for entry in queue) == sorted(IMAGES)
    assert all(entry["state"] == "new" and entry["slices"] and entry["reason"] for entry in queue)
    assert len(server.get("/progidiff/queue", params={"limit": 1}).json()) == 1


@pytest.mark.parametrize(
    ("path", "params", "message"),
    [
        ("/activelearning/best", {}, "There is no strategy 'best'"),
        ("/activelearning/random", {"client_id": 7}, "client_id must be text"),
        ("/activelearning/random", {"num_slices": 0}, "num_slices"),
        ("/progidiff/queue?limit=0", None, "limit"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(
    server: Server, path: str, params: dict[str, Any] | None, message: str
):
    import requests

    response = (
        requests.get(server.url + path, timeout=30)
        if params is None
        else requests.post(server.url + path, json=params, timeout=30)
    )
    assert response.status_code == 422, response.text
    assert message in response.json()["detail"]


def save(server: Server, image: str, **params: Any) -> dict[str, Any]:
    import requests

    source = nibabel.load(server.studies / f"{image}.nii.gz")
    label = np.zeros(source.shape, np.uint8)
    label[10:20, 10:20] = 6
    file = server.temporary / f"{image}-label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(label, source.affine), file)
    with file.open("rb") as content:
        files = {
            "label": (file.name, content),
            "params": (None, json.dumps({"label_info": [{"name": "liver", "idx": 6}], **params})),
        }
        response = requests.put(
            f"{server.url}/datastore/label", params={"image": image, "tag": "final"}, files=files, timeout=60
        )
    assert response.status_code == 200, response.text
    return dict(response.json())


def test_annotated_slices_are_not_suggested_again_and_a_removed_image_is_passed_over(
    server: Server, scored: dict[str, Any]
):
    shutil.copy(server.studies / "a.nii.gz", server.studies / "gone.nii.gz")
    wait_for_scores(server, 5)
    (server.studies / "gone.nii.gz").unlink()
    save(server, "a", slices=[0, 1, 2, 3, 4, 5, 6])
    queue = server.get("/progidiff/queue").json()
    entry = next(entry for entry in queue if entry["image"] == "a")
    assert entry["state"] == "started"
    assert entry["reserved_by"] is None
    assert {item["index"] for item in entry["slices"]} == {7, 8, 9, 10, 11}
    seen = {ask(server, client_id=f"client{number}").get("id") for number in range(5)}
    assert seen == {entry["image"] for entry in queue if entry["reserved_by"] is None} | {
        None
    }  # then everything is taken


def test_when_all_is_labelled_the_answer_says_what_to_review(server: Server, scored: dict[str, Any], tmp_path: Path):
    for image in IMAGES:
        save(server, image)
    answer = ask(server, client_id="anna")
    assert "id" not in answer
    assert "Every image that can be read is labelled. 1 cannot be read, for example 'broken'" in answer["message"]
    assert sorted(entry["image"] for entry in answer["review"]) == sorted(IMAGES)
    queue = server.get("/progidiff/queue").json()
    assert [entry["state"] for entry in queue] == ["review"] * 4
    client = MONAILabelClient(server.url, tmpdir=str(tmp_path), client_id="stock")
    assert not client.next_sample("random", {}).get("id")


@pytest.mark.parametrize(("peer", "path"), [("192.168.7.9", "a.nii.gz"), ("127.0.0.1", "/data/studies/a.nii.gz")])
def test_somebody_elsewhere_is_told_the_name_of_the_file_and_not_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str, path: str
):
    chosen = Suggestion(
        image="a", slices=[], reason="", scores_from="", state="new", modality="CT", path="/data/studies/a.nii.gz"
    )
    stored = {"name": "a.nii.gz", "path": chosen.path, "id": "b", "message": 5}
    datastore = SimpleNamespace(get_image_info=lambda image: stored)
    context = SimpleNamespace(
        app=SimpleNamespace(datastore=lambda: datastore), selection=SimpleNamespace(next=lambda *asked: chosen)
    )
    monkeypatch.setattr(next_sample, "get_context", lambda: context)
    monkeypatch.setattr(next_sample, "_prepare_original", lambda *asked: None)
    web, endpoints = FastAPI(), next_sample.build_endpoints()
    web.include_router(endpoints.router)
    token = Token.of("anna", Role.ANNOTATE, "token-of-somebody-who-annotates")
    authenticator = Authenticator((token,), None, Role.READ, tmp_path / "state")
    guard.install(web, EndpointTable(tuple(endpoints.declared)), authenticator, ServerOptions(tmp_path / "store"))
    client = TestClient(web, base_url="http://127.0.0.1", client=(peer, 5000))
    headers = {"Authorization": "Bearer token-of-somebody-who-annotates"}
    answer = client.post("/activelearning/random", json={}, headers=headers).json()
    assert answer["path"] == path
    assert (answer["id"], answer["name"], answer["message"]) == ("a", "a.nii.gz", 5)
