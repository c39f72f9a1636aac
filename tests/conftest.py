"""Shared fixtures: the real classes at toy width, and a real server process. No hub, no network, no data from outside
the repository.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

from support import shapes
from support.phantoms import write_phantom

CHECKED = (
    "progidiff.model.codec",
    "progidiff.model.conditioning",
    "progidiff.model.pipeline",
    "progidiff.model.sampling",
    "progidiff.proposals.agreement",
    "progidiff.proposals.islands",
    "progidiff.proposals.walk",
)
"""Where the shapes in annotations are checked at every call, in the tests' own process."""

install_import_hook(CHECKED, f"{shapes.__name__}.check")

# Before torch is imported: tests share their machine, and one thread is fast enough for toys.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what cannot be sent: a test may log the name of a file that is no text, and pytest-xdist ends at one."""
    report = yield
    report.sections = [(title, text.encode("utf-8", "backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _every_log_line() -> Iterator[None]:
    """pytest's own handlers stay for all tests; what a test of the server puts on them would hide lines of the next."""
    yield
    for handler in logging.root.handlers:
        for each in list(handler.filters):
            handler.removeFilter(each)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder (backbone and conditioning) of toy width with random weights, whose masks are blots."""
    from progidiff.testing import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def phantom_writer() -> Callable[..., Path]:
    return write_phantom
