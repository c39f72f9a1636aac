#!/usr/bin/env python3
"""Many clients at once on a real server, for a while: answers, waiting times, memory, temporary files, and every saved
label.

    python benchmarks/soak.py                                                 # a model of toy width, made on the spot
    python benchmarks/soak.py --model apps/progidiff/model --image sample_datastore/sample_ct_abdomen.nii.gz --requests
    60

Eight clients ask for proposals and two save labels, slice by slice and whole, while a training runs and another client
asks `/info/` four times a second. Every answer that is not 200 must have a reason, and `Retry-After` if it is a 503; a
client that is told to come back waits for so long. At the end every acknowledged label is fetched and compared. Exit
code 1 if anything of that fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import psutil
import requests

from progidiff.model.folder import load_card
from progidiff.testing import build_tiny_model

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "apps" / "progidiff"
TRAINING = {
    "steps": 100_000,
    "validate_every": 1000,
    "patience": 1000,
    "batch_size": 2,
    "rank": 2,
    "learning_rate": 1e-4,
    "name": "soak",
}
LABELS = {"liver": 6, "spleen": 1}
PROMPTS = ("liver", "spleen", "liver and spleen", "left kidney")
WARM_UP = 0.5
"""Share of the requests after which memory should not grow any more: caches are full, all code is loaded."""


class Load:
    """Counts what was asked and answered; threads of clients share it.

    Args:
        url: Of the server.
        requests: How many in all, without `/info/`.
        seconds: No new request after so many.
    """

    def __init__(self, url: str, requests: int, seconds: float) -> None:
        self.url, self.total, self.deadline = url, requests, time.monotonic() + seconds
        self.statuses: Counter[str] = Counter()
        self.unexplained: list[str] = []
        self.seconds: dict[str, list[float]] = {"infer": [], "cached": [], "save": [], "info": []}
        self.by_client: Counter[str] = Counter()
        self.acknowledged: list[dict[str, Any]] = []
        self.asked = 0
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Whether to send another request."""
        with self._lock:
            if self.asked >= self.total or time.monotonic() > self.deadline:
                return False
            self.asked += 1
            return True

    def note(self, kind: str, answer: requests.Response, seconds: float) -> None:
        """Take an answer into account; waits as long as a 503 says."""
        with self._lock:
            self.statuses[f"{kind} {answer.status_code}"] += 1
            if answer.status_code == 200:
                return
            try:
                reason = str(answer.json()["detail"])
            except (ValueError, KeyError, TypeError):
                reason = ""
            if not reason or (answer.status_code == 503 and "Retry-After" not in answer.headers):
                self.unexplained.append(f"{kind}: {answer.status_code} {answer.text[:200]}")
        time.sleep(min(30.0, float(answer.headers.get("Retry-After", 1))))

    def infer(self, name: str, images: list[str]) -> None:
        """A client that asks for proposals; every fifth request repeats the one before."""
        chosen = random.Random(name)
        asked: tuple[str, dict[str, Any]] | None = None
        while self.take():
            if asked is None or chosen.random() > 0.2:
                params = {
                    "prompt": chosen.choice(PROMPTS),
                    "num_proposals": 2,
                    "steps": 1,
                    "seed": chosen.randrange(2**31),
                }
                asked = (chosen.choice(images), params)
            image, params = asked
            started = time.monotonic()
            form = {"params": (None, json.dumps(params))}
            answer = requests.post(
                f"{self.url}/infer/progidiff", params={"image": image, "output": "json"}, files=form, timeout=3600
            )
            seconds = time.monotonic() - started
            self.note("infer", answer, seconds)
            if answer.ok:
                with self._lock:
                    self.by_client[name] += 1
                    self.seconds["cached" if answer.json()["cached"] else "infer"].append(seconds)

    def save(self, name: str, images: list[str], studies: Path) -> None:
        """A client that saves labels, with a second of drawing between them."""
        chosen = random.Random(name)
        while self.take():
            self.save_once(chosen.choice(images), studies, chosen)
            time.sleep(chosen.uniform(0.5, 1.5))

    def save_once(self, image: str, studies: Path, chosen: random.Random) -> None:
        """Save a label of random blocks, on a few slices or on all."""
        opened = nibabel.load(studies / f"{image}.nii.gz")
        seed = chosen.randrange(2**31)
        slices = sorted(chosen.sample(range(opened.shape[2]), 3)) if chosen.random() < 0.6 else None
        content = nibabel.Nifti1Image(draw_mask(opened.shape, seed), opened.affine).to_bytes()
        about: dict[str, Any] = {"label_info": [{"name": key, "idx": value} for key, value in LABELS.items()]}
        if slices is not None:
            about["slices"] = slices
        files = {"label": ("label.nii", content), "params": (None, json.dumps(about))}
        started = time.monotonic()
        answer = requests.put(
            f"{self.url}/datastore/label", params={"image": image, "tag": "final"}, files=files, timeout=600
        )
        seconds = time.monotonic() - started
        self.note("save", answer, seconds)
        if answer.ok:
            told = answer.json()["annotation"]
            with self._lock:
                self.seconds["save"].append(seconds)
                sha256 = hashlib.sha256(content).hexdigest() if slices is None else None
                self.acknowledged.append(
                    {"image": image, "sequence": told["sequence"], "slices": slices, "seed": seed, "sha256": sha256}
                )

    def poll(self, stop: threading.Event) -> None:
        """Ask `/info/` four times a second."""
        while not stop.wait(0.25):
            started = time.monotonic()
            answer = requests.get(f"{self.url}/info/", timeout=600)
            seconds = time.monotonic() - started
            self.note("info", answer, seconds)
            self.seconds["info"].append(seconds)

    def find_lost(self) -> list[str]:
        """Acknowledged saves that are not there as they were sent."""
        lost = []
        with tempfile.TemporaryDirectory() as folder:
            for save in self.acknowledged:
                answer = requests.get(
                    f"{self.url}/progidiff/annotations/{save['image']}/{save['sequence']}/label", timeout=60
                )
                suffix = ".nii.gz" if answer.content[:2] == b"\x1f\x8b" else ".nii"
                path = Path(folder) / f"label{suffix}"
                path.write_bytes(answer.content)
                same = answer.ok and save["sha256"] in (None, hashlib.sha256(answer.content).hexdigest())
                if same:
                    kept = np.asarray(nibabel.load(path).dataobj)
                    slices = range(kept.shape[2]) if save["slices"] is None else save["slices"]
                    same = all(
                        np.array_equal(kept[..., z], draw_mask(kept.shape, save["seed"])[..., z]) for z in slices
                    )
                if not same:
                    lost.append(f"save {save['sequence']} of {save['image']}")
        return lost


class Memory(threading.Thread):
    """Resident memory of a process, twice a second, beside the number of requests so far."""

    def __init__(self, pid: int, load: Load) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[int, float]] = []
        self.stop = threading.Event()
        self._process, self._load = psutil.Process(pid), load

    def run(self) -> None:
        """Sample until `stop` is set."""
        while not self.stop.wait(0.5):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.samples.append((self._load.asked, self._process.memory_info().rss / 1e6))

    def describe(self) -> dict[str, float]:
        """MB at the start, at the end, at most, and growth per 100 requests after the warm-up (least squares)."""
        late = np.array([sample for sample in self.samples if sample[0] >= WARM_UP * self._load.asked])
        slope = float(np.polyfit(late[:, 0], late[:, 1], 1)[0]) if len(np.unique(late[:, 0])) > 2 else 0.0
        values = [megabytes for _, megabytes in self.samples]
        half = float(late[: max(1, len(late) // 10), 1].mean())
        end = float(late[-max(1, len(late) // 10) :, 1].mean())
        return {
            "start_mb": round(values[0]),
            "half_way_mb": round(half),
            "end_mb": round(end),
            "peak_mb": round(max(values)),
            "second_half_mb_per_100_requests": round(100 * slope, 2),
        }


def draw_mask(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """A label with two blocks, the same for the same seed."""
    chosen = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint8)
    for value in LABELS.values():
        i, j = chosen.integers(shape[0] // 8, shape[0] // 2), chosen.integers(shape[1] // 8, shape[1] // 2)
        mask[i : i + shape[0] // 4, j : j + shape[1] // 4] = value
    return mask


def write_studies(studies: Path, image: Path | None, count: int) -> list[str]:
    """Copies of an image, or CT-like bodies with noise of their own."""
    studies.mkdir()
    names = [f"image-{number}" for number in range(count)]
    i, j = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 40), indexing="ij")
    for number, name in enumerate(names):
        if image is not None:
            shutil.copy(image, studies / f"{name}.nii.gz")
            continue
        body = np.where((i / 0.8) ** 2 + (j / 0.75) ** 2 < 1, 40.0, -1000.0)
        noise = np.random.default_rng(number).normal(0, 8, (*body.shape, 16))
        affine = np.diag([-7.0, 7.0, 5.0, 1.0])
        nibabel.save(
            nibabel.Nifti1Image((body[..., None] + noise).astype(np.int16), affine), studies / f"{name}.nii.gz"
        )
    return names


@contextlib.contextmanager
def run_server(folder: Path, model: Path, conf: list[str]) -> Iterator[tuple[str, int]]:
    """A server on a free port with a temporary folder of its own; yields its address and process id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = folder / "app"
    shutil.copytree(APP, app, ignore=shutil.ignore_patterns("model", "logs", "__pycache__"))
    (folder / "tmp").mkdir()
    command = [
        sys.executable,
        "-m",
        "monailabel.main",
        "start_server",
        "--app",
        str(app),
        "--studies",
        str(folder / "studies"),
    ]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--conf",
        "model_dir",
        str(model),
        "--conf",
        "adapters",
        str(folder / "adapters"),
    ]
    command += ["--conf", "score_pool", "off", "--conf", "login", "off", *conf]
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "MONAI_LABEL_SESSION_PATH": str(folder / "sessions")}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            with contextlib.suppress(requests.ConnectionError, requests.Timeout):
                if requests.get(f"{url}/info/", timeout=5).ok:
                    break
            if process.poll() is not None:
                sys.exit(f"The server did not start; its log ends:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def find_temporary_files(folder: Path) -> set[str]:
    """Files in the server's temporary folder, or under a temporary name in the studies."""
    found = [path for path in (folder / "tmp").rglob("*") if path.is_file()]
    found += [*(folder / "studies").rglob(".writing-*"), *(folder / "studies").rglob("*.tmp")]
    return {str(path.relative_to(folder)) for path in found}


def find_percentiles(seconds: list[float]) -> dict[str, float]:
    """Count, p50, p95 and largest, in milliseconds."""
    if not seconds:
        return {"count": 0}
    p50, p95 = np.percentile(seconds, [50, 95])
    return {
        "count": len(seconds),
        "p50_ms": round(1000 * p50, 1),
        "p95_ms": round(1000 * p95, 1),
        "max_ms": round(1000 * max(seconds), 1),
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole benchmark; the report."""
    model = build_tiny_model(folder / "model") if arguments.model is None else arguments.model
    studies = folder / "studies"
    images = write_studies(studies, arguments.image, arguments.images)
    conf = [part for name, value in arguments.conf for part in ("--conf", name, value)]
    with run_server(folder, model.resolve(), conf) as (url, pid):
        load = Load(url, arguments.requests, arguments.seconds)
        before = find_temporary_files(folder)  # The host keeps the settings of its log in one.
        chosen = random.Random(0)
        for image in images:
            load.save_once(image, studies, chosen)
        started = requests.post(f"{url}/train/progidiff_adapt", json=TRAINING, timeout=60)
        if not started.ok:
            sys.exit(f"The training did not start: {started.text}")
        while (training := requests.get(f"{url}/progidiff/training", timeout=60).json())["step"] < 1:
            time.sleep(0.5)
        memory = Memory(pid, load)
        memory.start()
        stop = threading.Event()
        poll = threading.Thread(target=load.poll, args=(stop,))
        clients = [threading.Thread(target=load.infer, args=(f"infer-{k}", images)) for k in range(arguments.inferring)]
        clients += [
            threading.Thread(target=load.save, args=(f"save-{k}", images, studies)) for k in range(arguments.saving)
        ]
        load.deadline = time.monotonic() + arguments.seconds
        began = time.monotonic()
        for thread in (poll, *clients):
            thread.start()
        for thread in clients:
            thread.join()
        took = time.monotonic() - began
        stop.set()
        poll.join()
        memory.stop.set()
        memory.join()
        steps = -training["step"]
        training = requests.get(f"{url}/progidiff/training", timeout=60).json()
        requests.delete(f"{url}/train/", timeout=60)
        lost = load.find_lost()
        answered = list(load.by_client.values()) or [0]
        report = {
            "command": "python benchmarks/soak.py " + " ".join(sys.argv[1:]),
            "machine": {
                "python": platform.python_version(),
                "cpus": os.cpu_count(),
                "load_before": round(arguments.load_before, 1),
            },
            "model": "toy width" if arguments.model is None else load_card(model).full_name,
            "clients": {"inferring": arguments.inferring, "saving": arguments.saving},
            "requests": load.asked,
            "seconds": round(took, 1),
            "answers": dict(sorted(load.statuses.items())),
            "without_a_reason": load.unexplained,
            "inference": find_percentiles(load.seconds["infer"]),
            "inference_cached": find_percentiles(load.seconds["cached"]),
            "save": find_percentiles(load.seconds["save"]),
            "info": find_percentiles(load.seconds["info"]),
            "answers_per_inferring_client": {"fewest": min(answered), "most": max(answered)},
            "training": {"state": training["state"], "steps_meanwhile": steps + training["step"]},
            "memory": memory.describe(),
            "saves_acknowledged": len(load.acknowledged),
            "saves_lost": lost,
        }
    return {**report, "temporary_files_left": sorted(find_temporary_files(folder) - before)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a model folder, e.g. apps/progidiff/model; left out for one of toy width"
    )
    parser.add_argument(
        "--image", type=Path, help="a NIfTI volume (.nii.gz) to serve copies of; left out for synthetic ones"
    )
    parser.add_argument("--images", type=int, default=6)
    parser.add_argument("--requests", type=int, default=500, help="inferences and saves together")
    parser.add_argument("--seconds", type=float, default=1800.0, help="no new request after so long")
    parser.add_argument("--inferring", type=int, default=8, help="clients")
    parser.add_argument("--saving", type=int, default=2, help="clients")
    parser.add_argument(
        "--conf",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="option of the app, e.g. --conf device cuda",
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "soak.json", help="JSON with the figures")
    arguments = parser.parse_args()
    arguments.load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        report = run(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    return 1 if report["without_a_reason"] or report["saves_lost"] else 0


if __name__ == "__main__":
    sys.exit(main())
