"""What it costs to read files in a process of their own: the same files read both ways, one after the other.

    python benchmarks/decoding.py --out benchmarks/results/decoding.json

Files as they are sent and served: CT volumes of 512 x 512 pixels as packed and plain NIfTI, NRRD and a DICOM series,
labels, a picture; and whole saves of a label through the local datastore. Values are noise around an ellipsoid, which
packs like CT. Both ways alternate, so that whatever else the machine does meets both; medians in milliseconds, and the
median of the ratios of neighbouring runs. "first" is the first file, for which the helper is started.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from progidiff.dicomweb.catalogue import describe_file
from progidiff.dicomweb.export import export_series
from progidiff.dicomweb.frames import Series
from progidiff.images import decoding
from progidiff.images.geometry import Grid
from progidiff.images.pictures import read_pixels
from progidiff.images.reading import load_volume, read_grid
from progidiff.images.writing import save_mask
from progidiff.labels.segments import load_label_map
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="progidiff-decoding-benchmark-") as folder:
        rows = measure(Path(folder), arguments.slices, arguments.repeats)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "load": os.getloadavg()[0],
        "slices": arguments.slices,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    for row in rows:
        print(f"{row['name']:44} {row['here_ms']:9.1f} {row['apart_ms']:9.1f} {row['ratio']:7.3f}")
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def measure(folder: Path, slices: int, repeats: int) -> list[dict[str, Any]]:
    """A row per way of reading."""
    studies = folder / "studies"
    studies.mkdir()
    grid = Grid((512, 512, slices), np.diag([-0.8, -0.8, 3.0, 1.0]))
    voxels, labels = make_voxels(grid.shape), make_labels(grid.shape)
    packed, plain, nrrd = (
        save_mask(voxels, grid, studies / name) for name in ("packed.nii.gz", "plain.nii", "image.nrrd")
    )
    label = save_mask(labels, grid, folder / "label.nii.gz")
    series = folder / "series"
    volume = load_volume(packed, "CT")
    export_series(Series.of(describe_file("packed", packed, {"modality": "CT"}).identity, volume), series)
    picture = folder / "picture.png"
    Image.fromarray(voxels[:, :, : 3 * (slices // 3)][:, :, :3].astype(np.uint8)).save(picture)
    state = folder / "state"
    store = SafeLocalDatastore(str(studies), state, open_annotations(state, str(studies)))
    turns = iter(range(10**6))

    def save() -> None:
        number = next(turns)
        changed = labels.copy()
        changed[number % 400 : number % 400 + 9, 250, slices // 2] = 1 + number % 5
        file = save_mask(changed, grid, folder / "saved.nii.gz")
        started.append(time.perf_counter())
        store.save_annotated("packed", file, "final", {})

    started: list[float] = []
    jobs: dict[str, Callable[[], object]] = {
        "CT, packed NIfTI": lambda: load_volume(packed, "CT"),
        "CT, plain NIfTI": lambda: load_volume(plain, "CT"),
        "CT, NRRD": lambda: load_volume(nrrd, "CT"),
        "CT, DICOM series": lambda: load_volume(series),
        "label, packed NIfTI": lambda: load_label_map(label, grid),
        "header, as first seen": lambda: read_grid(touch(packed)),
        "header, seen before": lambda: read_grid(packed),
        "picture, PNG": lambda: read_pixels(picture),
        "save of a whole label": save,
    }
    begun = time.perf_counter()
    decoding.read_apart()
    decoding.describe_reading()
    rows = [{"name": "first", "here_ms": 0.0, "apart_ms": 1e3 * (time.perf_counter() - begun), "ratio": 0.0}]
    for name, job in jobs.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for turn in range(2 * repeats + 2):
            is_apart = bool(turn % 2)
            decoding.read_apart(is_apart)
            started[:] = [time.perf_counter()]
            job()
            if turn > 1:
                times[is_apart].append(time.perf_counter() - started[-1])
        ratios = [apart / here for here, apart in zip(times[False], times[True], strict=True)]
        rows.append(
            {
                "name": name,
                "here_ms": 1e3 * statistics.median(times[False]),
                "apart_ms": 1e3 * statistics.median(times[True]),
                "ratio": statistics.median(ratios),
            }
        )
    decoding.read_apart(False)
    return rows


def make_voxels(shape: tuple[int, int, int]) -> NDArray[np.int16]:
    """Noise around an ellipsoid in air."""
    x, y, z = (np.linspace(-1, 1, size, dtype=np.float32) for size in shape)
    body = x[:, None, None] ** 2 + y[None, :, None] ** 2 + 0.2 * z[None, None] ** 2 < 0.6
    noise = np.random.default_rng(0).normal(0, 12, shape).astype(np.float32)
    return np.where(body, 40 + noise, -1000 + noise / 3).astype(np.int16)


def make_labels(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Two structures."""
    labels = np.zeros(shape, np.uint8)
    labels[100:300, 150:350, shape[2] // 4 : shape[2] // 2] = 6
    labels[320:380, 200:300, shape[2] // 4 : shape[2] // 2] = 1
    return labels


def touch(path: Path) -> Path:
    """A file as if it were new."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))
    return path


if __name__ == "__main__":
    main()
