"""Deadlines: an answer begins in time, or its client gets a reason; what is late goes on by itself."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.errors import BusyError
from progidiff.server.gate.endpoints import get_endpoint

logger = logging.getLogger(__name__)


class Deadlines:
    """The middleware.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._late: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the routes answer within the deadline, which counts from the last byte of the request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        deadline = get_endpoint(scope).deadline
        loop = asyncio.get_running_loop()
        exchange = _Exchange(receive, send)
        task = asyncio.ensure_future(self._answer(scope, exchange))
        try:
            while not exchange.answered:
                left = exchange.last_read + deadline - loop.time()
                done, _ = await asyncio.wait({task}, timeout=max(left, 0.01))
                if done or exchange.answered:
                    break
                if loop.time() >= exchange.last_read + deadline:
                    logger.warning("%s %s had no answer within %d s", scope["method"], scope["path"], deadline)
                    exchange.is_late = True
                    self._late.add(task)
                    task.add_done_callback(self._forget)
                    raise _late(deadline)
            await task
        except asyncio.CancelledError:
            task.cancel()
            raise

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        await self.app(scope, exchange.receive, exchange.send)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._late.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A request that was past its deadline broke", exc_info=task.exception())


class _Exchange:
    """One request and its answer.

    Attributes:
        last_read: Loop time of the last piece of the body, or of the beginning.
        answered: Whether the answer has begun.
        is_late: Whether nothing more of it is sent.
    """

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self.last_read = asyncio.get_running_loop().time()
        self.answered = False
        self.is_late = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" and self.is_late:
            await asyncio.Event().wait()  # Who was told to come back has not gone away: the work goes on.
        if message["type"] == "http.request":
            self.last_read = asyncio.get_running_loop().time()
        return message

    async def send(self, message: Message) -> None:
        if not self.is_late:
            self.answered = True
            await self._send(message)


def _late(deadline: int) -> BusyError:
    return BusyError(
        f"There was no answer within {deadline} s. The work goes on: ask again "
        "later, what is finished by then is answered at once. GET /progidiff/jobs shows "
        "it, DELETE /progidiff/jobs/ID stops it.",
        retry_after=min(deadline, 60),
    )
