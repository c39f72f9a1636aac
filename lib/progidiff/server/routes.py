"""All our routes, in the order in which they are asked; a module with routes adds its line here."""

from __future__ import annotations

from fastapi import APIRouter

from progidiff.server import service

_BUILDERS = (service.build_router,)


def build_routers() -> list[APIRouter]:
    """One router per module."""
    return [build() for build in _BUILDERS]
