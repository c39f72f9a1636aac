"""Logging in and out: for Slicer (``/auth/...``, as MONAI Label's own login would answer) and for browsers (a page and
a cookie).
"""

from __future__ import annotations

import html
import logging
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Depends, Form, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from monailabel.config import settings

from progidiff.errors import BusyError, LoginError, ProGiDiffError
from progidiff.server.gate.auth import COOKIE, Authenticator, User
from progidiff.server.gate.endpoints import CALLER, OPEN, READ, SMALL, Endpoints
from progidiff.server.parts import get_context

logger = logging.getLogger(__name__)

_START = "/"

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
button { margin-top: 1.2rem } .error { color: #c0392b }
"""


def build_endpoints() -> Endpoints:
    """Both kinds of login, and the start page."""
    prefix = settings.MONAI_LABEL_API_STR
    endpoints = Endpoints()

    @endpoints.get("/auth/", OPEN, tags=["Auth"], summary="Whether a login is needed (Slicer asks this first)")
    def describe_login() -> dict[str, Any]:
        return {"enabled": _auth().required, "client_id": "progidiff", "realm": ""}

    @endpoints.post(
        "/auth/token",
        OPEN,
        tags=["Auth"],
        summary="A bearer token for name and password; 10 failures in 5 minutes, then 429",
        takes="Form: username, password (or a token)",
        body=SMALL,
    )
    def give_token(
        request: Request, username: str = Form("", max_length=64), password: str = Form("", max_length=256)
    ) -> dict[str, Any]:
        auth = _auth()
        if not auth.required:
            return {
                "access_token": None,
                "token_type": None,
            }  # What the stock client expects of a server without a login.
        _, session = auth.log_in(username, password, _address(request))
        return {"access_token": session, "token_type": "bearer", "expires_in": int(auth.session_seconds)}

    @endpoints.get("/auth/token/valid", READ, tags=["Auth"], summary="Whose bearer token it is, if it is still good")
    def check_token(user: User = CALLER) -> dict[str, Any]:
        return {"username": user.name, "name": user.name, "email": None, "roles": [str(user.role)]}

    @endpoints.get(
        "/progidiff/login",
        OPEN,
        include_in_schema=False,
        summary="The login page",
        takes="Query: next (an address of this server)",
    )
    def show_login(next: str = _START) -> Response:
        return _page("Log in", _form(_check_target(next)))

    # The address is the login page's own, so a browser's back button and a failed try stay on it.
    @endpoints.post(
        "/progidiff/login",
        OPEN,
        include_in_schema=False,
        summary="Sets the session cookie",
        takes="Form: name, password, next (an address of this server)",
        body=SMALL,
    )
    def log_in(request: Request, fields: dict[str, str] = _FIELDS) -> Response:
        auth = _auth()
        name, target = fields.get("name", "").strip(), _check_target(fields.get("next", _START))
        try:
            _, session = auth.log_in(name, fields.get("password", ""), _address(request))
        except (LoginError, BusyError) as err:
            return _refuse(err, target, name)
        response = RedirectResponse(f"{prefix}{target}", status_code=303)
        response.set_cookie(
            COOKIE,
            session,
            max_age=int(auth.session_seconds),
            path="/",
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    @endpoints.post("/progidiff/logout", OPEN, include_in_schema=False, summary="Ends the session", body=SMALL)
    def log_out(request: Request) -> Response:
        _auth().end_session(request.cookies.get(COOKIE, ""))
        _auth().end_session(request.headers.get("authorization", "").partition(" ")[2].strip())
        response = RedirectResponse(f"{prefix}/progidiff/login", status_code=303)
        response.delete_cookie(COOKIE, path="/", httponly=True, samesite="strict")
        return response

    @endpoints.get("/", READ, include_in_schema=False, summary="Start page: links, and who is logged in")
    def show_start(user: User = CALLER) -> Response:
        who = f"You are {html.escape(user.name)} and may {user.role}." if user.name else f"You may {user.role}."
        out = (
            f'<form method="post" action="{prefix}/progidiff/logout"><button>Log out</button></form>'
            if user.name
            else ""
        )
        links = "".join(
            f'<li><a href="{prefix}{address}">{text}</a></li>'
            for address, text in (
                ("/ohif/", "OHIF viewer"),
                ("/info/", "what this server offers"),
                ("/progidiff/jobs", "running jobs"),
                ("/openapi.json", "description of all addresses"),
            )
        )
        return _page("ProGiDiff Label", f"<p>{who} For research, not for diagnosis.</p><ul>{links}</ul>{out}")

    return endpoints


async def _read_fields(request: Request) -> dict[str, str]:
    """The fields of a plain form; read here, so that an error is shown in the page and not as JSON."""
    body = await request.body()
    return dict(parse_qsl(body.decode("utf-8", errors="replace"), keep_blank_values=True, max_num_fields=20))


_FIELDS = Depends(_read_fields)


def _auth() -> Authenticator:
    return get_context().auth


def _address(request: Request) -> str:
    return request.client.host if request.client else ""


def _check_target(target: str) -> str:
    """Where to go after the login, if that is on this server; else the start page.

    Example:
        >>> _check_target("/ohif/?a=1"), _check_target("//evil.example"), _check_target("https://evil.example")
        ('/ohif/?a=1', '/', '/')
    """
    plain = (
        target.startswith("/")
        and not target.startswith("//")
        and "\\" not in target
        and target.isprintable()
        and len(target) <= 2000
    )
    return target if plain else _START


def _form(target: str, name: str = "", error: str = "") -> str:
    if not _auth().required:
        return f'<p>This server needs no login. <a href="{settings.MONAI_LABEL_API_STR}/">Go on</a>.</p>'
    action = f"{settings.MONAI_LABEL_API_STR}/progidiff/login"
    problem = f'<p class="error" role="alert">{html.escape(error)}</p>' if error else ""
    return (
        f'{problem}<form method="post" action="{action}">'
        f'<input type="hidden" name="next" value="{html.escape(target)}">'
        f'<label>Name<input name="name" value="{html.escape(name)}" autocomplete="username" autofocus></label>'
        '<label>Password or token<input name="password" type="password" '
        'autocomplete="current-password" required></label>'
        "<button>Log in</button></form>"
    )


def _refuse(err: ProGiDiffError, target: str, name: str) -> Response:
    headers = {"Retry-After": str(err.retry_after)} if isinstance(err, BusyError) else {}
    return _page("Log in", _form(target, name[:64], str(err)), err.status, headers)


def _page(title: str, content: str, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta '
        f'name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{content}</body></html>"
    )
    return HTMLResponse(page, status_code=status, headers={**(headers or {}), "Content-Security-Policy": _POLICY})
