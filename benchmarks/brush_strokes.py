"""How smoothly a stroke is drawn on the review page: frames of a real Chromium on 512 x 512 x 300 voxels.

    PYTHONPATH=lib:tests python benchmarks/brush_strokes.py --out benchmarks/results/brush_strokes.json

A server process serves a generated volume; a browser without a screen and without a graphics card opens it, names a
structure and draws strokes of 61 points with a brush 30 mm wide (43 pixels) all over a slice. Reported are the times
between the frames that the browser showed while strokes were drawn and while the pointer went the same ways without
drawing, how long the page took to answer a move of the pointer, and how long to take a finished stroke over. `cores`
and `load` tell what else the machine did: a busy one shows fewer frames of anything.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from support.browser import drive
from support.servers import APP, copy_app, run_server

SHAPE = (512, 512, 300)
SPACING = (0.7, 0.7, 2.0)
BRUSH_MM = 30
STROKES = 8
ARGUMENTS = ["--no-sandbox", "--disable-gpu"]
"""Of Chromium: everything is drawn by the processor."""


def write_volume(path: Path) -> None:
    """A ball in noise, int16."""
    random = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(SHAPE[0]), np.arange(SHAPE[1]), indexing="ij")
    flat = np.where((x - 256) ** 2 + (y - 256) ** 2 < 200**2, 60, -1000)
    layers = [(flat + random.normal(0, 12, flat.shape)).astype(np.int16) for _ in range(8)]
    array = np.stack([layers[k % len(layers)] for k in range(SHAPE[2])], axis=-1)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-SPACING[0], -SPACING[1], SPACING[2], 1.0])), path)


def summarise(values: list[float]) -> dict[str, float]:
    """Milliseconds: the median, the 95th percentile and the longest; how many there are."""
    middle, late, longest = np.percentile(values, [50, 95, 100])
    return {"count": len(values), "median": round(middle, 1), "p95": round(late, 1), "longest": round(longest, 1)}


def measure() -> dict[str, Any]:
    """One run."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        studies = folder / "studies"
        studies.mkdir()
        write_volume(studies / "large.nii.gz")
        conf = ("model_dir", str(APP / "model"), "device", "cpu", "score_pool", "off")
        with run_server(studies, copy_app(folder), folder / "server.log", *conf) as server:
            given = {"image": "large", "size": BRUSH_MM, "strokes": STROKES, "width": 1500, "arguments": ARGUMENTS}
            seen = drive("strokes.mjs", server.url, folder / "shots", **given)
    frames = seen["frames"]
    return {
        "shape": seen["shape"],
        "brush_mm": BRUSH_MM,
        "strokes": seen["edits"],
        "drawn_pixels": seen["drawn"],
        "frames_per_second": round(1000 * len(frames) / sum(frames), 1),
        "frame_ms": summarise(frames),
        "frame_ms_without_drawing": summarise(seen["idle"]),
        "move_ms": summarise(seen["moves"]),
        "take_over_ms": summarise(seen["ends"]),
        "cores": os.cpu_count(),
        "load": [round(load, 2) for load in os.getloadavg()],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    result = measure()
    text = json.dumps(result, indent=1) + "\n"
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
