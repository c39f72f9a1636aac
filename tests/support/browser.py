"""A real browser for the tests: Debian's Chromium, driven by playwright-core from npm. `make test-browser` installs the
driver.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[1] / "browser"


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome, or of what the variable CHROMIUM names."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, filter(None, names)) if path), None)


def find_lack() -> str:
    """Why no browser test can run here; "" if they can."""
    if find_chromium() is None:
        return "There is no Chromium: apt-get install chromium, or set CHROMIUM to its path."
    if shutil.which("node") is None:
        return "There is no Node.js: apt-get install nodejs npm."
    if not (HERE / "node_modules" / "playwright-core").is_dir():
        return "The driver is not installed: make test-browser does it (npm ci in tests/browser)."
    return ""


needs_browser = [pytest.mark.browser, pytest.mark.skipif(bool(find_lack()), reason=find_lack() or "-")]
"""The marks of a module of browser tests: `pytestmark = needs_browser`."""


def drive(
    script: str,
    url: str,
    shots: Path,
    timeout_s: float = 400,
    actions: Mapping[str, Callable[[], None]] | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Run one script of this folder.

    Args:
        script: Its file name.
        url: Of the server.
        shots: Folder for screenshots.
        timeout_s: After which it is ended.
        actions: What the script may ask for by name while it runs; it goes on when that is done.
        given: What else the script wants.

    Returns:
        What the script returned, and "problems": errors that the page reported.
    """
    shots.mkdir(parents=True, exist_ok=True)
    task = json.dumps({"url": url, "chromium": find_chromium(), "shots": str(shots), **given})
    result: dict[str, Any] = {}
    with (shots / "errors.txt").open("w") as errors:
        process = subprocess.Popen(
            ["node", str(HERE / script), task], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                kind, _, text = line.strip().partition(" ")
                if kind == "DO":
                    (actions or {})[text]()
                    print("done", file=process.stdin, flush=True)
                elif kind == "RESULT":
                    result = json.loads(text)
        finally:
            timer.cancel()
            process.kill()
            process.wait()
    if not result:
        raise AssertionError(f"{script} failed:\n{(shots / 'errors.txt').read_text()[-6000:]}\nScreenshots: {shots}")
    return result
