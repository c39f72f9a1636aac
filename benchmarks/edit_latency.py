#!/usr/bin/env python3
"""How long a person waits for what a click makes of the slice that it is on, through HTTP, beside a server that scores.

    python benchmarks/edit_latency.py --image sample_datastore/sample_ct_abdomen.nii.gz \\
        --out benchmarks/results/edit_latency.json

A real server with several copies of the image, which it looks through in the background all the while. Each click goes
to another place of a structure, asks as the review page does (all clicks of the structure so far, the slice first), and
ends when the masks of the slice can be fetched; then the rest of the volume is cancelled, as the next click does.
*known* clicks follow a prompt on the image; *first* ones are the first that is asked about an image at all. Without a
close-up in the model folder an untrained one of the same size is put beside it: it costs the same.

Seconds by the clock depend on what else the machine does; those of the processor, of the whole server with its scoring,
do not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from latency import infer, run_server
from progidiff.images.close_up import WindowRules
from progidiff.images.geometry import Grid
from progidiff.images.reading import load_volume
from progidiff.model.close_up import create_network
from progidiff.model.close_up_folder import CloseUpCard, has_close_up, save_close_up
from progidiff.model.folder import load_card

ROOT = Path(__file__).resolve().parents[1]
POLL_S = 0.02
MOST_CLICKS = 5
"""On a slice; then the next one is clicked on."""


def prepare_model(source: Path, folder: Path) -> tuple[Path, bool]:
    """The model, with a close-up; and whether that is an untrained one."""
    if has_close_up(source):
        return source, False
    shutil.copytree(source, folder)
    network = create_network(384)
    save_close_up(folder, CloseUpCard(network.config, WindowRules(), structures=load_card(source).structures), network)
    return folder, True


def count_seconds(pid: int) -> float:
    """Of the processor, by a process and its children."""
    process = psutil.Process(pid)
    return sum(one.cpu_times().user + one.cpu_times().system for one in [process, *process.children(recursive=True)])


def click(url: str, pid: int, image: str, structure: str, z: int, edits: list[dict[str, Any]]) -> dict[str, Any]:
    """Ask with some edits; how long the slice took."""
    job = f"edit-latency-{os.getpid()}-{time.monotonic_ns()}"
    params = {"prompt": structure, "num_proposals": 4, "first_slice": z, "job_id": job, "edits": edits}
    asking = threading.Thread(
        target=requests.post,
        args=(f"{url}/infer/progidiff",),
        kwargs={
            "params": {"image": image, "output": "json"},
            "files": {"params": (None, json.dumps(params))},
            "timeout": 3600,
        },
    )
    state = requests.get(f"{url}/progidiff/scoring", timeout=60).json()["state"]
    spent, started = count_seconds(pid), time.monotonic()
    asking.start()
    while True:
        answer = requests.get(f"{url}/progidiff/review/{image}/masks/{z}", params={"job": job}, timeout=60)
        if answer.status_code == 200 and answer.content:
            break
        if not asking.is_alive():
            raise SystemExit(f"Nothing came of {params}: {answer.status_code} {answer.text[:300]}")
        time.sleep(POLL_S)
    seconds, spent = time.monotonic() - started, count_seconds(pid) - spent
    requests.delete(f"{url}/progidiff/jobs/{job}", timeout=60)
    asking.join()
    return {"seconds": seconds, "processor": spent, "scoring": state}


def place_clicks(grid: Grid, z: int, count: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Clicks in the left half of the picture, where the liver is; every third says outside."""
    _, rows, columns = grid.stack_shape
    places = [(z, int(rng.uniform(0.3, 0.6) * rows), int(rng.uniform(0.15, 0.45) * columns)) for _ in range(count)]
    return [
        {"kind": "click", "points": [list(map(int, grid.find_voxel(at)))], "positive": number % 3 < 2}
        for number, at in enumerate(places)
    ]


def summarise(measured: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, 95th percentile and number."""
    result: dict[str, Any] = {"clicks": len(measured)}
    for what in ("seconds", "processor"):
        values = [one[what] for one in measured]
        result[what] = {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95)}
    states = [one["scoring"] for one in measured]
    return {**result, "scoring": {state: states.count(state) for state in sorted(set(states))}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path, required=True, help="a NIfTI volume")
    parser.add_argument("--model", type=Path, default=ROOT / "apps" / "progidiff" / "model")
    parser.add_argument("--structure", default="liver")
    parser.add_argument("--clicks", type=int, default=40, help="after a prompt")
    parser.add_argument("--copies", type=int, default=4, help="of the image, for the pool")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    volume = load_volume(options.image, "CT")
    depth, rng = volume.grid.stack_shape[0], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model, is_untrained = prepare_model(options.model, folder / "model")
        (folder / "studies").mkdir()
        images = [f"copy{number}" for number in range(options.copies)]
        for image in images:
            shutil.copy(options.image, folder / "studies" / f"{image}.nii.gz")
        conf = ["model_dir", str(model), "device", "cpu", "score_pool", "on"]
        with run_server(folder / "studies", conf, folder / "server.log") as (url, pid, _):
            ask = (url, pid)
            infer(url, images[0], output="json", prompt=options.structure, num_proposals=4)
            slices = [int(at) for at in np.linspace(0.55, 0.85, max(1, options.clicks // MOST_CLICKS)) * depth]
            known = []
            for z in slices:
                edits = place_clicks(volume.grid, z, MOST_CLICKS, rng)
                known += [click(*ask, images[0], options.structure, z, edits[: n + 1]) for n in range(MOST_CLICKS)]
            # The last of the pool is scored last.
            first = [
                click(*ask, image, options.structure, slices[0], place_clicks(volume.grid, slices[0], 1, rng))
                for image in images[:0:-1]
            ]
    report = {
        "image": options.image.name,
        "slices": depth,
        "close-up": "untrained, of the same size" if is_untrained else str(options.model),
        "processors": os.cpu_count(),
        "load": [round(value, 1) for value in os.getloadavg()],
        "known": summarise(known),
        "first": summarise(first) if first else {},
    }
    text = json.dumps(report, indent=1)
    print(text)
    options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
