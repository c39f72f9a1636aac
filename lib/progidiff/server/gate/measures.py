"""How many requests, how they were answered, and how long it took; for `GET /metrics`."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.server import counting
from progidiff.server.gate.endpoints import UNKNOWN, find_endpoint

_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS")
_NO_ANSWER = "none"


class Measures:
    """The middleware; it stands before all that answer or refuse.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request under its declared address: what somebody types into an address makes no new series."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = _NO_ANSWER
        started = time.monotonic()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        counting.begin_request()
        try:
            await self.app(scope, receive, watch)
        except Exception:
            status = "500" if status == _NO_ANSWER else status
            raise
        finally:
            # Looked up by a middleware further in; not there if the address was refused before.
            route = (find_endpoint(scope) or UNKNOWN).path
            counting.end_request(name_method(scope), route, status, time.monotonic() - started)


def name_method(scope: Scope) -> str:
    """The method of a request; "other" for one that HTTP does not know, which may be any text."""
    return scope["method"] if scope["method"] in _METHODS else "other"
