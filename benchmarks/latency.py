#!/usr/bin/env python3
"""Speed and memory of the server, measured on a real server process; figures that compare are ratios within this one
run.

    python benchmarks/latency.py --image sample_datastore/sample_ct_abdomen.nii.gz --out runs/latency.json

Measures: seconds until the server answers, its resident memory then and at its peak, a first and a second prompt on the
same volume, switching the shown proposal, and `/info/` while an inference runs. The weights are loaded before, by a few
slices of the image; what the second prompt saves are the image's features, which are computed once per volume.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import psutil
import requests

ROOT = Path(__file__).resolve().parents[1]


class Peak:
    """Largest resident memory of a process, sampled 10 times a second in a thread."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.1):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.bytes = max(self.bytes, self._process.memory_info().rss)

    def stop(self) -> None:
        """End the sampling; `bytes` holds the result."""
        self._stop.set()
        self._thread.join()


@contextlib.contextmanager
def run_server(studies: Path, conf: list[str], log: Path) -> Iterator[tuple[str, int, float]]:
    """A server on a free port; yields its address, process id and seconds until it answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(ROOT / "apps" / "progidiff"),
        "--studies",
        str(studies),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "login", "off"]
    for name, value in zip(conf[::2], conf[1::2], strict=True):
        command += ["--conf", name, value]
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{url}/info/", timeout=5).ok:
                    break
            if process.poll() is not None:
                sys.exit(
                    "The server did not start; its log is "
                    f"{log}:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}"
                )
            time.sleep(0.05)
        yield url, process.pid, time.monotonic() - started
    finally:
        process.terminate()
        process.wait(20)


def infer(url: str, image: str, output: str = "image", **params: Any) -> tuple[float, requests.Response]:
    """Seconds of a whole request, answer downloaded."""
    start = time.monotonic()
    form = {"params": (None, json.dumps(params))}
    answer = requests.post(
        f"{url}/infer/progidiff", params={"image": image, "output": output}, files=form, timeout=3600
    )
    seconds = time.monotonic() - start
    if not answer.ok:
        sys.exit(f"The server refused {params}: {answer.text}")
    return seconds, answer


def measure_info(url: str, image: str, seconds: float, **params: Any) -> list[float]:
    """Seconds of `/info/` requests, ten a second, for as long as an inference runs; it is cancelled after `seconds`."""
    job = f"latency-{os.getpid()}"
    worker = threading.Thread(
        target=requests.post,
        args=(f"{url}/infer/progidiff",),
        kwargs={
            "params": {"image": image},
            "files": {"params": (None, json.dumps({**params, "job_id": job}))},
            "timeout": 3600,
        },
    )
    worker.start()
    times: list[float] = []
    began = time.monotonic()
    while worker.is_alive():
        state = requests.get(f"{url}/progidiff/jobs/{job}", timeout=60)
        if state.ok and state.json()["state"] == "running":
            start = time.monotonic()
            requests.get(f"{url}/info/", timeout=60)
            times.append(time.monotonic() - start)
            if time.monotonic() - began > seconds:
                requests.delete(f"{url}/progidiff/jobs/{job}", timeout=60)
        time.sleep(0.1)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="a NIfTI volume")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "latency.json", help="JSON with the figures")
    parser.add_argument("--num-proposals", type=int, default=4)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's default if left out")
    parser.add_argument("--prompts", nargs=2, default=["liver", "spleen"], help="first and second prompt")
    parser.add_argument("--info-seconds", type=float, default=20.0, help="how long to ask /info/ beside an inference")
    parser.add_argument(
        "--conf",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="option of the app, e.g. --conf device cuda",
    )
    arguments = parser.parse_args()

    options: dict[str, Any] = {"num_proposals": arguments.num_proposals}
    if arguments.steps is not None:
        options["steps"] = arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder) / "studies"
        studies.mkdir()
        shutil.copy(arguments.image, studies)
        volume = nibabel.load(arguments.image)
        nibabel.save(volume.slicer[:, :, : min(8, volume.shape[2])], studies / "warm-up.nii.gz")
        image = arguments.image.name.removesuffix(".gz").removesuffix(".nii")
        with run_server(studies, [part for pair in arguments.conf for part in pair], Path(folder) / "server.log") as (
            url,
            pid,
            ready,
        ):
            time.sleep(1)
            idle = psutil.Process(pid).memory_info().rss
            peak = Peak(pid)
            load, _ = infer(
                url, "warm-up", prompt=arguments.prompts[0], num_proposals=1, steps=1
            )  # Weights; not the features of the image.
            first, _ = infer(url, image, prompt=arguments.prompts[0], seed=1, **options)
            second, _ = infer(url, image, prompt=arguments.prompts[1], seed=1, **options)
            numbers = infer(url, image, output="json", prompt=arguments.prompts[0], seed=1, **options)[1].json()
            switches = [
                infer(url, image, prompt=arguments.prompts[0], seed=1, show=str(k + 1), **options)[0]
                for k in range(arguments.num_proposals)
            ]
            info = measure_info(url, image, arguments.info_seconds, prompt="all", seed=2, **options)
            peak.stop()
    info.sort()
    switch = sorted(switches)[len(switches) // 2]
    report = {
        "command": "python benchmarks/latency.py " + " ".join(sys.argv[1:]),
        "machine": {"python": platform.python_version(), "cpus": os.cpu_count(), "processor": platform.machine()},
        "image": arguments.image.name,
        "model_version": numbers["model_version"],
        "num_proposals": arguments.num_proposals,
        "num_inference_steps": numbers["num_inference_steps"],
        "ready_s": round(ready, 2),
        "idle_memory_mb": round(idle / 1e6),
        "peak_memory_mb": round(peak.bytes / 1e6),
        "load_weights_s": round(load, 2),
        "first_prompt_s": round(first, 2),
        "second_prompt_s": round(second, 2),
        "first_over_second": round(first / second, 2),
        "switch_s": round(switch, 3),
        "first_over_switch": round(first / switch, 1),
        "info_requests": len(info),
        "info_p50_ms": round(1000 * info[len(info) // 2], 1) if info else None,
        "info_p95_ms": round(1000 * info[int(0.95 * (len(info) - 1))], 1) if info else None,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
