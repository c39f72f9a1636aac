"""One server with two devices, which are two engines on the processor: requests side by side, warm-up, scoring."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from progidiff.errors import NotReadyError
from progidiff.proposals.request import ProposalRequest
from progidiff.server.background.scoring import PoolScorer
from progidiff.server.readiness import Readiness
from support.apps import connect, open_app
from support.phantoms import write_phantom

DEVICES = ["cpu", "cpu (2)"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    studies = tmp_path_factory.mktemp("devices") / "studies"
    studies.mkdir()
    for name in "ab":
        write_phantom(studies / f"{name}.nii.gz", shape=(32, 28, 3))
    conf = ("device", "auto", "devices", "cpu,cpu", "warm_up", "true", "login", "off", "read_apart", "false")
    with open_app(studies, tiny_model, *conf) as opened:
        opened.context.readiness._loader.join(120)  # It warms up from the start on.
        yield opened


def test_warm_networks_are_what_it_is_ready_with(app: Any, monkeypatch: pytest.MonkeyPatch):
    infer = app.context.infer
    assert list(infer.engines) == DEVICES
    readiness = Readiness(app, infer, warms_up=True)
    ran: list[str] = []
    for device, engine in infer.engines.items():
        original = engine.warm_up
        monkeypatch.setattr(engine, "warm_up", lambda stop, d=device, run=original: (ran.append(d), run(stop)))
    with infer.queue.background_job("score", "a"), infer.queue.background_job("score", "b"):
        with pytest.raises(NotReadyError, match="weights are being loaded|being warmed up"):
            readiness.check()
        readiness._loader.join(60)  # type: ignore[union-attr]
    assert ran == []  # Somebody computes on both.
    readiness._warm.clear()
    readiness.begin()
    readiness._loader.join(60)  # type: ignore[union-attr]
    assert sorted(ran) == DEVICES
    readiness.check()
    assert all(engine.info()["loaded"] for engine in infer.engines.values())
    assert connect().get("/readyz").status_code == 200  # By what it did at start.


def test_a_request_that_comes_meanwhile_warms_its_device_up(app: Any, monkeypatch: pytest.MonkeyPatch):
    infer = app.context.infer
    readiness = Readiness(app, infer, warms_up=True)
    with infer.queue.job("infer", "a") as job:
        assert job.device in readiness._list_cold()
        time.sleep(0.01)
    assert job.device not in readiness._list_cold()
    assert len(readiness._list_cold()) == 1


def test_two_requests_are_computed_at_the_same_time_by_different_engines(app: Any, monkeypatch: pytest.MonkeyPatch):
    infer, used = app.context.infer, []
    both = threading.Barrier(2, timeout=60)
    for device, engine in infer.engines.items():

        def propose(
            request: ProposalRequest, volume: Any, work: Any, d: str = device, run: Any = engine.propose
        ) -> Any:
            used.append((d, work.device))
            both.wait()
            return run(request, volume, work)

        monkeypatch.setattr(engine, "propose", propose)
    answers: dict[str, Any] = {}

    def ask(image: str) -> None:
        form = {"params": json.dumps({"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 5})}
        answers[image] = connect().post(f"/infer/progidiff?image={image}&output=json", data=form)

    threads = [threading.Thread(target=ask, args=(image,)) for image in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert {answer.status_code for answer in answers.values()} == {200}
    assert sorted(used) == [(device, device) for device in DEVICES]
    listed = connect().get("/progidiff/jobs").json()
    assert {job["device"] for job in listed if job["kind"] == "infer"} == set(DEVICES)


def test_the_scorer_takes_every_idle_device_and_no_image_twice(app: Any, monkeypatch: pytest.MonkeyPatch):
    scorer = app.context.scorer
    assert scorer._count == 2
    both = threading.Barrier(2, timeout=60)
    scored: list[tuple[str, str]] = []
    due = ["a", "b"]

    def score(image: str) -> bool:
        with scorer._take_turn(image) as job:
            both.wait()
            scored.append((image, job.device))
            due.remove(image)
        return True

    def find_next() -> str | None:
        return next((image for image in list(due) if image not in scorer._claimed), None)

    fresh = PoolScorer(app, app.context.infer, scorer.scores, threads=2)
    scorer = fresh
    monkeypatch.setattr(fresh, "score", score)
    monkeypatch.setattr(fresh, "find_next", find_next)
    fresh.start()
    for _ in range(600):
        if not due:
            break
        threading.Event().wait(0.05)
    fresh.stop()
    assert sorted(image for image, _ in scored) == ["a", "b"]
    assert sorted(device for _, device in scored) == DEVICES
    assert app.context.infer.queue.is_idle()
