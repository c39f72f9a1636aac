"""Errors that nobody raised on purpose, as the client sees them."""

from __future__ import annotations

import errno

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from progidiff.server.gate.answers import install_handlers


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device"),
            507,
            "disk is full (No space left on device). Free some space",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 507, "disk is full (Disk quota exceeded)"),
        (PermissionError(errno.EACCES, "Permission denied"), 500, "broke unexpectedly (PermissionError, incident"),
        (ZeroDivisionError(), 500, "broke unexpectedly (ZeroDivisionError, incident"),
    ],
)
def test_a_full_disk_is_told_apart_from_a_bug(error: Exception, status: int, detail: str):
    web = FastAPI()

    @web.get("/")
    def fail() -> None:
        raise error

    install_handlers(web)
    answer = TestClient(web, raise_server_exceptions=False).get("/")
    assert answer.status_code == status
    assert detail in answer.json()["detail"]
