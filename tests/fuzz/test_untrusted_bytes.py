"""Seeded fuzzing of all that comes from outside: files of every format, JSON, and parameters of requests.

FUZZ_SEED and FUZZ_TRIES say where to begin and for how long; a failure names the seed that brings it back.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from progidiff.errors import BusyError, ImageError
from progidiff.images import decoding
from support.fuzzing import CANARY, NUMBERS, TEXTS, damage, damage_json, make_samples, try_files, write_json
from support.phantoms import write_phantom
from support.servers import Server, copy_app, run_server

pytestmark = [pytest.mark.fuzz, pytest.mark.skipif(sys.platform != "linux", reason="files are read apart on Linux")]

SEED = int(os.environ.get("FUZZ_SEED", "1"))
TRIES = int(os.environ.get("FUZZ_TRIES", "20000"))
BATCH = 100
CHILD_MEGABYTES = 1700
SERVER_MEGABYTES = 400
"""By how much the server may grow."""

INFER = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 3, "show": "best", "label_prompt": [6]}
SAVE = {
    "label_info": [{"name": "liver", "idx": 6}],
    "slices": [1, 2],
    "structures": ["liver"],
    "client_id": "x",
    "seconds": 3,
}
GET = (
    "/datastore/",
    "/datastore/image",
    "/datastore/image/info",
    "/datastore/label",
    "/datastore/label/info",
    "/datastore/updated_image",
    "/progidiff/jobs",
    "/progidiff/jobs/{}",
    "/progidiff/proposals/{}",
    "/progidiff/prompts",
    "/progidiff/annotations",
    "/progidiff/annotations/{}",
    "/progidiff/health",
    "/progidiff/ohif/images/{}",
    "/progidiff/ohif/masks/{}",
    "/session/{}",
    "/proxy/dicom/qido/studies",
    "/proxy/dicom/wado/studies/{}/series/{}",
    "/progidiff/audit",
    "/progidiff/versions",
    "/info/",
)
QUERIES = (
    "image",
    "id",
    "tag",
    "label",
    "output",
    "proposals",
    "job",
    "show",
    "limit",
    "offset",
    "StudyDate",
    "format",
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    """One that notes whenever it opens the canary."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "studies").mkdir()
    (folder / CANARY).write_text("secret")
    write_phantom(folder / "studies" / "plain.nii.gz", shape=(8, 7, 4))
    hook = f"import sys\nsys.addaudithook(lambda event, given: event == 'open' and {CANARY!r} in str(given[0]) and "
    hook += f"open({str(folder / 'opened')!r}, 'a').write(str(given)))\n"
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(hook)
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder / "site"), before)))
    conf = (
        "model_dir",
        str(tiny_model),
        "device",
        "cpu",
        "max_upload_gb",
        "0.01",
        "adapters",
        str(folder / "adapters"),
    )
    try:
        with run_server(folder / "studies", copy_app(folder), folder / "server.log", *conf) as running:
            yield running
    finally:
        os.environ["PYTHONPATH"] = before


def report(what: str, tries: int, started: float, counts: Counter[Any], megabytes: int) -> None:
    seconds = time.monotonic() - started
    print(f"\n{what}: {tries} tries from seed {SEED} in {seconds:.0f} s, largest memory {megabytes} MB, {dict(counts)}")


def test_damaged_files_raise_what_is_said_and_open_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    decoding.read_apart()
    samples = make_samples(str(tmp_path / CANARY))
    (tmp_path / CANARY).write_text("secret")
    started, counts, wrong = time.monotonic(), Counter[Any](), []
    tries = TRIES * 3 // 5
    try:
        for seed in range(SEED, SEED + tries // BATCH):
            try:
                found = decoding.apart(try_files, name="fuzz")(samples, seed, BATCH)
            except (ImageError, BusyError) as err:
                counts[str(err)[:60]] += 1  # The process ended: contained, and one batch lost.
                continue
            counts["batches"] += 1
            wrong += found["unexpected"] + [f"seed {seed}: opened {name}" for name in found["opened"]]
        peak = decoding._get_decoder().peak_kb // 1024
    finally:
        decoding.read_apart(False)
    with capsys.disabled():
        report("files", tries, started, counts, peak)
    assert not wrong, "\n".join(wrong[:20])
    assert counts["batches"] > 0.95 * tries / BATCH
    assert peak < CHILD_MEGABYTES


def find_megabytes(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) // 1024


def send_one(server: Server, samples: dict[str, bytes], chance: random.Random) -> requests.Response:
    """A request with something wrong in it."""
    kind = chance.randrange(10)
    text = chance.choice((chance.choice(TEXTS), chance.choice(NUMBERS), "plain"))
    image = "plain" if chance.random() < 0.7 else text
    if kind < 4:
        path = chance.choice(GET).replace("{}", requests.utils.quote(text.encode("utf-8", "replace")[:300], safe=""))
        query = {chance.choice(QUERIES): chance.choice((*TEXTS, *NUMBERS)).encode("utf-8", "replace") for _ in range(2)}
        return requests.get(server.url + path, params=query, timeout=60, allow_redirects=False)
    if kind == 4:
        params = write_json(damage_json(INFER, chance), chance)
        query = {"image": image.encode("utf-8", "replace"), "output": "json"}
        return requests.post(
            f"{server.url}/infer/progidiff", params=query, files={"params": (None, params)}, timeout=120
        )
    if kind == 5:
        body = write_json(damage_json({"strategy": "random", "user": "x", "a": [1]}, chance), chance)
        path = chance.choice(("/activelearning/random", "/progidiff/next", "/progidiff/annotations/plain/skip"))
        headers = {"Content-Type": "application/json"}
        return requests.post(server.url + path, data=body.encode("utf-8", "replace"), headers=headers, timeout=60)
    if kind == 6:
        info = write_json(damage_json({"note": "x", "modality": "CT"}, chance), chance)
        return requests.put(
            f"{server.url}/datastore/image/info", params={"image": "plain"}, data={"info": info.encode()}, timeout=60
        )
    suffix = chance.choice(sorted(samples))
    file = (f"x{suffix}", damage(samples[suffix], chance))
    if kind == 7:
        query = {"image": "plain", "output": "json"}
        return requests.post(
            f"{server.url}/infer/progidiff", params={"output": query["output"]}, files={"file": file}, timeout=120
        )
    if kind == 8:
        params = write_json(damage_json(SAVE, chance), chance)
        files = {"label": file, "params": (None, params)}
        return requests.put(
            f"{server.url}/datastore/label", params={"image": image.encode("utf-8", "replace")}, files=files, timeout=60
        )
    query = {"uncompress": "true"} if suffix in (".zip", ".tar.gz") else {}
    return requests.put(f"{server.url}/session/", params=query, files={"files": file}, timeout=60)


def test_damaged_requests_are_refused_and_the_server_stays_as_it_is(server: Server, capsys: pytest.CaptureFixture[str]):
    folder = server.log.parent
    samples = make_samples(str(folder / CANARY))
    for warm in range(50):
        send_one(server, samples, random.Random(-warm - 1))
    before, started = find_megabytes(server.process.pid), time.monotonic()
    counts, wrong = Counter[Any](), []
    tries = TRIES * 2 // 5
    for seed in range(SEED, SEED + tries):
        answer = send_one(server, samples, random.Random(seed))
        counts[answer.status_code] += 1
        if answer.status_code == 500 or "Traceback" in answer.text or answer.text == "secret":
            wrong.append(f"seed {seed}: {answer.request.method} {answer.url[:200]}: {answer.text[:300]}")
    after = find_megabytes(server.process.pid)
    with capsys.disabled():
        report("requests", tries, started, counts, after)
    assert not wrong, "\n".join(wrong[:20])
    assert not (folder / "opened").exists()
    assert after - before < SERVER_MEGABYTES
    assert server.get("/info/").status_code == 200
    assert server.infer("plain", {"prompt": "liver", "num_proposals": 2, "steps": 1}, output="json").status_code == 200
