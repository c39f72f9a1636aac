"""An id for every request: in its answer, and in every line that is logged for it."""

from __future__ import annotations

import logging
import re
import time
import uuid
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.logs import RequestNote, begin_request, note_texts
from progidiff.server.gate.endpoints import UNKNOWN, find_endpoint
from progidiff.server.gate.measures import name_method

logger = logging.getLogger(__name__)

HEADER = "X-Request-ID"

_SANE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_FIELDS = 100


class RequestIds:
    """The middleware; it is the outermost.

    Args:
        app: What it stands before.
        lines: Whether every answer is logged, as one line.
    """

    def __init__(self, app: ASGIApp, lines: bool) -> None:
        self.app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request under its id: what a proxy before this server gave it, or a new one."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        note = RequestNote(given if _SANE.fullmatch(given) else uuid.uuid4().hex)
        begin_request(note)
        note_texts(_list_texts(scope))
        status, started = 0, time.monotonic()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                MutableHeaders(scope=message)[HEADER] = note.id
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            if self._lines:
                _log(scope, status, time.monotonic() - started)


def _log(scope: Scope, status: int, seconds: float) -> None:
    """One line per answer; what probes ask all the time is for those who look for it."""
    endpoint, client = find_endpoint(scope) or UNKNOWN, scope.get("client")
    method = name_method(scope)
    fields = {
        "method": method,
        "route": endpoint.path,
        "status": status or None,
        "seconds": round(seconds, 4),
        "client": client[0] if client else None,
    }
    level = logging.DEBUG if endpoint.probe else logging.INFO
    logger.log(level, "%s %s: %s", method, endpoint.path, status or "no answer", extra={"fields": fields})


def _list_texts(scope: Scope) -> list[str]:
    """What somebody has typed into an address, which may be the name of an image."""
    parts = [part for part in str(scope["path"]).split("/") if part]
    query = scope.get("query_string", b"").decode("latin1")
    try:
        values = [value for _, value in parse_qsl(query, max_num_fields=_MAX_FIELDS)]
    except ValueError:  # More fields than any address has.
        values = [query]
    return [*parts, *values]
