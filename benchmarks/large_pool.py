"""What a pool of many images costs somebody who works on it: a real server, asked over HTTP.

    python benchmarks/large_pool.py --images 1000 10000 100000 --out benchmarks/results/large_pool.json

Generated entries: all images are names of one tiny volume, which is opened where a request opens one. A tenth of them
is labelled, in the history and in the folder; every image has scores of 13 structures on `--slices` slices, of a toy
model that computes nothing here. The server is started twice on each size: on a folder that it has never seen, and
again. Times are wall times as the client sees them, of one client over the loop-back interface; `load` tells what else
the machine did. What ends with `cpu_s` or `cpu_ms` is the server's processor time meanwhile, in all its threads, which
a busy machine does not make longer. Figures:

* `first_start_s`, `start_s`: until the server answers; `pool_ready_s`: until it has read all scores, in the background;
* `next_first_ms`, `next_ms`, `next_slowest_ms`: the next sample: the first, then one after each save (median, slowest);
* `save_ms`, `save_slowest_ms`: a label of a whole volume, sent and acknowledged;
* `worklist_ms` and `worklist_kb`: the review page's first fifty images; `worklist_deep_ms`: fifty from the middle;
  `search_ms`: fifty whose name holds some letters; `queue_ms`: the fifty that are next;
* `list_ms`, `list_mb`: the host's list of everything, as one JSON text; `info_ms`: what a viewer asks first;
* `seen_after_s`: until an image that was put into the folder is in the list, for which all names are looked at;
* `idle_cpu_percent`: of one core, over `--idle` seconds in which nobody asks for anything;
* `resident_mb`, `peak_mb`: memory of the server, at rest after the second start, and its largest in both.

With `--here` no server is started and no score is read from a file: the datastore and the choice of the next image are
asked in this process, with scores that all images share, in processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import psutil
import requests

import progidiff.active_learning.scores as scores_module
from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import ScoredImage, SliceScoreStore
from progidiff.active_learning.strategies import ImageScores
from progidiff.labels.history import FINAL, Annotation, Event, _encode, hash_file
from progidiff.model.adapters import AdapterStore
from progidiff.prompts.structures import STRUCTURES
from progidiff.server.background.next_sample import Selection
from progidiff.server.background.scoring import fingerprint_image
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from progidiff.testing import build_tiny_model

sys.path.insert(0, str(Path(__file__).resolve().parent))

from datastore import link
from latency import Peak, run_server

SHAPE = (16, 16, 24)
LIVER = 6
LABELLED_EVERY = 10


@contextmanager
def unflushed() -> Iterator[None]:
    """Nothing is forced onto the disk, nor put there by rename: what is generated can be generated again."""
    fsync, replace_bytes = os.fsync, scores_module.replace_bytes
    os.fsync = lambda handle: None
    scores_module.replace_bytes = lambda path, content: path.write_bytes(content)
    try:
        yield
    finally:
        os.fsync, scores_module.replace_bytes = fsync, replace_bytes


def fill(studies: Path, images: int, slices: int) -> None:
    """So many images, a tenth of them labelled, all of them scored."""
    final = studies / "labels" / "final"
    final.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = [f"case_{number:06d}" for number in range(images)]
    source = studies / f"{names[0]}.nii.gz"
    values = rng.integers(-100, 200, SHAPE).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([5.0, 5.0, 3.0, 1.0])), source)
    for number, name in enumerate(names[1:], 1):
        link(source, studies / f"{name}.nii.gz", number)
        source = studies / f"{name}.nii.gz" if number % 20_000 == 0 else source
    label = studies.with_name("label.nii.gz")
    save_label(label, 0)
    write_history(studies / ".progidiff" / "annotations", final, label, names[::LABELLED_EVERY])
    store = SliceScoreStore(studies / ".progidiff" / "scores")
    for number, name in enumerate(names):
        drawn = rng.random((len(STRUCTURES), slices)) < 0.33
        arrays = (
            (rng.random(drawn.shape, np.float32) * drawn * np.float32(scale)).astype(np.float32)
            for scale in (1.0, 0.1, 0.05)
        )
        scores = ImageScores(name, STRUCTURES, *arrays, slice_mm=3.0, version="tiny@1")
        store.save(ScoredImage(scores, fingerprint_image(studies / f"{name}.nii.gz"), "CT", float(number)))


def write_history(root: Path, final: Path, label: Path, images: list[str]) -> None:
    """A history in which each of these images was labelled once, as `AnnotationStore` writes it; names of one file."""
    sha256, check = hash_file(label), ""
    root.mkdir(parents=True)
    with (root / "log.jsonl").open("wb") as log:
        for number, image in enumerate(images):
            version = root / "labels" / image / f"{number + 1}.nii.gz"
            version.parent.mkdir(parents=True)
            link(label, version, number + 1)
            link(label, final / f"{image}.nii.gz", number + 1)
            saved = Annotation(
                number + 1, "2026-01-01T00:00:00.000+00:00", image, FINAL, "", "viewer", None, ("liver",), None, None,
                None, sha256, version.relative_to(root).as_posix(), SHAPE[2], (("liver", LIVER),),
            )  # fmt: skip
            line = _encode(Event(saved.sequence, saved.time, "label", image, FINAL, "", label=saved), check)
            check = json.loads(line)["check"]
            log.write(line)
    (root / "head.json").write_text(json.dumps({"sequence": len(images), "check": check}), encoding="utf-8")


def save_label(file: Path, turn: int) -> None:
    """A label that differs from turn to turn."""
    array = np.zeros(SHAPE, np.uint8)
    array[2:6, 2:6, turn % SHAPE[2]] = LIVER
    array[0, 0, 0] = LIVER * (turn % 2)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([5.0, 5.0, 3.0, 1.0])), file)


def take(work: Callable[[], requests.Response]) -> tuple[float, requests.Response]:
    """Milliseconds of one request, its answer downloaded."""
    began = time.perf_counter()
    answer = work()
    seconds = time.perf_counter() - began
    if not answer.ok:
        sys.exit(f"The server refused {answer.url}: {answer.text[:500]}")
    return seconds * 1000, answer


def read_processor(process: psutil.Process) -> float:
    """Seconds that a process has computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def wait_for_scores(url: str) -> float:
    """Seconds until every image's scores are read and found to be up to date."""
    began = time.monotonic()
    while (state := requests.get(f"{url}/progidiff/scoring", timeout=600).json()["state"]) != "done":
        if state == "scoring" or time.monotonic() - began > 1800:
            sys.exit(f"The server scores images ({state}), which this script means to have done.")
        time.sleep(0.2)
    return time.monotonic() - began


def work_on(url: str, process: psutil.Process, rounds: int, folder: Path) -> dict[str, float]:
    """Next sample and save, turn by turn; the first next sample apart."""

    def post() -> requests.Response:
        return requests.post(f"{url}/activelearning/random", json={"client_id": "somebody"}, timeout=600)

    first, answer = take(post)
    times: dict[str, list[float]] = {"next": [], "save": []}
    computed = dict.fromkeys(times, 0.0)
    file = folder / "sent.nii.gz"
    for turn in range(rounds):
        save_label(file, turn)
        image = answer.json()["id"]
        before = read_processor(process)
        with file.open("rb") as sent:
            milliseconds, _ = take(
                lambda image=image, sent=sent: requests.put(
                    f"{url}/datastore/label",
                    params={"image": image, "tag": "final"},
                    files={"label": (file.name, sent)},
                    timeout=600,
                )
            )
        saved = read_processor(process)
        times["save"].append(milliseconds)
        milliseconds, answer = take(post)
        times["next"].append(milliseconds)
        computed["save"] += saved - before
        computed["next"] += read_processor(process) - saved
    found = {"next_first_ms": round(first, 1)}
    for name, values in times.items():
        found |= {f"{name}_ms": round(statistics.median(values), 1), f"{name}_slowest_ms": round(max(values), 1)}
        found[f"{name}_cpu_ms"] = round(1000 * computed[name] / rounds, 1)
    return found


def look(url: str, process: psutil.Process, images: int) -> dict[str, float]:
    """What pages and viewers ask for."""
    found: dict[str, float] = {}
    asked = {
        "worklist": "/progidiff/worklist?limit=50",
        "worklist_deep": f"/progidiff/worklist?limit=50&offset={images // 2}",
        "search": "/progidiff/worklist?limit=50&search=case_0000",
        "queue": "/progidiff/queue?limit=50",
        "info": "/info/",
        "list": "/datastore/?output=all",
    }
    for name, path in asked.items():
        before = read_processor(process)
        milliseconds, answer = take(lambda path=path: requests.get(f"{url}{path}", timeout=600))
        found[f"{name}_ms"] = round(milliseconds, 1)
        found[f"{name}_cpu_ms"] = round(1000 * (read_processor(process) - before), 1)
        if name == "worklist":
            found["worklist_kb"] = round(len(answer.content) / 1e3, 1)
        elif name == "list":
            found["list_mb"] = round(len(answer.content) / 1e6, 2)
    return found


def add_by_hand(url: str, studies: Path) -> float:
    """Seconds until an image that was put into the folder is known."""
    began = time.monotonic()
    shutil.copyfile(studies / "case_000000.nii.gz", studies / "new_image.nii.gz")
    while not requests.get(f"{url}/datastore/image/info", params={"image": "new_image"}, timeout=60).ok:
        if time.monotonic() - began > 600:
            sys.exit("The server does not find an image that was put into the folder.")
        time.sleep(0.25)
    return time.monotonic() - began


def compute(work: Callable[[], Any], times: int = 1) -> tuple[float, Any]:
    """Processor milliseconds of one call, the median of so many; and what the last one gave."""
    taken = []
    for _ in range(times):
        began = time.process_time()
        found = work()
        taken.append((time.process_time() - began) * 1000)
    return round(statistics.median(taken), 1), found


def measure_here(folder: Path, images: int, slices: int, rounds: int) -> dict[str, Any]:
    """One size, in this process."""
    studies, state = folder / "studies", folder / "state"
    studies.mkdir()
    names = [f"case_{number:06d}" for number in range(images)]
    source = studies / f"{names[0]}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.diag([5.0, 5.0, 3.0, 1.0])), source)
    for number, name in enumerate(names[1:], 1):
        link(source, studies / f"{name}.nii.gz", number)
        source = studies / f"{name}.nii.gz" if number % 20_000 == 0 else source
    found: dict[str, Any] = {"images": images, "load": round(os.getloadavg()[0], 1)}

    def open_store() -> SafeLocalDatastore:
        return SafeLocalDatastore(str(studies), state, open_annotations(state, str(studies)), serves=False)

    found["first_start_cpu_ms"], store = compute(lambda: (opened := open_store(), opened.refresh())[0])
    found["start_cpu_ms"], _ = compute(open_store)
    found["scan_cpu_ms"], _ = compute(store.refresh)
    arrays = np.random.default_rng(0).random((3, len(STRUCTURES), slices)).astype(np.float32)
    entries = {
        name: ScoredImage(ImageScores(name, STRUCTURES, *arrays, slice_mm=3.0, version="tiny@1"), "", "CT", 0.0)
        for name in names
    }
    app: Any = SimpleNamespace(datastore=lambda: store)
    infer: Any = SimpleNamespace(engine=SimpleNamespace(adapters=AdapterStore(folder / "adapters")))
    scores: Any = SimpleNamespace(pick_newest=lambda wanted: entries)
    reservations = Reservations(state / "reservations.json")
    selection = Selection(
        app, infer, scores, store.annotations, reservations, lambda modality: "tiny@1", dict, lambda image: ""
    )
    found["pool_ready_cpu_ms"], _ = compute(lambda: selection.next("somebody"))
    times: dict[str, list[float]] = {"save": [], "next": []}
    for turn in range(rounds):
        save_label(folder / "sent.nii.gz", turn)
        (image,) = reservations.held_by("somebody")
        times["save"].append(
            compute(lambda image=image: store.save_annotated(image, folder / "sent.nii.gz", FINAL, {}))[0]
        )
        times["next"].append(compute(lambda: selection.next("somebody"))[0])
    found |= {f"{name}_cpu_ms": round(statistics.median(values), 1) for name, values in times.items()}
    found["worklist_cpu_ms"], page = compute(lambda: selection.worklist(limit=50), rounds)
    found["worklist_kb"] = round(len(page.model_dump_json()) / 1e3, 1)
    found["worklist_deep_cpu_ms"], _ = compute(lambda: selection.worklist(limit=50, offset=images // 2))
    found["host_file_cpu_ms"], _ = compute(store.write_host_file)
    found["resident_mb"] = round(psutil.Process().memory_info().rss / 1e6)
    return found


def measure(folder: Path, images: int, slices: int, rounds: int, idle: float) -> dict[str, Any]:
    """One size."""
    studies = folder / "studies"
    with unflushed():
        fill(studies, images, slices)
    conf = ["model_dir", str(build_tiny_model(folder / "model")), "device", "cpu", "score_pool", "on"]
    conf += ["adapters", str(folder / "adapters")]
    found: dict[str, Any] = {"images": images, "load": round(os.getloadavg()[0], 1)}
    log = folder / "server.log"
    with run_server(studies, conf, log) as (url, pid, ready):
        process = psutil.Process(pid)
        found |= {"first_start_s": round(ready, 1), "first_start_cpu_s": round(read_processor(process), 1)}
        peak = Peak(pid)
        found["pool_ready_s"] = round(wait_for_scores(url), 1)
        found["pool_ready_cpu_s"] = round(read_processor(process) - found["first_start_cpu_s"], 1)
        found |= work_on(url, process, rounds, folder)
        peak.stop()
        largest = peak.bytes
    with run_server(studies, conf, log) as (url, pid, ready):
        process = psutil.Process(pid)
        found |= {"start_s": round(ready, 1), "start_cpu_s": round(read_processor(process), 1)}
        peak = Peak(pid)
        wait_for_scores(url)
        found |= look(url, process, images)
        found["seen_after_s"] = round(add_by_hand(url, studies), 2)
        time.sleep(idle)  # What it has to write is written.
        before = read_processor(process)
        time.sleep(idle)
        found["idle_cpu_percent"] = round(100 * (read_processor(process) - before) / idle, 1)
        found["resident_mb"] = round(process.memory_info().rss / 1e6)
        peak.stop()
    found["peak_mb"] = round(max(largest, peak.bytes) / 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--slices", type=int, default=24, help="slices of every image that are scored")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--idle", type=float, default=15.0, help="seconds of which the idle share is taken")
    parser.add_argument("--here", action="store_true", help="without a server")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "processors": os.cpu_count(),
        "slices": options.slices,
        "rounds": options.rounds,
        "results": [],
    }
    for images in options.images:
        with tempfile.TemporaryDirectory(prefix="large-pool-") as folder:
            sizes = (Path(folder), images, options.slices, options.rounds)
            report["results"].append(measure_here(*sizes) if options.here else measure(*sizes, options.idle))
        print(json.dumps(report["results"][-1]), file=sys.stderr, flush=True)
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
