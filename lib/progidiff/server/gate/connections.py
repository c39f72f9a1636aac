"""Connections before there is a request: who sends half a header and waits, and who opens hundreds of them.

The web server keeps every connection that sends nothing, for as long as it likes to; a thousand of them take all
descriptors of the process, and nobody is answered. So a header has a deadline, an address (with IPv6, its network of
2^64) has so many connections, and some descriptors are left for the files of the server. Where there are too many, one
that has asked nothing yet makes room, the longest waiting first; a new one is refused only where all others work. The
host starts the web server without a word about any of this, so its protocol class is replaced when the app is
installed, before it listens.

Nothing here knows requests; those are counted and timed by the middlewares of `progidiff.server.gate.guard`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
from collections import Counter
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import uvicorn

from progidiff.server.gate.peers import group_address
from progidiff.server.options import ServerOptions

try:
    import resource
except ImportError:  # Windows counts handles in another way.
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_DESCRIPTORS = 8192
"""What is asked of the system; many start a process with 1024."""

_SHARE = 0.75
"""Of the descriptors so many may be connections; the rest is for files."""


@dataclass
class Limits:
    """What one web server lets happen before a request; counts as it goes.

    Attributes:
        header_seconds: From the first moment of a connection, or the first byte of a further request, to the end of
            its header.
        per_address: Connections at a time.
        total: Connections at a time, of all addresses.
        open: Connections per address.
        waiting: Those that have sent no whole header yet, the longest waiting first.
    """

    header_seconds: float
    per_address: int
    total: int
    open: Counter[str] = field(default_factory=Counter)
    waiting: dict[_Limited, None] = field(default_factory=dict)

    def admit(self, new: _Limited) -> None:
        """Count a connection, and end one where there are too many: one that waits, or this."""
        self.open[new.address] += 1
        if self.open[new.address] > self.per_address:
            reason = f"Your address has more than {self.per_address} connections. Close some, or let a request end."
            rivals = [each for each in self.waiting if each.address == new.address]
        elif self.open.total() > self.total:
            reason = f"The server has {self.total} connections, as many as it can. Try again in a few seconds."
            rivals = list(self.waiting)
        else:
            return
        least = next(iter(rivals), new)
        logger.warning("A connection of %s is ended: %s", least.address or "a local socket", reason)
        least.end(HTTPStatus.SERVICE_UNAVAILABLE, reason)

    def release(self, address: str) -> None:
        """Count a connection that ended."""
        self.open[address] -= 1
        if self.open[address] <= 0:
            del self.open[address]


class _Limited(asyncio.Protocol):
    """What `limit` puts before the web server's own protocol class."""

    limits: Limits
    address = ""

    _counted = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        peer = transport.get_extra_info("peername")
        self.address = group_address(str(peer[0])) if isinstance(peer, tuple) and peer else ""
        self._counted = True
        self.limits.admit(self)
        if not transport.is_closing():
            self._start()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        if self._counted:
            self._counted = False
            self.limits.release(self.address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._cycle
        if self._timer is None and (before is None or before.response_complete):
            self._start()
        super().data_received(data)
        if self._cycle is not before:
            self._stop()

    @property
    def _cycle(self) -> Any:
        """The request that is read or answered; None before the first."""
        return getattr(self, "cycle", None)

    def _start(self) -> None:
        self.limits.waiting[self] = None
        self._timer = asyncio.get_running_loop().call_later(self.limits.header_seconds, self._give_up)

    def _stop(self) -> None:
        self.limits.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        seconds = self.limits.header_seconds
        self.end(HTTPStatus.REQUEST_TIMEOUT, f"No whole header came within {seconds:g} s. Send the request again.")

    def end(self, status: HTTPStatus, reason: str) -> None:
        """Answer in the place of the web server, which has not begun to, and hang up."""
        self._stop()
        transport: asyncio.Transport = self.transport  # type: ignore[attr-defined]  # Of the web server's own class.
        if not transport.is_closing():
            transport.write(_build_answer(status, reason))
            transport.close()


def _build_answer(status: HTTPStatus, reason: str) -> bytes:
    body = json.dumps({"error": "BusyError", "detail": reason, "suggestions": []}).encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\nRetry-After: 5\r\n\r\n"
    )
    return head.encode("ascii") + body


def limit(config: uvicorn.Config, options: ServerOptions) -> Limits:
    """Put limits before the protocol of a web server that does not listen yet."""
    total = int(raise_descriptor_limit() * _SHARE)
    limits = Limits(options.header_seconds, options.connections_per_address, total)
    base = config.http_protocol_class
    if not issubclass(base, _Limited):
        config.http_protocol_class = type("LimitedProtocol", (_Limited, base), {"limits": limits})
    return limits


def raise_descriptor_limit(wanted: int = _DESCRIPTORS) -> int:
    """Let this process open more files and connections, as far as the system allows.

    Returns:
        How many it may open now.
    """
    if resource is None:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return wanted if soft == unlimited else soft
    more = wanted if hard == unlimited else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
    except (OSError, ValueError) as err:
        logger.warning("The limit of %d open files cannot be raised: %s", soft, err)
        return soft
    return more


def find_server() -> uvicorn.Server | None:
    """The web server that runs this process; None if none does, or if another handler stands before its own.

    While it runs, it handles SIGTERM with a method of its own.
    """
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, uvicorn.Server) else None
