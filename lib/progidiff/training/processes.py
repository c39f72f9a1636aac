"""The processes that share one training: those that ``accelerate launch`` started, or this one alone.

What is shared is the batch, not the networks: every process holds all weights, computes its part of the micro-batches
of a step, and the gradients are summed. Two ways lead there. *exact* sums them by hand after the backward pass, in one
order, on whatever device; *overlapped* leaves it to `DistributedDataParallel` while the backward pass runs
(`loop.run_loop` decides). accelerate's own `Accelerator` fixes device and precision once per Python process, which a
server that trains one model after the other cannot use; its `PartialState` is all that is needed. Preparation and
validation are shared as well: `Team.share` says whose part is whose, `Team.gather` puts the parts together.

A process that dies or hangs would leave the others waiting, on NCCL without a word. So each tells a small store twice a
second that it is there, in a thread that needs neither the device nor the main thread, and ends with a message when
another one has been silent for `LOST_AFTER` while all are needed. Waiting itself is no sign of a loss: the others may
wait long for the first one's files.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from progidiff.errors import ModelError, RequestError

logger = logging.getLogger(__name__)

T = TypeVar("T")

BUCKET = 1 << 24
"""Gradients are summed in pieces of about so many numbers: one message for many small layers, no copy of all
gradients.
"""

TIMEOUT = timedelta(hours=2)
"""How long a process waits for others that are there and do not come; the first one writes files meanwhile."""

LOST_AFTER = 30.0
"""Seconds of silence after which a process counts as lost."""

LOST_STATUS = 75
"""What a process exits with that has lost another one: try again."""


class Team:
    """This process and those it trains with.

    Attributes:
        index: 0 for the process that validates, reports and writes files.
        count: How many there are.
        device: Where this process computes ("cuda:1"); None to leave the choice to the backbone.
        watch: Knows whether the others are there; None where there are none.
    """

    def __init__(
        self, index: int = 0, count: int = 1, device: str | None = None, watch: LifeWatch | None = None
    ) -> None:
        self.index = index
        self.count = count
        self.device = device
        self.watch = watch

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """In the block all processes are needed: when one is lost, this one ends.

        Raises:
            ModelError: if a process was lost and that was noticed by an exchange that failed; where an exchange waits
                for ever, this process exits with `LOST_STATUS`.
        """
        if self.watch is None:
            yield
            return
        with self.watch.watching():
            try:
                yield
            except RuntimeError as err:
                lost = self.watch.find_lost() if _is_of_exchange(err) else None
                if lost is None:
                    raise
                raise ModelError(lost) from err

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            with self.together():
                torch.distributed.barrier()

    def share(self, parts: Sequence[T]) -> list[T]:
        """The parts of a work that this process does."""
        return list(parts[self.index :: self.count])

    def gather(self, value: T) -> list[T]:
        """What each process says, in their order; values that can be pickled."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        with self.together():
            torch.distributed.all_gather_object(found, value)
        return found

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through the block before the others do; what it leaves on disk, they find."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def agree(self, answer: bool, device: torch.device) -> bool:
        """What the first process answers, for all."""
        if self.count == 1:
            return answer
        told = torch.tensor([float(answer)], device=device)
        torch.distributed.broadcast(told, 0)
        return bool(told.item())

    def check_same(self, value: int, what: str, device: torch.device) -> None:
        """Refuse to go on if the processes do not all see the same number.

        Raises:
            RequestError: on all of them.
        """
        if self.count == 1:
            return
        extremes = torch.tensor([value, -value], dtype=torch.float64, device=device)
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
        if extremes[0] != -extremes[1]:
            raise RequestError(
                f"The processes do not see the same {what} ({int(-extremes[1])} to {int(extremes[0])}); put the work "
                "folder on a disk that all share."
            )

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes.

        A parameter that no process used keeps no gradient, as it would in one process.
        """
        if self.count == 1:
            return
        everything = list(parameters)
        count = torch.tensor([float(p.grad is not None) for p in everything], device=everything[0].device)
        torch.distributed.all_reduce(count)
        used = count.tolist()
        bucket: list[Tensor] = []
        for parameter, count in zip(everything, used, strict=True):
            if not count:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if bucket and (sum(g.numel() for g in bucket) >= BUCKET or bucket[0].dtype != parameter.grad.dtype):
                _sum_bucket(bucket)
                bucket = []
            bucket.append(parameter.grad)
        if bucket:
            _sum_bucket(bucket)

    def share_weights(self, parameters: Iterable[Tensor]) -> None:
        """Give every process the weights of the first."""
        if self.count > 1:
            for parameter in parameters:
                torch.distributed.broadcast(parameter.detach(), 0)


class LifeWatch:
    """Tells the other processes that this one is there, and notices when one of them is not.

    Args:
        index, count: Of this process, and how many there are.
        store: A `torch.distributed.TCPStore` of this watch alone; the first process holds it.
    """

    def __init__(self, index: int, count: int, store: Any) -> None:
        self._index, self._count, self._store = index, count, store
        self._needed = 0
        self._is_closed = threading.Event()
        now = time.monotonic()
        self._last = {other: (b"", now) for other in range(count) if other != index}
        # The first talks to the store, which may not answer; the second only looks at what was heard.
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
        for thread in self._threads:
            thread.start()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the block lasts, a lost process ends this one."""
        self._needed += 1
        try:
            yield
        finally:
            self._needed -= 1

    def find_lost(self) -> str | None:
        """Which process is gone, after an exchange failed; None if all are heard of."""
        patience = min(5.0, LOST_AFTER)
        ends = time.monotonic() + 2 * patience
        while time.monotonic() < ends:
            lost = self._describe_lost(patience)
            if lost is not None:
                return lost
            time.sleep(0.1)
        return None

    def close(self) -> None:
        """Say good-bye, so that the others need not wait to find out."""
        self._is_closed.set()
        # The interpreter aborts if it ends while a thread talks to the store, which may be slow to answer.
        for thread in self._threads:
            thread.join(timeout=min(10.0, LOST_AFTER))
        with contextlib.suppress(RuntimeError):  # the store has gone with the first process
            self._store.set(f"beat/{self._index}", "left")

    def _talk(self) -> None:
        beat = 0
        while not self._is_closed.wait(min(0.5, LOST_AFTER / 10)):
            beat += 1
            # Silence is what a store that cannot be reached means, too.
            with contextlib.suppress(RuntimeError):
                self._store.set(f"beat/{self._index}", str(beat))
                for other, (before, _) in self._last.items():
                    said = self._store.get(f"beat/{other}") if self._store.check([f"beat/{other}"]) else b""
                    if said != before:
                        self._last[other] = (said, time.monotonic())

    def _judge(self) -> None:
        while not self._is_closed.wait(min(0.5, LOST_AFTER / 10)):
            if not self._needed or self._describe_lost(LOST_AFTER) is None:
                continue
            # The main thread may wait in an exchange that never ends, where no exception reaches it. If its exchange
            # has failed, it says the same itself, and gets the time to.
            if self._is_closed.wait(min(5.0, LOST_AFTER)):
                return
            lost = self._describe_lost(LOST_AFTER)
            if self._needed and lost is not None:
                logger.critical("%s", lost)
                logging.shutdown()
                os._exit(LOST_STATUS)

    def _describe_lost(self, patience: float) -> str | None:
        now = time.monotonic()
        for other, (said, heard) in self._last.items():
            if said == b"left" or now - heard > patience:
                how = "has ended" if said == b"left" else f"has not been heard of for {now - heard:.0f} seconds"
                return (
                    f"Process {other} of {self._count} {how}, so process {self._index} ends too. Look for the last "
                    "message of that process; the same command continues the training at its last checkpoint."
                )
        return None


def _is_of_exchange(error: RuntimeError) -> bool:
    """Whether an error is one of NCCL or gloo, which has no class for its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _open_watch(index: int, count: int) -> LifeWatch:
    """A watch with a store of its own on the host of the first process, at a port that is free there."""
    make_store: Any = partial(
        torch.distributed.TCPStore,  # type: ignore[attr-defined]
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        timeout=timedelta(seconds=LOST_AFTER),
        wait_for_workers=False,
    )
    store = make_store(0, is_master=True) if index == 0 else None
    port: list[Any] = [None if store is None else store.port]
    torch.distributed.broadcast_object_list(port, 0)
    return LifeWatch(index, count, make_store(port[0], is_master=False) if store is None else store)


@lru_cache(maxsize=1)
def _join() -> Team:
    from accelerate import PartialState

    state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    atexit.register(state.destroy_process_group)
    watch = _open_watch(state.process_index, state.num_processes)
    # Registered last, so that it is called first.
    atexit.register(watch.close)
    return Team(state.process_index, state.num_processes, str(state.device), watch)


def find_team() -> Team:
    """The processes that this one was started with."""
    return _join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else Team()


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
