"""Addresses: only plain ones go on, each with its declaration."""

from __future__ import annotations

from monailabel.config import settings
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from progidiff.errors import RequestError
from progidiff.server.gate.checks import Check
from progidiff.server.gate.endpoints import EndpointTable, set_endpoint
from progidiff.storage.json_text import is_plain_path


class PlainPaths(Check):
    """Refuses an address that means another place to somebody further on, and looks the others up.

    Args:
        app: What it stands before.
        table: All addresses of this server.
    """

    def __init__(self, app: ASGIApp, table: EndpointTable) -> None:
        super().__init__(app)
        self._table = table

    def check(self, scope: Scope, headers: Headers) -> None:
        """Let a plain address go on."""
        path = strip_prefix(scope)
        parts = path.split("/")
        if "//" in path or not is_plain_path(path) or any(part in (".", "..") for part in parts):
            raise RequestError(
                "The address has '..', '//', a backslash or a control character in it. Write it plainly."
            )
        set_endpoint(scope, self._table.find(scope["method"], path))


def find_root(scope: Scope) -> str:
    """What stands before every address in a link: the prefix of the proxy (`--root_path`) and of the host.

    Example:
        >>> find_root({"root_path": "/labels/"}), find_root({})
        ('/labels', '')
    """
    return f"{str(scope.get('root_path', '')).rstrip('/')}{settings.MONAI_LABEL_API_STR}"


def strip_prefix(scope: Scope) -> str:
    """The path as it is declared: without a prefix of the proxy (`--root_path`) and of the host
    (MONAI_LABEL_API_STR).
    """
    path = str(scope["path"])
    for prefix in (str(scope.get("root_path", "")).rstrip("/"), settings.MONAI_LABEL_API_STR):
        if prefix and path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
    return path
