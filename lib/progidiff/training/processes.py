"""The processes that share one training: those that ``accelerate launch`` started, or this one alone.

What is shared is the batch, not the networks: every process holds all weights, computes its part of the micro-batches
of a step, and the gradients are summed. They are summed by hand and not by `DistributedDataParallel`, because the
recipes call several methods of a network per step and its wrapper knows `forward` only. accelerate's own `Accelerator`
fixes device and precision once per Python process, which a server that trains one model after the other cannot use; its
`PartialState` is all that is needed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from progidiff.errors import RequestError

BUCKET = 1 << 24
"""Gradients are summed in pieces of about so many numbers: one message for many small layers, no copy of all
gradients.
"""

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others; the first one validates while the others wait."""


class Team:
    """This process and those it trains with.

    Attributes:
        index: 0 for the process that validates, reports and writes files.
        count: How many there are.
        device: Where this process computes ("cuda:1"); None to leave the choice to the backbone.
    """

    def __init__(self, index: int = 0, count: int = 1, device: str | None = None) -> None:
        self.index = index
        self.count = count
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

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

    def sum_numbers(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Element-wise sum over the processes."""
        if self.count == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes.

        A parameter that no process used keeps no gradient, as it would in one process.
        """
        if self.count == 1:
            return
        everything = list(parameters)
        used = self.sum_numbers([float(p.grad is not None) for p in everything], everything[0].device)
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


@lru_cache(maxsize=1)
def _join() -> Team:
    from accelerate import PartialState

    state: Any = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    atexit.register(state.destroy_process_group)
    return Team(state.process_index, state.num_processes, str(state.device))


def find_team() -> Team:
    """The processes that this one was started with."""
    return _join() if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ else Team()


def _sum_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    torch.distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
