"""Starting the server: what keeps it from starting is a sentence with a cure, told in a moment."""

from __future__ import annotations

import errno
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from progidiff.errors import BusyError, ModelError, RequestError, StoreError
from progidiff.server import start
from progidiff.server.start import StartOptions, check, check_port, use_packaged_host
from progidiff.storage import folders
from support.servers import free_port


@pytest.fixture
def options(tmp_path: Path) -> StartOptions:
    for name in ("app", "studies"):
        (tmp_path / name).mkdir()
    (tmp_path / "app" / "main.py").write_text("")
    return StartOptions(tmp_path / "app", str(tmp_path / "studies"), port=free_port())


def change(options: StartOptions, **changes: object) -> StartOptions:
    return StartOptions(**{**vars(options), **changes})  # type: ignore[arg-type]


def test_what_is_in_order_is_not_refused(options: StartOptions):
    check(options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("app", Path("absent"), "There is no app in 'absent'.*Name its folder with --app"),
        ("studies", "absent", "There is no folder 'absent' to serve. Name one with --studies"),
        ("ssl_certfile", Path("absent.pem"), "Option --ssl-certfile names 'absent.pem', and there is no such file"),
        ("conf", (("devise", "cpu"),), "--conf devise: there is no such option. Did you mean device"),
        ("conf", (("users_file", "absent.json"),), "users file absent.json.*progidiff users add"),
        ("conf", (("token_file", "absent.txt"),), "token file absent.txt.*progidiff users token"),
        ("host", "no.such.host.invalid", "Use 127.0.0.1 for this machine only"),
        ("host", "192.0.2.1", "this machine has no such interface.*0.0.0.0 for every interface"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(options: StartOptions, name: str, value: object, message: str):
    with pytest.raises(RequestError, match=message):
        check(change(options, **{name: value}))


def test_a_taken_port_is_refused_with_a_free_one(options: StartOptions):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(RequestError, match=rf"Port {port} of 127.0.0.1 is taken.*--port \d+") as refused:
            check(change(options, port=port))
    proposed = int(str(refused.value).split("--port ")[1].rstrip("."))
    check_port("127.0.0.1", proposed)


def test_a_reserved_port_is_refused(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(start, "_try_address", refuse)
    with pytest.raises(RequestError, match="Port 80 is reserved.*from 1024 on"):
        check_port("127.0.0.1", 80)


@pytest.mark.parametrize(
    ("place", "cure"), [("studies", "name another with --studies"), ("app", "name a copy of the app with --app")]
)
def test_a_folder_without_the_right_to_write_is_refused(
    options: StartOptions, monkeypatch: pytest.MonkeyPatch, place: str, cure: str
):
    make = folders.tempfile.NamedTemporaryFile

    def refuse(dir: Path, prefix: str) -> object:
        if dir.name == place:
            raise PermissionError(errno.EACCES, "Permission denied")
        return make(dir=dir, prefix=prefix)

    monkeypatch.setattr(
        folders.tempfile, "NamedTemporaryFile", refuse
    )  # the tests may run as root, who may do anything
    with pytest.raises(StoreError, match=f"'.*{place}' cannot be written.*Permission denied.*{cure}"):
        check(options)


def test_a_store_below_a_file_is_refused(options: StartOptions, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written.*--conf store=FOLDER"):
        check(change(options, conf=(("store", str(tmp_path / "file" / "store")),)))


def test_a_full_disk_is_refused(options: StartOptions, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(StoreError, match="is full: 5 MB are free.*Free at least 105 MB"):
        check(options)


def test_the_host_that_the_package_carries_comes_first_here_and_in_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert use_packaged_host(tmp_path)
    assert use_packaged_host(tmp_path)
    assert sys.path[0] == str(tmp_path)
    assert os.environ["PYTHONPATH"] == f"{tmp_path}{os.pathsep}elsewhere"
    assert not use_packaged_host(tmp_path / "absent")


def test_a_missing_host_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "monailabel.app", None)
    with pytest.raises(ModelError, match="make setup.*make wheel.*pip install --no-deps monailabel==0.8.5"):
        start._import_host()


def test_what_the_app_refuses_at_its_start_is_told_without_a_traceback(
    options: StartOptions, monkeypatch: pytest.MonkeyPatch
):
    """The host's own start ends with exit code 3 and a page of traceback."""

    class Host:
        def args_parser(self) -> SimpleNamespace:
            return SimpleNamespace(parse_args=list)

        def action_start_server(self, words: list[str]) -> None:
            try:
                sys.modules["monailabel.app"].app_instance()
            except BusyError:
                raise SystemExit(3) from None

    def refuse() -> None:
        raise BusyError("Another server is running.")

    monkeypatch.setitem(sys.modules, "monailabel.app", SimpleNamespace(app_instance=refuse))
    monkeypatch.setattr(start, "_import_host", lambda: Host)
    with pytest.raises(BusyError, match="Another server is running"):
        start.start(options)
