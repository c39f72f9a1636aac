"""Who asks: every request that goes on has its user, a browser without one is led to the login."""

from __future__ import annotations

from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from progidiff.errors import AccessError, LoginError
from progidiff.logs import note_account
from progidiff.server.gate.auth import LOCAL_USER, Authenticator, User, set_user
from progidiff.server.gate.endpoints import OPEN, Endpoint, get_endpoint
from progidiff.server.gate.paths import find_root, strip_prefix
from progidiff.server.gate.peers import is_local
from progidiff.users import Role

LOGIN_PAGE = "/progidiff/login"

_LINK_HINT = " Where the server was started it printed a link; `progidiff users link` prints it again."


class Callers:
    """The middleware.

    Args:
        app: What it stands before.
        auth: Finds out who sends a request.
    """

    def __init__(self, app: ASGIApp, auth: Authenticator) -> None:
        self.app = app
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find the user of one request."""
        if scope["type"] == "http":
            headers, endpoint = Headers(scope=scope), get_endpoint(scope)
            try:
                user = self._find_user(scope, headers, endpoint)
                set_user(scope, user)
                note_account(user.name)
            except LoginError:
                if not _is_page(scope["method"], headers):
                    raise
                target = f"{find_root(scope)}{LOGIN_PAGE}?next={quote(_read_target(scope), safe='')}"
                await RedirectResponse(target, status_code=303)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _find_user(self, scope: Scope, headers: Headers, endpoint: Endpoint) -> User:
        local = is_local(scope, headers)
        if self._auth.only_local and not local:
            if endpoint.probe:
                return User("", Role.READ)
            raise AccessError(
                "This server answers its own machine only. To open it, an "
                "administrator starts it with --conf token_file FILE or --conf users_file FILE, or with --conf "
                "allow_anonymous true for everybody."
            )
        if not self._auth.required:
            return LOCAL_USER if local else User("", self._auth.anonymous or Role.READ)
        anonymous = User("", self._auth.anonymous or Role.READ)
        try:
            user = self._auth.find_user(headers, cookie_parser(headers.get("cookie", "")))
        except LoginError:
            if endpoint.role is OPEN:
                return anonymous  # An old token must not keep anybody from logging in again.
            raise
        if user is None and self._auth.anonymous is None and endpoint.role is not OPEN:
            raise LoginError(
                "This server asks for a login: a bearer token (POST /auth/token gives "
                f"one), or the page /progidiff/login.{_LINK_HINT if self._auth.local_token else ''}"
            )
        return user or anonymous


def _is_page(method: str, headers: Headers) -> bool:
    """Whether a browser asks for a page to show: then it is led to the login instead of being shown an error."""
    return method == "GET" and "text/html" in headers.get("accept", "")


def _read_target(scope: Scope) -> str:
    path, query = strip_prefix(scope), scope.get("query_string", b"").decode("latin1")
    return f"{path}?{query}" if query else path
