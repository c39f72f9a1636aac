"""For whatever watches over servers: whether this one is alive, whether it answers prompts, and its figures."""

from __future__ import annotations

import anyio
from anyio import CapacityLimiter
from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict

from progidiff.errors import AccessError, ClosedError, LoginError, NotReadyError
from progidiff.server.gate.auth import User
from progidiff.server.gate.endpoints import CALLER, OPEN, Endpoints
from progidiff.server.metrics import render
from progidiff.server.options import EVERYBODY, OFF
from progidiff.server.parts import get_context
from progidiff.users import Role, find_token

_READY_SECONDS = 5.0
"""A disk or a PACS that takes longer to answer keeps prompts waiting too."""


class AliveAnswer(BaseModel):
    """The process answers.

    Attributes:
        status: "alive".
    """

    model_config = ConfigDict(frozen=True)

    status: str = "alive"


class ReadyAnswer(BaseModel):
    """Prompts are answered.

    Attributes:
        status: "ready".
    """

    model_config = ConfigDict(frozen=True)

    status: str = "ready"


def build_endpoints() -> Endpoints:
    """`/healthz`, `/readyz` and `/metrics`."""
    endpoints = Endpoints()
    # Threads of their own: where all others are busy, the server is alive all the same.
    looks, scrapes = CapacityLimiter(1), CapacityLimiter(1)

    @endpoints.get("/healthz", OPEN, tags=["Operations"], summary="Whether the process answers", probe=True)
    async def tell_alive() -> AliveAnswer:
        return AliveAnswer()

    @endpoints.get(
        "/readyz",
        OPEN,
        tags=["Operations"],
        summary="Whether prompts are answered: weights, images, disk, not stopping; 503 with the reason otherwise. The "
        "first call loads the weights",
        probe=True,
    )
    async def tell_ready() -> ReadyAnswer:
        try:
            with anyio.fail_after(_READY_SECONDS):
                await anyio.to_thread.run_sync(get_context().readiness.check, limiter=looks, abandon_on_cancel=True)
        except TimeoutError as err:
            raise NotReadyError(
                f"The images or the disk did not answer within {_READY_SECONDS:g} s. Look whether they hang."
            ) from err
        return ReadyAnswer()

    @endpoints.get(
        "/metrics",
        OPEN,
        tags=["Operations"],
        summary="Figures for Prometheus; for administrators, for the tokens of `metrics_token_file`, or with `metrics "
        "open` for everybody",
        probe=True,
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text, or OpenMetrics if asked"}},
    )
    async def tell_figures(http: Request, user: User = CALLER) -> Response:
        context = get_context()
        _check_access(http, user)
        accept = http.headers.get("accept", "")
        text, media_type = await anyio.to_thread.run_sync(render, context.registry, accept, limiter=scrapes)
        return Response(text, headers={"Content-Type": media_type})

    return endpoints


def _check_access(http: Request, user: User) -> None:
    """Let a scraper pass that may read the figures.

    Raises:
        ClosedError: if nobody may.
        LoginError: if nobody is logged in.
        AccessError: if somebody is, who may not.
    """
    context = get_context()
    choice = context.options.metrics
    if choice == OFF:
        raise ClosedError("This server tells no figures. Start it without --conf metrics off.")
    kind, _, secret = http.headers.get("authorization", "").partition(" ")
    known = kind.lower() == "bearer" and find_token(context.metrics_tokens, secret.strip()) is not None
    if known or choice == EVERYBODY or user.role.covers(Role.ADMINISTER):
        return
    cure = (
        "Send a token of --conf metrics_token_file, or one of an administrator, as a bearer token; --conf metrics open "
        "lets everybody read them."
    )
    if not user.name:
        raise LoginError(f"The figures of this server need a login. {cure}")
    raise AccessError(f"The figures of this server are for administrators, and '{user.name}' may {user.role}. {cure}")
