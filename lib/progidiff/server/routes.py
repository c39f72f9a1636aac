"""All our routes, in the order in which they are asked; a module with routes adds its line here."""

from __future__ import annotations

from fastapi import APIRouter

from progidiff.server import (
    auth_routes,
    dicomweb_routes,
    host_routes,
    label_routes,
    ohif_routes,
    review_routes,
    selection_routes,
    service,
    training_routes,
)

_BUILDERS = (
    auth_routes.build_router,
    service.build_router,
    dicomweb_routes.build_router,
    ohif_routes.build_router,
    label_routes.build_router,
    review_routes.build_router,
    selection_routes.build_router,
    training_routes.build_router,
    host_routes.build_router,  # Stays last: it closes addresses of the host that nobody above answers.
)


def build_routers() -> list[APIRouter]:
    """One router per module."""
    return [build() for build in _BUILDERS]
