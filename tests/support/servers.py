"""A real server process, and scripts of the project as modules."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import requests

ROOT = Path(__file__).resolve().parents[2]


APP = ROOT / "apps" / "progidiff"


def load_script(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Server:
    """A running server process."""

    url: str
    studies: Path
    process: subprocess.Popen[bytes]
    log: Path
    temporary: Path
    ready_seconds: float

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return requests.get(self.url + path, timeout=30, **arguments)

    def infer(
        self, image: str, params: dict[str, Any] | str, output: str = "all", model: str = "progidiff", **query: str
    ) -> requests.Response:
        import json

        text = params if isinstance(params, str) else json.dumps(params)
        return requests.post(
            f"{self.url}/infer/{model}",
            params={"image": image, "output": output, **query},
            files={"params": (None, text)},
            timeout=600,
        )


@contextlib.contextmanager
def run_server(
    studies: Path, app: Path, log: Path, *conf: str, wait_s: float = 300.0, port: int | None = None
) -> Iterator[Server]:
    """`monailabel start_server` in a process of its own, on the loop-back interface, by default on a free port; killed
    at the end.
    """
    port = port or free_port()
    temporary = log.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if "score_pool" not in conf[::2]:  # what a test does not ask for must not take the processor from it
        conf += ("score_pool", "off")
    if "login" not in conf[::2]:  # as most tests send no token; `test_auth_server` tests the default
        conf += ("login", "off")
    for name, value in zip(conf[::2], conf[1::2], strict=True):
        command += ["--conf", name, value]
    started = time.monotonic()
    with log.open("wb") as output:
        environment = {**os.environ, "MONAI_LABEL_SESSION_PATH": str(log.parent / "sessions"), "TMPDIR": str(temporary)}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=log.parent, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{url}/info/", timeout=5).status_code in (200, 401):  # 401: it asks for a login
                    break
            if process.poll() is not None or time.monotonic() - started > wait_s:
                raise AssertionError(f"The server did not start:\n{log.read_text(errors='replace')[-4000:]}")
            time.sleep(0.1)
        yield Server(url, studies, process, log, temporary, time.monotonic() - started)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def copy_app(folder: Path) -> Path:
    """The app's folder without weights and logs: MONAI Label writes into the folder of the app that it serves."""
    target = folder / "app"
    shutil.copytree(APP, target, ignore=shutil.ignore_patterns("model", "logs", "__pycache__", "bin", "lib"))
    return target
