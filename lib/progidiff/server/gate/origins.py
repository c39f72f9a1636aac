"""Pages: one of another origin cannot make a browser change anything here."""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from progidiff.errors import AccessError
from progidiff.server.gate.checks import SAFE_METHODS, Check
from progidiff.server.gate.hosts import split_host


class OwnOrigins(Check):
    """Refuses what a page of another origin makes a browser send; programs send neither header.

    Args:
        app: What it stands before.
        origins: Of other pages that may.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        super().__init__(app)
        self._origins = origins

    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a request of a program or of an own page go on."""
        if scope["method"] in SAFE_METHODS:
            return
        origin = headers.get("origin")
        if origin is None:
            if headers.get("sec-fetch-site", "none") in ("none", "same-origin"):
                return
            origin = headers["sec-fetch-site"]
        elif origin.lower() in self._origins or _is_same(origin, headers.get("host", "")):
            return
        raise AccessError(
            f"The request comes from a page of another origin ({origin[:80]}). If it is yours, start the server with "
            "--conf cors_origins ORIGIN."
        )


def _is_same(origin: str, host: str) -> bool:
    """Whether a page of this origin is one of the server that the request names; ports that go without saying are left
    out.
    """
    try:
        parts = urlsplit(origin.lower())
        default = {"http": "80", "https": "443"}.get(parts.scheme)
    except ValueError:
        return False
    if default is None or not parts.netloc or parts.path or "@" in parts.netloc:
        return False
    (name, port), (wanted, wanted_port) = split_host(parts.netloc), split_host(host)
    return name == wanted and (port or default) == (wanted_port or default)
