"""All our routes, in the order in which they are asked; a module with routes adds its line here."""

from __future__ import annotations

from fastapi import APIRouter

from progidiff.server.routes import (
    dicomweb,
    health,
    host,
    inference,
    labels,
    logins,
    next_sample,
    ohif,
    review,
    training,
)

_BUILDERS = (
    logins.build_router,
    inference.build_router,
    dicomweb.build_router,
    ohif.build_router,
    labels.build_router,
    review.build_router,
    next_sample.build_router,
    training.build_router,
    health.build_router,
    host.build_router,  # Stays last: it closes addresses of the host that nobody above answers.
)


def build_routers() -> list[APIRouter]:
    """One router per module."""
    return [build() for build in _BUILDERS]
