"""The log of the real app as JSON: every line belongs to its request, and no line names a patient."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest

from progidiff.server.log_lines import set_up
from progidiff.server.options import ServerOptions
from support.apps import LOCAL, connect, open_app
from support.images import make_image, write_dicom
from support.phantoms import write_phantom

WHOLE, BROKEN, LEFT_OUT, SERIES = "Mustermann_Erika", "Schmidt Hans", "Weber^Ilse", "Vogel-Eva"
UPLOADED, UNKNOWN, PATIENT, PATIENT_ID = "Krause_Otto", "Brandt_Lena", "Doe^John", "PAT4711X"
WORDS = ("Mustermann", "Erika", "Schmidt", "Hans", "Weber", "Ilse", "Vogel", "Krause", "Otto", "Brandt", "Lena", "Doe")
WORDS += ("John", "PAT4711X")


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    level = logging.root.level
    logging.root.addHandler(handler)
    logging.root.setLevel(logging.INFO)  # As the host has it.
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # The client of the tests.
    yield stream
    logging.root.removeHandler(handler)
    logging.root.setLevel(level)


@pytest.fixture(scope="module")
def app(log: io.StringIO, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Any]:
    studies = tmp_path_factory.mktemp("lines") / "studies"
    studies.mkdir()
    write_phantom(studies / f"{WHOLE}.nii.gz", shape=(32, 28, 5))
    (studies / f"{BROKEN}.nii.gz").write_bytes(b"no image of anybody")
    (studies / f"{LEFT_OUT}.nhdr").write_text("NRRD0004\ndata file: elsewhere.raw\n")
    (studies / f"{LEFT_OUT}.docx").write_bytes(b"a report")
    write_patient(studies / SERIES)
    with open_app(studies, tiny_model, "log", "json", "login", "off") as opened:
        yield opened


def write_patient(folder: Path) -> None:
    write_dicom(folder, make_image(shape=(12, 10, 4)), np.diag([-1.0, -1.0, 3.0, 1.0]))
    for file in folder.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.PatientName, dataset.PatientID = PATIENT, PATIENT_ID
        dataset.SeriesDescription = f"Bauch {PATIENT}"
        dataset.save_as(file)


def infer(image: str, **params: Any) -> Any:
    form = {"params": json.dumps({"prompt": "liver", "num_proposals": 2, "steps": 1, **params})}
    return connect().post("/infer/progidiff", params={"image": image, "output": "json"}, data=form)


def read_lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines()]


def test_the_id_of_a_request_is_taken_or_made_returned_and_in_every_line_for_it(app: Any, log: io.StringIO):
    client = connect()
    given = client.get("/progidiff/jobs", headers={"X-Request-ID": "proxy-1.a_B"})
    assert given.headers["x-request-id"] == "proxy-1.a_B"
    made = {client.get("/info/").headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    for strange in ("", "a b", "x" * 65, "-rf", 'a"b', "ä".encode()):
        answer = client.get("/no/such/place", headers={"X-Request-ID": strange})
        assert (answer.status_code, len(answer.headers["x-request-id"])) == (404, 32)
    assert infer(WHOLE).status_code == 200
    refused = client.post(
        f"/infer/progidiff?image={WHOLE}", data={"params": '{"steps": 999}'}, headers={"X-Request-ID": "wrong"}
    )
    assert refused.status_code == 422
    lines = [line for line in read_lines(log) if line.get("request") == "wrong"]
    assert [line["logger"] for line in lines] == ["progidiff.server.gate.answers", "progidiff.server.gate.request_ids"]
    assert (
        lines[1].items()
        >= {
            "method": "POST",
            "route": "/infer/{model}",
            "status": 422,
            "client": LOCAL[0],
            "level": "INFO",
        }.items()
    )
    assert lines[1]["seconds"] > 0


def test_what_computes_in_a_thread_logs_under_the_id_of_its_request(app: Any, log: io.StringIO):
    form = {"params": json.dumps({"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 11})}
    address = f"/infer/progidiff?image={WHOLE}&output=json"
    app.context.infer.engine._pipeline = None  # It loads again, in the thread that computes.
    assert connect().post(address, data=form, headers={"X-Request-ID": "computes"}).status_code == 200
    lines = [line for line in read_lines(log) if line.get("request") == "computes"]
    loaded = [line for line in lines if line["logger"] == "progidiff.model.backbone"]
    assert loaded
    assert all(line["thread"] != "MainThread" for line in loaded)


def test_no_line_names_a_patient(app: Any, log: io.StringIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    client = connect()
    for image in (WHOLE, BROKEN, LEFT_OUT, SERIES, UNKNOWN, f"{WHOLE}.nii.gz", f"../{WHOLE}"):
        infer(image)
        for address in ("/datastore/image", "/datastore/image/info", "/datastore/label"):
            client.get(address, params={"image": image, "label": image, "tag": "final"})
        client.get(f"/progidiff/proposals/{image}")
        client.get(f"/progidiff/annotations/{image}")
        client.post(f"/progidiff/annotations/{image}/undo")
        client.get(f"/{image}/{image}")
    infer(WHOLE, prompt=f"{UNKNOWN}'s liver")
    infer(WHOLE, adapter=UNKNOWN)
    client.post("/activelearning/random", json={"client_id": UNKNOWN})
    client.post("/train/progidiff_adapt", json={"name": UNKNOWN})
    client.get("/progidiff/scoring")
    client.get("/proxy/dicom/qido/studies", params={"PatientName": WHOLE})
    upload = {"file": (f"{UPLOADED}.nii.gz", b"no image either")}
    client.post("/infer/progidiff", files=upload, data={"params": "{}"})
    client.post("/infer/progidiff", files={"file": (f"{UPLOADED}.txt", b"text")}, data={"params": "{}"})
    label = {"label": (f"{UPLOADED}.nii.gz", b"no label")}
    client.put("/datastore/label", params={"image": WHOLE, "tag": "final"}, files=label)
    client.put("/datastore/image", params={"image": UPLOADED}, files={"file": (f"{UPLOADED}.nii.gz", b"none")})
    write_patient(tmp_path / "series")
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in (tmp_path / "series").iterdir():
            packed.write(file, f"{UPLOADED}/{file.name}")
        packed.writestr(f"{UPLOADED}/{UNKNOWN}.dcm", b"no slice")
    with archive.open("rb") as content:
        client.put("/session/?uncompress=true", files={"files": (f"{UPLOADED}.zip", content, "application/zip")})

    def break_down(*_: object, **__: object) -> None:
        raise RuntimeError(f"Cannot read {app.studies}/{WHOLE}.nii.gz of {PATIENT} in {BROKEN}")

    monkeypatch.setattr(app.context.infer.engine, "propose", break_down)
    assert infer(WHOLE, seed=77).status_code == 500
    logging.getLogger("monailabel.some.module").info(f"Saving {WHOLE}.nii.gz; {BROKEN}: {SERIES!r}")
    text = log.getvalue()
    found = {word: next(line for line in text.splitlines() if word in line) for word in WORDS if word in text}
    assert not found
    lines = read_lines(log)
    assert len(lines) > 60
    names = app.context.names
    assert sum(names.pseudonym(WHOLE) in line["message"] for line in lines) > 3
    broken = [line for line in lines if "exception" in line and "break_down" in line["exception"]]
    assert f"RuntimeError: Cannot read {app.studies}/{names.pseudonym(WHOLE)}.nii.gz of #" in broken[0]["exception"]
    assert broken[0]["request"]


def test_names_are_told_in_text_unless_they_are_to_be_hidden(tmp_path: Path):
    root = logging.getLogger("tests.of.set_up")
    handler = logging.StreamHandler(io.StringIO())
    root.addHandler(handler)
    handlers = {each: each.formatter for each in (handler, *logging.root.handlers)}
    try:
        for conf, hides in (
            ({}, False),
            ({"log_names": "hashed"}, True),
            ({"log": "json"}, True),
            ({"log": "json", "log_names": "plain"}, False),
        ):
            options = ServerOptions.from_conf({"store": str(tmp_path), **conf}, str(tmp_path))
            assert (set_up(options, ()) is not None) == hides
            assert handler.formatter is not None or conf == {}
            if handler.formatter is not None:
                record = logging.LogRecord("a", logging.INFO, "", 1, "'%s'", ("Doe",), None)
                assert ("Doe" in handler.formatter.format(record)) != hides
    finally:
        set_up(ServerOptions(tmp_path), ())
        for each, formatter in handlers.items():
            each.setFormatter(formatter)
        logging.captureWarnings(False)
        root.removeHandler(handler)
