"""What a saved label, a note and the list cost in a folder of many images.

    python benchmarks/datastore.py --images 1000 10000 100000 --out benchmarks/results/datastore.json

Generated entries: one image file, which all names are links to, is labelled under as many names as asked for; no file
is opened but those of the saves. Each size is made twice: with the list as this version keeps it, and as version 0.1.0
did, which wrote and copied one JSON file with every change. A change is a save of a label (its history, its file and
its entry), or a note on an image (its entry alone). Both ways take turns in one run, so that their ratio holds on a
machine that does other things too. `start_seconds` is the time until the folder is open when everything is known.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from progidiff.server.datastores.host_file import plain
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from progidiff.storage.atomic import flush

SHAPE = (16, 16, 4)
LIVER = 6


def fill(studies: Path, images: int) -> None:
    """So many images, and the host's list of them with what it usually holds of one."""
    studies.mkdir(parents=True)
    first = source = studies / "case_000000.nii.gz"
    rng = np.random.default_rng(0)
    nibabel.save(nibabel.Nifti1Image(rng.integers(-900, 900, SHAPE, np.int16), np.eye(4)), first)
    objects = {}
    for number in range(images):
        name = f"case_{number:06d}"
        if number:
            link(source, studies / f"{name}.nii.gz", number)
            source = studies / f"{name}.nii.gz" if number % 20_000 == 0 else source
        info = {"ts": 1_700_000_000, "name": f"{name}.nii.gz", "modality": "CT", "note": "generated, no real image"}
        label = {"ts": 1_700_000_000, "name": f"{name}.nii.gz", "label_info": [{"name": "liver", "idx": LIVER}]}
        objects[name] = {
            "image": {"ext": ".nii.gz", "info": info},
            "labels": {"original": {"ext": ".nii.gz", "info": label}},
        }
    (studies / "labels" / "original").mkdir(parents=True)
    (studies / "labels" / "final").mkdir()
    for number, name in enumerate(objects):
        link(studies / f"{name}.nii.gz", studies / "labels" / "original" / f"{name}.nii.gz", number)
    content = {"name": "generated", "description": "", "images_dir": ".", "labels_dir": "labels", "objects": objects}
    (studies / "datastore_v2.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def link(source: Path, target: Path, number: int) -> None:
    """A name for the same file; a disk takes some ten thousand of one file."""
    if number % 20_000:
        os.link(source, target)
    else:
        shutil.copyfile(source, target)


class WholeList(SafeLocalDatastore):
    """Writes the host's list with every change, and a copy of the one before, as version 0.1.0 did."""

    def _write_rows(self, records: Any) -> None:
        self._apply({name: record for name, record in records.items() if record is not None}, ())
        self._unwritten.clear()
        config = self._host_file.path
        text = json.dumps(self._datastore.model_dump(exclude={"base_path"}), indent=2, default=str)
        scratch = config.with_name(".writing-list")
        shutil.copyfile(config, scratch)
        flush(scratch)
        os.replace(scratch, self._host_file.backup)
        scratch.write_text(text, encoding="utf-8")
        flush(scratch)
        os.replace(scratch, config)
        flush(config.parent)
        self._host_identity = self._host_file.identify()


def open_folder(kind: type[SafeLocalDatastore], folder: Path) -> SafeLocalDatastore:
    studies, state = folder / "studies", folder / "state"
    return kind(str(studies), state, open_annotations(state, str(studies)), serves=False, read_only=True)


def take(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def list_all(store: SafeLocalDatastore) -> None:
    """As a page and the choice of the next image do."""
    store.list_images()
    store.get_labeled_images()
    store.get_unlabeled_images()


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    """One size."""
    label = folder / "label.nii.gz"
    found: dict[str, Any] = {"images": images}
    stores: dict[str, SafeLocalDatastore] = {}
    for name, kind in (("index", SafeLocalDatastore), ("whole_list", WholeList)):
        fill(folder / name / "studies", images)
        found[f"{name}_first_start_seconds"] = round(
            take(lambda name=name, kind=kind: open_folder(kind, folder / name)), 3
        )
        stores[name] = open_folder(kind, folder / name)
    found["index_start_seconds"] = round(take(lambda: open_folder(SafeLocalDatastore, folder / "index")), 3)
    times: dict[str, list[float]] = {f"{name}_{what}": [] for name in stores for what in ("save", "note", "list")}
    for turn in range(rounds):
        for name, store in stores.items():
            image = f"case_{turn:06d}"
            array = np.zeros(SHAPE, np.uint8)
            array[2:6, 2:6, turn % SHAPE[2]] = LIVER
            array[0, 0, 0] = LIVER if name == "index" else 0
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), label)
            times[f"{name}_save"].append(
                take(lambda store=store, image=image: store.save_annotated(image, label, "final", {}))
            )
            times[f"{name}_note"].append(
                take(lambda store=store, image=image, turn=turn: store.update_image_info(image, {"note": str(turn)}))
            )
            times[f"{name}_list"].append(take(lambda store=store: list_all(store)))
    for name, values in times.items():
        found[f"{name}_seconds"] = round(statistics.median(values), 5)
    for what in ("save", "note"):
        found[f"{what}_ratio"] = round(found[f"whole_list_{what}_seconds"] / found[f"index_{what}_seconds"], 1)
    found["host_file_seconds"] = round(take(stores["index"].write_host_file), 3)
    found["host_file_bytes"] = (folder / "index" / "studies" / "datastore_v2.json").stat().st_size
    found["index_bytes"] = (folder / "index" / "state" / "datastore.sqlite").stat().st_size
    for store in stores.values():
        store._host_revision = store._revision  # Nothing to write when this process ends.
    record = stores["index"]._datastore.objects["case_000000"]
    found["entry_bytes"] = len(json.dumps(plain(record.model_dump())))
    for name in stores:
        shutil.rmtree(folder / name)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="datastore-") as folder:
        for images in options.images:
            results.append(measure(Path(folder), images, options.rounds))
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    report = {"command": " ".join(sys.argv), "load": os.getloadavg()[0], "rounds": options.rounds, "results": results}
    text = json.dumps(report, indent=1) + "\n"
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
