"""The picture of the review page in the documents: a real server, the shipped model, a sample scan, a real Chromium.

PYTHONPATH=lib:tests python benchmarks/review_picture.py --out docs/images/review.png
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.browser import drive
from support.servers import APP, Server, copy_app, run_server

ROOT = Path(__file__).resolve().parents[1]
IMAGE = "sample_ct_abdomen"
PROMPT = "liver, left kidney, aorta"


@contextmanager
def serve_sample(samples: Path, folder: Path) -> Iterator[Server]:
    """A server with the shipped model on a copy of the sample scan.

    Args:
        samples: Folder of the sample scans.
        folder: Empty; for the copy, the app and the log.
    """
    studies = folder / "studies"
    studies.mkdir()
    for path in samples.glob(f"{IMAGE}*"):
        shutil.copy2(path, studies / path.name)
    conf = ("model_dir", str(APP / "model"), "device", "cpu", "score_pool", "off")
    with run_server(studies, copy_app(folder), folder / "server.log", *conf) as server:
        yield server


def main() -> None:
    """Take it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--studies", type=Path, default=ROOT / "sample_datastore")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with serve_sample(options.studies, folder) as server:
            drive("picture.mjs", server.url, folder / "shots", image=IMAGE, prompt=PROMPT, width=1500, height=900)
        shutil.copyfile(folder / "shots" / "review.png", options.out)


if __name__ == "__main__":
    main()
