"""Progress of long commands on standard error: bars on a terminal, plain lines elsewhere, where a bar would say nothing
or fill a log file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

EVERY_S = 10.0
"""Seconds between two plain lines about the same thing."""

Count = Callable[[int, int], None]
"""Called with (done, in all)."""
CountCases = Callable[[int, int, str, int, int], None]
"""Called with (cases done, cases in all, name of the case at hand, slices of it done, slices in all)."""

console = Console(stderr=True)


def is_terminal() -> bool:
    """Whether a person may be watching."""
    return sys.stderr.isatty()


@contextmanager
def show_count(name: str, unit: str) -> Iterator[Count]:
    """How much of one thing is done.

    Args:
        name: What is worked on.
        unit: What is counted, in the plural.
    """
    if is_terminal():
        with _open_bar(unit) as bar:
            task = bar.add_task(name, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    lines = _Lines()
    yield lambda done, total: lines.tell(f"{name}: {done} of {total} {unit}", is_last=done >= total)


@contextmanager
def show_cases(unit: str = "slices") -> Iterator[CountCases]:
    """How many of several cases are done, and how much of the one at hand: a line for each where no bar can be seen."""
    if is_terminal():
        with _open_bar(unit) as bar:
            whole = bar.add_task("cases", total=None)
            single = bar.add_task("", total=None)

            def draw(number: int, count: int, name: str, done: int, total: int) -> None:
                bar.update(whole, completed=number, total=count)
                bar.update(single, description=name, completed=done, total=total)

            yield draw
        return
    begun, started = "", time.monotonic()

    def write(number: int, count: int, name: str, done: int, total: int) -> None:
        nonlocal begun, started
        if name == begun:
            return
        if begun:
            typer.echo(f"{number}/{count} {begun}: {time.monotonic() - started:.1f} s", err=True)
        begun, started = name, time.monotonic()

    yield write


def make_step_report() -> Callable[[Mapping[str, Any]], None] | None:
    """Takes the log entries of a training, with "stage", and "step", "total" and figures where there are; None on a
    terminal, where the training draws a bar itself.
    """
    if is_terminal():
        return None
    lines = _Lines()

    def report(entry: Mapping[str, Any]) -> None:
        stage = str(entry.get("stage", ""))
        if "step" not in entry:
            lines.tell(stage, is_last=True)
            return
        step, total = int(entry["step"]), int(entry.get("total", 0))
        loss = f", loss {entry['loss']:.4f}" if isinstance(entry.get("loss"), float) else ""
        left = f", {entry['eta_seconds'] / 60:.0f} min left" if isinstance(entry.get("eta_seconds"), float) else ""
        lines.tell(f"{stage}: step {step} of {total}{loss}{left}", is_last=step >= total)

    return report


class _Lines:
    """Plain lines, at most one in `EVERY_S` seconds, the last of each thing always, none twice."""

    def __init__(self) -> None:
        self._told = ""
        self._at = time.monotonic()

    def tell(self, line: str, is_last: bool) -> None:
        if line == self._told or not (is_last or time.monotonic() - self._at >= EVERY_S):
            return
        self._told, self._at = line, time.monotonic()
        typer.echo(line, err=True)


@contextmanager
def _open_bar(unit: str) -> Iterator[Progress]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        yield bar
