"""An address of the server as one declaration: its route, who may call it, what it takes, how much of it, for how long.

A module with routes declares each with `Endpoints`, whose decorators are the web framework's with the rest added::

    endpoints = Endpoints()

    @endpoints.get("/progidiff/jobs", READ, takes="Query: image", tags=["ProGiDiff"], summary="Waiting jobs")
    def list_jobs(image: str | None = None) -> list[Job]: ...

What the host answers is declared too, without a function. All of them together are the `EndpointTable` that the
middlewares of `progidiff.server.gate.guard` enforce before any route runs, and that docs/security.md prints:
``python -m progidiff.server.routes.table`` writes that part of the page again. What is not declared is refused to
everybody but administrators.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from monailabel.config import settings

from progidiff.errors import AccessError
from progidiff.server.gate.answers import ErrorAnswer, JSONAnswer
from progidiff.server.gate.auth import User, check_role, find_user
from progidiff.users import Role

UPLOAD = -1
"""As `Endpoint.body`: what `--conf max_upload_gb` allows."""

SMALL, MEDIUM, LARGE = 64 << 10, 1 << 20, 512 << 20
"""Bytes of a body: a login; a JSON text; instances that are read into memory as a whole."""

QUICK, LONG = 60, 3600
"""Deadlines in seconds, counted from the last byte of the request. What takes LONG goes on after it and keeps its
result.
"""

READ, ANNOTATE, ADMINISTER = Role.READ, Role.ANNOTATE, Role.ADMINISTER
OPEN = None
"""As `Endpoint.role`: before a login too."""

CLOSED_MARK = "closed: 410 with the reason"
"""How the summary of an address begins that this server does not offer."""

_ENDPOINT_KEY = "progidiff_endpoint"

Function = TypeVar("Function", bound=Callable[..., Any])


class Content(StrEnum):
    """What a body holds.

    Attributes:
        ANY: What the route finds: a form, instances, nothing.
        JSON: A JSON text, which is read before the route sees it.
        PARAMS: A JSON object of parameters of a task, in which no name of a file or another task may stand.
    """

    ANY = "any"
    JSON = "json"
    PARAMS = "params"


@dataclass(frozen=True)
class Endpoint:
    """One address.

    Attributes:
        method: GET stands for HEAD too.
        path: As the web framework writes it, ``{name}`` for one part and ``{name:path}`` for the rest.
        role: The least role; OPEN for none.
        summary: What it does, for people.
        takes: Query, form or body, for people.
        body: Most bytes of the request's body, or `UPLOAD`.
        deadline: Seconds until the answer begins.
        content: What the body holds.
        probe: Whether every machine gets an answer, also where the server answers its own only: whoever watches over
            servers asks from elsewhere.
    """

    method: str
    path: str
    role: Role | None
    summary: str = ""
    takes: str = ""
    body: int = 0
    deadline: int = QUICK
    content: Content = Content.ANY
    probe: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """As the web framework reads a path template.

        Example:
            >>> one, rest = Endpoint("GET", "/a/{b}", READ), Endpoint("GET", "/a/{b:path}", READ)
            >>> bool(one.pattern.fullmatch("/a/x/y")), bool(rest.pattern.fullmatch("/a/x/y"))
            (False, True)
        """
        parts = re.split(r"(\{\w+(?::path)?\})", self.path)
        return re.compile("".join(_compile_part(part) for part in parts), re.DOTALL)


def _compile_part(part: str) -> str:
    if not part.startswith("{"):
        return re.escape(part)
    return ".*" if part.endswith(":path}") else "[^/]+"


UNKNOWN = Endpoint("*", "*", ADMINISTER, "Whatever is not in this table")


@dataclass(frozen=True)
class EndpointTable:
    """All addresses of a server, in the order in which they are asked.

    Attributes:
        endpoints: What comes first answers first.
    """

    endpoints: tuple[Endpoint, ...]

    def find(self, method: str, path: str) -> Endpoint:
        """The first one that fits; `UNKNOWN` if none does.

        A missing or surplus slash at the end, for which the web framework redirects, does not count.

        Example:
            >>> table = EndpointTable((Endpoint("GET", "/images", READ), Endpoint("POST", "/reload", ADMINISTER)))
            >>> table.find("HEAD", "/images").role, table.find("POST", "/reload/").path
            (<Role.READ: 'read'>, '/reload')
        """
        method = "GET" if method == "HEAD" else method
        for wanted in (path, path[:-1] if path.endswith("/") else path + "/"):
            for endpoint in self.endpoints:
                if endpoint.method == method and endpoint.pattern.fullmatch(wanted):
                    return endpoint
        return UNKNOWN

    def list_words(self) -> set[str]:
        """What stands between the slashes of addresses, placeholders left out."""
        return {part for endpoint in self.endpoints for part in endpoint.path.split("/") if part and "{" not in part}

    def render(self) -> str:
        """The table in Markdown."""
        lines = ["| address | who | what it does | takes | body up to | answers within |", "|---|---|---|---|---|---|"]
        for endpoint in (*self.endpoints, UNKNOWN):
            cells = (
                f"`{endpoint.method} {endpoint.path}`",
                str(endpoint.role) if endpoint.role else "everybody",
                endpoint.summary,
                endpoint.takes,
                _show_size(endpoint.body),
                f"{endpoint.deadline} s",
            )
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)


def _show_size(size: int) -> str:
    if size == UPLOAD:
        return "`max_upload_gb`"
    return f"{size >> 20} MB" if size >= 1 << 20 else f"{size >> 10} kB" if size else "nothing"


@dataclass
class Endpoints:
    """The addresses of one module, as it declares them.

    Attributes:
        router: The functions behind them, for the web application.
        declared: The declarations, in order.
    """

    router: APIRouter = field(
        default_factory=lambda: APIRouter(
            prefix=settings.MONAI_LABEL_API_STR,
            default_response_class=JSONAnswer,
            responses={"default": {"model": ErrorAnswer, "description": "What happened, why, and what to do"}},
        )
    )
    declared: list[Endpoint] = field(default_factory=list)

    def get(self, path: str, role: Role | None, **declaration: Any) -> Callable[[Function], Function]:
        """Declare a GET, see `add`."""
        return self.add("GET", path, role, **declaration)

    def post(self, path: str, role: Role | None, **declaration: Any) -> Callable[[Function], Function]:
        """Declare a POST, see `add`."""
        return self.add("POST", path, role, **declaration)

    def put(self, path: str, role: Role | None, **declaration: Any) -> Callable[[Function], Function]:
        """Declare a PUT, see `add`."""
        return self.add("PUT", path, role, **declaration)

    def delete(self, path: str, role: Role | None, **declaration: Any) -> Callable[[Function], Function]:
        """Declare a DELETE, see `add`."""
        return self.add("DELETE", path, role, **declaration)

    def head(self, path: str, **route: Any) -> Callable[[Function], Function]:
        """A function of its own for HEAD, under the declaration of the GET of the same address."""
        return self.router.api_route(path, methods=["HEAD"], dependencies=[Depends(_require_declared)], **route)

    def add(
        self,
        method: str,
        path: str,
        role: Role | None,
        *,
        summary: str,
        takes: str = "",
        body: int = 0,
        deadline: int = QUICK,
        content: Content = Content.ANY,
        probe: bool = False,
        **route: Any,
    ) -> Callable[[Function], Function]:
        """Declare an address; the answer is the decorator of its function.

        Args:
            method: GET, POST, PUT or DELETE.
            path: As the web framework writes it.
            role: The least role; OPEN for none.
            summary: What it does, for docs/security.md and the OpenAPI description.
            takes: Query, form or body, for docs/security.md.
            body: Most bytes of the request's body, or `UPLOAD`.
            deadline: Seconds until the answer begins.
            content: What the body holds.
            probe: Whether every machine gets an answer.
            route: Whatever else the web framework takes: tags, response_model, include_in_schema.
        """
        self.declared.append(Endpoint(method, path, role, summary, takes, body, deadline, content, probe))
        return self._route(method, path, role, {"summary": summary, **route})

    def of_host(self, *endpoints: Endpoint) -> None:
        """Declare addresses that the host answers."""
        self.declared.extend(endpoints)

    def _route(
        self, method: str, path: str, role: Role | None, route: dict[str, Any]
    ) -> Callable[[Function], Function]:
        # Asked here once more: a route that no guard stands before answers nobody.
        guarded = [] if role is OPEN else [Depends(_require(role))]
        return self.router.api_route(path, methods=[method], dependencies=guarded, **route)


def _require_declared(request: Request) -> None:
    role = get_endpoint(request.scope).role
    if role is not OPEN:
        check_role(find_user(request.scope), role)


def _require(role: Role) -> Callable[[Request], None]:
    def check(request: Request) -> None:
        check_role(find_user(request.scope), role)

    return check


def build_table(modules: Sequence[Endpoints]) -> EndpointTable:
    """The table of all that these modules declare."""
    return EndpointTable(tuple(endpoint for module in modules for endpoint in module.declared))


def _find_caller(request: Request) -> User:
    return find_user(request.scope)


CALLER: User = Depends(_find_caller)
"""Default of a route's parameter `user`, for those that want to know who asks: ``user: User = CALLER``."""


def set_endpoint(scope: Any, endpoint: Endpoint) -> None:
    """Leave the declaration of a request's address where `get_endpoint` finds it."""
    scope[_ENDPOINT_KEY] = endpoint


def get_endpoint(scope: Any) -> Endpoint:
    """The declaration of a request's address.

    Raises:
        AccessError: if nobody has looked it up.
    """
    endpoint = find_endpoint(scope)
    if endpoint is None:
        raise AccessError("Nobody has looked at this address. Start the server with --app apps/progidiff.")
    return endpoint


def find_endpoint(scope: Any) -> Endpoint | None:
    """The declaration of a request's address; None if nobody has looked it up."""
    endpoint = scope.get(_ENDPOINT_KEY)
    return endpoint if isinstance(endpoint, Endpoint) else None
