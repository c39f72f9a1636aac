"""Connections that bring no request, against a real web server with a small application."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import uvicorn
from fastapi import FastAPI

from progidiff.server.gate import connections
from progidiff.server.gate.connections import Limits
from progidiff.server.gate.invitation import find_address
from progidiff.server.gate.repeated_lines import RepeatedLines
from progidiff.server.options import ServerOptions

HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "


@contextlib.contextmanager
def serve(folder: Path, **conf: str) -> Iterator[tuple[int, Limits]]:
    web = FastAPI()

    @web.get("/")
    def read() -> dict[str, str]:
        return {}

    @web.get("/slow")
    def slow() -> dict[str, str]:
        time.sleep(1.5)
        return {"slow": "done"}

    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(web, log_level="error")
    config.load()
    limits = connections.limit(config, ServerOptions.from_conf(conf, str(folder)))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1], limits
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def wait_until_closed(opened: list[socket.socket]) -> list[bytes]:
    """What each connection got before the server hung up."""
    answers = []
    for each in opened:
        pieces = []
        with contextlib.suppress(ConnectionResetError):
            while piece := each.recv(4096):
                pieces.append(piece)
        answers.append(b"".join(pieces))
        each.close()
    return answers


def test_half_sent_headers_are_given_up_and_readers_are_answered_meanwhile(tmp_path: Path):
    with serve(tmp_path, header_seconds="1", connections_per_address="400") as (port, limits):
        opened = [connect(port) for _ in range(300)]
        for each in opened[:290]:  # The others say nothing at all.
            each.sendall(HALF)
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
        started = time.monotonic()
        answers = wait_until_closed(opened)
        assert time.monotonic() - started < 10
        assert all(answer.startswith(b"HTTP/1.1 408 ") and b"Send the request again" in answer for answer in answers)
        time.sleep(0.1)
        assert limits.open.total() <= 1


def test_where_an_address_has_too_many_connections_the_longest_silent_one_makes_room(tmp_path: Path):
    with serve(tmp_path, header_seconds="20", connections_per_address="20") as (port, limits):
        opened = [connect(port) for _ in range(300)]
        for each in opened:
            with contextlib.suppress(OSError):
                each.sendall(HALF)
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
        ended = wait_until_closed(opened[:250])
        assert all(answer.startswith(b"HTTP/1.1 503 ") and b"more than 20 connections" in answer for answer in ended)
        assert limits.open.total() <= 20
        for each in opened[250:]:
            each.close()


def test_where_all_connections_of_an_address_work_a_new_one_is_refused(tmp_path: Path):
    with serve(tmp_path, connections_per_address="8") as (port, _):
        opened = [connect(port) for _ in range(8)]
        for each in opened:
            each.sendall(b"GET /slow HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        time.sleep(0.3)
        (refused,) = wait_until_closed([connect(port)])
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in wait_until_closed(opened))
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200


def test_a_connection_that_is_used_again_has_a_deadline_for_each_header_and_none_while_it_waits_for_an_answer(
    tmp_path: Path,
):
    with serve(tmp_path, header_seconds="1") as (port, _), connect(port) as kept:
        for piece in (b"GET /slow HTTP/1.1\r\n", b"Host: localhost\r\n\r\n"):
            time.sleep(0.4)
            kept.sendall(piece)
        assert b'{"slow":"done"}' in kept.recv(4096)
        kept.sendall(HALF)
        assert kept.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_the_server_has_some_descriptors_left_for_files(tmp_path: Path):
    with serve(tmp_path, header_seconds="20") as (port, limits):
        limits.total = 10
        opened = [connect(port) for _ in range(30)]
        assert requests.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
        ended = wait_until_closed(opened[:15])
        assert all(b"as many as it can" in answer for answer in ended)
        for each in opened[15:]:
            each.close()


def test_the_limit_of_descriptors_is_raised_as_far_as_the_system_allows(monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(connections.resource, "setrlimit", lambda kind, limit: asked.append(limit))
    for limits, reached in (((1024, 4096), 4096), ((1024, -1), 8192), ((20_000, 20_000), 20_000)):
        monkeypatch.setattr(connections.resource, "getrlimit", lambda kind, limits=limits: limits)
        assert connections.raise_descriptor_limit() == reached
    assert asked == [(4096, 4096), (8192, -1)]


def test_a_line_that_repeats_itself_is_written_a_few_times_and_then_counted(caplog: pytest.LogCaptureFixture):
    now = [0.0]
    caplog.handler.addFilter(RepeatedLines(most=3, window=60, clock=lambda: now[0]))
    logger = logging.getLogger("progidiff.test")
    with caplog.at_level(logging.INFO):
        for minute in (0.0, 61.0):
            now[0] = minute
            for number in range(50):
                logger.error("socket.accept() out of system resource %d", number)
                logger.info("told every time")
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 6
    assert errors[3] == "socket.accept() out of system resource 0 (47 more like the last were left out)"
    assert sum(record.levelno == logging.INFO for record in caplog.records) == 100


@pytest.mark.parametrize(
    ("host", "address"),
    [("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000"), ("localhost", "http://localhost:8000")],
)
def test_the_link_names_an_address_that_a_browser_can_open(host: str, address: str):
    assert find_address(uvicorn.Config("app", host=host, port=8000)) == address
