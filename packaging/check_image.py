#!/usr/bin/env python3
"""Whether the image would serve: the scripts that its Dockerfile runs, and what it starts, without a container engine.

The environment is made by `packaging/image/build.sh` from the wheel and requirements.lock, the folders by
`packaging/image/prepare.sh` under a temporary root. ENTRYPOINT, CMD, ENV and HEALTHCHECK are read from the Dockerfile,
so that they are what is tested. As root, with an interpreter that every account can reach, the server runs under the
image's account, which can write into /data, /studies and /tmp only: as in a container with a read-only root.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger("check_image")

ROOT = Path(__file__).resolve().parents[1]
ACCOUNT = 10001
START_SECONDS = 600
PORT = 18473
PASSWORD = "a password of the check\n"


def main() -> None:
    """Check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="", help="what to hand to `pip install` for PyTorch; default: the image's")
    parser.add_argument("--environment", type=Path, help="one that build.sh made already")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s")
    with tempfile.TemporaryDirectory(prefix="progidiff-image-") as folder:
        place = Path(folder)
        place.chmod(0o755)
        environment = options.environment or place / "opt" / "progidiff"
        if options.environment is None:
            environment.parent.mkdir()
            build = [str(ROOT / "packaging/image/build.sh"), str(environment), "cpu"]
            subprocess.run(build, check=True, env={**os.environ, "TORCH": options.torch})
            logger.info("Built")
        subprocess.run([str(ROOT / "packaging/image/prepare.sh"), str(place)], check=True)
        check(Image(place, environment))
    logger.info("What the image starts serves.")


class Image:
    """What the Dockerfile says, with its folders under another root.

    Args:
        root: Stands for /.
        environment: Stands for /opt/progidiff.
    """

    def __init__(self, root: Path, environment: Path) -> None:
        self._text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
        self._places = {"/opt/progidiff": str(environment), "/data": f"{root}/data", "/studies": f"{root}/studies"}
        self.entrypoint = self._find("ENTRYPOINT")
        self.command = [str(PORT) if word == "8000" else word for word in self._find("CMD", self._text)]
        self.healthcheck = self._find(r"HEALTHCHECK .*?CMD")
        variables = re.findall(r"([A-Z_]+)=(\S+)", re.findall(r"^ENV (.*)$", self._text, flags=re.MULTILINE)[-1])
        self.environment = {name: self._move(value) for name, value in variables}
        self.environment |= {"PATH": f"{environment}/bin:/usr/bin:/bin", "PROGIDIFF_PORT": str(PORT)}
        self.root = root
        self.account = self._find_account()

    def _find(self, instruction: str, text: str | None = None) -> list[str]:
        found = re.findall(rf"^{instruction} (\[.*\])$", text or self._text, flags=re.MULTILINE)
        return [self._move(word) for word in json.loads(found[-1])]

    def _move(self, word: str) -> str:
        for inside, outside in self._places.items():
            word = re.sub(rf"(^|=|:){inside}\b", rf"\g<1>{outside}", word)
        return word

    def _find_account(self) -> Mapping[str, Any]:
        """The image's account, if this process may become it and that account can reach the interpreter."""
        account: Mapping[str, Any] = {"user": ACCOUNT, "group": ACCOUNT, "extra_groups": []}
        with contextlib.suppress(PermissionError):
            if subprocess.run([self.entrypoint[0], "--version"], cwd="/", check=False, **account).returncode == 0:
                return account
        logger.info("The image's account cannot be used here; everything runs under this one.")
        return {}

    def run(self, words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program as the image would."""
        return subprocess.run(
            words,
            cwd=self.root / "data",
            env=self.environment,
            input=text,
            capture_output=True,
            encoding="utf-8",
            check=False,
            **self.account,
        )


def check(image: Image) -> None:
    """Refuse without users, add one, serve, and ask whether it is healthy."""
    refused = image.run([*image.entrypoint, *image.command])
    assert refused.returncode == 2, refused.stderr
    assert "users add" in refused.stderr, refused.stderr
    logger.info("Without users: %s", refused.stderr.strip().splitlines()[-1])
    users = next(word.partition("=")[2] for word in image.command if word.startswith("users_file="))
    added = image.run([*image.entrypoint, "users", "add", "anna", "--role", "administer", "--file", users], PASSWORD)
    assert added.returncode == 0, added.stderr
    log = image.root / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*image.entrypoint, *image.command],
            cwd=image.root / "data",
            env=image.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            **image.account,
        )
    try:
        _wait_until_healthy(image, process, log)
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
    assert process.wait() in (0, -15, 143), f"it ended with {process.returncode}"
    logger.info("Stopped by SIGTERM")


def _wait_until_healthy(image: Image, process: subprocess.Popen[bytes], log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS and process.poll() is None:
        asked = image.run(image.healthcheck)
        if asked.returncode == 0:
            logger.info("Healthy after %.1f s", time.monotonic() - started)
            return
        time.sleep(1)
    raise SystemExit(f"It did not become healthy: {asked.stderr}\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    main()
