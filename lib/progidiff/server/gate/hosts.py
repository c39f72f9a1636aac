"""Names of this server: against DNS rebinding, by which a foreign page reaches it under a name of its own."""

from __future__ import annotations

import ipaddress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from progidiff.errors import AccessError
from progidiff.server.gate.checks import Check


class KnownHosts(Check):
    """Refuses a ``Host`` that is no name of this server.

    Args:
        app: What it stands before.
        hosts: Names beside localhost and addresses.
        login: Whether one must log in: then any name is served until some are configured, because a page under a
            foreign name has neither cookie nor token of this server.
    """

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...], login: bool) -> None:
        super().__init__(app)
        self._hosts = hosts
        self._any = login and not hosts

    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a known name go on."""
        host = split_host(headers.get("host", ""))[0]
        if self._any or host == "localhost" or host in self._hosts or _is_address(host):
            return
        raise AccessError(
            f"The request is for '{host[:40]}', no known name of this server. If it is "
            f"one, start it with --conf hosts {host[:40]}."
        )


def split_host(host: str) -> tuple[str, str]:
    """Name and port of a ``Host`` header.

    Example:
        >>> split_host("[::1]:8000"), split_host("Labels.example.org")
        (('[::1]', '8000'), ('labels.example.org', ''))
    """
    host = host.strip().lower()
    name, colon, port = host.rpartition(":")
    if not colon or port.endswith("]") or not (port.isdigit() or not port):
        return host, ""
    return name, port


def _is_address(host: str) -> bool:
    """A name can be pointed at any machine, an address cannot: pages under an address come from it."""
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
