"""Where a connection comes from.

An address counts as this machine's only if the connection says so and no proxy has passed the request on:
``X-Forwarded-For`` can take rights away and never gives any. Many tunnels and proxies add no header at all, so that
being "on this machine" lets nobody in by itself; see `progidiff.server.gate.auth.Authenticator`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping

from starlette.types import Scope

_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


def is_local(scope: Scope, headers: Mapping[str, str]) -> bool:
    """Whether a request comes straight from this machine. Behind a proxy on this machine everybody would, so a
    forwarded one never does.
    """
    client = scope.get("client")
    if not client or any(name in headers for name in _FORWARDED):
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address.is_loopback


def group_address(address: str) -> str:
    """The addresses that one machine may take as it likes: itself, or with IPv6 the 2^64 of its network.

    Example:
        >>> group_address("10.0.0.1"), group_address("2001:db8::1") == group_address("2001:db8::2")
        ('10.0.0.1', True)
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
