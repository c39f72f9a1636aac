"""`progidiff serve`: what it hands to the server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from progidiff.cli import serving
from progidiff.cli.main import app
from progidiff.errors import RequestError
from progidiff.server import start


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[start.StartOptions]:
    """What the server would be started with."""
    found: list[start.StartOptions] = []
    monkeypatch.setattr(start, "start", found.append)
    return found


def run(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_every_option_reaches_the_host(started: list[start.StartOptions], tmp_path: Path):
    given = [
        "--app",
        tmp_path,
        "--studies",
        tmp_path,
        "--port",
        9000,
        "--conf",
        "device=cpu",
        "--conf",
        "backbone=a=b c",
    ]
    assert run(*given, "--ssl-certfile", "c.pem", "--access-log", "--log-level", "debug").exit_code == 0
    words = started[0].to_words()
    assert words[:9] == [
        "start_server",
        "--app",
        str(tmp_path),
        "--studies",
        str(tmp_path),
        "--host",
        "127.0.0.1",
        "--port",
        "9000",
    ]
    assert words[words.index("--conf") :] == ["--conf", "device", "cpu", "--conf", "backbone", "a=b c"]
    assert words[words.index("--ssl_certfile") + 1] == "c.pem"
    assert words[words.index("--verbose") + 1] == "DEBUG"
    assert "--access_log" in words


def test_the_words_of_the_hosts_own_command_mean_the_same(started: list[start.StartOptions], tmp_path: Path):
    words = [
        "--app",
        tmp_path,
        "--studies",
        tmp_path,
        "--conf",
        "device",
        "cpu",
        "--conf",
        "store",
        "/a_b",
        "-v",
        "DEBUG",
    ]
    result = run(*words, "--root_path", "/labels_of_us", "--ssl_ca_certs=a_b.pem")
    assert result.exit_code == 0, result.output
    assert started[0].conf == (("device", "cpu"), ("store", "/a_b"))
    assert (started[0].root_path, started[0].ssl_ca_certs) == ("/labels_of_us", Path("a_b.pem"))
    assert started[0].log_level == "DEBUG"


def test_the_app_and_the_sample_images_of_a_checkout_are_the_default(started: list[start.StartOptions]):
    assert run().exit_code == 0
    assert (started[0].app / "main.py").is_file()
    assert Path(started[0].studies).name == "sample_datastore"


def test_without_sample_images_the_folder_must_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(serving, "_SAMPLES", tmp_path / "absent")
    with pytest.raises(RequestError, match="Name a folder of images with --studies"):
        serving.pick_studies(None)


def test_an_option_of_the_app_needs_a_value(tmp_path: Path):
    result = run("--studies", tmp_path, "--conf", "device")
    assert result.exit_code == 2
    assert "needs NAME=VALUE" in result.stderr


def test_a_mistake_is_one_line_before_anything_starts(tmp_path: Path):
    result = run("--studies", tmp_path / "absent")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: There is no folder")
    assert len(result.stderr.splitlines()) == 1
