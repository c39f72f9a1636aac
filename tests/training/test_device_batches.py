"""Batches that are drawn ahead: the same ones in the same order, and errors where somebody waits for them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import pytest
import torch

from progidiff.errors import ImageError
from progidiff.training.device_batches import Prefetcher, move, pin


@dataclass(frozen=True)
class Inner:
    values: torch.Tensor
    name: str


@dataclass(frozen=True)
class Outer:
    inner: Inner
    more: tuple[torch.Tensor, list[int]]


def make_outer() -> Outer:
    return Outer(Inner(torch.arange(3), "kept"), (torch.ones(2), [4, 5]))


def test_tensors_are_moved_wherever_they_lie_and_all_else_stays():
    moved = move(make_outer(), torch.device("meta"))
    assert moved.inner.values.device.type == moved.more[0].device.type == "meta"
    assert (moved.inner.name, moved.more[1]) == ("kept", [4, 5])
    same = move(make_outer(), torch.device("cpu"))
    assert torch.equal(same.inner.values, torch.arange(3))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory is CUDA's")
def test_what_is_pinned_is_copied_without_waiting():
    pinned = pin(make_outer())
    assert pinned.inner.values.is_pinned()
    assert move(pinned, torch.device("cuda")).more[0].is_cuda


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_micro_batches_come_in_their_order(ahead: int):
    source = Prefetcher(lambda place: place * 10, range(20), ahead)
    assert [source.take() for _ in range(20)] == [10 * n for n in range(20)]
    source.close()


def test_no_more_are_drawn_ahead_than_asked_for_and_closing_ends_the_thread():
    drawn: list[int] = []
    source = Prefetcher(lambda place: drawn.append(place) or place, range(1000), 2)
    assert source.take() == 0
    time.sleep(0.3)
    assert len(drawn) <= 5
    source.close()
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]


@pytest.mark.parametrize("ahead", [0, 2])
def test_what_goes_wrong_in_the_thread_is_raised_where_the_batch_is_waited_for(ahead: int):
    def draw(place: int) -> int:
        if place == 2:
            raise ImageError("Slice 2 cannot be read.")
        return place

    source = Prefetcher(draw, range(5), ahead)
    assert [source.take(), source.take()] == [0, 1]
    with pytest.raises(ImageError, match="Slice 2 cannot be read"):
        source.take()
    source.close()
