"""The whole loop on a real server: next sample, proposals, accept slices, save, retrain, publish, new scores, next
sample; and SIGKILL.

The model is of toy width with random weights: what it draws means nothing, that it is replaced does.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import requests

from progidiff.prompts.structures import STRUCTURES
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

IMAGES = ("a", "b", "c", "d")
LIVER = STRUCTURES.index("liver") + 1
SECONDS = 600.0


@contextmanager
def serve(folder: Path, model: Path) -> Iterator[Server]:
    """The same server on the same folders, again and again."""
    conf = (
        "model_dir",
        str(model),
        "device",
        "cpu",
        "score_pool",
        "on",
        "score_prompt",
        "liver",
        "adapters",
        str(folder / "adapters"),
    )
    conf += (
        "retrain_after",
        "8",
        "retrain_params",
        "steps=6,validate_every=2,batch_size=2,name=ct",
        "acquisition",
        "cover=off,noise=off",
    )
    conf += ("next_strategy", "proposal_disagreement")
    if not (folder / "app").is_dir():
        copy_app(folder)
    with run_server(folder / "studies", folder / "app", folder / "server.log", *conf) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "studies").mkdir()
    for seed, name in enumerate(IMAGES):
        write_phantom(tmp_path / "studies" / f"{name}.nii.gz", shape=(40, 40, 12), seed=seed)
    return tmp_path


def wait_for(what: Callable[[], Any], seconds: float = SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = what()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.3)


def wait_for_scores(server: Server) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        progress = server.get("/progidiff/scoring").json()
        return progress if progress["state"] == "done" and progress["scored"] == len(IMAGES) else None

    return dict(wait_for(look))


def ask(server: Server, client: str) -> dict[str, Any]:
    return dict(
        requests.post(
            f"{server.url}/activelearning/random", json={"client_id": client, "num_slices": 4}, timeout=60
        ).json()
    )


def accept(server: Server, sample: dict[str, Any]) -> dict[str, Any]:
    """Look at proposals of the image, take the bright ball as liver on the suggested slices, save."""
    from support.answers import read_answer

    params, _, _ = read_answer(server.infer(sample["id"], {"prompt": "liver"}))
    assert params["cached"] is True
    image = nibabel.load(server.studies / f"{sample['id']}.nii.gz")
    label = (np.asarray(image.dataobj) > 75).astype(np.uint8) * LIVER
    file = server.temporary / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(label, image.affine), file)
    about = {
        "slices": [entry["index"] for entry in sample["slices"]],
        "structures": ["liver"],
        "proposals": params["proposals"],
        "shown": "consensus",
    }
    about |= {"shown": "consensus", "edited": True, "seconds": 30, "label_info": [{"name": "liver", "idx": LIVER}]}
    with file.open("rb") as content:
        files = {"label": (file.name, content), "params": (None, json.dumps(about))}
        response = requests.put(
            f"{server.url}/datastore/label", params={"image": sample["id"], "tag": "final"}, files=files, timeout=60
        )
    assert response.status_code == 200, response.text
    return dict(response.json())


def wait_for_training(server: Server) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        versions = server.get("/progidiff/versions").json()
        status = server.get("/train/", params={"all": "false"}).json()
        assert status.get("status") != "ERROR", status
        return versions[0] if versions and status.get("status") == "DONE" else None

    return dict(wait_for(look))


def kill(server: Server) -> None:
    """SIGKILL, and wait until it is gone."""
    server.process.kill()
    server.process.wait(10)


def test_the_whole_loop_goes_round_and_a_kill_at_every_stage_loses_nothing(folder: Path, tiny_model: Path):
    with serve(folder, tiny_model) as server:
        scored = wait_for(lambda: server.get("/progidiff/scoring").json()["scored"])
        kill(server)  # while the pool is scored
    with serve(folder, tiny_model) as server:
        assert server.get("/progidiff/scoring").json()["scored"] >= scored  # goes on where it was
        wait_for_scores(server)
        lost = ask(server, "anna")
        assert server.infer(lost["id"], {"prompt": "liver"}).status_code == 200
        kill(server)  # somebody had a sample and its proposals, and saved nothing
    with serve(folder, tiny_model) as server:
        assert server.get("/progidiff/scoring").json()["scored"] == len(IMAGES)  # nothing is scored again
        first = ask(server, "anna")
        assert first["scores_from"] == "tiny@1"
        saved = accept(server, first)
        assert saved["retrain"]["message"] == "4 of 8 slices until the next training."
        kill(server)  # after a save
    with serve(folder, tiny_model) as server:
        kept = server.get("/progidiff/annotations", params={"image": first["id"]}).json()
        assert kept["annotated_slices"][first["id"]] == sorted(entry["index"] for entry in first["slices"])
        second = ask(server, "anna")
        assert second["id"] != first["id"]
        started = accept(server, second)
        assert started["retrain"]["started"] is True
        assert "8 new slices: a training has started" in started["retrain"]["message"]
        kill(server)  # while it trains, or before it began to
    with serve(folder, tiny_model) as server:
        adapter = wait_for_training(server)  # it went on by itself
        version = adapter["versions"][0]["version"]
        if adapter["current"] is None:  # the gate may refuse what a toy learns; a person may still use it
            used = requests.post(f"{server.url}/progidiff/versions/ct/{version}/use", timeout=30)
            assert used.status_code == 200, used.text
        kill(server)  # just published, the old scores are out of date
    with serve(folder, tiny_model) as server:
        full_name = f"ct@{version}"
        published = server.get("/progidiff/versions").json()[0]
        assert published["current"] == version
        assert [entry["version"] for entry in published["versions"]] == [
            entry["version"] for entry in adapter["versions"]
        ]
        wait_for_scores(server)
        third = ask(server, "anna")
        assert third["scores_from"] == f"tiny@1+{full_name}"
        assert third["id"] not in (first["id"], second["id"])
        third_save = accept(server, third)
        assert third_save["retrain"]["message"] == "4 of 8 slices until the next training."
        report = server.get("/progidiff/report").json()
        assert report["saves"]["by_version"][0]["version"] == "tiny@1"
        assert report["saves"]["minutes_per_slice"] == pytest.approx(0.125)
        assert report["versions"][0]["slices"] > 0
        assert report["problems"] == []
        assert "Dice" in server.get("/progidiff/report", params={"format": "html"}).text
        assert server.get("/progidiff/report", params={"format": "pdf"}).status_code == 422


def test_a_server_with_settings_that_make_no_sense_does_not_start(folder: Path, tiny_model: Path):

    from progidiff.errors import RequestError
    from progidiff.server.background.retraining import Retraining, read_params
    from progidiff.server.options import ServerOptions

    for conf, message in (
        ({"retrain_task": "best"}, "no such trainer"),
        ({"retrain_params": "steps"}, "name=value"),
        ({"retrain_params": "speed=3"}, "has no speed"),
        ({"retrain_params": "steps=0"}, "steps"),
    ):
        options = ServerOptions.from_conf(conf, str(folder))
        with pytest.raises(RequestError, match=message):
            Retraining(options, None, None, bool, bool)  # type: ignore[arg-type]
    assert read_params("") == {}
    for conf in ({"score_pool": "maybe"}, {"reserve_minutes": "0"}, {"retrain_after": "-1"}):
        with pytest.raises(RequestError):
            ServerOptions.from_conf(conf, str(folder))
