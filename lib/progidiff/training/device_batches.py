"""Batches on their way to the device: drawn ahead in a thread, copied from pinned memory, waited for by nobody.

Reading and drawing happen on the CPU, everything else on the device. A copy from ordinary memory would stop the CPU
until the device has done all that it was given; one from pinned memory does not. Nothing here changes a number: what is
drawn for a micro-batch is a function of its seed, whoever draws it and when.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

P = TypeVar("P")
T = TypeVar("T")


def move(value: T, device: torch.device) -> T:
    """Tensors, and dataclasses, tuples and lists that hold some, on a device; to CUDA without waiting for it.

    What is no tensor stays as it is.
    """
    moved: T = _change(value, lambda tensor: _move_tensor(tensor, device))
    return moved


def pin(value: T) -> T:
    """The same in pinned memory, where there is CUDA: `move` copies from there while the device computes."""
    if not torch.cuda.is_available():
        return value
    pinned: T = _change(value, lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)
    return pinned


def _change(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Another value for every tensor in a dataclass, a tuple or a list."""
    if isinstance(value, Tensor):
        return change(value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _change(getattr(value, f.name), change) for f in fields(value) if f.init})
    if isinstance(value, tuple | list):
        return type(value)(_change(part, change) for part in value)
    return value


def _move_tensor(value: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or value.device.type != "cpu":
        return value.to(device)
    return (value if value.is_pinned() else value.pin_memory()).to(device, non_blocking=True)


class Prefetcher(Generic[P, T]):
    """Micro-batches in their order, drawn a few ahead by a thread while the device computes.

    Args:
        draw: What makes one, in the thread.
        places: What `draw` is called with, one after the other.
        ahead: How many lie ready at most; 0 draws each when it is asked for, without a thread, as is best where the
            same processor draws and computes.
    """

    def __init__(self, draw: Callable[[P], T], places: Iterable[P], ahead: int = 2) -> None:
        self._draw, self._places = draw, iter(places)
        self._ready: queue.Queue[_Drawn] | None = queue.Queue(ahead) if ahead else None
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def take(self) -> T:
        """The next one; what went wrong in the thread is raised here."""
        if self._ready is None:
            return self._draw(next(self._places))
        drawn = self._ready.get()
        if drawn.error is not None:
            raise drawn.error
        value: T = drawn.value
        return value

    def close(self) -> None:
        """End the thread; what lies ready is thrown away."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        for place in self._places:
            try:
                drawn = _Drawn(pin(self._draw(place)))
            except Exception as err:  # raised where it is waited for
                drawn = _Drawn(None, err)
            if not self._hand_over(drawn) or drawn.error is not None:
                return

    def _hand_over(self, drawn: _Drawn) -> bool:
        """Wait for a free place; False if nobody wants it any more."""
        assert self._ready is not None
        while not self._is_closed.is_set():
            try:
                self._ready.put(drawn, timeout=0.2)
            except queue.Full:
                continue
            return True
        return False


@dataclass(frozen=True)
class _Drawn:
    """What a thread drew, or why it could not."""

    value: Any
    error: Exception | None = None
