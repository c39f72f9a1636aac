"""Reading, computing and writing at the same time on one machine.

Threads read ahead and write behind while this thread asks the model. Back-pressure: as many images as there are readers
and `prefetch` together may be read or waiting, and as many as there are writers and `prefetch` written or waiting; a
slow disk holds the model up, and a slow model the readers, instead of filling memory.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from progidiff.errors import RequestError
from progidiff.evaluation.prelabel import Answered, ImageOutcome, Item, Opened, Prelabeller, PrelabelSettings
from progidiff.prelabelling.claims import Claims, Supply
from progidiff.prelabelling.report import ParquetReport
from progidiff.proposals.engine import Engine

POLL_SECONDS = 0.5
"""Between two looks at what others have in hand, when nothing else is left."""

_SHARE = re.compile(r"(\d+(?:\.\d+)?)\s*%")


class Source(Protocol):
    """Where the next image comes from."""

    def take(self) -> Item | None:
        """The next image; None if there is none just now."""

    @property
    def is_empty(self) -> bool:
        """Whether there will be none any more."""


@dataclass(frozen=True)
class Job:
    """All that a `Prelabeller` is made of, so that another process can make one.

    Attributes:
        model: Folder of the model.
        settings: What is asked.
        backbone, device: As for `Engine`.
        studies, store, out, retries, pause: As for `Prelabeller`.
    """

    model: Path
    settings: PrelabelSettings
    backbone: str | None = None
    device: str | None = None
    studies: Path | None = None
    store: Path | None = None
    out: str | None = None
    retries: int = 2
    pause: float = 1.0

    def make(self) -> Prelabeller:
        """Make one; networks are loaded when the first image is computed."""
        engine = Engine(self.model, backbone=self.backbone, device=self.device)
        return Prelabeller(engine, self.studies, self.settings, self.store, self.out, self.retries, self.pause)


@dataclass(frozen=True)
class Depths:
    """How much goes on at the same time.

    Attributes:
        readers, writers: Threads.
        prefetch: Images that wait in front of the model, and as many behind it.
    """

    readers: int = 2
    writers: int = 1
    prefetch: int = 2


def run_stages(prelabeller: Prelabeller, source: Source, depths: Depths) -> Iterator[ImageOutcome]:
    """Label what a source gives, in the order in which images get done. Whoever closes the iterator early gets what was
    computed written, and what was only read dropped.

    Raises:
        ModelError: if the model cannot be used.
        StoreError: if the disk is full.
    """
    reads: list[Future[Opened | ImageOutcome]] = []
    writes: set[Future[ImageOutcome]] = set()
    with (
        ThreadPoolExecutor(depths.readers, "read") as readers,
        ThreadPoolExecutor(depths.writers, "write") as writers,
    ):
        try:
            while True:
                while len(reads) < depths.readers + depths.prefetch and (item := source.take()) is not None:
                    reads.append(readers.submit(prelabeller.read, item))
                if not reads and not writes:
                    if source.is_empty:
                        return
                    time.sleep(POLL_SECONDS)
                    continue
                yield from _collect(writes, depths.writers + depths.prefetch if reads else 0)
                if not reads:
                    continue
                opened = _next_opened(reads)
                if isinstance(opened, ImageOutcome):
                    yield opened
                    continue
                answered = prelabeller.compute(opened)
                del opened  # Its voxels are not needed while the next image is waited for.
                if isinstance(answered, Answered):
                    writes.add(writers.submit(prelabeller.write, answered))
                else:
                    yield answered
        finally:
            for future in reads:
                future.cancel()


def _collect(writes: set[Future[ImageOutcome]], most: int) -> Iterator[ImageOutcome]:
    """What is written; waits until at most so many are not."""
    done = {future for future in writes if future.done()}
    while len(writes) - len(done) > most:
        done |= wait(writes - done, return_when=FIRST_COMPLETED).done
    writes -= done
    for future in done:
        yield future.result()


def _next_opened(reads: list[Future[Opened | ImageOutcome]]) -> Opened | ImageOutcome:
    """The first that is read; of several, the one that began first."""
    done = wait(reads, return_when=FIRST_COMPLETED).done
    future = next(future for future in reads if future in done)
    reads.remove(future)
    return future.result()


def record(
    outcomes: Iterable[ImageOutcome],
    report: ParquetReport,
    supply: Supply,
    claims: Claims,
    budget: int | None,
    show: Callable[[ImageOutcome], None],
) -> None:
    """Follow a run to its end: report every outcome, and end the run when too many images fail.

    Args:
        outcomes: As they come.
        report: Gets a row for each.
        supply: Where the run takes images from.
        claims: Tells the other processes; counts what failed there, too.
        budget: How many images may fail in all; None for any number.
        show: Told each outcome.

    Raises:
        RequestError: if more failed, here or in another process; everything that was begun is finished and reported.
    """
    for outcome in outcomes:
        report.add(outcome)
        show(outcome)
        if outcome.state != "failed":
            continue
        claims.fail(outcome.image)
        failed = claims.count_failed()
        if budget is not None and failed > budget and not claims.find_stop():
            claims.stop(
                f"The run was ended: {failed} images failed, and --max-failures allows {budget}; the last one was "
                f"'{outcome.image}': {outcome.reason} What is done is kept, and the report says why the others failed. "
                "Mend that and give the same command again, or allow more."
            )
            supply.end()
    report.flush()
    reason = claims.find_stop()
    if reason:
        raise RequestError(reason)


def parse_budget(text: str | None, total: int) -> int | None:
    """How many images may fail.

    Args:
        text: A number, or a share like "5%" of all images; None for any number.
        total: All images.

    Raises:
        RequestError: if it is neither.

    Example:
        >>> parse_budget("5%", 1000), parse_budget("0", 10), parse_budget(None, 10)
        (50, 0, None)
    """
    if text is None:
        return None
    share = _SHARE.fullmatch(text.strip())
    if share is not None and float(share[1]) <= 100:
        return math.floor(float(share[1]) / 100 * total)
    if text.strip().isdecimal():
        return int(text)
    raise RequestError(f"--max-failures '{text[:40]}' must be a number of images, or a share like 5%.")
