"""Roles: a request goes on if its user may do what the address does."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import Scope

from progidiff.server.gate.auth import check_role, find_user
from progidiff.server.gate.checks import Check
from progidiff.server.gate.endpoints import OPEN, get_endpoint


class Roles(Check):
    """Refuses a user whose role does not cover that of the address."""

    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a user go on who may."""
        role = get_endpoint(scope).role
        if role is not OPEN:
            check_role(find_user(scope), role)
