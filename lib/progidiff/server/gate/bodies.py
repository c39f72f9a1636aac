"""Bodies: counted while they arrive, and given up when they grow too large or stall."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.errors import BusyError, ProGiDiffError, TooLargeError
from progidiff.server.gate.endpoints import UPLOAD, get_endpoint

_STALL = 30.0
"""Seconds without a byte of the body after which a request is given up."""


class Bodies:
    """The middleware.

    Args:
        app: What it stands before.
        upload: Most bytes of an image or a label.
    """

    def __init__(self, app: ASGIApp, upload: int) -> None:
        self.app = app
        self._upload = upload

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a body through within its limit."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = get_endpoint(scope).body
        limit = self._upload if most == UPLOAD else most
        _check_length(Headers(scope=scope), limit)
        body = _Body(receive, limit)
        answered = False

        async def send_unless_given_up(message: Message) -> None:
            nonlocal answered
            if body.refusal is None or answered:  # What a route says of a body that breaks off is not the reason.
                answered = True
                await send(message)

        try:
            await self.app(scope, body.receive, send_unless_given_up)
        except Exception:
            if body.refusal is None:
                raise
        if body.refusal is not None:
            raise body.refusal


class _Body:
    """The body of a request as it arrives.

    Attributes:
        refusal: Why it was given up, or None.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._ended = False
        self.refusal: ProGiDiffError | None = None

    async def receive(self) -> Message:
        """The next piece, as the routes call it."""
        if self._ended:
            return await self._receive()
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        try:
            message = await asyncio.wait_for(self._receive(), _STALL if self._limit else None)
        except TimeoutError:
            self.refusal = BusyError(f"No byte of the request came for {_STALL:g} s. Send it again.")
            raise self.refusal from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._ended = not message.get("more_body", False)
            if self._size > self._limit:
                self.refusal = _too_large(self._limit)
                raise self.refusal
        return message


def _check_length(headers: Headers, limit: int) -> None:
    """Refuse by the stated length, before a byte is read.

    Slicer's client repeats the length of its last form in requests that have no body: where none is taken, a length
    alone is no fault.
    """
    length = headers.get("content-length", "")
    if limit and length.isascii() and length.isdigit() and int(length) > limit:
        raise _too_large(limit)


def _too_large(limit: int) -> TooLargeError:
    if not limit:
        return TooLargeError("This address takes no body. Send none.")
    return TooLargeError(
        f"The request is larger than the {limit:,} bytes that this address "
        "takes. Send less; for images and labels an administrator raises --conf max_upload_gb."
    )
