"""Keeping the memory of a server that runs for weeks flat."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_M_ARENA_MAX = -8
"""Of glibc's mallopt."""


def use_one_arena() -> None:
    """Have all threads share one heap, unless the environment variable MALLOC_ARENA_MAX says otherwise.

    glibc gives threads heaps of their own, up to eight per core, and what one of them has freed is of no use to the
    others. The web server answers in a pool of threads whose large arrays come and go: the heaps grow by and by without
    anything being kept.
    """
    if sys.platform == "linux" and "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(OSError, AttributeError):  # Another C library has no such thing.
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
