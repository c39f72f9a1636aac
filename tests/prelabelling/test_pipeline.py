"""Reading, computing and writing at the same time: what is bounded, tried again, ended, and continued."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from progidiff.cli.main import app
from progidiff.errors import MemoryFullError, ModelError, RequestError, StoreError
from progidiff.evaluation.prelabel import Answered, ImageOutcome, Item, Opened, PrelabelSettings
from progidiff.prelabelling.claims import Claims, Supply
from progidiff.prelabelling.pipeline import Depths, Job, Source, parse_budget, record, run_stages
from progidiff.prelabelling.report import ParquetReport, read_report
from progidiff.proposals.engine import Engine
from progidiff.storage import addresses
from support.series import write_series

SETTINGS = PrelabelSettings(prompt="liver", num_proposals=2, steps=1)
OPTIONS = ("--prompt", "liver", "-k", "2", "--steps", "1")


class Listed:
    """A source that gives a list, and counts what it gave."""

    def __init__(self, items: list[Item]) -> None:
        self._items = list(items)
        self.given = 0

    def take(self) -> Item | None:
        self.given += bool(self._items)
        return self._items.pop(0) if self._items else None

    @property
    def is_empty(self) -> bool:
        return not self._items


class Paced:
    """Steps that take a while and count what is between them; no model is needed to see the order of things."""

    def __init__(self, read_s: float = 0.0, compute_s: float = 0.0, write_s: float = 0.0) -> None:
        self._pauses = (read_s, compute_s, write_s)
        self._lock = threading.Lock()
        self.counts = {"read": 0, "computed": 0, "written": 0}
        self.most_waiting = {"model": 0, "writer": 0}
        self.threads: set[int] = set()

    def _count(self, name: str, seconds: float) -> None:
        time.sleep(seconds)
        with self._lock:
            self.counts[name] += 1
            waiting = self.counts["read"] - self.counts["computed"], self.counts["computed"] - self.counts["written"]
            for key, value in zip(("model", "writer"), waiting, strict=True):
                self.most_waiting[key] = max(self.most_waiting[key], value)

    def read(self, item: Item) -> Opened | ImageOutcome:
        if item.image.startswith("bad"):
            return ImageOutcome(item.image, "failed", "It is bad.")
        self._count("read", self._pauses[0])
        return Opened(item, 0.0, None, None, [], "", None, ImageOutcome(item.image, "failed"))  # type: ignore[arg-type]

    def compute(self, opened: Opened) -> Answered | ImageOutcome:
        self.threads.add(threading.get_ident())
        self._count("computed", self._pauses[1])
        return Answered(opened.item, 0.0, None, "", None, [], "", None, True, opened.outcome)  # type: ignore[arg-type]

    def write(self, answered: Answered) -> ImageOutcome:
        self._count("written", self._pauses[2])
        return replace(answered.outcome, state="made")


def list_items(count: int) -> list[Item]:
    return [Item(f"i{number}", f"/i{number}") for number in range(count)]


def run(steps: Paced, source: Source, depths: Depths) -> Iterator[ImageOutcome]:
    return run_stages(steps, source, depths)  # type: ignore[arg-type]


def test_a_slow_model_holds_the_readers_up_and_a_slow_disk_the_model():
    depths = Depths(readers=2, writers=1, prefetch=1)
    slow_model, slow_disk = Paced(compute_s=0.01), Paced(write_s=0.02)
    for steps in (slow_model, slow_disk):
        outcomes = list(run(steps, Listed(list_items(20)), depths))
        assert sorted(outcome.image for outcome in outcomes) == sorted(item.image for item in list_items(20))
        assert steps.threads == {threading.get_ident()}  # The model belongs to one thread.
    assert 2 <= slow_model.most_waiting["model"] <= depths.readers + depths.prefetch
    assert 2 <= slow_disk.most_waiting["writer"] <= depths.writers + depths.prefetch + 1


def test_steps_overlap():
    steps = Paced(0.04, 0.04, 0.04)
    started = time.monotonic()
    list(run(steps, Listed(list_items(12)), Depths(2, 2, 2)))
    assert time.monotonic() - started < 0.75 * 12 * 0.12  # In a row they take 1.44 s; at the same time 0.5 s.


def test_a_run_ends_with_a_sentence_when_too_many_images_fail_and_keeps_what_is_done(tmp_path: Path):
    items = [Item("good", "/good"), *(Item(f"bad{k}", f"/bad{k}") for k in range(3)), *list_items(30)]
    with Claims(tmp_path / "claims") as claims:
        report = ParquetReport(str(tmp_path / "report"), {}, lambda done: claims.finish(one.image for one in done))
        supply = Supply(items, claims, on_idle=report.flush)
        steps = Paced(compute_s=0.01)
        with pytest.raises(RequestError, match="3 images failed, and --max-failures allows 2; the last one was 'bad2'"):
            record(run(steps, supply, Depths()), report, supply, claims, 2, lambda outcome: None)
        rows = read_report(str(tmp_path / "report"))
        assert {image for image, row in rows.items() if row["state"] == "failed"} == {"bad0", "bad1", "bad2"}
        assert steps.counts["read"] == steps.counts["written"] == len(rows) - 3 < 20
        # Another process of the run ends, too.
        other = Supply(items, claims)
        with pytest.raises(RequestError, match="3 images failed"):
            record(run(steps, other, Depths()), report, other, claims, 2, lambda outcome: None)


def test_what_would_fail_for_every_image_ends_the_run_and_what_was_computed_is_written():
    class Broken(Paced):
        def compute(self, opened: Opened) -> Answered | ImageOutcome:
            if self.counts["computed"] == 3:
                raise ModelError("The weights are gone.")
            return super().compute(opened)

    steps = Broken(write_s=0.01)
    with pytest.raises(ModelError, match="weights"):
        list(run(steps, Listed(list_items(20)), Depths()))
    assert steps.counts["written"] == 3


def test_a_budget_is_a_number_or_a_share():
    assert [parse_budget(text, 200) for text in ("3", "5%", " 0.5 %", "100%", None)] == [3, 10, 1, 200, None]
    for text in ("-1", "many", "101%", "1.5"):
        with pytest.raises(RequestError, match="share like 5%"):
            parse_budget(text, 200)


@pytest.fixture
def job(tiny_model: Path, tmp_path: Path) -> Job:
    return Job(tiny_model, SETTINGS, device="cpu", out=str(tmp_path / "out"), pause=0.0)


def test_what_may_pass_is_tried_again_and_what_will_not_is_not(
    job: Job, tmp_path: Path, phantom_writer: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    image = Item("a", str(phantom_writer(tmp_path / "a.nii.gz", shape=(32, 32, 4))))
    calls: list[str] = []

    def fail(times: int, error: Exception, then: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls.append(type(error).__name__)
            if len(calls) <= times:
                raise error
            return then(*arguments)

        return call

    propose, describe = Engine.propose, addresses.describe
    monkeypatch.setattr(Engine, "propose", fail(2, MemoryFullError("The device is full."), propose))
    outcome = job.make().label(image)
    assert (outcome.state, outcome.attempts, len(calls)) == ("made", 3, 3)
    monkeypatch.setattr(Engine, "propose", propose)
    calls.clear()
    monkeypatch.setattr(addresses, "describe", fail(9, ConnectionError("reset"), describe))
    outcome = job.make().label(Item("b", "memory://b.nii.gz"))
    assert (outcome.state, outcome.reason, outcome.attempts, len(calls)) == ("failed", "reset (3 attempts)", 3, 3)
    monkeypatch.setattr(addresses, "describe", describe)
    outcome = job.make().label(Item("c", str(tmp_path / "none.nii.gz")))
    assert (outcome.state, outcome.attempts) == ("failed", 1)
    assert "There is nothing at" in outcome.reason


def test_a_table_of_volumes_and_series_is_labelled_and_continued(
    tmp_path: Path, tiny_model: Path, phantom_writer: Callable[..., Path]
):
    phantom_writer(tmp_path / "a.nii.gz", shape=(32, 32, 4))
    write_series(tmp_path / "series", shape=(24, 24, 4))
    (tmp_path / "broken.nii.gz").write_bytes(b"this is no image")
    (tmp_path / "m.csv").write_text("id,image\none,a.nii.gz\ntwo,series\nthree,broken.nii.gz\nfour,missing.nii.gz\n")
    out = tmp_path / "out"
    arguments = ["prelabel", "--manifest", str(tmp_path / "m.csv"), "--out", str(out), *OPTIONS]
    arguments += ["--model", str(tiny_model), "--device", "cpu"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1, done.output
    [report] = (out / "reports").iterdir()
    rows = read_report(str(report))
    assert {image: row["state"] for image, row in rows.items()} == {
        "one": "made",
        "two": "made",
        "three": "failed",
        "four": "failed",
    }
    assert "There is nothing at" in rows["four"]["reason"]
    assert all(rows["one"][f"{step}_seconds"] > 0 for step in ("read", "compute", "write"))
    assert rows["one"]["bytes_read"] == (tmp_path / "a.nii.gz").stat().st_size
    assert rows["one"]["bytes_written"] == (out / "labels" / "original" / "one.nii.gz").stat().st_size
    assert rows["two"]["slices"] == 4
    label, image = nibabel.load(rows["one"]["label"]), nibabel.load(tmp_path / "a.nii.gz")
    assert label.shape == image.shape
    np.testing.assert_allclose(label.affine, image.affine, atol=1e-5)

    phantom_writer(tmp_path / "missing.nii.gz", shape=(32, 32, 4), seed=1)
    again = CliRunner().invoke(app, [*arguments, "--max-failures", "0"])
    assert again.exit_code == 2
    assert "1 images failed, and --max-failures allows 0" in again.output
    assert {image: row["state"] for image, row in read_report(str(report)).items()} == {
        "one": "made",
        "two": "made",
        "three": "failed",
        "four": "made",
    }
    other = CliRunner().invoke(app, [*arguments, "--seed", "1", "--report", str(report)])
    assert other.exit_code == 2
    assert "seed 0 instead of 1" in other.output


def test_a_run_that_cannot_work_is_refused_before_it_begins(tmp_path: Path, tiny_model: Path):
    def refuse(*options: str) -> str:
        result = CliRunner().invoke(app, ["prelabel", *OPTIONS, "--model", str(tiny_model), *options])
        assert result.exit_code == 2, result.output
        return result.output

    (tmp_path / "m.csv").write_text("image\nm.csv\n")
    manifest = ("--manifest", str(tmp_path / "m.csv"))
    assert "one of --studies" in refuse()
    assert "--out" in refuse(*manifest)
    assert "--out" in refuse("--studies", "s3://bucket/scans")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refuse(*manifest, "--out", str(tmp_path / "file"))
    assert "nosuch://" in refuse("--studies", "nosuch://x", "--out", str(tmp_path))
    assert "nothing at" in refuse("--studies", str(tmp_path / "none"), "--out", str(tmp_path))
    assert "share like 5%" in refuse(*manifest, "--out", str(tmp_path / "out"), "--max-failures", "x")
    for empty in ("s3://", "s3:///"):
        assert "names no place" in refuse(*manifest, "--out", empty)
    assert "two slashes" in refuse(*manifest, "--out", "s3:/bucket/labels")
    # One machine would do the work of a cluster, and nobody would notice.
    for alone in (["--ray-address", "auto"], ["--workers", "3"], ["--gpus-per-worker", "0.5"]):
        assert "Add --ray" in refuse(*manifest, "--out", str(tmp_path / "out"), *alone)


def test_a_place_that_is_full_ends_the_run(job: Job, tmp_path: Path, phantom_writer: Callable[..., Path]):
    prelabeller = job.make()
    (tmp_path / "out" / "labels").write_text("")
    with pytest.raises(StoreError, match="Free some disk space"):
        prelabeller.label(Item("a", str(phantom_writer(tmp_path / "a.nii.gz", shape=(32, 32, 4)))))


def test_a_label_of_somebody_else_stays_in_any_place(job: Job, tmp_path: Path, phantom_writer: Callable[..., Path]):
    phantom_writer(tmp_path / "a.nii.gz", shape=(32, 32, 4))
    image = Item("a", str(tmp_path / "a.nii.gz"))
    for out in (str(tmp_path / "out"), "memory://kept"):
        theirs = addresses.join(out, "labels", "original", "a.nii.gz")
        addresses.put_bytes(theirs, b"somebody's")
        prelabeller = replace(job, out=out).make()
        assert prelabeller.label(image).state == "kept"
        assert addresses.read_bytes(theirs) == b"somebody's"
        addresses.open_address(theirs)[0].rm(addresses.open_address(theirs)[1])
        assert [prelabeller.label(image).state for _ in range(2)] == ["made", "there"]
        assert json.loads(addresses.read_bytes(next_note(out)))["image"] == "a"


def next_note(out: str) -> str:
    filesystem, root = addresses.open_address(addresses.join(out, ".progidiff", "prelabel", "original"))
    [note] = [path for path in filesystem.ls(root, detail=False) if path.endswith(".json")]
    return note if not addresses.is_remote(out) else f"memory://{note}"
