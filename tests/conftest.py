"""Shared fixtures: the real classes at toy width, and a real server process. No hub, no network, no data from outside the repository."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import requests

# Before torch is imported: tests share their machine, and one thread is fast enough for toys.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder (backbone and conditioning) of toy width with random weights, whose masks are blots."""
    from progidiff.testing import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


def write_phantom(path: Path, shape: tuple[int, int, int] = (64, 48, 8), seed: int = 0, affine: np.ndarray | None = None) -> Path:
    """A CT-like NIfTI in HU: air, an elliptic body with fat and soft tissue, a bright and a dim ball, noise. 5 mm slices by default."""
    import nibabel

    rng = np.random.default_rng(seed)
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, size) for size in shape), indexing="ij")
    image = np.full(shape, -1000.0)
    image[(i / 0.9) ** 2 + (j / 0.85) ** 2 < 1] = -90
    image[(i / 0.8) ** 2 + (j / 0.75) ** 2 < 1] = 40
    image[(i + 0.35) ** 2 + (j * 1.1) ** 2 + (k / 1.5) ** 2 < 0.12] = 110
    image[(i - 0.4) ** 2 + j**2 + (k / 1.5) ** 2 < 0.05] = 180
    image += rng.normal(0, 8, shape)
    if affine is None:
        affine = np.array([[-5.5, 0, 0, 170], [0, 6.5, 0, -160], [0, 0, 5.0, 300], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(image.astype(np.int16), affine), path)
    return path


@pytest.fixture(scope="session")
def phantom_writer() -> Callable[..., Path]:
    return write_phantom


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

    def infer(self, image: str, params: dict[str, Any] | str, output: str = "all", model: str = "progidiff", **query: str) -> requests.Response:
        import json

        text = params if isinstance(params, str) else json.dumps(params)
        return requests.post(
            f"{self.url}/infer/{model}", params={"image": image, "output": output, **query}, files={"params": (None, text)}, timeout=600
        )


@contextlib.contextmanager
def run_server(studies: Path, app: Path, log: Path, *conf: str, wait_s: float = 300.0, port: int | None = None) -> Iterator[Server]:
    """`monailabel start_server` in a process of its own, on the loop-back interface, by default on a free port; killed at the end."""
    port = port or free_port()
    temporary = log.parent / "tmp"
    temporary.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if "score_pool" not in conf[::2]:  # what a test does not ask for must not take the processor from it
        conf += ("score_pool", "off")
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
