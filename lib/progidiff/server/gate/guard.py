"""The guard in front of every route: who asks, from where, through which page, and how much may be sent.

One ASGI middleware, outermost, in this order: the path is a plain one; the ``Host`` is a name of this server (against
DNS rebinding); the user is known, or on this machine; a request that changes something does not come from a foreign
page; the user's role covers the row of `progidiff.server.gate.access`; the body stays within its limit while it
arrives; parameters of tasks name no files; the answer begins before its deadline.

An address counts as this machine's only if the connection says so and no proxy has passed the request on:
``X-Forwarded-For`` can take rights away and never gives any.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit

from fastapi import FastAPI
from monailabel.config import settings
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from progidiff.errors import AccessError, BusyError, LoginError, ProGiDiffError, RequestError, TooLargeError
from progidiff.server.gate.access import OPEN, UPLOAD, Rule, find_rule
from progidiff.server.gate.answers import build_answer, one_line
from progidiff.server.gate.auth import LOCAL_USER, Authenticator, User, check_role, set_user
from progidiff.server.options import ServerOptions
from progidiff.storage.json_text import read_json
from progidiff.users import Role

logger = logging.getLogger(__name__)

LOGIN_PAGE = "/progidiff/login"

FORBIDDEN_PARAMS = (
    "bundle_path",
    "image",
    "path",
    "session",
    "file",
    "model_dir",
    "model_path",
    "backbone",
    "store",
    "adapters",
    "app_dir",
    "studies",
)
"""Parameters of tasks that would name a file, a folder or another input; the host hands some of them to the environment
of a process.
"""

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_STALL = 30.0
"""Seconds without a byte of the body after which a request is given up."""
_DRAIN_SIZE, _DRAIN_TIME = 64 << 20, 10.0
"""Of a refused body so much is read and thrown away, so that clients that send first and listen later see the
reason.
"""

_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src "
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


class Guard:
    """The middleware.

    Args:
        app: What it guards.
        auth: Finds out who sends a request.
        options: Of the server: `hosts`, `cors_origins`, `max_upload_gb`.
    """

    def __init__(self, app: ASGIApp, auth: Authenticator, options: ServerOptions) -> None:
        self.app = app
        self._auth = auth
        self._hosts = options.hosts
        self._origins = options.cors_origins
        self._upload = int(options.max_upload_gb * 1e9)
        self._late: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Look at one request, and let it in or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # There is no route for web sockets, and none would have been checked.
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        path = _strip_prefix(scope)
        rule = find_rule(scope["method"], path)
        answer = _Answer(send, path)
        limit = self._upload if rule.body == UPLOAD else rule.body
        body = _Body(receive, limit)
        try:
            _check_path(path)
            self._check_host(headers)
            try:
                user = self._find_user(scope, headers, rule)
            except LoginError:
                if _is_page(scope["method"], headers, path):
                    await answer.replace(
                        RedirectResponse(f"{LOGIN_PAGE}?next={quote(_read_target(scope), safe='')}", status_code=303),
                        scope,
                    )
                    return
                raise
            self._check_origin(scope["method"], headers)
            if rule.role is not OPEN:
                check_role(user, rule.role)
            body.check_length(headers)
            if rule.params:
                _check_params(await body.read_all())
        except ProGiDiffError as err:
            logger.info(
                "%s %s -> %d %s: %s",
                scope["method"],
                one_line(path[:200]),
                err.status,
                type(err).__name__,
                one_line(str(err)),
            )
            if scope["method"] not in _SAFE_METHODS:
                await body.drain(headers)
            await answer.refuse(err, scope)
            return
        set_user(scope, user)
        await self._run(scope, body, answer, rule)

    def _find_user(self, scope: Scope, headers: Headers, rule: Rule) -> User:
        local = is_local(scope, headers)
        if not self._auth.required:
            if local:
                return LOCAL_USER
            if self._auth.anonymous is None:
                raise AccessError(
                    "This server answers its own machine only. To open it, an "
                    "administrator starts it with --conf token_file FILE or --conf users_file FILE, or with --conf "
                    "allow_anonymous true for everybody."
                )
            return User("", self._auth.anonymous)
        anonymous = User("", self._auth.anonymous or Role.READ)
        try:
            user = self._auth.find_user(headers, _read_cookies(headers))
        except LoginError:
            if rule.role is OPEN:
                return anonymous  # An old token must not keep anybody from logging in again.
            raise
        if user is None and self._auth.anonymous is None and rule.role is not OPEN:
            raise LoginError(
                "This server asks for a login: a bearer token (POST /auth/token gives "
                "one), or the page /progidiff/login."
            )
        return user or anonymous

    def _check_host(self, headers: Headers) -> None:
        host = split_host(headers.get("host", ""))[0]
        if host == "localhost" or host in self._hosts or _is_address(host):
            return
        if self._auth.required and not self._hosts:
            return  # A page under a foreign name has neither cookie nor token of this server.
        raise AccessError(
            f"The request is for '{host[:40]}', no known name of this server. If it is "
            f"one, start it with --conf hosts {host[:40]}."
        )

    def _check_origin(self, method: str, headers: Headers) -> None:
        """Refuse what a page of another origin makes a browser send; programs send neither header."""
        if method in _SAFE_METHODS:
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

    async def _run(self, scope: Scope, body: _Body, answer: _Answer, rule: Rule) -> None:
        """Let the routes answer, within the deadline; what is late goes on by itself, and its client gets a reason."""
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(self._call(scope, body, answer))
        try:
            while not answer.started:
                left = body.last_read + rule.deadline - loop.time()
                done, _ = await asyncio.wait({task}, timeout=max(left, 0.01))
                if done or answer.started:
                    break
                if loop.time() >= body.last_read + rule.deadline:
                    logger.warning("%s %s had no answer within %d s", scope["method"], scope["path"], rule.deadline)
                    self._late.add(task)
                    task.add_done_callback(self._forget)
                    await answer.refuse(_late(rule), scope)
                    return
            await task
        except asyncio.CancelledError:
            task.cancel()
            raise
        if body.refusal is not None:
            await answer.refuse(body.refusal, scope)

    async def _call(self, scope: Scope, body: _Body, answer: _Answer) -> None:
        async def send(message: Message) -> None:
            if body.refusal is None or answer.started:
                await answer.send(message)

        try:
            await self.app(scope, body.receive, send)
        except Exception:
            if body.refusal is None:
                raise

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._late.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A request that was past its deadline broke", exc_info=task.exception())


class _Body:
    """The body of a request as it arrives: counted, and given up when it stalls.

    Attributes:
        last_read: Loop time of the last piece, or of the beginning.
        refusal: Why the body was given up, or None.
    """

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive = receive
        self._limit = limit
        self._size = 0
        self._done = False
        self._replay: bytes | None = None
        self.last_read = asyncio.get_running_loop().time()
        self.refusal: ProGiDiffError | None = None

    def check_length(self, headers: Headers) -> None:
        """Refuse by the stated length, before a byte is read.

        Slicer's client repeats the length of its last form in requests that have no body: where none is taken, a length
        alone is no fault.
        """
        length = headers.get("content-length", "")
        if self._limit and length.isascii() and length.isdigit() and int(length) > self._limit:
            raise self._too_large()

    async def receive(self) -> Message:
        """As the routes call it."""
        if self._replay is not None:
            content, self._replay = self._replay, None
            return {"type": "http.request", "body": content, "more_body": False}
        if self._done:
            return await self._receive()
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        try:
            message = await asyncio.wait_for(self._receive(), _STALL if self._limit else None)
        except TimeoutError:
            self.refusal = BusyError(f"No byte of the request came for {_STALL:g} s. Send it again.")
            raise self.refusal from None
        if message["type"] == "http.request":
            self.last_read = asyncio.get_running_loop().time()
            self._size += len(message.get("body", b""))
            self._done = not message.get("more_body", False)
            if self._size > self._limit:
                self.refusal = self._too_large()
                raise self.refusal
        return message

    async def read_all(self) -> bytes:
        """The whole body, which the routes get again."""
        pieces = []
        while not self._done:
            message = await self.receive()
            if message["type"] != "http.request":
                break
            pieces.append(message.get("body", b""))
        self._replay = b"".join(pieces)
        return self._replay

    async def drain(self, headers: Headers) -> None:
        """Read what a refused client still sends, within bounds."""
        if (
            self._done
            or headers.get("expect")
            or not (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers)
        ):
            return
        left = _DRAIN_SIZE
        try:
            async with asyncio.timeout(_DRAIN_TIME):
                while left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    if message["type"] != "http.request" or not message.get("more_body", False):
                        return
        except TimeoutError:
            return

    def _too_large(self) -> TooLargeError:
        if not self._limit:
            return TooLargeError("This address takes no body. Send none.")
        return TooLargeError(
            f"The request is larger than the {self._limit:,} bytes that this address "
            "takes. Send less; for images and labels an administrator raises --conf max_upload_gb."
        )


class _Answer:
    """The answer on its way out, with the security headers; closed to the routes once the guard has answered."""

    def __init__(self, send: Send, path: str) -> None:
        self._send = send
        self._path = path
        self._closed = False
        self.started = False

    async def send(self, message: Message) -> None:
        """Pass a message on, unless the guard has answered already."""
        if self._closed:
            return
        if message["type"] == "http.response.start":
            self.started = True
            self._add_headers(MutableHeaders(scope=message))
        await self._send(message)

    async def refuse(self, err: ProGiDiffError, scope: Scope) -> None:
        """Answer with an error, and with nothing after it; too late if the routes have begun to answer."""
        response = build_answer(err)
        response.headers["Connection"] = (
            "close"  # The rest of the body, if there is one, is not read as the next request.
        )
        await self.replace(response, scope)

    async def replace(self, response: Response, scope: Scope) -> None:
        """Answer in the place of the routes."""
        if self.started:
            return

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await response(scope, nothing, self.send)
        self._closed = True

    def _add_headers(self, headers: MutableHeaders) -> None:
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        if headers.get("content-type", "").startswith("text/html"):
            headers.setdefault("Content-Security-Policy", _PAGE_POLICY)
        if not self._path.startswith(_CACHED):
            headers.setdefault(
                "Cache-Control", "no-store"
            )  # Images of patients do not stay in the caches of shared computers.


def _late(rule: Rule) -> BusyError:
    return BusyError(
        f"There was no answer within {rule.deadline} s. The work goes on: ask again "
        "later, what is finished by then is answered at once. GET /progidiff/jobs shows "
        "it, DELETE /progidiff/jobs/ID stops it.",
        retry_after=min(rule.deadline, 60),
    )


def install(web: FastAPI, auth: Authenticator, options: ServerOptions) -> None:
    """Put the guard before the routes, and the configured origins in the place of the host's CORS, which lets every
    page in.

    Safe to call again.

    Raises:
        RequestError: if the host's own login is switched on, whose check of tokens fails for valid ones and would shut
            everybody out.
    """
    if settings.MONAI_LABEL_AUTH_ENABLE:
        raise RequestError(
            "MONAI_LABEL_AUTH_ENABLE is set, and MONAI Label 0.8.5 refuses valid tokens. "
            "Unset it and use --conf users_file FILE."
        )
    replaced: tuple[Any, ...] = (CORSMiddleware, Guard)
    kept = [entry for entry in web.user_middleware if entry.cls not in replaced]
    ours = [Middleware(Guard, auth=auth, options=options)]
    if options.cors_origins:  # Before the guard, so that its refusals can be read by those pages too.
        origins = list(options.cors_origins)
        ours.insert(
            0,
            Middleware(
                CORSMiddleware, allow_origins=origins, allow_credentials=True, allow_methods=["*"], allow_headers=["*"]
            ),
        )
    web.user_middleware = [*ours, *kept]
    logger.info("Who may connect: %s.", auth.describe())


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


def _strip_prefix(scope: Scope) -> str:
    """The path as the table writes it: without a prefix of the proxy (`--root_path`) and of the host
    (MONAI_LABEL_API_STR).
    """
    path = str(scope["path"])
    for prefix in (str(scope.get("root_path", "")).rstrip("/"), settings.MONAI_LABEL_API_STR):
        if prefix and path.startswith(f"{prefix}/"):
            path = path[len(prefix) :]
    return path


def _check_path(path: str) -> None:
    """Refuse what means another place to somebody further on than it does here."""
    if "\\" in path or "//" in path or not path.isprintable() or any(part in (".", "..") for part in path.split("/")):
        raise RequestError("The address has '..', '//', a backslash or a control character in it. Write it plainly.")


def _check_params(body: bytes) -> None:
    """Refuse parameters of a task that name a file or another input, at the top or one level down, where the host looks
    too.
    """
    params = read_json(body, "The body")
    if params is None:
        return
    if not isinstance(params, dict):
        raise RequestError(f"The body is a JSON {type(params).__name__}. Send an object, for example {{}}.")
    for level in (params, *(value for value in params.values() if isinstance(value, dict))):
        for name in level:
            if name.strip().lower() in FORBIDDEN_PARAMS:
                raise RequestError(
                    f"Parameter {name[:40]} cannot be set by a request. Leave it out; "
                    "files and folders are set by --conf."
                )


def _read_cookies(headers: Headers) -> dict[str, str]:
    return cookie_parser(headers.get("cookie", ""))


def _read_target(scope: Scope) -> str:
    query = scope.get("query_string", b"").decode("latin1")
    return f"{scope['path']}?{query}" if query else str(scope["path"])


def _is_page(method: str, headers: Headers, path: str) -> bool:
    """Whether a browser asks for a page to show: then it is led to the login instead of being shown an error."""
    return method == "GET" and "text/html" in headers.get("accept", "") and path != LOGIN_PAGE
