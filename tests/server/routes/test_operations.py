"""Probes and figures: what a load balancer and Prometheus see, and who may ask."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open_metrics
from prometheus_client.parser import text_string_to_metric_families as parse

from progidiff.errors import ModelError, NotReadyError
from progidiff.server.readiness import Readiness
from progidiff.users import Role, UsersFile
from support.apps import LOCAL, REMOTE, connect, open_app
from support.phantoms import write_phantom
from support.servers import ROOT

PASSWORD = "correct horse"
SCRAPER = "a-token-that-opens-the-figures-only"
ADMINISTRATOR = "a-token-for-somebody-who-administers"
PATIENT = "Doe_Jane-19700101"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("operations")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / f"{PATIENT}.nii.gz", shape=(32, 28, 5))
    users = UsersFile(folder / "users.json")
    users.put("anna", Role.ANNOTATE, PASSWORD)
    tokens, scraper = folder / "tokens", folder / "scraper"
    for file, text in ((tokens, f"adam:administer:{ADMINISTRATOR}\n"), (scraper, f"{SCRAPER}\n")):
        file.touch(mode=0o600)
        file.write_text(text)
    conf = ("users_file", str(users.path), "token_file", str(tokens), "metrics_token_file", str(scraper))
    with open_app(studies, tiny_model, *conf) as opened:
        yield opened


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def read_figures(peer: tuple[str, int] = LOCAL) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = connect(peer).get("/metrics", headers=bearer(SCRAPER))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain")
    samples = [sample for family in parse(answer.text) for sample in family.samples]
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def wait_until_ready() -> None:
    client = connect(REMOTE)
    for _ in range(300):
        answer = client.get("/readyz")
        if answer.status_code == 200:
            return
        assert (answer.status_code, answer.json()["error"]) == (503, "NotReadyError"), answer.text
        assert answer.headers["retry-after"]
        time.sleep(0.1)
    raise AssertionError("it never was ready")


def infer(**params: Any) -> Any:
    form = {"params": json.dumps({"prompt": "liver", "num_proposals": 2, "steps": 1, **params})}
    return connect().post(f"/infer/progidiff?image={PATIENT}&output=json", data=form, headers=bearer(ADMINISTRATOR))


@pytest.mark.parametrize("peer", [LOCAL, REMOTE])
def test_whether_it_is_alive_is_told_to_everybody_and_nothing_else(app: Any, peer: tuple[str, int]):
    answer = connect(peer).get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "alive"})


def test_the_first_question_whether_it_is_ready_loads_the_weights(app: Any):
    assert not app.context.infer.engine.info()["loaded"]
    first = connect(REMOTE).get("/readyz")
    assert first.status_code == 503
    assert "weights are being loaded" in first.json()["detail"]
    wait_until_ready()
    assert app.context.infer.engine.info()["loaded"]
    assert connect(REMOTE).get("/readyz").json() == {"status": "ready"}


def test_a_disk_that_refuses_or_images_that_are_gone_are_named_without_folders(
    app: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    wait_until_ready()
    monkeypatch.setattr(app.context.infer.store, "root", tmp_path / "gone")
    answer = connect(REMOTE).get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith("Nothing can be saved (No such file or directory). Free some disk space")
    assert str(tmp_path) not in answer.text
    monkeypatch.undo()
    monkeypatch.setattr(app, "studies", str(tmp_path / "gone"))
    answer = connect(REMOTE).get("/readyz")
    assert answer.status_code == 503
    assert answer.json()["detail"].startswith("The images cannot be read (FileNotFoundError)")
    assert str(tmp_path) not in answer.text


def test_a_disk_that_hangs_makes_it_not_ready_and_it_is_alive_all_the_same(app: Any, monkeypatch: pytest.MonkeyPatch):
    from progidiff.server.routes import operations

    monkeypatch.setattr(operations, "_READY_SECONDS", 0.2)
    ended = threading.Event()
    monkeypatch.setattr(app.context.readiness, "check", lambda: ended.wait(20))
    with connect() as client:
        answer = client.get("/readyz")
        assert answer.status_code == 503
        assert "did not answer within 0.2 s" in answer.json()["detail"]
        assert client.get("/healthz").status_code == 200
        ended.set()


def test_a_server_that_ends_is_not_ready(app: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app.context.infer.queue, "_closed", True)
    answer = connect(REMOTE).get("/readyz")
    assert answer.status_code == 503
    assert "The server is stopping" in answer.json()["detail"]


def test_weights_that_cannot_be_loaded_are_the_reason_and_are_tried_again_after_a_while(app: Any):
    now = [0.0]
    tries = []

    def load() -> None:
        tries.append(now[0])
        raise ModelError("There is no backbone. Name its folder.")

    engine = SimpleNamespace(info=lambda: {"loaded": False}, load=load)
    infer = SimpleNamespace(
        engine=engine, engines={"cpu": engine}, queue=app.context.infer.queue, store=app.context.infer.store
    )
    readiness = Readiness(app, infer, lambda: now[0])  # type: ignore[arg-type]

    def ask() -> str:
        with pytest.raises(NotReadyError) as caught:
            readiness.check()
        assert readiness._loader is not None
        readiness._loader.join(10)
        return str(caught.value)

    assert "are being loaded" in ask()
    assert ask() == "There is no model to answer with: There is no backbone. Name its folder."
    now[0] = 31.0
    assert "are being loaded" in ask()
    assert tries == [0.0, 31.0]


def test_the_figures_say_what_the_server_did(app: Any):
    wait_until_ready()
    before = read_figures()
    infer(seed=1)
    infer(seed=1)
    assert infer(prompt="spline").status_code == 422
    assert connect().get(f"/progidiff/proposals/{PATIENT}", headers=bearer(ADMINISTRATOR)).status_code == 200
    assert connect().get("/no/such/place", headers=bearer(ADMINISTRATOR)).status_code == 404
    after = read_figures(REMOTE)

    def more(name: str, **labels: str) -> float:
        key = name, tuple(sorted(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert more("progidiff_http_requests_total", method="POST", route="/infer/{model}", status="200") == 2
    assert more("progidiff_http_requests_total", method="POST", route="/infer/{model}", status="422") == 1
    route = "/progidiff/proposals/{image}"
    assert more("progidiff_http_requests_total", method="GET", route=route, status="200") == 1
    assert more("progidiff_http_requests_total", method="GET", route="*", status="404") == 1
    assert more("progidiff_http_request_seconds_count", method="POST", route="/infer/{model}") == 3
    assert more("progidiff_http_request_seconds_sum", method="POST", route="/infer/{model}") > 0
    assert more("progidiff_errors_total", error="PromptError") == 1
    assert more("progidiff_kept_proposals_misses_total") == 1
    assert more("progidiff_kept_proposals_hits_total") == 1
    assert more("progidiff_jobs_total", kind="infer", state="done") == 1
    assert more("progidiff_queue_wait_seconds_count", kind="infer") == 1
    assert more("progidiff_job_seconds_count", kind="infer") == 1
    assert more("progidiff_kept_proposals") == 1
    assert after["progidiff_kept_proposals_bytes", ()] > 1000
    assert after["progidiff_kept_proposals_limit_bytes", ()] == 10e9
    assert after["progidiff_images", ()] == 1
    assert after["progidiff_scoring_images", (("state", "unscored"),)] == 1
    assert after["progidiff_queue_waiting", (("kind", "infer"),)] == 0
    assert after["progidiff_queue_limit", ()] == 8
    assert after["progidiff_trainings_running", ()] == 0
    assert after["progidiff_device_memory_used_bytes", (("device", "cpu"),)] > 1e6
    assert after["progidiff_http_requests_in_flight", ()] == 1  # This one.
    assert after["process_resident_memory_bytes", ()] > 1e6
    model = app.context.infer.engine.card
    served = (("family", "model"), ("name", model.name), ("version", str(model.version)))
    assert after["progidiff_served_version", served] == 1
    assert {name for name, _ in after if name.endswith("_missing")} == {"progidiff_figures_missing"}
    assert not [key for key, value in after.items() if key[0] == "progidiff_figures_missing" and value]


def test_no_series_is_named_after_an_image_an_address_or_a_user(app: Any):
    client = connect(REMOTE, headers=bearer(ADMINISTRATOR))
    client.get(f"/progidiff/proposals/{PATIENT}")
    client.get(f"/{PATIENT}")
    client.request("PROPFIND", "/")
    client.get(f"/..//{PATIENT}")
    before = len(read_figures())
    for number in range(20):
        client.get(f"/nobody/{number}")
        client.get(f"/progidiff/jobs/{number}")
        client.request(f"METHOD{number}", "/")
    answer = client.get("/metrics")
    assert answer.status_code == 200
    for name in (PATIENT, "192.168", "adam", "anna", "PROPFIND", "METHOD"):
        assert name not in answer.text
    assert len(read_figures()) - before < 40  # The series of one address that nobody had asked for yet.


def test_the_ends_of_trainings_are_counted(app: Any):
    before = read_figures()
    from progidiff.training_runs.status import RunStatus

    for state in ("done", "failed", "done"):
        for listener in app.context.on_ended:
            listener(RunStatus(state=state, message=""))
    after = read_figures()
    for state, count in (("done", 2), ("failed", 1)):
        key = "progidiff_trainings_total", (("state", state),)
        assert after[key] - before.get(key, 0) == count


def test_a_figure_that_cannot_be_had_takes_no_other_with_it(app: Any, monkeypatch: pytest.MonkeyPatch):
    def break_down() -> None:
        raise OSError("the PACS is away")

    monkeypatch.setattr(app.context.scorer, "progress", break_down)
    figures = read_figures()
    assert figures["progidiff_figures_missing", (("part", "scoring"),)] == 1
    assert figures["progidiff_figures_missing", (("part", "queue"),)] == 0
    assert ("progidiff_images", ()) not in figures
    assert ("progidiff_queue_limit", ()) in figures


def test_open_metrics_is_spoken_where_it_is_asked_for(app: Any):
    headers = {**bearer(SCRAPER), "Accept": "application/openmetrics-text; version=1.0.0"}
    answer = connect().get("/metrics", headers=headers)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert any(family.name == "progidiff_http_requests" for family in parse_open_metrics(answer.text))


def test_the_figures_are_for_administrators_and_for_their_own_token(app: Any):
    client = connect(REMOTE)
    for headers in ({}, bearer("no-such-token-as-this-one-here")):
        refused = client.get("/metrics", headers=headers)
        assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
        assert "--conf metrics_token_file" in refused.json()["detail"]
    session = client.post("/auth/token", data={"username": "anna", "password": PASSWORD}).json()["access_token"]
    refused = client.get("/metrics", headers=bearer(session))
    assert (refused.status_code, refused.json()["error"]) == (403, "AccessError")
    assert "'anna' may annotate" in refused.json()["detail"]
    assert client.get("/metrics", headers=bearer(ADMINISTRATOR)).status_code == 200
    assert client.get("/metrics", headers=bearer(SCRAPER)).status_code == 200
    for path in ("/info/", "/progidiff/jobs", f"/datastore/image?image={PATIENT}"):
        assert client.get(path, headers=bearer(SCRAPER)).status_code == 401, path


@pytest.mark.parametrize(
    ("metrics", "peer", "status"),
    [
        ("administrators", LOCAL, 401),
        ("administrators", REMOTE, 401),
        ("open", REMOTE, 200),
        ("off", LOCAL, 410),
    ],
)
def test_a_server_for_its_own_machine_keeps_the_figures_unless_it_is_told_otherwise(
    tmp_path: Path, tiny_model: Path, metrics: str, peer: tuple[str, int], status: int
):
    studies = tmp_path / "studies"
    studies.mkdir()
    with open_app(studies, tiny_model, "metrics", metrics):
        client = connect(peer)
        assert client.get("/metrics").status_code == status
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").status_code in (200, 503)
        assert client.get("/info/").status_code == (401 if peer == LOCAL else 403)
        local = (studies / ".progidiff" / "sessions" / "local-token").read_text().strip()
        expected = 410 if metrics == "off" else 200 if peer == LOCAL or metrics == "open" else 401
        assert client.get("/metrics", headers=bearer(local)).status_code == expected


def test_the_page_names_every_figure_and_no_other(app: Any):
    page = (ROOT / "docs" / "how-to" / "monitoring.md").read_text(encoding="utf-8")
    named = {
        name for row in page.splitlines() if row.startswith("| `") for name in re.findall(r"`(progidiff_\w+)`", row)
    }
    answer = connect().get("/metrics", headers=bearer(SCRAPER))
    told = {
        family.name + ("_total" if family.type == "counter" else "_info" if family.type == "info" else "")
        for family in parse(answer.text)
        if family.name.startswith("progidiff")
    }
    assert named == {name for name in told if not name.endswith("_created")}
