"""Refusals as answers: what a middleware further in raises becomes a status, a reason and a cure."""

from __future__ import annotations

import asyncio
import logging

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.errors import BusyError, ProGiDiffError
from progidiff.server.gate.answers import build_answer
from progidiff.server.gate.checks import SAFE_METHODS
from progidiff.server.gate.log_text import one_line

logger = logging.getLogger(__name__)

_DRAIN_SIZE, _DRAIN_TIME = 64 << 20, 10.0
"""Of a refused body so much is read and thrown away (bytes, seconds), so that clients that send first and listen later
see the reason.
"""


class Refusals:
    """The middleware; all that refuse stand behind it.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # There is no route for web sockets, and none would have been checked.
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = _Exchange(receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except ProGiDiffError as err:
            method, path, kind = scope["method"], one_line(scope["path"][:200]), type(err).__name__
            logger.info("%s %s -> %d %s: %s", method, path, err.status, kind, one_line(str(err)))
            if exchange.answered:
                return
            # Who is late or stalls has nothing more to send.
            if method not in SAFE_METHODS and not isinstance(err, BusyError):
                await exchange.drain(Headers(scope=scope))
            response = build_answer(err, scope)
            # The rest of the body, if there is one, is not read as the next request.
            response.headers["Connection"] = "close"
            await response(scope, _receive_nothing, send)


class _Exchange:
    """One request and its answer: whether the body has ended and the answer has begun."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._ended = False
        self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        await self._send(message)

    async def drain(self, headers: Headers) -> None:
        """Read what a refused client still sends, within bounds."""
        sends = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if headers.get("expect") or not sends:
            return
        left = _DRAIN_SIZE
        try:
            async with asyncio.timeout(_DRAIN_TIME):
                while left > 0 and not self._ended:
                    left -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            return


async def _receive_nothing() -> Message:
    return {"type": "http.disconnect"}
