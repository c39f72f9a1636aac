"""The link that a server prints when it is ready: opened once, it logs the browser in and leads to the review page."""

from __future__ import annotations

import asyncio
import sys

import uvicorn

from progidiff.server.gate.auth import Authenticator
from progidiff.users import LOGIN_LINK

_LOOK_SECONDS = 0.1
_EVERYWHERE = ("", "0.0.0.0", "::")
"""Interfaces of the web server that are reached under the loop-back address too."""


def print_link_when_ready(server: uvicorn.Server, auth: Authenticator) -> None:
    """Print the link once the server listens; needs a running event loop.

    It goes to standard error and not to the log, whose file others may read.
    """
    loop = asyncio.get_running_loop()

    def look() -> None:
        if server.started:
            sys.stderr.write(invite(find_address(server.config), auth))
            sys.stderr.flush()
        elif not server.should_exit:
            loop.call_later(_LOOK_SECONDS, look)

    loop.call_soon(look)


def find_address(config: uvicorn.Config) -> str:
    """Under which address a browser on this machine reaches the server.

    Example:
        >>> find_address(uvicorn.Config("app", host="0.0.0.0", port=8000))
        'http://127.0.0.1:8000'
    """
    host = "127.0.0.1" if (config.host or "") in _EVERYWHERE else config.host
    scheme = "https" if config.is_ssl else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}"


def invite(address: str, auth: Authenticator) -> str:
    """What is printed."""
    if auth.local_token is None:
        return f"\nProGiDiff Label is ready: {address}/progidiff/\n\n"
    return (
        "\nProGiDiff Label is ready. Open this link in a browser on this machine (whoever has it administers):\n\n"
        f"    {address}{LOGIN_LINK}{auth.local_token}\n\n"
    )
