"""A round of three organs on one image of the review page, by script: seconds and clicks as the page counts them.

A real server with the shipped model, a sample scan, a real Chromium. Of each organ the most disputed slices are
accepted one by one with the most typical proposal, then the volume as proposed; one submission saves all. A person
looks longer than the second that the script stays on each slice: clicks and keys are the figure to compare, seconds are
a floor.

PYTHONPATH=lib:tests python benchmarks/review_round.py --out benchmarks/results/review_round.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from review_picture import IMAGE, serve_sample
from support.browser import drive

ROOT = Path(__file__).resolve().parents[1]
ORGANS = ("liver", "spleen", "left kidney")
SLICES = 3
"""Disputed slices that are looked at, of each organ."""


def main() -> None:
    """Go the round and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shot", type=Path, help="where to keep a picture of the page before the submission")
    parser.add_argument("--studies", type=Path, default=ROOT / "sample_datastore")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with serve_sample(options.studies, folder) as server:
            given = {"image": IMAGE, "prompts": list(ORGANS), "slices": SLICES, "width": 1500, "height": 900}
            said = drive("round.mjs", server.url, folder / "shots", timeout_s=1800, timeout=600000, **given)
            saves = server.get("/progidiff/annotations", params={"image": IMAGE}).json()["annotations"]
        if options.shot:
            shutil.copyfile(folder / "shots" / "round.png", options.shot)
    effort = {name: {"seconds": seconds, "clicks": clicks} for name, seconds, clicks in saves[0]["effort"]}
    result = {
        "image": IMAGE,
        "disputed_slices_per_organ": SLICES,
        "effort": effort,
        "clicks": sum(spent["clicks"] for spent in effort.values()),
        "seconds": round(said["seconds"], 1),
        "saves": len(saves),
        "decided": said["decided"],
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
