#!/usr/bin/env python3
"""Whether the wheel alone is enough: built, installed with pip into an empty environment, and used as a user would.

Nothing of the checkout is visible to what is tested: the environment is new, the working folder and the home are
temporary, PYTHONPATH is gone. A crop of a sample CT is served and a prompt answered over HTTP; then `progidiff
predict`, and `progidiff evaluate` against the mask that came out, whose Dice must be 1, as a seed gives the same
proposals.

    python packaging/check_wheel.py --torch "torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("check_wheel")

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "sample_datastore" / "sample_ct_abdomen.nii.gz"
SLICES = (70, 76)
"""Axial slices of the sample that show liver."""

FAST = ("--num-proposals", "2", "--steps", "1", "--seed", "3", "--device", "cpu", "--clean-up", "off")
START_SECONDS = 600

CROP = """
import sys
import nibabel
nibabel.load(sys.argv[1]).slicer[:, :, int(sys.argv[3]):int(sys.argv[4])].to_filename(sys.argv[2])
"""

AS_LABEL = """
import json, sys
from pathlib import Path
import nibabel
import numpy as np
mask, studies, name = nibabel.load(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
assert np.any(mask.dataobj), "the mask is empty"
(studies / "labels" / "final").mkdir(parents=True, exist_ok=True)
nibabel.save(mask, studies / "labels" / "final" / f"{name}.nii.gz")
(studies / "labels.json").write_text(json.dumps({str(int(np.max(mask.dataobj))): "liver"}))
"""


def main() -> None:
    """Check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, help="an already built wheel; default: build one")
    parser.add_argument("--programs", type=Path, help="bin/ of an environment that has the wheel already")
    parser.add_argument("--torch", default="", help="what to hand to `pip install` for PyTorch before the wheel")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)8d ms  %(message)s")
    with tempfile.TemporaryDirectory(prefix="progidiff-wheel-") as folder:
        place = Path(folder)
        if options.programs is None:
            wheel = options.wheel or build(place / "dist")
            logger.info("The wheel: %s, %.1f MB", wheel.name, wheel.stat().st_size / 1e6)
            options.programs = install(place / "venv", wheel.resolve(), options.torch)
        check(place, options.programs.absolute())
    logger.info("The wheel serves, predicts and evaluates in an empty environment.")


def build(folder: Path) -> Path:
    """Build the wheel of this checkout."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (wheel,) = folder.glob("progidiff-*.whl")
    return wheel


def install(folder: Path, wheel: Path, torch: str) -> Path:
    """Install the wheel into a new environment.

    Returns:
        The folder of its programs.
    """
    venv.create(folder, with_pip=True, clear=True)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [str(programs / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for words in filter(None, (shlex.split(torch), [str(wheel)])):
        subprocess.run([*pip, *words], check=True, cwd=folder)
    logger.info("Installed")
    return programs


def check(place: Path, programs: Path) -> None:
    """Serve, predict and evaluate."""
    home, studies = place / "home", place / "studies"
    home.mkdir()
    studies.mkdir()
    kept = ("PATH", "LANG", "SSL_CERT_FILE", "OMP_NUM_THREADS", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "USERPROFILE": str(home), "HF_HUB_OFFLINE": "1"}

    def run(*words: object) -> str:
        command = [str(programs / str(words[0])), *map(str, words[1:])]
        return subprocess.run(
            command, cwd=place, env=environment, check=True, stdout=subprocess.PIPE, encoding="utf-8"
        ).stdout

    assert str(ROOT) not in run("python", "-c", "import progidiff; print(progidiff.__file__)")
    logger.info("%s", run("progidiff", "--version").strip())
    run("python", "-c", CROP, SAMPLE, studies / "scan.nii.gz", *SLICES)
    serve(place, programs, environment, run)
    run("progidiff", "predict", studies / "scan.nii.gz", "--prompt", "liver", "--out", place / "out", *FAST)
    logger.info("`progidiff predict` wrote %s", sorted(path.name for path in (place / "out").iterdir()))
    run("python", "-c", AS_LABEL, place / "out" / "mask.nii.gz", studies, "scan")
    report = place / "evaluation.json"
    run("progidiff", "evaluate", "--studies", studies, "--out", report, "--no-hd95", *FAST)
    dice = json.loads(report.read_text(encoding="utf-8"))["summary"]["consensus"]["dice"]["liver"]
    logger.info("`progidiff evaluate`: Dice %s against the mask of the same seed", dice)
    assert dice == 1.0, f"the same seed gave another mask: Dice {dice}"


def serve(place: Path, programs: Path, environment: dict[str, str], run: object) -> None:
    """Start the server as the README says, log in with its token, ask for a structure, fetch a page."""
    assert callable(run)
    port = _find_port()
    words = ["serve", "--studies", "studies", "--port", str(port), "--conf", "score_pool=off", "--conf", "device=cpu"]
    with _running([str(programs / "progidiff"), *words], place, environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, place / "server.log")
        token = urllib.parse.parse_qs(
            urllib.parse.urlsplit(run("progidiff", "users", "link", "--studies", "studies", "--port", port)).query
        )["token"][0].strip()
        page = _ask(f"{url}/progidiff/", token)
        assert b"<html" in page.lower(), "the review page is no page"
        assert len(_ask(f"{url}/ohif/", token)) > 500, "the viewer is not there"
        params = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": 3, "show": "consensus"}
        answer = _ask(f"{url}/infer/progidiff?image=scan&output=json", token, {"params": json.dumps(params)})
        described = json.loads(answer)
        logger.info("The prompt was answered over HTTP: %s", json.dumps(described)[:300])
        assert "liver" in json.dumps(described), "the answer names no liver"


@contextlib.contextmanager
def _running(command: list[str], place: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (place / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    started = time.monotonic()
    while time.monotonic() - started < START_SECONDS:
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            try:
                urllib.request.urlopen(f"{url}/info/", timeout=5).close()
            except urllib.error.HTTPError as err:
                if err.code != 401:
                    raise
            logger.info("The server answers after %.1f s", time.monotonic() - started)
            return
        time.sleep(0.2)
    raise SystemExit(f"The server did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _ask(url: str, token: str, form: dict[str, str] | None = None) -> bytes:
    body, kind = None, {}
    if form is not None:
        head = '--x\r\nContent-Disposition: form-data; name="'
        body = ("".join(f'{head}{name}"\r\n\r\n{text}\r\n' for name, text in form.items()) + "--x--\r\n").encode()
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(url, data=body, headers={"Authorization": f"Bearer {token}", **kind})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return bytes(answer.read())
    except urllib.error.HTTPError as err:
        raise SystemExit(f"{url}: {err.code} {err.read().decode(errors='replace')[:1000]}") from err


def _find_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
