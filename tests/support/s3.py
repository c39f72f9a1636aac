"""An S3 server of this machine (moto), in a process of its own: its packages do not go with those that are tested."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from support.servers import free_port

PROGRAM = Path(sys.prefix) / "s3-tools" / "bin" / "moto_server"
BUCKET = "scans"


@dataclass(frozen=True)
class S3:
    """A running server with one bucket."""

    url: str
    environment: dict[str, str]

    def require_rights(self, required: bool) -> None:
        """Whether who asks must be known from now on: nobody is."""
        requests.post(
            f"{self.url}/moto-api/reset-auth", data=b"0" if required else b"inf", timeout=10
        ).raise_for_status()


@contextmanager
def run_s3() -> Iterator[S3]:
    """A server, or a skip with its reason."""
    if not PROGRAM.is_file():
        pytest.skip(f"There is no S3 server at '{PROGRAM}'; `make s3-tools` installs moto there")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(PROGRAM), "-H", "127.0.0.1", "-p", str(port)]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "inf"}, **quiet)
    try:
        end = time.monotonic() + 60
        while True:
            try:
                requests.put(f"{url}/{BUCKET}", timeout=10).raise_for_status()
                break
            except requests.ConnectionError:
                assert process.poll() is None, f"{command} ended with {process.returncode}"
                assert time.monotonic() < end, f"{command} does not answer"
                time.sleep(0.1)
        known = {"AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        yield S3(url, {"AWS_ENDPOINT_URL": url, **known})
    finally:
        process.kill()
        process.wait()
