"""Headers that every answer carries: what a browser may do with it, and that images of patients are not cached."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.server.gate.paths import strip_prefix

_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; style-src "
    "'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
"""For pages that bring no policy of their own: OHIF needs inline scripts, WebAssembly and workers; nothing comes from
or goes to other sites.
"""

_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
_CACHED = ("/ohif/", "/static/")


class SecurityHeaders:
    """Adds the headers that an answer does not bring itself.

    Args:
        app: What it stands before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add(MutableHeaders(scope=message), strip_prefix(scope))
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)


def _add(headers: MutableHeaders, path: str) -> None:
    for name, value in _HEADERS.items():
        headers.setdefault(name, value)
    if headers.get("content-type", "").startswith("text/html"):
        headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
    if not path.startswith(_CACHED):
        # Images of patients do not stay in the caches of shared computers.
        headers.setdefault("Cache-Control", "no-store")
