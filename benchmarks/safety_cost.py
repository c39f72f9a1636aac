#!/usr/bin/env python3
"""What the protection against untrusted bytes and damaged saves costs: this version against a former one, in turns.

    git worktree add ../former v0.1.0        # or a commit
    python benchmarks/safety_cost.py --former ../former --image sample_datastore/sample_ct_abdomen.nii.gz

Both versions serve a copy of the same image with the shipped weights, each from its own process, and are asked in turns
on the same machine: a save of a whole-volume label (another one every time, so that nothing is a repetition), a prompt
that has to be computed (another seed every time), and a prompt whose image is uploaded. Reported are medians and their
ratio; what else runs on the machine slows both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel
import numpy as np
import requests

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def serve(checkout: Path, image: Path, folder: Path, conf: list[str]) -> Iterator[str]:
    """A server of a checkout on a copy of the image; yields its address."""
    studies = folder / "studies"
    studies.mkdir(parents=True)
    shutil.copy(image, studies / image.name)
    (studies / f"{image.name.partition('.')[0]}.json").write_text('{"modality": "CT"}', encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = checkout / "apps" / "progidiff"
    command = [sys.executable, "-m", "monailabel.main", "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--conf", "score_pool", "off"]
    for name, value in zip(conf[::2], conf[1::2], strict=True):
        command += ["--conf", name, value]
    environment = {**os.environ, "PYTHONPATH": str(checkout / "lib")}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            with contextlib.suppress(requests.RequestException):
                if requests.get(f"{url}/info/", timeout=5).ok:
                    break
            time.sleep(0.2)
        else:
            raise SystemExit(f"The server of {checkout} did not start:\n{(folder / 'server.log').read_text()[-3000:]}")
        yield url
    finally:
        process.terminate()
        process.wait(30)


def time_save(url: str, image: Path, turn: int, folder: Path) -> float:
    """Seconds of a save of a whole-volume label."""
    source = nibabel.load(image)
    labels = np.zeros(source.shape[:3], np.uint8)
    labels[10 : 30 + turn, 20:60, 10:40] = 6
    path = folder / "label.nii.gz"
    nibabel.save(nibabel.Nifti1Image(labels, source.affine), path)
    name = image.name.partition(".")[0]
    with path.open("rb") as file:
        started = time.perf_counter()
        answer = requests.put(
            f"{url}/datastore/label",
            params={"image": name, "tag": "final"},
            files={"label": (path.name, file), "params": (None, json.dumps({"label_names": {"liver": 6}}))},
            timeout=300,
        )
        seconds = time.perf_counter() - started
    answer.raise_for_status()
    return seconds


def time_prompt(url: str, image: Path, turn: int, upload: bool) -> float:
    """Seconds of a prompt that has to be computed, on the served image or on an uploaded one."""
    params = {"prompt": "liver", "num_proposals": 2, "steps": 1, "seed": turn}
    files: dict[str, tuple[str | None, str | bytes]] = {"params": (None, json.dumps(params))}
    query = {"output": "image"}
    if upload:
        files["file"] = (image.name, image.read_bytes())
    else:
        query["image"] = image.name.partition(".")[0]
    started = time.perf_counter()
    answer = requests.post(f"{url}/infer/progidiff", params=query, files=files, timeout=900)
    seconds = time.perf_counter() - started
    answer.raise_for_status()
    return seconds


def main() -> None:
    """Ask both in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--former", type=Path, required=True, help="checkout of the version to compare with")
    parser.add_argument("--former-conf", nargs="*", default=[], help="options of its server: name value ...")
    parser.add_argument("--conf", nargs="*", default=["login", "off"], help="options of this version's server")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--saves", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    image = options.image.resolve()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="progidiff-safety-")))
        urls = {
            "former": stack.enter_context(
                serve(options.former.resolve(), image, folder / "former", options.former_conf)
            ),
            "now": stack.enter_context(serve(ROOT, image, folder / "now", options.conf)),
        }
        tasks: dict[str, tuple[int, Callable[[str, int], float]]] = {
            "save": (options.saves, lambda url, turn: time_save(url, image, turn, folder)),
            "prompt": (options.prompts, lambda url, turn: time_prompt(url, image, turn, upload=False)),
            "prompt on an upload": (options.prompts, lambda url, turn: time_prompt(url, image, turn, upload=True)),
        }
        report = {}
        print("| what | former, s | now, s | now / former |\n|---|---|---|---|")
        for name, (count, run) in tasks.items():
            seconds: dict[str, list[float]] = {which: [] for which in urls}
            for turn in range(count + 1):  # the first one warms up
                order = list(urls) if turn % 2 else list(urls)[::-1]
                for which in order:
                    taken = run(urls[which], turn)
                    if turn:
                        seconds[which].append(taken)
            medians = {which: statistics.median(values) for which, values in seconds.items()}
            ratio = statistics.median(b / a for a, b in zip(seconds["former"], seconds["now"], strict=True))
            report[name] = {"seconds": seconds, "medians": medians, "ratio": ratio}
            print(f"| {name} ({count}) | {medians['former']:.3f} | {medians['now']:.3f} | {ratio:.3f} |", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
