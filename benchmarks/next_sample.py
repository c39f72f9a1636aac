"""How long "what next" takes for a pool of so many images, from score files on disk.

    python benchmarks/next_sample.py --images 1000 --out benchmarks/results/next_sample.json
    python benchmarks/next_sample.py --images 1000 --http --out benchmarks/results/next_sample_http.json

Generated scores (13 structures, 60 to 180 slices, about a third of each drawn) are written, then read by a fresh store:
the first call reads all files, later ones only look whether they have changed. Without `--http` no server and no model
is involved: a call is what the server does for one request, the newest scores of every image, the pool, the best image,
its best eight slices; in processor time.

With `--http` a real server process is asked for the next sample, one request after the other, in wall time, which a
machine that does other things too makes longer; `load` tells. The server is started twice. "at once" asks as soon as it
answers at all, while it reads the scores in the background; "after a while" gives it `--wait` seconds for that, as the
time until somebody logs in does. Its model is of toy width and computes nothing here, the background scorer is on and
finds every image scored. `leaves_out` says what a request can cost beyond.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import requests

from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.strategies import ImageScores, Pool, build_pool, pick_slices
from progidiff.prompts.structures import STRUCTURES
from progidiff.server.background.scoring import fingerprint_image
from progidiff.testing import build_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from latency import run_server

LEAVES_OUT = [
    "keeping the consensus as the label `original`: no image has kept proposals here",
    "a history of labels, skipped images and trainings: nothing was annotated yet",
    "fetching the image, which a client does next, and images behind a DICOMweb server",
    "several clients at once, a running inference or training, a login, and a network: "
    "one client asks over the loop-back interface",
    "pictures: all images are volumes, and the server has no model for pictures",
]


def write_scores(
    root: Path, images: int, version: str = "base@1", fingerprint: Callable[[str], str] = lambda image: ""
) -> None:
    store = SliceScoreStore(root)
    for number in range(images):
        rng = np.random.default_rng(number)
        depth = int(rng.integers(60, 180))
        drawn = rng.random((len(STRUCTURES), depth)) < 0.33
        disagreement, entropy, foreground = (
            rng.random((len(STRUCTURES), depth)) * drawn * scale for scale in (1.0, 0.1, 0.05)
        )
        arrays = (values.astype(np.float32) for values in (disagreement, entropy, foreground))
        image = f"image{number:05}"
        scores = ImageScores(image, STRUCTURES, *arrays, slice_mm=3.0, version=version)
        store.save(ScoredImage(scores, fingerprint(image), "CT", float(number)))


class Server:
    """What the server keeps between requests."""

    def __init__(self, root: Path) -> None:
        self.store = SliceScoreStore(root)
        self.known: list[ScoredImage] = []
        self.pool: Pool = build_pool([])

    def pick(self, round_index: int) -> float:
        """One request. Returns milliseconds of processor time: a machine that does other things too must not change the
        figure.
        """
        started = time.process_time()
        entries = self.store.pick_newest(lambda modality: "base@1")
        ordered = [entries[image] for image in sorted(entries)]
        if len(ordered) != len(self.known) or any(a is not b for a, b in zip(ordered, self.known, strict=True)):
            self.known, self.pool = ordered, build_pool([entry.scores for entry in ordered])
        image = pick_slices(self.pool, 1, one_per_image=True, round_index=round_index)[0].image
        pick_slices(self.pool, 8, within=image, round_index=round_index)
        return (time.process_time() - started) * 1000


def measure(images: int, repeats: int) -> dict[str, Any]:
    """One store, read by calls; milliseconds of processor time."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        write_scores(root, images)
        server = Server(root)
        first = server.pick(0)
        later = [server.pick(0) for _ in range(repeats)]
        another_round = server.pick(1)
        slices = len(server.pool)
    return {
        "images": images,
        "slices": slices,
        **summarise(first, later),
        "first_after_a_training_ms": round(another_round, 1),
    }


def measure_http(images: int, repeats: int, wait_s: float) -> dict[str, Any]:
    """A server, started twice; milliseconds of wall time."""
    result: dict[str, Any] = {
        "images": images,
        "repeats": repeats,
        "load": round(os.getloadavg()[0], 1),
        "processors": os.cpu_count(),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        studies = folder / "studies"
        studies.mkdir()
        model = build_tiny_model(folder / "model")
        files = [studies / f"image{number:05}.nii.gz" for number in range(images)]
        values = np.random.default_rng(0).integers(-100, 200, (16, 16, 100)).astype(np.int16)
        nibabel.save(nibabel.Nifti1Image(values, np.diag([5.0, 5.0, 3.0, 1.0])), files[0])
        for file in files[1:]:
            os.link(files[0], file)  # no request opens an image
        write_scores(
            studies / ".progidiff" / "scores",
            images,
            "tiny@1",
            lambda image: fingerprint_image(studies / f"{image}.nii.gz"),
        )
        conf = ["model_dir", str(model), "device", "cpu", "score_pool", "on", "adapters", str(folder / "adapters")]
        for case, wait in (("at_once", 0.0), ("after_a_while", wait_s)):
            with run_server(studies, conf, folder / "server.log") as (url, _, ready_s):
                time.sleep(wait)
                times = [ask(url) for _ in range(repeats + 1)]
                check_idle(url)
            result[case] = {"asked_after_s": wait, "ready_s": round(ready_s, 1), **summarise(times[0], times[1:])}
    return {**result, "leaves_out": LEAVES_OUT}


def check_idle(url: str) -> None:
    """The background scorer has looked through the pool and found nothing to do."""
    deadline = time.monotonic() + 120
    while (state := requests.get(f"{url}/progidiff/scoring", timeout=60).json()["state"]) != "done":
        if state == "scoring" or time.monotonic() > deadline:
            sys.exit(
                f"The server's scorer is not idle beside the requests ({state}), so that their times mean nothing."
            )
        time.sleep(0.5)


def ask(url: str) -> float:
    """One request; milliseconds until the answer is here. The client does not label what it is given, so that it gets
    another image each time.
    """
    started = time.perf_counter()
    answer = requests.post(f"{url}/activelearning/random", json={"client_id": "somebody"}, timeout=300)
    milliseconds = (time.perf_counter() - started) * 1000
    if not answer.ok or answer.json().get("scores_from") != "tiny@1":
        sys.exit(f"The server does not answer from the scores: {answer.text}")
    return milliseconds


def summarise(first: float, later: list[float]) -> dict[str, float]:
    """The first call by itself, and the others."""
    ordered = sorted(later)
    return {
        "first_ms": round(first, 1),
        "median_ms": round(ordered[len(ordered) // 2], 1),
        "slowest_ms": round(ordered[-1], 1),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20, help="requests after the first")
    parser.add_argument("--http", action="store_true", help="ask a real server process")
    parser.add_argument(
        "--wait", type=float, default=10.0, help="with --http: seconds between the second start and its first request"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    found = (
        measure_http(options.images, options.repeats, options.wait)
        if options.http
        else measure(options.images, options.repeats)
    )
    result = {"command": shlex.join(sys.argv), **found}
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
