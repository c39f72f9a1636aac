"""A real server that asks for a login: the stock client, a browser, roles, and starts that are refused."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import nibabel
import numpy as np
import pytest
import requests
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException

from progidiff.users import Role, UsersFile
from support.phantoms import write_phantom
from support.servers import Server, copy_app, free_port, run_server

PASSWORD = "correct horse"
READER = "a-token-for-somebody-who-reads"
SHAPE = (32, 28, 5)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("login")
    studies = folder / "studies"
    studies.mkdir()
    write_phantom(studies / "plain.nii.gz", shape=SHAPE)
    users = UsersFile(folder / "users.json")
    users.put("anna", Role.ANNOTATE, PASSWORD)
    users.put("adam", Role.ADMINISTER, PASSWORD)
    tokens = folder / "tokens"
    tokens.touch(mode=0o600)
    tokens.write_text(f"reader:read:{READER}\n")
    conf = ("model_dir", str(tiny_model), "device", "cpu", "users_file", str(users.path), "token_file", str(tokens))
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as running:
        yield running


def log_in(server: Server, name: str, password: str = PASSWORD) -> dict[str, str]:
    answer = requests.post(
        f"{server.url}/auth/token", data={"username": name, "password": password, "grant_type": "password"}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"{answer.json()['token_type']} {answer.json()['access_token']}"}


def label(tmp_path: Path) -> Path:
    affine = nibabel.load(tmp_path / "plain.nii.gz").affine
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE, np.uint8), affine), tmp_path / "label.nii.gz")
    return tmp_path / "label.nii.gz"


def test_the_stock_client_logs_in_and_works(server: Server, tmp_path: Path):
    client = MONAILabelClient(server.url, tmpdir=str(tmp_path))
    assert client.auth_enabled()
    with pytest.raises(MONAILabelClientException, match="401"):
        client.info()
    with pytest.raises(MONAILabelClientException, match="name or the password is wrong"):
        client.auth_token("anna", "wrong password")
    assert not client.auth_valid_token()
    client.update_auth(client.auth_token("anna", PASSWORD))
    assert client.auth_valid_token()
    assert "progidiff" in client.info()["models"]
    mask, params = client.infer("progidiff", "plain", {"prompt": "liver", "num_proposals": 2, "steps": 1})
    assert params["structures"]["liver"]
    assert Path(mask).is_file()
    write_phantom(tmp_path / "plain.nii.gz", shape=SHAPE)
    assert client.save_label("plain", str(label(tmp_path)), "final")["label"] == "plain"
    assert client.info()["datastore"]["completed"] == 1  # A request without a body, with the length of the last form.
    saved = server.get("/progidiff/annotations", headers=log_in(server, "anna")).json()
    assert '"user": "anna"' in json.dumps(saved)


def test_a_client_cannot_say_who_saved_a_label_and_others_do_not_see_where_it_lies(server: Server, tmp_path: Path):
    headers = log_in(server, "anna")
    write_phantom(tmp_path / "plain.nii.gz", shape=SHAPE)
    spoofed = json.dumps({"user": "adam", "note": "x"})
    with label(tmp_path).open("rb") as file:
        saved = requests.put(
            f"{server.url}/datastore/label?image=plain&tag=final",
            files={"label": ("label.nii.gz", file), "params": (None, spoofed)},
            headers=headers,
            timeout=60,
        )
    assert saved.status_code == 200, saved.text

    def get_info() -> dict[str, str]:
        return server.get("/datastore/label/info?label=plain&tag=final", headers=headers).json()

    assert (get_info()["user"], get_info()["note"]) == ("anna", "x")
    for address, field in (
        ("label/info?label=plain&tag=final", "info"),
        ("updatelabelinfo?label=plain&tag=final", "params"),
    ):
        url = f"{server.url}/datastore/{address}"
        assert requests.put(url, files={field: (None, spoofed)}, headers=headers, timeout=30).status_code == 200
        assert get_info()["user"] == "anna"
    remote = {"X-Forwarded-For": "203.0.113.7", "Authorization": f"Bearer {READER}"}
    assert server.get("/datastore/image/info?image=plain", headers=remote).json()["path"] == "plain.nii.gz"
    pairs = server.get("/datastore/?output=train", headers=remote).json()
    assert [pair["image"] for pair in pairs] == ["plain.nii.gz"]
    here = server.get("/datastore/image/info?image=plain", headers=headers).json()["path"]
    assert here == str(server.studies / "plain.nii.gz")  # 3D Slicer opens it there.


def test_one_cancels_ones_own_jobs_and_administrators_any(server: Server):
    anna, adam, reader = log_in(server, "anna"), log_in(server, "adam"), {"Authorization": f"Bearer {READER}"}
    slow = {"prompt": "all", "num_proposals": 16, "steps": 50}

    def ask(headers: dict[str, str], job: str, answers: list[requests.Response]) -> threading.Thread:
        form = {"params": json.dumps({**slow, "seed": len(job), "job_id": job})}

        def send() -> None:
            address = f"{server.url}/infer/progidiff?image=plain"
            answers.append(requests.post(address, data=form, headers=headers, timeout=300))

        thread = threading.Thread(target=send)
        thread.start()
        while server.get(f"/progidiff/jobs/{job}", headers=reader).status_code != 200:
            thread.join(0.02)
        return thread

    answers: list[requests.Response] = []
    threads = [ask(adam, "of-adam", answers), ask(anna, "of-anna-1", answers), ask(anna, "of-anna-22", answers)]

    def cancel(headers: dict[str, str], job: str) -> requests.Response:
        return requests.delete(f"{server.url}/progidiff/jobs/{job}", headers=headers, timeout=30)

    assert cancel(reader, "of-anna-1").status_code == 403
    refused = cancel(anna, "of-adam")
    assert (refused.status_code, "somebody else's" in refused.json()["detail"]) == (403, True)
    assert cancel(anna, "no-such-job").status_code == 404
    assert cancel(anna, "of-anna-22").status_code == 200
    assert cancel(adam, "of-anna-1").status_code == 200
    assert cancel(adam, "of-adam").status_code == 200
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [409, 409, 409]


def test_a_login_by_token_works_as_one_by_password(server: Server):
    for headers in (
        log_in(server, "reader", READER),
        log_in(server, "", READER),
        {"Authorization": f"Bearer {READER}"},
    ):
        answer = server.get("/auth/token/valid", headers=headers).json()
        assert (answer["username"], answer["roles"]) == ("reader", ["read"])


def test_each_role_may_what_it_should(server: Server):
    form = {"params": (None, "{}")}
    for headers, statuses in (
        ({}, (401, 401, 401, 401, 401)),
        ({"Authorization": f"Bearer {READER}"}, (200, 403, 403, 403, 403)),
        (log_in(server, "anna"), (200, 404, 403, 403, 403)),
        (log_in(server, "adam"), (200, 404, 404, 200, 410)),
    ):
        answers = (
            server.get("/datastore/?output=all", headers=headers),
            requests.post(f"{server.url}/infer/progidiff?image=nobody", files=form, headers=headers, timeout=30),
            requests.delete(f"{server.url}/datastore/image?id=nobody", headers=headers, timeout=30),
            server.get("/logs/", headers=headers),
            requests.post(f"{server.url}/reload", headers=headers, timeout=30),
        )
        assert tuple(answer.status_code for answer in answers) == statuses


def test_a_browser_logs_in_by_page_and_out_again(server: Server):
    browser = requests.Session()
    browser.headers["Accept"] = "text/html"
    led = browser.get(f"{server.url}/ohif/?StudyInstanceUIDs=1.2", timeout=30)
    assert led.url == f"{server.url}/progidiff/login?next=%2Fohif%2F%3FStudyInstanceUIDs%3D1.2"
    assert 'value="/ohif/?StudyInstanceUIDs=1.2"' in led.text
    assert "default-src 'none'" in led.headers["Content-Security-Policy"]
    form = {"name": "anna", "password": "<b>wrong", "next": '/"><script>'}
    wrong = browser.post(f"{server.url}/progidiff/login", data=form, timeout=30)
    assert (wrong.status_code, "is wrong" in wrong.text, "<script>" in wrong.text) == (401, True, False)
    for target, reached in (("/ohif/", "/ohif/"), ("//evil.example/", "/"), ("https://evil.example/", "/")):
        form = {"name": "anna", "password": PASSWORD, "next": target}
        entered = browser.post(f"{server.url}/progidiff/login", data=form, timeout=30, allow_redirects=False)
        assert (entered.status_code, entered.headers["location"]) == (303, reached)
        cookie = entered.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert "Secure" not in cookie  # Plain HTTP: the browser would not send it back.
    assert "You are anna and may annotate" in browser.get(f"{server.url}/", timeout=30).text
    session = browser.cookies["progidiff_session"]
    foreign = browser.post(f"{server.url}/progidiff/logout", headers={"Origin": "http://evil.example"}, timeout=30)
    assert foreign.status_code == 403
    assert browser.post(f"{server.url}/progidiff/logout", timeout=30).url.endswith("/progidiff/login")
    assert "progidiff_session" not in browser.cookies
    assert server.get("/info/", cookies={"progidiff_session": session}).status_code == 401


def test_a_removed_user_is_out_at_once(server: Server):
    users = UsersFile(server.log.parent / "users.json")
    users.put("guest", Role.READ, PASSWORD)
    headers = log_in(server, "guest")
    assert server.get("/info/", headers=headers).status_code == 200
    users.remove("guest")
    assert server.get("/info/", headers=headers).status_code == 401


def test_the_log_says_who_may_connect_and_holds_no_secret(server: Server):
    log = server.log.read_text(errors="replace")
    assert "Who may connect: 1 tokens and the users of" in log
    assert PASSWORD not in log
    assert READER not in log


def test_after_too_many_failures_the_page_and_slicer_are_told_to_wait(server: Server):
    for _ in range(20):
        answer = requests.post(
            f"{server.url}/auth/token", data={"username": "nobody", "password": "wrong password"}, timeout=30
        )
        if answer.status_code == 429:
            break
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 1
    page = requests.post(f"{server.url}/progidiff/login", data={"name": "nobody", "password": "x"}, timeout=30)
    assert (page.status_code, "Try again in" in page.text) == (429, True)


def find_own_address() -> str:
    """An address of this machine that is not loop-back; "" if it has none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def test_a_start_with_secrets_that_everybody_can_read_is_refused(tmp_path: Path):
    tokens = tmp_path / "tokens"
    tokens.write_text(READER)
    tokens.chmod(0o644)
    studies = tmp_path / "studies"
    studies.mkdir()
    with (
        pytest.raises(AssertionError, match="chmod o-rwx"),
        run_server(studies, copy_app(tmp_path), tmp_path / "log", "token_file", str(tokens)),
    ):
        pass


def test_under_the_stock_start_this_machine_has_a_link_and_others_are_refused(tmp_path: Path, tiny_model: Path):
    """`monailabel start_server` listens on every interface."""
    address = find_own_address()
    if not address or address.startswith("127."):
        pytest.skip("this machine has no address but loop-back")
    studies = tmp_path / "studies"
    studies.mkdir()
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(copy_app(tmp_path)),
        "--studies",
        str(studies),
    ]
    command += ["--port", str(port), "--conf", "model_dir", str(tiny_model), "--conf", "header_seconds", "1"]
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path) as process,
    ):
        try:
            for _ in range(600):
                try:
                    inside = requests.get(f"http://127.0.0.1:{port}/info/", timeout=5)
                    break
                except requests.RequestException:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
            outside = requests.get(f"http://{address}:{port}/info/", timeout=30)
            link = wait_for_link(tmp_path / "log")
            token = link.rpartition("=")[2]
            assert link == f"http://127.0.0.1:{port}/progidiff/login?token={token}"
            with_token = requests.get(f"http://{address}:{port}/info/", headers=bearer(token), timeout=30)
            browser = requests.Session()
            page = browser.get(link, timeout=30)
            as_local = browser.get(f"http://127.0.0.1:{port}/auth/token/valid", timeout=30).json()
            wrong = requests.get(f"{link}x", timeout=30)
            client = MONAILabelClient(f"http://127.0.0.1:{port}", tmpdir=str(tmp_path))
            enabled = client.auth_enabled()
            client.update_auth(client.auth_token("", token))
            models = client.info()["models"]
            with socket.create_connection(("127.0.0.1", port), timeout=20) as half:
                half.sendall(b"GET /info/ HTTP/1.1\r\nHost: localhost\r\n")
                given_up = half.recv(4096)
        finally:
            process.terminate()
    assert (inside.status_code, "progidiff users link" in inside.json()["detail"]) == (401, True)
    for refused in (outside, with_token):
        assert (refused.status_code, "--conf token_file" in refused.json()["detail"]) == (403, True)
    assert (page.status_code, page.url) == (200, f"http://127.0.0.1:{port}/progidiff/")
    assert (as_local["username"], as_local["roles"]) == ("local", ["administer"])
    assert (wrong.status_code, "Open the link that the server printed" in wrong.text) == (401, True)
    assert enabled
    assert "progidiff" in models
    assert given_up.startswith(b"HTTP/1.1 408 ")
    assert token not in "".join(path.read_text(errors="replace") for path in (tmp_path / "app" / "logs").iterdir())


def wait_for_link(log: Path) -> str:
    """The link that the server prints once it listens."""
    for _ in range(100):
        found = re.search(r"http://\S+token=\S+", log.read_text(errors="replace"))
        if found:
            return found[0]
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace"))


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}
