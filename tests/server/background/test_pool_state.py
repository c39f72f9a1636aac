"""What the choice of the next image goes by: as if everything was looked at, at a cost that the pool's size has no part
in.
"""

from __future__ import annotations

import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

from progidiff.active_learning.reservations import Reservations
from progidiff.active_learning.scores import SliceScoreStore
from progidiff.labels.history import FINAL
from progidiff.model.adapters import AdapterStore
from progidiff.server.background.next_sample import Selection
from progidiff.server.background.pool_state import DONE, STARTED, TODO, PoolState
from progidiff.server.background.scoring import PoolScorer
from progidiff.server.datastores.local import SafeLocalDatastore, open_annotations
from support.scores import make_entry

SHAPE = (4, 4, 7)
"""As many slices as `make_entry` has scores of."""


class Place:
    """A folder of so many images, all of them scored, with what a server makes of it."""

    def __init__(self, folder: Path, images: int) -> None:
        self.studies = folder / "studies"
        self.studies.mkdir(parents=True)
        self.label = folder / "label.nii.gz"
        self.add_files([f"image{number:03}" for number in range(images)])
        root = self.studies / ".progidiff"
        self.annotations = open_annotations(root, str(self.studies))
        self.store = SafeLocalDatastore(str(self.studies), root, self.annotations, serves=False)
        self.store.refresh()
        self.scores = SliceScoreStore(root / "scores")
        for number, image in enumerate(self.store.list_images()):
            self.scores.save(make_entry(image, seed=number))
        self.app: Any = SimpleNamespace(datastore=lambda: self.store)
        infer: Any = SimpleNamespace(engine=SimpleNamespace(adapters=AdapterStore(folder / "adapters")))
        self.selection = Selection(
            self.app, infer, self.scores, self.annotations, Reservations(root / "reservations.json"),
            lambda modality: "base@1", dict, lambda image: "",
        )  # fmt: skip

    def add_files(self, names: list[str]) -> None:
        for name in names:
            nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4)), self.studies / f"{name}.nii.gz")

    def save(self, image: str, turn: int = 0, **params: Any) -> None:
        array = np.zeros(SHAPE, np.uint8)
        array[1, 1, turn % SHAPE[2]] = 6
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), self.label)
        self.store.save_annotated(image, self.label, FINAL, params)

    def open_state(self) -> PoolState:
        state = PoolState(self.app, self.annotations, self.scores, lambda modality: "base@1")
        state.update()
        return state


def describe(state: PoolState) -> dict[str, Any]:
    return {
        "images": state.images,
        "annotated": dict(state.annotated),
        "open": state.open.tolist(),
        "done": state.done.tolist(),
        "states": state.list_states(),
        "modalities": +state.modalities,
        "organs": +state.organs,
        "structures": state.table.structures,
        "counts": state.table.counts.tolist(),
    }


def make_steps(place: Place) -> list[Callable[[], object]]:
    """What may happen to a pool."""
    final = place.studies / "labels" / FINAL

    def put_label() -> None:
        place.save("image004")
        (final / "image005.nii.gz").write_bytes((final / "image004.nii.gz").read_bytes())

    def take_image() -> None:
        (place.studies / "image006.nii.gz").unlink()
        place.store.refresh()

    def put_image() -> None:
        place.add_files(["image001b"])
        place.store.refresh()

    return [
        lambda: place.save("image000"),
        lambda: place.save("image001", slices=[0, 2]),
        lambda: place.save("image001", 1, slices=[0, 1, 2, 3, 4, 5, 6]),
        lambda: place.store.undo("image001"),
        lambda: place.store.remove_label("image000", FINAL),
        lambda: place.annotations.finish("image002"),
        lambda: place.annotations.finish("image003"),
        lambda: place.annotations.finish("image003", is_done=False),
        lambda: place.annotations.skip("image002", "anna"),
        put_label,
        place.store.refresh,
        take_image,
        put_image,
        lambda: place.scores.save(make_entry("image001b", seed=77)),
        lambda: SliceScoreStore(place.scores.root).save(make_entry("image002", seed=78)),
        lambda: place.scores.remove("image002"),
        lambda: place.scores.save(make_entry("image003", "base@2", modality="MR", created=9.0)),
    ]


def test_the_pool_is_after_every_change_as_if_it_was_looked_at_for_the_first_time(tmp_path: Path):
    place = Place(tmp_path, 8)
    state = place.open_state()
    seen = []
    for step in make_steps(place):
        step()
        state.update()
        assert describe(state) == describe(place.open_state())
        seen.append(describe(state))
    assert all(before != after for before, after in itertools.pairwise(seen[:8]))
    states = dict(zip(state.images, state.list_states(), strict=True))
    assert (states["image000"], states["image001"], states["image002"], states["image005"]) == (
        TODO, STARTED, DONE, DONE
    )  # fmt: skip
    assert "image006" not in states
    assert "image001b" in states


class Counter:
    """What a piece of work asks of the disk."""

    def __init__(self) -> None:
        self.stats = self.names = self.opened = self.written = 0

    def __repr__(self) -> str:
        return (
            f"{self.stats} looks at a file, {self.names} names listed, {self.opened} opened, {self.written} B written"
        )


_active: list[Counter] = []


def _note_open(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _active:
        _active[-1].opened += 1


sys.addaudithook(_note_open)  # There is no way to take one off again; it does nothing while nobody counts.


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter()
    real = {name: getattr(os, name) for name in ("stat", "scandir", "listdir")}

    def stat(*args: Any, **kwargs: Any) -> Any:
        counter.stats += 1
        return real["stat"](*args, **kwargs)

    def listdir(*args: Any) -> Any:
        found = real["listdir"](*args)
        counter.names += len(found)
        return found

    @contextmanager
    def scandir(*args: Any) -> Iterator[Any]:
        with real["scandir"](*args) as entries:
            found = list(entries)
        counter.names += len(found)
        yield iter(found)

    before = _read_written()
    with monkeypatch.context() as patch:
        for name, replacement in (("stat", stat), ("listdir", listdir), ("scandir", scandir)):
            patch.setattr(os, name, replacement)
        _active.append(counter)
        try:
            yield counter
        finally:
            _active.pop()
    counter.written = _read_written() - before


def _read_written() -> int:
    file = Path("/proc/self/io")
    return int(file.read_text().partition("wchar: ")[2].split()[0]) if file.exists() else 0


def test_a_save_and_a_next_sample_ask_as_much_of_the_disk_however_many_images_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    costs = {}
    for images in (8, 120):
        place = Place(tmp_path / str(images), images)
        for turn in range(3):  # What is read once is read.
            given: Any = place.selection.next("anna")
            place.save(given.image, turn)
        time.sleep(2.5)  # A folder that was changed just now is looked at once more, until its time of change is old.
        place.selection.next("anna")
        with counted(monkeypatch) as saving:
            place.save(place.selection.reservations.held_by("anna")[0], 5)
        with counted(monkeypatch) as choosing:
            answer: Any = place.selection.next("anna")
        with counted(monkeypatch) as listing:
            page = place.selection.worklist(limit=5)
        assert answer.scores_from == "base@1"
        assert (page.images, len(page.entries)) == (images, 5)
        costs[images] = {"save": saving, "next": choosing, "worklist": listing}
    for what, few in costs[8].items():
        many = costs[120][what]
        assert few.opened > 0 or few.stats > 0
        assert (many.stats, many.names, many.opened) == (few.stats, few.names, few.opened), f"{what}: {few}; {many}"
        # A deeper tree of the index may take another page or two.
        assert many.written <= few.written + 16_384, f"{what}: {few}; {many}"


def test_the_scorer_looks_through_the_pool_once_and_not_for_every_image(tmp_path: Path):
    place = Place(tmp_path, 30)
    looked: list[str] = []
    queue: Any = SimpleNamespace()
    infer: Any = SimpleNamespace(queue=queue)
    scorer = PoolScorer(place.app, infer, place.scores)
    scorer.wanted_version = lambda modality: "base@2"  # type: ignore[method-assign]
    scorer.fingerprint = lambda image: looked.append(image) or "f00"  # type: ignore[method-assign,func-returns-value]
    first = scorer.find_next()
    assert first is not None
    assert len(looked) == 30
    found = [first]
    while len(found) < 30:
        place.scores.save(make_entry(found[-1], "base@2", created=2.0))
        looked.clear()
        following = scorer.find_next()
        assert following is not None
        assert set(looked) == {found[-1], following}
        found.append(following)
    assert sorted(found) == place.store.list_images()
    place.scores.save(make_entry(found[-1], "base@2", created=2.0))
    assert scorer.find_next() is None
    place.add_files(["zz"])
    place.store.refresh()
    assert scorer.find_next() == "zz"


def test_the_list_for_the_host_is_written_from_what_is_known_to_be_readable(tmp_path: Path):
    place = Place(tmp_path, 3)
    place.store.update_image_info("image001", {"note": 'a "b"\n', "number": 1})
    place.save("image002")
    place.store.write_host_file()
    text = (place.studies / "datastore_v2.json").read_text(encoding="utf-8")
    root = tmp_path / "other"
    again = SafeLocalDatastore(str(place.studies), root, open_annotations(root, str(place.studies)), serves=False)
    for image in place.store.list_images():
        assert again._datastore.objects[image] == place.store._datastore.objects[image]
    assert text.count("\n") < 20 + 3  # A line per image, so that it is small and still can be read.
    assert io.StringIO(text).readline() == "{\n"
