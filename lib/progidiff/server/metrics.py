"""Figures for Prometheus: what `progidiff.server.counting` counts, and what is looked up when somebody asks.

A figure that cannot be had is left out and named in ``progidiff_figures_missing``; the others are told all the same.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Callable, Iterator
from importlib import metadata

import psutil
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

import progidiff
from progidiff.proposals.device_queue import JobState
from progidiff.server import counting
from progidiff.server.parts import Context
from progidiff.server.trainings import list_families
from progidiff.storage.state_files import list_damage

logger = logging.getLogger(__name__)

KINDS = ("infer", "slice", "textdiff", "score")
"""Kinds of jobs, so that a queue with nobody in it is told as 0 and not by silence."""


class ServerFigures(Collector):
    """What is looked up.

    Args:
        context: The running app.
    """

    def __init__(self, context: Context) -> None:
        self._context = context

    def collect(self) -> Iterator[Metric]:
        """The figures as they are now."""
        parts: dict[str, Callable[[], list[Metric]]] = {
            "versions": self._tell_versions,
            "queue": self._tell_queue,
            "scoring": self._tell_scoring,
            "training": self._tell_training,
            "proposals": self._tell_proposals,
            "disk": self._tell_disk,
            "memory": _tell_memory,
        }
        missing = GaugeMetricFamily("progidiff_figures_missing", "Figures that could not be had.", labels=("part",))
        for name, tell in parts.items():
            try:
                figures = tell()
            except Exception:  # Whoever watches the server is to learn of the rest.
                logger.exception("The figures of '%s' are left out of /metrics", name)
                missing.add_metric([name], 1)
                continue
            missing.add_metric([name], 0)
            yield from figures
        yield missing
        yield _gauge("progidiff_damaged_state", "State found damaged since the start.", len(list_damage()))

    def _tell_versions(self) -> list[Metric]:
        packages = {name: metadata.version(name) for name in ("torch", "monailabel")}
        served = GaugeMetricFamily(
            "progidiff_served_version", "Versions that answer, 1 each.", labels=("family", "name", "version")
        )
        model = str(self._context.infer.engine.info()["model_version"])
        if model:
            name, _, version = model.partition("@")
            served.add_metric(["model", name, version], 1)
        for family in list_families(self._context):
            store = family.find_store()
            for entry in store.entries() if store is not None else ():
                if entry.current is not None:
                    served.add_metric([family.trainer or "adapter", entry.name, str(entry.current)], 1)
        about = {"version": progidiff.__version__, "python": platform.python_version(), **packages}
        return [InfoMetricFamily("progidiff", "This server.", about), served]

    def _tell_queue(self) -> list[Metric]:
        queue = self._context.infer.queue
        counted = queue.count()
        waiting = GaugeMetricFamily("progidiff_queue_waiting", "Jobs that wait for the device.", labels=("kind",))
        running = GaugeMetricFamily("progidiff_queue_running", "Jobs that hold the device.", labels=("kind",))
        for kind in dict.fromkeys((*KINDS, *(kind for kind, _ in counted))):
            waiting.add_metric([kind], counted[kind, JobState.QUEUED])
            running.add_metric([kind], counted[kind, JobState.RUNNING])
        limit = _gauge("progidiff_queue_limit", "Jobs that may wait (--conf max_waiting).", queue.max_waiting)
        return [waiting, running, limit]

    def _tell_scoring(self) -> list[Metric]:
        progress = self._context.scorer.progress()
        images = GaugeMetricFamily(
            "progidiff_scoring_images", "Images of the pool: scored by what is served, or not yet.", labels=("state",)
        )
        left = progress.images - progress.scored - progress.outdated - len(progress.failed)
        for state, count in (
            ("scored", progress.scored),
            ("outdated", progress.outdated),
            ("failed", len(progress.failed)),
            ("unscored", max(0, left)),
        ):
            images.add_metric([state], count)
        pool = _gauge("progidiff_images", "Images that are served.", progress.images)
        return [pool, images]

    def _tell_training(self) -> list[Metric]:
        running = self._context.training.is_running()
        return [_gauge("progidiff_trainings_running", "Trainings under way.", int(running))]

    def _tell_proposals(self) -> list[Metric]:
        keeper, entries = self._context.infer.keeper, self._context.infer.store.list()
        hits, misses = "Requests answered with kept proposals.", "Requests that had to be computed."
        size, limit = sum(entry.num_bytes for entry in entries), self._context.infer.store.max_bytes
        return [
            CounterMetricFamily("progidiff_kept_proposals_hits", hits, keeper.hits),
            CounterMetricFamily("progidiff_kept_proposals_misses", misses, keeper.misses),
            _gauge("progidiff_kept_proposals", "Answers that are kept.", len(entries)),
            _gauge("progidiff_kept_proposals_bytes", "Disk that kept answers take.", size),
            _gauge("progidiff_kept_proposals_limit_bytes", "Disk they may take (--conf store_gb).", limit),
        ]

    def _tell_disk(self) -> list[Metric]:
        disk = shutil.disk_usage(self._context.infer.store.root)
        return [
            _gauge("progidiff_store_disk_bytes", "Size of the disk with the store.", disk.total),
            _gauge("progidiff_store_disk_free_bytes", "What is free on it.", disk.free),
        ]


def _tell_memory() -> list[Metric]:
    """Of the processor, and of the devices that this process uses; asking does not begin to use one."""
    import torch

    total, free, used = (
        GaugeMetricFamily(f"progidiff_device_memory_{name}bytes", text, labels=("device",))
        for name, text in (
            ("total_", "Memory of a device."),
            ("free_", "What is free of it, whoever uses the rest."),
            ("used_", "What this server uses of it."),
        )
    )
    memory = psutil.virtual_memory()
    figures = {"cpu": (memory.total, memory.available, psutil.Process().memory_info().rss)}
    if torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            on_device = torch.cuda.mem_get_info(index)
            figures[f"cuda:{index}"] = (on_device[1], on_device[0], torch.cuda.memory_reserved(index))
    for device, (all_of_it, left, ours) in figures.items():
        for family, value in ((total, all_of_it), (free, left), (used, ours)):
            family.add_metric([device], value)
    return [total, free, used]


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value)


def build_registry(context: Context) -> CollectorRegistry:
    """All that is told of a running app, and of its process."""
    registry = CollectorRegistry()
    for collector in (counting.REGISTRY, ServerFigures(context)):
        registry.register(collector)
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


def render(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The text, and its media type, in the form that a client prefers.

    Args:
        registry: Of `build_registry`.
        accept: The header of this name.
    """
    encode, media_type = choose_encoder(accept)
    return encode(registry), media_type
