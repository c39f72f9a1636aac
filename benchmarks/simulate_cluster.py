"""How long a cluster takes to label many volumes, and several GPUs to train, from what each stage costs.

    python benchmarks/simulate_cluster.py benchmarks/cluster/figures.toml --out benchmarks/results/cluster.json
    python benchmarks/simulate_cluster.py mine.toml --report report.parquet
    python benchmarks/simulate_cluster.py mine.toml --set prelabel.compute_seconds=1.4 prelabel.nodes=4
    python benchmarks/simulate_cluster.py mine.toml --take gpu.json \\
        prelabel.compute_seconds="sections/volume/64 at once/seconds"

Nothing runs but arithmetic. `prelabel`: every machine reads, computes and writes volumes in three stages with a bounded
number between two of them; a share of the machines is slow, machines fail and come back, volumes fail and are tried
again, all machines share the storage. `training`: every step waits for the slowest GPU, for its slices, and for what of
the gradients' exchange is not hidden behind the computation; a GPU that fails costs what was done since the last
checkpoint.

The figures come from a TOML file, each with its `origin`, "measured" or "assumed", and a `note` that says where from;
`figures.toml` explains all of them. What is given on the command line counts before it: `--set` a value, `--take` a
number of a JSON file (names on the way to it joined by `/`), `--report` the means of the columns `read_seconds`,
`compute_seconds` and `write_seconds` of a report of `progidiff prelabel`. The answer: hours, GPU hours, how busy each
stage was and which one is the narrowest, what each failure cost, how the hours change when a figure is halved or
doubled, and which figures nobody has measured.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import shlex
import sys
import tomllib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

STAGES = ("read", "compute", "write")

MOST_TIMES_REDONE = 20
"""How often volumes are begun again, on average, before a job counts as one that never ends."""


class Figure(BaseModel):
    """A number, and how far to trust it.

    Attributes:
        value: The number; its unit is in its name.
        origin: Whether somebody measured it.
        note: On what, or why it is assumed so.
    """

    model_config = ConfigDict(extra="forbid")

    value: float = Field(allow_inf_nan=False)
    origin: Literal["measured", "assumed"]
    note: str


def _bounded(least: float, most: float = math.inf, whole: bool = False, above: bool = False) -> Any:
    """A figure from `least` (`above`: more than it) to `most`, `whole` or any."""
    wanted = "a whole number" if whole else "a number"
    wanted += (
        f" above {least:g}"
        if above
        else f" of {least:g} or more"
        if most == math.inf
        else f" from {least:g} to {most:g}"
    )

    def check(figure: Figure) -> Figure:
        value = figure.value
        if not least <= value <= most or (above and value == least) or (whole and value != int(value)):
            raise ValueError(f"{value:g} cannot be, it is {wanted}")
        return figure

    return AfterValidator(check)


Count = Annotated[Figure, _bounded(1, whole=True)]
CountOrNone = Annotated[Figure, _bounded(0, whole=True)]
Positive = Annotated[Figure, _bounded(0, above=True)]
Amount = Annotated[Figure, _bounded(0)]
Share = Annotated[Figure, _bounded(0, 1)]
Switch = Annotated[Figure, _bounded(0, 1, whole=True)]


class NeverEndsError(Exception):
    """Something fails more often than it gets anything done."""


class _Figures(BaseModel):
    model_config = ConfigDict(extra="forbid")

    def number(self, name: str) -> float:
        """The value of a figure."""
        return float(getattr(self, name).value)


class PrelabelFigures(_Figures):
    """Labelling many volumes.

    Attributes:
        volumes: How many there are.
        read_seconds, compute_seconds, write_seconds: Of a usual volume, on one slot of the stage that nobody shares.
        spread: Standard deviation of the logarithm of a volume's size: all three stages grow with it.
        read_mb, write_mb: Megabytes of a usual volume.
        nodes: Machines.
        gpus: Of each of them.
        actors: That share one GPU; together they compute as fast as one alone.
        readers, writers: Threads of each machine.
        waiting: Volumes of each machine that may lie between two stages.
        storage_mb_per_second: All machines together.
        slow_share, slow_times: Share of the machines that take so many times as long.
        hours_between_failures: Of one machine, on average; 0 for never.
        restart_seconds: Until it is back, with its weights.
        error_share: Of the tries of a volume that fail.
        tries: Of a volume before it is given up.
        stealing: 1 if a machine with nothing to do takes over volumes of others, 0 if each keeps its share.
    """

    volumes: Count
    read_seconds: Amount
    compute_seconds: Positive
    write_seconds: Amount
    spread: Amount
    read_mb: Amount
    write_mb: Amount
    nodes: Count
    gpus: Count
    actors: Count
    readers: Count
    writers: Count
    waiting: CountOrNone
    storage_mb_per_second: Positive
    slow_share: Share
    slow_times: Positive
    hours_between_failures: Amount
    restart_seconds: Amount
    error_share: Share
    tries: Count
    stealing: Switch


class TrainingFigures(_Figures):
    """Training on several GPUs.

    Attributes:
        slices: That are to be learned from, counted as often as they are drawn.
        slices_per_step: Of one GPU.
        compute_seconds: Of a step on one GPU.
        jitter: Standard deviation of the logarithm of it, from step to step.
        data_slices_per_second: That the processor of one machine draws and augments for one GPU; 0 where that happens
            on the GPU and is part of `compute_seconds`.
        gradients_mb: That are exchanged after a step.
        link_gb_per_second: Of the slowest link between two GPUs.
        hidden_share: Of the exchange that runs behind the computation.
        gpus: How many.
        slow_gpus, slow_times: How many of them take so many times as long.
        validate_every_steps, validate_seconds: How often, and how long it takes on one GPU; it is shared among them.
        checkpoint_every_steps, checkpoint_seconds: The same; one GPU writes and the others wait.
        hours_between_failures: Of one GPU, on average; 0 for never.
        restart_seconds: Until the training goes on from the last checkpoint.
    """

    slices: Count
    slices_per_step: Count
    compute_seconds: Positive
    jitter: Amount
    data_slices_per_second: Amount
    gradients_mb: Amount
    link_gb_per_second: Positive
    hidden_share: Share
    gpus: Count
    slow_gpus: CountOrNone
    slow_times: Positive
    validate_every_steps: Count
    validate_seconds: Amount
    checkpoint_every_steps: Count
    checkpoint_seconds: Amount
    hours_between_failures: Amount
    restart_seconds: Amount


class Inputs(BaseModel):
    """A file of figures.

    Attributes:
        prelabel, training: What is to be simulated; None for what is not.
    """

    model_config = ConfigDict(extra="forbid")

    prelabel: PrelabelFigures | None = None
    training: TrainingFigures | None = None
    title: str = Field(default="")


@dataclass
class _Node:
    """A machine at work.

    Attributes:
        times: How many times as long it takes.
        epoch: Counts its failures: what was under way before one is not finished after it.
        busy: Slots in use, by stage.
        waiting: Volumes after each stage that wait for the next one.
        share: Volumes that are its own.
        active: Volumes that it has begun.
    """

    times: float
    epoch: int = 0
    is_up: bool = True
    busy: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    waiting: dict[str, deque[int]] = field(default_factory=lambda: {"compute": deque(), "write": deque()})
    share: deque[int] = field(default_factory=deque)
    active: set[int] = field(default_factory=set)


class PrelabelRun:
    """One simulated run.

    Args:
        figures: Of the job and the cluster.
        seed: Of sizes, failures and which machines are slow.

    Attributes:
        done, given_up: Volumes.
        redone: Volumes that were begun again because a machine failed.
        failures: Of machines.
        retries: Of volumes.
        busy_seconds: By stage, of all slots.
    """

    def __init__(self, figures: PrelabelFigures, seed: int = 0) -> None:
        self.figures = figures
        number = figures.number
        self._volumes = int(number("volumes"))
        self._rng = np.random.default_rng(seed)
        spread = number("spread")
        # The mean is that of a usual volume, whatever the spread.
        self._sizes = np.exp(self._rng.normal(-(spread**2) / 2, spread, self._volumes))
        nodes = int(number("nodes"))
        slow = round(number("slow_share") * nodes)
        self._nodes = [_Node(number("slow_times") if place < slow else 1.0) for place in range(nodes)]
        self._slots = {
            "read": int(number("readers")),
            "compute": int(number("gpus") * number("actors")),
            "write": int(number("writers")),
        }
        self._seconds = {stage: number(f"{stage}_seconds") for stage in STAGES}
        self._seconds["compute"] *= number("actors")
        self._mb = {"read": number("read_mb"), "write": number("write_mb")}
        self._tries = np.zeros(self._volumes, np.int64)
        self._common: deque[int] = deque()
        self._share_out()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._storage_free = 0.0
        self.now = 0.0
        self.done = self.given_up = self.redone = self.failures = self.retries = 0
        self.busy_seconds = dict.fromkeys(STAGES, 0.0)

    def _share_out(self) -> None:
        if self.figures.number("stealing"):
            self._common.extend(range(self._volumes))
            return
        for volume in range(self._volumes):
            self._nodes[volume % len(self._nodes)].share.append(volume)

    def run(self) -> float:
        """Simulate to the end. Returns seconds.

        Raises:
            NeverEndsError: if machines fail before they get anything done.
        """
        for node in self._nodes:
            self._plan_failure(node)
            self._feed(node)
        while self.done + self.given_up < self._volumes:
            self.now, _, act = heapq.heappop(self._events)
            act()
            if self.redone > MOST_TIMES_REDONE * self._volumes:
                raise NeverEndsError(
                    "The machines fail more often than they get volumes done, and the job would never end. Give more "
                    "hours_between_failures."
                )
        return self.now

    def count_slots(self, stage: str) -> int:
        """Of all machines."""
        return self._slots[stage] * len(self._nodes)

    def _at(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, act))

    def _feed(self, node: _Node) -> None:
        """Begin what can be begun on a machine."""
        if not node.is_up:
            return
        room = int(self.figures.number("waiting"))
        for stage in ("write", "compute"):
            # A stage that has nowhere to put a volume begins none: what waits stays bounded.
            while node.waiting[stage] and node.busy[stage] < self._slots[stage] and self._has_room(node, stage, room):
                self._begin(node, stage, node.waiting[stage].popleft())
        queue = node.share or self._common
        while queue and node.busy["read"] < self._slots["read"] and self._has_room(node, "read", room):
            volume = queue.popleft()
            node.active.add(volume)
            self._begin(node, "read", volume)
            queue = node.share or self._common

    def _has_room(self, node: _Node, stage: str, room: int) -> bool:
        following = {"read": "compute", "compute": "write"}.get(stage)
        return following is None or len(node.waiting[following]) + node.busy[stage] < room + self._slots[following]

    def _begin(self, node: _Node, stage: str, volume: int) -> None:
        size = float(self._sizes[volume])
        seconds = self._seconds[stage] * size * node.times
        if stage in self._mb:
            # One after the other through the storage: nobody gets more than all of it together.
            rate = self.figures.number("storage_mb_per_second")
            self._storage_free = max(self._storage_free, self.now) + self._mb[stage] * size / rate
            seconds = max(seconds, self._storage_free - self.now)
        node.busy[stage] += 1
        self.busy_seconds[stage] += seconds
        epoch = node.epoch
        self._at(seconds, lambda: self._finish(node, epoch, stage, volume))

    def _finish(self, node: _Node, epoch: int, stage: str, volume: int) -> None:
        if node.epoch != epoch:
            return
        node.busy[stage] -= 1
        following = {"read": "compute", "compute": "write"}.get(stage)
        if stage == "compute" and self._rng.random() < self.figures.number("error_share"):
            self._try_again(node, volume)
        elif following is not None:
            node.waiting[following].append(volume)
        else:
            node.active.discard(volume)
            self.done += 1
        self._feed(node)

    def _try_again(self, node: _Node, volume: int) -> None:
        node.active.discard(volume)
        self._tries[volume] += 1
        if self._tries[volume] >= self.figures.number("tries"):
            self.given_up += 1
            return
        self.retries += 1
        self._return([volume], node)

    def _return(self, volumes: Iterable[int], node: _Node) -> None:
        (self._common if self.figures.number("stealing") else node.share).extend(volumes)

    def _plan_failure(self, node: _Node) -> None:
        hours = self.figures.number("hours_between_failures")
        if hours > 0:
            self._at(float(self._rng.exponential(hours * 3600)), lambda: self._fail(node))

    def _fail(self, node: _Node) -> None:
        """A machine is lost, and comes back later with nothing of what it had begun."""
        self.failures += 1
        self.redone += len(node.active)
        node.epoch += 1
        node.is_up = False
        node.busy = dict.fromkeys(STAGES, 0)
        for queue in node.waiting.values():
            queue.clear()
        self._return(sorted(node.active), node)
        node.active.clear()
        self._at(self.figures.number("restart_seconds"), lambda: self._come_back(node))
        for other in self._nodes:  # Whoever had nothing to do has now.
            self._feed(other)

    def _come_back(self, node: _Node) -> None:
        node.is_up = True
        self._plan_failure(node)
        self._feed(node)


def simulate_prelabel(figures: PrelabelFigures, seed: int = 0) -> dict[str, Any]:
    """Hours of a job and where they went."""
    run = PrelabelRun(figures, seed)
    seconds = run.run()
    number = figures.number
    cards = number("nodes") * number("gpus")
    busy = {stage: run.busy_seconds[stage] / (run.count_slots(stage) * seconds) for stage in STAGES}
    moved = number("volumes") * (number("read_mb") + number("write_mb"))
    busy["storage"] = moved / number("storage_mb_per_second") / seconds
    # As many volumes as are done, without failure, waiting or a slow machine.
    least = number("volumes") * max(
        number("compute_seconds") / cards,
        number("read_seconds") / (number("nodes") * number("readers")),
        number("write_seconds") / (number("nodes") * number("writers")),
        (number("read_mb") + number("write_mb")) / number("storage_mb_per_second"),
    )
    return {
        "hours": round(seconds / 3600, 3),
        "gpu_hours": round(cards * seconds / 3600, 1),
        "volumes_per_hour": round(run.done / seconds * 3600, 1),
        "least_hours": round(least / 3600, 3),
        "busy": {name: round(share, 3) for name, share in busy.items()},
        "bottleneck": max(busy, key=lambda name: busy[name]),
        "done": run.done,
        "given_up": run.given_up,
        "retries": run.retries,
        "machine_failures": run.failures,
        "begun_again": run.redone,
    }


def simulate_training(figures: TrainingFigures, seed: int = 0) -> dict[str, Any]:
    """Hours of a training and where they went."""
    number = figures.number
    gpus = int(number("gpus"))
    steps = math.ceil(number("slices") / (number("slices_per_step") * gpus))
    rng = np.random.default_rng(seed)
    times = np.ones(gpus)
    times[: int(number("slow_gpus"))] = number("slow_times")
    rate = number("data_slices_per_second")
    data = number("slices_per_step") / rate if rate > 0 else 0.0
    exchange = _exchange_seconds(figures, gpus)
    compute_total = wait_for_data = wait_for_slowest = 0.0
    jitter = number("jitter")
    for first in range(0, steps, 10_000):
        shape = (min(10_000, steps - first), gpus)
        compute = number("compute_seconds") * times * np.exp(rng.normal(-(jitter**2) / 2, jitter, shape))
        # Slices are drawn ahead of the step that takes them: whichever takes longer counts.
        ready = np.maximum(compute, data)
        compute_total += float(compute.mean(axis=1).sum())
        wait_for_data += float((ready - compute).mean(axis=1).sum())
        wait_for_slowest += float((ready.max(axis=1) - ready.mean(axis=1)).sum())
    parts = {
        "compute": compute_total,
        "waiting for slices": wait_for_data,
        "waiting for the slowest GPU": wait_for_slowest,
        "exchanging gradients": exchange * steps,
        "validation": steps // number("validate_every_steps") * number("validate_seconds") / gpus,
        "checkpoints": steps // number("checkpoint_every_steps") * number("checkpoint_seconds"),
    }
    undisturbed = sum(parts.values())
    failures, lost = _lose_to_failures(figures, gpus, undisturbed, undisturbed / steps, rng)
    parts["failures"] = lost
    seconds = undisturbed + lost
    ideal = number("slices") / number("slices_per_step") * number("compute_seconds") / gpus
    return {
        "hours": round(seconds / 3600, 3),
        "gpu_hours": round(gpus * seconds / 3600, 2),
        "steps": steps,
        "slices_per_second": round(number("slices") / seconds, 1),
        "efficiency": round(ideal / seconds, 3),
        "shares": {name: round(part / seconds, 4) for name, part in parts.items()},
        "bottleneck": max(parts, key=lambda name: parts[name]),
        "failures": failures,
    }


def _exchange_seconds(figures: TrainingFigures, gpus: int) -> float:
    """What of a ring's all-reduce is not hidden: every GPU sends 2 (n - 1) / n of the gradients."""
    sent = 2 * (gpus - 1) / gpus * figures.number("gradients_mb") / 1000
    return (1 - figures.number("hidden_share")) * sent / figures.number("link_gb_per_second")


def _lose_to_failures(
    figures: TrainingFigures, gpus: int, seconds: float, step: float, rng: np.random.Generator
) -> tuple[int, float]:
    """How often the training starts again, and the seconds that this costs: one failed GPU ends it for all.

    Raises:
        NeverEndsError: if that costs more than any training is worth.
    """
    hours = figures.number("hours_between_failures")
    if hours <= 0:
        return 0, 0.0
    between = figures.number("checkpoint_every_steps") * step
    failures, lost, at = 0, 0.0, float(rng.exponential(hours * 3600 / gpus))
    while at < seconds + lost:
        failures += 1
        lost += float(rng.uniform(0, between)) + figures.number("restart_seconds")
        at += float(rng.exponential(hours * 3600 / gpus))
        if lost > 100 * seconds:
            raise NeverEndsError(
                "The training fails more often than it gets from one checkpoint to the next, and would never end. Give "
                "more hours_between_failures, or fewer checkpoint_every_steps."
            )
    return failures, lost


VARIED = {
    "prelabel": (
        "read_seconds", "compute_seconds", "write_seconds", "nodes", "readers", "storage_mb_per_second", "slow_share",
        "hours_between_failures",
    ),
    "training": (
        "compute_seconds", "data_slices_per_second", "link_gb_per_second", "hidden_share", "jitter",
        "hours_between_failures",
    ),
}  # fmt: skip
"""What is halved and doubled."""


def vary(job: str, figures: _Figures, simulate: Callable[[Any], dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Hours with one figure halved and doubled, the others as they are; None where the job would never end."""
    found: dict[str, dict[str, float | None]] = {}
    for name in VARIED[job]:
        value = figures.number(name)
        if value == 0:
            continue
        tried: dict[str, float | None] = {}
        for factor in (0.5, 2.0):
            # There is no half machine, and no share beyond all.
            changed = max(1.0, round(value * factor)) if name in ("nodes", "readers") else value * factor
            changed = min(1.0, changed) if name.endswith("_share") else changed
            figure = getattr(figures, name).model_copy(update={"value": changed})
            try:
                tried[f"{changed:g}"] = simulate(figures.model_copy(update={name: figure}))["hours"]
            except NeverEndsError:
                tried[f"{changed:g}"] = None
        found[name] = tried
    return found


def read_inputs(path: Path) -> Inputs:
    """A file of figures.

    Raises:
        SystemExit: saying what is wrong with it.
    """
    try:
        inputs = Inputs.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise SystemExit(f"'{path}' cannot be read ({err}). benchmarks/cluster/figures.toml is one that can.") from err
    except ValidationError as err:
        first = err.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SystemExit(
            f"'{path}': {place}: {first['msg'].removeprefix('Value error, ')}. Every figure is "
            '{value = ..., origin = "measured" or "assumed", note = "..."}, see benchmarks/cluster/figures.toml.'
        ) from err
    if inputs.prelabel is None and inputs.training is None:
        raise SystemExit(f"'{path}' has neither [prelabel] nor [training]. See benchmarks/cluster/figures.toml.")
    return inputs


def replace_figure(inputs: Inputs, name: str, value: float, origin: str, note: str) -> Inputs:
    """One figure changed, named as ``job.figure``.

    Raises:
        SystemExit: if there is none of this name, or it cannot have this value.
    """
    job, _, figure = name.partition(".")
    figures = getattr(inputs, job, None) if job in VARIED else None
    if figures is None or figure not in type(figures).model_fields:
        raise SystemExit(f"There is no figure '{name}'; they are named as in the file, for example prelabel.nodes.")
    known = {"value": value, "origin": origin, "note": note}
    try:
        changed = type(figures).model_validate({**figures.model_dump(), figure: known})
    except ValidationError as err:
        raise SystemExit(f"{name}: {err.errors()[0]['msg'].removeprefix('Value error, ')}.") from err
    return inputs.model_copy(update={job: changed})


def read_pairs(pairs: Sequence[str]) -> dict[str, str]:
    """``name=value`` as a mapping.

    Raises:
        SystemExit: if something is none.
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value:
            raise SystemExit(f"'{pair}' should be a figure and what it is, for example prelabel.nodes=4.")
        found[name] = value
    return found


def take_from_json(inputs: Inputs, file: Path, pairs: Sequence[str]) -> Inputs:
    """Figures from a JSON file of measurements: ``job.figure=way/to/the/number``."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise SystemExit(f"'{file}' cannot be read ({err}). Name a JSON file of measurements.") from err
    for name, way in read_pairs(pairs).items():
        value = content
        for step in way.split("/"):
            value = _go(value, step)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise SystemExit(f"'{file}' has no number at '{way}'. Names on the way to it are joined by '/'.")
        inputs = replace_figure(inputs, name, float(value), "measured", f"{file.name}: {way}")
    return inputs


def _go(value: Any, step: str) -> Any:
    """What an object has under a name, or a list at a place; None if nothing."""
    if isinstance(value, dict):
        return value.get(step)
    return value[int(step)] if isinstance(value, list) and step.isdecimal() and int(step) < len(value) else None


def take_from_report(inputs: Inputs, file: Path) -> Inputs:
    """The seconds of each stage from a report of `progidiff prelabel`, and how much volumes differ.

    Raises:
        SystemExit: if it is none, or nothing was labelled in that run.
    """
    import pyarrow
    import pyarrow.parquet

    columns = [f"{stage}_seconds" for stage in STAGES]
    try:
        table = pyarrow.parquet.read_table(file, columns=columns).to_pydict()
    except (OSError, pyarrow.ArrowException) as err:
        raise SystemExit(f"'{file}' cannot be read ({err}). Name the report of a run of progidiff prelabel.") from err
    if missing := sorted(set(columns) - set(table)):
        raise SystemExit(f"'{file}' has no {missing[0]}. Name the report of a run of progidiff prelabel.")
    for name in columns:
        values = np.array([value for value in table[name] if value], float)
        if len(values) == 0:
            raise SystemExit(f"'{file}' has no {name}: nothing was labelled in that run.")
        note = f"{file.name}: mean of {len(values)} volumes"
        inputs = replace_figure(inputs, f"prelabel.{name}", float(values.mean()), "measured", note)
        if name == "compute_seconds":
            spread = float(np.log(values).std())
            inputs = replace_figure(inputs, "prelabel.spread", spread, "measured", note)
    return inputs


def list_assumed(inputs: Inputs) -> list[str]:
    """The names of figures that nobody has measured."""
    found = []
    for job in VARIED:
        figures = getattr(inputs, job)
        names = [] if figures is None else type(figures).model_fields
        found += [f"{job}.{name}" for name in names if getattr(figures, name).origin == "assumed"]
    return found


def simulate(inputs: Inputs, seed: int = 0) -> dict[str, Any]:
    """Everything that a file asks for."""
    found: dict[str, Any] = {"title": inputs.title}
    jobs: Mapping[str, tuple[_Figures | None, Callable[[Any], dict[str, Any]]]] = {
        "prelabel": (inputs.prelabel, lambda figures: simulate_prelabel(figures, seed)),
        "training": (inputs.training, lambda figures: simulate_training(figures, seed)),
    }
    for job, (figures, work) in jobs.items():
        if figures is not None:
            used = {name: getattr(figures, name).value for name in type(figures).model_fields}
            found[job] = {**work(figures), "hours_if": vary(job, figures, work), "figures": used}
    return {**found, "assumed": list_assumed(inputs)}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="a TOML file like benchmarks/cluster/figures.toml")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIGURE=VALUE", help="a figure, which counts as assumed"
    )
    parser.add_argument(
        "--take", nargs="+", action="append", default=[], metavar="ARGUMENT", help="a JSON file, then FIGURE=WAY/TO/IT"
    )
    parser.add_argument("--report", type=Path, help="the Parquet report of a run of progidiff prelabel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    inputs = read_inputs(options.figures)
    if options.report is not None:
        inputs = take_from_report(inputs, options.report)
    for file, *pairs in options.take:
        inputs = take_from_json(inputs, Path(file), pairs)
    for name, text in read_pairs(options.set).items():
        try:
            inputs = replace_figure(inputs, name, float(text), "assumed", "given on the command line")
        except ValueError as err:
            raise SystemExit(f"'{text}' is no number; {name} is one.") from err
    command = shlex.join(["python", *sys.argv]) if arguments is None else ""
    try:
        text = json.dumps({"command": command, **simulate(inputs, options.seed)}, indent=1)
    except NeverEndsError as err:
        raise SystemExit(str(err)) from err
    print(text)
    if options.out is not None:
        try:
            options.out.write_text(text + "\n", encoding="utf-8")
        except OSError as err:
            raise SystemExit(f"'{options.out}' cannot be written ({err}). Name another file with --out.") from err


if __name__ == "__main__":
    main()
