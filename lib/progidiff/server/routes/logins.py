"""Logging in and out: for Slicer (``/auth/...``, as MONAI Label's own login would answer) and for browsers (a page and
a cookie).
"""

from __future__ import annotations

import html
import logging
from urllib.parse import parse_qsl, quote

from fastapi import Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from pydantic import BaseModel, ConfigDict

from progidiff.errors import AccessError, BusyError, LoginError, NotFoundError, ProGiDiffError
from progidiff.logs import note_account
from progidiff.server.gate.auth import Authenticator, User
from progidiff.server.gate.callers import LOGIN_PAGE
from progidiff.server.gate.endpoints import CALLER, OPEN, READ, SMALL, Endpoints
from progidiff.server.gate.log_text import one_line
from progidiff.server.gate.oidc import LOGIN_SECONDS, Begun, Provider
from progidiff.server.gate.paths import find_root
from progidiff.server.parts import get_context

logger = logging.getLogger(__name__)

_START, _REVIEW = "/", "/progidiff/"
_PROVIDER_LOGIN, _PROVIDER_CALLBACK = "/progidiff/oidc/login", "/progidiff/oidc/callback"
_BEGUN_COOKIE = "progidiff_oidc"

_LINK_HINT = (
    "<p>Open the link that the server printed where it was started, or leave the name empty and give the token in it "
    "as the password. <code>progidiff users link</code> prints both again.</p>"
)

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 34rem; margin: 12vh auto; padding: 0 1rem; color: #1c2733;
  background: #f6f8fa }
@media (prefers-color-scheme: dark) {
  body { color: #e6edf3; background: #11161c } a { color: #7cb7ff } input { background: #1c2733; color: inherit }
}
label { display: block; margin-top: 1rem } input, button { font: inherit; padding: .4rem .6rem }
input { width: 100%; box-sizing: border-box }
a.button { display: inline-block; padding: .5rem .8rem; border: 1px solid; border-radius: .3rem }
button { margin-top: 1.2rem } .error { color: #c0392b }
"""


class LoginNeeded(BaseModel):
    """Whether a login is needed, in the words of the host's own login.

    Attributes:
        enabled: Whether it is.
        client_id: Of no meaning here.
        realm: Of no meaning here.
    """

    model_config = ConfigDict(frozen=True)

    enabled: bool
    client_id: str = "progidiff"
    realm: str = ""


class TokenAnswer(BaseModel):
    """A bearer token, or none where no login is needed.

    Attributes:
        access_token: What goes into the header ``Authorization`` after its type.
        token_type: "bearer".
        expires_in: Seconds for which it is good.
    """

    model_config = ConfigDict(frozen=True)

    access_token: str | None
    token_type: str | None
    expires_in: int | None = None


class CallerAnswer(BaseModel):
    """Whose bearer token it is.

    Attributes:
        username: Of the user or token; "" for somebody without a login.
        name: The same.
        email: None; this server keeps none.
        roles: The one role.
    """

    model_config = ConfigDict(frozen=True)

    username: str
    name: str
    email: str | None
    roles: list[str]


def build_endpoints() -> Endpoints:
    """Both kinds of login, and the start page."""
    endpoints = Endpoints()
    _add_tokens(endpoints)
    _add_pages(endpoints)
    _add_provider(endpoints)
    return endpoints


def _add_tokens(endpoints: Endpoints) -> None:

    @endpoints.get("/auth/", OPEN, tags=["Auth"], summary="Whether a login is needed (Slicer asks this first)")
    def describe_login() -> LoginNeeded:
        return LoginNeeded(enabled=_auth().required)

    @endpoints.post(
        "/auth/token",
        OPEN,
        tags=["Auth"],
        summary="A bearer token for name and password; 10 failures in 5 minutes, then 429",
        takes="Form: username, password (or a token)",
        body=SMALL,
        response_model_exclude_unset=True,
    )
    async def give_token(
        request: Request, username: str = Form("", max_length=64), password: str = Form("", max_length=256)
    ) -> TokenAnswer:
        auth = _auth()
        if not auth.required:  # What the stock client expects of a server without a login.
            return TokenAnswer(access_token=None, token_type=None)
        _, session = await auth.log_in_apart(username, password, _address(request))
        return TokenAnswer(access_token=session, token_type="bearer", expires_in=int(auth.session_seconds))

    @endpoints.get("/auth/token/valid", READ, tags=["Auth"], summary="Whose bearer token it is, if it is still good")
    def check_token(user: User = CALLER) -> CallerAnswer:
        return CallerAnswer(username=user.name, name=user.name, email=None, roles=[str(user.role)])


def _add_pages(endpoints: Endpoints) -> None:
    @endpoints.get(
        "/progidiff/login",
        OPEN,
        include_in_schema=False,
        summary="The login page; with a token, as in the link that the server prints, sets the session cookie",
        takes="Query: next (an address of this server), token",
    )
    async def show_login(request: Request, next: str = "", token: str = "", ended: bool = False) -> Response:
        auth = _auth()
        if token and auth.required:
            target = _check_target(next or _REVIEW, find_root(request.scope))
            return await _log_in(request, "", token, target)
        told = _tell_end(request) if ended else ""
        return _page("Log in", told + _form(request, _check_target(next, find_root(request.scope))))

    # The address is the login page's own, so a browser's back button and a failed try stay on it.
    @endpoints.post(
        "/progidiff/login",
        OPEN,
        include_in_schema=False,
        summary="Sets the session cookie",
        takes="Form: name, password, next (an address of this server)",
        body=SMALL,
    )
    async def log_in(request: Request, fields: dict[str, str] = _FIELDS) -> Response:
        name = fields.get("name", "").strip()
        target = _check_target(fields.get("next", _START), find_root(request.scope))
        return await _log_in(request, name, fields.get("password", ""), target)

    @endpoints.post("/progidiff/logout", OPEN, include_in_schema=False, summary="Ends the session", body=SMALL)
    def log_out(request: Request) -> Response:
        cookie = _name_cookie(request)
        session = request.cookies.get(cookie, "")
        ended = "?ended=true" if _auth().is_of_provider(session) else ""
        _auth().end_session(session)
        _auth().end_session(request.headers.get("authorization", "").partition(" ")[2].strip())
        response = RedirectResponse(f"{find_root(request.scope)}{LOGIN_PAGE}{ended}", status_code=303)
        response.delete_cookie(cookie, path=_find_cookie_path(request), httponly=True, samesite="strict")
        return response

    @endpoints.get("/", READ, include_in_schema=False, summary="Start page: links, and who is logged in")
    def show_start(request: Request, user: User = CALLER) -> Response:
        root = html.escape(find_root(request.scope))
        who = f"You are {html.escape(user.name)} and may {user.role}." if user.name else f"You may {user.role}."
        out = (
            f'<form method="post" action="{root}/progidiff/logout"><button>Log out</button></form>' if user.name else ""
        )
        if not user.name and _auth().required:
            out = f'<p><a href="{root}{LOGIN_PAGE}">Log in</a></p>'
        links = "".join(
            f'<li><a href="{root}{address}">{text}</a></li>'
            for address, text in (
                (_REVIEW, "review page"),
                ("/ohif/", "OHIF viewer"),
                ("/info/", "what this server offers"),
                ("/progidiff/jobs", "running jobs"),
                ("/openapi.json", "description of all addresses"),
            )
        )
        return _page("ProGiDiff Label", f"<p>{who} For research, not for diagnosis.</p><ul>{links}</ul>{out}")


def _add_provider(endpoints: Endpoints) -> None:
    # Plain functions: they wait for the provider, in a thread.
    @endpoints.get(
        _PROVIDER_LOGIN,
        OPEN,
        include_in_schema=False,
        summary="Leads to the login provider (OpenID Connect, authorization code with PKCE)",
        takes="Query: next (an address of this server)",
    )
    def begin_login(request: Request, next: str = "") -> Response:
        target = _check_target(next or _REVIEW, find_root(request.scope))
        try:
            url, begun = _provider().begin(_find_callback(request), target)
        except BusyError as err:
            return _refuse(request, err, target, "")
        response = RedirectResponse(url, status_code=303)
        # Lax: the provider's page leads back here, and Strict would keep the cookie from that.
        response.set_cookie(
            _BEGUN_COOKIE,
            _auth().seal(begun.to_text()),
            max_age=int(LOGIN_SECONDS),
            path=_find_cookie_path(request),
            httponly=True,
            samesite="lax",
            secure=_is_https(request),
        )
        return response

    @endpoints.get(
        _PROVIDER_CALLBACK,
        OPEN,
        include_in_schema=False,
        summary="Where the login provider leads back to; sets the session cookie",
        takes="Query: code, state, iss, error",
    )
    def finish_login(request: Request) -> Response:
        provider, auth = _provider(), _auth()
        kept = auth.unseal(request.cookies.get(_BEGUN_COOKIE, ""))
        begun = None if kept is None else Begun.from_text(kept)
        target = _START if begun is None else begun.target
        try:
            identity = provider.finish(begun, dict(request.query_params), _find_callback(request))
        except (AccessError, BusyError) as err:
            logger.warning("A login by the provider failed: %s", one_line(str(err)))  # It quotes what was sent.
            return _refuse(request, err, target, "")
        note_account(identity.name)
        logger.info("'%s' is logged in by the provider and may %s", identity.name, identity.role)
        address = html.escape(f"{find_root(request.scope)}{target}")
        # A page and no redirect: one that began at another site would arrive without a cookie that is Strict.
        onward = f'<meta http-equiv="refresh" content="0;url={address}"><p><a href="{address}">Go on</a></p>'
        response = _page("You are logged in", onward)
        _set_session(request, response, auth.start_session_of(identity))
        response.delete_cookie(_BEGUN_COOKIE, path=_find_cookie_path(request), httponly=True, samesite="lax")
        return response


def _provider() -> Provider:
    provider = _auth().provider
    if provider is None:
        raise NotFoundError("This server has no login provider. An administrator starts it with --conf oidc_file FILE.")
    return provider


def _is_https(request: Request) -> bool:
    provider = _auth().provider
    public = provider.settings.public_url if provider is not None else ""
    return request.url.scheme == "https" or public.startswith("https://")


def _find_public(request: Request, path: str) -> str:
    """An address of this server as a browser writes it."""
    provider = _provider()
    base = provider.settings.public_url.rstrip("/")
    if not base:
        base = f"{request.url.scheme}://{request.headers.get('host', '')}{find_root(request.scope)}"
    return f"{base}{path}"


def _find_callback(request: Request) -> str:
    return _find_public(request, _PROVIDER_CALLBACK)


def _tell_end(request: Request) -> str:
    """That one is logged out here, and how to do so at the provider too."""
    provider = _auth().provider
    page = "" if provider is None else provider.find_logout(_find_public(request, LOGIN_PAGE))
    there = f' <a href="{html.escape(page)}">Log out at the provider, too</a>.' if page else ""
    return f"<p>You are logged out here.{there}</p>"


async def _log_in(request: Request, name: str, password: str, target: str) -> Response:
    """Lead to the target with the cookie of a session, or show the form again."""
    auth = _auth()
    try:
        _, session = await auth.log_in_apart(name, password, _address(request))
    except (LoginError, BusyError) as err:
        return _refuse(request, err, target, name)
    response = RedirectResponse(f"{find_root(request.scope)}{target}", status_code=303)
    _set_session(request, response, session)
    return response


def _set_session(request: Request, response: Response, session: str) -> None:
    response.set_cookie(
        _name_cookie(request),
        session,
        max_age=int(_auth().session_seconds),
        path=_find_cookie_path(request),
        httponly=True,
        samesite="strict",
        secure=_is_https(request),
    )


async def _read_fields(request: Request) -> dict[str, str]:
    """The fields of a plain form; read here, so that an error is shown in the page and not as JSON."""
    body = await request.body()
    return dict(parse_qsl(body.decode("utf-8", errors="replace"), keep_blank_values=True, max_num_fields=20))


_FIELDS = Depends(_read_fields)


def _auth() -> Authenticator:
    return get_context().auth


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _name_cookie(request: Request) -> str:
    return _auth().name_cookie(request.headers.get("host", ""))


def _find_cookie_path(request: Request) -> str:
    """Behind a proxy with a sub-path the cookie is of no use to what else lies under the name."""
    return str(request.scope.get("root_path", "")).rstrip("/") or "/"


def _check_target(target: str, root: str = "") -> str:
    """Where to go after the login, below the server's own prefix, if that is on this server; else the start page.

    Example:
        >>> _check_target("/ohif/?a=1"), _check_target("//evil.example"), _check_target("https://evil.example")
        ('/ohif/?a=1', '/', '/')
        >>> _check_target("/labels/ohif/", "/labels"), _check_target("/labels//evil.example", "/labels")
        ('/ohif/', '/')
    """
    if root and target.startswith(f"{root}/"):  # A page that knows its own address only.
        target = target[len(root) :]
    plain = (
        target.startswith("/")
        and not target.startswith("//")
        and "\\" not in target
        and target.isprintable()
        and len(target) <= 2000
    )
    return target if plain else _START


def _form(request: Request, target: str, name: str = "", error: str = "") -> str:
    root = html.escape(find_root(request.scope))
    if not _auth().required:
        return f'<p>This server needs no login. <a href="{root}/">Go on</a>.</p>'
    action = f"{root}{LOGIN_PAGE}"
    hint = _LINK_HINT if _auth().local_token is not None else ""
    problem = f'<p class="error" role="alert">{html.escape(error)}</p>' if error else ""
    provider = _auth().provider
    if provider is not None:
        address = html.escape(f"{root}{_PROVIDER_LOGIN}?next={quote(target, safe='')}")
        hint += f'<p><a class="button" href="{address}">Log in with {html.escape(provider.settings.title)}</a></p>'
        if not _auth().tokens and _auth().users is None:
            return f"{problem}{hint}"
    return (
        f'{problem}{hint}<form method="post" action="{action}">'
        f'<input type="hidden" name="next" value="{html.escape(target)}">'
        f'<label>Name<input name="name" value="{html.escape(name)}" autocomplete="username" autofocus></label>'
        '<label>Password or token<input name="password" type="password" '
        'autocomplete="current-password" required></label>'
        "<button>Log in</button></form>"
    )


def _refuse(request: Request, err: ProGiDiffError, target: str, name: str) -> Response:
    headers = {"Retry-After": str(err.retry_after)} if isinstance(err, BusyError) else {}
    return _page("Log in", _form(request, target, name[:64], str(err)), err.status, headers)


def _page(title: str, content: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta '
        f'name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{content}</body></html>"
    )
    return HTMLResponse(page, status_code=status, headers={**(headers or {}), "Content-Security-Policy": _POLICY})
