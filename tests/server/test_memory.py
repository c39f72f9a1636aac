"""The heap of a server that runs for weeks; `benchmarks/soak.py` measures what it is for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from progidiff.server import memory


@pytest.mark.parametrize(
    ("platform", "variable", "calls"), [("linux", None, [(-8, 1)]), ("linux", "4", []), ("darwin", None, [])]
)
def test_threads_share_a_heap_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, platform: str, variable: str | None, calls: list[tuple[int, int]]
):
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        memory.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda *values: seen.append(values))
    )
    monkeypatch.setattr(memory.sys, "platform", platform)
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if variable is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", variable)
    memory.use_one_arena()
    assert seen == calls


def test_a_c_library_without_such_a_setting_is_no_problem(monkeypatch: pytest.MonkeyPatch):
    opened: list[object] = []
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: opened.append(name) or object())
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    memory.use_one_arena()
    assert len(opened) == 1  # It was asked, and its silence taken.
