"""Many volumes on a Ray cluster of two machines in one: parts of GPUs, and a worker that is killed in mid-run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from progidiff.errors import RequestError
from progidiff.evaluation.prelabel import Item, PrelabelSettings
from progidiff.prelabelling.claims import Claims, Supply
from progidiff.prelabelling.cluster import Model, Plan, connect, plan_actors, run_on_ray
from progidiff.prelabelling.pipeline import Job, record
from progidiff.prelabelling.report import ParquetReport, read_report

NAMES = [f"i{number}" for number in range(8)]


@pytest.mark.parametrize(
    ("resources", "asked", "plan"),
    [
        ({"CPU": 64, "GPU": 8}, (None, None), Plan(8, 1.0, 1.0, 16, 1.0)),
        ({"CPU": 12, "GPU": 2}, (None, 0.5), Plan(4, 0.5, 1.0, 8, 1.0)),
        ({"CPU": 16, "GPU": 4}, (None, 2.0), Plan(2, 2.0, 1.0, 4, 1.0)),
        ({"CPU": 2}, (2, None), Plan(2, 0.0, 1.0, 1, 0.0)),
        ({"CPU": 16, "GPU": 2}, (None, 0.0), Plan(4, 0.0, 3.0, 4, 1.0)),
    ],
)
def test_what_is_started_follows_from_what_the_cluster_has(
    resources: dict[str, float], asked: tuple[Any, Any], plan: Plan
):
    assert plan_actors(resources, *asked) == plan


def test_what_a_cluster_cannot_give_is_refused(caplog: pytest.LogCaptureFixture):
    with pytest.raises(RequestError, match="the cluster has none"):
        plan_actors({"CPU": 8}, gpus_per_worker=0.5)
    for share in (-1.0, 1.5):
        with pytest.raises(RequestError, match="a part of 1 such as 0.5"):
            plan_actors({"CPU": 8, "GPU": 4}, gpus_per_worker=share)
    assert plan_actors({"CPU": 8, "GPU": 1}, workers=3).models == 3  # Machines may join later.
    assert "hold 1: the others wait" in caplog.text


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A machine with a GPU that nobody looks for, and one without."""
    ray = pytest.importorskip("ray", reason="ray is not installed; pip install 'progidiff[ray]'")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # 15 by default: on a busy machine a test would wait for ever
    small = {"object_store_memory": 100 << 20}
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        machines.add_node(num_cpus=2, num_gpus=1, **small)
        machines.add_node(num_cpus=1, **small)
        connect(machines.address)
        yield machines
    finally:
        ray.shutdown()
        machines.shutdown()


def test_a_worker_is_killed_in_mid_run_and_nothing_is_lost_or_twice(
    cluster: Any,
    tmp_path: Path,
    tiny_model: Path,
    phantom_writer: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
):
    caplog.set_level(logging.WARNING)
    items = [
        Item(name, str(phantom_writer(tmp_path / f"{name}.nii.gz", shape=(32, 32, 4), seed=number)))
        for number, name in enumerate(NAMES)
    ]
    (tmp_path / "broken.nii.gz").write_bytes(b"this is no image")
    items.append(Item("broken", str(tmp_path / "broken.nii.gz")))
    settings = PrelabelSettings(prompt="liver", num_proposals=2, steps=1)
    out = tmp_path / "out"
    job = Job(tiny_model, settings, device="cpu", out=str(out))
    killed: list[int] = []
    seen: list[str] = []

    def kill_the_first(outcome: Any) -> None:
        seen.append(outcome.image)
        if outcome.state == "made" and not killed:
            models = [each for each in psutil.process_iter(["pid", "name", "cmdline"]) if is_model(each)]
            assert len(models) == 2  # Two share the GPU.
            killed.append(models[0].pid)
            os.kill(models[0].pid, signal.SIGKILL)

    with Claims(tmp_path / "claims") as claims:
        report = ParquetReport(
            str(tmp_path / "report"), {}, lambda done: claims.finish(outcome.image for outcome in done)
        )
        supply = Supply(items, claims, on_idle=report.flush)
        outcomes = run_on_ray(job, supply, gpus_per_worker=0.5)
        record(outcomes, report, supply, claims, None, kill_the_first)

    assert killed
    assert "the image begins again" in caplog.text
    assert sorted(seen) == sorted([*NAMES, "broken"])
    rows = read_report(str(tmp_path / "report"))
    assert {name: rows[name]["state"] for name in NAMES} == dict.fromkeys(NAMES, "made")
    assert rows["broken"]["state"] == "failed"
    assert all(rows[name][f"{step}_seconds"] > 0 for name in NAMES for step in ("read", "compute", "write"))
    # What the cluster made is what one process makes.
    alone = Job(tiny_model, settings, device="cpu", out=str(tmp_path / "alone")).make()
    for item in items[:2]:
        alone.label(item)
        made = [folder / "labels" / "original" / f"{item.image}.nii.gz" for folder in (out, tmp_path / "alone")]
        assert made[0].read_bytes() == made[1].read_bytes()
    assert sorted(path.name for path in (out / "labels" / "original").iterdir()) == [f"{name}.nii.gz" for name in NAMES]


def is_model(process: psutil.Process) -> bool:
    title = " ".join(process.info["cmdline"] or [])
    return title.startswith(f"ray::{Model.__name__}")
