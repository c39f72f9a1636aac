"""What a middleware is that only looks at a request before it goes on."""

from __future__ import annotations

from abc import ABC, abstractmethod

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""


class Check(ABC):
    """A middleware that refuses a request by raising, or lets it go on as it is.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check one request."""
        if scope["type"] == "http":
            self.check(scope, Headers(scope=scope))
        await self.app(scope, receive, send)

    @abstractmethod
    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a request go on.

        Raises:
            ProGiDiffError: if it must not.
        """
